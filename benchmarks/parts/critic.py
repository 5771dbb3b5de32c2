"""
The critics learn values that are known by hand, noisy ones included, and the discrepancy bonus is what it should be.

Two states follow one another, whatever is done, with rewards of 1 and 2, or of 0 or 20 as a fair coin says. The values must
be right to 2 %, with the coin to 5 %: the luck of a few thousand draws. Averaged on the critics' logarithmic scale, 0 and 20
would be valued at 3.6. Tosses come in pairs, one of each, so that the rewards themselves have the mean that they should.

``python -m benchmarks.parts.critic``
"""

import argparse
from typing import Any

import gymnasium as gym
import numpy as np
import torch as th
from gymnasium import spaces

from benchmarks.parts.common import Verdicts
from sb3_m3po import M3PO
from sb3_m3po.losses import discrepancy_bonus

GAMMA, STATES = 0.9, np.eye(2, dtype=np.float32)
ACTIONS: tuple[spaces.Space, ...] = (spaces.Discrete(2), spaces.Box(-1.0, 1.0, (1,), np.float32))


class Chain(gym.Env):
    """
    State 0, then state 1, then the end.

    :param rewards: of the step from each state
    :param coin: whether they are nothing or twice as much, as a coin says
    :param action_space: action space
    """

    def __init__(self, rewards: tuple[float, float], coin: bool, action_space: spaces.Space) -> None:
        self.observation_space, self.action_space = spaces.Box(0.0, 1.0, (2,), np.float32), action_space
        self.rewards, self.coin, self.state = rewards, coin, 0
        self.tosses: list[list[int]] = [[], []]

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """Go to state 0."""
        super().reset(seed=seed)
        self.state = 0
        return STATES[0].copy(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Go on, whatever the action is."""
        factor, tosses = 1, self.tosses[self.state]
        if self.coin:
            tosses += [] if tosses else self.np_random.permutation([0, 2]).tolist()
            factor = tosses.pop()
        reward, terminated = self.rewards[self.state] * factor, self.state == 1
        self.state = 1 - self.state
        return STATES[self.state].copy(), reward, terminated, False, {}


def learn(env: gym.Env, steps: int, **changes: Any) -> M3PO:
    """:return: a model that has learned with defaults, but for the settings of a tiny task"""
    settings: dict[str, Any] = dict(gamma=GAMMA, n_steps=16, utd_ratio=1.0, sync_interval=16, learning_starts=32)
    settings |= dict(learning_rate=lambda progress: 2e-3 * progress)  # falling: the last updates average
    return M3PO("MlpPolicy", env, device="cpu", **{**settings, **changes}).learn(steps, log_interval=10**9)


def judge_values(verdicts: Verdicts, title: str, model: M3PO, expected: list[float], tolerance: float) -> None:
    """Compare the critics' values of both states, in reward units."""
    with th.no_grad():
        values = model.policy.predict_values(th.as_tensor(STATES)).flatten().tolist()
    error = max(abs(value / right - 1) for value, right in zip(values, expected, strict=True))
    found = ", ".join(f"{value:.3f} ({right:g})" for value, right in zip(values, expected, strict=True))
    verdicts.judge(error <= tolerance, f"{title}: values {found}, at most {error:.1%} off (asked for: {tolerance:.0%})")


def judge_bonus(verdicts: Verdicts, seed: int) -> None:
    """
    A model that has learned nothing values everything at 0. Rewards of 3 are then 1 in scaled units (the scale is
    mean|r| / (1 - gamma) / 10 = 3): the gap is 1, its running median 0.3 after one sync, and no TD error clips 0.7.
    """
    env, settings = Chain((3.0, 3.0), False, ACTIONS[0]), dict(batch_size=16, sync_interval=32, bonus_coef=0.6)
    logged = learn(env, 48, seed=seed, learning_rate=0.0, **settings).logger.name_to_value  # one sync, after 32 steps
    gap, bonus = logged["exploration/gap"], logged["exploration/bonus_abs"]
    right = abs(gap - 1) < 1e-4 and abs(bonus - 0.6 * (1 - 32 / 48) * 0.7) < 1e-4
    verdicts.judge(right, f"bonus of a new model: gap {gap:.5f} (1), bonus {bonus:.5f} (0.14)")
    gaps, errors = th.tensor([3.0, 0.5, 3.0, 0.0]), th.tensor([10.0, 10.0, -0.4, 0.4])
    found, expected = discrepancy_bonus(gaps, th.ones(1), errors, 0.5), th.tensor([1.0, -0.25, 0.2, -0.2])
    text = ", ".join(f"{x:.3f} ({y:g})" for x, y in zip(found.tolist(), expected.tolist(), strict=True))
    verdicts.judge(th.allclose(found, expected), f"bonus by hand, two of four clipped: {text}")


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: the command line, ``sys.argv`` by default
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    seed = parser.parse_args(argv).seed
    verdicts = Verdicts(f"Critics on a chain of two states, seed {seed}")
    for space in ACTIONS:
        model = learn(Chain((1.0, 2.0), False, space), 400, seed=seed)
        judge_values(verdicts, f"{space}, rewards 1 and 2", model, [1 + GAMMA * 2, 2], 0.02)
        # Many tosses, as few updates: what is seen often enough is learned by heart
        model = learn(Chain((10.0, 10.0), True, space), 2_000, seed=seed, n_steps=80, utd_ratio=0.2)
        judge_values(verdicts, f"{space}, rewards 0 or 20", model, [10 + GAMMA * 10, 10], 0.05)
    judge_bonus(verdicts, seed)
    verdicts.exit()


if __name__ == "__main__":
    main()
