"""M3PO without one of its parts, to measure what that is worth."""

from dataclasses import replace
from typing import Any

import numpy as np
import torch as th

from sb3_m3po import M3PO
from sb3_m3po.batches import Frozen, Sequences
from sb3_m3po.learner import Learner, Means
from sb3_m3po.losses import critic_loss
from sb3_m3po.math import two_hot


class CriticsAloneLearner(Learner):
    """Its policy's gain is the critics' value alone."""

    def _lookahead_gamma(self, z: th.Tensor) -> None:
        """No step of the model is looked ahead."""


class ModelFreeLearner(CriticsAloneLearner):
    """Its phase A fits encoder and features to the critics' targets; the critics themselves learn in phase B, as ever."""

    def _valued(self, batch: Sequences, value_steps: np.ndarray) -> np.ndarray:
        return self._bootstraps(batch, slice(None))

    def fit_world_model(self, batch: Sequences, value_steps: np.ndarray, frozen: Frozen) -> dict[str, float]:
        """
        :param batch: ``n_updates * batch_size`` sequences of ``horizon`` steps, of which all rewards are summed
        :param value_steps: Not read
        :param frozen: What the frozen copies say of them
        :return: Mean loss and norm of the gradient, by ``world_model/name``
        """
        policy, model, means, n_step = self.policy, self.policy.world_model, Means(), self._n_step(batch)
        learned = [p for group in policy.model_optimizer.param_groups for p in group["params"]]
        bootstrap = frozen.value[frozen.rows(self._valued(batch, value_steps))]
        targets = two_hot(n_step.rewards + n_step.discount * bootstrap, model.bins)
        for columns in self._updates(len(targets)):
            z, a = policy.encode(self._observations(batch.states[0, columns])), batch.actions[0, columns]
            if model.codec.enumerable:
                chosen = (a @ model.codec.joint_inputs.T).argmax(-1)  # type: ignore[operator, union-attr]
                logits = model.critic_logits(z, frozen=True)[:, th.arange(len(z), device=z.device), chosen]
            else:
                logits = model.critic_logits(model.features(z, a), frozen=True)
            loss = critic_loss(logits, targets[columns])
            means.add(loss=loss, grad_norm=self._descend(loss, policy.model_optimizer, learned))
        return means.read("world_model")


class CriticsAlone(M3PO):
    """:class:`~sb3_m3po.M3PO` whose policy climbs the critics' value in all states."""

    def _learner(self) -> Learner:
        return CriticsAloneLearner.of(self)


class UndelayedLearner(Learner):
    """Its policy is updated with every update of the critics."""

    @classmethod
    def of(cls, model: Any) -> Learner:
        """:return: What the next sync period learns with"""
        return replace(super().of(model), policy_delay=1)


class Undelayed(M3PO):
    """:class:`~sb3_m3po.M3PO` whose policy is updated with every update of the critics."""

    def _learner(self) -> Learner:
        return UndelayedLearner.of(self)


class LastNetworksLearner(Learner):
    """Its predictions act by the networks as they are."""

    def average(self) -> None:
        """No state but the last counts."""
        self.policy.average(restart=True)


class LastNetworks(M3PO):
    """:class:`~sb3_m3po.M3PO` whose predictions act by the networks as they are, not by their running mean."""

    def _learner(self) -> Learner:
        return LastNetworksLearner.of(self)


class ConstantEntropy(M3PO):
    """:class:`~sb3_m3po.M3PO` whose target entropy stays as it is at the start."""

    def _setup_model(self) -> None:
        super()._setup_model()
        self.policy.world_model.codec.entropy_fall = 0.0  # type: ignore[misc]


class LateEntropyLearner(Learner):
    """Its target entropy falls on in the last fifth of the training, to -2 for each dimension of the action."""

    @classmethod
    def of(cls, model: Any) -> Learner:
        """:return: What the next sync period learns with; the target is all that its progress is read for"""
        learner = super().of(model)
        return replace(learner, progress=learner.progress + 2 * max(0.0, 5 * learner.progress - 4))


class LateEntropy(M3PO):
    """:class:`~sb3_m3po.M3PO` whose target entropy falls further in the last fifth of the training."""

    def _learner(self) -> Learner:
        return LateEntropyLearner.of(self)


class ModelFree(M3PO):
    """
    :class:`~sb3_m3po.M3PO` without its world model: the encoder learns from the critics' errors alone. It can't plan, and has
    no discrepancy bonus.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "plan_rollouts": False})

    def _learner(self) -> Learner:
        return ModelFreeLearner.of(self)
