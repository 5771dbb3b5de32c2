"""Building blocks of the networks: normalised layers, the simplicial latent, a batched ensemble, running statistics."""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import numpy as np
import torch as th
from torch import nn
from torch.nn import functional as F


class SimNorm(nn.Module):
    """
    Softmax over groups of the last dimension: keeps a latent bounded and sparse, and can't collapse to zero
    (TD-MPC2, arXiv 2310.16828).

    The entries of a group stand ``dim / group_size`` apart, not side by side: PyTorch vectorises a softmax over the last
    dimension only where that is long, and over eight it takes 5 to 20 times as long.

    :param group_size: Entries that sum to one
    """

    def __init__(self, group_size: int = 8):
        super().__init__()
        self.group_size = group_size

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: Shape ``(..., dim)``, where ``dim`` is a multiple of ``group_size``
        :return: Same shape; entries in [0, 1]
        """
        return th.softmax(x.unflatten(-1, (self.group_size, -1)), dim=-2).flatten(-2)


class MLP(nn.Module):
    """
    Hidden layers, each ``Linear -> LayerNorm -> activation``; the identity if ``hidden`` is empty.

    :param input_dim: Width of the input
    :param hidden: Widths of the layers
    :param activation_fn: Their activation
    """

    def __init__(self, input_dim: int, hidden: list[int], activation_fn: type[nn.Module]):
        super().__init__()
        self.linears, self.norms = nn.ModuleList(), nn.ModuleList()
        self.activation = activation_fn()
        for fan_in, fan_out in pairwise([input_dim, *hidden]):
            self.linears.append(orthogonal(nn.Linear(fan_in, fan_out)))
            self.norms.append(nn.LayerNorm(fan_out))

    def forward(self, x: th.Tensor) -> th.Tensor:
        """
        :param x: Shape ``(..., input_dim)``
        :return: Shape ``(..., hidden[-1])``, or that of ``x`` if ``hidden`` is empty
        """
        # Functions and not modules: for one observation, calling a module takes longer than its arithmetic
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = F.linear(x, linear.weight, linear.bias)  # type: ignore[arg-type]
            x = self.activation(F.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias))  # type: ignore[arg-type]
        return x


def orthogonal(layer: nn.Linear, gain: float = 1.0) -> nn.Linear:
    """
    :param layer: Changed in place
    :param gain: Factor of the orthogonal weights
    :return: The same layer with orthogonal weights and zero bias
    """
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


class Ensemble(nn.Module):
    """
    ``n_members`` small networks on one input, evaluated as a few batched products. The output layers start at zero.

    :param input_dim: Width of the input
    :param hidden: Widths of the hidden layers of each member
    :param output_dim: Outputs of each member
    :param n_members: Size of the ensemble
    :param activation_fn: Activation of the hidden layers
    """

    def __init__(self, input_dim: int, hidden: list[int], output_dim: int, n_members: int, activation_fn: type[nn.Module]):
        super().__init__()
        self.activation = activation_fn()
        widths = [input_dim, *hidden, output_dim]
        self.weights = nn.ParameterList()
        self.biases = nn.ParameterList()
        for fan_in, fan_out in pairwise(widths):
            weight = th.empty(n_members, fan_in, fan_out)
            for member in weight:
                nn.init.orthogonal_(member)
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(th.zeros(n_members, 1, fan_out)))
        nn.init.zeros_(self.weights[-1])

    def forward(self, x: th.Tensor, frozen: bool = False) -> th.Tensor:
        """
        :param x: Shape ``(batch, input_dim)``
        :param frozen: Let gradients reach the input only, not the parameters
        :return: Shape ``(n_members, batch, output_dim)``
        """
        n_members = len(self.weights[0])
        h = x.expand(n_members, *x.shape)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            if frozen:
                weight, bias = weight.detach(), bias.detach()
            h = th.baddbmm(bias, h, weight)
            if i < len(self.weights) - 1:
                # No affine part: the next layer's weights do the same
                h = self.activation(F.layer_norm(h, h.shape[-1:]))
        return h


class RunningNorm(nn.Module):
    """
    Normalises by statistics that run while data is collected and are applied only from the next :meth:`freeze` on,
    so that an observation keeps its meaning between two syncs.

    :param shape: Shape of one observation
    :param clip: Normalised entries are clipped to ``[-clip, clip]``
    :param min_std: Floor of the standard deviation, in units of the observation
    :param n_tasks: ``None`` for one set of statistics; else one for each task, and the methods take the tasks' ids
    """

    def __init__(self, shape: tuple[int, ...], clip: float = 10.0, min_std: float = 1e-2, n_tasks: int | None = None):
        super().__init__()
        self.clip = clip
        self.min_std = min_std
        self.per_task = n_tasks is not None
        self.count: th.Tensor
        self.mean: th.Tensor
        self.var: th.Tensor
        self.shift: th.Tensor
        self.scale: th.Tensor
        tasks = () if n_tasks is None else (n_tasks,)
        self.register_buffer("count", th.zeros(n_tasks or 1, dtype=th.float64))
        self.register_buffer("mean", th.zeros((*tasks, *shape), dtype=th.float64))
        self.register_buffer("var", th.ones((*tasks, *shape), dtype=th.float64))
        self.register_buffer("shift", th.zeros((*tasks, *shape)))
        self.register_buffer("scale", th.ones((*tasks, *shape)))

    @th.no_grad()
    def update(self, observations: np.ndarray, tasks: np.ndarray | None = None) -> None:
        """
        Merge the mean and the variance of new data into the running ones (Chan et al. 1979).

        :param observations: New data, in units of the observation, shape ``(batch, *shape)``
        :param tasks: Their tasks' ids, shape ``(batch,)``
        """
        x = th.as_tensor(observations, dtype=th.float64, device=self.mean.device)
        if tasks is None:
            self._merge(x, self.count, self.mean, self.var)
            return
        for task in np.unique(tasks).tolist():
            mine = th.as_tensor(tasks == task, device=x.device)
            self._merge(x[mine], self.count[task], self.mean[task], self.var[task])

    @staticmethod
    def _merge(x: th.Tensor, count: th.Tensor, mean: th.Tensor, var: th.Tensor) -> None:
        """Change the statistics in place."""
        # Chan et al. (1979), as in SB3's RunningMeanStd
        total = count + len(x)
        delta = x.mean(0) - mean
        m2 = var * count + x.var(0, correction=0) * len(x) + delta.square() * count * len(x) / total
        mean += delta * len(x) / total
        var.copy_(m2 / total)
        count.copy_(total)

    @th.no_grad()
    def freeze(self) -> None:
        """Apply the statistics seen so far."""
        seen = self.count > 0
        if self.per_task:
            seen = seen.view(-1, *[1] * (self.mean.dim() - 1))
        self.shift.copy_(th.where(seen, self.mean, self.shift))
        self.scale.copy_(th.where(seen, self.var.sqrt().clamp_min(self.min_std), self.scale))

    def mean_over_tasks(self) -> tuple[th.Tensor, th.Tensor]:
        """
        What may be expected of an unknown task: of each entry the mean over the tasks in which it moves. In those
        that don't have it, it rests at 0.

        :return: Mean and standard deviation, shape ``(*shape,)`` each; the latter 1 where no task moves
        """
        moves = self.scale > self.min_std  # (n_tasks, *shape)
        n = moves.sum(0).clamp_min(1)
        shift, scale = ((part * moves).sum(0) / n for part in (self.shift, self.scale))
        anywhere = moves.any(0)
        return th.where(anywhere, shift, self.shift.mean(0)), th.where(anywhere, scale, 1.0)

    def forward(self, x: th.Tensor, tasks: th.Tensor | None = None) -> th.Tensor:
        """
        :param x: Observations, shape ``(batch, *shape)``
        :param tasks: Their tasks' ids, shape ``(batch,)``
        :return: Normalised by the frozen statistics and clipped, same shape
        """
        shift, scale = (self.shift, self.scale) if tasks is None else (self.shift[tasks], self.scale[tasks])
        # The floor again: parameters set by hand may be anything
        return ((x - shift) / scale.clamp_min(self.min_std)).clamp(-self.clip, self.clip)


@contextmanager
def without_gradient(*modules: th.nn.Module) -> Iterator[None]:
    """
    Let no gradient reach some parameters; an interrupt leaves them as they were, too.

    :param modules: Whose parameters
    """
    parameters = [parameter for module in modules for parameter in module.parameters()]
    wanted = [parameter.requires_grad for parameter in parameters]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, wants in zip(parameters, wanted, strict=True):
            parameter.requires_grad_(wants)
