"""
Action codecs: what the policy's outputs mean for each kind of action space.

A codec knows three forms of an action: *environment* actions (as in the rollout; Box ones scaled to [-1, 1]), *model
inputs* (Box: the same; discrete kinds: concatenated one-hots) and the policy's *parameters* (Box: mean and log-std
before the squashing; discrete kinds: logits). The last dimension is always the action's.
"""

import itertools
import math
from typing import ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution
from torch import nn
from torch.nn import functional as F

from sb3_m3po.math import gaussian_kl, gaussian_log_prob, log_det_tanh

#: Largest joint MultiDiscrete or MultiBinary space whose actions are enumerated
MAX_JOINT_ACTIONS = 16
#: Largest Discrete space whose actions are enumerated
MAX_DISCRETE_ACTIONS = 64
#: Observations that correlate by more from one step to the next are slow. Random policies: HalfCheetah 0.3, dm_control's
#: walker 0.7, Hopper 0.94, Pendulum 0.98, dm_control's cart-pole 0.996 (``benchmarks/random_baseline.csv``)
SLOW_OBSERVATIONS = 0.8
#: Stands for the logarithm of zero
IMPOSSIBLE = -1e9


class GaussianActions(nn.Module):
    """
    Box actions: a diagonal Gaussian squashed by ``tanh``.

    :param space: Bounded Box
    :param log_std_init: Logarithm of the initial standard deviation before the squashing
    :raises ValueError: if ``log_std_init`` lies outside of ``log_std_bounds``
    """

    wide_floor: th.Tensor
    enumerable: ClassVar[bool] = False
    log_std_bounds: ClassVar[tuple[float, float]] = (-4.0, 0.5)
    #: Entropy coefficient to begin with
    ent_coef: ClassVar[float] = 0.1
    #: By how much of itself the target entropy falls over the training: to SAC's
    entropy_fall: ClassVar[float] = 1.0

    def __init__(self, space: spaces.Box, log_std_init: float = 0.0):
        super().__init__()
        self.shape = space.shape
        self.input_dim = int(np.prod(space.shape))
        self.output_dim = self.params_dim = 2 * self.input_dim
        self.noise_dim = self.input_dim
        #: In nats, as the training begins; with tasks of different sizes one for each, shape ``(n_tasks,)``
        self.target_entropy: float | th.Tensor = -0.5 * self.input_dim
        low, high = self.log_std_bounds
        if not low < log_std_init < high:
            raise ValueError(f"log_std_init={log_std_init} must lie between {low} and {high}")
        self._log_std_shift = math.atanh(2 * (log_std_init - low) / (high - low) - 1)
        floor = th.tensor([-math.inf, math.log(0.5)]).repeat_interleave(self.input_dim)
        self.register_buffer("wide_floor", floor, persistent=False)

    def parameters_from(self, output: th.Tensor, tasks: th.Tensor | None = None) -> th.Tensor:
        """
        :param output: The policy network's last layer, shape ``(..., output_dim)``
        :param tasks: Ids of the tasks, shape ``(...)``; not read here, where all actions are every task's
        :return: Mean and bounded log-std (the form of TD-MPC2's code), concatenated, shape ``(..., params_dim)``
        """
        low, high = self.log_std_bounds
        mean, raw = output.chunk(2, -1)
        log_std = low + 0.5 * (high - low) * (th.tanh(raw + self._log_std_shift) + 1)
        return th.cat([mean, log_std], -1)

    def gaussian(self, params: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param params: Shape ``(..., params_dim)``
        :return: Mean and log-std before the squashing, each ``(..., input_dim)``
        """
        mean, log_std = params.chunk(2, -1)
        return mean, log_std

    def with_gaussian(self, params: th.Tensor, mean: th.Tensor, log_std: th.Tensor) -> th.Tensor:
        """
        :param params: Of the same states, shape ``(..., params_dim)``
        :param mean: Before the squashing, shape ``(..., input_dim)``
        :param log_std: Likewise
        :return: Parameters of another Gaussian there, shape ``(..., params_dim)``
        """
        return th.cat([mean, log_std], -1)

    def to_input(self, actions: th.Tensor, tasks: th.Tensor | None = None) -> th.Tensor:
        """
        :param actions: Actions scaled to [-1, 1], shape ``(batch, *space.shape)``
        :param tasks: Ids of the tasks, shape ``(batch,)``; not read here
        :return: Model inputs, shape ``(batch, input_dim)``
        """
        return actions.reshape(-1, self.input_dim).float()

    def to_env(self, inputs: th.Tensor) -> th.Tensor:
        """
        :param inputs: Shape ``(batch, input_dim)``
        :return: Scaled actions in [-1, 1], shape ``(batch, *space.shape)``
        """
        return inputs.reshape(-1, *self.shape)

    def noise_persistence(self, lag_correlation: float) -> tuple[float, ...]:
        """
        Where observations change little from one step to the next, one action hardly shows in them, and a habit does:
        Hopper and a cart-pole that swings up learn faster if noise remembers in some episodes, and a Hopper whose hop ends
        in a fall gets out of it by noise that lasts as long as a hop. HalfCheetah, where each step counts, learns slower
        with it. It matters before the first update, too, since the first updates calm the policy: MountainCarContinuous's
        goal is then known.

        :param lag_correlation: Of the observations, from one step to the next
        :return: For :class:`PersistentNoise`
        """
        return (0.0, 0.8, 0.95, 0.99) if lag_correlation > SLOW_OBSERVATIONS else (0.0,)

    def noise(self, shape: tuple[int, ...], generator: th.Generator | None = None) -> th.Tensor:
        """
        :param shape: Leading dimensions
        :param generator: Random generator on the CPU; ``None`` for torch's own
        :return: Standard normal noise, shape ``(*shape, noise_dim)``, on the CPU
        """
        return th.randn(*shape, self.noise_dim, generator=generator)

    def noise_from_normal(self, normal: th.Tensor) -> th.Tensor:
        """
        :param normal: Standard normal noise, shape ``(..., noise_dim)``
        :return: Noise as :meth:`sample` takes it, here the same
        """
        return normal

    def sample(self, params: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param params: Mean and log-std, shape ``(..., params_dim)``
        :param noise: From :meth:`noise`, shape ``(..., noise_dim)``
        :return: Reparameterised model inputs ``(..., input_dim)`` and their log-probability after the squashing ``(...)``
            (SAC, arXiv 1812.05905, appendix C)
        """
        a, u = self.draw(params, noise)
        return a, self.log_prob_before_squashing(params, u) - log_det_tanh(u)

    def log_prob_before_squashing(self, params: th.Tensor, u: th.Tensor) -> th.Tensor:
        """
        :param params: Mean and log-std, shape ``(..., params_dim)``
        :param u: Actions before the squashing, shape ``(..., input_dim)``
        :return: Their log-density, shape ``(...)``
        """
        return gaussian_log_prob(u, *self.gaussian(params))

    def draw(self, params: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param params: Mean and log-std, shape ``(..., params_dim)``
        :param noise: From :meth:`noise`, shape ``(..., noise_dim)``
        :return: Model inputs, and the same before the squashing, where a plan is a Gaussian; both ``(..., input_dim)``
        """
        mean, log_std = self.gaussian(params)
        u = mean + th.exp(log_std) * noise
        return th.tanh(u), u

    def mode(self, params: th.Tensor) -> th.Tensor:
        """
        :param params: Or the output of the policy network's last layer: the mode needs no more. Shape ``(..., params_dim)``
        :return: Model input of the squashed mean, shape ``(..., input_dim)``
        """
        return th.tanh(self.gaussian(params)[0])

    def kl(self, p: th.Tensor, q: th.Tensor) -> th.Tensor:
        """
        :param p: Parameters, shape ``(..., params_dim)``
        :param q: Likewise
        :return: ``KL(p || q)`` in nats, before the squashing (which does not change it), shape ``(...)``
        """
        return gaussian_kl(*self.gaussian(p), *self.gaussian(q))

    def widen(self, params: th.Tensor) -> th.Tensor:
        """
        :param params: Mean and log-std, shape ``(..., params_dim)``
        :return: Parameters with the same mean and a standard deviation of at least 0.5 before the squashing, same shape
        """
        return th.maximum(params, self.wide_floor)

    def distribution(self, params: th.Tensor) -> "SquashedGaussian":
        """
        :param params: Mean and log-std, shape ``(batch, params_dim)``
        :return: SB3's form of it
        """
        return SquashedGaussian(self.input_dim).proba_distribution(*self.gaussian(params))


class SquashedGaussian(SquashedDiagGaussianDistribution):
    """SB3's squashed Gaussian with the entropy that it lacks; actions outside [-1, 1] count as saturated, not as NaN."""

    def log_prob(self, actions: th.Tensor, gaussian_actions: th.Tensor | None = None) -> th.Tensor:
        """
        :param actions: Squashed actions, shape ``(batch, action_dim)``
        :param gaussian_actions: The same before the squashing; computed if not given
        :return: Log-probability of squashed actions, shape ``(batch,)``
        """
        return super().log_prob(actions.clamp(-1, 1), gaussian_actions)

    def entropy(self) -> th.Tensor:
        """
        :return: Entropy in nats, shape ``(batch,)``: the Gaussian's, and ``E log(1 - tanh(u)^2)`` (the change of variables of
            SAC, arXiv 1812.05905, appendix C) by Gauss-Hermite quadrature
        """
        return self._entropies().sum(-1)

    def _entropies(self) -> th.Tensor:
        """:return: Of each dimension, shape ``(batch, action_dim)``"""
        normal = self.distribution
        nodes, weights = (th.as_tensor(x, dtype=normal.mean.dtype) for x in np.polynomial.hermite_e.hermegauss(32))
        u = normal.mean.unsqueeze(-1) + normal.stddev.unsqueeze(-1) * nodes.to(normal.mean.device)
        log_det = 2 * (math.log(2.0) - u - F.softplus(-2 * u))
        weights = (weights / weights.sum()).to(u.device)
        return normal.entropy() + log_det @ weights


class CategoricalActions(nn.Module):
    """
    Discrete, MultiDiscrete and MultiBinary actions: independent categoricals, one per factor, padded to the largest.

    :param space: Discrete, one-dimensional MultiDiscrete or MultiBinary
    """

    #: Entropy coefficient to begin with: many actions must be tried before one of them may be certain
    ent_coef: ClassVar[float] = 1.0
    entropy_fall: ClassVar[float] = 0.0
    start: th.Tensor
    penalty: th.Tensor
    uniform: th.Tensor
    legal_index: th.Tensor
    joint: th.Tensor
    joint_inputs: th.Tensor

    def __init__(self, space: spaces.Discrete | spaces.MultiDiscrete | spaces.MultiBinary):
        super().__init__()
        self.shape: tuple[int, ...] = space.shape or ()
        if isinstance(space, spaces.Discrete):
            nvec, start = [int(space.n)], [int(space.start)]
        elif isinstance(space, spaces.MultiDiscrete):
            nvec, start = space.nvec.tolist(), space.start.tolist()
        else:
            nvec = [2] * math.prod(self.shape)
            start = [0] * len(nvec)
        self.dtype = th.int8 if isinstance(space, spaces.MultiBinary) else th.int64
        self.n_factors, self.width = len(nvec), max(nvec)
        self.input_dim = self.output_dim = self.params_dim = self.noise_dim = self.n_factors * self.width
        self.max_entropy = sum(math.log(n) for n in nvec)
        #: In nats; with tasks of different sizes one for each, shape ``(n_tasks,)``
        self.target_entropy: float | th.Tensor = 0.25 * self.max_entropy
        legal = th.arange(self.width) < th.tensor(nvec)[:, None]  # (factors, width)
        self.register_buffer("start", th.tensor(start), persistent=False)
        self.register_buffer("penalty", th.where(legal, 0.0, IMPOSSIBLE), persistent=False)
        self.register_buffer("uniform", (legal / th.tensor(nvec)[:, None]).float(), persistent=False)
        self.register_buffer("legal_index", legal.flatten().nonzero().squeeze(-1), persistent=False)
        n_joint = math.prod(nvec)
        self.enumerable = n_joint <= (MAX_DISCRETE_ACTIONS if self.n_factors == 1 else MAX_JOINT_ACTIONS)
        joint = list(itertools.product(*map(range, nvec))) if self.enumerable else []
        self.n_joint = len(joint)
        self.register_buffer("joint", th.tensor(joint, dtype=th.long), persistent=False)  # (joint, factors)
        self.register_buffer("joint_inputs", self._one_hot(self.joint) if joint else th.empty(0), persistent=False)

    def _one_hot(self, index: th.Tensor) -> th.Tensor:
        return F.one_hot(index, self.width).flatten(-2).float()

    def parameters_from(self, output: th.Tensor, tasks: th.Tensor | None = None) -> th.Tensor:
        """
        :param output: The policy network's last layer, shape ``(..., output_dim)``
        :param tasks: Ids of the tasks, shape ``(...)``; not read here, where all actions are every task's
        :return: Normalised log-probabilities, impossible padding included, shape ``(..., params_dim)``
        """
        logits = output.unflatten(-1, (self.n_factors, self.width)) + self.penalty
        return F.log_softmax(logits, -1).flatten(-2)

    def to_input(self, actions: th.Tensor, tasks: th.Tensor | None = None) -> th.Tensor:
        """
        :param actions: Environment actions, shape ``(batch, *space.shape)``
        :param tasks: Ids of the tasks, shape ``(batch,)``; not read here
        :return: One-hots, shape ``(batch, input_dim)``
        """
        return self._one_hot(actions.reshape(-1, self.n_factors).long() - self.start)

    def to_env(self, inputs: th.Tensor) -> th.Tensor:
        """
        :param inputs: One-hots, shape ``(batch, input_dim)``
        :return: Environment actions, shape ``(batch, *space.shape)``
        """
        index = inputs.unflatten(-1, (self.n_factors, self.width)).argmax(-1) + self.start
        return index.reshape(-1, *self.shape).to(self.dtype)

    def noise_persistence(self, lag_correlation: float) -> tuple[float, ...]:
        """
        An action that is held for a few steps gets somewhere: Acrobot's goal is found.

        :param lag_correlation: Not read
        :return: For :class:`PersistentNoise`
        """
        return (0.8,)

    def noise(self, shape: tuple[int, ...], generator: th.Generator | None = None) -> th.Tensor:
        """
        :param shape: Leading dimensions
        :param generator: Random generator on the CPU; ``None`` for torch's own
        :return: Gumbel noise, shape ``(*shape, noise_dim)``, on the CPU
        """
        return _gumbel(th.rand(*shape, self.noise_dim, generator=generator))

    def noise_from_normal(self, normal: th.Tensor) -> th.Tensor:
        """
        :param normal: Standard normal noise, shape ``(..., noise_dim)``
        :return: Noise as :meth:`sample` takes it: Gumbel noise of the same quantiles, same shape
        """
        return _gumbel(th.special.ndtr(normal))

    def sample(self, params: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param params: Log-probabilities, shape ``(..., params_dim)``
        :param noise: From :meth:`noise`, shape ``(..., noise_dim)``
        :return: One-hots ``(..., input_dim)`` with the straight-through gradient of Gumbel-softmax (arXiv 1611.01144), their
            log-probability ``(...)``
        """
        log_probs = params.unflatten(-1, (self.n_factors, self.width))
        perturbed = log_probs + noise.unflatten(-1, (self.n_factors, self.width))
        one_hot = F.one_hot(perturbed.argmax(-1), self.width).to(params.dtype)
        log_prob = (one_hot * log_probs).sum((-1, -2))
        if params.requires_grad:
            soft = F.softmax(perturbed, -1)
            one_hot = one_hot + soft - soft.detach()
        return one_hot.flatten(-2), log_prob

    def draw(self, params: th.Tensor, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        """
        :param params: Log-probabilities, shape ``(..., params_dim)``
        :param noise: From :meth:`noise`, shape ``(..., noise_dim)``
        :return: One-hots, shape ``(..., input_dim)``, twice: nothing is squashed here
        """
        one_hot = self.sample(params, noise)[0]
        return one_hot, one_hot

    def mode(self, params: th.Tensor) -> th.Tensor:
        """
        :param params: Or the output of the policy network's last layer: the mode needs no more. Shape ``(..., params_dim)``
        :return: One-hots of the most probable action, shape ``(..., input_dim)``
        """
        return self._one_hot((params.unflatten(-1, (self.n_factors, self.width)) + self.penalty).argmax(-1))

    def log_prob(self, params: th.Tensor, inputs: th.Tensor) -> th.Tensor:
        """
        :param params: Log-probabilities, shape ``(..., params_dim)``
        :param inputs: One-hots, shape ``(..., input_dim)``
        :return: Log-probability of one-hot model inputs, shape ``(...)``
        """
        return (params * inputs).sum(-1)

    def joint_log_prob(self, params: th.Tensor) -> th.Tensor:
        """
        :param params: Log-probabilities, shape ``(..., params_dim)``
        :return: Log-probability of every joint action of an enumerable space, shape ``(..., n_joint)``
        """
        return params @ self.joint_inputs.T

    def entropy(self, params: th.Tensor) -> th.Tensor:
        """
        :param params: Log-probabilities, shape ``(..., params_dim)``
        :return: Entropy in nats, summed over the factors, shape ``(...)``
        """
        return -(params.exp() * params).sum(-1)

    def kl(self, p: th.Tensor, q: th.Tensor) -> th.Tensor:
        """
        :param p: Log-probabilities, shape ``(..., params_dim)``
        :param q: Likewise
        :return: ``KL(p || q)`` in nats, summed over the factors, shape ``(...)``
        """
        return (p.exp() * (p - q)).sum(-1)

    def widen(self, params: th.Tensor) -> th.Tensor:
        """
        :param params: Log-probabilities, shape ``(..., params_dim)``
        :return: The even mixture with the uniform distribution, factor by factor, same shape
        """
        return self.mixed_with_uniform(params.exp(), 0.5, params)

    def mixed_with_uniform(self, probabilities: th.Tensor, share: float, params: th.Tensor) -> th.Tensor:
        """
        :param probabilities: Of every action, shape ``(..., params_dim)``
        :param share: Weight of the uniform distribution
        :param params: Log-probabilities that say which actions are possible, shape ``(..., params_dim)``; not read here
        :return: Log-probabilities of the mixture, factor by factor, same shape
        """
        mixture = (1 - share) * probabilities + share * self.uniform.flatten()
        return th.log(mixture.clamp_min(1e-30)) + self.penalty.flatten()

    def max_entropy_at(self, params: th.Tensor) -> th.Tensor:
        """
        :param params: Log-probabilities, shape ``(batch, params_dim)``
        :return: Entropy in nats of the uniform distribution over what is possible there, shape ``(batch or 1, 1)``
        """
        return params.new_full((1, 1), self.max_entropy)

    def possible(self, params: th.Tensor) -> th.Tensor:
        """
        :param params: Log-probabilities, shape ``(..., params_dim)``
        :return: Which entries an action may have, boolean, same shape
        """
        return params > 0.5 * IMPOSSIBLE


ActionCodec = GaussianActions | CategoricalActions


def _gumbel(uniform: th.Tensor) -> th.Tensor:
    return -th.log(-th.log(uniform.clamp(1e-20, 1 - 1e-7)))


class PersistentNoise:
    """
    Standard normal noise that remembers: ``x_t = rho x_{t-1} + sqrt(1 - rho^2) xi_t`` within an episode.

    Each action by itself is drawn from the policy, whatever ``rho`` is; but neighbouring actions err on the same side, so
    that exploration gets somewhere (Eberhard et al. 2023, "Pink Noise Is All You Need"). Uniformly random torques, drawn
    anew at each step, hardly ever swing an Acrobot up.

    :param dim: Width of the noise
    """

    def __init__(self, dim: int):
        self.dim = dim
        self._turn = th.empty(0, dtype=th.long)
        self._state = th.empty(0, dim)

    def draw(self, starts: np.ndarray, persistence: list[tuple[float, ...]], generator: th.Generator | None) -> th.Tensor:
        """
        :param starts: Which environments begin an episode, shape ``(n_envs,)``
        :param persistence: For each environment values of ``rho``, in [0, 1): its episodes take them in turn, the first
            environment from the first on, the second from the second on, ...
        :param generator: Random generator on the CPU; ``None`` for torch's own
        :return: Shape ``(n_envs, dim)``, on the CPU
        """
        fresh = th.randn(len(starts), self.dim, generator=generator)
        if len(self._state) != len(starts):
            self._turn, self._state = th.arange(len(starts)), fresh
        else:
            begins = th.as_tensor(starts).bool()
            self._turn += begins
            turns = zip(persistence, self._turn.tolist(), strict=True)
            rho = th.tensor([values[turn % len(values)] for values, turn in turns]).unsqueeze(-1)
            kept = rho * self._state + (1 - rho.square()).sqrt() * fresh
            self._state = th.where(begins.unsqueeze(-1), fresh, kept)
        return self._state
