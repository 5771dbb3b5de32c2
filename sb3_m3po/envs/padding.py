"""One observation and one action space for unlike tasks: padding, in a wrapper, so that any vec-env can hold them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, SupportsFloat

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.spaces.utils import flatdim, flatten
from stable_baselines3.common.preprocessing import is_image_space

from sb3_m3po.discount import time_limit_of
from sb3_m3po.tasks import TaskSpace, TaskSpec, TaskTable

_FLAT = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)


def check_flat(space: spaces.Space, task: str) -> None:
    """
    :param space: Of a task's observations
    :param task: Its name, for the message
    :raises ValueError: for a part that can't become numbers of a fixed length
    """
    for keys, part in _parts(space):
        if isinstance(part, _FLAT):
            continue
        where = f" under key {'/'.join(map(str, keys))!r}" if keys else ""
        # FilterObservation takes the keys to keep, of the outermost Dict, and at least one
        kept = [key for key in space.spaces if key != keys[0]] if isinstance(space, spaces.Dict) else []
        filtered = f"leave out {keys[0]!r} with gymnasium.wrappers.FilterObservation(env, {kept}), or " if kept else ""
        raise ValueError(
            f"Task {task!r} has a {type(part).__name__} observation{where}, which has no fixed length: {filtered}turn it into "
            "numbers with gymnasium.wrappers.TransformObservation"
        )


def _parts(space: spaces.Space, keys: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], spaces.Space]]:
    """:return: What is not a Dict, with its keys from the outermost one inwards"""
    if isinstance(space, spaces.Dict):
        for key, part in space.spaces.items():
            yield from _parts(part, (*keys, key))
    else:
        yield keys, space


def flat(space: spaces.Space, observation: Any) -> np.ndarray:
    """
    :param space: Of the observation
    :param observation: An element of it
    :return: Its numbers in the order of the keys: Discrete parts as one-hots, images between 0 and 1; shape ``(flat size,)``
    """
    if isinstance(space, spaces.Dict):
        return np.concatenate([flat(part, observation[key]) for key, part in space.spaces.items()])
    numbers = np.asarray(flatten(space, observation), np.float32)
    return numbers / 255 if is_image_space(space) else numbers


@dataclass(frozen=True)
class Layout:
    """
    What all tasks share.

    :param table: The tasks
    :param observation_space: ``observation`` padded with zeros, ``task``; the masks if asked for
    :param action_space: Box in [-1, 1] or Discrete, as wide as the widest task; or the tasks' common space
    """

    table: TaskTable
    observation_space: spaces.Dict
    action_space: spaces.Space

    @property
    def observation_dim(self) -> int:
        """:return: Width of the padded observations"""
        return flatdim(self.observation_space["observation"])


def action_dim(space: spaces.Space) -> int | None:
    """
    :param space: A task's own action space
    :return: Dimensions of a Box, actions of a Discrete; ``None`` for others, which are not padded
    """
    if isinstance(space, spaces.Box):
        return int(np.prod(space.shape))
    return int(space.n) if isinstance(space, spaces.Discrete) else None


def describe(name: str, env: gym.Env, gamma: float | None) -> TaskSpec:
    """
    :param name: Of the task
    :param env: One of its environments, without padding
    :param gamma: Its discount factor
    :return: What the table has of it
    :raises ValueError: for spaces that can't be padded
    """
    check_flat(env.observation_space, name)
    space = env.action_space
    if isinstance(space, spaces.Box) and not np.all(np.isfinite([space.low, space.high])):
        raise ValueError(
            f"Task {name!r} has actions without bounds ({space}): give them bounds in the environment, or with "
            "gymnasium.wrappers.TransformAction(env, lambda action: action, gymnasium.spaces.Box(low, high))"
        )
    return TaskSpec(name, flatdim(env.observation_space), action_dim(space), gamma, time_limit_of(env) or 0)


def common_action_space(names: Sequence[str], action_spaces: Sequence[spaces.Space]) -> spaces.Space:
    """
    :param names: Of the tasks
    :param action_spaces: Their own
    :return: What holds all of them
    :raises ValueError: for kinds that don't mix, with the tasks of each
    """
    kinds: dict[str, list[str]] = {}
    for name, space in zip(names, action_spaces, strict=True):
        kinds.setdefault(type(space).__name__, []).append(name)
    if len(kinds) > 1:
        listed = "; ".join(f"{kind}: {', '.join(members)}" for kind, members in kinds.items())
        raise ValueError(
            f"One agent has one kind of actions, these tasks have {len(kinds)} ({listed}): train one agent for each kind, or "
            "turn the actions of some into the others' in a wrapper (a Box into a Discrete of some of its points, say)"
        )
    sizes = [size for size in map(action_dim, action_spaces) if size is not None]
    if isinstance(action_spaces[0], spaces.Box):
        return spaces.Box(-1.0, 1.0, (max(sizes),), np.float32)
    if isinstance(action_spaces[0], spaces.Discrete):
        return spaces.Discrete(max(sizes))
    if any(space != action_spaces[0] for space in action_spaces):
        listed = ", ".join(f"{name}: {space}" for name, space in zip(names, action_spaces, strict=True))
        raise ValueError(
            f"{next(iter(kinds))} actions can't be padded, and these are not equal ({listed}): make them equal in a wrapper"
        )
    return action_spaces[0]


def layout(table: TaskTable, observation_dim: int, action_space: spaces.Space, expose_masks: bool = False) -> Layout:
    """
    :param table: The tasks
    :param observation_dim: Width of the padded observations
    :param action_space: What holds all tasks' actions
    :param expose_masks: Whether observations have the keys ``observation_mask`` and ``action_mask``
    :return: The spaces of every environment
    :raises ValueError: if a task is wider than that
    """
    width = action_dim(action_space)
    for spec in table:
        for kind, size, room in (("observation", spec.observation_dim, observation_dim), ("action", spec.action_dim, width)):
            if size is not None and room is not None and size > room:
                raise ValueError(
                    f"Task {spec.name!r} has {kind}_dim={size}, but there is room for {room}: give a model room for later "
                    f"tasks from the start by make_multitask_vec_env(..., {kind}_dim={size})"
                )
    parts: dict[str, spaces.Space] = {
        "observation": spaces.Box(-np.inf, np.inf, (observation_dim,), np.float32),
        "task": TaskSpace(table),
    }
    if expose_masks:
        parts["observation_mask"] = spaces.MultiBinary(observation_dim)
        if width is not None:
            parts["action_mask"] = spaces.MultiBinary(width)
    return Layout(table, spaces.Dict(parts), action_space)


class TaskWrapper(gym.Wrapper):
    """
    Give an environment the observations and actions that all tasks share.

    Observations become flat, are padded with zeros and say their task. Box actions in [-1, 1] are stretched to the task's own
    bounds (and rounded, where they are whole numbers), those behind its own dimensions are ignored. A Discrete action that the
    task does not have, which an algorithm that knows of no masks may choose, is taken modulo the number of its actions. At an
    episode's end ``info["task"]`` is the task's name, and ``info["is_success"]`` says whether ``info["success"]`` was ever 1,
    of an environment that has told one (Meta-World).

    :param env: The environment to wrap
    :param shared: What all tasks share
    :param task: The task's id
    """

    def __init__(self, env: gym.Env, shared: Layout, task: int):
        super().__init__(env)
        self.task, self.spec_of_task = task, shared.table[task]
        self.observation_space, self.action_space = shared.observation_space, shared.action_space
        self._own_observations, self._own_actions = env.observation_space, env.action_space
        self._observation_dim = shared.observation_dim
        self._fixed: dict[str, Any] = {"task": np.int64(task)}
        for key, size in (
            ("observation_mask", self.spec_of_task.observation_dim),
            ("action_mask", self.spec_of_task.action_dim),
        ):
            if key in shared.observation_space.spaces:
                width = flatdim(shared.observation_space[key])
                self._fixed[key] = (np.arange(width) < (width if size is None else size)).astype(np.int8)
        self._succeeded = self._tells_success = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """
        :param seed: As in Gymnasium
        :param options: Likewise
        :return: Padded observation, info
        :raises RuntimeError: if the environment fails; it names the task
        """
        self._succeeded = False
        try:
            observation, info = self.env.reset(seed=seed, options=options)
        except Exception as error:
            raise self._failure("reset()", error) from error
        return self.observation(observation), info

    def step(self, action: Any) -> tuple[dict[str, Any], SupportsFloat, bool, bool, dict[str, Any]]:
        """
        :param action: Of the shared action space
        :return: Padded observation, reward, terminated, truncated, info
        :raises RuntimeError: if the environment fails; it names the task
        """
        try:
            observation, reward, terminated, truncated, info = self.env.step(self.own_action(action))
        except Exception as error:
            raise self._failure("step()", error) from error
        self._succeeded |= bool(info.get("success", False))
        self._tells_success |= "success" in info
        if terminated or truncated:
            info = {**info, "task": self.spec_of_task.name}
            if self._tells_success:
                info.setdefault("is_success", self._succeeded)
        return self.observation(observation), reward, terminated, truncated, info

    def observation(self, observation: Any) -> dict[str, Any]:
        """
        :param observation: The task's own
        :return: Padded, with the task's id
        :raises RuntimeError: if it is none of the task's space
        :raises ValueError: if it is longer or shorter than those of its space
        """
        try:
            numbers = flat(self._own_observations, observation)
        except Exception as error:
            raise self._failure(f"an observation that is none of {self._own_observations}", error) from error
        padded = np.zeros(self._observation_dim, np.float32)
        if len(numbers) != self.spec_of_task.observation_dim:
            raise ValueError(
                f"Task {self.spec_of_task.name!r} gave an observation of {len(numbers)} numbers, but its observation_space "
                f"({self._own_observations}) has {self.spec_of_task.observation_dim}: make them agree in the environment"
            )
        padded[: len(numbers)] = numbers
        return {"observation": padded, **self._fixed}

    def own_action(self, action: Any) -> Any:
        """
        :param action: Of the shared action space
        :return: The task's own action
        """
        space = self._own_actions
        if isinstance(space, spaces.Box):
            unit = np.clip(np.asarray(action, np.float64)[: self.spec_of_task.action_dim].reshape(space.shape), -1, 1)
            low, high = space.low.astype(np.float64), space.high.astype(np.float64)
            # Near the bounds rounding may end outside of them
            own = np.clip(low + 0.5 * (unit + 1) * (high - low), low, high)
            return (np.rint(own) if np.issubdtype(space.dtype, np.integer) else own).astype(space.dtype)
        return space.start + int(action) % space.n if isinstance(space, spaces.Discrete) else action

    def _failure(self, where: str, error: Exception) -> RuntimeError:
        return RuntimeError(f"Task {self.spec_of_task.name!r} failed in {where}: {type(error).__name__}: {error}")
