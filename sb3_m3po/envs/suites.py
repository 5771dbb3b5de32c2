"""What a task may be called: a Gymnasium id, a Meta-World task, a suite, or something callable."""

import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from gymnasium.wrappers import TransformObservation

from sb3_m3po.envs.action_repeat import ActionRepeat, check_count

#: The suite ``"dm_control/easy"``: tasks of the DeepMind Control Suite, of different sizes
DM_CONTROL_EASY = (
    "dm_control/cartpole-balance-v0",
    "dm_control/cartpole-swingup-v0",
    "dm_control/ball_in_cup-catch-v0",
    "dm_control/reacher-easy-v0",
    "dm_control/finger-spin-v0",
    "dm_control/walker-stand-v0",
    "dm_control/walker-walk-v0",
    "dm_control/cheetah-run-v0",
)
_META_WORLD_SUITES = ("MT10", "MT25", "MT50")
#: Prefix of an id -> module that registers it
REGISTERED_BY = {"dm_control/": "shimmy", "Meta-World/": "metaworld", "MiniGrid-": "minigrid", "BabyAI-": "minigrid"}
#: The highest of MiniGrid's codes
_MINIGRID_CODES = 10.0
#: Seed of Meta-World's 50 positions of each task's goal: training and evaluation have the same ones
_GOALS_SEED = 0


@dataclass(frozen=True)
class Task:
    """
    One task, where its id alone does not say enough; or all tasks of a suite, with the same settings.

    :param env: A Gymnasium id, a Meta-World task (``"Meta-World/reach-v3"``), a suite (``"Meta-World/MT10"``) or a callable
        that returns an environment
    :param name: Under which it is logged; by default what stands behind the last ``/`` of the id. The tasks of a suite have
        their own
    :param gamma: Its discount factor; ``None`` for the model's
    :param env_kwargs: Keyword arguments to pass to the environment or the callable
    :param action_repeat: Frames for which each action is applied, see :class:`~sb3_m3po.envs.ActionRepeat`
    :raises ValueError: if that is no whole number of at least 1, the name is no text, or nothing makes an environment
    """

    env: str | Callable[..., gym.Env]
    name: str | None = None
    gamma: float | None = None
    env_kwargs: dict[str, Any] = field(default_factory=dict)
    action_repeat: int = 1

    def __post_init__(self) -> None:
        if not (isinstance(self.env, str) or callable(self.env)):
            _refuse(self.env)
        if self.name is not None and not isinstance(self.name, str):
            raise ValueError(f"name={self.name!r} of a task must be a text")
        check_count("action_repeat", self.action_repeat, f"the frames for each action of task {str(self)!r}")

    def __str__(self) -> str:
        if self.name is not None:
            return self.name
        return self.env if isinstance(self.env, str) else str(getattr(self.env, "__name__", repr(self.env)))

    def make(self, **env_kwargs: Any) -> gym.Env:
        """
        :param env_kwargs: More of them, for instance ``render_mode``; a callable is given its own only
        :return: A new environment, as it is without padding
        :raises ImportError: if its package is missing
        :raises RuntimeError: if the callable fails
        :raises ValueError: if there is no such environment, it does not take its arguments, or the callable returns something
            else
        """
        env = _minigrid(self._make(**env_kwargs))
        return env if self.action_repeat == 1 else ActionRepeat(env, self.action_repeat)

    def _make(self, **env_kwargs: Any) -> gym.Env:
        if not isinstance(self.env, str):
            return self._called(self.env)
        kwargs = {**self.env_kwargs, **env_kwargs}
        package = next((name for prefix, name in REGISTERED_BY.items() if self.env.startswith(prefix)), None)
        if package is not None:
            _import(package, self.env)
        if package == "shimmy":  # which is there without it
            _import("dm_control", self.env)
        try:
            return _meta_world(self.env, kwargs) if package == "metaworld" else gym.make(self.env, **kwargs)
        except (gym.error.Error, TypeError, AssertionError) as error:
            raise ValueError(f"Task {str(self)!r}: {error}") from error

    def _called(self, maker: Callable[..., Any]) -> gym.Env:
        try:
            env = maker(**self.env_kwargs)
        except Exception as error:
            raise RuntimeError(f"Task {str(self)!r} could not be made: {type(error).__name__}: {error}") from error
        if not isinstance(env, gym.Env):
            raise ValueError(
                f"Task {str(self)!r} made {env!r}, which is no gymnasium.Env: its callable must return a new environment"
            )
        return env

    def name_of(self, env: gym.Env) -> str:
        """
        :param env: Made from it
        :return: The name that it has, or else goes by
        """
        if self.name is not None:
            return self.name
        if isinstance(self.env, str):
            return self.env.rpartition("/")[2]
        name = getattr(self.env, "__name__", "<lambda>")
        if name != "<lambda>":
            return name
        return env.spec.id.rpartition("/")[2] if env.spec is not None else type(env.unwrapped).__name__


def expand(tasks: str | Task | Callable[..., gym.Env] | Sequence[Any]) -> list[Task]:
    """
    :param tasks: Ids, suites, callables and :class:`Task` objects, or a single one of them
    :return: The tasks, those of a suite in its order
    :raises ValueError: if there is none, a suite is unknown, or something makes no environment
    """
    if isinstance(tasks, (str, Task)) or callable(tasks):
        tasks = [tasks]
    if isinstance(tasks, (gym.Env, Mapping)) or not isinstance(tasks, Iterable):
        _refuse(tasks)
    found = [one for task in tasks for one in _expand(task)]
    if not found:
        raise ValueError("tasks is empty: give ids, suites ('Meta-World/MT10', 'dm_control/easy'), Task objects or callables")
    return found


def _expand(task: str | Task | Callable[..., gym.Env]) -> Iterator[Task]:
    if isinstance(task, Task) and isinstance(task.env, str):
        found = list(_expand(task.env))
        if task.name is not None and len(found) > 1:
            raise ValueError(
                f"name={task.name!r} is one name for the {len(found)} tasks of {task.env!r}: leave it out, they have their "
                "own, or give a Task with a name for each of them"
            )
        yield from (replace(task, env=one.env) for one in found)
    elif isinstance(task, Task):
        yield task
    elif not isinstance(task, str):
        yield Task(task)
    elif task == "dm_control/easy":
        yield from map(Task, DM_CONTROL_EASY)
    elif task.upper() in _META_WORLD_SUITES:
        raise ValueError(f"Unknown task {task!r}: the suite is called 'Meta-World/{task.upper()}'")
    elif task.startswith("Meta-World/") and task[11:13].upper() in ("MT", "ML"):
        yield from (Task(f"Meta-World/{name}") for name in meta_world_names(task.removeprefix("Meta-World/")))
    elif task.startswith("dm_control/") and "-" not in task:
        raise ValueError(
            f"Unknown suite {task!r}: the suite of dm_control is 'dm_control/easy', its tasks are called "
            "'dm_control/walker-walk-v0'"
        )
    else:
        yield Task(task)


def _refuse(task: Any) -> NoReturn:
    """:raises ValueError: that says what to give instead of what makes no environment"""
    spec = task.spec if isinstance(task, gym.Env) else task
    name = spec.id if isinstance(spec, EnvSpec) else "Pendulum-v1"
    problem = f"{name}'s EnvSpec is no task" if isinstance(task, EnvSpec) else f"{task!r} is no task"
    if isinstance(task, gym.Env):
        problem = f"{task} is one environment, but each copy of a task makes its own"
    raise ValueError(
        f"{problem}: give an id ({name!r}), a suite ('Meta-World/MT10'), a Task, a callable that returns a new environment "
        f"(lambda: gym.make({name!r})), or a list of these"
    )


def meta_world_names(suite: str) -> list[str]:
    """
    :param suite: MT10, MT25 or MT50
    :return: Names of its tasks, in its order
    :raises ValueError: for another suite
    """
    if suite not in _META_WORLD_SUITES:
        raise ValueError(
            f"Unknown suite 'Meta-World/{suite}': Meta-World's suites are {', '.join(_META_WORLD_SUITES)}; a single "
            "task is called 'Meta-World/reach-v3'"
        )
    _import("metaworld", f"Meta-World/{suite}")
    return list(getattr(importlib.import_module("metaworld.env_dict"), f"{suite}_V3"))


def _import(package: str, task: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ImportError(f'Task {task!r} needs the package {package}: pip install "sb3_m3po[envs]" ({error})') from error


def _meta_world(env_id: str, kwargs: dict[str, Any]) -> gym.Env:
    """One of Meta-World's tasks, with a goal at one of 50 positions in each episode, as in MT10."""
    name, known = env_id.removeprefix("Meta-World/"), importlib.import_module("metaworld.env_dict").ALL_V3_ENVIRONMENTS
    if name not in known:
        raise ValueError(
            f"Unknown Meta-World task {name!r}: they are called {', '.join(list(known)[:3])}, ... ({len(known)} of them)"
        )
    # The checker complains about Meta-World's own spaces
    env = gym.make("Meta-World/MT1", env_name=name, disable_env_checker=True, **{"seed": _GOALS_SEED, **kwargs})
    return _SeededGoals(env)


class _SeededGoals(gym.Wrapper):
    """
    Meta-World draws an episode's goal before it could look at the seed of ``reset``, which it ignores: without this, all
    copies of a task, for training and for evaluation, run through the same goals in the same order.
    """

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        if seed is not None:
            self.unwrapped.seed(seed)  # type: ignore[attr-defined]
        return self.env.reset(seed=seed, options=options)


def _minigrid(env: gym.Env) -> gym.Env:
    """
    MiniGrid's environments without their mission, which is a text and in most of them always the same one; and with their
    "image", which is no picture but codes of things, colours and states, as the numbers that they are. Others, and what was
    made a picture, as they are.
    """
    module, space = sys.modules.get("minigrid.minigrid_env"), env.observation_space
    if module is None or not isinstance(env.unwrapped, module.MiniGridEnv):
        return env
    codes = env.unwrapped.observation_space["image"]  # type: ignore[index]
    as_numbers = spaces.Box(0.0, _MINIGRID_CODES, codes.shape, np.float32)
    if space == codes:
        return TransformObservation(env, np.float32, as_numbers)
    if not (isinstance(space, spaces.Dict) and space.spaces.get("image") == codes):
        return env
    parts = {key: part for key, part in space.spaces.items() if key != "mission"} | {"image": as_numbers}
    return TransformObservation(
        env, lambda seen: {key: np.float32(seen[key]) if key == "image" else seen[key] for key in parts}, spaces.Dict(parts)
    )
