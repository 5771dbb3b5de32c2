"""The discount factor that fits the length of a task's episodes."""

from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import VecEnv

#: SB3's own; with ``gamma="auto"`` also the highest, and that of episodes without a time limit
DEFAULT_GAMMA = 0.99
#: The name under which Gymnasium's ``TimeLimit`` keeps it
TIME_LIMIT = "_max_episode_steps"


def gamma_for(time_limit: int | None) -> float:
    """
    ``1 - 5 / time_limit``, so that a fifth of an episode counts (the rule of TD-MPC2, arXiv 2310.16828), between 0.95 and
    0.99.

    :param time_limit: Decisions after which episodes are cut; ``None`` if they aren't, or it isn't known
    :return: The discount factor, 0.99 without a time limit
    """
    if time_limit is None:
        return DEFAULT_GAMMA
    return min(max(1 - 5 / time_limit, 0.95), DEFAULT_GAMMA)


def time_limit_of(env: gym.Env) -> int | None:
    """
    :param env: An environment
    :return: Decisions after which Gymnasium's ``TimeLimit`` cuts its episodes, ``None`` if none does
    """
    try:
        return _as_limit(env.get_wrapper_attr(TIME_LIMIT))
    except AttributeError:
        return None


def common_time_limit(env: VecEnv) -> int | None:
    """
    :param env: Environments
    :return: Of :func:`time_limit_of`, the longest of them; ``None`` if one has none
    """
    # Asked for first: a worker of SubprocVecEnv does not survive the question for what it has not
    limits = [_as_limit(value) for value in env.get_attr(TIME_LIMIT)] if env.has_attr(TIME_LIMIT) else []
    known = [limit for limit in limits if limit is not None]
    return max(known) if known and len(known) == len(limits) else None


def _as_limit(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float)) and value >= 1 else None
