"""The hybrid rollout buffer: the fresh rollout, as in PPO, and behind it the replay memory that learning draws from."""

import math
import warnings
from typing import Any, NamedTuple

import numpy as np
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.preprocessing import get_action_dim
from stable_baselines3.common.vec_env import VecNormalize, VecTransposeImage

try:
    import psutil
except ImportError:  # optional, as in SB3
    psutil = None

#: Key of the observation of a space that is no Dict
PLAIN = ""
Observations = np.ndarray | dict[str, np.ndarray]


class SequenceBatch(NamedTuple):
    """
    Sequences of real experience, time-first. What lies behind the end of an episode is to be masked.

    :param states: Ids of ``length + 1`` observations, for :meth:`ReplayMemory.observations_at`; the one behind an
        episode's end is its real last observation. Shape ``(length + 1, batch)``
    :param actions: In the rollout's form, shape ``(length, batch, action_dim)``
    :param rewards: In reward units, shape ``(length, batch)``
    :param terminated: 0 or 1, shape ``(length, batch)``
    :param truncated: Likewise; 1 too where the memory knows no further
    """

    states: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray


class ReplayMemory:
    """
    A ring of transitions per environment from which sequences are drawn.

    Observations are stored once: the next observation of a step is the observation of the following slot, except at an
    episode's end, where the real last one lies in a pool of its own. Arrays grow as they fill.

    :param capacity: Transitions in all
    :param observation_space: As seen by the policy
    :param action_space: Action space
    :param n_envs: Number of environments
    """

    def __init__(self, capacity: int, observation_space: spaces.Space, action_space: spaces.Space, n_envs: int):
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
        # Running sums over all rewards ever seen, for the return scale
        self.reward_count, self.reward_abs_sum, self.reward_abs_max = 0, 0.0, 0.0
        self.has_terminated = False
        self._stale_returns = 0
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
            key: grown(old_obs.get(key), space.shape or (), _storage_dtype(space)) for key, space in self.spaces.items()
        }
        self.actions = grown(old.get("actions"), (self.action_dim,), self.action_dtype)
        self.rewards = grown(old.get("rewards"), (), np.float32)
        self.returns = grown(old.get("returns"), (), np.float32)
        self.terminated = grown(old.get("terminated"), (), bool)
        self.truncated = grown(old.get("truncated"), (), bool)
        # Where the real last observation of an episode lies in the pool, or -1
        self.final_index = grown(old.get("final_index"), (), np.int64, fill=-1)
        if "final_pool" not in old:
            self.final_pool = {key: np.zeros((0, *(s.shape or ())), _storage_dtype(s)) for key, s in self.spaces.items()}
            self.free_finals: list[int] = []

    @property
    def slots(self) -> int:
        """:return: Slots of the ring as allocated"""
        return len(self.rewards)

    def size(self) -> int:
        """:return: Transitions in memory, over all environments"""
        return self.n_steps * self.n_envs

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
        self.pos = edge
        self.n_steps = min(self.n_steps + 1, self.capacity)
        self._count(reward, terminated)

    def _count(self, reward: np.ndarray, terminated: np.ndarray) -> None:
        magnitude = np.abs(reward)
        self.reward_count += len(magnitude)
        self.reward_abs_sum += float(magnitude.sum(dtype=np.float64))
        self.reward_abs_max = max(self.reward_abs_max, float(magnitude.max()))
        self.has_terminated = self.has_terminated or bool(np.any(terminated))
        self._stale_returns = min(self._stale_returns + 1, self.n_steps)

    def _keep_final(self, slot: int, env: int, source: int) -> None:
        """Copy the observation in slot ``source`` to the pool, as the last one of the episode that ended in ``slot``."""
        if not self.free_finals:
            old = len(next(iter(self.final_pool.values())))
            new = max(2 * old, 16)
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
        Draw sequences that start uniformly anywhere in the memory.

        :param batch_size: Number of sequences
        :param length: Transitions in each
        :param rng: Random generator
        :return: The sequences, ``batch_size`` of them
        :raises ValueError: if the memory is empty
        """
        if self.n_steps == 0:
            raise ValueError("The replay memory is empty: collect transitions before sampling")
        first = rng.integers(0, self.n_steps, batch_size)
        env = rng.integers(0, self.n_envs, batch_size)
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
        )

    def observations_at(self, states: np.ndarray, vec_normalize: VecNormalize | None = None) -> Observations:
        """
        :param states: Ids from :meth:`sample`, shape ``(batch,)``
        :param vec_normalize: Normalises the observations, if given
        :return: Observations, shape ``(batch, ...)``, by key for a Dict space
        """
        in_pool = states >= self.slots * self.n_envs
        slot, env = np.divmod(np.where(in_pool, 0, states), self.n_envs)
        observations = {key: array[slot, env] for key, array in self.observations.items()}
        if in_pool.any():
            for key, array in observations.items():
                array[in_pool] = self.final_pool[key][states[in_pool] - self.slots * self.n_envs]
        obs: Observations = observations[PLAIN] if PLAIN in observations else observations
        return obs if vec_normalize is None else _normalize(obs, vec_normalize)

    def return_scale(self, gamma: float) -> float:
        """
        ``max(P99 of the nonzero |discounted return-to-go|, mean|r| / (1 - gamma), max|r| / 2) / 10``, where a horizon
        ``1 / (1 - gamma)`` of more than 1,000 steps counts as 1,000.

        :param gamma: Discount factor
        :return: The scale, or 0 while no reward was nonzero
        """
        if self.reward_abs_max == 0:
            return 0.0
        self._refresh_returns(gamma)
        # About 200,000 values pin the quantile down
        rows = slice(None, None, max(self.size() // 200_000, 1))
        values = np.abs(self.returns[self._order()[rows]])
        values = values[values > 0]
        # A method that picks one of the values: it commutes with any scaling of the rewards
        high = float(np.quantile(values, 0.99, method="higher")) if len(values) else 0.0
        mean = self.reward_abs_sum / self.reward_count / max(1 - gamma, 1e-3)
        return max(high, mean, self.reward_abs_max / 2) / 10

    def lag_correlation(self, n_samples: int = 1_024) -> float:
        """
        How slow observations are: the correlation of each entry with itself one step later, averaged over the entries of
        all vectors that move.

        :param n_samples: Transitions looked at
        :return: 1 for what hardly changes within a step, 0 for what is drawn anew, or if there is no such entry
        """
        # A generator of its own: what training draws does not depend on it
        first, second = self.sample(n_samples, 1, np.random.default_rng(0)).states
        correlations = []
        for key, space in self.spaces.items():
            if isinstance(space, spaces.Box) and np.issubdtype(_storage_dtype(space), np.floating):
                x, y = (as_dict(self.observations_at(states))[key].reshape(n_samples, -1) for states in (first, second))
                x, y = x.astype(np.float64), y.astype(np.float64)
                variance = 0.5 * (x.var(0) + y.var(0))
                moves = variance > 1e-8
                correlations.append(1 - 0.5 * np.square(y - x).mean(0)[moves] / variance[moves])
        found = np.concatenate([np.empty(0), *correlations])
        return float(found.mean()) if len(found) else 0.0

    def _order(self) -> np.ndarray:
        """:return: Slots from the oldest transition to the newest"""
        return (self.pos - self.n_steps + np.arange(self.n_steps)) % self.slots

    def _refresh_returns(self, gamma: float) -> None:
        """Discounted rewards-to-go of what is new, and of what came before in the same episodes as far as it matters."""
        reach = math.ceil(math.log(1e-3) / math.log(gamma)) if 0 < gamma < 1 else self.n_steps if gamma >= 1 else 1
        order = self._order()[::-1][: self._stale_returns + reach]
        following = np.zeros(self.n_envs, np.float32)
        for slot in order:
            ended = self.terminated[slot] | self.truncated[slot]
            following = self.rewards[slot] + np.float32(gamma) * np.where(ended, np.float32(0), following)
            self.returns[slot] = following
        self._stale_returns = 0

    def nbytes_at_capacity(self) -> int:
        """:return: Bytes of the full memory"""
        obs = sum(math.prod(s.shape or ()) * _storage_dtype(s).itemsize for s in self.spaces.values())
        step = obs + self.action_dim * np.dtype(self.action_dtype).itemsize + 18
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
        """Leave out the slots that are not in use yet."""
        state = self.__dict__.copy()
        if self.slots < self.capacity + 1 or self.n_steps < self.capacity:
            used = self.pos + 1
            for name in ("actions", "rewards", "returns", "terminated", "truncated", "final_index"):
                state[name] = state[name][:used]
            state["observations"] = {key: array[:used] for key, array in self.observations.items()}
        return state


def _storage_dtype(space: spaces.Space) -> np.dtype:
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
            x[index] = value[key]
    else:
        obs[index] = value


def _normalize(obs: Observations, vec_normalize: VecNormalize) -> Observations:
    normalized = vec_normalize.normalize_obs(obs)
    if isinstance(normalized, dict):
        return {key: _to_float32(array) for key, array in normalized.items()}
    return _to_float32(normalized)


def _to_float32(array: np.ndarray) -> np.ndarray:
    return array.astype(np.float32) if array.dtype == np.float64 else array


class _HybridMixin:
    """Adds the replay memory to one of SB3's rollout buffers."""

    memory: ReplayMemory

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Space,
        action_space: spaces.Space,
        *args: Any,
        memory_size: int = 1_000_000,
        n_envs: int = 1,
        **kwargs: Any,
    ):
        super().__init__(buffer_size, observation_space, action_space, *args, n_envs=n_envs, **kwargs)  # type: ignore[call-arg]
        self.memory = ReplayMemory(memory_size, observation_space, action_space, n_envs)

    def store(self, *transition: Any) -> None:
        """
        Add one step of every environment to the replay memory.

        :param transition: The arguments of :meth:`ReplayMemory.add`, in their order
        """
        self.memory.add(*transition)


class HybridRolloutBuffer(_HybridMixin, RolloutBuffer):
    """
    SB3's rollout buffer (the fresh rollout: values, log-probabilities, GAE) in front of a :class:`ReplayMemory`.

    :param memory_size: Transitions that the memory keeps, over all environments
    """


class HybridDictRolloutBuffer(_HybridMixin, DictRolloutBuffer):
    """
    The twin of :class:`HybridRolloutBuffer` for Dict observations.

    :param memory_size: Transitions that the memory keeps, over all environments
    """
