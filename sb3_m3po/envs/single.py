"""Many tasks in a single environment, which draws one at each reset: for tools that make their environments themselves."""

from collections.abc import Sequence
from typing import Any, SupportsFloat

import gymnasium as gym

from sb3_m3po.envs.padding import TaskWrapper
from sb3_m3po.envs.suites import Task, expand
from sb3_m3po.envs.vec_env import Tasks, find_layout


class MultiTaskEnv(gym.Env):
    """
    ``gym.make("sb3_m3po/MultiTask-v0", tasks=[...])``: each episode is one of a task, drawn uniformly.

    :param tasks: See :func:`~sb3_m3po.envs.make_multitask_vec_env`
    :param expose_masks: Likewise
    :param observation_dim: Likewise
    :param action_dim: Likewise
    :param render_mode: Of the tasks' environments
    :raises ValueError: if there is no task, or the tasks don't fit together
    """

    #: Says that one environment may be any task
    draws_tasks = True
    metadata: dict[str, Any] = {"render_modes": ["human", "rgb_array"], "render_fps": 30}  # noqa: RUF012

    def __init__(
        self,
        tasks: Tasks = (),
        expose_masks: bool = False,
        observation_dim: int | None = None,
        action_dim: int | None = None,
        render_mode: str | None = None,
    ):
        if isinstance(tasks, Sequence) and not tasks:
            raise ValueError(
                "tasks is empty: give tasks=['Pendulum-v1', 'MountainCarContinuous-v0'] to gym.make, on the command line as "
                "--env-kwargs \"tasks:['Pendulum-v1','MountainCarContinuous-v0']\""
            )
        self.render_mode = render_mode
        self._made: Sequence[Task] = expand(tasks)
        self._layout, _ = find_layout(self._made, expose_masks, None, observation_dim, action_dim)
        self.observation_space, self.action_space = self._layout.observation_space, self._layout.action_space
        self._envs: dict[int, gym.Env] = {}
        self._seeded: set[int] = set()
        self._current: gym.Env | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        """
        :param seed: Seeds the choice of tasks, and the task's own environment from it
        :param options: ``{"task": name}`` chooses the task
        :return: Padded observation; info with the ``task``'s name
        :raises ValueError: for an unknown task
        """
        super().reset(seed=seed)
        names, options = self._layout.table.names, dict(options or {})
        drawn = int(self.np_random.integers(len(names)))
        index = self._layout.table.id_of(options.pop("task")) if "task" in options else drawn
        if seed is not None:
            self._seeded.clear()
        if index not in self._envs:
            kwargs = {} if self.render_mode is None else {"render_mode": self.render_mode}
            self._envs[index] = TaskWrapper(self._made[index].make(**kwargs), self._layout, index)
        # An environment is seeded once, by what comes first of it: so every episode follows from the first seed
        own_seed = None if index in self._seeded else int(self.np_random.integers(2**31))
        self._seeded.add(index)
        self._current = self._envs[index]
        observation, info = self._current.reset(seed=own_seed, options=options or None)
        return observation, {**info, "task": names[index]}

    def step(self, action: Any) -> tuple[Any, SupportsFloat, bool, bool, dict[str, Any]]:
        """
        :param action: Of the shared action space
        :return: Of the current task
        """
        assert self._current is not None, "Call reset() first"
        return self._current.step(action)

    def render(self) -> Any:
        """:return: A picture of the current task, in mode ``rgb_array``"""
        return None if self._current is None else self._current.render()

    def close(self) -> None:
        """Close the environments of all tasks."""
        for env in self._envs.values():
            env.close()
