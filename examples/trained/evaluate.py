"""Score the trained agents beside this file, on the environments that they were trained on, and print the README's table."""

import argparse
import importlib
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
import yaml
from rl_zoo3.utils import create_test_env, get_saved_hyperparams
from stable_baselines3.common.evaluation import evaluate_policy

from sb3_m3po import M3PO

AGENTS = Path(__file__).parent / "m3po"


def scores(agent: Path, n_episodes: int) -> dict[str, list[float]]:
    """
    :param agent: a folder that rl-zoo3 wrote
    :param n_episodes: episodes to play
    :return: returns of the episodes, by task, or under the environment's id
    """
    zip_file = next(agent.glob("*.zip"))
    settings = zip_file.with_suffix("")
    arguments = yaml.unsafe_load((settings / "args.yml").read_text())  # as rl-zoo3 reads it
    for package in arguments["gym_packages"]:
        importlib.import_module(package)
    hyperparams, stats_path = get_saved_hyperparams(str(settings), test_mode=True)
    env = create_test_env(
        arguments["env"], 1, stats_path, 1000, None, False, hyperparams, env_kwargs=arguments["env_kwargs"] or {}
    )
    found: dict[str, list[float]] = defaultdict(list)

    def note(local: dict[str, Any], _: Any) -> None:
        if local["done"]:
            found[local["info"].get("task", arguments["env"])].append(local["info"]["episode"]["r"])

    evaluate_policy(M3PO.load(zip_file, device="cpu"), env, n_episodes, callback=note)
    return dict(found)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--episodes", type=int, default=20)
    n_episodes = parser.parse_args().episodes
    th.set_num_threads(1)
    print("| agent | steps | score | size |\n| --- | --- | --- | --- |")
    for folder in sorted(AGENTS.iterdir()):
        zip_file = next(folder.glob("*.zip"))
        steps = M3PO.load(zip_file, device="cpu").num_timesteps
        results = (f"{task} {np.mean(r):.2f} ± {np.std(r):.2f}" for task, r in sorted(scores(folder, n_episodes).items()))
        print(f"| `{folder.name}` | {steps:,} | {'; '.join(results)} | {zip_file.stat().st_size / 1e6:.1f} MB |", flush=True)
