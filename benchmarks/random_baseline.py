"""
Measure what a uniformly random policy scores on the environments of the table.

``python -m benchmarks.random_baseline``
"""

import argparse

import numpy as np
from stable_baselines3.common.vec_env import VecEnv

from benchmarks.envs import vec_env
from benchmarks.record import RANDOM_CSV, commit, machine, write_rows
from benchmarks.targets import TARGETS

COLUMNS = ("env", "mean_reward", "std_reward", "n_episodes", "commit", "command", "machine")
SEED = 200_000_000


def random_returns(env: VecEnv, n_episodes: int) -> list[float]:
    """
    Returns of whole episodes with actions drawn from the action space.

    :param env: a single environment
    :param n_episodes: how many episodes
    :return: one return per episode
    """
    returns: list[float] = []
    env.reset()
    while len(returns) < n_episodes:
        _, _, _, infos = env.step(np.array([env.action_space.sample()]))
        returns += [info["episode"]["r"] for info in infos if "episode" in info]
    return returns


def measure(env_id: str, n_episodes: int) -> dict[str, str | float]:
    """
    :param env_id: id of the environment
    :param n_episodes: how many episodes
    :return: a row of the CSV file
    """
    env = vec_env(env_id, 1, SEED)
    env.action_space.seed(SEED)
    returns = random_returns(env, n_episodes)
    env.close()
    print(f"{env_id}: {np.mean(returns):.3f} +- {np.std(returns):.3f} over {n_episodes} episodes", flush=True)
    row: dict[str, str | float] = {"env": env_id, "mean_reward": round(float(np.mean(returns)), 4)}
    row |= {"std_reward": round(float(np.std(returns)), 4), "n_episodes": n_episodes}
    command = f"python -m benchmarks.random_baseline --episodes {n_episodes}"
    return row | {"commit": commit(), "command": command, "machine": machine()}


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: the command line, ``sys.argv`` by default
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=100)
    args = parser.parse_args(argv)
    write_rows(RANDOM_CSV, [measure(target.env_id, args.episodes) for target in TARGETS], COLUMNS)


if __name__ == "__main__":
    main()
