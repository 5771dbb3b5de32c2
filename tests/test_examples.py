"""Each example runs, with budgets so small that only the last one reaches its first updates."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_task() -> None:
    assert -2_000 < load("one_task").main(256) < 0


def test_images() -> None:
    pytest.importorskip("minigrid")
    assert 0 <= load("images").main(256) <= 1


def test_planning_compares_three_ways_of_acting() -> None:
    scores = load("planning").main(256, episodes=1)
    assert len(scores) == 3
    assert all(math.isfinite(score) for score in scores.values())


def test_save_and_continue_keeps_the_memory_and_goes_on_learning() -> None:
    model = load("save_and_continue").main(512)
    assert model.num_timesteps == model.replay_buffer.size() == 1_024
    assert model._n_updates == 512


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "demo"))
def test_an_example_is_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60
