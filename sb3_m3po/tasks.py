"""What a model knows of its tasks: their names, sizes, masks and discounts. It is saved with the model, in its spaces."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from gymnasium.spaces.utils import flatdim

from sb3_m3po.discount import gamma_for


@dataclass(frozen=True)
class TaskSpec:
    """
    One task of a :class:`TaskTable`.

    :param name: Under which it is logged, unique in its table
    :param observation_dim: Entries of its own observation, before padding; ``None`` where nothing is padded
    :param action_dim: Its own action dimensions (Box) or number of actions (Discrete), before padding; ``None`` where nothing
        is padded
    :param gamma: Its discount factor; ``None`` for the model's
    :param time_limit: Decisions after which its episodes are cut, 0 if they aren't, ``None`` if it isn't known: what
        ``gamma="auto"`` goes by. Tasks that differ in nothing else are equal
    :raises ValueError: for an empty name, a size below 1 or a discount outside of [0, 1]
    """

    name: str
    observation_dim: int | None = None
    action_dim: int | None = None
    gamma: float | None = None
    time_limit: int | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not (self.name and isinstance(self.name, str)):
            raise ValueError(f"A task needs a name, not {self.name!r}: a text, under which its results are logged")
        for name in ("observation_dim", "action_dim"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"{name}={size} of task {self.name!r} must be at least 1")
        if self.gamma is not None and not (isinstance(self.gamma, Real) and 0 <= self.gamma <= 1):
            raise ValueError(f"gamma={self.gamma!r} of task {self.name!r} must lie between 0 and 1; None for the model's")


class TaskTable(Sequence[TaskSpec]):
    """
    The tasks of a model, by their ids ``0, 1, ...``; ids never change, new tasks come at the end.

    :param specs: The tasks
    :raises ValueError: if there is none, or a name occurs twice
    """

    def __init__(self, specs: Sequence[TaskSpec]):
        self.specs = tuple(specs)
        if not self.specs:
            raise ValueError("A task table needs at least one task")
        if twice := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise ValueError(f"Task names {twice} occur more than once: give each a name of its own, Task(..., name='...')")

    @classmethod
    def anonymous(cls, n_tasks: int) -> "TaskTable":
        """
        :param n_tasks: How many
        :return: ``task0``, ``task1``, ...: tasks of which nothing but the number is known
        """
        return cls([TaskSpec(f"task{i}") for i in range(n_tasks)])

    def __len__(self) -> int:
        return len(self.specs)

    def __getitem__(self, index: Any) -> Any:
        return self.specs[index]

    def __iter__(self) -> Iterator[TaskSpec]:
        return iter(self.specs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TaskTable) and self.specs == other.specs

    def __hash__(self) -> int:
        return hash(self.specs)

    def __repr__(self) -> str:
        return f"TaskTable({', '.join(self.names)})"

    @property
    def names(self) -> list[str]:
        """:return: The tasks' names, by id"""
        return [spec.name for spec in self.specs]

    def id_of(self, name: str) -> int:
        """
        :param name: Of a task
        :return: Its id
        :raises ValueError: if the table has no such task
        """
        if name not in self.names:
            raise ValueError(f"Unknown task {name!r}: the table has {', '.join(self.names)}")
        return self.names.index(name)

    def with_tasks(self, specs: Sequence[TaskSpec]) -> "TaskTable":
        """
        :param specs: Tasks, of which some may be in the table already
        :return: This table and behind it the new ones
        :raises ValueError: if a known name comes with other sizes or another discount
        """
        new = []
        for spec in specs:
            if spec.name not in self.names:
                new.append(spec)
            elif spec != (known := self.specs[self.id_of(spec.name)]):
                raise ValueError(
                    f"Task {spec.name!r} is in the table as {known}, not as {spec}: make it the same, or give it another name"
                )
        return TaskTable([*self.specs, *new])

    def extends(self, other: "TaskTable") -> bool:
        """
        :param other: Another table
        :return: Whether this one begins with all of the other's tasks
        """
        return self.specs[: len(other)] == other.specs

    def action_masks(self, width: int) -> np.ndarray:
        """
        :param width: Action dimensions (Box) or number of actions (Discrete) after padding
        :return: Which of them each task has, boolean, shape ``(n_tasks, width)``
        """
        own = np.array([width if spec.action_dim is None else spec.action_dim for spec in self.specs])
        return np.arange(width) < own[:, None]

    def gammas(self, default: float | str, time_limit: int | None = None, can_terminate: bool = False) -> np.ndarray:
        """
        :param default: Discount of the tasks that have none of their own; ``"auto"`` for :func:`~sb3_m3po.discount.gamma_for`
        :param time_limit: Of the tasks that know none of their own
        :param can_terminate: Whether their episodes can end before
        :return: Shape ``(n_tasks,)``
        """
        limits = [time_limit if spec.time_limit is None else spec.time_limit or None for spec in self.specs]
        defaults = [gamma_for(limit, can_terminate) if isinstance(default, str) else default for limit in limits]
        return np.array([own if spec.gamma is None else spec.gamma for spec, own in zip(self.specs, defaults, strict=True)])


class TaskSpace(spaces.Discrete):
    """
    The id of a task, and what all tasks are: an observation space that holds one carries the table along, through any vec-env
    and into the saved model.

    :param table: The tasks
    """

    def __init__(self, table: TaskTable):
        super().__init__(len(table))
        self.table = table

    def __eq__(self, other: object) -> bool:
        # Equal numbers of other tasks, or in another order, would be mixed up silently
        return isinstance(other, TaskSpace) and self.table == other.table

    def __hash__(self) -> int:
        return hash(self.table)

    def __repr__(self) -> str:
        return f"TaskSpace({', '.join(self.table.names)})"


class TaskReader:
    """
    Where an observation says which task it is of: under a key, or in a one-hot tail.

    :param table: The tasks
    :param key: Key of the task's id in a Dict observation; ``None`` for a one-hot in the last entries of a vector
    """

    def __init__(self, table: TaskTable, key: str | None):
        self.table = table
        self.key = key

    def ids(self, observations: Any) -> Any:
        """
        :param observations: Arrays or tensors, of any leading dimensions, by key for a Dict space
        :return: Their tasks' ids, flat, of the same kind (``int64``)
        :raises ValueError: for an id outside of the table, which is named, or a tail that is no one-hot
        """
        if self.key is None:
            tails = observations[..., -len(self.table) :].reshape(-1, len(self.table))
            # Of VecNormalize's one-hots, too, one entry is positive
            if not (good := (tails > 0).sum(-1) == 1).all():
                raise ValueError(
                    f"An observation ends in {tails[~good][0].tolist()}, which is no one-hot of {len(self.table)} tasks: let "
                    f"exactly one of the last {len(self.table)} entries be 1"
                )
            ids = tails.argmax(-1)
        else:
            ids = observations[self.key].reshape(-1)
            ids = ids.long() if isinstance(ids, th.Tensor) else ids.astype(np.int64)
        if len(ids) and not 0 <= (lowest := int(ids.min())) <= (highest := int(ids.max())) < len(self.table):
            bad = lowest if lowest < 0 else highest
            raise ValueError(
                f"Task {bad} is not in the table of {len(self.table)} tasks ({', '.join(self.table.names)}): "
                "add_tasks() takes new ones in"
            )
        return ids

    def seen(self, space: spaces.Space) -> spaces.Space:
        """
        :param space: The observation space
        :return: What the networks see of it: all but the key, which the embedding stands for
        """
        if self.key is None:
            return space
        assert isinstance(space, spaces.Dict)
        return spaces.Dict({key: part for key, part in space.spaces.items() if key != self.key})


def find_tasks(observation_space: spaces.Space, task_key: str | None, n_tasks: int | None) -> TaskReader | None:
    """
    :param observation_space: Of the environments
    :param task_key: Key of the task's id; a Dict space without it has a single task, and any space for ``None``
    :param n_tasks: Length of the one-hot tail of a vector space, ``None`` if there is none
    :return: How to tell the tasks apart, ``None`` for a single task
    :raises ValueError: if what is asked for isn't there
    """
    if n_tasks is not None:
        if not isinstance(n_tasks, Integral):
            raise ValueError(f"n_tasks={n_tasks!r} must be a whole number (an int)")
        if not (isinstance(observation_space, spaces.Box) and len(observation_space.shape) == 1):
            raise ValueError(
                f"n_tasks={n_tasks} is for vectors that end in a one-hot of the task, not for {observation_space}"
            )
        if not 1 <= n_tasks < observation_space.shape[0]:
            raise ValueError(f"n_tasks={n_tasks} must lie between 1 and the vector's {observation_space.shape[0]} entries")
        return _reader(TaskTable.anonymous(n_tasks), None)
    keys = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {}
    if task_key is None or (task_key == "task" and task_key not in keys):
        return None
    table = find_table(observation_space, task_key)
    if set(keys) == {task_key}:
        raise ValueError(f"The observations hold nothing but the task's id, {observation_space}: add what the agent shall see")
    return _reader(table, task_key)


def find_table(observation_space: spaces.Space, task_key: str = "task") -> TaskTable:
    """
    :param observation_space: Of the environments
    :param task_key: Key of the task's id
    :return: The tasks; ``task0``, ``task1``, ... where nothing but their number is known
    :raises ValueError: if there is no such key, or it holds no id
    """
    parts = observation_space.spaces if isinstance(observation_space, spaces.Dict) else {}
    if task_key not in parts:
        raise ValueError(
            f"task_key={task_key!r} is no key of the observations {observation_space}, which would tell the tasks apart: make "
            "the environments by make_multitask_vec_env(), or name the key by task_key=. For a single task there are SB3's "
            "evaluate_policy() and EvalCallback"
        )
    space = parts[task_key]
    if isinstance(space, TaskSpace):
        return space.table
    if not isinstance(space, spaces.Discrete) or space.start != 0:
        raise ValueError(
            f"The observation's {task_key!r} must be a Discrete space that starts at 0, not {space}: if it is no task's id, "
            "name another key, or pass task_key=None for a single task"
        )
    return TaskTable.anonymous(int(space.n))


def known_tasks(observation_space: spaces.Space, tasks: TaskReader | None, task_key: str | None) -> TaskTable:
    """
    :param observation_space: Of the environments
    :param tasks: How the tasks are told apart, ``None`` for a single one
    :param task_key: Key of the task's id
    :return: The tasks; of a single one what is known of it
    """
    space = observation_space.spaces.get(task_key or "") if isinstance(observation_space, spaces.Dict) else None
    if isinstance(space, TaskSpace):
        return space.table
    return TaskTable.anonymous(1) if tasks is None else tasks.table


def reader_for(space: spaces.Space, task_key: str = "task", model: Any = None) -> TaskReader:
    """
    :param space: Of the environments' observations
    :param task_key: Key of the task's id
    :param model: That plays them; an M3PO model knows where else to look
    :return: How to tell the tasks of the environments apart
    :raises ValueError: if observations have no task
    """
    known: TaskReader | None = getattr(getattr(model, "policy", None), "tasks", None)
    # A key of another name was asked for; "task" may stand for anything where the model has a key of its own
    asked = task_key != "task" and isinstance(space, spaces.Dict) and task_key in space.spaces
    if known is None or asked:
        return TaskReader(find_table(space, task_key), task_key)
    return known if known.key is None else TaskReader(find_table(space, known.key), known.key)


class ModelView:
    """
    Observations as a model expects them, where environments of some of its tasks, or in another order, count and pad them in
    their own way: with the model's ids, of its widths.

    :param reader: Tells the tasks of the environments
    :param space: Of their observations
    :param model_space: Of the model's
    :raises ValueError: for a task that the model does not know, or what can't be padded to its widths
    """

    def __init__(self, reader: TaskReader, space: spaces.Space, model_space: spaces.Space):
        self.key, self.ids = reader.key, np.arange(len(reader.table))
        #: Zeros behind what stands under a key; nothing is known of other spaces than those with a table
        self.padding: dict[str, int] = {}
        theirs, mine = ({} if not isinstance(s, spaces.Dict) else s.spaces for s in (space, model_space))
        known, table = mine.get(reader.key or ""), reader.table
        if not isinstance(known, TaskSpace) or table == TaskTable.anonymous(len(table)):
            return
        if unknown := [name for name in table.names if name not in known.table.names]:
            raise ValueError(
                f"The model does not know the tasks {', '.join(unknown)}, only {', '.join(known.table.names)}: add_tasks() "
                "takes new ones in"
            )
        self.ids = np.array([known.table.id_of(name) for name in table.names])
        for key in mine.keys() - {reader.key}:
            self.padding[key] = flatdim(mine[key]) - flatdim(theirs[key]) if key in theirs else -1
            if self.padding[key] < 0:
                raise ValueError(
                    f"The environments' {key!r} ({theirs.get(key, 'missing')}) is not the model's ({mine[key]}): make them by "
                    "make_multitask_vec_env(tasks, like=model)"
                )

    @property
    def pads(self) -> bool:
        """:return: Whether the environments are narrower than the model"""
        return any(self.padding.values())

    def __call__(self, observations: Any) -> Any:
        """
        :param observations: Of the environments, one row each
        :return: The same for the model
        """
        if self.key is None:
            return observations
        seen = {key: observations[key] for key in self.padding or observations}
        for key, width in self.padding.items():
            if width:
                seen[key] = np.pad(seen[key], ((0, 0), (0, width)))
        return {**seen, self.key: self.ids[observations[self.key]]}


def _reader(table: TaskTable, key: str | None) -> TaskReader | None:
    """:return: Nothing for one task: there is nothing to tell apart, and it shall pay nothing"""
    return TaskReader(table, key) if len(table) > 1 else None
