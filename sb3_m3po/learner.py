"""What happens between two syncs: phase A fits the world model, phase B improves critics and policy."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch as th
from stable_baselines3.common.utils import obs_as_tensor
from stable_baselines3.common.vec_env import VecNormalize

from sb3_m3po.actions import GaussianActions
from sb3_m3po.batches import Frozen, Prepared, Sequences, by_task, pieces
from sb3_m3po.losses import (
    ModelTargets,
    NStep,
    PolicyTerms,
    alive_mask,
    critic_loss,
    discrepancy_bonus,
    excess_entropy,
    n_step_return,
    policy_terms,
    trust_region_loss,
    world_model_loss,
)
from sb3_m3po.math import decode, two_hot
from sb3_m3po.memory import ReplayMemory
from sb3_m3po.nets import without_gradient
from sb3_m3po.policies import WorldModelPolicy
from sb3_m3po.world_model import WorldModel

_ENT_COEF_RANGE = (1e-4, 10.0)
_KL_COEF_RANGE = (1e-2, 1e3)
#: Floor of the critics' range that the policy's gain is divided by, in scaled units (returns reach about 10)
_MIN_Q_RANGE = 0.5
#: Share of the new range in the running one; over 128 updates TD-MPC2's rate of 0.01 comes to the same
_Q_RANGE_RATE = 0.7
#: The same for the median of the gap
_MEDIAN_RATE = 0.3
#: Updates of the critics for each one of the policy, which can be no better than they are (TD3, arXiv 1802.09477), and after
#: how many of them, for each task: at the start both change fast
POLICY_DELAY, DELAYED_AFTER = 2, 5_000
#: Updates of phase B between two refreshes of the critics' targets
_TARGET_INTERVAL = 32


@dataclass
class Learner:
    """
    One sync period of learning. Its settings are those of :class:`~sb3_m3po.M3PO`, by the same names.

    :param policy: What learns; its bars are up to date
    :param memory: What it learns from
    :param vec_normalize: Normalises observations out of the memory, if given
    :param rng: Draws from the memory
    :param generator: Draws actions
    :param batch_size: Samples per update
    :param horizon: Steps that the world model is unrolled
    :param n_step_returns: Rewards summed in the critics' target before they bootstrap
    :param gamma: Discount factor of a single task, as a number; several tasks have ``policy.gammas``
    :param max_grad_norm: Bound of the gradient's norm
    :param target_kl: Trust region, in nats per state; ``None`` for none
    :param learn_ent_coef: Whether the temperature is learned
    :param bonus_coef: Today's weight of the discrepancy bonus
    :param progress: Share of the training that lies behind, from 0 to 1
    :param policy_delay: Updates of the critics for each one of the policy
    """

    policy: WorldModelPolicy
    memory: ReplayMemory
    vec_normalize: VecNormalize | None
    rng: np.random.Generator
    generator: th.Generator
    batch_size: int
    horizon: int
    n_step_returns: int
    gamma: float
    max_grad_norm: float
    target_kl: float | None
    learn_ent_coef: bool
    bonus_coef: float
    progress: float
    policy_delay: int

    @classmethod
    def of(cls, model: Any) -> "Learner":
        """
        :param model: An M3PO model
        :return: What its next sync period learns with
        """
        return cls(
            policy=model.policy,
            memory=model.replay_buffer,
            vec_normalize=model._vec_normalize_env,
            rng=model._rng,
            generator=model._generator,
            batch_size=model.batch_size,
            horizon=model.horizon,
            n_step_returns=model.n_step_returns,
            gamma=model.policy.gammas[0].item(),
            max_grad_norm=model.max_grad_norm,
            target_kl=model.target_kl,
            learn_ent_coef=isinstance(model.ent_coef, str),
            bonus_coef=model.bonus_coef * model._current_progress_remaining,
            progress=1 - model._current_progress_remaining,
            policy_delay=POLICY_DELAY if model._n_updates > DELAYED_AFTER * len(model.policy.gammas) else 1,
        )

    def run(self, n_updates: int) -> dict[str, float]:
        """
        :param n_updates: Updates of each phase
        :return: Mean of every logged quantity, by its logged name; the coefficients as they are at the end
        :raises ValueError: if the memory is empty
        """
        model_batch, value_steps, policy_batch, frozen = self.draw(n_updates)
        metrics = {**self.fit_world_model(model_batch, value_steps, frozen), **self.improve_policy(policy_batch, frozen)}
        self.average()
        return metrics

    def average(self) -> None:
        """Take the networks as they are into the mean that predicts."""
        self.policy.average()

    def draw(self, n_updates: int) -> tuple[Sequences, np.ndarray, Sequences, Frozen]:
        """
        Draw what both phases learn from.

        Until the next sync the frozen copies are functions of the observation alone, so they are evaluated once per
        distinct observation and not once per visit: most of an update's arithmetic would be theirs.

        :param n_updates: Updates of each phase
        :return: Sequences of phase A; the step of them whose model-based value each update fits, shape ``(n_updates,)``;
            sequences of phase B; what the frozen copies say of the observations that need it
        :raises ValueError: if the memory is empty
        """
        n = n_updates * self.batch_size
        model_batch = Sequences(self.memory.sample(n, self.horizon, self.rng), self.policy)
        value_steps = self.rng.integers(self.horizon + 1, size=n_updates)
        policy_batch = Sequences(self.memory.sample(n, self.n_step_returns, self.rng), self.policy)
        valued = [self._valued(model_batch, value_steps), self._bootstraps(policy_batch, slice(self._target_samples))]
        if self.bonus_coef > 0:
            valued.append(policy_batch.states[1])
        frozen = self._evaluate_frozen(model_batch.states[1:], policy_batch.states[0], np.unique(np.concatenate(valued)))
        return model_batch, value_steps, policy_batch, frozen

    def _valued(self, batch: Sequences, value_steps: np.ndarray) -> np.ndarray:
        """:return: The states whose model-based value is fitted, one per sequence"""
        steps = value_steps.repeat(self.batch_size)
        return batch.states[steps, np.arange(len(steps))]

    @property
    def _target_samples(self) -> int:
        """
        Samples between two refreshes of the critics' targets. Where the return scale has more than doubled, the critics speak
        in its unit only at the end of the period: all targets come from the frozen copies then, whose unit is known.
        """
        return sys.maxsize if (self.policy.bar_ratio < 0.5).any() else _TARGET_INTERVAL * self.batch_size

    def _n_step(self, batch: Sequences) -> NStep:
        return n_step_return(batch.rewards, batch.terminated, batch.truncated, self._gamma(batch))

    def _gamma(self, batch: Sequences) -> float | th.Tensor:
        """:return: The discount factor, or each sequence's, shape ``(batch,)``"""
        return self.gamma if batch.tasks is None else batch.of_task(self.policy.gammas)

    def _bootstraps(self, batch: Sequences, columns: slice) -> np.ndarray:
        """:return: The states that end the multi-step returns of some of the samples"""
        steps = self._n_step(batch).steps[columns].cpu().numpy()
        return batch.states[:, columns][steps, np.arange(len(steps))]

    def _observations(self, states: np.ndarray) -> Any:
        """:return: Observations in memory, as the policy takes them"""
        return obs_as_tensor(self.memory.observations_at(states, self.vec_normalize), self.policy.device)

    @th.no_grad()
    def _evaluate_frozen(self, reached: np.ndarray, acted: np.ndarray, valued: np.ndarray) -> Frozen:
        """
        ``v(o) = (s_old / s) E_{a ~ pi_bar} Q_bar(h_bar(o), a)``, with the critics' mean less their disagreement.

        :param reached: States of which the latent is asked
        :param acted: States of which the policy is asked too
        :param valued: States of which policy and value are asked too
        """
        policy, bar = self.policy, self.policy.bar
        acted = np.union1d(acted, valued)
        states = np.union1d(reached, acted)
        z = th.cat([policy.encode_bar(self._observations(states[piece])) for piece in pieces(len(states))])
        frozen = Frozen(states, z, z.new_full((len(z),), th.nan), z.new_full((len(z), bar.codec.params_dim), th.nan))
        rows = frozen.rows(acted)
        for piece in pieces(len(rows)):
            frozen.anchor[rows[piece]] = bar.prior(z[rows[piece]])
        rows = frozen.rows(valued)
        for piece in pieces(len(rows)):
            part, anchor = z[rows[piece]], frozen.anchor[rows[piece]]
            frozen.value[rows[piece]] = bar.at(policy.bar_ratio, part) * self._value(bar, part, anchor)
        return frozen

    def _value(self, model: WorldModel, z: th.Tensor, params: th.Tensor) -> th.Tensor:
        """:return: ``E_{a ~ params} Q(z, a)``, by one sample or exactly"""
        codec = model.codec
        return model.expected_value(z, params, None if codec.enumerable else codec.sample(params, self._noise(len(z)))[0])

    def _noise(self, n: int) -> th.Tensor:
        return self.policy.world_model.codec.noise((n,), self.generator).to(self.policy.device)

    def _updates(self, n: int) -> Iterator[slice]:
        """:return: What each update learns from, out of ``n`` samples"""
        return (slice(i, i + self.batch_size) for i in range(0, n, self.batch_size))

    def _descend(self, loss: th.Tensor, optimizer: th.optim.Optimizer, learned: list[th.nn.Parameter]) -> th.Tensor:
        """
        Take one step; with few and large operations, since calling many small ones takes longer than their arithmetic.

        :return: The gradient's norm before it was clipped, shape ``()``
        """
        for parameter in learned:
            parameter.grad = None
        loss.backward()
        gradients = [parameter.grad for parameter in learned if parameter.grad is not None]
        norm = th.stack(th._foreach_norm(gradients)).norm()
        if not norm <= self.max_grad_norm:
            th._foreach_mul_(gradients, self.max_grad_norm / (norm + 1e-6))
        optimizer.step()
        return norm

    # ---------------------------------------------------------------- phase A

    def fit_world_model(self, batch: Sequences, value_steps: np.ndarray, frozen: Frozen) -> dict[str, float]:
        """
        Phase A: train encoder, dynamics, outcome heads and the model-based value.

        :param batch: ``n_updates * batch_size`` sequences of ``horizon`` steps
        :param value_steps: The step whose value each update fits, from 0 to the horizon, shape ``(n_updates,)``
        :param frozen: What the frozen copies say of them, from :meth:`draw`
        :return: Means of what is logged, by ``world_model/name``
        """
        policy, bins, means = self.policy, self.policy.world_model.bins, Means()
        learned = [p for group in policy.model_optimizer.param_groups for p in group["params"]]
        policy.set_training_mode(True)
        alive, rows = alive_mask(batch.terminated, batch.truncated), frozen.rows(batch.states[1:])
        valued = frozen.rows(self._valued(batch, value_steps))
        rewards, values = two_hot(batch.rewards, bins), two_hot(frozen.value[valued], bins)
        if policy.n_frozen_tasks:
            known_embeddings = policy.world_model.task_embedding.data[: policy.n_frozen_tasks].clone()
        for columns, value_step in zip(self._updates(alive.shape[1]), value_steps.tolist(), strict=True):
            targets = ModelTargets(
                frozen.z[rows[:, columns]],
                rewards[:, columns],
                batch.terminated[:, columns],
                alive[:, columns],
                values[columns],
                value_step,
            )
            z = policy.encode(self._observations(batch.states[0, columns]))
            loss, parts = world_model_loss(policy.world_model, z, batch.actions[:, columns], targets)
            norm = self._descend(loss, policy.model_optimizer, learned)
            if policy.n_frozen_tasks:
                policy.world_model.task_embedding.data[: policy.n_frozen_tasks] = known_embeddings
            means.add(grad_norm=norm, **parts)
        return means.read("world_model")

    # ---------------------------------------------------------------- phase B

    def improve_policy(self, batch: Sequences, frozen: Frozen) -> dict[str, float]:
        """
        Phase B: one critic update per credit, some of them with one of the policy, on the encoder as it now is.

        :param batch: ``n_updates * batch_size`` sequences of ``n_step_returns`` steps
        :param frozen: What the frozen copies say of them, from :meth:`draw`
        :return: Means of what is logged, by ``train/name`` and ``exploration/name``; the coefficients as they are at the end
        """
        policy, means, policy_means, bonus_means = self.policy, Means(), Means(), Means()
        learned = policy.optimizer.param_groups[0]["params"]
        # The latent does not move: no dropout in it, and batch norm by its running statistics
        policy.set_training_mode(False)
        target_samples = self._target_samples
        with without_gradient(policy.world_model.trunk, policy.world_model.heads):
            prepared = self._prepare(batch, frozen)
            for rows in self._updates(len(prepared.z)):
                if rows.start and rows.start % target_samples == 0:
                    self._refresh_targets(prepared, batch, rows.start)
                part = prepared.rows(rows)
                loss, bonus = self._critic_loss(part)
                means.add(value_loss=loss)
                bonus_means.add(**bonus)
                if (len(prepared.z) - rows.stop) // self.batch_size % self.policy_delay:
                    # Not the policy's turn; the last update of a period always is
                    self._descend(loss, policy.optimizer, learned)
                    continue
                policy_loss, terms = self._policy_loss(part)
                loss = loss + policy_loss
                self._descend(loss, policy.optimizer, learned)
                self._step_coefs(terms, policy.world_model.task_ids(part.z))
                policy_means.add(loss=loss, policy_gradient_loss=policy_loss, **self._describe(terms))
        coefs = {"train/ent_coef": policy.log_ent_coef.exp().mean().item(), "train/kl_coef": policy.log_kl_coef.exp().item()}
        return {**means.read("train"), **policy_means.read("train"), **coefs, **bonus_means.read("exploration")}

    @th.no_grad()
    def _prepare(self, batch: Sequences, frozen: Frozen) -> Prepared:
        """
        All of phase B that its updates don't change: latents, features, the anchor policy, the gap; and the TD targets
        up to their first refresh.
        """
        model, anchor, n_step = self.policy.world_model, frozen.anchor[frozen.rows(batch.states[0])], self._n_step(batch)
        first = slice(self._target_samples)
        bootstrap = frozen.value[frozen.rows(self._bootstraps(batch, first))]
        target = th.full_like(n_step.rewards, th.nan)
        target[first] = n_step.rewards[first] + n_step.discount[first] * bootstrap
        self._update_q_range(target[first], None if batch.tasks is None else batch.tasks[first])
        z, f, gap = self._encode_transitions(batch, frozen)
        if self.bonus_coef > 0:
            for task, mine in by_task(batch.tasks):
                self.policy.gap_median[task] += _MEDIAN_RATE * (gap[mine].median() - self.policy.gap_median[task])
        if isinstance(model.codec, GaussianActions) or not model.codec.enumerable:
            noise, chosen = self._noise(len(z)), z
        else:
            noise, chosen = z, (batch.actions[0] @ model.codec.joint_inputs.T).argmax(-1)
        return Prepared(z, f, target, anchor, gap, noise, chosen)

    def _encode_transitions(self, batch: Sequences, frozen: Frozen) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        Encode each distinct transition once, however often it was drawn.

        :return: Latents, features and gaps as in :class:`~sb3_m3po.batches.Prepared`, one row per sample
        """
        model, gamma = self.policy.world_model, self._gamma(batch)
        states, distinct, drawn = np.unique(batch.states[0], return_index=True, return_inverse=True)
        q_mf, actions = batch.rewards[0, distinct], batch.actions[0, distinct]
        gamma = gamma[distinct] if isinstance(gamma, th.Tensor) else gamma
        if self.bonus_coef > 0:
            next_value = frozen.value[frozen.rows(batch.states[1, distinct])]
            q_mf = q_mf + gamma * (1 - batch.terminated[0, distinct]) * next_value
        needs_features = self.bonus_coef > 0 or not model.codec.enumerable
        parts = []
        for piece in pieces(len(states)):
            z = self.policy.encode(self._observations(states[piece]))
            f = model.features(z, actions[piece]) if needs_features else z
            discount = gamma[piece] if isinstance(gamma, th.Tensor) else gamma
            gap = self._gap(q_mf[piece], z, f, discount) if self.bonus_coef > 0 else q_mf[piece]
            parts.append((z, f, gap))
        rows = th.as_tensor(drawn, device=self.policy.device)
        z, f, gap = (th.cat(column)[rows] for column in zip(*parts, strict=True))
        return z, f, gap

    @th.no_grad()
    def _refresh_targets(self, prepared: Prepared, batch: Sequences, start: int) -> None:
        """
        Bootstrap the next updates from the critics as they now are.

        With the frozen copies alone a value travels ``n_step_returns`` steps per sync: over a horizon of 100 steps that
        takes thousands of updates, and until then the policy is blind to what comes late. The latent does not move in
        phase B, so the critics may serve as their own target more often than the encoder does.
        """
        rows = slice(start, start + self._target_samples)
        states, drawn = np.unique(self._bootstraps(batch, rows), return_inverse=True)
        model, n_step, values = self.policy.world_model, self._n_step(batch), []
        for piece in pieces(len(states)):
            z = self.policy.encode(self._observations(states[piece]))
            values.append(self._value(model, z, model.prior(z)))
        bootstrap = th.cat(values)[th.as_tensor(drawn, device=z.device)]
        prepared.target[rows] = n_step.rewards[rows] + n_step.discount[rows] * bootstrap

    def _gap(self, q_mf: th.Tensor, z: th.Tensor, f: th.Tensor, gamma: float | th.Tensor) -> th.Tensor:
        """:return: ``|Q_mf - Q_mb|``"""
        model = self.policy.world_model
        next_z, reward, termination = model.step_from(z, f)
        return (q_mf - reward - gamma * (1 - termination) * model.value(next_z)).abs()

    def _update_q_range(self, values: th.Tensor, tasks: th.Tensor | None) -> None:
        """Running 5-95 percentile range of the targets."""
        for task, mine in by_task(tasks):
            low, high = th.quantile(values[mine], th.tensor([0.05, 0.95], device=values.device))
            self.policy.q_range[task] += _Q_RANGE_RATE * (high - low - self.policy.q_range[task])

    def _critic_loss(self, part: Prepared) -> tuple[th.Tensor, dict[str, th.Tensor]]:
        model = self.policy.world_model
        if model.codec.enumerable:
            logits = model.critic_logits(part.z)[:, th.arange(len(part.z), device=part.z.device), part.chosen]
        else:
            logits = model.critic_logits(part.f)
        if self.bonus_coef == 0:
            return critic_loss(logits, two_hot(part.target, model.bins)), {}
        td_error = part.target - decode(logits.detach(), model.bins).mean(0)
        median = model.at(self.policy.gap_median, part.z)
        bonus = discrepancy_bonus(part.gap, median, td_error, self.bonus_coef)
        loss = critic_loss(logits, two_hot(part.target + bonus, model.bins))
        coef = bonus.new_tensor(self.bonus_coef)
        return loss, {"gap": part.gap.mean(), "bonus_abs": bonus.abs().mean(), "bonus_coef": coef}

    def _policy_loss(self, part: Prepared) -> tuple[th.Tensor, PolicyTerms]:
        policy, model = self.policy, self.policy.world_model
        q_range = model.at(policy.q_range.clamp_min(_MIN_Q_RANGE), part.z)
        ent_coef, kl_coef = model.at(policy.log_ent_coef.detach().exp(), part.z), policy.log_kl_coef.detach().exp()
        terms = policy_terms(model, part.z, part.anchor, part.noise, q_range, ent_coef, self._lookahead_gamma(part.z))
        return trust_region_loss(terms, self.target_kl, kl_coef), terms

    def _lookahead_gamma(self, z: th.Tensor) -> th.Tensor | None:
        """:return: The discount factor of the step that the policy's gain looks ahead, as :func:`policy_terms` takes it"""
        return self.policy.world_model.at(self.policy.gammas, z)

    def _step_coefs(self, terms: PolicyTerms, tasks: th.Tensor | None) -> None:
        """
        The multiplier ascends on ``kl - eps``, the temperature descends on the entropy's excess.

        Not before anything has told one policy from another: a policy that becomes certain of nothing stops exploring.
        """
        policy = self.policy
        with th.no_grad():
            if self.learn_ent_coef:
                codec = policy.world_model.codec
                target = codec.target_entropy * (1 + codec.entropy_fall * self.progress)
                policy.log_ent_coef.grad = excess_entropy(terms.entropy, target, tasks, len(policy.log_ent_coef))
                waiting = policy.log_ent_coef.clone()
            if self.target_kl is not None:
                policy.log_kl_coef.grad = policy.log_kl_coef.exp() * (self.target_kl - terms.kl.mean())
            for _ in range(self.policy_delay):
                policy.coef_optimizer.step()
            policy.log_kl_coef.clamp_(*np.log(_KL_COEF_RANGE))
            if self.learn_ent_coef:
                policy.log_ent_coef.clamp_(*np.log(_ENT_COEF_RANGE))
                # Adam has counted the steps of those that wait: with no gradient in its moments they would then leap
                informative = th.as_tensor(self.memory.is_informative, device=waiting.device)
                policy.log_ent_coef.copy_(th.where(informative, policy.log_ent_coef, waiting))

    def _describe(self, terms: PolicyTerms) -> dict[str, th.Tensor]:
        bound = np.inf if self.target_kl is None else self.target_kl
        return {
            "entropy_loss": -terms.entropy.mean(),
            "approx_kl": terms.kl.mean(),
            "clip_fraction": (terms.kl >= bound).float().mean(),
        }


class Means:
    """Running means of logged tensors, read once at the end."""

    def __init__(self) -> None:
        self._sums: dict[str, th.Tensor] = {}
        self._count = 0

    def add(self, **values: th.Tensor) -> None:
        """
        Add one update's values.

        :param values: Tensors of one element, by name
        """
        self._count += 1
        for name, value in values.items():
            value = value.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def read(self, prefix: str) -> dict[str, float]:
        """
        :param prefix: Of the logged names
        :return: Means by ``prefix/name``
        """
        return {f"{prefix}/{name}": (value / self._count).item() for name, value in self._sums.items()}
