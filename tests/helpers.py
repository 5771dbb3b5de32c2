"""Small environments with known behaviour, and models that train on them in about a second."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_m3po import M3PO

VECTOR = spaces.Box(-1.0, 1.0, (3,), np.float32)


def tiny_policy_kwargs(**changes: Any) -> dict[str, Any]:
    """:return: Sizes of the smallest networks worth training"""
    sizes: dict[str, Any] = dict(
        latent_dim=16, encoder_arch=[16], model_arch=[16], net_arch=dict(pi=[16], vf=[16]), n_critics=2
    )
    return {**sizes, **changes}


def tiny_model(env: Any, policy: Any = "MlpPolicy", **changes: Any) -> M3PO:
    """:return: A model that learns every 16 transitions per environment, from the 16th on"""
    kwargs: dict[str, Any] = dict(
        n_steps=16,
        batch_size=8,
        sync_interval=8,
        learning_starts=16,
        utd_ratio=0.5,
        buffer_size=1_000,
        planner_kwargs=dict(n_samples=8, n_effective=2),
        seed=0,
        device="cpu",
    )
    policy_kwargs = changes.pop("policy_kwargs", tiny_policy_kwargs())
    return M3PO(policy, env, policy_kwargs=policy_kwargs, **{**kwargs, **changes})


class Hasty(M3PO):
    """
    M3PO that begins to learn at once, in small networks, wherever others make it.

    :param made: Those that were made, the newest last
    """

    made: ClassVar[list["Hasty"]] = []

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"learning_starts": 100, "policy_kwargs": tiny_policy_kwargs(), **kwargs})
        self.made.append(self)


class RandomEnv(gym.Env):
    """
    Random observations; episodes of 5 steps that terminate and are truncated in turn.

    :param received: Every action it was given, as it was given
    """

    def __init__(self, observation_space: spaces.Space = VECTOR, action_space: spaces.Space | None = None):
        self.observation_space = observation_space
        self.action_space = spaces.Discrete(2) if action_space is None else action_space
        self.received: list[Any] = []
        self.episode = self.t = 0
        # Spaces must not share their random state between environments
        self._sampler = copy.deepcopy(observation_space)
        self._sampler.seed(0)

    def _observe(self) -> Any:
        return self._sampler.sample()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode += 1
        self.t = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.received.append(np.array(action))
        self.t += 1
        ended = self.t >= 5
        terminated = ended and self.episode % 2 == 0
        return self._observe(), float(self.np_random.normal()), terminated, ended and not terminated, {}


class CounterEnv(gym.Env):
    """
    Its observation says where it comes from: ``[environment, episode, step]``. The reward of a step is
    ``100 * environment + 10 * episode + step``, and its action is not looked at.

    Episodes have ``length`` steps, plus the environment's number; the odd ones terminate, the even ones are truncated.

    :param number: Number of the environment
    :param length: Steps of an episode of environment 0
    :param dict_space: Whether the observation is a Dict of the vector and its sum
    """

    def __init__(self, number: int = 0, length: int = 5, dict_space: bool = False):
        self.number, self.length, self.dict_space = number, length + number, dict_space
        box = spaces.Box(-np.inf, np.inf, (3,), np.float32)
        sums = spaces.Box(-np.inf, np.inf, (1,), np.float32)
        self.observation_space: spaces.Space = spaces.Dict({"place": box, "sum": sums}) if dict_space else box
        self.action_space = spaces.Discrete(2)
        self.episode = self.t = 0

    def _observe(self) -> Any:
        place = np.array([self.number, self.episode, self.t], np.float32)
        return {"place": place, "sum": place.sum(keepdims=True)} if self.dict_space else place

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode += 1
        self.t = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        ended = self.t >= self.length
        terminated = ended and self.episode % 2 == 1
        reward = float(100 * self.number + 10 * self.episode + self.t)
        return self._observe(), reward, terminated, ended and not terminated, {}


class BrokenEnv(RandomEnv):
    """
    Returns a bad number once.

    :param what: ``"observation"``, ``"reward"`` or ``"last observation"`` (with which the episode ends)
    :param value: The bad number
    :param at: Step since the beginning, from 1
    """

    def __init__(self, what: str = "observation", value: float = float("nan"), at: int = 20):
        super().__init__()
        self.what, self.value, self.at, self.total = what, value, at, 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = super().step(action)
        self.total += 1
        if self.total == self.at:
            if self.what == "reward":
                return obs, self.value, terminated, truncated, info
            obs[1] = self.value
            return obs, reward, terminated or self.what == "last observation", truncated, info
        return obs, reward, terminated, truncated, info


def counters(n_envs: int = 1, length: int = 5, dict_space: bool = False) -> DummyVecEnv:
    """:return: Counting environments, numbered from 0"""

    def maker(number: int) -> Callable[[], gym.Env]:
        return lambda: CounterEnv(number, length, dict_space)

    return DummyVecEnv([maker(number) for number in range(n_envs)])


def randoms(n_envs: int = 1, **kwargs: Any) -> DummyVecEnv:
    """:return: Random environments"""
    return DummyVecEnv([lambda: RandomEnv(**kwargs) for _ in range(n_envs)])


def assert_same_tensors(first: dict[str, Any], second: dict[str, Any]) -> None:
    """Assert that two state dicts are equal to the bit, nested ones included."""
    assert first.keys() == second.keys()
    for key, value in first.items():
        if isinstance(value, dict):
            assert_same_tensors(value, second[key])
        elif isinstance(value, th.Tensor):
            assert th.equal(value, second[key]), f"{key} differs by up to {(value - second[key]).abs().max()}"
        else:
            assert value == second[key], f"{key}: {value} != {second[key]}"


def assert_same_model(first: M3PO, second: M3PO) -> None:
    """Assert that two models have equal networks, statistics, coefficients, optimizers and counters, to the bit."""
    assert_same_tensors(first.policy.state_dict(), second.policy.state_dict())
    for name in ("optimizer", "model_optimizer", "coef_optimizer"):
        assert_same_tensors(getattr(first.policy, name).state_dict(), getattr(second.policy, name).state_dict())
    for name in ("_n_updates", "_update_credits", "num_timesteps"):
        assert getattr(first, name) == getattr(second, name), name
