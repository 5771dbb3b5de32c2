"""Agents go to the Hugging Face hub and come back, by the package that Stable-Baselines3 has for it."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from stable_baselines3.common.monitor import Monitor

from sb3_m3po import M3PO
from tests.helpers import tiny_model
from tests.hub import Hub, serving

pytest.importorskip("huggingface_sb3")


def run(hub: Hub, folder: Path, code: str) -> str:
    """:return: What the code printed in a process that takes this hub for the real one; it reads its address at import"""
    variables = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(folder / "cache"),
        "HF_TOKEN": "hf_stand_in",
        "HF_HUB_DISABLE_XET": "1",
        "TRUST_REMOTE_CODE": "True",
        "PYTHONPATH": str(Path(__file__).parents[1]),
        "PATH": "/usr/bin:/bin",
        "HOME": str(folder),
        "SDL_VIDEODRIVER": "dummy",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_model_is_packaged_with_its_evaluation_and_loaded(tmp_path: Path) -> None:
    model = tiny_model("CartPole-v1").learn(48)
    model.save(tmp_path / "agent.zip")
    with serving() as hub:
        run(
            hub,
            tmp_path,
            """
            import gymnasium as gym
            from huggingface_sb3 import package_to_hub
            from stable_baselines3.common.monitor import Monitor

            from sb3_m3po import M3PO

            env = Monitor(gym.make("CartPole-v1", render_mode="rgb_array"))
            package_to_hub(
                M3PO.load("agent.zip"), "m3po-CartPole-v1", "M3PO", "CartPole-v1", env, "me/m3po-CartPole-v1",
                commit_message="An agent", n_eval_episodes=2, video_length=20, token="hf_stand_in",
            )
            """,
        )
        names = {name for owner, name in hub.files if owner == "me/m3po-CartPole-v1"}
        assert {"m3po-CartPole-v1.zip", "config.json", "results.json", "README.md"} <= names
        result = json.loads(hub.files["me/m3po-CartPole-v1", "results.json"])
        assert 1 <= float(result["mean_reward"]) <= 500 and result["n_eval_episodes"] == 2
        assert b"**M3PO** Agent playing **CartPole-v1**" in hub.files["me/m3po-CartPole-v1", "README.md"]
        path = run(
            hub,
            tmp_path,
            """
            from huggingface_sb3 import load_from_hub

            print(load_from_hub("me/m3po-CartPole-v1", "m3po-CartPole-v1.zip"))
            """,
        ).strip()
    loaded = M3PO.load(path)
    observations = np.stack([gym.make("CartPole-v1").reset(seed=i)[0] for i in range(20)])
    assert (loaded.predict(observations, deterministic=True)[0] == model.predict(observations, deterministic=True)[0]).all()
    loaded.set_env(Monitor(gym.make("CartPole-v1")))
    assert loaded.learn(16, reset_num_timesteps=False).num_timesteps == 64


def test_one_file_and_what_is_not_there(tmp_path: Path) -> None:
    (tmp_path / "agent.zip").write_bytes(b"of some kind")
    with serving() as hub:
        printed = run(
            hub,
            tmp_path,
            """
            from huggingface_sb3 import load_from_hub, push_to_hub

            push_to_hub("me/agents", "agent.zip", "One file", token="hf_stand_in")
            print(open(load_from_hub("me/agents", "agent.zip")).read())
            try:
                load_from_hub("me/agents", "other.zip")
            except Exception as error:
                print(type(error).__name__)
            """,
        )
    assert "of some kind\nEntryNotFoundError" in printed or "of some kind\nRemoteEntryNotFoundError" in printed
