"""What the parts share: verdicts, and the comparison of what two models learned."""

import argparse
import sys
from typing import NoReturn

import torch as th

from benchmarks.record import commit, machine
from sb3_m3po import M3PO


class Verdicts:
    """
    Prints a line for each thing that was judged, and ends the process accordingly.

    :param title: what is measured
    """

    def __init__(self, title: str) -> None:
        th.set_num_threads(1)
        self._passed: list[bool] = []
        print(f"{title}; {machine()}; commit {commit()}", flush=True)

    def judge(self, passed: bool, text: str) -> None:
        """
        :param passed: whether the part does what it should
        :param text: what was found, and what is asked for
        """
        self._passed.append(passed)
        print(f"{'pass' if passed else 'FALLS SHORT'}: {text}", flush=True)

    def exit(self) -> NoReturn:
        """End with 0 if everything passed, else with 1."""
        sys.exit(0 if self._passed and all(self._passed) else 1)


def training_arguments(description: str | None, steps: int) -> argparse.ArgumentParser:
    """
    :param description: of the script
    :param steps: environment steps by default
    :return: a parser for what one training takes: environment, steps, seed
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", default="Pendulum-v1")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def learned(model: M3PO) -> dict[str, th.Tensor]:
    """
    :param model: a model
    :return: copies of everything that it learned, by name: networks, statistics, scales, coefficients, optimizers
    """
    tensors = dict(model.policy.state_dict())
    for name in ("optimizer", "model_optimizer", "coef_optimizer"):
        for index, state in getattr(model.policy, name).state_dict()["state"].items():
            tensors |= {f"{name}.{index}.{key}": value for key, value in state.items()}
    return {name: tensor.clone() for name, tensor in tensors.items()}


def differing(first: dict[str, th.Tensor], second: dict[str, th.Tensor]) -> list[str]:
    """
    :param first: from :func:`learned`
    :param second: likewise
    :return: names of the tensors that are not equal to the bit, or that only one of them has
    """
    shared = first.keys() & second.keys()
    return sorted((first.keys() ^ second.keys()) | {name for name in shared if not th.equal(first[name], second[name])})
