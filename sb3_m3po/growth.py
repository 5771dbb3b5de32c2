"""How a trained model takes in new tasks: what each of its tensors becomes when the table grows."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.vec_env import VecEnv, unwrap_vec_normalize

from sb3_m3po.checks import check_capacity, check_environment
from sb3_m3po.nets import RunningNorm
from sb3_m3po.policies import WorldModelPolicy
from sb3_m3po.tasks import TaskReader, TaskSpace, TaskTable, find_tasks


def check_growth(model: Any, env: VecEnv, train: str) -> None:
    """
    :param model: An M3PO model
    :param env: Environments with a larger table
    :param train: What is to learn from now on
    :raises ValueError: if they have not the model's widths, their table does not begin with the model's, only one of both has
        VecNormalize, or there are too many of them for its memory
    """
    observation_space, action_space = env.observation_space, env.action_space
    if train not in ("all", "new"):
        raise ValueError(f"train={train!r} must be 'all', or 'new' for the new tasks' embeddings and the output layers only")
    known: TaskReader | None = model.policy.tasks
    if known is None:
        raise ValueError("This model was trained on a single task and has no embeddings to add to: train one on two tasks")
    if known.key is None:
        raise ValueError(
            f"This model reads its {len(known.table)} tasks from a one-hot in the observations (n_tasks=), which can't grow: "
            "train one on environments whose observations have a key for the task, as make_multitask_vec_env() makes them"
        )
    found = find_tasks(observation_space, model.task_key, model.n_tasks)
    if found is None or not found.table.extends(known.table):
        raise ValueError(
            f"The environments' tasks ({'one' if found is None else ', '.join(found.table.names)}) must begin with the "
            f"model's ({', '.join(known.table.names)}): make them by make_multitask_vec_env(new_tasks, like=model)"
        )
    if len(found.table) == len(known.table):
        raise ValueError(f"The environments have no new task: the model knows {', '.join(known.table.names)}")
    if found.seen(observation_space) != known.seen(model.observation_space) or action_space != model.action_space:
        raise ValueError(
            f"New tasks must fit the model's widths. Observations: {found.seen(observation_space)}, the model has "
            f"{known.seen(model.observation_space)}. Actions: {action_space}, the model has {model.action_space}. Give a "
            "model room from the start by make_multitask_vec_env(..., observation_dim=..., action_dim=...)"
        )
    if model.env is not None and (unwrap_vec_normalize(env) is None) != (model.get_vec_normalize_env() is None):
        raise ValueError(
            "The model's environments and the new ones must both be in a VecNormalize, or none: what is known was learned "
            "from observations of its scale. For its statistics: VecNormalize.load(path, env)"
        )
    check_capacity(model, env.num_envs)


@contextmanager
def misfits_explained(known: Any, env: Any) -> Iterator[None]:
    """
    While SB3 compares spaces, of which it only prints both.

    :param known: An M3PO model, or the path of a saved one
    :param env: Environments
    :raises ValueError: if they are no environment for SB3, or their tasks or widths not the model's: what to do
    """
    check_environment(env, "make_multitask_vec_env(tasks, like=model)")
    try:
        yield
    except ValueError as error:
        if "spaces do not match" not in str(error) or not isinstance(known, (str, Path, BaseAlgorithm)):
            raise
        saved = vars(known) if isinstance(known, BaseAlgorithm) else load_from_zip_file(known)[0]
        mine, theirs = (_table(space) for space in ((saved or {}).get("observation_space"), env.observation_space))
        if mine is None or theirs is None:
            raise
        raise ValueError(f"{_misfit(mine, theirs)}. {error}") from error


def _table(space: spaces.Space | None) -> TaskTable | None:
    parts = space.spaces.values() if isinstance(space, spaces.Dict) else ()
    return next((part.table for part in parts if isinstance(part, TaskSpace)), None)


def _misfit(mine: TaskTable, theirs: TaskTable) -> str:
    """:return: Why environments of ``theirs`` are none for a model of ``mine``, and what to do"""
    like = "make them by make_multitask_vec_env(tasks, like=model)"
    if mine == theirs:
        return f"The environments are wider or narrower than the model: {like}, which pads them as the model's are"
    if theirs.extends(mine):
        new = ", ".join(theirs.names[len(mine) :])
        return f"The model does not know the tasks {new}: load it without environments, then add_tasks(env) takes them in"
    for spec in theirs:
        if spec.name in mine.names and spec != (known := mine[mine.id_of(spec.name)]):
            return f"Task {spec.name!r} of the environments is {spec}, the model's {known}: give it another name, or {like}"
    return f"The environments' tasks ({', '.join(theirs.names)}) are not the model's ({', '.join(mine.names)}): {like}"


def take_over(policy: WorldModelPolicy, old: WorldModelPolicy) -> None:
    """
    Let a policy of more tasks begin where another one stands. What is kept per task gets new rows: embeddings the mean of
    the known ones, observations the mean of the known statistics until their own are known, all else as at the start.

    :param policy: Changed in place
    :param old: Of the first tasks of the same table
    """
    state = policy.state_dict()
    for name, value in old.state_dict().items():
        state[name] = _grown(value, state[name])
    if old.tasks is not None:
        for name, model in (("world_model", old.world_model), ("bar", old.bar), ("mean.module.1", old.mean.world_model)):
            state[f"{name}.task_embedding"][len(old.tasks.table) :] = model.task_embeddings().mean(0)
    for name, norm in old.norms.items():
        assert isinstance(norm, RunningNorm)
        for part, mean in zip(("shift", "scale"), norm.mean_over_tasks(), strict=True):
            state[f"norms.{name}.{part}"][len(norm.shift) :] = mean
    policy.load_state_dict(state)
    # What predicts stays as it is until the first update, and then follows as at the start: a mean over many states would lag
    policy.mean.n_averaged.zero_()
    policy._planning, policy._planning_milliseconds = old._planning, old._planning_milliseconds
    for name in ("optimizer", "model_optimizer", "coef_optimizer"):
        _take_over_optimizer(getattr(policy, name), getattr(old, name))


def _grown(old: th.Tensor, new: th.Tensor) -> th.Tensor:
    """:return: The old tensor, its missing rows as in the new one"""
    if old.shape == new.shape:
        return old
    return th.cat([old, new[len(old) :]])


def _take_over_optimizer(optimizer: th.optim.Optimizer, old: th.optim.Optimizer) -> None:
    """
    New rows begin with no momentum, and with the mean of the known squared gradients: all share one count of steps, after
    which squares of zero would let them leap.
    """
    state = old.state_dict()
    groups = zip(optimizer.param_groups, old.param_groups, strict=True)
    pairs = [pair for new, known in groups for pair in zip(new["params"], known["params"], strict=True)]
    for index, (new, known) in enumerate(pairs):
        for name, value in state["state"].get(index, {}).items():
            if isinstance(value, th.Tensor) and value.shape == known.shape != new.shape:
                rows = value.mean(0, keepdim=True) if name == "exp_avg_sq" else th.zeros_like(value[:1])
                state["state"][index][name] = th.cat([value, rows.expand(len(new) - len(known), *rows.shape[1:])])
    optimizer.load_state_dict(state)
