"""Who is compared, and where."""

from collections.abc import Iterable

import numpy as np

from benchmarks.curves import Curve, Results
from benchmarks.suites import ENVIRONMENTS, OFF_POLICY, SUITES

#: M3PO's policy, which is what the claims are about; the same agent while it plans
M3PO, PLANNED = "m3po-100k", "m3po-100k,planned"
PPO, SAC = "ppo-zoo", "sac-100k"
OFF_POLICY_AGENTS = (SAC, "tqc-100k", "crossq-100k")
AGENTS = (M3PO, PLANNED, PPO, *OFF_POLICY_AGENTS)
NAMES = dict(zip(AGENTS, ("M3PO", "M3PO, planning", "PPO (rl-zoo3's)", "SAC", "TQC", "CrossQ"), strict=True))
DM_CONTROL_METHODS = ("TD-MPC2", "MR.Q")


def env_ids(suite: str) -> list[str]:
    """
    :param suite: its name
    :return: its environments
    """
    return [environment.env_id for environment in SUITES[suite]]


EVERYWHERE = [environment.env_id for environment in ENVIRONMENTS]
GROUPS = {**{name: env_ids(name) for name in SUITES}, "all": EVERYWHERE, "those of SAC, TQC, CrossQ": list(OFF_POLICY)}


def whole_group(results: Results, label: str, ids: Iterable[str]) -> list[Curve]:
    """
    :param results: what was measured
    :param label: algorithm and variant
    :param ids: environments
    :return: its curves in all of them, or none if it has not run everywhere
    """
    curves = [results.curve(label, env_id) for env_id in ids]
    found = [curve for curve in curves if curve is not None]
    return found if len(found) == len(curves) else []


def stacked(scores: list[list[np.ndarray]]) -> np.ndarray:
    """
    :param scores: by environment and point, those of each seed
    :return: shape ``(n_seeds, n_environments, n_points)``; as many seeds as all environments have
    """
    n_seeds = min(len(points[0]) for points in scores)
    return np.array([[seeds[:n_seeds] for seeds in points] for points in scores]).transpose(2, 0, 1)


def may_run(label: str, env_id: str) -> bool:
    """
    :param label: algorithm and variant
    :param env_id: an environment
    :return: whether this agent is run there
    """
    if label in (M3PO, PLANNED):
        return True
    return env_id not in env_ids("dmc") if label == PPO else env_id in OFF_POLICY


def last_score(results: Results, label: str, env_id: str) -> float:
    """
    :param results: what was measured
    :param label: algorithm and variant
    :param env_id: an environment that it has run in
    :return: its score at the end, mean over seeds
    """
    curve = results.curve(label, env_id)
    assert curve is not None
    return float(curve.mean[-1])
