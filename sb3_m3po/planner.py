"""
How an action is chosen by looking ahead: sampled model-predictive control with a unit-free temperature.

The planner knows three verbs of a model, ``step``, ``prior`` and ``terminal_value``, and the action codec.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from numbers import Integral
from typing import Any, Protocol

import torch as th
from torch.nn import functional as F

from sb3_m3po.actions import ActionCodec, CategoricalActions, GaussianActions
from sb3_m3po.math import kl_bounded_weights


class PlanningModel(Protocol):
    """
    What the planner needs to know of a model. ``z`` is ``(batch, ...)``, ``a`` is ``(batch, input_dim)``; rewards and values
    are in one unit, here the scaled one.
    """

    def step(self, z: th.Tensor, a: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param z: Latents, shape ``(batch, ...)``
        :param a: Model inputs, shape ``(batch, input_dim)``
        :return: Next latent ``(batch, ...)``, reward in scaled units ``(batch,)``, probability of termination ``(batch,)``
        """

    def prior(self, z: th.Tensor) -> th.Tensor:
        """
        :param z: Latents, shape ``(batch, ...)``
        :return: Parameters of the policy, shape ``(batch, params_dim)``
        """

    def terminal_value(self, z: th.Tensor) -> th.Tensor:
        """
        :param z: Latents, shape ``(batch, ...)``
        :return: Value that ends an imagined trajectory, in scaled units, shape ``(batch,)``
        """


@dataclass(frozen=True)
class PlannerConfig:
    """
    The planner's budget; the keys of ``planner_kwargs``.

    :param n_samples: Action sequences drawn per iteration
    :param horizon: Steps of look-ahead
    :param n_iterations: Rounds of drawing; later ones draw half of their sequences around the best of the former
    :param n_effective: Effective number of sequences of each iteration that carry the plan: sets the temperature through
        ``KL(weights || uniform) = log(n_samples / n_effective)`` over the sequences of all iterations, see
        :func:`~sb3_m3po.math.kl_bounded_weights`
    :param min_std: Floor of the planned standard deviation before the squashing (Box)
    :raises ValueError: if a count is no whole number of at least 1, ``n_effective`` lies outside of ``[1, n_samples]``, or
        ``min_std`` is not positive
    """

    n_samples: int = 32
    horizon: int = 3
    n_iterations: int = 1
    n_effective: float = 6.0
    min_std: float = 0.1

    @classmethod
    def of(cls, planner_kwargs: dict[str, Any]) -> "PlannerConfig":
        """
        :param planner_kwargs: Some of the above, by their names
        :return: The same, and the defaults of the others
        :raises TypeError: for a key that is none of them
        """
        known = [field.name for field in fields(cls)]
        if unknown := sorted(set(planner_kwargs) - set(known)):
            raise TypeError(f"planner_kwargs got unexpected keyword arguments {unknown}: the keys are {', '.join(known)}")
        return cls(**planner_kwargs)

    def __post_init__(self) -> None:
        for name in ("n_samples", "horizon", "n_iterations"):
            if not (isinstance(getattr(self, name), Integral) and getattr(self, name) >= 1):
                raise ValueError(
                    f"planner_kwargs[{name!r}]={getattr(self, name)!r} must be a whole number (an int) of at least 1"
                )
        if not 1 <= self.n_effective <= self.n_samples:
            raise ValueError(
                f"planner_kwargs['n_effective']={self.n_effective} must lie between 1 and n_samples={self.n_samples}: set it"
            )
        if not self.min_std > 0:
            raise ValueError(f"planner_kwargs['min_std']={self.min_std} must be positive")


@dataclass
class Plan:
    """
    A distribution over the first action, in model-input form.

    :param gain: Expected score of the plan minus that of the policy's own sequences, in scaled units, shape ``(batch,)``
    :param prior: Parameters of the policy, shape ``(batch, params_dim)``
    """

    gain: th.Tensor
    prior: th.Tensor

    @property
    def kl(self) -> th.Tensor:
        """
        :return: ``KL(plan || policy)`` in nats, shape ``(batch,)``; of a discrete plan it counts the probability of actions
            that nobody drew too, which the plan can't keep
        :raises NotImplementedError: in this base class
        """
        raise NotImplementedError

    def mode(self) -> th.Tensor:
        """
        :return: Best action, shape ``(batch, input_dim)``
        :raises NotImplementedError: in this base class
        """
        raise NotImplementedError

    def sample(self, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param noise: What the action is made of, as for a sample of the policy, shape ``(batch, noise_dim)``
        :return: An action ``(batch, input_dim)`` and its log-probability under the plan ``(batch,)``
        :raises NotImplementedError: in this base class
        """
        raise NotImplementedError


@dataclass
class GaussianPlan(Plan):
    """
    :param codec: Knows how to read its parameters
    :param params: Shape ``(batch, params_dim)``
    """

    codec: GaussianActions
    params: th.Tensor

    @property
    def kl(self) -> th.Tensor:
        return self.codec.kl(self.params, self.prior)

    def mode(self) -> th.Tensor:
        return self.codec.mode(self.params)

    def sample(self, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        return self.codec.sample(self.params, noise)


@dataclass
class CategoricalPlan(Plan):
    """
    :param codec: Knows the factors of an action
    :param candidates: One-hots, repeated ones included, shape ``(batch, n, input_dim)``
    :param weights: Probabilities of the candidates, shape ``(batch, n)``
    :param log_prior: Logarithms of the policy's, which repeated ones share, shape ``(batch, n)``
    :param same: Which candidates are the same action, 0 or 1, shape ``(batch, n, n)``
    """

    codec: CategoricalActions
    candidates: th.Tensor
    weights: th.Tensor
    log_prior: th.Tensor
    same: th.Tensor

    @property
    def kl(self) -> th.Tensor:
        return (self.weights * (self.weights.clamp_min(1e-12).log() - self.log_prior)).sum(-1)

    def mode(self) -> th.Tensor:
        best = (self.same @ self.weights.unsqueeze(-1)).squeeze(-1).argmax(-1)
        return self.candidates[th.arange(len(best), device=best.device), best]

    def sample(self, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        # One factor after the other, among the candidates that agree with what was drawn: noise that remembers then keeps
        # a factor's value, as it does in a sample of the policy
        weights, chosen = self.weights, []
        one_hots = self.candidates.unflatten(-1, (self.codec.n_factors, -1))  # (batch, n, n_factors, width)
        for values, gumbel in zip(one_hots.unbind(2), noise.unflatten(-1, one_hots.shape[2:]).unbind(1), strict=True):
            probs = (weights.unsqueeze(1) @ values).squeeze(1)  # (batch, width), of what was drawn before too
            chosen.append(F.one_hot((probs.log() + gumbel).argmax(-1), probs.shape[-1]).to(probs.dtype))
            weights = weights * (values @ chosen[-1].unsqueeze(-1)).squeeze(-1)
        return th.cat(chosen, -1), weights.sum(-1).clamp_min(1e-12).log()


def own_count(n: int) -> int:
    """
    :param n: Sequences of an iteration
    :return: How many of them, the first ones, are drawn from the policy; the others are wider
    """
    return (n + 1) // 2


#: Called with ``(horizon, n_samples)``; returns noise ``(horizon, batch or 1, n_samples, noise_dim)``
NoiseSource = Callable[[int, int], th.Tensor]


@dataclass
class _Trajectories:
    """Actions ``(horizon, batch, n, dim)``, scores ``(batch, n)``, which of the ``n`` are the policy's own."""

    actions: th.Tensor
    scores: th.Tensor
    own: th.Tensor

    @staticmethod
    def join(parts: list["_Trajectories"]) -> "_Trajectories":
        return _Trajectories(
            th.cat([p.actions for p in parts], 2), th.cat([p.scores for p in parts], 1), th.cat([p.own for p in parts])
        )


@th.inference_mode()
def plan(
    model: PlanningModel,
    codec: ActionCodec,
    z: th.Tensor,
    gamma: float | th.Tensor,
    config: PlannerConfig,
    noise: NoiseSource,
    deadline: float | None = None,
) -> Plan:
    """
    Look ahead from ``z`` and return an improved distribution over the first action.

    Each iteration rolls ``n_samples`` action sequences through the model, half drawn from the policy and half wider, and
    scores them by ``sum_h gamma^h prod(1 - d) r_h + gamma^H prod(1 - d) terminal_value`` (the form of TD-MPC2,
    arXiv 2310.16828, with terminations).

    :param model: The three verbs
    :param codec: Action codec
    :param z: Latents, shape ``(batch, ...)``
    :param gamma: Discount factor, or one for each row, shape ``(batch,)``
    :param config: Budget
    :param noise: Source of the sampling noise
    :param deadline: ``time.perf_counter()``, in seconds, after which no further iteration starts; replaces ``n_iterations``
    :return: The plan, one row for each of ``z``
    """
    parts: list[_Trajectories] = []
    prior, focus = model.prior(z), None
    while True:
        parts.append(_imagine(model, codec, z, prior, gamma, noise(config.horizon, config.n_samples), focus))
        done = len(parts) >= config.n_iterations if deadline is None else time.perf_counter() >= deadline
        if done:
            break
        focus = _refit(codec, _Trajectories.join(parts), prior, config)
    trajectories = _Trajectories.join(parts)
    if isinstance(codec, GaussianActions):
        return _gaussian_plan(codec, trajectories, prior, config)
    return _categorical_plan(codec, trajectories, prior, config)


def _imagine(
    model: PlanningModel,
    codec: ActionCodec,
    z: th.Tensor,
    prior: th.Tensor,
    gamma: float | th.Tensor,
    noise: th.Tensor,
    focus: th.Tensor | None,
) -> _Trajectories:
    horizon, _, n, noise_dim = noise.shape
    batch = len(z)
    own = th.arange(n, device=z.device) < own_count(n)
    flat_own = own.repeat(batch).unsqueeze(-1)
    score = th.zeros(batch * n, device=z.device)
    weight = th.ones_like(score)
    actions = []
    root_params = prior.repeat_interleave(n, 0)
    gamma = gamma.repeat_interleave(n) if isinstance(gamma, th.Tensor) else gamma
    z = z.repeat_interleave(n, 0)
    noise = noise.to(z.device).expand(horizon, batch, n, noise_dim).flatten(1, 2)
    for h in range(horizon):
        params = model.prior(z) if h else root_params
        wide = codec.widen(params) if focus is None else focus[h].repeat_interleave(n, 0)
        params = th.where(flat_own, params, wide)
        a, plain = codec.draw(params, noise[h])
        if h == 0 and focus is None and isinstance(codec, CategoricalActions):
            a = plain = _cover_first_actions(codec, a.view(batch, n, -1), own, prior).flatten(0, 1)
        actions.append(plain)
        z, reward, termination = model.step(z, a)
        score = score + weight * reward
        weight = weight * gamma * (1 - termination)
    score = score + weight * model.terminal_value(z)
    return _Trajectories(th.stack(actions).view(horizon, batch, n, -1), score.view(batch, n), own)


def _cover_first_actions(codec: CategoricalActions, a: th.Tensor, own: th.Tensor, prior: th.Tensor) -> th.Tensor:
    """
    Where the joint actions are few, the wide half tries each possible one first, in turn; ``a`` is ``(batch, n, dim)``.
    """
    n_wide = int((~own).sum())
    if not codec.enumerable or codec.n_joint > n_wide:
        return a
    cover = codec.joint_inputs[th.arange(n_wide, device=a.device) % codec.n_joint]  # (n_wide, dim)
    possible = codec.possible(prior).float() @ cover.T > codec.n_factors - 0.5  # (batch, n_wide)
    a = a.clone()
    a[:, ~own] = th.where(possible.unsqueeze(-1), cover, a[:, ~own])
    return a


def _weights(trajectories: _Trajectories, config: PlannerConfig) -> th.Tensor:
    scores = trajectories.scores
    n = scores.shape[1]
    log_uniform = th.full_like(scores, -math.log(n))
    return kl_bounded_weights(scores, log_uniform, math.log(config.n_samples / config.n_effective))


def _refit(codec: ActionCodec, trajectories: _Trajectories, prior: th.Tensor, config: PlannerConfig) -> th.Tensor:
    """
    :return: Parameters to draw the wide half of the next iteration from, shape ``(horizon, batch, params_dim)``
    """
    w = _weights(trajectories, config).unsqueeze(-1)  # (batch, n, 1)
    mean = (w * trajectories.actions).sum(2)  # (horizon, batch, dim)
    if isinstance(codec, GaussianActions):
        var = (w * (trajectories.actions - mean.unsqueeze(2)).square()).sum(2)
        prior = prior.expand(len(mean), *prior.shape)
        return codec.with_gaussian(prior, mean, var.sqrt().clamp_min(config.min_std).log())
    # A little of the uniform keeps every action possible
    return codec.mixed_with_uniform(mean, 0.1, prior)


def _gain(trajectories: _Trajectories, planned: th.Tensor) -> th.Tensor:
    own = trajectories.scores[:, trajectories.own].mean(-1)
    return planned - own


def _gaussian_plan(
    codec: GaussianActions, trajectories: _Trajectories, prior: th.Tensor, config: PlannerConfig
) -> GaussianPlan:
    w = _weights(trajectories, config)
    u = trajectories.actions[0]  # (batch, n, dim)
    mean = (w.unsqueeze(-1) * u).sum(1)
    var = (w.unsqueeze(-1) * (u - mean.unsqueeze(1)).square()).sum(1)
    params = codec.with_gaussian(prior, mean, var.sqrt().clamp_min(config.min_std).log())
    gain = _gain(trajectories, (w * trajectories.scores).sum(-1))
    return GaussianPlan(gain, prior, codec, params)


def _categorical_plan(
    codec: CategoricalActions, trajectories: _Trajectories, prior: th.Tensor, config: PlannerConfig
) -> CategoricalPlan:
    candidates = trajectories.actions[0]  # (batch, n, dim)
    same = (candidates @ candidates.transpose(1, 2) > codec.n_factors - 0.5).float()  # (batch, n, n)
    # The score of an action: the mean over its sequences, tilted to the good ones (never to nothing)
    w = _weights(trajectories, config) + 1e-6
    score = (same @ (w * trajectories.scores).unsqueeze(-1) / (same @ w.unsqueeze(-1))).squeeze(-1)
    log_prior = (codec.log_prob(prior.unsqueeze(1), candidates) - same.sum(-1).log()).clamp_min(-30.0)
    # The bound is one on the distance to the policy among the candidates
    bound = (0.5 * codec.max_entropy_at(prior)).clamp_max(math.log(config.n_samples / config.n_effective))
    weights = kl_bounded_weights(score, log_prior.log_softmax(-1), bound)
    gain = _gain(trajectories, (weights * score).sum(-1))
    return CategoricalPlan(gain, prior, codec, candidates, weights, log_prior, same)
