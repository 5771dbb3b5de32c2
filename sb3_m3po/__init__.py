"""M3PO for Stable-Baselines3: model-based policy optimisation behind a known interface."""

from pathlib import Path

from gymnasium.envs.registration import register, registry

from sb3_m3po.buffers import HybridDictRolloutBuffer, HybridRolloutBuffer
from sb3_m3po.callbacks import TaskEvalCallback, TaskStatsCallback
from sb3_m3po.envs import Task, VectorEnvAdapter, make_multitask_vec_env
from sb3_m3po.evaluation import TaskScores, evaluate_per_task
from sb3_m3po.m3po import M3PO
from sb3_m3po.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, WorldModelPolicy

__version__ = (Path(__file__).parent / "version.txt").read_text().strip()

__all__ = [
    "M3PO",
    "CnnPolicy",
    "HybridDictRolloutBuffer",
    "HybridRolloutBuffer",
    "MlpPolicy",
    "MultiInputPolicy",
    "Task",
    "TaskEvalCallback",
    "TaskScores",
    "TaskStatsCallback",
    "VectorEnvAdapter",
    "WorldModelPolicy",
    "__version__",
    "evaluate_per_task",
    "make_multitask_vec_env",
]

if "sb3_m3po/MultiTask-v0" not in registry:
    register("sb3_m3po/MultiTask-v0", entry_point="sb3_m3po.envs.single:MultiTaskEnv")
