"""Environments of unlike tasks behind one observation and one action space, for any algorithm of Stable-Baselines3."""

from sb3_m3po.envs.action_repeat import ActionRepeat
from sb3_m3po.envs.adapter import VectorEnvAdapter
from sb3_m3po.envs.padding import TaskWrapper
from sb3_m3po.envs.single import MultiTaskEnv
from sb3_m3po.envs.suites import DM_CONTROL_EASY, Task
from sb3_m3po.envs.vec_env import make_multitask_vec_env

__all__ = [
    "DM_CONTROL_EASY",
    "ActionRepeat",
    "MultiTaskEnv",
    "Task",
    "TaskWrapper",
    "VectorEnvAdapter",
    "make_multitask_vec_env",
]
