"""Each decision for several frames, as is usual for dm_control."""

import math
from numbers import Integral
from typing import Any, SupportsFloat

import gymnasium as gym

from sb3_m3po.discount import TIME_LIMIT


def check_count(name: str, value: Any, meaning: str) -> None:
    """
    :param name: Of an argument
    :param value: What it was given
    :param meaning: What it counts, for the message
    :raises ValueError: unless it is a whole number of at least 1
    """
    if not (isinstance(value, Integral) and int(value) >= 1):
        raise ValueError(f"{name}={value!r} must be a whole number (an int) of at least 1: {meaning}")


class ActionRepeat(gym.Wrapper):
    """
    Apply each action several times and sum the rewards.

    :param env: The environment to wrap
    :param repeat: Frames per decision
    :raises ValueError: unless it is a whole number of at least 1
    """

    def __init__(self, env: gym.Env, repeat: int):
        super().__init__(env)
        check_count("repeat", repeat, "the frames per decision")
        self.repeat = repeat

    @property
    def _max_episode_steps(self) -> int:
        """Decisions in an episode, where Gymnasium's ``TimeLimit``, which has it under this name, cuts the frames."""
        return math.ceil(self.env.get_wrapper_attr(TIME_LIMIT) / self.repeat)

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """
        :param action: As the environment takes it
        :return: What the last frame gave, and the sum of the rewards; fewer frames where the episode ends before. Its
            ``info["success"]``, where there is one (Meta-World), is the highest of the frames
        """
        total, successes = 0.0, []
        for _ in range(self.repeat):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            successes += [info["success"]] if "success" in info else []
            if terminated or truncated:
                break
        if successes:
            info["success"] = max(successes)
        return observation, total, terminated, truncated, info
