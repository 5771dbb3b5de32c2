"""Bad input: errors that name what was given and what to do."""

import math
from typing import Any

import numpy as np
from gymnasium import spaces

from sb3_m3po.buffers import HybridDictRolloutBuffer, HybridRolloutBuffer, Observations
from sb3_m3po.policies import CnnPolicy, MlpPolicy, WorldModelPolicy

_AT_LEAST_ONE = ("batch_size", "sync_interval", "n_step_returns", "horizon", "buffer_size")
_NOT_NEGATIVE = ("utd_ratio", "learning_starts", "bonus_coef")


def check_observation_space(space: spaces.Space) -> None:
    """:raises ValueError: for a space that SB3's policies can't take, before a vec-env stumbles over it"""
    supported = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
    parts = space.spaces if isinstance(space, spaces.Dict) else {"": space}
    for key, part in parts.items():
        if not isinstance(part, (*supported, spaces.Dict)):
            where = f" under key {key!r}" if key else ""
            raise ValueError(
                f"Observation space {type(part).__name__}{where} is not supported: use Box, Discrete, MultiDiscrete, "
                "MultiBinary, or a Dict of them (a Tuple becomes a Dict in a wrapper, a Text becomes numbers)"
            )


def check_classes(model: Any) -> None:
    """
    :param model: An M3PO model whose arguments are stored
    :raises ValueError: for a policy, buffer or action space of another kind
    """
    policy_class, chosen = model.policy_class, model.rollout_buffer_class
    if not (isinstance(policy_class, type) and issubclass(policy_class, WorldModelPolicy)):
        raise ValueError(
            f"Policy must subclass WorldModelPolicy, not {policy_class}: use 'MlpPolicy', 'CnnPolicy' or 'MultiInputPolicy'"
        )
    no_dicts = policy_class in (MlpPolicy, CnnPolicy) and "features_extractor_class" not in model.policy_kwargs
    if isinstance(model.observation_space, spaces.Dict) and no_dicts:
        raise ValueError(f"You must use `MultiInputPolicy` with a Dict observation space, not {policy_class.__name__}")
    if isinstance(model.action_space, spaces.MultiDiscrete) and model.action_space.nvec.ndim > 1:
        raise ValueError(
            f"Multi-dimensional MultiDiscrete actions ({model.action_space}) are not supported: "
            "flatten the space's `nvec` in a wrapper"
        )
    if chosen is not None and not issubclass(chosen, (HybridRolloutBuffer, HybridDictRolloutBuffer)):
        raise ValueError(
            f"rollout_buffer_class={chosen.__name__} has no replay memory: "
            "use HybridRolloutBuffer (HybridDictRolloutBuffer for Dict observations) or a subclass"
        )


def check_numbers(model: Any) -> None:
    """
    Written as ``not x >= 0``: NaN compares as false.

    :param model: An M3PO model whose arguments are stored
    :raises ValueError: for a number out of its range
    """
    given = vars(model)
    for name in _AT_LEAST_ONE if model.n_steps is None else ("n_steps", *_AT_LEAST_ONE):
        if not (given[name] >= 1 and int(given[name]) == given[name]):
            raise ValueError(f"{name}={given[name]} must be a whole number of at least 1")
    for name in _NOT_NEGATIVE:
        if not given[name] >= 0:
            raise ValueError(f"{name}={given[name]} must not be negative")
    for name in ("gamma", "gae_lambda"):
        if not 0 <= given[name] <= 1:
            raise ValueError(f"{name}={given[name]} must lie between 0 and 1")
    if not model.max_grad_norm > 0:
        raise ValueError(f"max_grad_norm={model.max_grad_norm} must be positive; float('inf') clips nothing")
    if model.target_kl is not None and not model.target_kl > 0:
        raise ValueError(f"target_kl={model.target_kl} must be positive, or None for no trust region")


def initial_ent_coef(ent_coef: str | float, auto: float) -> float:
    """
    :param ent_coef: A number, ``"auto"`` or ``"auto_<initial value>"``
    :param auto: What ``"auto"`` begins with
    :return: The entropy coefficient to begin with
    :raises ValueError: for anything else
    """
    try:
        initial = float((ent_coef[5:] or "nan") if isinstance(ent_coef, str) and ent_coef.startswith("auto_") else ent_coef)
    except ValueError:
        initial = auto if ent_coef == "auto" else math.nan
    if not (initial > 0 if isinstance(ent_coef, str) else initial >= 0):
        raise ValueError(f"ent_coef={ent_coef!r} must be a number of at least 0, 'auto' or 'auto_<initial value>'")
    return initial


def check_finite(kind: str, values: Observations, step: int, env: int | None = None) -> None:
    """
    :param kind: What it is, for the message
    :param values: One row per environment, or a Dict of them
    :param step: Environment steps so far
    :param env: The environment of a single row
    :raises ValueError: for NaN, infinite or (in float32) overflowing values, before they reach the memory
    """
    for part in values.values() if isinstance(values, dict) else (values,):
        if part.dtype.kind != "f":
            continue
        with np.errstate(over="ignore"):
            rows = np.isfinite(part.astype(np.float32, copy=False).reshape(len(part), -1)).all(-1)
        if not rows.all():
            bad = np.flatnonzero(~rows).tolist()
            raise ValueError(
                f"Environment {bad if env is None else [env]} returned a NaN or infinite {kind} at step "
                f"{step}: nothing of it was stored; check the environment (SB3's VecCheckNan helps to find the cause)"
            )
