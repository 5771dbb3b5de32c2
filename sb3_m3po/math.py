"""Pure functions: two-hot value coding, running-scale helpers and the planner's temperature. Nothing here holds state."""

import math

import torch as th
from torch.nn import functional as F


def symexp(x: th.Tensor) -> th.Tensor:
    """
    ``sign(x) (exp(|x|) - 1)``, the inverse of ``symlog`` (DreamerV3, arXiv 2301.04104).

    :param x: Any shape
    :return: Same shape
    """
    return th.sign(x) * th.expm1(x.abs())


def value_bins(n_bins: int = 51, limit: float = 3.2) -> th.Tensor:
    """
    Support of the classified rewards and values, in scaled units.

    :param n_bins: Number of bins, odd so that zero is one of them
    :param limit: The outermost bins are at ``+-symexp(limit)``
    :return: Bin positions, increasing and exactly symmetric, shape ``(n_bins,)``
    """
    half = symexp(th.linspace(0, limit, n_bins // 2 + 1, dtype=th.float64)).float()
    return th.cat([-half[1:].flip(0), half])


def two_hot(x: th.Tensor, bins: th.Tensor) -> th.Tensor:
    """
    Weights of the two neighbouring bins such that ``(weights * bins).sum(-1) == x`` (DreamerV3, arXiv 2301.04104).

    The interpolation is linear between the bins themselves: the expectation over a noisy target then decodes to its
    mean (interpolating in symlog space would value a fair coin of 0 or 20 at 3.6).

    :param x: Values in the unit of the bins, shape ``(...)``; clipped to the outermost bins
    :param bins: Increasing bin positions, shape ``(n_bins,)``
    :return: Weights, shape ``(..., n_bins)``
    """
    x = x.clamp(bins[0], bins[-1])
    upper = th.searchsorted(bins, x.contiguous(), right=True).clamp(1, len(bins) - 1)
    lower = upper - 1
    weight = ((x - bins[lower]) / (bins[upper] - bins[lower])).unsqueeze(-1)
    out = th.zeros(*x.shape, len(bins), dtype=x.dtype, device=x.device)
    out.scatter_(-1, lower.unsqueeze(-1), 1 - weight)
    return out.scatter_(-1, upper.unsqueeze(-1), weight)


def decode(logits: th.Tensor, bins: th.Tensor) -> th.Tensor:
    """
    Expectation of a classified value.

    :param logits: Shape ``(..., n_bins)``
    :param bins: Bin positions, shape ``(n_bins,)``
    :return: Value in the unit of the bins, shape ``(...)``
    """
    return th.softmax(logits, dim=-1) @ bins


def cross_entropy(logits: th.Tensor, target: th.Tensor) -> th.Tensor:
    """
    :param logits: Shape ``(..., n_bins)``
    :param target: Probabilities, broadcastable to ``logits``
    :return: Cross-entropy in nats, shape ``(...)``
    """
    return -(target * F.log_softmax(logits, dim=-1)).sum(-1)


def gaussian_log_prob(u: th.Tensor, mean: th.Tensor, log_std: th.Tensor) -> th.Tensor:
    """
    :param u: Where the density is asked, shape ``(..., dim)``
    :param mean: Shape ``(..., dim)``
    :param log_std: Shape ``(..., dim)``
    :return: Log density of a diagonal Gaussian, summed over the last dimension, shape ``(...)``
    """
    noise = (u - mean) * th.exp(-log_std)
    return (-0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)


def log_det_tanh(u: th.Tensor) -> th.Tensor:
    """
    :param u: Before the squashing, shape ``(..., dim)``
    :return: ``sum log(1 - tanh(u)^2)`` over the last dimension, shape ``(...)``, exact for large ``|u|`` (SAC,
        arXiv 1812.05905, appendix C)
    """
    return (2 * (math.log(2.0) - u - F.softplus(-2 * u))).sum(-1)


def gaussian_kl(mean_p: th.Tensor, log_std_p: th.Tensor, mean_q: th.Tensor, log_std_q: th.Tensor) -> th.Tensor:
    """
    :param mean_p: Shape ``(..., dim)``
    :param log_std_p: Shape ``(..., dim)``
    :param mean_q: Shape ``(..., dim)``
    :param log_std_q: Shape ``(..., dim)``
    :return: ``KL(p || q)`` of two diagonal Gaussians in nats, summed over the last dimension, shape ``(...)``
    """
    ratio = th.exp(2 * (log_std_p - log_std_q))
    distance = ((mean_p - mean_q) * th.exp(-log_std_q)).square()
    return (log_std_q - log_std_p + 0.5 * (ratio + distance) - 0.5).sum(-1)


def kl_bounded_weights(scores: th.Tensor, log_prior: th.Tensor, bound: float | th.Tensor, n_levels: int = 32) -> th.Tensor:
    """
    Weights ``w ~ prior exp(score / eta)`` with the smallest temperature ``eta`` for which ``KL(w || prior) <= bound``.

    It is the E-step of MPO (arXiv 1806.06920): the temperature is solved for, so it has no unit of reward. Equal scores
    give back the prior, and so do scores that cannot spend the bound at any temperature within ``[1e-3, 1e3]`` times
    the spread of the scores, up to that temperature.

    :param scores: In any unit, shape ``(batch, n)``
    :param log_prior: Log-probabilities, shape ``(batch, n)``
    :param bound: In nats, or one for each row, shape ``(batch, 1)``
    :param n_levels: Temperatures tried at once; a second round tries as many between two neighbours of the first
    :return: Weights that sum to one, shape ``(batch, n)``
    """
    scores = scores - scores.amax(-1, keepdim=True)
    spread = -scores.amin(-1, keepdim=True)
    scores = th.where(spread > 1e-6, scores / spread.clamp_min(1e-6), th.zeros_like(scores))
    low = scores.new_full((len(scores), 1), math.log(1e-3))
    width, steps = -2 * low, th.linspace(0, 1, n_levels, device=scores.device)
    for _ in range(2):
        log_eta = low + width * steps  # (batch, n_levels), ascending: so the divergence falls
        log_w = F.log_softmax(log_prior.unsqueeze(1) + scores.unsqueeze(1) * th.exp(-log_eta).unsqueeze(-1), dim=-1)
        kl = (log_w.exp() * (log_w - log_prior.unsqueeze(1))).sum(-1)  # (batch, n_levels)
        # The last temperature that is too low, and the next one
        last = (kl > bound).sum(-1, keepdim=True).sub(1).clamp(0, n_levels - 2)
        low, width = log_eta.gather(-1, last), width / (n_levels - 1)
    return F.softmax(log_prior + scores * th.exp(-(low + width)), dim=-1)
