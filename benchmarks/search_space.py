"""
Time what trials of the search space cost per environment step, beside the defaults: corners of it, with as many samples per
step as they allow and the bonus, on HalfCheetah-v5, one thread.

No trial may take more than ``sb3_m3po.zoo.MAX_COST`` times as long; the estimate that sees to it knows batch, width and
planner.

``python -m benchmarks.search_space``
"""

import argparse
import itertools
from typing import Any

import torch as th
from optuna.trial import FixedTrial

from benchmarks.envs import vec_env
from benchmarks.record import Clock, commit, machine
from benchmarks.speed import ENV_ID, time_updates
from sb3_m3po import M3PO
from sb3_m3po.zoo import MAX_COST, NETWORKS, sample_m3po_params

CORNERS = {"batch_size_pow": (6, 7, 8), "planner_samples": (0, 64), "network": tuple(NETWORKS)}
REST = {"learning_rate": 1e-3, "one_minus_gamma": 0.01, "n_step_returns": 3, "samples_per_step_pow": 8, "target_kl": 1.0}


def corner_arguments(corner: dict[str, Any]) -> dict[str, Any]:
    """
    :param corner: what a trial has drawn of :data:`CORNERS`
    :return: arguments of M3PO
    """
    trial = FixedTrial({**REST, "bonus_coef": 0.3, **corner})
    return sample_m3po_params(trial, n_actions=6, n_envs=1, additional_args={})


def model_of(arguments: dict[str, Any]) -> M3PO:
    """
    :param arguments: of M3PO
    :return: a model whose updates have begun
    """
    model = M3PO("MlpPolicy", vec_env(ENV_ID, 1, 0), seed=0, device="cpu", learning_starts=100, **arguments)
    return model.learn(256)


def milliseconds_per_step(model: M3PO, steps: int) -> float:
    """
    :param model: a model whose updates have begun
    :param steps: environment steps to go on for
    :return: CPU-milliseconds per environment step: collecting, and the updates that are due for a step (those done are a
        multiple of ``sync_interval``)
    """
    before, clock = model._n_updates, Clock()
    clock.start()
    _, per_update = time_updates(model, steps)
    clock.stop()
    collecting = 1_000 * clock.cpu - per_update * (model._n_updates - before)
    return collecting / steps + per_update * model.utd_ratio


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: the command line, ``sys.argv`` by default
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=256, help="environment steps of each corner")
    args = parser.parse_args(argv)
    th.set_num_threads(1)
    print(f"{ENV_ID}, one thread; {machine()}; commit {commit()}\n")
    print("| batch | planner's samples | networks | updates per step | ms per step | relative to the defaults |")
    print("|" + " --- |" * 6, flush=True)
    dearest, defaults = 0.0, model_of({})
    for values in itertools.product(*CORNERS.values()):
        arguments = corner_arguments(dict(zip(CORNERS, values, strict=True)))
        # Beside each of them, since the machine's own speed varies
        usual, cost = (milliseconds_per_step(model, args.steps) for model in (defaults, model_of(arguments)))
        ratio = cost / usual
        dearest = max(dearest, ratio)
        settings = f"{arguments['batch_size']} | {values[1]} | {values[2]} | {arguments['utd_ratio']:.2f}"
        print(f"| {settings} | {cost:.1f} | {ratio:.2f} |", flush=True)
    print(f"\nThe most expensive: {dearest:.2f} times the defaults' time; {MAX_COST:g} are allowed")


if __name__ == "__main__":
    main()
