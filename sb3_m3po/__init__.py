"""M3PO for Stable-Baselines3: model-based policy optimisation behind a known interface."""

from pathlib import Path

from sb3_m3po.buffers import HybridDictRolloutBuffer, HybridRolloutBuffer
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
    "WorldModelPolicy",
    "__version__",
]
