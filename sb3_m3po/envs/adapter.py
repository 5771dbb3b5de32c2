"""Gymnasium's vector environments as Stable-Baselines3's."""

from collections.abc import Iterable, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.spaces.utils import flatdim
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from gymnasium.vector.utils import iterate
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvStepReturn

from sb3_m3po.checks import check_one_hots
from sb3_m3po.discount import TIME_LIMIT, time_limit_of
from sb3_m3po.envs.action_repeat import check_count
from sb3_m3po.envs.padding import action_dim
from sb3_m3po.envs.suites import meta_world_names
from sb3_m3po.tasks import TaskSpace, TaskSpec, TaskTable

#: What tells ``gym.make_vec`` to reset in the same step
_SAME_STEP = "vector_kwargs={'autoreset_mode': gymnasium.vector.AutoresetMode.SAME_STEP}"


class VectorEnvAdapter(VecEnv):
    """
    Train on what ``gymnasium.make_vec`` returns.

    Meta-World's benchmarks (``gym.make_vec("Meta-World/MT10", vector_strategy="sync")``) hold one environment for each task:
    their observations become Dicts with the ``task``, and lose the one-hot at their end if they have one. At an
    episode's end ``info["task"]`` is the task's name, and with any vector environment ``info["is_success"]`` says whether
    ``info["success"]`` was ever 1 in it, where there is one, as with :class:`~sb3_m3po.envs.TaskWrapper`.

    :param venv: Gymnasium's vector environment
    :param n_tasks: Length of the one-hot of the task at the end of other environments' observations; they become Dicts too
    :raises ValueError: if it is something else, an environment resets too late (``AutoresetMode.NEXT_STEP``) and can't be told
        to do otherwise, or there can be no one-hot of ``n_tasks``
    """

    def __init__(self, venv: VectorEnv, n_tasks: int | None = None):
        _check_vector(venv)
        if n_tasks is not None:
            check_count("n_tasks", n_tasks, "the length of the one-hot of the task; None if there is none")
        self.venv = venv
        self._mode = _same_step(venv)
        space, self._tail = venv.single_observation_space, n_tasks or 0
        names = _benchmark_tasks(venv)
        self._tasks = None if names is None else np.arange(venv.num_envs)
        if names is not None:
            # The one-hot, if it was asked for, is longer than the observations of a single task
            self._tail = len(names) if flatdim(space) > 39 else 0
        # Both are read where a process dies, to name it
        self.task_names = names or []
        self.processes = venv.unwrapped.processes if isinstance(venv.unwrapped, AsyncVectorEnv) else []
        if self._tail or self._tasks is not None:
            space = self._with_task(space, names or [f"task{i}" for i in range(self._tail)])
        super().__init__(venv.num_envs, space, venv.single_action_space)
        self._actions: Any = None
        self._succeeded, self._tells_success = np.zeros(venv.num_envs, bool), np.zeros(venv.num_envs, bool)

    def _with_task(self, space: spaces.Space, names: list[str]) -> spaces.Dict:
        if not isinstance(space, spaces.Box) or len(space.shape) != 1 or space.shape[0] <= self._tail:
            raise ValueError(f"n_tasks={self._tail} is for vectors that end in a one-hot of the task, not {space}")
        size, actions = space.shape[0] - self._tail, action_dim(self.venv.single_action_space)
        # Without bounds, as those of make_multitask_vec_env: later tasks need not have the same
        own = spaces.Box(-np.inf, np.inf, (size,), np.float32)
        return spaces.Dict(
            {"observation": own, "task": TaskSpace(TaskTable([TaskSpec(name, size, actions) for name in names]))}
        )

    def _convert(self, obs: Any, index: int | None = None) -> Any:
        """
        As the space has them: all environments' observations, or those of one of them; none that the next step changes.

        :raises ValueError: if they end in no one-hot where one was asked for
        """
        has_task = isinstance(self.observation_space, spaces.Dict) and "task" in self.observation_space.spaces
        if not has_task or isinstance(obs, dict):
            return _copied(obs)
        own = obs[..., : obs.shape[-1] - self._tail].astype(np.float32)
        if self._tasks is not None:
            return {"observation": own, "task": self._tasks if index is None else self._tasks[index]}
        check_one_hots(np.atleast_2d(obs), self._tail)
        return {"observation": own, "task": obs[..., -self._tail :].argmax(-1)}

    def reset(self) -> Any:
        """
        :return: Observations, one row for each environment
        :raises ValueError: for options that are not the same for all environments, which Gymnasium has no place for
        """
        if any(options != self._options[0] for options in self._options):
            raise ValueError(
                f"A vector environment is reset with one dict of options for all environments, not {self._options}"
            )
        seeds = None if all(seed is None for seed in self._seeds) else list(self._seeds)
        if seeds is not None and self._tasks is not None:
            # Meta-World draws an episode's goal before it could look at the seed of its reset; each task has goals of its own
            self.venv.unwrapped.call("seed", seeds[0])  # type: ignore[attr-defined]
        obs, infos = self.venv.reset(seed=seeds, options=self._options[0] or None)  # type: ignore[arg-type]
        self.reset_infos = _unbatched(infos, self.num_envs)
        self._succeeded[:] = False
        # Seeds and options are only used once
        self._reset_seeds()
        self._reset_options()
        return self._convert(obs)

    def step_async(self, actions: np.ndarray) -> None:
        """:param actions: One row for each environment"""
        self._actions = actions

    def step_wait(self) -> VecEnvStepReturn:
        """:return: Observations (after an end: of the new episode), rewards, dones, infos"""
        obs, rewards, terminated, truncated, batched = self.venv.step(self._actions)
        dones = np.asarray(terminated) | np.asarray(truncated)
        infos = _unbatched(batched, self.num_envs)
        final: Any = None
        if self._mode is AutoresetMode.DISABLED and dones.any():
            final = [_copied(row) for row in iterate(self.venv.observation_space, obs)]
            obs, reset_infos = self.venv.reset(options={"reset_mask": dones.astype(bool)})
            self.reset_infos = _unbatched(reset_infos, self.num_envs)
        for i in np.flatnonzero(dones).tolist():
            last = final[i] if final is not None else infos[i].pop("final_obs")
            if self._mode is AutoresetMode.SAME_STEP:
                # What Gymnasium's RecordEpisodeStatistics adds stands outside of the final info
                ended = {key: infos[i].pop(key) for key in ("episode",) if key in infos[i]}
                self.reset_infos[i], infos[i] = infos[i], {**ended, **infos[i].pop("final_info", {})}
            infos[i]["terminal_observation"] = self._convert(last, i)
        for i, info in enumerate(infos):
            info["TimeLimit.truncated"] = bool(truncated[i] and not terminated[i])
            self._note_success(i, info, bool(dones[i]))
        return self._convert(obs), np.asarray(rewards, np.float32), dones, infos

    def _note_success(self, i: int, info: dict[str, Any], done: bool) -> None:
        """As :class:`~sb3_m3po.envs.TaskWrapper` does."""
        self._succeeded[i] |= bool(info.get("success", False))
        self._tells_success[i] |= "success" in info
        if not done:
            return
        if self.task_names:
            info["task"] = self.task_names[i]
        if self._tells_success[i]:
            info.setdefault("is_success", bool(self._succeeded[i]))
        self._succeeded[i] = False

    def close(self) -> None:
        """Close the environments."""
        self.venv.close()

    def get_images(self) -> Sequence[np.ndarray | None]:
        """:return: A picture of each environment"""
        return self.venv.render() or [None] * self.num_envs  # type: ignore[return-value]

    def has_attr(self, attr_name: str) -> bool:
        """
        :param attr_name: Of the environments
        :return: Whether they have it; of processes only what is known without asking them
        """
        # A process of Gymnasium's does not survive the question for what it has not
        return attr_name in ("render_mode", TIME_LIMIT) if self.processes else super().has_attr(attr_name)

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        """
        :param attr_name: Of the environments
        :param indices: Which environments; ``None`` for all
        :return: Its values
        :raises AttributeError: if they haven't got it, or the vector environment has no environments of its own
        """
        if attr_name == "render_mode":
            return [self.venv.render_mode for _ in self._get_indices(indices)]
        if attr_name == TIME_LIMIT:
            envs = getattr(self.venv.unwrapped, "envs", None)
            limit = None if self.venv.spec is None else self.venv.spec.max_episode_steps
            return [time_limit_of(envs[i]) if envs else limit for i in self._get_indices(indices)]
        if not hasattr(self.venv, "get_attr"):
            raise AttributeError(f"{type(self.venv).__name__} has no attribute {attr_name!r} of single environments")
        values = self.venv.get_attr(attr_name)
        return [values[i] for i in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        """
        :param attr_name: Of the environments
        :param value: Its new value
        :param indices: Which environments; ``None`` for all
        """
        chosen = set(self._get_indices(indices))
        values = [value] * self.num_envs if len(chosen) == self.num_envs else list(self.get_attr(attr_name))
        self.venv.set_attr(attr_name, [value if i in chosen else old for i, old in enumerate(values)])  # type: ignore[attr-defined]

    def env_method(self, method_name: str, *method_args: Any, indices: Any = None, **method_kwargs: Any) -> list[Any]:
        """
        :param method_name: Of the environments
        :param method_args: Its arguments
        :param indices: Which environments' results; the method is called on all of them
        :param method_kwargs: Its keyword arguments
        :return: Results
        """
        results = self.venv.call(method_name, *method_args, **method_kwargs)  # type: ignore[attr-defined]
        return [results[i] for i in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[gym.Wrapper], indices: Any = None) -> list[bool]:
        """
        :param wrapper_class: A wrapper
        :param indices: Which environments; ``None`` for all
        :return: Whether each is wrapped in it; False where the environments live in processes of their own
        """
        envs = getattr(self.venv.unwrapped, "envs", None)
        return [envs is not None and _is_wrapped(envs[i], wrapper_class) for i in self._get_indices(indices)]


def _same_step(venv: VectorEnv) -> AutoresetMode:
    """How it resets; one that resets in the next step is told to do so in the same step, as SB3 expects."""
    mode = venv.metadata.get("autoreset_mode", AutoresetMode.NEXT_STEP)
    mode = AutoresetMode(mode) if not isinstance(mode, AutoresetMode) else mode
    if mode is not AutoresetMode.NEXT_STEP:
        return mode
    inner = venv.unwrapped
    if isinstance(inner, SyncVectorEnv) and inner is venv:
        # It is only read when it steps
        inner.autoreset_mode = AutoresetMode.SAME_STEP  # type: ignore[attr-defined]
        inner.metadata = {**inner.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        return AutoresetMode.SAME_STEP
    kind = type(inner).__name__
    if isinstance(inner, (SyncVectorEnv, AsyncVectorEnv)):
        fix = f"pass autoreset_mode=AutoresetMode.SAME_STEP to {kind}, or {_SAME_STEP} to gym.make_vec"
    else:
        fix = f"{kind} can't, so make it by gym.make_vec(..., vectorization_mode='sync') or by 'async' with {_SAME_STEP}"
    raise ValueError(
        f"{venv} resets an environment in the step after its end, Stable-Baselines3 expects it in the same step: {fix}"
    )


def _check_vector(venv: Any) -> None:
    """:raises ValueError: that says what to give instead of what is no vector environment of Gymnasium"""
    if isinstance(venv, VectorEnv):
        return
    name = "..." if not isinstance(venv, gym.Env) or venv.spec is None else repr(venv.spec.id)
    fix = f"give what gym.make_vec({name}, num_envs=...) returns"
    if isinstance(venv, gym.Env):
        fix = f"{fix}, or a single environment to the algorithm itself"
    elif isinstance(venv, VecEnv):
        fix = "it is a vec-env of Stable-Baselines3, which algorithms take as it is"
    raise ValueError(f"{venv!r} is no gymnasium.vector.VectorEnv: {fix}")


def _benchmark_tasks(venv: VectorEnv) -> list[str] | None:
    """:return: Names of the tasks of one of Meta-World's benchmarks, in the order of its environments"""
    name = "" if venv.spec is None else venv.spec.id
    if name.startswith("Meta-World/MT") and name != "Meta-World/MT1":
        return meta_world_names(name.removeprefix("Meta-World/"))
    return list(venv.spec.kwargs["envs_list"]) if name == "Meta-World/custom-mt-envs" and venv.spec is not None else None


def _unbatched(batched: dict[str, Any], n_envs: int) -> list[dict[str, Any]]:
    """Gymnasium's dict of arrays (``_key`` says who has the key) as one dict for each environment."""
    infos: list[dict[str, Any]] = [{} for _ in range(n_envs)]
    for key, values in batched.items():
        if key.startswith("_"):
            continue
        mask = batched.get(f"_{key}", np.ones(n_envs, bool))
        rows = _unbatched(values, n_envs) if isinstance(values, dict) and key != "final_obs" else _rows(values, n_envs)
        for i in np.flatnonzero(mask).tolist():
            infos[i][key] = rows[i]
    return infos


def _rows(values: Any, n_envs: int) -> Sequence[Any]:
    if isinstance(values, dict):
        return [{key: part[i] for key, part in values.items()} for i in range(n_envs)]
    return values


def _copied(obs: Any) -> Any:
    return {key: np.copy(part) for key, part in obs.items()} if isinstance(obs, dict) else np.copy(obs)


def _is_wrapped(env: gym.Env, wrapper_class: type[gym.Wrapper]) -> bool:
    layers: Iterable[gym.Env] = _layers(env)
    return any(isinstance(layer, wrapper_class) for layer in layers)


def _layers(env: gym.Env) -> Iterable[gym.Env]:
    while True:
        yield env
        if not isinstance(env, gym.Wrapper):
            return
        env = env.env
