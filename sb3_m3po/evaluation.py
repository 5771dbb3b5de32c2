"""What an agent scores on each of several tasks."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, unwrap_vec_normalize

from sb3_m3po.checks import check_environment, dead_workers_named
from sb3_m3po.envs.action_repeat import check_count
from sb3_m3po.tasks import ModelView, TaskReader, reader_for

_BOUNDS = "give (return that counts as 0, return that counts as 1) for every task, or leave bounds out"
#: Episodes for each task of an environment that draws them, after which one that never came up is given up; with as many
#: times those that are wanted of each, one that came up too rarely
_PATIENCE = 20


def iqm(scores: np.ndarray) -> float:
    """
    The mean of the middle half (Agarwal et al. 2021, arXiv 2108.13264).

    :param scores: Any shape
    :return: Their interquartile mean
    """
    ordered = np.sort(scores, axis=None)
    cut = int(0.25 * len(ordered))
    return float(ordered[cut : len(ordered) - cut].mean())


def bootstrap_interval(
    scores: np.ndarray, statistic: Callable[[np.ndarray], np.ndarray], n_resamples: int = 2_000, confidence: float = 0.95
) -> np.ndarray:
    """
    rliable's stratified bootstrap, the same at each call.

    :param scores: Shape ``(n_runs, n_tasks, ...)``
    :param statistic: Maps scores to numbers, shape ``(k,)``
    :param n_resamples: Bootstrap samples, each of runs within each task
    :param confidence: Of the intervals
    :return: Their lower and upper ends, shape ``(2, k)``
    :raises ImportError: if rliable is missing
    """
    try:
        from rliable import library
    except ImportError as error:
        raise ImportError(f'Intervals need rliable: pip install "sb3_m3po[plots]" ({error})') from error
    # rliable draws from NumPy's global generator
    state = np.random.get_state()
    np.random.seed(0)
    try:
        _, found = library.get_interval_estimates(
            {"all": scores}, statistic, reps=n_resamples, confidence_interval_size=confidence
        )
    finally:
        np.random.set_state(state)
    return found["all"]


@dataclass(frozen=True, repr=False, eq=False)
class TaskScores(Mapping[str, float]):
    """
    Episodes of each task; as a mapping, its mean reward.

    :param returns: By task's name: the rewards of each episode, shape ``(n_episodes,)``
    :param lengths: Likewise their lengths in steps
    :param successes: Likewise whether each succeeded, of the tasks that say so; an episode that does not say so has not
    :param bounds: By task's name: the returns that count as 0 and as 1
    """

    returns: dict[str, np.ndarray]
    lengths: dict[str, np.ndarray]
    successes: dict[str, np.ndarray] = field(default_factory=dict)
    bounds: Mapping[str, tuple[float, float]] | None = None

    def __getitem__(self, name: str) -> float:
        return float(self.returns[name].mean())

    def __iter__(self) -> Iterator[str]:
        return iter(self.returns)

    def __len__(self) -> int:
        return len(self.returns)

    @property
    def success_rate(self) -> dict[str, float]:
        """:return: By task's name, the share of its episodes that succeeded, of the tasks that say so"""
        return {name: float(found.mean()) for name, found in self.successes.items()}

    @property
    def scores(self) -> np.ndarray:
        """
        What the tasks are compared by: returns between their bounds where these are given; else successes, where every task
        says so; else the returns as they are, which says little of tasks with unlike rewards.

        :return: Shape ``(n_episodes, n_tasks)``
        """
        if self.bounds is not None:
            check_bounds(self.bounds, list(self))
            bounds = {name: self.bounds[name] for name in self}
            return np.stack([(self.returns[name] - low) / (high - low) for name, (low, high) in bounds.items()], -1)
        found = self.successes if set(self.successes) == set(self.returns) else self.returns
        return np.stack([found[name] for name in self], -1).astype(np.float64)

    @property
    def are_comparable(self) -> bool:
        """:return: Whether the scores of all tasks are in one unit"""
        return self.bounds is not None or set(self.successes) == set(self.returns)

    @property
    def iqm(self) -> float:
        """:return: The interquartile mean over tasks, of the mean of each one's :attr:`scores`"""
        return iqm(self.scores.mean(0))

    @property
    def mean_score(self) -> float:
        """:return: The mean over tasks of the same, which all of them count in"""
        return float(self.scores.mean())

    def interval(self, n_resamples: int = 2_000, confidence: float = 0.95) -> tuple[float, float]:
        """
        :param n_resamples: Bootstrap samples, each of episodes within each task
        :param confidence: Of the interval
        :return: Where the interquartile mean lies, by rliable's stratified bootstrap
        :raises ImportError: if rliable is missing
        """
        low, high = bootstrap_interval(self.scores, lambda scores: np.array([iqm(scores.mean(0))]), n_resamples, confidence)[
            :, 0
        ]
        return float(low), float(high)

    def __str__(self) -> str:
        width = max(len("IQM"), *map(len, self))
        lines = []
        for name in self:
            success = f"  success {self.success_rate[name]:.2f}" if name in self.successes else ""
            lines.append(f"{name:{width}}  {self[name]:10.2f} +- {self.returns[name].std():8.2f}{success}")
        return "\n".join([*lines, f"{'IQM':{width}}  {self.iqm:10.2f}{self._interval_text()}"])

    __repr__ = __str__

    def _interval_text(self) -> str:
        try:
            return "  95 % interval {:.2f} to {:.2f}".format(*self.interval())
        except ImportError:
            return ""


def evaluate_per_task(
    model: Any,
    env: gym.Env | VecEnv,
    n_eval_episodes: int = 10,
    deterministic: bool = True,
    render: bool = False,
    bounds: Mapping[str, tuple[float, float]] | None = None,
    task_key: str = "task",
) -> TaskScores:
    """
    Run episodes of every task that the environments have.

    As in SB3's ``evaluate_policy``, each environment plays a fixed number of episodes, so that short ones don't count more,
    and the rewards are those of the ``Monitor`` where there is one.

    :param model: Any model of Stable-Baselines3; tasks go by their names, so the environments may have some of the model's, in
        any order, and be narrower
    :param env: From :func:`~sb3_m3po.envs.make_multitask_vec_env`, or one that draws a task at each reset and says so by an
        attribute ``draws_tasks``, as ``sb3_m3po/MultiTask-v0`` does. On the model's training environments this breaks off
        their episodes: a later ``learn()`` begins with a reset
    :param n_eval_episodes: Episodes of each task
    :param deterministic: Whether to use deterministic actions
    :param render: Whether to render the environments
    :param bounds: By task's name: the returns that count as 0 and as 1, for :attr:`TaskScores.scores`
    :param task_key: Key of the task's id in the observations; an M3PO model has its own
    :return: The episodes of each task
    :raises ValueError: for no environment or no episodes, if observations have no task, one that the model does not know, or
        more than it has, or if bounds are missing or empty
    :raises RuntimeError: if the process of an environment dies: which, and of which task
    """
    check_count("n_eval_episodes", n_eval_episodes, "the episodes of each task")
    check_environment(env)
    if not isinstance(env, (gym.Env, VecEnv)):
        raise ValueError(f"env={env!r} is no environment: make one by sb3_m3po.make_multitask_vec_env(tasks)")
    if not isinstance(env, VecEnv):
        inner = env
        env = DummyVecEnv([lambda: Monitor(inner)])
    reader = reader_for(env.observation_space, task_key, model)
    check_bounds(bounds, reader.table.names)
    view = ModelView(reader, env.observation_space, getattr(model, "observation_space", env.observation_space))
    if view.pads and unwrap_vec_normalize(env) is not None:
        raise ValueError("VecNormalize's statistics are as wide as the model: make_multitask_vec_env(tasks, like=model)")
    trained_on: VecEnv | None = getattr(model, "env", None)
    if trained_on is not None and trained_on.unwrapped is env.unwrapped:
        model._last_obs = None
    playing: list[str] = []
    with dead_workers_named(env, last_seen=playing):
        counter = _play(model, env, reader, view, n_eval_episodes, deterministic, render, playing)
    return counter.scores(reader.table.names, bounds)


def check_bounds(bounds: Mapping[str, tuple[float, float]] | None, names: Sequence[str]) -> None:
    """
    :param bounds: By task's name: the returns that count as 0 and as 1; ``None`` for none
    :param names: Of the tasks
    :raises ValueError: where they are missing, the same, or no finite numbers
    """
    if bounds is None:
        return
    if missing := [name for name in names if name not in bounds]:
        raise ValueError(f"bounds are missing for {', '.join(missing)}: {_BOUNDS}")
    for name in names:
        low, high = bounds[name]
        if not np.isfinite(high - low) or high == low:
            raise ValueError(f"bounds[{name!r}]={low, high} leave nothing between 0 and 1: {_BOUNDS}")


def _play(
    model: Any,
    env: VecEnv,
    reader: TaskReader,
    view: ModelView,
    n_episodes: int,
    deterministic: bool,
    render: bool,
    playing: list[str],
) -> "_Counter":
    """:return: Episodes of all tasks; ``playing`` says meanwhile which task each environment is at"""
    observations: Any = env.reset()
    tasks = reader.ids(observations)
    playing[:] = [reader.table.names[i] for i in tasks]
    counter = _Counter(env, tasks, n_episodes, len(reader.table))
    rewards_so_far, lengths_so_far = np.zeros(env.num_envs), np.zeros(env.num_envs, int)
    states, starts = None, np.ones(env.num_envs, bool)
    while counter.wants_more():
        seen = view(observations)
        actions, states = model.predict(seen, state=states, episode_start=starts, deterministic=deterministic)
        observations, rewards, starts, infos = env.step(actions)
        rewards_so_far += rewards
        lengths_so_far += 1
        for i in np.flatnonzero(starts).tolist():
            episode = infos[i].get("episode", {"r": rewards_so_far[i], "l": lengths_so_far[i]})
            counter.end(i, int(tasks[i]), (episode["r"], episode["l"], infos[i].get("is_success")))
            rewards_so_far[i], lengths_so_far[i] = 0.0, 0
        tasks = reader.ids(observations)
        playing[:] = [reader.table.names[i] for i in tasks]
        counter.begin(starts, tasks)
        if render:
            env.render()
    return counter


class _Counter:
    """
    The episodes that were played, and whether more are wanted.

    Each environment plays a number of its own, so that short episodes don't count more. Environments that draw their tasks
    play on until each task has its episodes; which of them count is settled when they begin, for the same reason.
    """

    def __init__(self, env: VecEnv, tasks: np.ndarray, n_episodes: int, n_tasks: int):
        self.episodes: list[list[tuple[float, int, bool | None]]] = [[] for _ in range(n_tasks)]
        self.n_episodes, self.n_played, self.tasks = n_episodes, 0, tasks
        self.drawn = env.has_attr("draws_tasks")
        self.left = np.zeros(env.num_envs, int)
        for task in np.unique(tasks):
            mine = np.flatnonzero(tasks == task)
            self.left[mine] = (n_episodes + np.arange(len(mine))) // len(mine)
        #: Of each task the episodes that were begun and count, and of each environment whether its current one does
        self.begun, self.counts = np.zeros(n_tasks, int), np.zeros(env.num_envs, bool)
        self.begin(np.ones(env.num_envs, bool), tasks)

    def begin(self, starts: np.ndarray, tasks: np.ndarray) -> None:
        # An environment that does not say so shows it by its next task
        self.drawn = self.drawn or bool((tasks != self.tasks).any())
        for i in np.flatnonzero(starts).tolist():
            self.counts[i] = self.begun[tasks[i]] < self.n_episodes if self.drawn else self.left[i] > 0
            self.begun[tasks[i]] += self.counts[i]
            self.left[i] -= 1

    def end(self, env: int, task: int, episode: tuple[float, int, bool | None]) -> None:
        self.n_played += 1
        if self.counts[env]:
            self.episodes[task].append(episode)
            self.counts[env] = False

    def wants_more(self) -> bool:
        if self.counts.any() or not self.drawn:
            return bool(self.counts.any() or (self.left > 0).any())
        rounds = self.n_played / (_PATIENCE * len(self.episodes))
        return any(begun < self.n_episodes and rounds < (self.n_episodes if begun else 1) for begun in self.begun.tolist())

    def scores(self, names: list[str], bounds: Mapping[str, tuple[float, float]] | None) -> TaskScores:
        whole = [(name, played) for name, played in zip(names, self.episodes, strict=True) if len(played) == self.n_episodes]
        columns = {name: list(zip(*played, strict=True)) for name, played in whole}
        successes = {name: np.array(c[2]).astype(bool).astype(float) for name, c in columns.items() if set(c[2]) != {None}}
        returns, lengths = ({name: np.array(c[i]) for name, c in columns.items()} for i in (0, 1))
        return TaskScores(returns, lengths, successes, bounds)
