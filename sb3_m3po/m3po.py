"""M3PO: when experience is collected, and when the model, the critics and the policy learn from it."""

import io
import pathlib
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.on_policy_algorithm import OnPolicyAlgorithm
from stable_baselines3.common.policies import BasePolicy
from stable_baselines3.common.save_util import load_from_pkl, save_to_pkl
from stable_baselines3.common.type_aliases import GymEnv, MaybeCallback, Schedule
from stable_baselines3.common.utils import LinearSchedule, explained_variance, obs_as_tensor
from stable_baselines3.common.vec_env import VecEnv

from sb3_m3po.actions import PersistentNoise
from sb3_m3po.buffers import HybridDictRolloutBuffer, HybridRolloutBuffer
from sb3_m3po.checks import (
    begun_anew_after_errors,
    check_capacity,
    check_classes,
    check_environment,
    check_memory,
    check_numbers,
    check_statistics,
    check_step,
    dead_workers_named,
    initial_ent_coef,
    known_ent_coef,
    made_environment,
    warn_of_no_update,
    warn_of_reward_normalisation,
)
from sb3_m3po.discount import common_time_limit
from sb3_m3po.growth import check_growth, misfits_explained, take_over
from sb3_m3po.learner import Learner
from sb3_m3po.memory import ReplayMemory
from sb3_m3po.observations import Observations, copied, original_observations, put
from sb3_m3po.planning import PlanningSwitch
from sb3_m3po.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, WorldModelPolicy
from sb3_m3po.task_stats import TaskEpisodeStats, make_room
from sb3_m3po.tasks import TaskTable, find_tasks

SelfM3PO = TypeVar("SelfM3PO", bound="M3PO")


class M3PO(OnPolicyAlgorithm):
    """
    Massively Multi-Task Model-Based Policy Optimization (M3PO, arXiv 2506.21782).

    An implicit world model, planning, a discrepancy bonus and a trust-region policy step, learning from a replay memory
    behind the rollout buffer. See the documentation's M3PO page for the equations.

    :param policy: The policy model to use (MlpPolicy, CnnPolicy, MultiInputPolicy, or a subclass of WorldModelPolicy)
    :param env: The environment to learn from (if registered in Gym, can be str)
    :param learning_rate: The learning rate, or a function of the progress remaining; by default it falls from 2e-3 to 2e-4
    :param n_steps: Decisions per environment and rollout (``rollout_buffer.buffer_size``); ``None``: ``max(1, 256 // n_envs)``
    :param batch_size: Samples per update
    :param utd_ratio: Updates per collected transition
    :param sync_interval: Updates between two syncs of the frozen copies
    :param gamma: Discount factor; ``"auto"``: see :func:`~sb3_m3po.discount.gamma_for`, and ``policy.gammas`` for its value
    :param gae_lambda: Only shapes ``rollout_buffer.returns`` and the logged ``explained_variance``
    :param n_step_returns: Rewards summed in the critics' target before they bootstrap
    :param horizon: Steps that the world model is unrolled in training
    :param buffer_size: Transitions in the replay memory, over all environments
    :param learning_starts: Transitions before the first update; ``None``: 1,000 with five episodes (of each task), or 5,000
    :param target_kl: Trust region: bound of the KL divergence per state from the policy of the last sync, in nats;
        ``None`` for no bound
    :param ent_coef: Entropy coefficient; ``"auto"`` learns it (from 0.1 on for Box, from 1 on for discrete actions),
        ``"auto_0.3"`` from 0.3 on
    :param bonus_coef: Weight of the discrepancy bonus, falling to 0 over training
    :param plan_rollouts: Share of episodes that are planned while collecting; ``None``: all of Box, half of Discrete actions
    :param planner_kwargs: ``n_samples, horizon, n_iterations, n_effective, min_std`` of the planner,
        see :class:`~sb3_m3po.planner.PlannerConfig`
    :param task_key: Key of the task's id in a Dict observation; without it, or for ``None``, there is a single task
    :param n_tasks: Length of the one-hot of the task that ends a vector observation; ``None`` if there is none
    :param max_grad_norm: The maximum value for the gradient clipping
    :param use_sde: Not supported, must be False
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
    :raises ValueError: for an argument or a space that can't work (a nested one: NotImplementedError); it names what to do
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
        learning_rate: float | Schedule = LinearSchedule(2e-3, 2e-4, 1.0),
        n_steps: int | None = None,
        batch_size: int = 128,
        utd_ratio: float = 1.0,
        sync_interval: int = 128,
        gamma: float | str = "auto",
        gae_lambda: float = 0.95,
        n_step_returns: int = 3,
        horizon: int = 3,
        buffer_size: int = 1_000_000,
        learning_starts: int | None = None,
        target_kl: float | None = 1.0,
        ent_coef: str | float = "auto",
        bonus_coef: float = 0.0,
        plan_rollouts: bool | float | None = None,
        planner_kwargs: dict[str, Any] | None = None,
        task_key: str | None = "task",
        n_tasks: int | None = None,
        max_grad_norm: float = 20.0,
        use_sde: bool = False,
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
            made_environment(env, verbose),  # type: ignore[arg-type]
            learning_rate=learning_rate,
            n_steps=n_steps,  # type: ignore[arg-type]
            gamma=gamma,  # type: ignore[arg-type]
            gae_lambda=gae_lambda,
            ent_coef=ent_coef,  # type: ignore[arg-type]
            vf_coef=1.0,
            max_grad_norm=max_grad_norm,
            use_sde=use_sde,
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
        self.task_key = task_key
        self.n_tasks = n_tasks
        self._n_frozen_tasks = 0  # while only new tasks learn: how many came before them
        self._task_stats: TaskEpisodeStats | None = None
        self._time_limit: int | None = None  # of the environments it was made for, in decisions
        self._update_credits = 0.0  # updates that collected transitions have paid for and that are still due
        self._warned_of_reward_normalisation = False
        if _init_setup_model:
            self._setup_model()

    # ----------------------------------------------------------------- set up

    def _setup_model(self) -> None:
        if self.plan_rollouts is None:
            self.plan_rollouts = isinstance(space := self.action_space, spaces.Box) or 0.5 * isinstance(space, spaces.Discrete)
        self.ent_coef = known_ent_coef(self.ent_coef)  # type: ignore[assignment]
        check_classes(self)
        check_numbers(self)
        self._setup_lr_schedule()
        # Without a seed they follow the global generators, as all else in SB3 does
        self._rng = np.random.default_rng(np.random.randint(2**31))
        self._generator = th.Generator().manual_seed(int(th.randint(2**31, ())))
        self.set_random_seed(self.seed)
        self.rollout_buffer_class = buffer_class = self.rollout_buffer_class or (
            HybridDictRolloutBuffer if isinstance(self.observation_space, spaces.Dict) else HybridRolloutBuffer
        )
        if self.env is not None:  # its spaces are the model's, its time limits its own
            with dead_workers_named(self.env):
                self.observation_space, self._time_limit = self.env.observation_space, common_time_limit(self.env)
        check_capacity(self, self.n_envs)
        tasks = find_tasks(self.observation_space, self.task_key, self.n_tasks)
        self.rollout_buffer = buffer_class(  # type: ignore[assignment]
            self.n_steps or max(1, 256 // self.n_envs),
            self.observation_space,  # type: ignore[arg-type]
            self.action_space,
            device=self.device,
            gae_lambda=self.gae_lambda,
            n_envs=self.n_envs,
            **{"memory_size": self.buffer_size, "tasks": tasks, **self.rollout_buffer_kwargs},
        )
        self.replay_buffer.warn_if_too_large()
        self.policy = self.policy_class(  # type: ignore[assignment]
            self.observation_space,
            self.action_space,
            self.lr_schedule,
            gamma=self.gamma,
            time_limit=self._time_limit,
            planner_kwargs=self.planner_kwargs,
            task_key=self.task_key,
            n_tasks=self.n_tasks,
            **self.policy_kwargs,
        ).to(self.device)
        self.policy.generator = self._generator
        if self._n_frozen_tasks:
            self.policy.train_new_tasks_only(self._n_frozen_tasks)
        codec = self.policy.world_model.codec
        self._exploration_noise = PersistentNoise(codec.noise_dim)
        self._plans = np.zeros(self.n_envs, bool)  # whether the episode that each environment is in is planned
        self.policy.log_ent_coef.data.fill_(np.log(max(initial_ent_coef(self.ent_coef, codec.ent_coef), 1e-30)))

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
        """Batches are large enough for either device."""

    @property
    def task_table(self) -> TaskTable | None:
        """:return: The tasks by their ids, ``None`` for a model of a single task"""
        return None if self.policy.tasks is None else self.policy.tasks.table

    @property
    def replay_buffer(self) -> ReplayMemory:
        """:return: The replay memory inside the rollout buffer, under the name that callbacks look for"""
        return self.rollout_buffer.memory

    # ---------------------------------------------------------------- collect

    def _setup_learn(
        self,
        total_timesteps: int,
        callback: MaybeCallback = None,
        reset_num_timesteps: bool = True,
        tb_log_name: str = "run",
        progress_bar: bool = False,
    ) -> tuple[int, BaseCallback]:
        if reset_num_timesteps or self._last_obs is None:
            # The environments are about to be reset
            self.rollout_buffer.memory.cut()
        if self._vec_normalize_env is not None:
            check_statistics(self._vec_normalize_env)
            self._warned_of_reward_normalisation |= warn_of_reward_normalisation(self)
        if self.task_table is not None and (reset_num_timesteps or self._task_stats is None):
            self._task_stats = TaskEpisodeStats(self.task_table.names, self._stats_window_size)
        with dead_workers_named(self):
            result = super()._setup_learn(total_timesteps, callback, reset_num_timesteps, tb_log_name, progress_bar)
        if self._vec_normalize_env is not None:
            self._last_original_obs = original_observations(self.env, self._vec_normalize_env)  # type: ignore[assignment]
        check_step(self, self._last_obs, None, np.zeros(self.n_envs, bool), [])  # type: ignore[arg-type]
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
        """
        Learn, as :meth:`PPO.learn <stable_baselines3.ppo.PPO.learn>` does; the replay memory is kept between calls.

        :param total_timesteps: Environment steps to collect at least, over all environments
        :param callback: Callback(s) called at every step with the state of the algorithm
        :param log_interval: Rollouts between two logs
        :param tb_log_name: Name of the run for TensorBoard logging
        :param reset_num_timesteps: Whether to count the steps (and the schedules) from zero
        :param progress_bar: Display a progress bar using tqdm and rich
        :return: The trained model
        :raises ValueError: for NaN or infinite observations and rewards, and when training diverges
        """
        with begun_anew_after_errors(self):
            super().learn(total_timesteps, callback, log_interval, tb_log_name, reset_num_timesteps, progress_bar)
        warn_of_no_update(self)
        return self

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

        :param env: The training environment
        :param callback: Callback that will be called at each step (and at the beginning and end of the rollout)
        :param rollout_buffer: Buffer to fill
        :param n_rollout_steps: Number of experiences to collect per environment; ``None`` for the buffer's size
        :return: False if the callback ended training
        """
        assert self._last_obs is not None, "No previous observation was provided"
        self.policy.set_training_mode(False)  # this affects batch norm / dropout
        n_steps, n_rollout_steps = 0, n_rollout_steps or rollout_buffer.buffer_size
        rollout_buffer.reset()
        callback.on_rollout_start()

        while n_steps < n_rollout_steps:
            with th.no_grad():
                obs_tensor = obs_as_tensor(self._last_obs, self.device)  # type: ignore[arg-type]
                action_tensor, values, log_probs = self._act(obs_tensor)
            actions = action_tensor.cpu().numpy()
            clipped_actions = actions
            if isinstance(self.action_space, spaces.Box):
                clipped_actions = self.policy.unscale_action(actions)

            new_obs: Any  # for VecEnv it may be a tuple too, which M3PO refuses at construction
            with dead_workers_named(self):
                new_obs, rewards, dones, infos = env.step(clipped_actions)
            check_step(self, new_obs, rewards, dones, infos)
            self.num_timesteps += env.num_envs

            # Give access to local variables
            callback.update_locals(locals())
            if not callback.on_step():
                # What was played is not lost, and a continued training starts where the environments are
                self._remember(actions, new_obs, rewards, dones, infos)
                self._last_obs, self._last_episode_starts = new_obs, dones
                return False

            self._update_info_buffer(infos, dones)
            n_steps += 1
            rewards = self._remember(actions, new_obs, rewards, dones, infos)
            actions = actions.reshape(env.num_envs, -1)  # in case of discrete actions
            rollout_buffer.add(self._last_obs, actions, rewards, self._last_episode_starts, values, log_probs)  # type: ignore[arg-type]
            self._last_obs = new_obs  # type: ignore[assignment]
            self._last_episode_starts = dones

        with th.no_grad():
            values = self.policy.predict_values(obs_as_tensor(new_obs, self.device))  # type: ignore[arg-type]
        # Of the tasks as they now are: only what is logged depends on it
        rollout_buffer.gamma = self.policy.of_task(self.policy.gammas, self._last_obs).cpu().numpy()  # type: ignore[assignment]
        rollout_buffer.compute_returns_and_advantage(last_values=values, dones=dones)
        self.policy.observe(rollout_buffer.observations)
        callback.update_locals(locals())
        callback.on_rollout_end()
        return True

    def _act(self, obs_tensor: Any) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        """:return: Actions, values and log-probabilities under whatever chose the actions"""
        codec, starts = self.policy.world_model.codec, np.asarray(self._last_episode_starts)
        slowness = self.policy.of_task(self.policy.lag_correlation, obs_tensor).expand(self.n_envs)
        memory = [codec.noise_persistence(value) for value in slowness.tolist()]
        noise = codec.noise_from_normal(self._exploration_noise.draw(starts, memory, self._generator))
        # Others by the policy alone: where plans always save it, it never meets what its own mistakes lead to
        self._plans = np.where(starts, self._rng.random(len(starts)) < self.plan_rollouts, self._plans)  # type: ignore[operator]
        if not (self._plans.any() and self._n_updates > 0):
            return self.policy(obs_tensor, noise=noise)
        actions, values, log_probs, planned = self.policy.act_by_plan(obs_tensor, noise, self._plans)
        self.logger.record_mean("exploration/planner_kl", planned.kl.mean().item())
        self.logger.record_mean("exploration/planner_gain", planned.gain.mean().item())
        return actions, values, log_probs

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
            next_obs, rewards = original_observations(self.env, vec_normalize), vec_normalize.get_original_reward()
            self._last_original_obs = next_obs  # type: ignore[assignment]
        truncated = np.array([done and infos[i].get("TimeLimit.truncated", False) for i, done in enumerate(dones)], bool)
        rollout_rewards = np.array(rewards, dtype=np.float32)
        ended = [i for i in np.flatnonzero(dones).tolist() if infos[i].get("terminal_observation") is not None]
        if ended:
            next_obs = copied(next_obs)
            for i in ended:
                final = infos[i]["terminal_observation"]
                if truncated[i]:
                    last = self.policy.obs_to_tensor(final)[0]
                    with th.no_grad():
                        value = self.policy.predict_values(last).item()
                    rollout_rewards[i] += self.policy.of_task(self.policy.gammas, last).item() * value
                put(next_obs, i, final if vec_normalize is None else vec_normalize.unnormalize_obs(final))
        self.replay_buffer.add(obs, actions, rewards, next_obs, np.asarray(dones, bool) & ~truncated, truncated)
        self._update_credits += self.utd_ratio * self.n_envs
        return rollout_rewards

    def _update_info_buffer(self, infos: list[dict[str, Any]], dones: np.ndarray | None = None) -> None:
        super()._update_info_buffer(infos, dones)
        if self._task_stats is not None and dones is not None and self.policy.tasks is not None:
            self._task_stats.update(infos, dones, self.policy.tasks.ids(self._last_obs))

    def dump_logs(self, iteration: int = 0) -> None:
        """
        Write log.

        :param iteration: Current logging iteration
        """
        if self._task_stats is not None:
            self._task_stats.record(self.logger)
        super().dump_logs(iteration)

    # ------------------------------------------------------------------ train

    def train(self) -> None:
        """Spend the updates that are due, ``sync_interval`` at a time: sync, fit the world model, improve the policy."""
        self._update_learning_rates()
        if not isinstance(self.ent_coef, str):
            self.policy.log_ent_coef.data.fill_(np.log(max(self.ent_coef, 1e-30)))  # whatever a loaded model has learned
        returns, values = self.rollout_buffer.returns.flatten(), self.rollout_buffer.values.flatten()
        self.logger.record("train/explained_variance", explained_variance(values, returns))
        # Of what has not been learned yet: a trained policy may run more smoothly
        unknown = self.policy.lag_correlation == 0 if self._n_updates else slice(None)
        self.policy.lag_correlation[unknown] = th.as_tensor(self.replay_buffer.lag_correlation()).float()[unknown]
        while self._update_credits >= self.sync_interval and self.replay_buffer.is_enough(self.learning_starts):
            self._update_credits -= self.sync_interval
            self._sync()
            self._n_updates += self.sync_interval
            for name, value in self._learner().run(self.sync_interval).items():
                self._record_finite(name, value)
        self.logger.record("train/n_updates", self._n_updates, exclude="tensorboard")

    def _update_current_progress_remaining(self, num_timesteps: int, total_timesteps: int) -> None:
        super()._update_current_progress_remaining(num_timesteps, total_timesteps)
        # The last rollout may end beyond the budget, where rl-zoo3's "lin_" rate would be negative: updates uphill
        self._current_progress_remaining = max(self._current_progress_remaining, 0.0)

    def _update_learning_rates(self) -> None:
        self._update_learning_rate(self.policy.optimizer)
        for group in self.policy.model_optimizer.param_groups + self.policy.coef_optimizer.param_groups:
            group["lr"] = group["speed"] * self.lr_schedule(self._current_progress_remaining)

    def _sync(self) -> None:
        """Copy the networks to their bars and move to the return scales of what is in memory."""
        memory, policy, table = self.replay_buffer, self.policy, self.task_table
        policy.sync(memory.return_scale, memory.has_terminated)
        make_room(self.logger, [] if table is None else table.names)
        for task, scale in enumerate(policy.return_scale.tolist()):
            where = "world_model" if table is None else f"world_model/{table[task].name}"
            self.logger.record(f"{where}/return_scale", scale)

    def _learner(self) -> Learner:
        return Learner.of(self)

    def _record_finite(self, key: str, value: float) -> None:
        """
        :raises ValueError: if the value diverged; rl-zoo3 prunes a trial on it
        """
        if not np.isfinite(value):
            raise ValueError(
                f"Training diverged: {key}={value} after {self._n_updates} updates. Lower learning_rate or utd_ratio; "
                "the last saved checkpoint is unaffected"
            )
        # One call of train() may cover several sync periods; of a coefficient the newest value tells more than their mean
        (self.logger.record if key.endswith("_coef") else self.logger.record_mean)(key, value)

    # ----------------------------------------------- environments, new tasks

    @classmethod
    def load(  # type: ignore[override]
        cls: type[SelfM3PO], path: str | pathlib.Path | io.BufferedIOBase, env: GymEnv | None = None, *args: Any, **kwargs: Any
    ) -> SelfM3PO:
        """
        Load the model from a zip-file, as SB3's other algorithms do. The replay memory is a file of its own.

        :param path: Path to the file, or a file
        :param env: The new environment to run the loaded model on
        :param args: See :meth:`BaseAlgorithm.load <stable_baselines3.common.base_class.BaseAlgorithm.load>`
        :param kwargs: Likewise; extra arguments to change the model
        :return: New model instance with loaded parameters
        :raises ValueError: if the environment does not fit the model, with the reason
        """
        with misfits_explained(path, env):
            return super().load(path, env, *args, **kwargs)

    def set_env(self, env: GymEnv, force_reset: bool = True) -> None:
        """
        Set the environment, of the same spaces and tasks; discounts that follow time limits follow its own.

        :param env: The environment for learning a policy
        :param force_reset: Force call to ``reset()`` before training
        :raises ValueError: if the environment does not fit the model, with the reason
        """
        with misfits_explained(self, env), dead_workers_named(self):
            super().set_env(env, force_reset)
            self.observation_space, self._time_limit = self.env.observation_space, common_time_limit(self.env)  # type: ignore[arg-type, union-attr]
        self.policy.set_time_limit(self._time_limit, self.observation_space)

    def add_tasks(self, env: GymEnv, train: str = "all") -> None:
        """
        Take in new tasks and go on with their environments; the replay memory begins anew.

        The embedding of a new task starts as the mean of the known ones.

        :param env: Environments whose task table begins with this model's and goes on with the new tasks, of the same
            widths: ``make_multitask_vec_env(tasks, like=model)``. They may be of the new tasks only, or of known ones too
        :param train: ``"all"``, or ``"new"`` to let only the new embeddings and the networks' output layers learn
        :raises ValueError: if the tasks do not fit, with the reason
        """
        check_environment([env] if isinstance(env, str) else env, "make_multitask_vec_env(tasks, like=model)")
        env = self._wrap_env(env, self.verbose)
        check_growth(self, env, train)
        old = self.policy
        self._n_frozen_tasks = len(old.tasks.table) if train == "new" and old.tasks is not None else 0
        self.observation_space, self.n_envs = env.observation_space, env.num_envs
        super().set_env(env)
        self._setup_model()
        self._task_stats = None
        take_over(self.policy, old)

    # ----------------------------------------------------- planning and saving

    def set_planning(self, samples: int | None = 64, iterations: int = 2, milliseconds: float | None = None) -> PlanningSwitch:
        """
        Let the predictions that follow plan, or not: see :meth:`~sb3_m3po.planning.PlanningPolicy.set_planning`. Not saved.

        :param samples: Action sequences per iteration; 0, ``None`` or ``False`` switches planning off, ``True`` means 64
        :param iterations: Rounds of drawing
        :param milliseconds: Iterate for so long, instead of ``iterations`` rounds
        :return: A context manager that restores what was before
        :raises ValueError: for a budget that is negative, or no time at all
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
        Load a replay memory. Its capacity holds, not ``buffer_size``.

        :param path: Path to the pickled memory, or a file
        :param truncate_last_traj: Whether the newest trajectories end where they were saved, or go on with the next step
        :raises ValueError: if the file holds no memory of these spaces and this number of environments
        """
        memory = load_from_pkl(path, self.verbose)
        check_memory(memory, self.replay_buffer, path)
        if truncate_last_traj:
            memory.cut()
        self.rollout_buffer.memory = memory

    def _excluded_save_params(self) -> list[str]:
        return [*super()._excluded_save_params(), "_generator", "_rng", "_exploration_noise", "_plans"]

    def _get_torch_save_params(self) -> tuple[list[str], list[str]]:
        return ["policy", "policy.optimizer", "policy.model_optimizer", "policy.coef_optimizer"], []
