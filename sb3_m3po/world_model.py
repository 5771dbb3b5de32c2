"""
The implicit world model and what lives on its latent: nothing here reconstructs an observation.

The verbs are ``encode``, ``features``, ``step``, ``value``, ``critic_logits``, ``prior`` and ``terminal_value``; planner
and losses know only those.
"""

import math
from dataclasses import dataclass, field

import torch as th
from torch import nn

from sb3_m3po.actions import ActionCodec, GaussianActions
from sb3_m3po.math import decode, value_bins
from sb3_m3po.nets import MLP, Ensemble, SimNorm, orthogonal


@dataclass
class Sizes:
    """
    What ``policy_kwargs`` says of the networks; the hidden layers of policy and critics are its ``net_arch``.

    :param latent_dim: Width of the latent, a multiple of 8
    :param encoder_arch: Hidden layers between features extractor and latent
    :param model_arch: Hidden layers of the dynamics; the last is the width of the model's value network too
    :param pi_arch: Hidden layers of the policy
    :param critic_arch: Hidden layers of each critic
    :param n_critics: Members of the critic ensemble
    :param pessimism: Standard deviations over the critics that a value lies below their mean
    :param task_embedding_dim: Width of a task's embedding; without tasks there is none
    """

    latent_dim: int = 128
    encoder_arch: list[int] = field(default_factory=lambda: [256])
    model_arch: list[int] = field(default_factory=lambda: [256, 256])
    pi_arch: list[int] = field(default_factory=lambda: [256, 256])
    critic_arch: list[int] = field(default_factory=lambda: [256, 256])
    n_critics: int = 2
    pessimism: float = 1.0
    task_embedding_dim: int = 32

    def check(self) -> None:
        """:raises ValueError: if ``latent_dim`` is no multiple of 8, ``pessimism`` negative, or a number or width zero"""
        if self.latent_dim < 8 or self.latent_dim % 8:
            raise ValueError(f"latent_dim={self.latent_dim} must be a positive multiple of 8 (the latent's groups)")
        if self.n_critics < 1:
            raise ValueError(f"n_critics={self.n_critics} must be at least 1")
        if not 0 <= self.pessimism < math.inf:
            raise ValueError(f"pessimism={self.pessimism} must be a finite number of at least 0 (0: the mean of the critics)")
        for name in ("encoder_arch", "model_arch", "pi_arch", "critic_arch"):
            if min(getattr(self, name), default=1) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must hold widths of at least 1")
        if self.task_embedding_dim < 1:
            raise ValueError(f"task_embedding_dim={self.task_embedding_dim} must be at least 1")


class WorldModel(nn.Module):
    """
    Latent dynamics, reward, termination and value, the critic ensemble and the policy.

    Rewards and values are in scaled units, as logits over fixed bins. Shapes: ``z`` is ``(batch, z_dim)``, ``a`` is
    ``(batch, codec.input_dim)``.

    With tasks, ``z`` is the latent, then the task's embedding, which all networks see, then the task's id, which says whose
    mask, termination and scale apply: so a latent knows its task wherever it goes, into the planner too. With a single task
    ``z`` is the latent alone.

    :param features_dim: Width of the features extractor's output
    :param codec: Action codec
    :param sizes: Widths
    :param activation_fn: Activation of all hidden layers
    :param n_tasks: Number of tasks; ``None`` for a single one, without embedding
    :raises ValueError: for a size that can't be built
    """

    bins: th.Tensor
    can_terminate: th.Tensor

    def __init__(
        self,
        features_dim: int,
        codec: ActionCodec,
        sizes: Sizes,
        activation_fn: type[nn.Module] = nn.SiLU,
        n_tasks: int | None = None,
    ):
        super().__init__()
        sizes.check()
        self.codec = codec
        self.latent_dim = sizes.latent_dim
        self.pessimism = sizes.pessimism
        self.n_tasks = n_tasks
        task_dim = 0 if n_tasks is None else sizes.task_embedding_dim
        #: What networks see of ``z``, and the width of ``z``
        self.seen_dim = self.latent_dim + task_dim
        self.z_dim = self.seen_dim + (n_tasks is not None)
        if n_tasks is not None:
            self.task_embedding = nn.Parameter(th.randn(n_tasks, task_dim) / task_dim**0.5)
        self.register_buffer("bins", value_bins(), persistent=False)
        # 1 once the task has terminated (of tasks, one each): until then the model predicts no termination
        self.register_buffer("can_terminate", th.zeros(n_tasks or 1))
        n_bins = len(self.bins)

        encoder = MLP(features_dim + task_dim, sizes.encoder_arch, activation_fn)
        encoder_dim = sizes.encoder_arch[-1] if sizes.encoder_arch else features_dim + task_dim
        self.encoder = nn.Sequential(encoder, orthogonal(nn.Linear(encoder_dim, sizes.latent_dim)), SimNorm())

        self.trunk = MLP(self.seen_dim + codec.input_dim, sizes.model_arch, activation_fn)
        self.trunk_dim = sizes.model_arch[-1] if sizes.model_arch else self.seen_dim + codec.input_dim
        # One product for all heads: next latent, reward logits, termination logit
        self.heads = orthogonal(nn.Linear(self.trunk_dim, sizes.latent_dim + n_bins + 1))
        self.simnorm = SimNorm()
        value_arch = sizes.model_arch[-1:]
        self.value_trunk = MLP(self.seen_dim, value_arch, activation_fn)
        self.value_head = nn.Linear(value_arch[-1] if value_arch else self.seen_dim, n_bins)

        critic_input = self.seen_dim if codec.enumerable else self.trunk_dim
        # For enumerable actions one output each, and one that all of them share: see critic_logits
        n_outputs = getattr(codec, "n_joint", 0) + 1
        self.critics = Ensemble(critic_input, sizes.critic_arch, n_outputs * n_bins, sizes.n_critics, activation_fn)

        pi_dim = sizes.pi_arch[-1] if sizes.pi_arch else self.seen_dim
        self.actor = nn.Sequential(
            MLP(self.seen_dim, sizes.pi_arch, activation_fn), orthogonal(nn.Linear(pi_dim, codec.output_dim), gain=0.01)
        )
        self._zero_outcome_heads()

    def _zero_outcome_heads(self) -> None:
        with th.no_grad():
            self.heads.weight[self.latent_dim :] = 0
            self.heads.bias[-1] = -5.0
            self.value_head.weight.zero_()
            self.value_head.bias.zero_()

    def model_parameters(self) -> list[nn.Parameter]:
        """
        :return: What phase A trains beside features extractor and encoder
        """
        modules = (self.trunk, self.heads, self.value_trunk, self.value_head)
        own = [] if self.n_tasks is None else [self.task_embedding]
        return own + [p for module in modules for p in module.parameters()]

    # ------------------------------------------------------------------ tasks

    def task_embeddings(self) -> th.Tensor:
        """
        :return: The tasks' embeddings, of norm 1 at most, shape ``(n_tasks, task_embedding_dim)``
        """
        return self.task_embedding / self.task_embedding.norm(dim=-1, keepdim=True).clamp_min(1.0)

    def task_ids(self, z: th.Tensor) -> th.Tensor | None:
        """
        :param z: Latents, shape ``(..., z_dim)``
        :return: Their tasks' ids, shape ``(...)``; ``None`` without tasks
        """
        return None if self.n_tasks is None else z[..., -1].long()

    def at(self, per_task: th.Tensor, z: th.Tensor) -> th.Tensor:
        """
        :param per_task: A value for each task, shape ``(n_tasks,)``; shape ``(1,)`` without tasks
        :param z: Latents, shape ``(batch, z_dim)``
        :return: The value of each latent's task, shape ``(batch,)``; ``per_task`` itself without tasks
        """
        ids = self.task_ids(z)
        return per_task if ids is None else per_task[ids]

    def follow(self, z: th.Tensor, next_latent: th.Tensor) -> th.Tensor:
        """
        :param z: Latents, shape ``(batch, z_dim)``
        :param next_latent: What comes after them, of :meth:`outcome`, shape ``(batch, latent_dim)``
        :return: The next ``z``, of the same tasks, shape ``(batch, z_dim)``
        """
        return next_latent if self.n_tasks is None else th.cat([next_latent, z[..., self.latent_dim :]], -1)

    def _seen(self, z: th.Tensor) -> th.Tensor:
        """:return: All of ``z`` but the task's id, shape ``(..., seen_dim)``"""
        return z if self.n_tasks is None else z[..., : self.seen_dim]

    # ------------------------------------------------------------------ verbs

    def encode(self, features: th.Tensor, tasks: th.Tensor | None = None) -> th.Tensor:
        """
        :param features: Output of the features extractor, shape ``(batch, features_dim)``
        :param tasks: Ids of the tasks, shape ``(batch,)``; not read without tasks
        :return: Latent ``z``, shape ``(batch, z_dim)``
        """
        if self.n_tasks is None:
            return self.encoder(features)
        assert tasks is not None
        e = self.task_embeddings()[tasks]
        return th.cat([self.encoder(th.cat([features, e], -1)), e, tasks.unsqueeze(-1).to(e.dtype)], -1)

    def features(self, z: th.Tensor, a: th.Tensor) -> th.Tensor:
        """
        :param z: Latents, shape ``(batch, z_dim)``
        :param a: Model inputs, shape ``(batch, input_dim)``
        :return: Features ``f`` of a step, shape ``(batch, trunk_dim)``
        """
        return self.trunk(th.cat([self._seen(z), a], dim=-1))

    def outcome(self, f: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param f: Features of a step, shape ``(batch, trunk_dim)``
        :return: Next latent ``(batch, latent_dim)``, reward logits ``(batch, n_bins)``, termination logit ``(batch,)``
            of a task that has ever terminated
        """
        out = self.heads(f)
        next_latent, reward_logits, termination_logit = out.split([self.latent_dim, len(self.bins), 1], dim=-1)
        return self.simnorm(next_latent), reward_logits, termination_logit.squeeze(-1)

    def step(self, z: th.Tensor, a: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param z: Latents, shape ``(batch, z_dim)``
        :param a: Model inputs, shape ``(batch, input_dim)``
        :return: Next latent ``(batch, z_dim)``, expected reward in scaled units ``(batch,)``, probability of termination
            ``(batch,)``, which is 0 until the task has terminated
        """
        return self.step_from(z, self.features(z, a))

    def step_from(self, z: th.Tensor, f: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        :param z: Latents, shape ``(batch, z_dim)``
        :param f: Features of a step from there, shape ``(batch, trunk_dim)``
        :return: As :meth:`step`
        """
        next_latent, reward_logits, termination_logit = self.outcome(f)
        termination = th.sigmoid(termination_logit) * self.at(self.can_terminate, z)
        return self.follow(z, next_latent), decode(reward_logits, self.bins), termination

    def value_logits(self, z: th.Tensor) -> th.Tensor:
        """
        :param z: Latents, shape ``(..., z_dim)``
        :return: Logits of the model-based value, shape ``(..., n_bins)``
        """
        return self.value_head(self.value_trunk(self._seen(z)))

    def value(self, z: th.Tensor) -> th.Tensor:
        """
        :param z: Latents, shape ``(batch, z_dim)``
        :return: Model-based value ``V_mb`` in scaled units, shape ``(batch,)``
        """
        return decode(self.value_logits(z), self.bins)

    def critic_logits(self, x: th.Tensor, frozen: bool = False) -> th.Tensor:
        """
        Enumerable actions share a part of their logits, as in a duelling network (arXiv 1511.06581): an action that was
        never tried in a state is then worth as much as the state, not nothing.

        :param x: Latent ``z`` for enumerable actions, ``(batch, z_dim)``; else features ``f``, ``(batch, trunk_dim)``
        :param frozen: Let gradients reach ``x`` only
        :return: Shape ``(n_critics, batch, n_joint, n_bins)`` or ``(n_critics, batch, n_bins)``
        """
        if not self.codec.enumerable:
            return self.critics(x, frozen)
        logits = self.critics(self._seen(x), frozen)
        logits = logits.unflatten(-1, (-1, len(self.bins)))
        return logits[..., :1, :] + logits[..., 1:, :]

    def prior(self, z: th.Tensor) -> th.Tensor:
        """
        :param z: Latents, shape ``(batch, z_dim)``
        :return: The policy's parameters, shape ``(batch, codec.params_dim)``
        """
        return self.codec.parameters_from(self.actor(self._seen(z)), self.task_ids(z))

    def mode_parameters(self, z: th.Tensor) -> th.Tensor:
        """
        :param z: Latents, shape ``(batch, z_dim)``
        :return: What ``codec.mode`` needs: :meth:`prior`, or, without tasks, the policy network's output
        """
        return self.actor(z) if self.n_tasks is None else self.prior(z)

    def action_values(self, z: th.Tensor, a: th.Tensor | None = None) -> th.Tensor:
        """
        :param z: Latents, shape ``(batch, z_dim)``
        :param a: Model inputs, shape ``(batch, input_dim)``; not read for enumerable actions
        :return: Shape ``(n_critics, batch, n_joint)`` or ``(n_critics, batch)``, in scaled units
        """
        x = z if self.codec.enumerable else self.features(z, a)  # type: ignore[arg-type]
        return decode(self.critic_logits(x), self.bins)

    def expected_value(self, z: th.Tensor, params: th.Tensor, a: th.Tensor | None = None) -> th.Tensor:
        """
        ``E_{a ~ params} [mean_k Q_k(z, a) - pessimism std_k Q_k(z, a)]``: exact for enumerable actions, else at the given
        action. With two critics and a pessimism of 1 it is the minimum of TD3 (arXiv 1802.09477); BRO (arXiv 2405.16158)
        found the mean to be better where layers are normalised.

        :param z: Latents, shape ``(batch, z_dim)``
        :param params: Parameters of the policy that is valued, shape ``(batch, params_dim)``; read for enumerable actions only
        :param a: Sampled (or modal) model inputs, shape ``(batch, input_dim)``; not read for enumerable actions
        :return: Shape ``(batch,)``, in scaled units
        """
        q = self.action_values(z, a)
        value = q.mean(0) - self.pessimism * q.std(0, correction=0)
        if self.codec.enumerable:
            assert not isinstance(self.codec, GaussianActions)
            return (self.codec.joint_log_prob(params).exp() * value).sum(-1)
        return value

    def policy_value(self, z: th.Tensor, params: th.Tensor | None = None) -> th.Tensor:
        """
        :param z: Latents, shape ``(batch, z_dim)``
        :param params: The policy's parameters there, shape ``(batch, params_dim)``, if they are known already
        :return: Value of the policy (at its mode where actions can't be enumerated), in scaled units, shape ``(batch,)``
        """
        if self.codec.enumerable:
            return self.expected_value(z, self.prior(z) if params is None else params)
        params = self.mode_parameters(z) if params is None else params
        return self.expected_value(z, params, self.codec.mode(params))

    def terminal_value(self, z: th.Tensor) -> th.Tensor:
        """
        :param z: Latents, shape ``(batch, z_dim)``
        :return: The lower one of :meth:`policy_value` and :meth:`value`, which ends an imagined trajectory, in scaled units,
            shape ``(batch,)``
        """
        return th.minimum(self.policy_value(z), self.value(z))
