"""Rewards, lengths and successes of the latest training episodes, task by task."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.utils import safe_mean


class TaskEpisodeStats:
    """
    What SB3's ``ep_info_buffer`` is for one task, for each of several.

    :param names: Of the tasks, by their ids
    :param window: Episodes of each task that are looked at
    """

    def __init__(self, names: Sequence[str], window: int = 100):
        self.names = list(names)
        self.episodes: list[deque[dict[str, Any]]] = [deque(maxlen=window) for _ in self.names]
        self.successes: list[deque[bool]] = [deque(maxlen=window) for _ in self.names]

    def update(self, infos: Sequence[dict[str, Any]], dones: np.ndarray, tasks: np.ndarray) -> None:
        """
        :param infos: Of one step, one for each environment
        :param dones: Which episodes ended, shape ``(n_envs,)``
        :param tasks: The ids of the tasks that the environments were in, shape ``(n_envs,)``
        """
        for info, done, task in zip(infos, dones, tasks, strict=True):
            if "episode" in info:
                self.episodes[task].append(info["episode"])
            if done and "is_success" in info:
                self.successes[task].append(info["is_success"])

    def record(self, logger: Logger) -> None:
        """
        :param logger: Gets ``rollout/<task>/ep_rew_mean``, ``ep_len_mean`` and ``success_rate``
        """
        for name, episodes, successes in zip(self.names, self.episodes, self.successes, strict=True):
            if episodes:
                logger.record(f"rollout/{name}/ep_rew_mean", safe_mean([episode["r"] for episode in episodes]))
                logger.record(f"rollout/{name}/ep_len_mean", safe_mean([episode["l"] for episode in episodes]))
            if successes:
                logger.record(f"rollout/{name}/success_rate", safe_mean(list(successes)))
