"""
Measure what a uniformly random policy scores on the environments of the table, of the suites and of the sets of tasks, and
how slow vector observations are.

``python -m benchmarks.random_baseline``
"""

import argparse

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecEnv

from benchmarks.envs import vec_env
from benchmarks.record import RANDOM_CSV, commit, machine, read_rows, write_rows
from benchmarks.suites import ENVIRONMENTS
from benchmarks.targets import TARGETS
from benchmarks.task_sets import is_task_set, name_of, task_vec_env, tasks_of
from benchmarks.task_table import SINGLES

COLUMNS = ("env", "mean_reward", "std_reward", "n_episodes", "lag_correlation", "commit", "command", "machine")
SEED = 200_000_000


def random_episodes(env: VecEnv, n_episodes: int) -> tuple[list[float], list[np.ndarray]]:
    """
    Play whole episodes with actions drawn from the action space.

    :param env: a single environment
    :param n_episodes: how many episodes
    :return: one return per episode; the observations of each, without its last one
    """
    returns: list[float] = []
    episodes: list[list[np.ndarray]] = [[]]
    obs = env.reset()
    while len(returns) < n_episodes:
        episodes[-1].append(np.array(obs["observation"] if isinstance(obs, dict) else obs)[0])
        obs, _, _, infos = env.step(np.array([env.action_space.sample()]))
        for info in infos:
            if "episode" in info:
                returns.append(info["episode"]["r"])
                episodes.append([])
    return returns, [np.array(episode) for episode in episodes[:-1]]


def lag_correlation(episodes: list[np.ndarray]) -> float:
    """
    What M3PO measures on its memory to choose its noise: the correlation of each entry with itself one step later,
    averaged over the entries that move.

    :param episodes: observations, each of shape ``(length, entries)``
    :return: between -1 and 1
    """
    first, second = (np.concatenate([x[piece] for x in episodes]) for piece in (slice(None, -1), slice(1, None)))
    variance = 0.5 * (first.var(0) + second.var(0))
    moves = variance > 1e-8
    return float((1 - 0.5 * np.square(second - first).mean(0)[moves] / variance[moves]).mean())


def measure(env_id: str, n_episodes: int) -> dict[str, str | float]:
    """
    :param env_id: id of the environment
    :param n_episodes: how many episodes
    :return: a row of the CSV file
    """
    env = (task_vec_env if is_task_set(env_id) else vec_env)(env_id, 1, SEED)
    env.action_space.seed(SEED)
    returns, episodes = random_episodes(env, n_episodes)
    env.close()
    print(f"{env_id}: {np.mean(returns):.3f} +- {np.std(returns):.3f} over {n_episodes} episodes", flush=True)
    row: dict[str, str | float] = {"env": env_id, "mean_reward": round(float(np.mean(returns)), 4)}
    row |= {"std_reward": round(float(np.std(returns)), 4), "n_episodes": n_episodes}
    space = env.observation_space
    is_vector = isinstance(space, spaces.Dict) or len(space.shape or ()) == 1
    row["lag_correlation"] = round(lag_correlation(episodes), 3) if is_vector else ""
    command = f"python -m benchmarks.random_baseline --episodes {n_episodes}"
    return row | {"commit": commit(), "command": command, "machine": machine()}


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: the command line, ``sys.argv`` by default
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=100)
    parser.add_argument("--envs", nargs="+", help="some of them; the other rows stay")
    args = parser.parse_args(argv)
    names = [target.env_id for target in TARGETS]
    names += [environment.env_id for environment in ENVIRONMENTS]
    names += [prefix + name_of(task) for env_id, (_, prefix) in SINGLES.items() for task in tasks_of(env_id)]
    rows = [row for row in read_rows(RANDOM_CSV) if args.envs and row["env"] not in args.envs]
    rows += [measure(name, args.episodes) for name in args.envs or dict.fromkeys(names)]  # type: ignore[misc]
    write_rows(RANDOM_CSV, rows, COLUMNS)


if __name__ == "__main__":
    main()
