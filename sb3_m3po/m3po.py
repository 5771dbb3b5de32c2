"""M3PO: when experience is collected, and when the model, the critics and the policy learn from it."""

import io
import pathlib
import warnings
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import explained_variance, obs_as_tensor, update_learning_rate
from stable_baselines3.common.vec_env import VecEnv

from sb3_m3po.actions import GaussianActions
from sb3_m3po.buffers import HybridDictRolloutBuffer, HybridRolloutBuffer, Observations, ReplayMemory, SequenceBatch
from sb3_m3po.losses import (
    ModelTargets,
    PolicyTerms,
    alive_mask,
    critic_loss,
    discrepancy_bonus,
    n_step_return,
    policy_terms,
    trust_region_loss,
    world_model_loss,
)
from sb3_m3po.math import decode, two_hot
from sb3_m3po.planner import Plan
from sb3_m3po.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, PlanningSwitch, WorldModelPolicy

SelfM3PO = TypeVar("SelfM3PO", bound="M3PO")

#: Observations that are evaluated at once
_PIECE = 512
#: The temperature and the multiplier learn faster than the networks by this factor
_COEF_SPEED = 10.0
_ENT_COEF_RANGE = (1e-4, 1.0)
_KL_COEF_RANGE = (1e-2, 1e3)
#: Floor of the critics' range that the policy's gain is divided by, in scaled units (returns reach about 10)
_MIN_Q_RANGE = 0.5


class M3PO(OnPolicyAlgorithm):
    """
    Massively Multi-Task Model-Based Policy Optimization (M3PO, arXiv 2506.21782).

    An implicit world model, planning, a discrepancy bonus and a trust-region policy step, learning from a replay memory
    behind the rollout buffer. See the documentation's M3PO page for the equations.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy, or a subclass of WorldModelPolicy)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: The learning rate, it can be a function of the current progress remaining (from 1 to 0)
    :param n_steps: Decisions per environment and rollout; ``None`` for ``max(1, 256 // n_envs)``
    :param batch_size: Samples per update
    :param utd_ratio: Updates per collected transition
    :param sync_interval: Updates between two syncs of the frozen copies
    :param gamma: Discount factor
    :param gae_lambda: Only shapes ``rollout_buffer.returns`` and the logged ``explained_variance``
    :param n_step_returns: Rewards summed in the critics' target before they bootstrap
    :param horizon: Steps that the world model is unrolled in training
    :param buffer_size: Transitions in the replay memory, over all environments
    :param learning_starts: Transitions in the memory before the first update
    :param target_kl: Trust region: bound of the KL divergence per state from the policy of the last sync, in nats;
        ``None`` for no bound
    :param ent_coef: Entropy coefficient; ``"auto"`` learns it, ``"auto_0.1"`` from 0.1 on
    :param bonus_coef: Weight of the discrepancy bonus, falling to 0 over training
    :param plan_rollouts: Whether actions are planned while collecting
    :param planner_kwargs: ``n_samples, horizon, n_iterations, n_effective, min_std`` of the planner,
        see :class:`~sb3_m3po.planner.PlannerConfig`
    :param max_grad_norm: The maximum value for the gradient clipping
    :param rollout_buffer_class: A subclass of HybridRolloutBuffer or its Dict twin; chosen automatically if ``None``
    :param rollout_buffer_kwargs: Keyword arguments to pass to the rollout buffer on creation
    :param stats_window_size: Window size for the rollout logging, in episodes
    :param tensorboard_log: the log location for tensorboard (if None, no logging)
    :param policy_kwargs: additional arguments to be passed to the policy on creation,
        see :class:`~sb3_m3po.policies.WorldModelPolicy`
    :param verbose: Verbosity level: 0 for no output, 1 for info messages, 2 for debug messages
    :param seed: Seed for the pseudo random generators
    :param device: Device (cpu, cuda, ...) on which the code should be run
    :param _init_setup_model: Whether or not to build the network at the creation of the instance
    """

    policy_aliases: ClassVar[dict[str, type[BasePolicy]]] = {
        "MlpPolicy": MlpPolicy,
        "CnnPolicy": CnnPolicy,
        "MultiInputPolicy": MultiInputPolicy,
    }
    policy: WorldModelPolicy  # type: ignore[assignment]
    rollout_buffer: HybridRolloutBuffer | HybridDictRolloutBuffer  # type: ignore[assignment]

    def __init__(
        self,
        policy: str | type[WorldModelPolicy],
        env: GymEnv | str | None,
        learning_rate: float | Schedule = 1e-3,
        n_steps: int | None = None,
        batch_size: int = 128,
        utd_ratio: float = 0.5,
        sync_interval: int = 128,
        gamma: float = 0.99,
        gae_lambda: float = 0.95,
        n_step_returns: int = 3,
        horizon: int = 3,
        buffer_size: int = 1_000_000,
        learning_starts: int = 1_000,
        target_kl: float | None = 1.0,
        ent_coef: str | float = "auto",
        bonus_coef: float = 0.0,
        plan_rollouts: bool = False,
        planner_kwargs: dict[str, Any] | None = None,
        max_grad_norm: float = 20.0,
        rollout_buffer_class: type[HybridRolloutBuffer] | type[HybridDictRolloutBuffer] | None = None,
        rollout_buffer_kwargs: dict[str, Any] | None = None,
        stats_window_size: int = 100,
        tensorboard_log: str | None = None,
        policy_kwargs: dict[str, Any] | None = None,
        verbose: int = 0,
        seed: int | None = None,
        device: th.device | str = "auto",
        _init_setup_model: bool = True,
    ):
        super().__init__(
            policy,
            env,  # type: ignore[arg-type]
            learning_rate=learning_rate,
            n_steps=n_steps,  # type: ignore[arg-type]
            gamma=gamma,
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,  # type: ignore[arg-type]
            vf_coef=1.0,
            max_grad_norm=max_grad_norm,
            use_sde=False,
            sde_sample_freq=-1,
            rollout_buffer_class=rollout_buffer_class,
            rollout_buffer_kwargs=rollout_buffer_kwargs,
            stats_window_size=stats_window_size,
            tensorboard_log=tensorboard_log,
            policy_kwargs=policy_kwargs,
            verbose=verbose,
            seed=seed,
            device=device,
            _init_setup_model=False,
            supported_action_spaces=(spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary),
        )
        self.batch_size = batch_size
        self.utd_ratio = utd_ratio
        self.sync_interval = sync_interval
        self.n_step_returns = n_step_returns
        self.horizon = horizon
        self.buffer_size = buffer_size
        self.learning_starts = learning_starts
        self.target_kl = target_kl
        self.bonus_coef = bonus_coef
        self.plan_rollouts = plan_rollouts
        self.planner_kwargs = planner_kwargs
        # Updates that collected transitions have paid for and that are still due
        self._update_credits = 0.0
        if _init_setup_model:
            self._setup_model()

    # ----------------------------------------------------------------- set up

    def _setup_model(self) -> None:
        self._check_arguments()
        self._setup_lr_schedule()
        self._generator, self._rng = th.Generator(), np.random.default_rng()
        self.set_random_seed(self.seed)
        buffer_class = self.rollout_buffer_class or (
            HybridDictRolloutBuffer if isinstance(self.observation_space, spaces.Dict) else HybridRolloutBuffer
        )
        self.rollout_buffer_class = buffer_class
        self.rollout_buffer = buffer_class(  # type: ignore[assignment]
            self.n_steps or max(1, 256 // self.n_envs),
            self.observation_space,  # type: ignore[arg-type]
            self.action_space,
            device=self.device,
            gamma=self.gamma,
            gae_lambda=self.gae_lambda,
            n_envs=self.n_envs,
            **{"memory_size": self.buffer_size, **self.rollout_buffer_kwargs},
        )
        self.rollout_buffer.memory.warn_if_too_large()
        if max(self.horizon, self.n_step_returns) > self.rollout_buffer.memory.capacity:
            raise ValueError(
                f"horizon={self.horizon} and n_step_returns={self.n_step_returns} must fit into the memory's "
                f"{self.rollout_buffer.memory.capacity} steps per environment (buffer_size={self.buffer_size})"
            )
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space,
            self.action_space,
            self.lr_schedule,
            gamma=self.gamma,
            planner_kwargs=self.planner_kwargs,
            **self.policy_kwargs,
        ).to(self.device)
        self.policy.generator = self._generator
        if isinstance(self.ent_coef, str):
            initial = float(self.ent_coef.split("_")[1]) if "_" in self.ent_coef else 0.1
        else:
            initial = self.ent_coef
        with th.no_grad():
            self.policy.log_ent_coef.fill_(np.log(max(initial, 1e-30)))

    def _check_arguments(self) -> None:
        """:raises ValueError: that names what was given and what to do"""
        if not (isinstance(self.policy_class, type) and issubclass(self.policy_class, WorldModelPolicy)):
            raise ValueError(
                f"Policy must subclass WorldModelPolicy, not {self.policy_class}: "
                "use 'MlpPolicy', 'CnnPolicy' or 'MultiInputPolicy'"
            )
        if isinstance(self.action_space, spaces.MultiDiscrete) and self.action_space.nvec.ndim > 1:
            raise ValueError(
                f"Multi-dimensional MultiDiscrete actions ({self.action_space}) are not supported: "
                "flatten the space's `nvec` in a wrapper"
            )
        chosen = self.rollout_buffer_class
        if chosen is not None and not issubclass(chosen, (HybridRolloutBuffer, HybridDictRolloutBuffer)):
            raise ValueError(
                f"rollout_buffer_class={chosen.__name__} has no replay memory: "
                "use HybridRolloutBuffer (HybridDictRolloutBuffer for Dict observations) or a subclass"
            )
        for name in ("batch_size", "sync_interval", "n_step_returns", "horizon", "buffer_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.utd_ratio < 0 or self.learning_starts < 0 or self.bonus_coef < 0:
            raise ValueError("utd_ratio, learning_starts and bonus_coef must not be negative")
        if self.n_steps is not None and self.n_steps < 1:
            raise ValueError(f"n_steps={self.n_steps} must be at least 1, or None")
        if self.target_kl is not None and self.target_kl <= 0:
            raise ValueError(f"target_kl={self.target_kl} must be positive, or None for no trust region")
        if isinstance(self.ent_coef, str) and not self.ent_coef.startswith("auto"):
            raise ValueError(f"ent_coef={self.ent_coef!r} must be a number, 'auto' or 'auto_<initial value>'")

    def set_random_seed(self, seed: int | None = None) -> None:
        """
        Seed everything, the generators of collection and replay included.

        :param seed: Seed; ``None`` leaves all as it is
        """
        super().set_random_seed(seed)
        if seed is not None and hasattr(self, "_generator"):
            self._generator.manual_seed(seed)
            self._rng = np.random.default_rng(seed)

    def _maybe_recommend_cpu(self, mlp_class_name: str = "") -> None:
        """Nothing to recommend: batches are large enough for either device."""

    @property
    def replay_buffer(self) -> ReplayMemory:
        """:return: The replay memory inside the rollout buffer, under the name that callbacks look for"""
        return self.rollout_buffer.memory

    # ---------------------------------------------------------------- collect

    def _setup_learn(self, *args: Any, **kwargs: Any) -> tuple[int, BaseCallback]:
        # The environments may have been reset, replaced or left in the middle of a step
        self.rollout_buffer.memory.cut()
        if self._vec_normalize_env is not None and self._vec_normalize_env.norm_reward:
            warnings.warn(
                "VecNormalize's reward normalisation has no effect on M3PO, which learns from the environment's own rewards "
                "and scales them itself: pass norm_reward=False",
                stacklevel=3,
            )
        result = super()._setup_learn(*args, **kwargs)
        self._check_finite(self._last_obs, None)  # type: ignore[arg-type]
        return result

    def learn(
        self: SelfM3PO,
        total_timesteps: int,
        callback: MaybeCallback = None,
        log_interval: int = 1,
        tb_log_name: str = "M3PO",
        reset_num_timesteps: bool = True,
        progress_bar: bool = False,
    ) -> SelfM3PO:
        return super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)

    def collect_rollouts(  # type: ignore[override]
        self,
        env: VecEnv,
        callback: BaseCallback,
        rollout_buffer: HybridRolloutBuffer,
        n_rollout_steps: int | None,
    ) -> bool:
        """
        Collect experiences, by the policy or the planner, into the rollout buffer and its memory.

        The loop is that of ``OnPolicyAlgorithm``; different are only the choice of the action and :meth:`_remember`.
        "Rollout" means real experience here, as in SB3.

        :param env: The training environment
        :param callback: Callback that will be called at each step (and at the beginning and end of the rollout)
        :param rollout_buffer: Buffer to fill
        :param n_rollout_steps: Number of experiences to collect per environment; ``None`` for the buffer's size
        :return: False if the callback ended training
        """
        assert self._last_obs is not None, "No previous observation was provided"
        # Switch to eval mode (this affects batch norm / dropout)
        self.policy.set_training_mode(False)
        n_steps = 0
        n_rollout_steps = n_rollout_steps or rollout_buffer.buffer_size
        rollout_buffer.reset()
        callback.on_rollout_start()

        while n_steps < n_rollout_steps:
            with th.no_grad():
                obs_tensor = obs_as_tensor(self._last_obs, self.device)  # type: ignore[arg-type]
                action_tensor, values, log_probs = self._act(obs_tensor)
            actions = action_tensor.cpu().numpy()
            clipped_actions = actions
            if isinstance(self.action_space, spaces.Box):
                clipped_actions = self.policy.unscale_action(actions).astype(self.action_space.dtype)

            new_obs: Any  # for VecEnv it may be a tuple too, which M3PO refuses at construction
            new_obs, rewards, dones, infos = env.step(clipped_actions)
            self._check_finite(new_obs, rewards)
            self.num_timesteps += env.num_envs

            # Give access to local variables
            callback.update_locals(locals())
            if not callback.on_step():
                return False

            self._update_info_buffer(infos, dones)
            n_steps += 1
            rewards = self._remember(actions, new_obs, rewards, dones, infos)
            # Reshaped in case of discrete actions
            buffer_actions = actions.reshape(env.num_envs, -1)
            rollout_buffer.add(
                self._last_obs, buffer_actions, rewards, self._last_episode_starts, values, log_probs  # type: ignore[arg-type]
            )
            self._last_obs = new_obs  # type: ignore[assignment]
            self._last_episode_starts = dones

        with th.no_grad():
            values = self.policy.predict_values(obs_as_tensor(new_obs, self.device))  # type: ignore[arg-type]
        rollout_buffer.compute_returns_and_advantage(last_values=values, dones=dones)
        self.policy.observe(rollout_buffer.observations)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _act(self, obs_tensor: Any) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """:return: Actions, values and log-probabilities under whatever chose the actions"""
        # The model plans only once it has learned
        if not (self.plan_rollouts and self._n_updates > 0):
            return self.policy(obs_tensor)
        actions, values, log_probs, planned = self.policy.act_by_plan(obs_tensor)
        self._log_plan(planned)
        return actions, values, log_probs

    def _log_plan(self, planned: Plan) -> None:
        self.logger.record_mean("exploration/planner_kl", planned.kl.mean().item())
        self.logger.record_mean("exploration/planner_gain", planned.gain.mean().item())

    def _check_finite(self, obs: Observations, rewards: np.ndarray | None) -> None:
        """
        :raises ValueError: for NaN or infinite observations or rewards, before they reach the memory
        """
        parts = list(obs.values()) if isinstance(obs, dict) else [obs]
        parts = [part for part in parts if part.dtype.kind == "f"] + ([] if rewards is None else [rewards])
        for part in parts:
            if not np.isfinite(part).all():
                bad = np.flatnonzero(~np.isfinite(part.reshape(len(part), -1)).all(-1)).tolist()
                kind = "reward" if part is rewards else "observation"
                raise ValueError(
                    f"Environment {bad} returned a NaN or infinite {kind} at step {self.num_timesteps}: "
                    "nothing of it was stored; check the environment (SB3's VecCheckNan helps to find the cause)"
                )

    def _remember(
        self, actions: np.ndarray, new_obs: Observations, rewards: np.ndarray, dones: np.ndarray, infos: list[dict[str, Any]]
    ) -> np.ndarray:
        """
        Put one step of every environment into the memory: raw reward, real next observation, how it ended.

        :return: The rewards of the rollout, where time limits are bootstrapped (see SB3's GH issue #633)
        """
        obs: Observations = self._last_obs  # type: ignore[assignment]
        next_obs, vec_normalize = new_obs, self._vec_normalize_env
        if vec_normalize is not None:
            obs = self._last_original_obs  # type: ignore[assignment]
            next_obs, rewards = vec_normalize.get_original_obs(), vec_normalize.get_original_reward()
            self._last_original_obs = next_obs  # type: ignore[assignment]
        truncated = np.array([bool(info.get("TimeLimit.truncated", False)) for info in infos]) & dones
        rollout_rewards = np.array(rewards, dtype=np.float32)
        ended = [i for i in np.flatnonzero(dones).tolist() if infos[i].get("terminal_observation") is not None]
        if ended:
            next_obs = _copy(next_obs)
            for i in ended:
                final = infos[i]["terminal_observation"]
                if truncated[i]:
                    with th.no_grad():
                        value = self.policy.predict_values(self.policy.obs_to_tensor(final)[0])
                    rollout_rewards[i] += self.gamma * value.item()
                _put(next_obs, i, final if vec_normalize is None else vec_normalize.unnormalize_obs(final))
        self.rollout_buffer.store(obs, actions, rewards, next_obs, dones & ~truncated, truncated)
        self._update_credits += self.utd_ratio * self.n_envs
        return rollout_rewards

    # ------------------------------------------------------------------ train

    def train(self) -> None:
        """Spend the updates that are due, ``sync_interval`` at a time: sync, fit the world model, improve the policy."""
        self.policy.set_training_mode(True)
        self._update_learning_rates()
        returns, values = self.rollout_buffer.returns.flatten(), self.rollout_buffer.values.flatten()
        self.logger.record("train/explained_variance", explained_variance(values, returns))
        ready = self.replay_buffer.size() >= min(self.learning_starts, self.replay_buffer.capacity * self.n_envs)
        while ready and self._update_credits >= self.sync_interval:
            self._update_credits -= self.sync_interval
            self._sync()
            model_batch, policy_batch, frozen = self._draw()
            self._fit_world_model(model_batch, frozen)
            self._improve_policy(policy_batch, frozen)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _update_learning_rates(self) -> None:
        policy = self.policy
        self._update_learning_rate([policy.optimizer, policy.model_optimizer])
        rate = _COEF_SPEED * self.lr_schedule(self._current_progress_remaining)
        update_learning_rate(policy.coef_optimizer, rate)

    def _sync(self) -> None:
        """Copy the networks to their bars and move to the return scale of what is in memory."""
        memory, old = self.replay_buffer, self.policy.return_scale.item()
        found = memory.return_scale(self.gamma)
        # 1 until a reward is nonzero, and never shrinking from then on
        self._scale_is_known = getattr(self, "_scale_is_known", False)
        scale = max(found, old) if self._scale_is_known else (found or 1.0)
        self._scale_is_known = self._scale_is_known or found > 0
        self.policy.sync(scale, memory.has_terminated or bool(self.policy.world_model.can_terminate))
        self.logger.record("world_model/return_scale", scale)

    def _draw(self) -> tuple["_Sequences", "_Sequences", "_Frozen"]:
        """
        Draw what the phases up to the next sync learn from.

        Until then the frozen copies are functions of the observation alone, so they are evaluated once per distinct
        observation and not once per visit: most of an update's arithmetic would be theirs.

        :return: Sequences of phase A and of phase B, and what the frozen copies say of their observations
        """
        n = self.sync_interval * self.batch_size
        model_batch = self.replay_buffer.sample(n, self.horizon, self._rng)
        policy_batch = self.replay_buffer.sample(n, self.n_step_returns, self._rng)
        n_model = model_batch.states.size
        states, rows = np.unique(
            np.concatenate([model_batch.states.ravel(), policy_batch.states.ravel()]), return_inverse=True
        )
        sequences = [
            _Sequences(batch, part.reshape(batch.states.shape), self.policy, self.device)
            for batch, part in ((model_batch, rows[:n_model]), (policy_batch, rows[n_model:]))
        ]
        return sequences[0], sequences[1], self._evaluate_frozen(states)

    def _observations(self, states: np.ndarray) -> Any:
        """:return: Observations in memory, as the policy takes them"""
        return obs_as_tensor(self.replay_buffer.observations_at(states, self._vec_normalize_env), self.device)

    @th.no_grad()
    def _evaluate_frozen(self, states: np.ndarray) -> "_Frozen":
        """``v(o) = (s_old / s) E_{a ~ pi_bar} min_k Q_bar_k(h_bar(o), a)``, by one sample or exactly."""
        policy, bar, parts = self.policy, self.policy.bar, []
        for piece in _pieces(len(states)):
            z = policy.encode_bar(self._observations(states[piece]))
            anchor = bar.prior(z)
            a = None if bar.codec.enumerable else bar.codec.sample(anchor, self._noise(len(z)))[0]
            parts.append((z, policy.bar_ratio * bar.expected_value(z, anchor, a), anchor))
        return _Frozen(*(th.cat(column) for column in zip(*parts, strict=True)))

    def _noise(self, n: int) -> th.Tensor:
        return self.policy.world_model.codec.noise((n,), self._generator).to(self.device)

    def _fit_world_model(self, batch: "_Sequences", frozen: "_Frozen") -> None:
        """Phase A: train encoder, dynamics, outcome heads and the model-based value."""
        policy, bins, total = self.policy, self.policy.world_model.bins, _Means()
        learned = policy.model_optimizer.param_groups[0]["params"]
        alive = alive_mask(batch.terminated, batch.truncated)
        for columns in self._updates():
            rows = batch.rows[:, columns]
            targets = ModelTargets(
                frozen.z[rows[1:]],
                two_hot(batch.rewards[:, columns] / policy.return_scale, bins),
                batch.terminated[:, columns],
                two_hot(frozen.value[rows], bins),
                alive[:, columns],
            )
            z = policy.encode(self._observations(batch.states[0, columns]))
            loss, parts = world_model_loss(policy.world_model, z, batch.actions[:, columns], targets)
            policy.model_optimizer.zero_grad()
            loss.backward()
            norm = th.nn.utils.clip_grad_norm_(learned, self.max_grad_norm)
            policy.model_optimizer.step()
            total.add(grad_norm=norm, **parts)
        for name, value in total.items():
            self._record_finite(f"world_model/{name}", value)

    def _updates(self) -> Iterator[slice]:
        """:return: The columns that each update of a phase learns from"""
        for i in range(self.sync_interval):
            yield slice(i * self.batch_size, (i + 1) * self.batch_size)

    def _improve_policy(self, batch: "_Sequences", frozen: "_Frozen") -> None:
        """Phase B: one critic and policy update per credit, on the encoder as it now is."""
        policy, model, total = self.policy, self.policy.world_model, _Means()
        learned = policy.optimizer.param_groups[0]["params"]
        model.trunk.requires_grad_(False)
        prepared = self._prepare_improvement(batch, frozen)
        noise = prepared.z if model.codec.enumerable else self._noise(len(prepared.z))
        for columns in self._updates():
            part = prepared.columns(columns)
            value_loss, bonus = self._critic_step_loss(part)
            ent_coef, kl_coef = policy.log_ent_coef.exp().detach(), policy.log_kl_coef.exp().detach()
            q_range = policy.q_range.clamp_min(_MIN_Q_RANGE)
            terms = policy_terms(model, part.z, part.anchor, noise[columns], q_range, ent_coef)
            policy_loss = trust_region_loss(terms, self.target_kl, kl_coef)
            loss = value_loss + policy_loss + self._coef_loss(terms)
            policy.optimizer.zero_grad()
            policy.coef_optimizer.zero_grad()
            loss.backward()
            th.nn.utils.clip_grad_norm_(learned, self.max_grad_norm)
            policy.optimizer.step()
            self._step_coefs()
            self._n_updates += 1
            total.add(
                loss=loss, value_loss=value_loss, policy_gradient_loss=policy_loss, entropy_loss=-terms.entropy.mean(),
                approx_kl=terms.kl.mean(), clip_fraction=(terms.kl >= (self.target_kl or np.inf)).float().mean(), **bonus,
            )  # fmt: skip
        model.trunk.requires_grad_(True)
        self._log_improvement(total)

    @th.no_grad()
    def _prepare_improvement(self, batch: "_Sequences", frozen: "_Frozen") -> "_Prepared":
        """All of phase B that its updates don't change: latents, features, TD targets, the anchor policy, the gap."""
        model = self.policy.world_model
        rewards = batch.rewards / self.policy.return_scale
        n_step = n_step_return(rewards, batch.terminated, batch.truncated, self.gamma)
        bootstrap = frozen.value[batch.rows.gather(0, n_step.steps.unsqueeze(0)).squeeze(0)]
        target = n_step.rewards + n_step.discount * bootstrap
        self._update_q_range(target)
        next_value = rewards[0] + self.gamma * (1 - batch.terminated[0]) * frozen.value[batch.rows[1]]
        parts = []
        for piece in _pieces(len(target)):
            z = self.policy.encode(self._observations(batch.states[0, piece]))
            f = model.features(z, batch.actions[0, piece]) if self.bonus_coef > 0 or not model.codec.enumerable else z
            gap = self._gap(next_value[piece], f) if self.bonus_coef > 0 else target[piece]
            parts.append((z, f, gap))
        z, f, gap = (th.cat(column) for column in zip(*parts, strict=True))
        chosen = None
        if not isinstance(model.codec, GaussianActions) and model.codec.enumerable:
            chosen = (batch.actions[0] @ model.codec.joint_inputs.T).argmax(-1)
        return _Prepared(z, f, target, frozen.anchor[batch.rows[0]], gap, chosen)

    def _gap(self, q_mf: th.Tensor, f: th.Tensor) -> th.Tensor:
        """:return: ``|Q_mf - Q_mb|``, whose running median is kept"""
        model, median = self.policy.world_model, self.policy.gap_median
        next_z, reward_logits, termination_logit = model.outcome(f)
        going_on = 1 - th.sigmoid(termination_logit) * model.can_terminate
        gap = (q_mf - decode(reward_logits, model.bins) - self.gamma * going_on * model.value(next_z)).abs()
        median += 0.1 * (gap.median() - median)
        return gap

    def _update_q_range(self, values: th.Tensor) -> None:
        """Running 5-95 percentile range, as TD-MPC2's scale but once per sync: 0.7 is 128 updates at its rate of 0.01."""
        quantiles = th.tensor([0.05, 0.95], device=values.device)
        low, high = th.quantile(values, quantiles)
        self.policy.q_range += 0.7 * (high - low - self.policy.q_range)

    def _critic_step_loss(self, part: "_Prepared") -> tuple[th.Tensor, dict[str, th.Tensor]]:
        model = self.policy.world_model
        if part.chosen is None:
            logits = model.critic_logits(part.f)
        else:
            rows = th.arange(len(part.chosen), device=part.z.device)
            logits = model.critic_logits(part.z)[:, rows, part.chosen]
        target, logged = part.target, {}
        beta = self.bonus_coef * self._current_progress_remaining
        if beta > 0:
            td_error = target - decode(logits.detach(), model.bins).mean(0)
            bonus = discrepancy_bonus(part.gap, self.policy.gap_median, td_error, beta)
            target = target + bonus
            logged = {"gap": part.gap.mean(), "bonus_abs": bonus.abs().mean()}
        return critic_loss(logits, two_hot(target, model.bins)), logged

    def _coef_loss(self, terms: PolicyTerms) -> th.Tensor:
        """The multiplier ascends on ``kl - eps``, the temperature descends on the entropy's excess."""
        policy = self.policy
        excess = (terms.entropy - policy.world_model.codec.target_entropy).mean().detach()
        loss = policy.log_ent_coef.exp() * excess if isinstance(self.ent_coef, str) else 0.0 * policy.log_ent_coef
        if self.target_kl is not None:
            loss = loss - policy.log_kl_coef.exp() * (terms.kl.mean().detach() - self.target_kl)
        return loss.squeeze()

    def _step_coefs(self) -> None:
        policy = self.policy
        policy.coef_optimizer.step()
        with th.no_grad():
            policy.log_kl_coef.clamp_(*np.log(_KL_COEF_RANGE))
            if isinstance(self.ent_coef, str):
                policy.log_ent_coef.clamp_(*np.log(_ENT_COEF_RANGE))

    def _log_improvement(self, total: "_Means") -> None:
        for name, value in total.items():
            prefix = "exploration" if name in ("gap", "bonus_abs") else "train"
            self._record_finite(f"{prefix}/{name}", value)
        self.logger.record("train/ent_coef", self.policy.log_ent_coef.exp().item())
        self.logger.record("train/kl_coef", self.policy.log_kl_coef.exp().item())

    def _record_finite(self, key: str, value: float) -> None:
        """
        :raises ValueError: if the value diverged; rl-zoo3 prunes a trial on it
        """
        if not np.isfinite(value):
            raise ValueError(
                f"Training diverged: {key}={value} after {self._n_updates} updates. Lower learning_rate or utd_ratio; "
                "the last saved checkpoint is unaffected"
            )
        self.logger.record(key, value)

    # ----------------------------------------------------- planning and saving

    def set_planning(self, samples: int | None = 64, iterations: int = 2, milliseconds: float | None = None) -> PlanningSwitch:
        """
        Let the predictions that follow plan, or not: see :meth:`WorldModelPolicy.set_planning`.

        :return: A context manager that restores what was before
        """
        return self.policy.set_planning(samples, iterations, milliseconds)

    def save_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase) -> None:
        """
        Save the replay memory as a pickle file.

        :param path: Path to the file, or a file
        """
        save_to_pkl(path, self.replay_buffer, self.verbose)

    def load_replay_buffer(self, path: str | pathlib.Path | io.BufferedIOBase, truncate_last_traj: bool = True) -> None:
        """
        Load a replay memory.

        :param path: Path to the pickled memory, or a file
        :param truncate_last_traj: Whether the newest trajectories end where they were saved; if False, they continue
            with the next collected step
        :raises ValueError: if the file holds no memory of these spaces and this number of environments
        """
        memory = load_from_pkl(path, self.verbose)
        if not isinstance(memory, ReplayMemory):
            raise ValueError(f"{path} holds a {type(memory).__name__}, not a ReplayMemory saved by save_replay_buffer()")
        mine = self.rollout_buffer.memory
        if memory.spaces != mine.spaces or memory.action_dim != mine.action_dim:
            raise ValueError(f"The memory's spaces {memory.spaces} are not the model's {mine.spaces}")
        if memory.n_envs != self.n_envs:
            raise ValueError(
                f"The memory was saved with {memory.n_envs} environments, the model has {self.n_envs}: "
                "use as many, or continue without the memory"
            )
        if truncate_last_traj:
            memory.cut()
        self.rollout_buffer.memory = memory

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_generator", "_rng"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer", "policy.model_optimizer", "policy.coef_optimizer"], []


class _Frozen(NamedTuple):
    """
    What the frozen copies say of each distinct observation.

    :param z: ``h_bar(o)``, shape ``(n, latent_dim)``
    :param value: In today's scaled units, shape ``(n,)``
    :param anchor: Parameters of ``pi_bar``, shape ``(n, params_dim)``
    """

    z: th.Tensor
    value: th.Tensor
    anchor: th.Tensor


class _Sequences:
    """
    A :class:`SequenceBatch` as tensors: model inputs for actions, reward units for rewards.

    :param rows: Where each observation's frozen evaluation stands, shape ``(length + 1, batch)``
    """

    def __init__(self, batch: SequenceBatch, rows: np.ndarray, policy: WorldModelPolicy, device: th.device):
        self.states = batch.states
        self.rows = th.as_tensor(rows, device=device)
        self.rewards, self.terminated, self.truncated = (
            th.as_tensor(x, device=device) for x in (batch.rewards, batch.terminated, batch.truncated)
        )
        length, size = batch.rewards.shape
        actions = th.as_tensor(batch.actions, device=device).flatten(0, 1)
        self.actions = policy.world_model.codec.to_input(actions).view(length, size, -1)


class _Prepared(NamedTuple):
    """What the updates of phase B read, one row per sample; ``chosen`` is the joint action's index, if enumerable."""

    z: th.Tensor
    f: th.Tensor
    target: th.Tensor
    anchor: th.Tensor
    gap: th.Tensor
    chosen: th.Tensor | None

    def columns(self, rows: slice) -> "_Prepared":
        """:return: Some of the samples"""
        chosen = None if self.chosen is None else self.chosen[rows]
        return _Prepared(self.z[rows], self.f[rows], self.target[rows], self.anchor[rows], self.gap[rows], chosen)


class _Means:
    """Running means of logged tensors, read once at the end."""

    def __init__(self) -> None:
        self._sums: dict[str, th.Tensor] = {}
        self._count = 0

    def add(self, **values: th.Tensor) -> None:
        """Add one update's values."""
        self._count += 1
        for name, value in values.items():
            value = value.detach()
            self._sums[name] = self._sums[name] + value if name in self._sums else value

    def items(self) -> list[tuple[str, float]]:
        """:return: Names and means"""
        return [(name, (value / self._count).item()) for name, value in self._sums.items()]


def _pieces(n: int) -> Iterator[slice]:
    """:return: Slices of ``range(n)`` whose activations stay in the processor's cache"""
    return (slice(start, min(start + _PIECE, n)) for start in range(0, n, _PIECE))


def _copy(obs: Observations) -> Observations:
    return {key: x.copy() for key, x in obs.items()} if isinstance(obs, dict) else obs.copy()


def _put(obs: Observations, index: int, value: Any) -> None:
    if isinstance(obs, dict):
        for key, x in obs.items():
            x[index] = value[key]
    else:
        obs[index] = value
