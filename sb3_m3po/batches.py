"""What a sync period learns from: sequences as tensors, what the frozen copies say of them, what phase B reads."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch as th

from sb3_m3po.memory import SequenceBatch
from sb3_m3po.policies import WorldModelPolicy

#: Observations that are evaluated at once: their activations stay in the processor's cache
_PIECE = 512


class Frozen(NamedTuple):
    """
    What the frozen copies say of each distinct observation.

    :param states: Its place in memory, ascending, shape ``(n,)``
    :param z: ``h_bar(o)``, shape ``(n, z_dim)``
    :param value: In today's scaled units, shape ``(n,)``; NaN where nobody asked for it
    :param anchor: Parameters of ``pi_bar``, shape ``(n, params_dim)``; likewise
    """

    states: np.ndarray
    z: th.Tensor
    value: th.Tensor
    anchor: th.Tensor

    def rows(self, states: np.ndarray) -> th.Tensor:
        """
        :param states: Ids of evaluated observations, any shape
        :return: Where they stand in ``z``, ``value`` and ``anchor``, same shape
        """
        return th.as_tensor(np.searchsorted(self.states, states), device=self.z.device)


class Sequences:
    """
    A :class:`~sb3_m3po.memory.SequenceBatch` as tensors: model inputs for actions, scaled units for rewards.

    :param batch: From the memory; its ``states`` stay an array, shape ``(length + 1, batch)``
    :param policy: Has the return scale, the action codec and the device
    """

    def __init__(self, batch: SequenceBatch, policy: WorldModelPolicy):
        device = policy.device
        self.states = batch.states
        self.tasks = None if batch.tasks is None else th.as_tensor(batch.tasks, device=device).long()
        self.rewards = th.as_tensor(batch.rewards, device=device) / self.of_task(policy.return_scale)
        self.terminated = th.as_tensor(batch.terminated, device=device)
        self.truncated = th.as_tensor(batch.truncated, device=device)
        length, size = batch.rewards.shape
        actions = th.as_tensor(batch.actions, device=device).flatten(0, 1)
        tasks = None if self.tasks is None else self.tasks.repeat(length)
        self.actions = policy.world_model.codec.to_input(actions, tasks).view(length, size, -1)

    def of_task(self, per_task: th.Tensor) -> th.Tensor:
        """
        :param per_task: A value for each task, shape ``(n_tasks,)``; shape ``(1,)`` without tasks
        :return: The value of each sequence's task, shape ``(batch,)``; ``per_task`` itself without tasks
        """
        return per_task if self.tasks is None else per_task[self.tasks]


class Prepared(NamedTuple):
    """
    What the updates of phase B read, one row per sample.

    :param z: ``h(o)``, shape ``(n, z_dim)``
    :param f: Features of the step taken, shape ``(n, trunk_dim)``; ``z`` where nothing reads them
    :param target: ``y`` in scaled units, shape ``(n,)``; NaN until computed
    :param anchor: Parameters of ``pi_bar``, shape ``(n, params_dim)``
    :param gap: ``|Q_mf - Q_mb|`` in scaled units, shape ``(n,)``; read for the bonus only
    :param noise: For the policy's sample, shape ``(n, noise_dim)``; ``z`` for enumerable actions
    :param chosen: The joint action's index, shape ``(n,)``, if enumerable; else ``z``
    """

    z: th.Tensor
    f: th.Tensor
    target: th.Tensor
    anchor: th.Tensor
    gap: th.Tensor
    noise: th.Tensor
    chosen: th.Tensor

    def rows(self, rows: slice) -> "Prepared":
        """
        :param rows: Which samples
        :return: Some of the samples
        """
        return Prepared(*(x[rows] for x in self))


def pieces(n: int) -> Iterator[slice]:
    """
    :param n: How many observations
    :return: Which of them to evaluate at once
    """
    return (slice(start, min(start + _PIECE, n)) for start in range(0, n, _PIECE))


def by_task(tasks: th.Tensor | None) -> Iterator[tuple[slice | int, slice | th.Tensor]]:
    """
    :param tasks: Ids of the samples' tasks, shape ``(batch,)``; ``None`` without tasks
    :return: Each task's place among what is kept per task, and which samples are of it; all of both without tasks
    """
    if tasks is None:
        yield slice(None), slice(None)
    else:
        for task in tasks.unique().tolist():
            yield task, tasks == task
