"""The discount factor that fits the length of a task's episodes."""

import math
from numbers import Real
from typing import Any

import gymnasium as gym
from stable_baselines3.common.vec_env import VecEnv

#: Of episodes without a time limit (it is SB3's own), and the highest of a task that only its time limit ends
DEFAULT_GAMMA = 0.99
#: The highest of a task that can end early, in success or in a fall
HIGHEST_GAMMA = 0.995
#: The name under which Gymnasium's ``TimeLimit`` keeps it
TIME_LIMIT = "_max_episode_steps"


def gamma_for(time_limit: int | None, can_terminate: bool = False) -> float:
    """
    ``1 - 5 / time_limit``, so that a fifth of an episode counts (the rule of TD-MPC2, arXiv 2310.16828), at least 0.95 and at
    most 0.995; 0.99 if nothing but the time limit ends an episode.

    Who looks a hundred steps ahead dives when that is fast, and doesn't mind the fall. Where none can happen, the shorter look
    costs nothing and learns faster.

    :param time_limit: Decisions after which episodes are cut; ``None`` if they aren't, or it isn't known
    :param can_terminate: Whether an episode can end before
    :return: The discount factor, 0.99 without a time limit
    """
    if time_limit is None:
        return DEFAULT_GAMMA
    return min(max(1 - 5 / time_limit, 0.95), HIGHEST_GAMMA if can_terminate else DEFAULT_GAMMA)


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
    try:
        # Asked for first: a worker of SubprocVecEnv does not survive the question for what it has not
        limits = [_as_limit(value) for value in env.get_attr(TIME_LIMIT)] if env.has_attr(TIME_LIMIT) else []
    except NotImplementedError:  # SB3 needs no more than ``render_mode`` of a VecEnv's attributes
        return None
    known = [limit for limit in limits if limit is not None]
    return max(known) if known and len(known) == len(limits) else None


def _as_limit(value: Any) -> int | None:
    known = isinstance(value, Real) and not isinstance(value, bool) and 1 <= float(value) < math.inf
    return int(value) if known else None
