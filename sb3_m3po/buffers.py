"""The hybrid rollout buffer: the fresh rollout, as in PPO, and behind it the replay memory that learning draws from."""

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.preprocessing import is_image_space

from sb3_m3po.memory import ReplayMemory
from sb3_m3po.tasks import TaskReader


class _HybridMixin:
    """Adds the replay memory to one of SB3's rollout buffers."""

    memory: ReplayMemory
    observations: Any
    actions: Any
    observation_space: Any
    action_space: Any

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        *args: Any,
        memory_size: int = 1_000_000,
        tasks: TaskReader | None = None,
        n_envs: int = 1,
        **kwargs: Any,
    ):
        super().__init__(buffer_size, observation_space, action_space, *args, n_envs=n_envs, **kwargs)  # type: ignore[call-arg]
        self.memory = ReplayMemory(memory_size, observation_space, action_space, n_envs, tasks)

    def reset(self) -> None:
        """Empty the rollout. It has room for fractions where a space has none: VecNormalize's, and actions in [-1, 1]."""
        super().reset()  # type: ignore[misc]
        if isinstance(self.observations, dict):
            spaces_of = self.observation_space.spaces
            self.observations = {key: with_fractions(x, spaces_of[key]) for key, x in self.observations.items()}
        else:
            self.observations = with_fractions(self.observations, self.observation_space)
        self.actions = with_fractions(self.actions, self.action_space)


def with_fractions(array: np.ndarray, space: spaces.Space) -> np.ndarray:
    """
    :param array: Of elements of a space, shape ``(n_steps, n_envs, ...)``
    :param space: The space
    :return: The same in floating point, if the space is a Box of integers that is no image
    """
    if not isinstance(space, spaces.Box) or is_image_space(space):
        return array
    return array.astype(np.result_type(array.dtype, np.float32), copy=False)


class HybridRolloutBuffer(_HybridMixin, RolloutBuffer):
    """
    SB3's rollout buffer (the fresh rollout: values, log-probabilities, GAE) in front of a :class:`ReplayMemory`.

    :param memory_size: Transitions that the memory keeps, over all environments
    :param tasks: Tells the tasks of observations; ``None`` for a single one
    """


class HybridDictRolloutBuffer(_HybridMixin, DictRolloutBuffer):
    """
    The twin of :class:`HybridRolloutBuffer` for Dict observations.

    :param memory_size: Transitions that the memory keeps, over all environments
    :param tasks: Tells the tasks of observations; ``None`` for a single one
    """
