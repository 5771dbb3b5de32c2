"""The suites of the benchmark of single tasks: their environments, and which return counts as a score of 1."""

from typing import NamedTuple

from benchmarks.algorithms import zoo_steps
from benchmarks.envs import frames_per_decision
from benchmarks.targets import TARGETS

#: Environment steps (frames) of M3PO and of the off-policy opponents
BUDGET = 100_000
#: Rough CPU-milliseconds of a decision with its share of the updates, on a processor of 2023 beside another run
_DECISION_MS = {"m3po": 30.0, "ppo": 2.2, "sac": 17.0, "tqc": 24.0, "crossq": 100.0}


class Environment(NamedTuple):
    """
    One environment of a suite.

    :param env_id: its id
    :param reference: return that counts as a score of 1: of dm_control's tasks their highest, else the higher one of the final
        returns of PPO and SAC with tuned settings that rl-zoo3 publishes (of the older versions of these environments)
    """

    env_id: str
    reference: float


SUITES: dict[str, tuple[Environment, ...]] = {
    "classic": (
        Environment("CartPole-v1", 500.0),
        Environment("Acrobot-v1", -73.5),
        Environment("Pendulum-v1", -157.0),
        Environment("MountainCarContinuous-v0", 94.7),
        Environment("LunarLander-v3", 242.1),
        Environment("LunarLanderContinuous-v3", 270.9),
    ),
    "mujoco": (
        Environment("HalfCheetah-v5", 9_535.5),
        Environment("Hopper-v5", 2_410.4),
        Environment("Walker2d-v5", 3_863.2),
        Environment("Ant-v5", 4_615.8),
    ),
    "dmc": tuple(
        Environment(f"dm_control/{name}-v0", 1_000.0)
        for name in (
            *("cartpole-swingup", "cartpole-swingup_sparse", "cheetah-run", "walker-walk", "walker-run", "finger-spin"),
            *("reacher-easy", "hopper-hop", "acrobot-swingup"),
        )
    ),
}
ENVIRONMENTS = tuple(environment for suite in SUITES.values() for environment in suite)
#: Where SAC, TQC and CrossQ are run too
OFF_POLICY = (
    *("HalfCheetah-v5", "Hopper-v5", "Walker2d-v5", "LunarLanderContinuous-v3"),
    *("dm_control/cheetah-run-v0", "dm_control/walker-walk-v0"),
)


def budgets(suite: str, algo: str, zoo: bool) -> dict[str, int]:
    """
    :param suite: a suite, ``off-policy`` or ``table`` (the rows of ``benchmarks.table``)
    :param algo: name of the algorithm
    :param zoo: whether it has rl-zoo3's settings, and then its budget
    :return: environment steps (frames) by environment
    """
    if suite == "table":
        return {target.env_id: target.until for target in TARGETS}
    ids = OFF_POLICY if suite == "off-policy" else [environment.env_id for environment in SUITES[suite]]
    return {env_id: zoo_steps(algo, env_id) if zoo else BUDGET for env_id in ids}


def core_hours(algo: str, env_id: str, steps: int) -> float:
    """
    :param algo: name of the algorithm
    :param env_id: id of the environment
    :param steps: environment steps (frames)
    :return: roughly how long a run takes, without its evaluations
    """
    return steps / frames_per_decision(env_id) * _DECISION_MS.get(algo, 20.0) / 3.6e6
