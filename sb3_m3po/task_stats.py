"""Rewards, lengths and successes of the latest training episodes, task by task."""

from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
from stable_baselines3.common.logger import HumanOutputFormat, Logger
from stable_baselines3.common.utils import safe_mean


def make_room(logger: Logger, names: Sequence[str]) -> None:
    """
    SB3's tables cut keys off at 36 characters and refuse two that are then the same: of long names all would be.

    :param logger: About to write what is logged of each task
    :param names: Of the tasks
    """
    needed = max(map(len, names), default=0) + len("   /success_rate")
    for table in logger.output_formats:
        if isinstance(table, HumanOutputFormat):
            table.max_length = max(table.max_length, needed)


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
        make_room(logger, self.names)
        for name, episodes, successes in zip(self.names, self.episodes, self.successes, strict=True):
            if episodes:
                logger.record(f"rollout/{name}/ep_rew_mean", safe_mean([episode["r"] for episode in episodes]))
                logger.record(f"rollout/{name}/ep_len_mean", safe_mean([episode["l"] for episode in episodes]))
            if successes:
                logger.record(f"rollout/{name}/success_rate", safe_mean(list(successes)))
