"""The unit of rewards means nothing: with another one, all networks come out the same, to the bit."""

from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv

from sb3_m3po import M3PO
from tests.helpers import RandomEnv, assert_same_tensors, tiny_model

FACTORS = (2.0**10, 2.0**-10)
BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)


class FirstSteps(gym.Wrapper):
    """The first rewards are zero."""

    def __init__(self, env: gym.Env, zeros: int):
        super().__init__(env)
        self.zeros = zeros

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.zeros -= 1
        return obs, 0.0 if self.zeros >= 0 else reward, terminated, truncated, info


def learn(env: gym.Env, factor: float, steps: int, **changes: Any) -> M3PO:
    """:return: A model that learned with rewards times a factor"""

    def scaled() -> gym.Env:
        return gym.wrappers.TransformReward(env, lambda reward: factor * float(reward))

    return tiny_model(DummyVecEnv([scaled]), **changes).learn(steps)


def tensors(model: M3PO) -> dict[str, Any]:
    state = dict(model.policy.state_dict())
    return {name: value for name, value in state.items() if name not in ("return_scale", "bar_scale")}


def assert_unit_free(make: Callable[[], gym.Env], steps: int, **changes: Any) -> None:
    """Assert that a factor on rewards changes the return scales, and nothing else."""
    plain = learn(make(), 1.0, steps, **changes)
    for factor in FACTORS:
        scaled = learn(make(), factor, steps, **changes)
        assert plain._n_updates == scaled._n_updates > 50
        assert_same_tensors(tensors(plain), tensors(scaled))
        for name in ("optimizer", "model_optimizer", "coef_optimizer"):
            assert_same_tensors(getattr(plain.policy, name).state_dict(), getattr(scaled.policy, name).state_dict())
        assert np.array_equal(plain.replay_buffer.actions, scaled.replay_buffer.actions)
        assert scaled.policy.return_scale.item() == factor * plain.policy.return_scale.item() != 1


def test_networks_of_cart_pole_do_not_know_the_unit() -> None:
    assert_unit_free(lambda: gym.make("CartPole-v1"), steps=400)


@pytest.mark.parametrize("action_space", [spaces.Discrete(2), BOX, spaces.MultiBinary(5)], ids=str)
def test_networks_do_not_know_the_unit(action_space: spaces.Space) -> None:
    assert_unit_free(lambda: RandomEnv(action_space=action_space), steps=160)


def test_bonus_and_plans_do_not_know_the_unit() -> None:
    assert_unit_free(lambda: RandomEnv(action_space=BOX), steps=160, bonus_coef=0.5, plan_rollouts=True)


def test_unit_is_unknown_until_a_reward_comes() -> None:
    assert_unit_free(lambda: FirstSteps(RandomEnv(), 70), steps=160)


@pytest.mark.parametrize("factor", FACTORS)
def test_values_are_in_the_unit_of_the_rewards(factor: float) -> None:
    plain, scaled = (learn(RandomEnv(), f, steps=96) for f in (1.0, factor))
    obs, _ = plain.policy.obs_to_tensor(np.ones((4, 3), np.float32))
    values = plain.policy.predict_values(obs)
    assert values.abs().min() > 0
    assert (scaled.policy.predict_values(obs) == factor * values).all()


def test_return_scale_by_hand() -> None:
    # No step is worth more than its reward; the scale is that of the last sync
    model = learn(RandomEnv(), 1.0, steps=96, gamma=0.0)
    rewards = np.abs(model.replay_buffer.rewards[:96, 0])
    assert model.policy.return_scale.item() == pytest.approx(rewards.max() / 10)
