"""Action codecs over tasks: each task has some of the actions, and its mask travels within the policy's parameters."""

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import TanhBijector

from sb3_m3po.actions import IMPOSSIBLE, ActionCodec, CategoricalActions, GaussianActions, SquashedGaussian
from sb3_m3po.tasks import TaskTable


class MaskedGaussianActions(GaussianActions):
    """
    Box actions of which each task has the first few dimensions; the others are 0 and count for nothing.

    The mask is the third part of the parameters: sampling, log-probability, divergence and entropy read it there.

    :param space: Bounded Box of the widest task
    :param masks: Dimensions of each task, boolean, shape ``(n_tasks, input_dim)``
    :param log_std_init: As in :class:`~sb3_m3po.actions.GaussianActions`
    """

    masks: th.Tensor
    target_entropy: th.Tensor

    def __init__(self, space: spaces.Box, masks: np.ndarray, log_std_init: float = 0.0):
        super().__init__(space, log_std_init)
        self.params_dim = 3 * self.input_dim
        target_entropy = self.target_entropy / self.input_dim * masks.sum(-1)
        del self.target_entropy
        # A padded dimension has a log-std of 0, above the floor
        self.wide_floor = th.cat([self.wide_floor, th.full((self.input_dim,), -np.inf)])
        self.register_buffer("masks", th.as_tensor(masks, dtype=th.float32), persistent=False)
        self.register_buffer("target_entropy", th.as_tensor(target_entropy, dtype=th.float32), persistent=False)

    def parameters_from(self, output: th.Tensor, tasks: th.Tensor | None = None) -> th.Tensor:
        mask = self.masks[tasks]
        mean, log_std = super().parameters_from(output).chunk(2, -1)
        # A constant where there is no action: its divergence and its gradient are zero
        return th.cat([mean * mask, log_std * mask, mask], -1)

    def gaussian(self, params: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        mean, log_std, _ = params.chunk(3, -1)
        return mean, log_std

    def with_gaussian(self, params: th.Tensor, mean: th.Tensor, log_std: th.Tensor) -> th.Tensor:
        mask = params.chunk(3, -1)[2]
        return th.cat([mean * mask, log_std * mask, mask], -1)

    def to_input(self, actions: th.Tensor, tasks: th.Tensor | None = None) -> th.Tensor:
        return super().to_input(actions) * self.masks[tasks]

    def draw(self, params: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return super().draw(params, noise * params.chunk(3, -1)[2])

    def log_prob_before_squashing(self, params: th.Tensor, u: th.Tensor) -> th.Tensor:
        # At a padded dimension u = mean = log_std = 0: what is left there is the density's constant
        padded = (1 - params.chunk(3, -1)[2]).sum(-1)
        return super().log_prob_before_squashing(params, u) + padded * 0.5 * np.log(2 * np.pi)

    def distribution(self, params: th.Tensor) -> SquashedGaussian:
        return MaskedSquashedGaussian(params.chunk(3, -1)[2]).proba_distribution(*self.gaussian(params))


class MaskedSquashedGaussian(SquashedGaussian):
    """
    SB3's squashed Gaussian over the dimensions that a task has.

    :param mask: 0 or 1, shape ``(batch, action_dim)``
    """

    def __init__(self, mask: th.Tensor):
        super().__init__(mask.shape[-1])
        self.mask = mask

    def sample(self) -> th.Tensor:
        return super().sample() * self.mask

    def log_prob(self, actions: th.Tensor, gaussian_actions: th.Tensor | None = None) -> th.Tensor:
        actions = actions.clamp(-1, 1)
        u = TanhBijector.inverse(actions) if gaussian_actions is None else gaussian_actions
        parts = self.distribution.log_prob(u) - th.log(1 - actions.square() + self.epsilon)
        return (self.mask * parts).sum(-1)

    def _entropies(self) -> th.Tensor:
        return self.mask * super()._entropies()


class MaskedCategoricalActions(CategoricalActions):
    """
    Discrete actions of which each task has the first few. An impossible one has the log-probability of zero in the
    parameters, so everything else is as in :class:`~sb3_m3po.actions.CategoricalActions`.

    :param space: Discrete space of the task with the most actions
    :param masks: Actions of each task, boolean, shape ``(n_tasks, n)``
    """

    task_penalty: th.Tensor
    target_entropy: th.Tensor

    def __init__(self, space: spaces.Discrete, masks: np.ndarray):
        super().__init__(space)
        del self.target_entropy
        legal = th.as_tensor(masks)
        self.register_buffer("task_penalty", th.where(legal, 0.0, IMPOSSIBLE), persistent=False)
        self.register_buffer("target_entropy", 0.25 * legal.sum(-1).log(), persistent=False)

    def parameters_from(self, output: th.Tensor, tasks: th.Tensor | None = None) -> th.Tensor:
        return super().parameters_from(output + self.task_penalty[tasks])

    def mixed_with_uniform(self, probabilities: th.Tensor, share: float, params: th.Tensor) -> th.Tensor:
        legal = self.possible(params)
        mixture = (1 - share) * probabilities + share * legal / legal.sum(-1, keepdim=True)
        return th.where(legal, mixture.clamp_min(1e-30).log(), params.new_tensor(IMPOSSIBLE))

    def max_entropy_at(self, params: th.Tensor) -> th.Tensor:
        return self.possible(params).sum(-1, keepdim=True).float().log()


def make_action_codec(space: spaces.Space, log_std_init: float = 0.0, table: TaskTable | None = None) -> ActionCodec:
    """
    :param space: Action space
    :param log_std_init: See :class:`~sb3_m3po.actions.GaussianActions`
    :param table: The tasks; ``None`` for a single one
    :return: The codec of this space; one with masks if some task has fewer actions than it
    :raises ValueError: if the space is not supported, or ``log_std_init`` out of bounds for a Box
    """
    if isinstance(space, (spaces.Box, spaces.Discrete)) and table is not None:
        masks = table.action_masks(int(space.n) if isinstance(space, spaces.Discrete) else int(np.prod(space.shape)))
        if not masks.all():
            if isinstance(space, spaces.Discrete):
                return MaskedCategoricalActions(space, masks)
            return MaskedGaussianActions(space, masks, log_std_init)
    if isinstance(space, spaces.Box):
        return GaussianActions(space, log_std_init)
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        return CategoricalActions(space)
    raise ValueError(f"M3PO supports Box, Discrete, MultiDiscrete and MultiBinary actions, not {space}")
