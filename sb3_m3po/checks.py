"""Bad input: errors that name what was given and what to do."""

import difflib
import inspect
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from numbers import Integral, Real
from traceback import walk_tb
from typing import Any

import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv
from stable_baselines3.common.base_class import maybe_make_env
from stable_baselines3.common.type_aliases import GymEnv
from stable_baselines3.common.vec_env import VecEnv, VecNormalize

from sb3_m3po.buffers import HybridDictRolloutBuffer, HybridRolloutBuffer
from sb3_m3po.memory import ReplayMemory
from sb3_m3po.observations import Observations, as_dict, transposers_above
from sb3_m3po.policies import CnnPolicy, MlpPolicy, MultiInputPolicy, WorldModelPolicy

_AT_LEAST_ONE = ("batch_size", "sync_interval", "n_step_returns", "horizon", "buffer_size")
_NOT_NEGATIVE = ("utd_ratio", "bonus_coef")


def check_environment(env: Any, made_by: str = "make_multitask_vec_env(tasks)") -> None:
    """
    :param env: What was given as the environment
    :param made_by: What makes one of several tasks
    :raises ValueError: for what SB3 takes for an environment of the former OpenAI Gym, or fails on
    """
    if isinstance(env, VectorEnv):
        raise ValueError(f"{env} is a vector environment of Gymnasium's: wrap it in sb3_m3po.VectorEnvAdapter")
    if isinstance(env, (list, tuple)):
        raise ValueError(f"{env!r} are several environments: make one of them by sb3_m3po.{made_by}")


def made_environment(env: GymEnv | str | None, verbose: int) -> GymEnv | None:
    """
    :param env: What was given as the environment; its id, too
    :param verbose: Whether to say that it is made
    :return: The environment, ``None`` for none
    :raises ValueError: for environments and spaces that are not supported
    :raises NotImplementedError: for a Dict or a Tuple within a Dict, as SB3 does
    """
    check_environment(env)
    if env is not None:
        env = maybe_make_env(env, verbose)
        check_spaces(env.observation_space, env.action_space)
    return env


def check_spaces(observation_space: spaces.Space, action_space: spaces.Space) -> None:
    """
    Before a vec-env or SB3's networks stumble over them.

    :param observation_space: Observation space
    :param action_space: Action space
    :raises ValueError: for a space that is not supported
    :raises NotImplementedError: for a Dict or a Tuple within a Dict, as SB3 does
    """
    parts = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {"": observation_space}
    for key, part in parts.items():
        if problem := _observation_problem(part):
            where = f" under key {key!r}" if key else ""
            nested = key and isinstance(part, (spaces.Dict, spaces.Tuple))
            error = NotImplementedError if nested else ValueError
            raise error(f"Observation space {part}{where} is not supported: {problem}")
    if not isinstance(action_space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        raise ValueError(
            f"Action space {action_space} is not supported: use Box, Discrete, MultiDiscrete or MultiBinary (a Dict or a "
            "Tuple of discrete ones becomes a MultiDiscrete in a wrapper, of Boxes one Box)"
        )
    if isinstance(action_space, spaces.Box) and (0 in action_space.shape or not np.all(np.isfinite(_width(action_space)))):
        raise ValueError(
            f"Action space {action_space} must have a dimension, and a finite lower and upper bound in each: "
            "give it bounds in the environment, or with "
            "gymnasium.wrappers.TransformAction(env, lambda action: action, gymnasium.spaces.Box(low, high))"
        )


def _width(space: spaces.Box) -> np.ndarray:
    """:return: From lower to upper bounds; infinite too where it overflows"""
    dtype = np.result_type(space.dtype, np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        return space.high.astype(dtype) - space.low.astype(dtype)


def _observation_problem(space: spaces.Space) -> str:
    """:return: What to do about an unsupported part of an observation space, nothing for a supported one"""
    if isinstance(space, spaces.Dict):
        return "nested Dicts must be flattened into one, in a wrapper"
    if not isinstance(space, (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)):
        return (
            "use Box, Discrete, MultiDiscrete, MultiBinary, or a Dict of them (a Tuple becomes a Dict in a wrapper, a Text "
            "becomes numbers)"
        )
    if isinstance(space, spaces.MultiDiscrete) and space.nvec.ndim > 1:
        return "flatten its `nvec` in a wrapper"
    if isinstance(space, (spaces.Discrete, spaces.MultiDiscrete)) and np.any(space.start):
        return "SB3 encodes it as one-hot from zero on: subtract `start` in a wrapper"
    if isinstance(space, spaces.Box) and space.shape == ():
        return "give it a shape of (1,)"
    if isinstance(space, spaces.Box) and 0 in space.shape:
        return "it is empty, which SB3's predict can't take: leave it out in a wrapper"
    return ""


def check_classes(model: Any) -> None:
    """
    :param model: An M3PO model whose arguments are stored
    :raises ValueError: for a policy, buffer or action space of another kind
    :raises TypeError: for ``policy_kwargs`` that the policy does not take
    """
    policy_class, chosen = model.policy_class, model.rollout_buffer_class
    if not (isinstance(policy_class, type) and issubclass(policy_class, WorldModelPolicy)):
        raise ValueError(
            f"Policy must subclass WorldModelPolicy, not {policy_class}: use 'MlpPolicy', 'CnnPolicy' or 'MultiInputPolicy'"
        )
    no_dicts = policy_class in (MlpPolicy, CnnPolicy) and "features_extractor_class" not in model.policy_kwargs
    if isinstance(model.observation_space, spaces.Dict) and no_dicts:
        raise ValueError(f"You must use `MultiInputPolicy` with a Dict observation space, not {policy_class.__name__}")
    if not isinstance(model.observation_space, spaces.Dict) and policy_class is MultiInputPolicy:
        raise ValueError(f"MultiInputPolicy needs a Dict observation space, not {model.observation_space}: use 'MlpPolicy'")
    _check_policy_kwargs(policy_class, model.policy_kwargs)
    if isinstance(model.action_space, spaces.MultiDiscrete) and model.action_space.nvec.ndim > 1:
        raise ValueError(
            f"Multi-dimensional MultiDiscrete actions ({model.action_space}) are not supported: "
            "flatten the space's `nvec` in a wrapper"
        )
    needed = HybridDictRolloutBuffer if isinstance(model.observation_space, spaces.Dict) else HybridRolloutBuffer
    if chosen is not None and not (isinstance(chosen, type) and issubclass(chosen, needed)):
        raise ValueError(
            f"rollout_buffer_class={getattr(chosen, '__name__', repr(chosen))} is no {needed.__name__}, the buffer with a "
            f"replay memory for {type(model.observation_space).__name__} observations: use it, a subclass, or None"
        )
    if model._vec_normalize_env is not None:
        transposers_above(model.env, model._vec_normalize_env)


def _check_policy_kwargs(policy_class: type, given: dict[str, Any]) -> None:
    if taken := {"gamma", "time_limit", "planner_kwargs", "task_key", "n_tasks"} & set(given):
        raise ValueError(f"policy_kwargs hold {sorted(taken)}: pass them to M3PO itself")
    known = inspect.signature(policy_class).parameters
    unknown = [] if any(p.kind is p.VAR_KEYWORD for p in known.values()) else [name for name in given if name not in known]
    if unknown:
        near = difflib.get_close_matches(unknown[0], known, n=1, cutoff=0.0)[0]
        raise TypeError(f"policy_kwargs got unexpected keyword arguments {unknown}: for {unknown[0]!r} do you mean {near!r}?")


def check_numbers(model: Any) -> None:
    """
    Written as ``not x > 0``: NaN compares as false.

    :param model: An M3PO model whose arguments are stored
    :raises ValueError: for a number out of its range
    """
    given = vars(model)
    for name in _AT_LEAST_ONE if model.n_steps is None else ("n_steps", *_AT_LEAST_ONE):
        if not (isinstance(given[name], Integral) and given[name] >= 1):
            raise ValueError(f"{name}={given[name]!r} must be a whole number (an int) of at least 1")
    for name in _NOT_NEGATIVE if model.learning_starts is None else ("learning_starts", *_NOT_NEGATIVE):
        if not (_is_number(given[name]) and 0 <= given[name] < math.inf):
            otherwise = ", or be None" if name == "learning_starts" else ""
            raise ValueError(f"{name}={given[name]!r} must be a finite number and not negative{otherwise}")
    for name, otherwise in (("gamma", ", or be 'auto'"), ("gae_lambda", ""), ("plan_rollouts", "")):
        fits = (_is_number(given[name]) and 0 <= given[name] <= 1) or (otherwise and given[name] == "auto")
        if not fits:
            raise ValueError(f"{name}={given[name]!r} must lie between 0 and 1{otherwise}")
    if not (_is_number(model.max_grad_norm) and model.max_grad_norm > 0):
        raise ValueError(f"max_grad_norm={model.max_grad_norm!r} must be positive; float('inf') clips nothing")
    if model.target_kl is not None and not (_is_number(model.target_kl) and model.target_kl > 0):
        raise ValueError(f"target_kl={model.target_kl!r} must be positive, or None for no trust region")
    if model.use_sde:
        raise ValueError("M3PO does not support generalized State-Dependent Exploration: pass use_sde=False")


def check_capacity(model: Any, n_envs: int) -> None:
    """
    :param model: An M3PO model
    :param n_envs: Environments that share its memory
    :raises ValueError: if the sequences that it learns from don't fit into the memory
    """
    capacity = max(model.rollout_buffer_kwargs.get("memory_size", model.buffer_size) // n_envs, 1)
    if max(model.horizon, model.n_step_returns) > capacity:
        raise ValueError(
            f"horizon={model.horizon} and n_step_returns={model.n_step_returns} must fit into the memory's "
            f"{capacity} steps per environment (buffer_size={model.buffer_size})"
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, Real)


def known_ent_coef(ent_coef: str | float) -> str | float:
    """
    :param ent_coef: A number, as a text too, ``"auto"`` or ``"auto_<initial value>"``
    :return: The same, as a number where it is one: as in SAC, only what begins with ``"auto"`` is learned
    """
    try:
        return float(ent_coef)
    except (TypeError, ValueError):
        return ent_coef


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
    if not (math.isfinite(initial) and (initial > 0 if isinstance(ent_coef, str) else initial >= 0)):
        raise ValueError(f"ent_coef={ent_coef!r} must be a finite number of at least 0, 'auto' or 'auto_<initial value>'")
    return initial


def check_finite(model: Any, kind: str, values: Observations, env: int | None = None) -> None:
    """
    :param model: An M3PO model
    :param kind: What it is, for the message
    :param values: One row per environment, or a Dict of them
    :param env: The environment of a single row
    :raises ValueError: for NaN, infinite or (in float32) overflowing values, before they reach the memory
    """
    for key, part in values.items() if isinstance(values, dict) else (("", values),):
        if part.dtype.kind != "f":
            continue
        with np.errstate(over="ignore"):
            rows = np.isfinite(part.astype(np.float32, copy=False).reshape(len(part), -1)).all(-1)
        if not rows.all():
            bad = np.flatnonzero(~rows).tolist() if env is None else [env]
            where = f" under key {key!r}" if key else ""
            names = getattr(model.env.unwrapped, "task_names", [])
            tasks = f" (task {', '.join(dict.fromkeys(repr(names[i]) for i in bad))})" if names else ""
            raise ValueError(
                f"Environment {bad}{tasks} returned a NaN or infinite {kind}{where} at step {model.num_timesteps}: nothing of "
                "it was stored; check the environment (SB3's VecCheckNan helps to find the cause)"
            )


def check_step(
    model: Any, obs: Observations, rewards: np.ndarray | None, dones: np.ndarray, infos: list[dict[str, Any]]
) -> None:
    """
    Before anything of a step reaches the memory.

    :param model: An M3PO model
    :param obs: The environments' observations, one row each
    :param rewards: Shape ``(n_envs,)``; ``None`` after a reset
    :param dones: Which episodes ended, shape ``(n_envs,)``
    :param infos: Hold the last observation of those
    :raises ValueError: for NaN or infinite observations (an episode's last one included) or rewards
    """
    if (vec_normalize := model._vec_normalize_env) is not None:
        # Its statistics spread a bad number over all environments
        obs, rewards = vec_normalize.get_original_obs(), None if rewards is None else vec_normalize.get_original_reward()
    check_finite(model, "observation", obs)
    if model.n_tasks is not None:
        check_one_hots(obs, model.n_tasks)
    if rewards is not None:
        check_finite(model, "reward", rewards)
    for i in np.flatnonzero(dones).tolist():
        if (final := infos[i].get("terminal_observation")) is not None:
            check_finite(model, "observation", {k: np.asarray([v]) for k, v in as_dict(final).items()}, i)


@contextmanager
def begun_anew_after_errors(model: Any) -> Iterator[None]:
    """
    Where a training is broken off (a bad step, a callback's error, Ctrl-C), the environments may have gone on without the
    model: a continued training begins with a reset.

    :param model: An M3PO model
    """
    try:
        yield
    except BaseException:
        model._last_obs = None
        raise


def check_one_hots(obs: Any, n_tasks: int) -> None:
    """
    :param obs: Vectors, one row per environment
    :param n_tasks: Length of the one-hot of the task that they end in
    :raises ValueError: if they end in anything else
    """
    tails = obs[:, -n_tasks:]
    wrong = ~np.isin(tails, (0, 1)).all(-1) | (tails.sum(-1) != 1)
    if wrong.any():
        bad = int(wrong.argmax())
        raise ValueError(
            f"The observation of environment {bad} ends in {tails[bad].tolist()}, which is no one-hot of n_tasks={n_tasks} "
            "tasks: leave n_tasks out if observations don't say the task"
        )


def check_statistics(vec_normalize: VecNormalize) -> None:
    """
    :param vec_normalize: Whose running statistics apply
    :raises ValueError: for NaN or infinite ones: they never recover
    """
    statistics = getattr(vec_normalize, "obs_rms", None)
    for part in statistics.values() if isinstance(statistics, dict) else [statistics] if statistics else []:
        if not (np.all(np.isfinite(part.mean)) and np.all(np.isfinite(part.var))):
            raise ValueError(
                "VecNormalize's statistics hold NaN or infinite values, from an observation that was: make it anew, or "
                "VecNormalize.load() what was saved with the last checkpoint"
            )


def warn_of_reward_normalisation(model: Any) -> bool:
    """
    :param model: An M3PO model under VecNormalize, about to learn
    :return: Whether it has just been warned, which happens once
    """
    if not model._vec_normalize_env.norm_reward or model._warned_of_reward_normalisation:
        return False
    warnings.warn(
        "VecNormalize's reward normalisation has no effect on M3PO, which learns from the environment's own rewards "
        "and scales them itself: pass norm_reward=False",
        stacklevel=5,
    )
    return True


def warn_of_no_update(model: Any) -> None:
    """
    :param model: An M3PO model that has just finished to learn
    """
    memory: ReplayMemory = model.replay_buffer
    if model._n_updates > 0:
        return
    if memory.is_enough(model.learning_starts) and model._update_credits >= model.sync_interval:
        reason = "updates follow full rollouts, and a callback stopped each of them before its end: pass a smaller n_steps"
    elif memory.is_enough(model.learning_starts):
        reason = (
            f"{model._update_credits:g} updates are due, of sync_interval={model.sync_interval} that are done at a time. "
            "Learn for longer, or pass a smaller sync_interval or a larger utd_ratio"
        )
    elif model.learning_starts is None:
        reason = (
            f"the first update waits for five episodes{' of each task' if memory.tasks else ''} and 1,000 transitions, or for "
            f"5,000 (in memory: {memory.n_episodes} and {memory.size()}). Learn for longer, or pass learning_starts"
        )
    else:
        return
    warnings.warn(f"Nothing was learned yet: {reason}", stacklevel=3)


def check_memory(loaded: Any, mine: ReplayMemory, path: Any) -> None:
    """
    :param loaded: What was in a file
    :param mine: The model's memory
    :param path: The file
    :raises ValueError: unless it is a memory of the same spaces, tasks and number of environments
    """
    if not isinstance(loaded, ReplayMemory):
        raise ValueError(f"{path} holds a {type(loaded).__name__}, not a ReplayMemory saved by save_replay_buffer()")
    if (loaded.spaces, loaded.action_space) != (mine.spaces, mine.action_space):
        raise ValueError(
            f"The memory's spaces {loaded.spaces}, {loaded.action_space} are not the model's {mine.spaces}, "
            f"{mine.action_space}"
        )
    told_by = [None if memory.tasks is None else (memory.tasks.key, memory.tasks.table) for memory in (loaded, mine)]
    if told_by[0] != told_by[1]:
        raise ValueError(
            f"The memory tells tasks apart by {told_by[0]}, the model by {told_by[1]} (key and table; None: one task): load "
            "it into a model with the task_key and n_tasks of the one that saved it"
        )
    if loaded.n_envs != mine.n_envs:
        raise ValueError(
            f"The memory was saved with {loaded.n_envs} environments, the model has {mine.n_envs}: "
            "use as many, or continue without the memory"
        )


@contextmanager
def dead_workers_named(
    owner: Any, tasks: Sequence[str] | None = None, last_seen: Sequence[str] | None = None
) -> Iterator[None]:
    """
    While environments in processes of their own are made, reset or take a step.

    :param owner: The model or the vec-env that does it; ``None`` while a vec-env is being made
    :param tasks: Names of the environments' tasks, in their order; by default what ``make_multitask_vec_env`` noted in the
        vec-env
    :param last_seen: Where environments draw their tasks: what they were at last; by default what a model's last
        observations say
    :raises RuntimeError: if processes died: which environments they were, and in which tasks
    """
    try:
        yield
    except (EOFError, ConnectionError) as error:
        env = _half_made(error) if owner is None else owner if isinstance(owner, VecEnv) else owner.env
        processes = getattr(getattr(env, "unwrapped", None), "processes", [])
        ended = wait([process.sentinel for process in processes], timeout=5) if processes else []
        dead = [i for i, process in enumerate(processes) if process.sentinel in ended]
        if not dead:
            raise
        noted = tasks or getattr(getattr(env, "unwrapped", None), "task_names", [])
        # One that draws its tasks may have been about to begin another one
        seen, word = (noted, "task") if noted else (last_seen or _last_seen(owner), "last seen in task")
        _give_up(env)
        names = [f"environment {i}" + (f" ({word} {seen[i]!r})" if seen else "") for i in dead]
        raise RuntimeError(
            f"The process of {', '.join(names)} died: its own error stands above; if there is none, it was killed (out of "
            f"memory, say) or crashed in native code. {_what_to_do(owner)}"
        ) from error


def _give_up(env: Any) -> None:
    """Close what is left of environments in processes: ``close()`` would wait for answers that have been read already."""
    for process in env.unwrapped.processes:
        process.terminate()
    for process in env.unwrapped.processes:
        process.join(timeout=5)
    # Of an adapter, Gymnasium's vector environment
    holder = getattr(env.unwrapped, "venv", env).unwrapped
    holder.closed = True


def _half_made(error: BaseException) -> VecEnv | None:
    """:return: The vec-env in whose constructor it failed, which nobody but that constructor's frame has got hold of"""
    owners = [frame.f_locals.get("self") for frame, _ in walk_tb(error.__traceback__)]
    return next((owner for owner in reversed(owners) if isinstance(owner, VecEnv)), None)


def _last_seen(model: Any) -> Sequence[str]:
    """:return: Names of the tasks of a model's last observations, nothing where there are none"""
    if getattr(model, "task_table", None) is None or model._last_obs is None:
        return []
    return [model.task_table.names[i] for i in model.policy.tasks.ids(model._last_obs)]


def _what_to_do(owner: Any) -> str:
    if isinstance(owner, VecEnv):
        return "The vec-env is of no more use: make it anew"
    if owner is not None:
        return "The model is unharmed: save() it, or set_env() and learn() on"
    return "Scripts that start processes need `if __name__ == '__main__':`, and must register environments outside of it"
