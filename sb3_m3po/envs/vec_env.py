"""One vec-env over many tasks."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
from gymnasium import spaces
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv

from sb3_m3po.checks import dead_workers_named
from sb3_m3po.envs.action_repeat import check_count
from sb3_m3po.envs.padding import Layout, TaskWrapper, common_action_space, describe, layout
from sb3_m3po.envs.suites import Task, expand
from sb3_m3po.tasks import TaskSpace, TaskTable

Tasks = str | Task | Callable[..., gym.Env] | Sequence[Any]


def make_multitask_vec_env(
    tasks: Tasks,
    n_envs_per_task: int = 1,
    seed: int | None = None,
    monitor_dir: str | None = None,
    vec_env_cls: type[VecEnv] | None = None,
    vec_env_kwargs: dict[str, Any] | None = None,
    expose_masks: bool = False,
    like: Any = None,
    observation_dim: int | None = None,
    action_dim: int | None = None,
) -> VecEnv:
    """
    Make a vec-env of tasks of any shapes, on which any algorithm of Stable-Baselines3 trains.

    Observations are Dicts of ``observation`` (flat, padded with zeros) and ``task`` (its id); actions are in [-1, 1], or
    Discrete with as many as the task with the most has. See :class:`~sb3_m3po.envs.TaskWrapper`. Each environment is wrapped
    in a ``Monitor``. The environments of a task stand side by side, the tasks in their order; the vec-env notes the names of
    their tasks as ``task_names``, one for each environment.

    :param tasks: Gymnasium ids, Meta-World tasks (``"Meta-World/reach-v3"``), suites (``"Meta-World/MT10"``,
        ``"dm_control/easy"``), callables that return an environment, or :class:`~sb3_m3po.envs.Task` objects. Of MiniGrid's
        observations the mission, a text, is left out
    :param n_envs_per_task: Number of environments of each task
    :param seed: The initial seed; environment ``i`` has ``seed + i``
    :param monitor_dir: Path to a folder where the monitor files will be saved
    :param vec_env_cls: A custom ``VecEnv`` class constructor. Default: ``DummyVecEnv``
    :param vec_env_kwargs: Keyword arguments to pass to the ``VecEnv`` class constructor
    :param expose_masks: Whether observations also have ``observation_mask`` and ``action_mask``, for algorithms that know no
        table of tasks
    :param like: A model or vec-env of several tasks, whose table, widths and masks to keep: tasks that it knows have its ids,
        new ones come behind (see :meth:`M3PO.add_tasks <sb3_m3po.M3PO.add_tasks>`)
    :param observation_dim: Width of the padded observations, where later tasks need more than these
    :param action_dim: Dimensions, or number, of the padded actions, likewise
    :return: The vec-env
    :raises ValueError: if tasks don't fit together or into the widths, are unknown, or have equal names
    :raises ImportError: if a task's package is missing
    :raises RuntimeError: if a process dies in which an environment is made; it names the task
    """
    check_count("n_envs_per_task", n_envs_per_task, "the environments of each task")
    made = expand(tasks)
    shared, ids = find_layout(made, expose_masks, like, observation_dim, action_dim)
    vec_env_cls = DummyVecEnv if vec_env_cls is None else vec_env_cls
    if not callable(vec_env_cls):
        raise ValueError(f"vec_env_cls={vec_env_cls!r} is no class of vec-envs: give SubprocVecEnv itself, or DummyVecEnv")
    makers = [
        partial(_monitored, task, shared, ids[i], i * n_envs_per_task + copy, seed, monitor_dir)
        for i, task in enumerate(made)
        for copy in range(n_envs_per_task)
    ]
    names = [shared.table.names[i] for i in ids for _ in range(n_envs_per_task)]
    with dead_workers_named(None, names):
        env = vec_env_cls(makers, **(vec_env_kwargs or {}))  # type: ignore[call-arg, arg-type]
    env.unwrapped.task_names = names  # type: ignore[attr-defined]
    # Prepare the seeds for the first reset
    env.seed(seed)
    return env


def find_layout(
    tasks: Sequence[Task],
    expose_masks: bool = False,
    like: Any = None,
    observation_dim: int | None = None,
    action_dim: int | None = None,
) -> tuple[Layout, list[int]]:
    """
    Look at one environment of each task for what all of them share.

    :param tasks: The tasks
    :param expose_masks: See :func:`make_multitask_vec_env`
    :param like: Likewise
    :param observation_dim: Likewise
    :param action_dim: Likewise
    :return: Table and spaces; the tasks' ids
    :raises ValueError: if the tasks don't fit
    """
    for name, value in (("observation_dim", observation_dim), ("action_dim", action_dim)):
        if value is not None:
            check_count(name, value, "the width to pad to; None for that of the widest task")
    specs, action_spaces = [], []
    for task in tasks:
        env = task.make()
        specs.append(describe(task.name_of(env), env, task.gamma))
        action_spaces.append(env.action_space)
        env.close()
    # A table of these alone first: it refuses equal names
    table = TaskTable(specs)
    action_space = common_action_space(table.names, action_spaces)
    width = max(spec.observation_dim or 0 for spec in specs)
    if like is not None:
        space = getattr(like, "observation_space", None)
        known = space.spaces.get("task") if isinstance(space, spaces.Dict) else None
        if not isinstance(known, TaskSpace):
            raise ValueError(f"like={like} has no table of tasks: give a model or a vec-env from make_multitask_vec_env")
        if type(action_space) is not type(like.action_space):
            raise ValueError(
                f"Tasks {', '.join(table.names)} have {action_space} actions, the model has {like.action_space}: train "
                "one agent for each kind"
            )
        table, action_space = known.table.with_tasks(specs), like.action_space
        width = like.observation_space["observation"].shape[0]
        expose_masks = expose_masks or "observation_mask" in like.observation_space.spaces
    if action_dim is not None:
        wide = {spaces.Box: lambda: spaces.Box(-1.0, 1.0, (action_dim,)), spaces.Discrete: lambda: spaces.Discrete(action_dim)}
        action_space = wide.get(type(action_space), lambda: action_space)()
    return layout(table, observation_dim or width, action_space, expose_masks), [table.id_of(spec.name) for spec in specs]


def _monitored(task: Task, shared: Layout, index: int, rank: int, seed: int | None, monitor_dir: str | None) -> gym.Env:
    """One environment of a task, as SB3's ``make_vec_env`` makes them."""
    env = TaskWrapper(task.make(), shared, index)
    if seed is not None:
        # Note: here we only seed the action space; the environment is seeded by its first reset
        env.action_space.seed(seed + rank)
    if monitor_dir is not None:
        Path(monitor_dir).mkdir(parents=True, exist_ok=True)
    return Monitor(env, filename=None if monitor_dir is None else str(Path(monitor_dir) / str(rank)))
