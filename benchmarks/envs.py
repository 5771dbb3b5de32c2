"""Environments of the benchmarks: any Gymnasium id, dm_control through shimmy, MiniGrid as RGB images."""

from functools import partial

import gymnasium as gym
import numpy as np
from gymnasium.wrappers import FlattenObservation, TransformObservation, TransformReward
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import VecEnv

from sb3_m3po.envs import ActionRepeat

DM_CONTROL_ACTION_REPEAT = 2


def frames_per_decision(env_id: str) -> int:
    """
    :param env_id: id of an environment
    :return: how many environment steps (frames) one decision of the agent takes
    """
    return DM_CONTROL_ACTION_REPEAT if env_id.startswith("dm_control/") else 1


def make_env(env_id: str, reward_scale: float = 1.0) -> gym.Env:
    """
    Make an environment that SB3's standard policies can train on.

    dm_control observations become flat float32 vectors, its actions are repeated; its episodes never
    terminate and truncate after 1,000 frames. MiniGrid observations become the RGB image of the whole grid.

    :param env_id: a Gymnasium id, for example ``dm_control/walker-walk-v0`` or ``MiniGrid-Empty-5x5-v0``
    :param reward_scale: factor on the rewards
    :return: the environment
    """
    env = _gymnasium_env(env_id)
    if reward_scale != 1.0:
        env = TransformReward(env, lambda reward: float(reward) * reward_scale)
    return env


def _gymnasium_env(env_id: str) -> gym.Env:
    """The environment with its own rewards."""
    if env_id.startswith("dm_control/"):
        import shimmy  # noqa: F401  (registers the ids)

        flat = FlattenObservation(gym.make(env_id, disable_env_checker=True))
        space = gym.spaces.Box(-np.inf, np.inf, flat.observation_space.shape, np.float32)
        return ActionRepeat(TransformObservation(flat, lambda seen: seen.astype(np.float32), space), DM_CONTROL_ACTION_REPEAT)
    if env_id.startswith("MiniGrid-"):
        from minigrid.wrappers import ImgObsWrapper, RGBImgObsWrapper  # importing minigrid registers the ids

        return ImgObsWrapper(RGBImgObsWrapper(gym.make(env_id, disable_env_checker=True)))
    return gym.make(env_id)


def vec_env(env_id: str, n_envs: int, seed: int, reward_scale: float = 1.0) -> VecEnv:
    """
    Several monitored copies of one environment, stepped in this process.

    :param env_id: see ``make_env``
    :param n_envs: number of copies; copy ``i`` is seeded with ``seed + i``
    :param seed: seed of the first copy
    :param reward_scale: factor on the rewards
    :return: a ``DummyVecEnv``
    """
    return make_vec_env(partial(make_env, env_id, reward_scale), n_envs=n_envs, seed=seed)
