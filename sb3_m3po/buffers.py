"""The hybrid rollout buffer: the fresh rollout, as in PPO, and behind it the replay memory that learning draws from."""

from typing import Any

from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer

from sb3_m3po.memory import ReplayMemory
from sb3_m3po.tasks import TaskReader


class _HybridMixin:
    """Adds the replay memory to one of SB3's rollout buffers."""

    memory: ReplayMemory

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
