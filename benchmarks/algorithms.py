"""Algorithms by name, and their settings: the defaults, rl-zoo3's tuned ones, overrides from the command line."""

import ast
import importlib
import re
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import gymnasium as gym
import yaml
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.preprocessing import is_image_space
from stable_baselines3.common.utils import LinearSchedule
from torch import nn

ALGORITHMS = {
    **{"m3po": "sb3_m3po:M3PO", "ppo": "stable_baselines3:PPO", "sac": "stable_baselines3:SAC"},
    **{"tqc": "sb3_contrib:TQC", "crossq": "sb3_contrib:CrossQ"},
}
_NOT_SUPPORTED = ("env_wrapper", "vec_env_wrapper", "frame_stack", "callback", "noise_type")


@dataclass
class Settings:
    """
    What an algorithm is built with.

    :param kwargs: arguments of its constructor
    :param n_envs: number of training environments
    :param normalize: arguments of ``VecNormalize``, or ``None`` to do without
    """

    kwargs: dict[str, Any] = field(default_factory=dict)
    n_envs: int = 1
    normalize: dict[str, Any] | None = None


def algorithm_class(name: str) -> type[BaseAlgorithm]:
    """
    :param name: a key of ``ALGORITHMS``, or ``module:Class``
    :return: the class
    """
    path = ALGORITHMS.get(name, name)
    if ":" not in path:
        raise ValueError(f"Unknown algorithm {name!r}: use one of {sorted(ALGORITHMS)}, or module:Class")
    module, attribute = path.split(":")
    return getattr(importlib.import_module(module), attribute)


def policy_name(observation_space: gym.Space) -> str:
    """
    :param observation_space: what the agent sees
    :return: the alias of SB3's policy for it
    """
    if isinstance(observation_space, gym.spaces.Dict):
        return "MultiInputPolicy"
    return "CnnPolicy" if is_image_space(observation_space) else "MlpPolicy"


def zoo_settings(algorithm: str, env_id: str) -> Settings:
    """
    The tuned hyperparameters that rl-zoo3 ships for an environment, or for an older version of it.

    :param algorithm: name of a file in the zoo, for example ``ppo``
    :param env_id: id of the environment; ``HalfCheetah-v5`` finds ``HalfCheetah-v4``
    :return: the settings, ``normalize`` included
    """
    entry = _zoo_entry(algorithm, env_id)
    if unsupported := [key for key in _NOT_SUPPORTED if entry.get(key)]:
        raise ValueError(f"rl-zoo3's {algorithm} settings for {env_id} use {unsupported}, which this harness does not")
    settings = Settings(n_envs=int(entry.pop("n_envs", 1)), normalize=_normalize(entry.pop("normalize", None), entry))
    dropped = {"n_timesteps", "policy", *_NOT_SUPPORTED}
    settings.kwargs = {key: zoo_value(value) for key, value in entry.items() if key not in dropped}
    return settings


def zoo_steps(algorithm: str, env_id: str) -> int:
    """
    :param algorithm: name of a file in the zoo, for example ``ppo``
    :param env_id: id of the environment
    :return: environment steps for which rl-zoo3 trains it
    """
    return int(_zoo_entry(algorithm, env_id)["n_timesteps"])


def _zoo_entry(algorithm: str, env_id: str) -> dict[str, Any]:
    """The zoo's own settings for an environment, or for an older version of it."""
    entries = yaml.safe_load((files("rl_zoo3") / "hyperparams" / f"{algorithm}.yml").read_text())
    stem, _, version = env_id.rpartition("-v")
    names = [f"{stem}-v{older}" for older in range(int(version), -1, -1)]
    entry = next((dict(entries[name]) for name in names if name in entries), None)
    if entry is None:
        raise ValueError(f"rl-zoo3 has no {algorithm} settings for {env_id}: run without --zoo")
    return entry


def _normalize(value: Any, entry: dict[str, Any]) -> dict[str, Any] | None:
    """The zoo's ``normalize`` as arguments of ``VecNormalize``, with the algorithm's discount as the zoo does."""
    if not value:
        return None
    kwargs = _call_to_dict(value) if isinstance(value, str) else {}
    return {**kwargs, **({"gamma": entry["gamma"]} if "gamma" in entry else {})}


def zoo_value(value: Any) -> Any:
    """
    :param value: as YAML or the command line has it
    :return: ``lin_0.001`` as a schedule, ``dict(...)`` as a dictionary, a list as a tuple, all else as it is
    """
    if isinstance(value, str) and value.startswith("lin_"):
        return LinearSchedule(float(value[4:]), 0.0, 1.0)
    if isinstance(value, str) and value.startswith("dict("):
        return _call_to_dict(value)
    return tuple(value) if isinstance(value, list) else value


def _call_to_dict(text: str) -> dict[str, Any]:
    """Read ``dict(key=value, ...)`` where values are literals, ``nn.<Class>`` or ``dict(...)``, without eval."""
    call = ast.parse(re.sub(r"\s+", " ", text), mode="eval").body

    def value_of(node: ast.expr) -> Any:
        if isinstance(node, ast.Call):
            return {keyword.arg: value_of(keyword.value) for keyword in node.keywords}
        return getattr(nn, node.attr) if isinstance(node, ast.Attribute) else ast.literal_eval(node)

    return value_of(call)


def apply_overrides(kwargs: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """
    Put ``key:value`` pairs over the arguments of a constructor.

    :param kwargs: the arguments, left as they are
    :param overrides: for example ``learning_rate:0.002``, ``learning_rate:lin_0.002`` or ``policy_kwargs.n_critics:2``
    :return: a copy with the overrides in it
    """
    result = {key: dict(value) if isinstance(value, dict) else value for key, value in kwargs.items()}
    for override in overrides:
        key, separator, text = override.partition(":")
        if not separator:
            raise ValueError(f"Expected key:value, got {override!r}")
        try:
            value: Any = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = zoo_value(text)
        *parents, name = key.split(".")
        target = result
        for parent in parents:
            target = target.setdefault(parent, {})
        target[name] = value
    return result
