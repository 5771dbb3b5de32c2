"""
The sets of tasks of the benchmarks, under names that stand where an environment's id does.

``mt10`` is a whole set, ``dm:walker-run-v0`` one task of it alone, ``dm-family:-walker-run-v0`` the set without it.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from stable_baselines3.common.vec_env import VecEnv

from benchmarks.envs import DM_CONTROL_ACTION_REPEAT
from sb3_m3po import Task, make_multitask_vec_env
from sb3_m3po.envs import DM_CONTROL_EASY
from sb3_m3po.envs.padding import action_dim
from sb3_m3po.envs.suites import expand
from sb3_m3po.envs.vec_env import find_layout

#: Frames per decision: Meta-World's hand moves a centimetre at most in a frame, and what one such step is worth hardly shows
META_WORLD_ACTION_REPEAT = 4
#: Frames per episode, as in the published runs of BRC and TD-MPC2; Meta-World's own 500 are spent where the hand got stuck
META_WORLD_EPISODE = 200
#: Of its 50 decisions; others learn with a discount factor of their own
META_WORLD_GAMMA = 0.97
_FAMILY = tuple(
    f"dm_control/{name}-v0" for name in ("walker-stand", "walker-walk", "walker-run", "cartpole-balance", "cartpole-swingup")
)


def _repeated(ids: tuple[str, ...]) -> list[Task]:
    """Tasks of dm_control as the single-task runs have them."""
    return [Task(env_id, action_repeat=DM_CONTROL_ACTION_REPEAT) for env_id in ids]


def _meta_world(task: Task) -> Task:
    return replace(
        task,
        action_repeat=META_WORLD_ACTION_REPEAT,
        gamma=META_WORLD_GAMMA,
        env_kwargs={"max_episode_steps": META_WORLD_EPISODE},
    )


TASK_SETS: dict[str, Callable[[], list[Task]]] = {
    "mt10": lambda: list(map(_meta_world, expand("Meta-World/MT10"))),
    "dm-mix": lambda: _repeated(DM_CONTROL_EASY),
    "dm-family": lambda: _repeated(_FAMILY),
    # Of these the single-task runs are
    "dm": lambda: _repeated(tuple(dict.fromkeys((*DM_CONTROL_EASY, *_FAMILY)))),
    "discrete-mix": lambda: expand(
        ["CartPole-v1", "Acrobot-v1", "LunarLander-v3", "MiniGrid-Empty-5x5-v0", "MiniGrid-DoorKey-5x5-v0"]
    ),
    "three": lambda: expand(["Pendulum-v1", "InvertedPendulum-v5", "HalfCheetah-v5"]),
}


def is_task_set(env_id: str) -> bool:
    """
    :param env_id: what the command line calls an environment
    :return: whether it is a set of tasks, or a part of one
    """
    return env_id.partition(":")[0] in TASK_SETS


def tasks_of(env_id: str) -> list[Task]:
    """
    :param env_id: a set of tasks, or a part of one
    :return: its tasks
    """
    name, _, part = env_id.partition(":")
    tasks = TASK_SETS[name]()
    chosen = [task for task in tasks if part in ("", name_of(task))]
    if part.startswith("-"):
        chosen = [task for task in tasks if name_of(task) != part[1:]]
    if not chosen or (part.startswith("-") and len(chosen) == len(tasks)):
        raise ValueError(f"{env_id}: the tasks of {name} are {', '.join(map(name_of, tasks))}")
    return chosen


def frames_of(env_id: str) -> int:
    """
    :param env_id: a set of tasks, or a part of one
    :return: how many environment steps (frames) one decision of the agent takes, in all of its tasks
    """
    return tasks_of(env_id)[0].action_repeat


def name_of(task: Task) -> str:
    """
    :param task: one of a set
    :return: the name under which it is logged
    """
    return str(task).rpartition("/")[2]


def task_vec_env(env_id: str, copies: int, seed: int, like: Any = None) -> VecEnv:
    """
    :param env_id: a set of tasks, or a part of one
    :param copies: environments of each task
    :param seed: seed of the first
    :param like: a model that will learn these tasks behind its own
    :return: the environments; a set without one of its tasks leaves room for it
    """
    room: dict[str, Any] = {}
    if ":-" in env_id:
        whole = find_layout(tasks_of(env_id.partition(":")[0]))[0]
        room = {"observation_dim": whole.observation_dim, "action_dim": action_dim(whole.action_space)}
    return make_multitask_vec_env(tasks_of(env_id), copies, seed, like=like, **room)
