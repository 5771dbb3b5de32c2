"""Callbacks that know of tasks."""

import os
import warnings
from collections.abc import Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.vec_env import VecEnv, sync_envs_normalization

from sb3_m3po.evaluation import TaskScores, check_bounds, evaluate_per_task
from sb3_m3po.task_stats import TaskEpisodeStats, make_room
from sb3_m3po.tasks import reader_for


class TaskEvalCallback(EvalCallback):
    """
    SB3's ``EvalCallback`` over tasks: scores of each of them, and the best model by the interquartile mean of all, or by the
    plain mean where that is the same.

    Logs ``eval/<task>/mean_reward``, ``eval/<task>/success_rate`` (of tasks that say so), ``eval/mean_reward``,
    ``eval/mean_ep_length``, ``eval/success_rate`` and ``eval/iqm``. In ``evaluations.npz`` it adds ``tasks``, the names, and
    ``task_results``, the mean rewards, of shape ``(n_evaluations, n_tasks)``. ``best_mean_reward`` is the best
    interquartile mean.

    :param eval_env: From :func:`~sb3_m3po.envs.make_multitask_vec_env`, or ``sb3_m3po/MultiTask-v0``
    :param callback_on_new_best: Callback to trigger when there is a new best model
    :param callback_after_eval: Callback to trigger after every evaluation
    :param n_eval_episodes: The number of episodes of each task
    :param eval_freq: Evaluate the agent every ``eval_freq`` calls of the callback
    :param log_path: Path to a folder where the evaluations (``evaluations.npz``) will be saved
    :param best_model_save_path: Path to a folder where the best model will be saved
    :param deterministic: Whether the evaluation should use deterministic actions
    :param render: Whether to render the environments during evaluation
    :param verbose: Verbosity level: 0 for no output, 1 for indicating information about evaluation results
    :param warn: Passed on to ``EvalCallback``; also whether to warn where the tasks can't be compared
    :param bounds: By task's name: the returns that count as 0 and as 1; see :attr:`TaskScores.scores
        <sb3_m3po.evaluation.TaskScores.scores>` for what is compared without them
    :param task_key: Key of the task's id in the observations; an M3PO model has its own
    :raises ValueError: when learning begins, if ``bounds`` are missing or empty, or ``eval_env`` is the training environment
    """

    def __init__(
        self,
        eval_env: gym.Env | VecEnv,
        callback_on_new_best: BaseCallback | None = None,
        callback_after_eval: BaseCallback | None = None,
        n_eval_episodes: int = 5,
        eval_freq: int = 10_000,
        log_path: str | None = None,
        best_model_save_path: str | None = None,
        deterministic: bool = True,
        render: bool = False,
        verbose: int = 1,
        warn: bool = True,
        bounds: Mapping[str, tuple[float, float]] | None = None,
        task_key: str = "task",
    ):
        super().__init__(
            eval_env,
            callback_on_new_best,
            callback_after_eval,
            n_eval_episodes,
            eval_freq,
            log_path,
            best_model_save_path,
            deterministic,
            render,
            verbose,
            warn,
        )
        self.bounds, self.task_key = bounds, task_key
        self._best = (False, -np.inf, -np.inf)
        self.evaluations_tasks: list[list[float]] = []

    def _init_callback(self) -> None:
        super()._init_callback()
        if self.eval_env.unwrapped is self.training_env.unwrapped:
            raise ValueError("eval_env is the training environment, whose episodes an evaluation breaks off: make another one")
        self.names = reader_for(self.eval_env.observation_space, self.task_key, self.model).table.names
        check_bounds(self.bounds, self.names)

    def _on_step(self) -> bool:
        if self.eval_freq <= 0 or self.n_calls % self.eval_freq != 0:
            return True
        if self.model.get_vec_normalize_env() is not None:
            sync_envs_normalization(self.training_env, self.eval_env)
        scores = evaluate_per_task(
            self.model, self.eval_env, self.n_eval_episodes, self.deterministic, self.render, self.bounds, self.task_key
        )
        self._warn_if_incomparable(scores)
        if self.log_path is not None:
            self._write(scores)
        self._log(scores)
        going_on = self._keep_if_best(scores)
        if self.callback is not None:
            going_on = going_on and self._on_event()
        return going_on

    def _warn_if_incomparable(self, scores: TaskScores) -> None:
        if self.warn and self.best_model_save_path is not None and len(scores) > 1 and not scores.are_comparable:
            warnings.warn(
                "The best model is chosen by returns as they are, which says little of tasks with unlike rewards: give "
                "bounds={task: (return that counts as 0, return that counts as 1)}",
                stacklevel=2,
            )
        self.warn = False

    def _write(self, scores: TaskScores) -> None:
        """
        Under SB3's names, with the tasks' episodes one behind another; and by task. NaN stands for the episodes of a task that
        was never drawn, and for successes that are not told.
        """
        assert self.log_path is not None
        nothing = np.full(self.n_eval_episodes, np.nan)

        def row(values: Mapping[str, np.ndarray]) -> list[float]:
            return np.concatenate([values.get(name, nothing) for name in self.names]).tolist()

        self.evaluations_timesteps.append(self.num_timesteps)
        self.evaluations_results.append(row(scores.returns))
        self.evaluations_length.append(row(scores.lengths))  # type: ignore[arg-type]
        self.evaluations_tasks.append([scores.get(name, np.nan) for name in self.names])
        self.evaluations_successes.append(row(scores.successes))  # type: ignore[arg-type]
        told = not np.isnan(self.evaluations_successes).all()
        kwargs: dict[str, Any] = {"successes": self.evaluations_successes} if told else {}
        np.savez(
            self.log_path,
            timesteps=self.evaluations_timesteps,
            results=self.evaluations_results,
            ep_lengths=self.evaluations_length,
            tasks=self.names,
            task_results=self.evaluations_tasks,
            **kwargs,
        )

    def _log(self, scores: TaskScores) -> None:
        make_room(self.logger, list(scores))
        self.last_mean_reward = float(np.mean([scores[name] for name in scores]))
        if self.verbose >= 1:
            print(f"Eval num_timesteps={self.num_timesteps}\n{scores}")
        for name in scores:
            self.logger.record(f"eval/{name}/mean_reward", scores[name])
        for name, rate in scores.success_rate.items():
            self.logger.record(f"eval/{name}/success_rate", rate)
        self.logger.record("eval/mean_reward", self.last_mean_reward)
        self.logger.record("eval/mean_ep_length", float(np.mean([length.mean() for length in scores.lengths.values()])))
        self.logger.record("eval/iqm", scores.iqm)
        if scores.successes:
            self.logger.record("eval/success_rate", float(np.mean(list(scores.success_rate.values()))))
        # Dump log so the evaluation results are printed with the correct timestep
        self.logger.record("time/total_timesteps", self.num_timesteps, exclude="tensorboard")
        self.logger.dump(self.num_timesteps)

    def _keep_if_best(self, scores: TaskScores) -> bool:
        """:return: Whether training goes on"""
        if len(scores) < len(self.names):
            # Not to be compared: a task was never drawn
            return True
        # Comparable ones count more than returns as they are, where a task tells its first success
        found = scores.are_comparable, scores.iqm, scores.mean_score
        if found <= self._best:
            return True
        self._best = found
        if self.verbose >= 1:
            print("New best interquartile mean!")
        if self.best_model_save_path is not None:
            self.model.save(os.path.join(self.best_model_save_path, "best_model"))
        self.best_mean_reward = scores.iqm
        return self.callback_on_new_best is None or self.callback_on_new_best.on_step()


class TaskStatsCallback(BaseCallback):
    """
    Give other algorithms what M3PO logs by itself: ``rollout/<task>/ep_rew_mean``, ``ep_len_mean`` and ``success_rate``.

    :param window: Episodes of each task that are looked at
    :param log_freq: Record every ``log_freq`` calls of the callback; the algorithm writes it with its next log
    :param task_key: Key of the task's id in the observations
    :param verbose: Verbosity level
    """

    def __init__(self, window: int = 100, log_freq: int = 100, task_key: str = "task", verbose: int = 0):
        super().__init__(verbose)
        self.window, self.log_freq, self.task_key = window, log_freq, task_key

    def _init_callback(self) -> None:
        self.reader = reader_for(self.training_env.observation_space, self.task_key, self.model)
        self.stats = TaskEpisodeStats(self.reader.table.names, self.window)

    def _on_step(self) -> bool:
        last_obs: Any = self.model._last_obs  # type: ignore[attr-defined]
        self.stats.update(self.locals["infos"], self.locals["dones"], self.reader.ids(last_obs))
        if self.n_calls % self.log_freq == 0:
            self.stats.record(self.logger)
        return True
