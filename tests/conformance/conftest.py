"""
Stands beside the tests of Stable-Baselines3 and its contrib package while they run; see `run.py`.

It puts the shims in the place of PPO, A2C and TRPO, selects the cases that involve them, and counts updates: where the
original would learn (`trains.txt`), a case passes only if M3PO learned too.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sb3_contrib
import shims
import stable_baselines3
from stable_baselines3.common.base_class import BaseAlgorithm

HERE = Path(shims.__file__).parent
#: Whether the originals run, to find the cases in which they learn
REFERENCE = os.environ.get("CONFORMANCE_REFERENCE") == "1"
NAMES = {"PPO": stable_baselines3, "A2C": stable_baselines3, "TRPO": sb3_contrib}


def read_list(name: str) -> list[str]:
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def read_not_applicable() -> dict[str, str]:
    """:return: Why a case can't apply, by the beginning of its id"""
    pairs = (line.split(" | ") for line in read_list("not_applicable.txt"))
    return {case.strip(): reason.strip() for case, reason in pairs}


class Counter:
    updates = 0


def count_updates(algorithm: type[Any]) -> None:
    train = algorithm.train

    def counted(self: Any) -> None:
        before = self._n_updates
        train(self)
        Counter.updates += self._n_updates - before

    algorithm.train = counted


if not REFERENCE:
    for name, package in NAMES.items():
        setattr(package, name, getattr(shims, name))
SWAPPED = [getattr(package, name) for name, package in NAMES.items()]
for algorithm in SWAPPED if REFERENCE else [shims.M3PO]:
    count_updates(algorithm)


def involves_swapped(item: pytest.Function) -> bool:
    """Whether an algorithm that the case is parametrised with is swapped; else whether its code names one."""
    params = list(item.callspec.params.values()) if hasattr(item, "callspec") else []
    algorithms = [p for p in params if isinstance(p, type) and issubclass(p, BaseAlgorithm)]
    if algorithms:
        return any(algorithm in SWAPPED for algorithm in algorithms)
    fixtures = [definitions[-1].func for definitions in item._fixtureinfo.name2fixturedefs.values()]
    named = {p.upper() for p in params if isinstance(p, str)}
    named.update(*(function.__code__.co_names for function in [item.function, *fixtures] if hasattr(function, "__code__")))
    return not named.isdisjoint(NAMES)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    selected = [item for item in items if isinstance(item, pytest.Function) and involves_swapped(item)]
    config.hook.pytest_deselected(items=[item for item in items if item not in selected])
    items[:] = selected
    not_applicable = {} if REFERENCE else read_not_applicable()
    for item in items:
        item.user_properties.append(("case", item.nodeid))
        for case, reason in not_applicable.items():
            if item.nodeid == case or item.nodeid.startswith(case + "["):
                item.add_marker(pytest.mark.skip(reason=f"not applicable: {reason}"))


TRAINS = set() if REFERENCE else set(read_list("trains.txt"))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Iterator[None]:
    Counter.updates = 0
    result = yield
    pyfuncitem.user_properties.append(("updates", Counter.updates))
    if pyfuncitem.nodeid in TRAINS and Counter.updates == 0:
        pytest.fail("M3PO made no update where the original would", pytrace=False)
    return result
