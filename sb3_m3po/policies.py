"""The policy object: SB3's outer shape around the implicit world model, its frozen copy and the planning switch."""

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import (
    BernoulliDistribution,
    CategoricalDistribution,
    Distribution,
    MultiCategoricalDistribution,
)
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.preprocessing import is_image_space, preprocess_obs
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, CombinedExtractor, FlattenExtractor, NatureCNN
from stable_baselines3.common.type_aliases import PyTorchObs, Schedule
from torch import nn

from sb3_m3po.actions import GaussianActions, SquashedGaussian
from sb3_m3po.masked_actions import make_action_codec
from sb3_m3po.nets import RunningNorm
from sb3_m3po.optim import FusedAdamW
from sb3_m3po.planner import PlannerConfig
from sb3_m3po.planning import MeanNetworks, PlanningPolicy, not_nan
from sb3_m3po.tasks import find_tasks
from sb3_m3po.world_model import Sizes, WorldModel

#: Learning rates in relation to the networks'. A temperature that falls at once leaves the policy certain before the critics
#: know anything; a latent that moves fast takes from policy and critics what they had tuned finely, as a balance (TD-MPC2's
#: encoder learns at 0.3 too, arXiv 2310.16828).
ENT_COEF_SPEED, KL_COEF_SPEED, ENCODER_SPEED = 1.0, 10.0, 0.3
#: Key of the running statistics of a space that is no Dict
_PLAIN = "observation"


class WorldModelPolicy(PlanningPolicy, ActorCriticPolicy):
    """
    Policy and implicit world model of M3PO.

    ``forward``, ``evaluate_actions``, ``get_distribution`` and ``predict_values`` describe the networks as they are trained,
    ``predict`` acts by their running mean, and plans when planning is on. ``obs``: shape ``(batch, ...)``, or a Dict of such.

    :param observation_space: Observation space
    :param action_space: Action space: Box, Discrete, MultiDiscrete or MultiBinary
    :param lr_schedule: Learning rate schedule
    :param net_arch: Hidden layers of the policy (``pi``) and of each critic (``vf``), as a dict; a list is for both
    :param activation_fn: Activation of all hidden layers
    :param use_sde: Not supported, must be False
    :param log_std_init: Logarithm of the initial standard deviation before the squashing, in (-4, 0.5)
    :param features_extractor_class: Features extractor, in the gradient path of the world model; ``None`` for SB3's
        choice by kind of policy
    :param features_extractor_kwargs: Its keyword arguments
    :param share_features_extractor: Must be True: one latent serves policy, model and critics
    :param normalize_images: Whether to divide images by 255
    :param normalize_observations: Whether to normalise vectors by running statistics, before the features extractor
    :param optimizer_class: Optimizer, AdamW by default, with a weight decay of 1e-4
    :param optimizer_kwargs: Its keyword arguments, without the learning rate
    :param latent_dim: Width of the latent, a multiple of 8
    :param encoder_arch: Hidden layers between features extractor and latent
    :param model_arch: Hidden layers of the dynamics; the last is the width of the model's value network too
    :param n_critics: Members of the critic ensemble
    :param pessimism: Standard deviations over the critics that a value lies below their mean: 0 for the mean, 1 with two
        critics for their minimum; ``None`` for 1 with one task and 0 with several
    :param task_embedding_dim: Width of a task's embedding; without tasks there is none
    :param task_key: Key of the task's id in a Dict observation; ``None`` for a single task
    :param n_tasks: Length of the one-hot of the task that ends a vector observation; ``None`` if there is none
    :param gamma: Discount factor of the tasks that have none of their own, ``"auto"`` for that of each one's time limit
    :param time_limit: Decisions after which episodes of tasks are cut that don't know it themselves; ``None`` if they aren't
    :param planner_kwargs: See :class:`~sb3_m3po.planner.PlannerConfig`
    :raises ValueError: for what is not supported, for sizes that don't fit and for unknown keys of ``net_arch``
    """

    default_extractor: ClassVar[type[BaseFeaturesExtractor]] = FlattenExtractor
    return_scale: th.Tensor
    scale_is_known: th.Tensor
    bar_scale: th.Tensor
    q_range: th.Tensor
    gap_median: th.Tensor
    lag_correlation: th.Tensor

    def __init__(
        self,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        lr_schedule: Schedule,
        net_arch: list[int] | dict[str, list[int]] | None = None,
        activation_fn: type[nn.Module] = nn.SiLU,
        use_sde: bool = False,
        log_std_init: float = 0.0,
        features_extractor_class: type[BaseFeaturesExtractor] | None = None,
        features_extractor_kwargs: dict[str, Any] | None = None,
        share_features_extractor: bool = True,
        normalize_images: bool = True,
        normalize_observations: bool = True,
        optimizer_class: type[th.optim.Optimizer] = FusedAdamW,
        optimizer_kwargs: dict[str, Any] | None = None,
        latent_dim: int = 128,
        encoder_arch: list[int] | None = None,
        model_arch: list[int] | None = None,
        n_critics: int = 2,
        pessimism: float | None = None,
        task_embedding_dim: int = 32,
        task_key: str | None = "task",
        n_tasks: int | None = None,
        gamma: float | str = "auto",
        time_limit: int | None = None,
        planner_kwargs: dict[str, Any] | None = None,
    ):
        if use_sde:
            raise ValueError("M3PO does not support generalized State-Dependent Exploration: pass use_sde=False")
        if not share_features_extractor:
            raise ValueError("M3PO's policy, model and critics share one latent: pass share_features_extractor=True")
        self.sizes = Sizes(latent_dim=latent_dim, n_critics=n_critics, task_embedding_dim=task_embedding_dim)
        self.sizes.encoder_arch = self.sizes.encoder_arch if encoder_arch is None else list(encoder_arch)
        self.sizes.model_arch = self.sizes.model_arch if model_arch is None else list(model_arch)
        self.task_key, self.n_tasks, self.normalize_observations = task_key, n_tasks, normalize_observations
        #: Tells the tasks of observations; ``None`` for a single task
        self.tasks = find_tasks(observation_space, task_key, n_tasks)
        if pessimism is None:
            # Critics disagree where a task has hardly been explored: their minimum would keep the policy from going there
            pessimism = 1.0 if self.tasks is None else 0.0
        self.sizes.pessimism = pessimism
        #: What the networks see of an observation
        self.seen_space = observation_space if self.tasks is None else self.tasks.seen(observation_space)
        self.gamma, self.time_limit = gamma, time_limit
        self.planner_kwargs = {} if planner_kwargs is None else planner_kwargs
        self.planner_config = PlannerConfig.of(self.planner_kwargs)
        self._planning: PlannerConfig | None = None
        self._planning_milliseconds: float | None = None
        self._noise_bank: dict[tuple[int, int, int], th.Tensor] = {}
        #: How many tasks keep their embedding while only those that came later learn; 0 while everything learns
        self.n_frozen_tasks = 0
        #: Random generator of the actions taken while collecting; ``None`` is the global one
        self.generator: th.Generator | None = None
        if net_arch is None:
            net_arch = dict(pi=self.sizes.pi_arch, vf=self.sizes.critic_arch)
        super().__init__(
            observation_space,
            action_space,
            lr_schedule,
            net_arch=net_arch,
            activation_fn=activation_fn,
            log_std_init=log_std_init,
            features_extractor_class=features_extractor_class or self.default_extractor,
            # Copied: SB3 adds an entry of its own to it
            features_extractor_kwargs=dict(features_extractor_kwargs or {}),
            normalize_images=normalize_images,
            optimizer_class=optimizer_class,
            optimizer_kwargs=dict(optimizer_kwargs or {}),
        )

    def _build(self, lr_schedule: Schedule) -> None:
        if isinstance(self.net_arch, dict):
            if unknown := set(self.net_arch) - {"pi", "vf"}:
                raise ValueError(f"net_arch={self.net_arch} has {sorted(unknown)}: its keys are 'pi' and 'vf' (the critics)")
            self.sizes.pi_arch, self.sizes.critic_arch = self.net_arch.get("pi", []), self.net_arch.get("vf", [])
        else:
            self.sizes.pi_arch = self.sizes.critic_arch = list(self.net_arch)
        table = None if self.tasks is None else self.tasks.table
        n_tasks = None if table is None else len(table)
        codec = make_action_codec(self.action_space, self.log_std_init, table)
        if isinstance(self.action_space, spaces.Box):
            self._squash_output = True
            self.action_dist = SquashedGaussian(codec.input_dim)
        vectors = self._normalized_spaces() if self.normalize_observations else {}
        self.norms = nn.ModuleDict({key: RunningNorm(part.shape, n_tasks=n_tasks) for key, part in vectors.items()})
        self.world_model = WorldModel(self.features_dim, codec, self.sizes, self.activation_fn, n_tasks)
        self.bar = copy.deepcopy(self.world_model).requires_grad_(False).eval()
        self.bar_features_extractor = copy.deepcopy(self.features_extractor).requires_grad_(False).eval()
        self.mean = MeanNetworks(self.features_extractor, self.world_model).requires_grad_(False).eval()
        n = n_tasks or 1
        self.log_ent_coef, self.log_kl_coef = nn.Parameter(th.zeros(n)), nn.Parameter(th.zeros(1))
        for name in ("return_scale", "bar_scale", "q_range"):  # what one scaled unit is worth: now, and for the copies
            self.register_buffer(name, th.ones(n))
        for name in ("scale_is_known", "gap_median", "lag_correlation"):  # known: from the first nonzero reward on
            self.register_buffer(name, th.zeros(n))
        for name in ("lasting_gammas", "ending_gammas"):
            self.register_buffer(name, th.zeros(n), persistent=False)
        self.set_time_limit(self.time_limit)

        # The policy and the critics; the model learns in a phase of its own
        kwargs, model = self.optimizer_kwargs, self.world_model
        acting = [*model.actor.parameters(), *model.critics.parameters()]
        self.optimizer = self.optimizer_class(acting, lr=lr_schedule(1), **kwargs)  # type: ignore[call-arg]
        encoding = [*self.features_extractor.parameters(), *model.encoder.parameters()]
        groups = [dict(params=encoding, speed=ENCODER_SPEED), dict(params=model.model_parameters(), speed=1.0)]
        self.model_optimizer = self.optimizer_class(groups, lr=lr_schedule(1), **kwargs)  # type: ignore[call-arg]
        coefs = [dict(params=[self.log_ent_coef], speed=ENT_COEF_SPEED), dict(params=[self.log_kl_coef], speed=KL_COEF_SPEED)]
        self.coef_optimizer = FusedAdamW(coefs, lr=lr_schedule(1), weight_decay=0.0)

    def _normalized_spaces(self) -> dict[str, spaces.Box]:
        """Vectors and other Boxes that are no images."""
        parts = self.seen_space.spaces if isinstance(self.seen_space, spaces.Dict) else {_PLAIN: self.seen_space}
        return {
            key: part
            for key, part in parts.items()
            if isinstance(part, spaces.Box) and not is_image_space(part, normalized_image=not self.normalize_images)
        }

    def _get_constructor_parameters(self) -> dict[str, Any]:
        sizes = self.sizes
        return dict(
            observation_space=self.observation_space,
            action_space=self.action_space,
            lr_schedule=self._dummy_schedule,
            net_arch=self.net_arch,
            activation_fn=self.activation_fn,
            log_std_init=self.log_std_init,
            features_extractor_class=self.features_extractor_class,
            features_extractor_kwargs=self.features_extractor_kwargs,
            share_features_extractor=self.share_features_extractor,
            normalize_images=self.normalize_images,
            normalize_observations=self.normalize_observations,
            optimizer_class=self.optimizer_class,
            optimizer_kwargs=self.optimizer_kwargs,
            latent_dim=sizes.latent_dim,
            encoder_arch=sizes.encoder_arch,
            model_arch=sizes.model_arch,
            n_critics=sizes.n_critics,
            pessimism=sizes.pessimism,
            task_embedding_dim=sizes.task_embedding_dim,
            task_key=self.task_key,
            n_tasks=self.n_tasks,
            gamma=self.gamma,
            time_limit=self.time_limit,
            planner_kwargs=self.planner_kwargs,
        )

    def train(self, mode: bool = True) -> "WorldModelPolicy":
        """The copies stay in evaluation mode: only a sync and an average change them."""
        # SB3 sets the mode at every prediction; walking through all modules each time would cost more than the networks
        if mode != self.training:
            super().train(mode)
            self.bar.eval()
            self.bar_features_extractor.eval()
            self.mean.eval()
        return self

    def train_new_tasks_only(self, n_known: int) -> None:
        """
        Let only output layers learn, and the embeddings of the tasks behind the known ones; for good.

        :param n_known: How many tasks keep their embedding
        """
        self.n_frozen_tasks, model = n_known, self.world_model
        self.requires_grad_(False)
        outputs = (model.heads, model.value_head, model.actor[-1], model.critics.weights[-1], model.critics.biases[-1])
        for part in (*outputs, model.task_embedding, self.log_ent_coef, self.log_kl_coef):
            part.requires_grad_(True)

    # ---------------------------------------------------------------- latents

    def make_features_extractor(self) -> BaseFeaturesExtractor:
        """:return: The features extractor, of all but the task's id"""
        return self.features_extractor_class(self.seen_space, **self.features_extractor_kwargs)

    def extract_features(  # type: ignore[override]
        self, obs: PyTorchObs, features_extractor: BaseFeaturesExtractor | None = None, tasks: th.Tensor | None = None
    ) -> th.Tensor:
        """
        Preprocess as SB3 does, normalise what is a vector by the frozen statistics, extract features.

        :param features_extractor: One to use in place of the policy's own
        :param tasks: Ids of the observations' tasks, shape ``(batch,)``; read from ``obs`` if not given
        :return: Shape ``(batch, features_dim)``
        """
        tasks = self.task_ids(obs) if tasks is None else tasks
        if isinstance(obs, dict) and isinstance(self.seen_space, spaces.Dict):
            obs = {key: obs[key] for key in self.seen_space.spaces}
        prepared = preprocess_obs(obs, self.seen_space, normalize_images=self.normalize_images)
        if isinstance(prepared, dict):
            prepared = {key: self._norm(key, part, tasks) for key, part in prepared.items()}
        else:
            prepared = self._norm(_PLAIN, prepared, tasks)
        return (self.features_extractor if features_extractor is None else features_extractor)(prepared)

    def _norm(self, key: str, part: th.Tensor, tasks: th.Tensor | None) -> th.Tensor:
        return self.norms[key](part, tasks) if key in self.norms else part

    def task_ids(self, obs: PyTorchObs) -> th.Tensor | None:
        """
        :return: Ids of the observations' tasks, shape ``(batch,)``; ``None`` without tasks
        :raises ValueError: for an id outside of the table
        """
        return None if self.tasks is None else self.tasks.ids(obs)

    def encode(self, obs: PyTorchObs) -> th.Tensor:
        """:return: ``h(o)``, shape ``(batch, z_dim)``"""
        return self._encode(obs, self.features_extractor, self.world_model)

    def encode_bar(self, obs: PyTorchObs) -> th.Tensor:
        """:return: ``h_bar(o)`` of the last sync, shape ``(batch, z_dim)``"""
        return self._encode(obs, self.bar_features_extractor, self.bar)

    def encode_mean(self, obs: PyTorchObs) -> th.Tensor:
        """:return: The latent of :class:`~sb3_m3po.planning.MeanNetworks`, shape ``(batch, z_dim)``"""
        return self._encode(obs, self.mean.features_extractor, self.mean.world_model)

    def _encode(self, obs: PyTorchObs, features_extractor: BaseFeaturesExtractor, model: WorldModel) -> th.Tensor:
        tasks = self.task_ids(obs)
        return model.encode(self.extract_features(obs, features_extractor, tasks), tasks)

    def observe(self, observations: np.ndarray | dict[str, np.ndarray]) -> None:
        """
        Take new observations into the running statistics, which apply from the next sync on.

        :param observations: Shape ``(n_steps, n_envs, ...)``
        """
        parts = observations if isinstance(observations, dict) else {_PLAIN: observations}
        tasks = None if self.tasks is None else self.tasks.ids(observations)
        for key, part in parts.items():
            if key in self.norms:
                norm = self.norms[key]
                assert isinstance(norm, RunningNorm)
                norm.update(part.reshape(-1, *part.shape[2:]), tasks)

    def sync(self, return_scale: Callable[[np.ndarray], np.ndarray], has_terminated: np.ndarray) -> None:
        """
        Copy the networks to their bars, apply the observation statistics, move to new return scales.

        :param return_scale: Gives that of each task by its discount factor, both of shape ``(n_tasks,)``: reward units per
            scaled unit, 0 while no reward was nonzero. A scale never shrinks
        :param has_terminated: Of which tasks the model predicts terminations from now on, shape ``(n_tasks,)``
        """
        with th.no_grad():
            # Before anything else: discount factors may depend on it
            self.world_model.can_terminate[th.as_tensor(has_terminated, device=self.device)] = 1.0
            found = return_scale(self.gammas.cpu().numpy())
            scale = self._next_scale(th.as_tensor(found, dtype=th.float32, device=self.device))
            self.bar.load_state_dict(self.world_model.state_dict())
            self.bar_features_extractor.load_state_dict(self.features_extractor.state_dict())
            for norm in self.norms.values():
                assert isinstance(norm, RunningNorm)
                norm.freeze()
            self.bar_scale.copy_(self.return_scale)
            self.return_scale.copy_(scale)
            self.q_range *= self.bar_ratio
            self.gap_median *= self.bar_ratio

    def _next_scale(self, found: th.Tensor) -> th.Tensor:
        """:return: 1 until a reward is nonzero, and never shrinking from then on, shape ``(n_tasks,)``"""
        known = self.scale_is_known > 0
        fresh = th.where(found > 0, found, th.ones_like(found))
        # What was learned without a reward is in no unit: nothing to convert
        self.return_scale.copy_(th.where(known, self.return_scale, fresh))
        self.scale_is_known.copy_((known | (found > 0)).float())
        return th.maximum(self.return_scale, found)

    @property
    def bar_ratio(self) -> th.Tensor:
        """:return: ``s_old / s``: turns the bars' values into today's scaled units, shape ``(n_tasks,)``"""
        return self.bar_scale / self.return_scale

    # ------------------------------------------------------- SB3's interface

    def forward(
        self, obs: PyTorchObs, deterministic: bool = False, noise: th.Tensor | None = None
    ) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """
        Act by the policy.

        :param deterministic: Whether to take the policy's mode
        :param noise: What a stochastic action is made of, see :meth:`~sb3_m3po.actions.GaussianActions.sample`
        :return: Actions (Box: in [-1, 1]), values in reward units ``(batch, 1)``, log-probabilities ``(batch,)``
        """
        z = self.encode(obs)
        model = self.world_model
        params = not_nan(model.prior(z))
        if deterministic:
            inputs = model.codec.mode(params)
            actions = model.codec.to_env(inputs)
            log_prob = self._distribution(params).log_prob(self._distribution_actions(actions))
        else:
            noise = model.codec.noise((len(z),), self.generator) if noise is None else noise
            inputs, log_prob = model.codec.sample(params, noise.to(z.device))
            actions = model.codec.to_env(inputs)
        return actions, self._values(z, params), log_prob

    def _values(self, z: th.Tensor, params: th.Tensor | None = None) -> th.Tensor:
        return (self.world_model.at(self.return_scale, z) * self.world_model.policy_value(z, params)).unsqueeze(-1)

    def _distribution(self, params: th.Tensor) -> Distribution:
        codec = self.world_model.codec
        if isinstance(codec, GaussianActions):
            return codec.distribution(params)
        logits = params[..., codec.legal_index]
        dist = self.action_dist
        if isinstance(dist, BernoulliDistribution):
            pairs = logits.unflatten(-1, (-1, 2))
            return dist.proba_distribution(pairs[..., 1] - pairs[..., 0])
        assert isinstance(dist, (CategoricalDistribution, MultiCategoricalDistribution))
        return dist.proba_distribution(logits)

    def _distribution_actions(self, actions: th.Tensor) -> th.Tensor:
        """Environment actions as SB3's distributions count them: flat, and from zero."""
        codec = self.world_model.codec
        if isinstance(codec, GaussianActions):
            return actions.reshape(-1, codec.input_dim).float()
        actions = actions.reshape(-1, codec.n_factors) - codec.start
        return actions.squeeze(-1) if isinstance(self.action_space, spaces.Discrete) else actions.float()

    def get_distribution(self, obs: PyTorchObs) -> Distribution:
        """:return: The policy's distribution: of scaled actions (Box), of actions counted from zero (discrete kinds)"""
        return self._distribution(self.world_model.prior(self.encode(obs)))

    def evaluate_actions(self, obs: PyTorchObs, actions: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor | None]:
        """
        :param actions: As :meth:`forward` returns them and the rollout buffer stores them
        :return: Values in reward units ``(batch, 1)``, log-probabilities ``(batch,)``, entropies in nats ``(batch,)``
        """
        z = self.encode(obs)
        params = self.world_model.prior(z)
        distribution = self._distribution(params)
        return self._values(z, params), distribution.log_prob(self._distribution_actions(actions)), distribution.entropy()

    def predict_values(self, obs: PyTorchObs) -> th.Tensor:
        """:return: Values of the policy, less ``pessimism``, in reward units, shape ``(batch, 1)``"""
        return self._values(self.encode(obs))

    def unscale_action(self, scaled_action: np.ndarray) -> np.ndarray:
        """:return: Actions of the space, of ``scaled_action``'s shape: never just outside of its bounds, whole if it is"""
        space = self.action_space
        assert isinstance(space, spaces.Box)
        # In floating point: small integers can't hold their space's width
        low, high = (bound.astype(np.result_type(bound, np.float32)) for bound in (space.low, space.high))
        actions = np.clip(low + 0.5 * (scaled_action + 1.0) * (high - low), low, high)
        return (np.rint(actions) if np.issubdtype(space.dtype, np.integer) else actions).astype(space.dtype)

    def _predict(self, observation: PyTorchObs, deterministic: bool = False) -> th.Tensor:
        return self._decide(self.encode_mean(observation), deterministic)


MlpPolicy = WorldModelPolicy


class CnnPolicy(WorldModelPolicy):
    """World model policy for images: :class:`WorldModelPolicy` with SB3's ``NatureCNN``."""

    default_extractor = NatureCNN


class MultiInputPolicy(WorldModelPolicy):
    """World model policy for Dict observations: :class:`WorldModelPolicy` with SB3's ``CombinedExtractor``."""

    default_extractor = CombinedExtractor
