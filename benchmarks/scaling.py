"""
How the cost of an update, of a planned step and of a stored transition grow with environments, observations, actions and
memory, on one thread and in an environment without any cost of its own. ``--csv`` keeps the rows.

``python -m benchmarks.scaling --csv benchmarks/results/scaling.csv``
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from benchmarks.record import commit, machine, write_rows
from benchmarks.speed import collecting_step, fill, past_the_start, time_calls, time_updates_in_turn
from sb3_m3po import M3PO
from sb3_m3po.memory import ReplayMemory

COLUMNS = (
    *("axis", "value", "update_cpu_ms", "planned_step_ms", "planned_per_env_ms", "observation_bytes", "transition_bytes"),
    *("commit", "machine"),
)
EPISODE = 1_000
IMAGE = (84, 84, 4)


class Noise(gym.Env):
    """
    Random observations, and a cost on large actions.

    :param observation_shape: of a vector, or of an image
    :param action_dim: width of the actions
    """

    def __init__(self, observation_shape: tuple[int, ...] = (17,), action_dim: int = 6) -> None:
        image = len(observation_shape) == 3
        self.observation_space = (
            spaces.Box(0, 255, observation_shape, np.uint8) if image else spaces.Box(-10, 10, observation_shape, np.float32)
        )
        self.action_space = spaces.Box(-1, 1, (action_dim,), np.float32)
        # Drawing is dearer than copying: a few observations, in turn
        self._observations = [self.observation_space.sample() for _ in range(16)]
        self._step = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """See :class:`gymnasium.Env`."""
        super().reset(seed=seed)
        self._step = 0
        return self._observations[0], {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """See :class:`gymnasium.Env`."""
        self._step += 1
        seen = self._observations[self._step % len(self._observations)]
        return seen, -float(np.abs(action).mean()), False, self._step >= EPISODE, {}


AXES: dict[str, dict[Any, dict[str, Any]]] = {
    "environments": {n: {"n_envs": n} for n in (1, 4, 16, 64, 256)},
    "observation": {
        **{n: {"env": {"observation_shape": (n,)}} for n in (10, 50, 100, 400)},
        "84x84x4": {"env": {"observation_shape": IMAGE}, "buffer_size": 20_000},
    },
    "actions": {n: {"env": {"action_dim": n}} for n in (1, 6, 20, 40)},
    "memory": {n: {"buffer_size": n, "full": True} for n in (10_000, 100_000, 1_000_000)},
}


def make(n_envs: int = 1, env: dict[str, Any] | None = None, buffer_size: int = 1_000_000, full: bool = False) -> M3PO:
    """
    :param n_envs: number of environments
    :param env: arguments of :class:`Noise`
    :param buffer_size: transitions of the memory
    :param full: whether it is full
    :return: a model whose updates have begun
    """
    vec_env = DummyVecEnv([partial(Noise, **(env or {}))] * n_envs)
    policy = "CnnPolicy" if len(vec_env.observation_space.shape or ()) == 3 else "MlpPolicy"
    model = M3PO(policy, vec_env, buffer_size=buffer_size, learning_starts=1_000, seed=0, device="cpu")
    past_the_start(model.learn(1_280))
    fill(model, buffer_size if full else 0)
    return model


def transition_bytes(memory: ReplayMemory) -> float:
    """
    :param memory: of a model
    :return: bytes that it has allocated for each transition that it has room for
    """
    arrays = [value for value in vars(memory).values() if isinstance(value, np.ndarray)]
    arrays += [*memory.observations.values(), *memory.final_pool.values()]
    room = memory.slots * memory.n_envs
    return sum(array.nbytes for array in arrays if array.size > 1) / room


def measure(axis: str, steps: int) -> list[dict[str, Any]]:
    """
    :param axis: a key of ``AXES``
    :param steps: environment steps during which updates are timed
    :return: a row for each value
    """
    models = {value: make(**settings) for value, settings in AXES[axis].items()}
    updates = time_updates_in_turn(models, steps)
    calls: dict[str, Any] = {}
    for value, model in models.items():
        assert model.env is not None
        observations = th.as_tensor(np.asarray(model.env.reset()))
        calls[str(value)] = partial(collecting_step, model, observations, model.n_envs)
    planned = time_calls(calls)
    rows = []
    for value, model in models.items():
        decision = float(np.median(planned[str(value)]))
        space = model.observation_space
        assert space.shape is not None and space.dtype is not None
        rows.append(
            {
                "axis": axis,
                "value": value,
                "update_cpu_ms": round(float(np.median([cpu for _, cpu in updates[value]])), 2),
                "planned_step_ms": round(decision, 3),
                "planned_per_env_ms": round(decision / model.n_envs, 3),
                "observation_bytes": int(np.prod(space.shape)) * space.dtype.itemsize,
                "transition_bytes": round(transition_bytes(model.replay_buffer), 1),
            }
        )
    return rows


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: the command line, ``sys.argv`` by default
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--steps", type=int, default=1_792, help="environment steps during which updates are timed")
    parser.add_argument("--csv", type=Path, help="where the rows go")
    args = parser.parse_args(argv)
    th.set_num_threads(1)
    origin = {"commit": commit(), "machine": machine()}
    print(f"one thread, defaults; {origin['machine']}; commit {origin['commit']}\n", flush=True)
    shown = COLUMNS[:-2]
    print(f"| {' | '.join(shown)} |\n" + "| --- " * len(shown) + "|", flush=True)
    rows = []
    for axis in args.axes:
        for row in measure(axis, args.steps):
            print("| " + " | ".join(str(row[column]) for column in shown) + " |", flush=True)
            rows.append(row | origin)
    if args.csv is not None:
        write_rows(args.csv, rows, COLUMNS)


if __name__ == "__main__":
    main()
