"""The forms of observations: arrays or Dicts of them, normalised or as the environment gave them."""

from typing import Any

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.vec_env import VecNormalize, VecTransposeImage

#: Key of the observation of a space that is no Dict
PLAIN = ""
Observations = np.ndarray | dict[str, np.ndarray]


def storage_dtype(space: spaces.Space) -> np.dtype:
    """
    :param space: One part of an observation
    :return: How it is stored: in single precision where it has double
    """
    dtype = np.dtype(space.dtype or np.float32)
    return np.dtype(np.float32) if dtype == np.float64 else dtype


def as_dict(obs: Observations) -> dict[str, np.ndarray]:
    """
    :param obs: Observations
    :return: Observations by key, ``PLAIN`` for those of a space that is no Dict
    """
    return obs if isinstance(obs, dict) else {PLAIN: obs}


def original_observations(env: Any, vec_normalize: VecNormalize) -> Observations:
    """
    What VecNormalize normalised last, in the form that the policy sees.

    :param env: The outermost wrapper; SB3 itself puts VecTransposeImage around VecNormalize
    :param vec_normalize: ``env`` itself, or a wrapper below it
    :return: Unnormalised observations, shape ``(n_envs, ...)``, by key for a Dict space
    :raises ValueError: if a wrapper around VecNormalize changes observations in a way that can't be repeated
    """
    obs: Any = vec_normalize.get_original_obs()
    for wrapper in transposers_above(env, vec_normalize):
        obs = wrapper.transpose_observations(obs)
    return obs


def transposers_above(env: Any, vec_normalize: VecNormalize) -> list[VecTransposeImage]:
    """
    :param env: The outermost wrapper
    :param vec_normalize: ``env`` itself, or a wrapper below it
    :return: What changes observations between the two, the innermost first
    :raises ValueError: if a wrapper changes them in a way that can't be repeated
    """
    above: list[VecTransposeImage] = []
    while env is not vec_normalize:
        if isinstance(env, VecTransposeImage):
            above.insert(0, env)
        elif env.observation_space != env.venv.observation_space:
            name = type(env).__name__
            raise ValueError(f"{name}(VecNormalize(env)) is not supported: use VecNormalize({name}(env))")
        env = env.venv
    return above


def copied(obs: Observations) -> Observations:
    """
    :param obs: Of all environments, shape ``(n_envs, ...)``
    :return: The same in memory of its own
    """
    return {key: x.copy() for key, x in obs.items()} if isinstance(obs, dict) else obs.copy()


def put(obs: Observations, index: int, value: Any) -> None:
    """
    :param obs: Of all environments, shape ``(n_envs, ...)``; one of them is overwritten
    :param index: Which
    :param value: Its observation, without the first dimension; by key for a Dict space
    """
    if isinstance(obs, dict):
        for key, x in obs.items():
            x[index] = _rounded_for(x, value[key])
    else:
        obs[index] = _rounded_for(obs, value)


def _rounded_for(array: np.ndarray, value: Any) -> Any:
    """:return: ``value``, which is whole but for errors of rounding where ``array`` holds integers"""
    is_rounded = np.issubdtype(array.dtype, np.integer) and np.issubdtype(np.asarray(value).dtype, np.floating)
    return np.rint(value) if is_rounded else value


def normalized(obs: Observations, vec_normalize: VecNormalize) -> Observations:
    """
    :param obs: As the environments gave them, shape ``(batch, ...)``
    :param vec_normalize: Has the statistics
    :return: Normalised, single precision, same shape
    """
    result = vec_normalize.normalize_obs(obs)
    if isinstance(result, dict):
        return {key: _to_float32(array) for key, array in result.items()}
    return _to_float32(result)


def _to_float32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float64 else array
