"""The replay memory: a ring of real transitions for each environment, from which sequences are drawn."""

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.vec_env import VecNormalize

from sb3_m3po.observations import PLAIN, Observations, as_dict, normalized, storage_dtype
from sb3_m3po.tasks import TaskReader

try:
    import psutil
except ImportError:  # optional, as in SB3
    psutil = None


class SequenceBatch(NamedTuple):
    """
    Sequences of real experience, time-first. What lies behind the end of an episode is to be masked.

    :param states: Ids of ``length + 1`` observations, for :meth:`ReplayMemory.observations_at`; the one behind an
        episode's end is its real last observation. Shape ``(length + 1, batch)``
    :param actions: In the rollout's form, shape ``(length, batch, action_dim)``
    :param rewards: In reward units, shape ``(length, batch)``
    :param terminated: 0 or 1, shape ``(length, batch)``
    :param truncated: Likewise; 1 too where the memory knows no further
    :param tasks: Ids of the tasks, shape ``(batch,)``; ``None`` without tasks
    """

    states: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    tasks: np.ndarray | None


class ReplayMemory:
    """
    A ring of transitions per environment from which sequences are drawn.

    Observations are stored once: the next observation of a step is the observation of the following slot, except at an
    episode's end, where the real last one lies in a pool of its own. Arrays grow as they fill.

    :param capacity: Transitions in all
    :param observation_space: As seen by the policy
    :param action_space: Action space
    :param n_envs: Number of environments
    :param tasks: Tells the tasks of observations; ``None`` for a single one
    """

    #: The discount factors that the returns-to-go were computed with
    _gammas_of_returns: np.ndarray | None = None

    def __init__(
        self,
        capacity: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        n_envs: int,
        tasks: TaskReader | None = None,
    ):
        self.capacity = max(capacity // n_envs, 1)
        self.n_envs = n_envs
        self.action_space = action_space
        self.action_dim = get_action_dim(action_space)
        self.spaces = (
            dict(observation_space.spaces) if isinstance(observation_space, spaces.Dict) else {PLAIN: observation_space}
        )
        self.action_dtype = np.float32 if isinstance(action_space, spaces.Box) else np.int64
        self.pos = 0
        self.n_steps = 0
        self.tasks = tasks
        self.n_tasks = 1 if tasks is None else len(tasks.table)
        # Running sums over all rewards ever seen, for the return scales
        self.reward_count = np.zeros(self.n_tasks, np.int64)
        self.reward_abs_sum, self.reward_abs_max = np.zeros(self.n_tasks), np.zeros(self.n_tasks)
        self.has_terminated = np.zeros(self.n_tasks, bool)
        # Whether anything has ever told one policy from another: a termination, or two rewards that differ
        self.first_reward, self.is_informative = np.full(self.n_tasks, np.nan), np.zeros(self.n_tasks, bool)
        self._stale_returns = 0
        self._by_task: tuple[np.ndarray, np.ndarray] | None = None
        self._allocate(1)

    def _allocate(self, slots: int) -> None:
        """Make room for ``slots`` slots, keeping what is there; one more than the transitions that they hold."""

        def grown(old: np.ndarray | None, shape: tuple[int, ...], dtype: Any, fill: float = 0) -> np.ndarray:
            new = np.full((slots, self.n_envs, *shape), fill, dtype) if fill else np.zeros((slots, self.n_envs, *shape), dtype)
            if old is not None:
                new[: len(old)] = old
            return new

        old = self.__dict__
        old_obs = old.get("observations", {})
        self.observations = {
            key: grown(old_obs.get(key), space.shape or (), storage_dtype(space)) for key, space in self.spaces.items()
        }
        self.actions = grown(old.get("actions"), (self.action_dim,), self.action_dtype)
        self.rewards = grown(old.get("rewards"), (), np.float32)
        self.returns = grown(old.get("returns"), (), np.float32)
        self.terminated = grown(old.get("terminated"), (), bool)
        self.truncated = grown(old.get("truncated"), (), bool)
        # Of one task, all are 0
        self.task = grown(old.get("task"), (), np.int16) if self.tasks else np.zeros((1, 1), np.int16)
        # Where the real last observation of an episode lies in the pool, or -1
        self.final_index = grown(old.get("final_index"), (), np.int64, fill=-1)
        if "final_pool" not in old:
            self.final_pool = {key: np.zeros((0, *(s.shape or ())), storage_dtype(s)) for key, s in self.spaces.items()}
            self.free_finals: list[int] = []

    @property
    def slots(self) -> int:
        """:return: Slots of the ring as allocated"""
        return len(self.rewards)

    def size(self) -> int:
        """:return: Transitions in memory, over all environments"""
        return self.n_steps * self.n_envs

    @property
    def n_episodes(self) -> int:
        """:return: Ended (or cut off) episodes in memory, of all environments"""
        return len(next(iter(self.final_pool.values()))) - len(self.free_finals)

    def is_enough(self, learning_starts: int | None) -> bool:
        """
        :param learning_starts: Transitions asked for; ``None`` for 1,000 with five episodes of each task that has appeared, or
            5,000: fewer episodes hardly differ, and what is learned from one can last
        :return: Whether they are in memory, or all that it can hold
        """
        if learning_starts is None:
            learning_starts = 1_000 if self._is_varied() else 5_000
        return self.size() >= min(learning_starts, self.capacity * self.n_envs)

    def _is_varied(self) -> bool:
        """:return: Whether there are five episodes of each task that has appeared"""
        if self.tasks is None:
            return self.n_episodes >= 5
        ended, seen = self.task[self.final_index >= 0], self.task[self._order()].ravel()
        return bool((np.bincount(ended, minlength=self.n_tasks)[np.unique(seen)] >= 5).all())

    def add(
        self,
        obs: Observations,
        action: np.ndarray,
        reward: np.ndarray,
        next_obs: Observations,
        terminated: np.ndarray,
        truncated: np.ndarray,
    ) -> None:
        """
        Add one step of every environment.

        :param obs: What the action was chosen on, shape ``(n_envs, ...)``, by key for a Dict space
        :param action: In the rollout's form, shape ``(n_envs, action_dim)``
        :param reward: In reward units, the environments' own, shape ``(n_envs,)``
        :param next_obs: The real next observation, also where an episode ended; as ``obs``
        :param terminated: Shape ``(n_envs,)``
        :param truncated: Shape ``(n_envs,)``
        """
        if self.pos + 1 >= self.slots and self.slots < self.capacity + 1:
            self._allocate(min(max(2 * self.slots, 1024), self.capacity + 1))
        i, edge = self.pos, (self.pos + 1) % self.slots
        self._release(edge)
        obs, next_obs = as_dict(obs), as_dict(next_obs)
        for key, array in self.observations.items():
            array[i] = obs[key].reshape(array[i].shape)
            array[edge] = next_obs[key].reshape(array[edge].shape)
        self.actions[i] = action.reshape(self.n_envs, self.action_dim)
        self.rewards[i] = reward
        self.terminated[i] = terminated
        self.truncated[i] = truncated
        self.final_index[i] = -1
        for env in np.flatnonzero(terminated | truncated).tolist():
            self._keep_final(i, env, edge)
        tasks = np.zeros(self.n_envs, np.int64)
        if self.tasks is not None:
            self.task[i] = tasks = self.tasks.ids(obs[PLAIN] if PLAIN in obs else obs)
        self.pos, self._by_task = edge, None
        self.n_steps = min(self.n_steps + 1, self.capacity)
        self._count(reward, terminated, tasks)

    def _count(self, reward: np.ndarray, terminated: np.ndarray, tasks: np.ndarray) -> None:
        magnitude = np.abs(reward).astype(np.float64)
        np.add.at(self.reward_count, tasks, 1)
        np.add.at(self.reward_abs_sum, tasks, magnitude)
        np.maximum.at(self.reward_abs_max, tasks, magnitude)
        terminated = np.asarray(terminated, bool)
        self.has_terminated[tasks[terminated]] = True
        self.first_reward[tasks] = np.where(np.isnan(self.first_reward[tasks]), reward, self.first_reward[tasks])
        self.is_informative[tasks[terminated | (reward != self.first_reward[tasks])]] = True
        self._stale_returns = min(self._stale_returns + 1, self.n_steps)

    def _keep_final(self, slot: int, env: int, source: int) -> None:
        """Copy the observation in slot ``source`` to the pool, as the last one of the episode that ended in ``slot``."""
        if not self.free_finals:
            old = len(next(iter(self.final_pool.values())))
            new = max(old + old // 8, old + 16)
            for key, pool in self.final_pool.items():
                self.final_pool[key] = np.concatenate([pool, np.zeros((new - old, *pool.shape[1:]), pool.dtype)])
            self.free_finals = list(range(new - 1, old - 1, -1))
        index = self.free_finals.pop()
        for key, pool in self.final_pool.items():
            pool[index] = self.observations[key][source, env]
        self.final_index[slot, env] = index

    def _release(self, slot: int) -> None:
        used = self.final_index[slot]
        self.free_finals += [int(index) for index in used[used >= 0]]
        self.final_index[slot] = -1

    def cut(self) -> None:
        """Nothing follows the newest transitions any more (a reset, an aborted rollout): they count as truncated."""
        if self.n_steps == 0:
            return
        newest = (self.pos - 1) % self.slots
        for env in np.flatnonzero(~(self.terminated[newest] | self.truncated[newest])).tolist():
            self.truncated[newest, env] = True
            self._keep_final(newest, env, self.pos)

    def sample(self, batch_size: int, length: int, rng: np.random.Generator) -> SequenceBatch:
        """
        Draw sequences that start uniformly anywhere in the memory; with tasks, anywhere in what it has of a task, and each
        task as often.

        :param batch_size: Number of sequences
        :param length: Transitions in each
        :param rng: Random generator
        :return: The sequences, ``batch_size`` of them
        :raises ValueError: if the memory is empty
        """
        if self.n_steps == 0:
            raise ValueError("The replay memory is empty: collect transitions before sampling")
        first, env = self._draw(batch_size, rng)
        age = self.n_steps - first - np.arange(length + 1)[:, None]  # (length + 1, batch); 1 is the newest transition
        # Nothing lies behind the observation at the edge: stay there
        slot = (self.pos - np.maximum(age, 0)) % self.slots
        states = slot * self.n_envs + env
        # Behind the edge the newest transition is repeated: a slot that is not in use holds no legal action
        slot, edge = (self.pos - np.maximum(age[:-1], 1)) % self.slots, age[:-1] <= 1
        final = self.final_index[slot, env]
        ended = (final >= 0) & (age[:-1] >= 1)
        states[1:][ended] = self.slots * self.n_envs + final[ended]
        return SequenceBatch(
            states,
            self.actions[slot, env],
            self.rewards[slot, env],
            self.terminated[slot, env].astype(np.float32),
            (self.truncated[slot, env] | edge).astype(np.float32),
            None if self.tasks is None else self.task[slot[0], env],
        )

    def _draw(self, batch_size: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """:return: Steps since the oldest one, and environments, each of shape ``(batch_size,)``"""
        if self.tasks is None:
            return rng.integers(0, self.n_steps, batch_size), rng.integers(0, self.n_envs, batch_size)
        if self._by_task is None:
            tasks = self.task[self._order()].ravel()
            self._by_task = np.argsort(tasks, kind="stable"), np.bincount(tasks, minlength=self.n_tasks)
        transitions, counts = self._by_task
        present, first = np.flatnonzero(counts), np.cumsum(counts) - counts
        task = present[rng.integers(0, len(present), batch_size)]
        return np.divmod(transitions[first[task] + rng.integers(0, counts[task])], self.n_envs)

    def observations_at(self, states: np.ndarray, vec_normalize: VecNormalize | None = None) -> Observations:
        """
        :param states: Ids from :meth:`sample`, shape ``(batch,)``
        :param vec_normalize: Normalises the observations, if given
        :return: Observations, shape ``(batch, ...)``, by key for a Dict space
        """
        observations = self._gathered(states, list(self.observations))
        obs: Observations = observations[PLAIN] if PLAIN in observations else observations
        return obs if vec_normalize is None else normalized(obs, vec_normalize)

    def _gathered(self, states: np.ndarray, keys: list[str]) -> dict[str, np.ndarray]:
        """:return: Some parts of the observations, shape ``(batch, ...)`` each"""
        in_pool = states >= self.slots * self.n_envs
        slot, env = np.divmod(np.where(in_pool, 0, states), self.n_envs)
        observations = {key: self.observations[key][slot, env] for key in keys}
        if in_pool.any():
            for key, array in observations.items():
                array[in_pool] = self.final_pool[key][states[in_pool] - self.slots * self.n_envs]
        return observations

    def return_scale(self, gamma: float | np.ndarray) -> np.ndarray:
        """
        ``max(P99 of the nonzero |discounted return-to-go|, mean|r| / (1 - gamma), max|r| / 2) / 10``, where a horizon
        ``1 / (1 - gamma)`` of more than 1,000 steps counts as 1,000.

        :param gamma: Discount factor, or one for each task, shape ``(n_tasks,)``
        :return: The scale of each task, 0 while none of its rewards was nonzero, shape ``(n_tasks,)``
        """
        gammas = np.broadcast_to(gamma, self.n_tasks)
        scales = np.zeros(self.n_tasks)
        if not self.reward_abs_max.any():
            return scales
        self._refresh_returns(gammas)
        # About 200,000 values pin the quantiles down
        slots = self._order()[slice(None, None, max(self.size() // 200_000, 1))]
        values = np.abs(self.returns[slots])
        for task in np.flatnonzero(self.reward_abs_max):
            mine = values[(self.task[slots] == task) & (values > 0)] if self.tasks else values[values > 0]
            # A method that picks one of the values: it commutes with any scaling of the rewards
            high = float(np.quantile(mine, 0.99, method="higher")) if len(mine) else 0.0
            mean = self.reward_abs_sum[task] / self.reward_count[task] / max(1 - gammas[task], 1e-3)
            scales[task] = max(high, mean, self.reward_abs_max[task] / 2) / 10
        return scales

    def lag_correlation(self, n_samples: int = 1_024) -> np.ndarray:
        """
        How slow observations are: the correlation of each entry with itself one step later, averaged over the entries of
        all vectors (and 2-D arrays) that move.

        :param n_samples: Transitions looked at of each task
        :return: For each task 1 for what hardly changes within a step, 0 for what is drawn anew, or if there is no such
            entry, or nothing in memory, shape ``(n_tasks,)``
        """
        vectors = [
            key
            for key, space in self.spaces.items()
            if isinstance(space, spaces.Box) and len(space.shape) < 3 and np.issubdtype(storage_dtype(space), np.floating)
        ]
        if not vectors or self.n_steps == 0:
            return np.zeros(self.n_tasks)
        # A generator of its own: what training draws does not depend on it
        batch = self.sample(n_samples * self.n_tasks, 1, np.random.default_rng(0))
        first, second = (self._gathered(states, vectors) for states in batch.states)
        tasks = np.zeros(batch.states.shape[1], np.int16) if batch.tasks is None else batch.tasks
        found: list[list[np.ndarray]] = [[np.empty(0)] for _ in range(self.n_tasks)]
        for key in vectors:
            x, y = (part[key].reshape(len(tasks), -1).astype(np.float64) for part in (first, second))
            for task in np.unique(tasks).tolist():
                found[task].append(_correlations(x[tasks == task], y[tasks == task]))
        return np.array([np.concatenate(parts).mean() if sum(map(len, parts)) else 0.0 for parts in found])

    def _order(self) -> np.ndarray:
        """:return: Slots from the oldest transition to the newest"""
        return (self.pos - self.n_steps + np.arange(self.n_steps)) % self.slots

    def _refresh_returns(self, gammas: np.ndarray) -> None:
        """Discounted rewards-to-go of what is new, and of what came before in the same episodes as far as it matters."""
        if self._gammas_of_returns is None or not np.array_equal(gammas, self._gammas_of_returns):
            self._stale_returns, self._gammas_of_returns = self.n_steps, gammas.copy()
        gamma = gammas.max()
        reach = math.ceil(math.log(1e-3) / math.log(gamma)) if 0 < gamma < 1 else self.n_steps if gamma >= 1 else 1
        discounts = gammas.astype(np.float32)
        order = self._order()[::-1][: self._stale_returns + reach]
        following, settled = np.zeros(self.n_envs, np.float32), np.zeros(self.n_envs, bool)
        for age, slot in enumerate(order.tolist()):
            ended = self.terminated[slot] | self.truncated[slot]
            if age >= self._stale_returns and (settled := settled | ended).all():
                # Nothing new follows in any episode that began before
                break
            discount = discounts[self.task[slot]] if self.tasks else discounts
            following = self.rewards[slot] + discount * np.where(ended, np.float32(0), following)
            self.returns[slot] = following
        self._stale_returns = 0

    def nbytes_at_capacity(self) -> int:
        """:return: Bytes of the full memory, but for the last observations of its episodes"""
        obs = sum(math.prod(s.shape or ()) * storage_dtype(s).itemsize for s in self.spaces.values())
        step = obs + self.action_dim * np.dtype(self.action_dtype).itemsize + 20
        return step * self.capacity * self.n_envs

    def warn_if_too_large(self) -> None:
        """Warn where the machine hasn't the memory, as SB3's replay buffer does."""
        if psutil is None:
            return
        needed, available = self.nbytes_at_capacity() / 1e9, psutil.virtual_memory().available / 1e9
        if needed > available:
            warnings.warn(
                "This system does not have apparently enough memory to store the complete replay memory "
                f"{needed:.2f}GB > {available:.2f}GB: choose a smaller `buffer_size`",
                stacklevel=2,
            )

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the slots that are not in use yet, and what can be derived."""
        state = {**self.__dict__, "_by_task": None}
        if self.slots < self.capacity + 1 or self.n_steps < self.capacity:
            used = self.pos + 1
            for name in ("actions", "rewards", "returns", "terminated", "truncated", "final_index", "task"):
                state[name] = state[name][:used]
            state["observations"] = {key: array[:used] for key, array in self.observations.items()}
        return state


def _correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """:return: Of each column of ``x`` and ``y``, ``(n, dim)``, that moves"""
    variance = 0.5 * (x.var(0) + y.var(0))
    moves = variance > 1e-8
    return 1 - 0.5 * np.square(y - x).mean(0)[moves] / variance[moves]
