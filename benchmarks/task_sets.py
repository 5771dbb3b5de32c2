"""
The sets of tasks of the benchmarks, under names that stand where an environment's id does.

``mt10`` is a whole set, ``dm-family:walker-run-v0`` one task of it alone, ``dm-family:-walker-run-v0`` the set without it.
"""

from collections.abc import Callable
from typing import Any

from stable_baselines3.common.vec_env import VecEnv

from benchmarks.envs import DM_CONTROL_ACTION_REPEAT
from sb3_m3po import Task, make_multitask_vec_env
from sb3_m3po.envs.padding import action_dim
from sb3_m3po.envs.suites import expand
from sb3_m3po.envs.vec_env import find_layout

#: Four frames per decision: Meta-World's hand moves a centimetre at most in a frame, and what one such step is worth hardly
#: shows. Episodes of 200 frames, as in the published runs of BRC and TD-MPC2: what is left of its 500 is spent where the hand
#: got stuck. With 50 decisions in an episode goes a discount factor of 0.97; other algorithms than M3PO have one of their own.
META_WORLD = Task("Meta-World/MT10", gamma=0.97, env_kwargs={"max_episode_steps": 200}, action_repeat=4)
#: Tasks of two bodies
_FAMILY = ("walker-stand", "walker-walk", "walker-run", "cartpole-balance", "cartpole-swingup")


TASK_SETS: dict[str, Callable[[], list[Task]]] = {
    "mt10": lambda: expand(META_WORLD),
    "dm-mix": lambda: expand(Task("dm_control/easy", action_repeat=DM_CONTROL_ACTION_REPEAT)),
    "dm-family": lambda: [Task(f"dm_control/{name}-v0", action_repeat=DM_CONTROL_ACTION_REPEAT) for name in _FAMILY],
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
