"""What is minimised: pure functions of tensors. Sequences are time-first; ``m`` masks what lies behind an episode's end."""

from typing import NamedTuple

import torch as th
from torch.nn import functional as F

from sb3_m3po.actions import ActionCodec, GaussianActions
from sb3_m3po.math import cross_entropy, decode
from sb3_m3po.world_model import WorldModel

CONSISTENCY_COEF = 20.0
REWARD_COEF = 0.1
TERMINATION_COEF = 1.0
VALUE_COEF = 0.1
#: A latent must not stand still: without it, random observations with rare rewards are forgotten within 100 updates
SPREAD_COEF = 10.0
MIN_SPREAD = 0.05
#: Keeps the Gaussian's mean off the flat part of the squashing
MEAN_PENALTY = 1e-4


def alive_mask(terminated: th.Tensor, truncated: th.Tensor) -> th.Tensor:
    """
    ``m_0 = 1; m_{t+1} = m_t (1 - terminated_t)(1 - truncated_t)``: what an episode's end leaves of a sequence.

    :param terminated: 0 or 1, shape ``(length, batch)``
    :param truncated: 0 or 1, shape ``(length, batch)``
    :return: ``m``, 0 or 1, shape ``(length + 1, batch)``
    """
    going_on = th.cumprod((1 - terminated) * (1 - truncated), dim=0)
    return th.cat([th.ones_like(going_on[:1]), going_on])


class ModelTargets(NamedTuple):
    """
    Targets of the world model, computed from the frozen copies; rewards and values in scaled units.

    :param next_z: ``h_bar(o_{t+1})``, shape ``(horizon, batch, z_dim)``
    :param rewards: Two-hot of ``r_t / s``, shape ``(horizon, batch, n_bins)``
    :param terminated: 0 or 1, shape ``(horizon, batch)``
    :param alive: ``m_t``, shape ``(horizon + 1, batch)``
    :param values: Two-hot of ``v_t`` at ``value_step``, shape ``(batch, n_bins)``
    :param value_step: The step ``t`` whose value is fitted, from 0 to the horizon
    """

    next_z: th.Tensor
    rewards: th.Tensor
    terminated: th.Tensor
    alive: th.Tensor
    values: th.Tensor
    value_step: int


def world_model_loss(
    model: WorldModel, z: th.Tensor, actions: th.Tensor, targets: ModelTargets
) -> tuple[th.Tensor, dict[str, th.Tensor]]:
    """
    Unroll the model and compare with what happened.

    ``mean_{t<H} m_t [20 MSE(z_{t+1}) + 0.1 CE(r_t) + BCE(terminated_t)] + 0.1 m_t CE(v_t)``, the last at one step: over
    steps drawn from all of them it is the mean over ``t <= H``, at ``1 / (H + 1)`` of its cost
    (the form of TD-MPC2, arXiv 2310.16828, with terminations as in MR.Q, arXiv 2501.16142), and
    ten times :func:`spread_loss`.

    :param model: What learns
    :param z: ``h(o_0)`` with gradient, shape ``(batch, z_dim)``
    :param actions: Model inputs, shape ``(horizon, batch, input_dim)``
    :param targets: What the unrolled model is compared with
    :return: The loss; by name, without gradient, the loss and its unweighted parts. All of shape ``()``
    """
    latents, predicted, rewards, terminations = [z], [], [], []
    for a in actions:
        next_latent, reward_logits, termination_logit = model.outcome(model.features(latents[-1], a))
        latents.append(model.follow(z, next_latent))
        predicted.append(next_latent)
        rewards.append(reward_logits)
        terminations.append(termination_logit)
    m = targets.alive[:-1]
    error = th.stack(predicted) - targets.next_z[..., : model.latent_dim]  # (horizon, batch, latent_dim)
    consistency = (m * error.square().mean(-1)).mean()
    reward = (m * cross_entropy(th.stack(rewards), targets.rewards)).mean()
    bce = F.binary_cross_entropy_with_logits(th.stack(terminations), targets.terminated, reduction="none")
    termination = (m * bce * model.at(model.can_terminate, z)).mean()
    value_loss = cross_entropy(model.value_logits(latents[targets.value_step]), targets.values)
    value = (targets.alive[targets.value_step] * value_loss).mean()
    spread = spread_loss(z[..., : model.latent_dim], model.task_ids(z))
    loss = CONSISTENCY_COEF * consistency + REWARD_COEF * reward + TERMINATION_COEF * termination + VALUE_COEF * value
    loss = loss + SPREAD_COEF * spread
    parts = {"loss": loss, "consistency_loss": consistency, "reward_loss": reward, "termination_loss": termination}
    parts["spread_loss"] = spread
    return loss, {**{k: v.detach() for k, v in parts.items()}, "value_loss": value.detach()}


def spread_loss(latent: th.Tensor, tasks: th.Tensor | None) -> th.Tensor:
    """
    ``mean_i max(0, 0.05 - std_i)`` over the batch: as long as nothing is known of the rewards, a constant latent would be the
    most consistent one (the variance term of VICReg, arXiv 2105.04906).

    Several tasks would hide one whose latents stand still, by their own and by differing from it. To it comes then the mean of
    ``max(0, 0.05 - std)`` over tasks, with a deviation of all dimensions together: that of each one, from a task's few
    samples, would be too small too often.

    :param latent: Shape ``(batch, latent_dim)``
    :param tasks: Ids of the tasks, shape ``(batch,)``; ``None`` without tasks
    :return: Shape ``()``
    """
    # Not th.var, which is many times slower along the first dimension
    square = latent.square()
    variance = square.mean(0) - latent.mean(0).square()
    spread = F.relu(MIN_SPREAD - (variance + 1e-4).sqrt()).mean()
    if tasks is None:
        return spread
    members = F.one_hot(tasks).to(latent.dtype)  # (batch, n_tasks)
    counts = members.sum(0)
    several = counts > 1
    mean = members.T @ latent / counts.clamp_min(1).unsqueeze(-1)
    deviation = square.sum(-1) @ members - counts * mean.square().sum(-1)  # (n_tasks,), squared and summed
    variance = deviation.clamp_min(0) / (counts - 1).clamp_min(1) / latent.shape[-1]
    return spread + (members.mean(0) * several * F.relu(MIN_SPREAD - (variance + 1e-4).sqrt())).sum()


class NStep(NamedTuple):
    """
    A multi-step return without its bootstrap.

    :param rewards: ``sum_{k<j} gamma^k r_k``, in the unit of the rewards, shape ``(batch,)``
    :param steps: ``j``, the rewards really summed: the index of the observation to bootstrap from, shape ``(batch,)``
    :param discount: ``gamma^j``, and 0 after a termination, shape ``(batch,)``
    """

    rewards: th.Tensor
    steps: th.Tensor
    discount: th.Tensor


def n_step_return(rewards: th.Tensor, terminated: th.Tensor, truncated: th.Tensor, gamma: float | th.Tensor) -> NStep:
    """
    The n-step return (Sutton and Barto 2018, chapter 7) up to its bootstrap: ``sum_{k<j} gamma^k r_k`` and ``gamma^j``.

    Cut at the first termination (no bootstrap) or truncation (bootstrap from its real observation).

    :param rewards: In scaled units, shape ``(n, batch)``
    :param terminated: 0 or 1, shape ``(n, batch)``
    :param truncated: 0 or 1, shape ``(n, batch)``
    :param gamma: Discount factor, or one for each sequence, shape ``(batch,)``
    :return: The sum in scaled units, its number of rewards and the discount of the bootstrap, each of shape ``(batch,)``
    """
    alive = alive_mask(terminated, truncated)[:-1]
    powers = gamma ** th.arange(len(rewards), device=rewards.device, dtype=rewards.dtype).unsqueeze(-1)
    steps = alive.sum(0).long()
    ended = (alive * terminated).amax(0)
    return NStep((powers * alive * rewards).sum(0), steps, gamma**steps * (1 - ended))


def critic_loss(logits: th.Tensor, target: th.Tensor) -> th.Tensor:
    """
    :param logits: Shape ``(n_critics, batch, n_bins)``
    :param target: Two-hot targets, shape ``(batch, n_bins)``
    :return: Cross-entropy in nats, summed over the critics and averaged over the batch, shape ``()``
    """
    return cross_entropy(logits, target).mean(-1).sum()


def discrepancy_bonus(gap: th.Tensor, median: th.Tensor, td_error: th.Tensor, coef: float) -> th.Tensor:
    """
    ``beta clip(gap - median, -|td|, |td|)``: POME's bonus (Pan et al. 2018, arXiv 1811.07350), all in scaled units.

    :param gap: ``|Q_mf - Q_mb|``, shape ``(batch,)``
    :param median: Its running median, shape ``(1,)`` or, with tasks, ``(batch,)``
    :param td_error: ``y - Q``, shape ``(batch,)``
    :param coef: ``beta``
    :return: To be added to ``y``, shape ``(batch,)``; for ``beta <= 1`` it never flips the sign of ``y - Q``
    """
    bound = td_error.abs()
    return coef * th.minimum(th.maximum(gap - median, -bound), bound)


class PolicyTerms(NamedTuple):
    """
    Per-state terms of the policy's loss, each of shape ``(batch,)``.

    :param gain: ``q / S`` plus the weighted entropy: what is maximised, without unit
    :param entropy: In nats; for Box actions the estimate ``-log pi`` of one sample
    :param kl: Distance to the policy of the last sync, in nats
    :param penalty: On the mean of a Gaussian; 0 for discrete kinds
    """

    gain: th.Tensor
    entropy: th.Tensor
    kl: th.Tensor
    penalty: th.Tensor


def policy_terms(
    model: WorldModel,
    z: th.Tensor,
    anchor: th.Tensor,
    noise: th.Tensor,
    q_range: th.Tensor,
    ent_coef: th.Tensor,
    gamma: th.Tensor | None,
) -> PolicyTerms:
    """
    ``gain = q / S - alpha log pi``, pathwise or as an exact expectation, and the distance to the last sync.

    The entropy is SAC's (arXiv 1812.05905), the range that divides q is TD-MPC2's (arXiv 2310.16828). ``q`` is the mean of the
    critics and, in the second half of the states, :func:`lookahead_value`: the gradient is on average that of the mean of
    both, at half its cost.

    :param model: Policy, critics and world model; no gradient reaches the critics' parameters
    :param z: ``h(o)``, shape ``(batch, z_dim)``
    :param anchor: Parameters of ``pi_bar(. | h_bar(o))``, shape ``(batch, params_dim)``
    :param noise: From ``codec.noise``, shape ``(batch, noise_dim)``; not read for enumerable actions
    :param q_range: ``S`` in scaled units, shape ``(1,)`` or, with tasks, ``(batch,)``
    :param ent_coef: ``alpha``, likewise
    :param gamma: Discount factor, likewise; ``None`` for the critics alone
    :return: The terms, each of shape ``(batch,)``
    """
    codec: ActionCodec = model.codec
    params = model.prior(z)
    kl = codec.kl(anchor, params)
    if codec.enumerable:
        assert not isinstance(codec, GaussianActions)
        entropy = codec.entropy(params)
        value = (codec.joint_log_prob(params).exp() * enumerated_values(model, z, gamma)).sum(-1)
        return PolicyTerms(value / q_range + ent_coef * entropy, entropy, kl, th.zeros_like(kl))
    a, log_prob = codec.sample(params, noise)
    f = model.features(z, a)
    n = len(z) if gamma is None else len(z) // 2
    q = decode(model.critic_logits(f[:n], frozen=True), model.bins).mean(0)
    if gamma is not None:
        # The states are drawn in no order, and the other ones' noise is as good as new
        q = th.cat([q, lookahead_value(model, z[n:], f[n:], noise.roll(n, 0)[n:], gamma.expand(len(z))[n:])])
    if isinstance(codec, GaussianActions):
        entropy, penalty = -log_prob, MEAN_PENALTY * codec.gaussian(params)[0].square().sum(-1)
    else:
        entropy, penalty = codec.entropy(params), th.zeros_like(kl)
    return PolicyTerms(q / q_range + ent_coef * entropy, entropy, kl, penalty)


@th.no_grad()
def enumerated_values(model: WorldModel, z: th.Tensor, gamma: th.Tensor | None) -> th.Tensor:
    """
    ``q`` of :func:`policy_terms` for all actions, by the critics or, in the last states, a step ahead: half of the states, or
    fewer where that were more than four steps of the model for each state of the batch.

    :param model: World model, policy and critics, of enumerable actions
    :param z: Latents, shape ``(batch, z_dim)``
    :param gamma: Discount factor, shape ``(1,)`` or, with tasks, ``(batch,)``; ``None`` for the critics alone
    :return: In scaled units, shape ``(batch, n_joint)``
    """
    codec: ActionCodec = model.codec
    assert not isinstance(codec, GaussianActions)
    inputs = codec.joint_inputs
    ahead = 0 if gamma is None else min(len(z) // 2, 4 * len(z) // len(inputs))
    n = len(z) - ahead
    q = decode(model.critic_logits(z[:n]), model.bins).mean(0)  # (n, n_joint)
    if gamma is None or not ahead:
        return q
    every_z, every_gamma = (x.repeat_interleave(len(inputs), 0) for x in (z[n:], gamma.expand(len(z))[n:]))
    f = model.features(every_z, inputs.repeat(ahead, 1))
    return th.cat([q, lookahead_value(model, every_z, f, None, every_gamma).view(ahead, len(inputs))])


def lookahead_value(model: WorldModel, z: th.Tensor, f: th.Tensor, noise: th.Tensor | None, gamma: th.Tensor) -> th.Tensor:
    """
    ``r + gamma (1 - d) E_a' mean_k Q_k(z', a')``, all of it predicted: the value gradient of a model's step (SVG(1),
    arXiv 1510.09142).

    Critics tell states apart better than actions, whose share in a return is small beside the noise of its target; the model
    learns from every transition what an action does.

    :param model: World model, policy and critics; no gradient reaches the critics' parameters
    :param z: Latents, shape ``(batch, z_dim)``
    :param f: Features of a step from there, shape ``(batch, trunk_dim)``
    :param noise: Of the next action, which is sampled, shape ``(batch, noise_dim)``; not read for enumerable actions
    :param gamma: Discount factor, shape ``(1,)`` or, with tasks, ``(batch,)``
    :return: In scaled units, shape ``(batch,)``
    """
    next_z, reward, termination = model.step_from(z, f)
    codec: ActionCodec = model.codec
    params = model.prior(next_z)
    if codec.enumerable:
        assert not isinstance(codec, GaussianActions)
        next_q = decode(model.critic_logits(next_z, frozen=True), model.bins).mean(0)
        next_q = (codec.joint_log_prob(params).exp() * next_q).sum(-1)
    else:
        assert noise is not None
        next_a, _ = codec.sample(params, noise)
        next_q = decode(model.critic_logits(model.features(next_z, next_a), frozen=True), model.bins).mean(0)
    return reward + gamma * (1 - termination) * next_q


def trust_region_loss(terms: PolicyTerms, target_kl: float | None, kl_coef: th.Tensor) -> th.Tensor:
    """
    ``mean( where(kl < eps, -gain, lambda kl) )`` (REPPO, arXiv 2507.11019), and the mean penalty.

    :param terms: Of :func:`policy_terms`, each of shape ``(batch,)``
    :param target_kl: ``eps`` in nats per state; ``None`` for no trust region
    :param kl_coef: ``lambda``, shape ``(1,)``
    :return: The loss, shape ``()``
    """
    loss = -terms.gain
    if target_kl is not None:
        loss = th.where(terms.kl < target_kl, loss, kl_coef * terms.kl)
    return (loss + terms.penalty).mean()


def excess_entropy(entropy: th.Tensor, target: float | th.Tensor, tasks: th.Tensor | None, n_tasks: int) -> th.Tensor:
    """
    The gradient of the temperature's loss ``log(alpha) (H - H*)`` (SAC, arXiv 1812.05905), for each task by itself: a task
    that has become certain must not be kept from it, nor a task that is lost be hurried, by what its neighbours do.

    :param entropy: Of each state, in nats, shape ``(batch,)``
    :param target: ``H*``, or that of each task, shape ``(n_tasks,)``
    :param tasks: Ids of the tasks, shape ``(batch,)``; ``None`` without tasks
    :param n_tasks: How many there are
    :return: Mean excess over ``H*`` of each task, 0 where the batch has none of its states, shape ``(n_tasks,)``
    """
    if tasks is None:
        return (entropy.mean() - target).view(1)
    excess = entropy - (target[tasks] if isinstance(target, th.Tensor) else target)
    sums, counts = entropy.new_zeros(n_tasks), entropy.new_zeros(n_tasks)
    sums.index_add_(0, tasks, excess)
    counts.index_add_(0, tasks, th.ones_like(excess))
    return sums / counts.clamp_min(1)
