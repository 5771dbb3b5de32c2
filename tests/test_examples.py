"""Each example and each block of code in the documentation runs, with budgets so small that learning has just begun."""

import importlib.util
import math
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

import sb3_m3po
from sb3_m3po.envs import suites
from tests.helpers import Hasty, RandomEnv

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"


@pytest.fixture(autouse=True)
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Hasty]:
    """:return: Models that were made, the newest last"""
    monkeypatch.setattr(sb3_m3po, "M3PO", Hasty)
    monkeypatch.setattr(Hasty, "made", [])
    monkeypatch.chdir(tmp_path)
    return Hasty.made


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_one_task(made: list[Hasty]) -> None:
    assert -2_000 < load("one_task").main(256) < 0
    assert made[0]._n_updates == 256


def test_images(made: list[Hasty]) -> None:
    pytest.importorskip("minigrid")
    assert 0 <= load("images").main(256) <= 1
    assert made[0]._n_updates == 256 and made[0].observation_space.dtype == np.uint8


def test_planning_compares_three_ways_of_acting(made: list[Hasty]) -> None:
    scores = load("planning").main(256, episodes=1)
    # The world model has learned something: each way acts differently
    assert len(scores) == len(set(scores.values())) == 3
    assert all(math.isfinite(score) for score in scores.values())
    assert made[0]._n_updates == 256


def test_save_and_continue_keeps_the_memory_and_goes_on_learning() -> None:
    model = load("save_and_continue").main(256)
    assert model.num_timesteps == model.replay_buffer.size() == 512
    assert model._n_updates == 512


def test_three_tasks(made: list[Hasty]) -> None:
    scores = load("three_tasks").main(256, episodes=1)
    assert list(scores) == ["Pendulum-v1", "MountainCarContinuous-v0", "gentle_pendulum"]
    assert all(math.isfinite(score) for score in scores.values())
    assert made[0]._n_updates == 384


def test_meta_world(made: list[Hasty], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("metaworld")
    # Two of the ten: an episode has 500 steps
    monkeypatch.setattr(suites, "meta_world_names", lambda suite: ["reach-v3", "push-v3"])
    scores = load("meta_world").main(256, episodes=1, vec_env_cls=DummyVecEnv)
    assert len(scores) == len(scores.success_rate) == 2
    assert made[0]._n_updates > 0 and Path("mt10/final_model.zip").exists()


@pytest.mark.parametrize("name", sorted(path.stem for path in EXAMPLES.glob("*.py") if path.stem != "demo"))
def test_an_example_is_short(name: str) -> None:
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60


@pytest.mark.expensive
def test_demo(tmp_path: Path) -> None:
    pytest.importorskip("mujoco")
    command = [sys.executable, str(EXAMPLES / "demo.py"), "--seconds", "1", "--output", str(tmp_path)]
    # The terminal's width breaks lines that hold long paths
    output = " ".join(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert {path.name for path in tmp_path.iterdir()} == {
        *("curves.png", "m3po_halfcheetah.zip", "ppo_halfcheetah.zip"),
        *("tasks.png", "m3po_tasks.zip", "ppo_tasks.zip"),
    }
    for text in ("Score against environment steps", "Score against CPU-seconds", "with the policy alone", "with planning"):
        assert text in output
    assert len(re.findall(r"(?:Pendulum-v1|InvertedPendulum-v5|Reacher-v5) │(?: *-?[\d,]+ │){3}", output)) == 3
    # For equal CPU-seconds, to the next rollout
    seconds = [float(text) for text in re.findall(r"steps in ([\d.]+) CPU-seconds", output)]
    assert len(seconds) == 4 and all(second >= 1 for second in seconds)


# ----------------------------------------------------------- documentation


def code_blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), re.DOTALL)


def shortened(code: str) -> str:
    """:return: The same with small numbers: thousands of steps become 256, evaluated at once, ten episodes one"""
    code = code.replace("n_eval_episodes=10", "n_eval_episodes=1").replace("eval_freq=1_000", "eval_freq=64")
    return re.sub(r"\d+000_steps", "256_steps", re.sub(r"\b\d+_000\b", "256", code))


@pytest.mark.parametrize("page", ["README.md", "docs/index.md", "docs/quickstart.md", "docs/multitask.md", "docs/m3po.md"])
def test_code_of_the_documentation_runs(page: str, made: list[Hasty]) -> None:
    image = spaces.Box(0, 255, (36, 36, 3), np.uint8)
    names: dict[str, Any] = {"__name__": "__main__"}
    blocks = code_blocks(page)
    assert blocks
    for block in blocks:
        if "CnnPolicy" in block:
            names["env"] = DummyVecEnv([lambda: RandomEnv(image)])
        elif "model" in names:
            names["obs"] = names["model"].get_env().reset()
        exec(compile(shortened(block), f"{page}: {block[:40]!r}", "exec"), names)
    assert made[0]._n_updates > 0


def test_sizes_in_the_documentation_exist() -> None:
    (block,) = code_blocks("docs/policy_kwargs.md")
    names: dict[str, Any] = {"M3PO": Hasty, "env": RandomEnv()}
    exec(block, names)
    assert names["model"].policy.world_model.latent_dim == 64
