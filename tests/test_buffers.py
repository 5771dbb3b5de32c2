"""The replay memory: sequences are what happened, ends are told apart, and nothing is lost or invented."""

import io
import math
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.running_mean_std import RunningMeanStd
from stable_baselines3.common.vec_env import DummyVecEnv, VecNormalize

from sb3_m3po.buffers import HybridRolloutBuffer
from sb3_m3po.memory import ReplayMemory
from tests.helpers import CounterEnv, assert_same_tensors, counters, tiny_model, tiny_policy_kwargs

BOX = spaces.Box(-np.inf, np.inf, (3,), np.float32)
ACTION = spaces.Discrete(2)
LENGTH = 7


def collect(memory: ReplayMemory, env: DummyVecEnv, n_steps: int, obs: Any = None) -> Any:
    """Play ``n_steps`` of counting environments into a memory; actions count the steps."""
    obs = env.reset() if obs is None else obs
    for step in range(n_steps):
        actions = np.full((env.num_envs, 1), step % 2)
        new_obs, rewards, dones, infos = env.step(actions[:, 0])
        assert isinstance(new_obs, np.ndarray)
        real = new_obs.copy()
        for i in np.flatnonzero(dones):
            real[i] = infos[i]["terminal_observation"]
        truncated = dones & np.array([info["TimeLimit.truncated"] for info in infos])
        memory.add(obs, actions, rewards, real, dones & ~truncated, truncated)
        obs = new_obs
    return obs


def filled(n_steps: int, capacity: int = 1_000, n_envs: int = 1) -> ReplayMemory:
    memory = ReplayMemory(capacity, BOX, ACTION, n_envs)
    collect(memory, counters(n_envs), n_steps)
    return memory


def draw(memory: ReplayMemory, n: int = 500, length: int = LENGTH, seed: int = 0) -> tuple[Any, np.ndarray]:
    batch = memory.sample(n, length, np.random.default_rng(seed))
    obs = memory.observations_at(batch.states.ravel())
    assert isinstance(obs, np.ndarray)
    return batch, obs.reshape(*batch.states.shape, -1)


def alive(batch: Any) -> np.ndarray:
    """:return: Whether each transition lies before the end of its sequence, shape ``(length, batch)``"""
    going_on = np.cumprod((1 - batch.terminated) * (1 - batch.truncated), axis=0)
    return np.concatenate([np.ones_like(going_on[:1]), going_on[:-1]]).astype(bool)


def check_sequences(batch: Any, obs: np.ndarray, length: int = 5) -> None:
    """Every transition that counts leads from one step of an episode to the next of the same one."""
    now, then = obs[:-1], obs[1:]
    counted = alive(batch)
    assert np.array_equal(now[counted][:, :2], then[counted][:, :2]), "environment and episode change within a sequence"
    assert np.array_equal(now[counted][:, 2] + 1, then[counted][:, 2]), "a step is skipped or repeated"
    expected = 100 * then[..., 0] + 10 * then[..., 1] + then[..., 2]
    assert np.array_equal(batch.rewards[counted], expected[counted])
    last = then[..., 2] == length + then[..., 0]
    odd = then[..., 1] % 2 == 1
    assert np.array_equal(batch.terminated[counted] == 1, (last & odd)[counted])
    assert np.all((batch.truncated == 1)[counted & last & ~odd])
    assert not np.any((batch.truncated == 1) & (batch.terminated == 1) & counted & ~at_edge(batch, then))


def at_edge(batch: Any, then: np.ndarray) -> np.ndarray:
    """:return: Whether a transition is the newest known of its environment"""
    newest = {env: then[then[..., 0] == env][:, 1:].tolist() for env in np.unique(then[..., 0])}
    top = {env: max(places) for env, places in newest.items()}
    return np.array([[list(place[1:]) == top[place[0]] for place in row] for row in then])


@pytest.mark.parametrize("n_envs", [1, 3])
@pytest.mark.parametrize(("n_steps", "capacity"), [(3, 1_000), (38, 1_000), (38, 30), (100, 21), (2_500, 2_000)])
def test_sequences_are_what_happened(n_steps: int, capacity: int, n_envs: int) -> None:
    memory = filled(n_steps, capacity, n_envs)
    assert memory.size() == n_envs * min(n_steps, capacity // n_envs)
    check_sequences(*draw(memory))


def test_actions_belong_to_their_steps() -> None:
    memory = filled(20)
    batch, obs = draw(memory)
    # Step k of episode e is the (5 (e - 1) + k)-th overall
    overall = 5 * (obs[:-1, :, 1] - 1) + obs[:-1, :, 2]
    counted = alive(batch)
    assert np.array_equal(batch.actions[..., 0][counted], overall[counted] % 2)


def test_starts_are_uniform_over_the_memory() -> None:
    memory = filled(40, capacity=22, n_envs=2)
    _, obs = draw(memory, n=22_000)
    places, counts = np.unique(obs[0], axis=0, return_counts=True)
    assert len(places) == 22
    assert np.all(np.abs(counts - 1_000) < 5 * math.sqrt(1_000))


def test_end_of_an_episode_is_its_real_last_observation() -> None:
    batch, obs = draw(filled(38))
    ended = alive(batch) & (obs[1:, :, 2] == 5)
    assert ended.any()
    # Were it the first of the next episode, the step would be 0
    assert not np.any(obs[1:][alive(batch)][:, 2] == 0)


@pytest.mark.parametrize("n_steps", [3, 5, 12])
def test_newest_edge_counts_as_truncated(n_steps: int) -> None:
    memory = filled(n_steps)
    batch, obs = draw(memory)
    episode, step = divmod(n_steps - 1, 5)
    newest = alive(batch) & (obs[1:, :, 1] == episode + 1) & (obs[1:, :, 2] == step + 1)
    assert newest.any()
    assert np.all(batch.truncated[newest] == 1)


def test_edge_is_not_truncated_once_it_continues() -> None:
    memory = ReplayMemory(100, BOX, ACTION, 1)
    env = counters()
    obs = collect(memory, env, 3)
    collect(memory, env, 1, obs)
    batch, seen = draw(memory)
    third = alive(batch) & (seen[1:, :, 2] == 3)
    assert third.any()
    assert np.all(batch.truncated[third] == 0)


@pytest.mark.parametrize("n_steps", [3, 5])
def test_cut_ends_what_is_going_on(n_steps: int) -> None:
    memory = filled(n_steps)
    memory.cut()
    memory.cut()
    # Another, unrelated episode follows
    other = counters()
    for _ in range(4):
        other.reset()
    collect(memory, other, 4)
    batch, obs = draw(memory)
    check_sequences(batch, obs)
    newest = alive(batch) & (obs[1:, :, 1] == 1) & (obs[1:, :, 2] == n_steps)
    assert newest.any()
    # Five steps end by a termination, which cut() does not touch
    assert np.all(batch.truncated[newest] == (n_steps < 5))
    assert np.all(batch.terminated[newest] == (n_steps == 5))


def test_cut_of_an_empty_memory_does_nothing() -> None:
    memory = ReplayMemory(10, BOX, ACTION, 1)
    memory.cut()
    assert memory.size() == 0
    with pytest.raises(ValueError, match="empty"):
        memory.sample(1, 1, np.random.default_rng())


def test_pool_is_used_again() -> None:
    memory = filled(2_000, capacity=20, n_envs=2)
    in_use = int((memory.final_index >= 0).sum())
    pool = len(memory.final_pool[""])
    assert in_use <= 2 * 3
    assert pool == 16
    assert len(memory.free_finals) == pool - in_use
    used = memory.final_index[memory.final_index >= 0]
    assert len(set(used)) == len(used)
    assert not set(used) & set(memory.free_finals)


@pytest.mark.parametrize("capacity", [1, 2, 3])
def test_tiny_memory(capacity: int) -> None:
    memory = filled(23, capacity)
    assert memory.size() == capacity
    check_sequences(*draw(memory))


def test_memory_grows_as_it_fills() -> None:
    memory = ReplayMemory(1_000_000, BOX, ACTION, 1)
    assert memory.slots < 2_000
    collect(memory, counters(), 1_500)
    assert 1_500 < memory.slots < 5_000


def test_size_counts_all_environments_and_stays_within_the_capacity() -> None:
    memory = filled(500, capacity=100, n_envs=3)
    assert memory.size() == 99


def test_no_terminations_no_flag() -> None:
    memory = filled(4)
    assert not memory.has_terminated
    assert filled(5).has_terminated


@pytest.mark.parametrize("n_envs", [1, 3])
def test_informative_from_the_first_termination_or_other_reward_on(n_envs: int) -> None:
    def remember(memory: ReplayMemory, rewards: list[float], terminated: bool = False) -> bool:
        obs, ends = np.zeros((n_envs, 3), np.float32), np.zeros(n_envs, bool)
        for reward in rewards:
            memory.add(obs, np.zeros(n_envs), np.full(n_envs, reward, np.float32), obs, ends, ~ends)
        last = np.full(n_envs, rewards[-1], np.float32)
        memory.add(obs, np.zeros(n_envs), last, obs, np.arange(n_envs) == n_envs - 1 if terminated else ends, ends)
        return bool(memory.is_informative)

    assert not remember(ReplayMemory(100, BOX, ACTION, n_envs), [-0.1, -0.1, -0.1])
    assert not remember(ReplayMemory(100, BOX, ACTION, n_envs), [0.0, 0.0])
    assert remember(ReplayMemory(100, BOX, ACTION, n_envs), [0.0, 0.1, 0.0])
    assert remember(ReplayMemory(100, BOX, ACTION, n_envs), [-0.1, -0.1], terminated=True)


# ------------------------------------------------------------------ returns


def by_hand(memory: ReplayMemory, gamma: float) -> list[float]:
    """:return: Discounted rewards-to-go of environment 0, oldest first"""
    returns, following = [], 0.0
    for slot in memory._order()[::-1]:
        if memory.terminated[slot, 0] or memory.truncated[slot, 0]:
            following = 0.0
        following = float(memory.rewards[slot, 0]) + gamma * following
        returns.append(following)
    return returns[::-1]


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 0.99, 1.0])
@pytest.mark.parametrize("rounds", [(38,), (7, 9, 2), (50, 1, 1, 30)])
def test_returns_to_go(rounds: tuple[int, ...], gamma: float) -> None:
    memory = ReplayMemory(60, BOX, ACTION, 1)
    env, obs = counters(), None
    for n_steps in rounds:
        obs = collect(memory, env, n_steps, obs)
        memory._refresh_returns(np.array([gamma]))
        assert np.allclose(memory.returns[memory._order(), 0], by_hand(memory, gamma), rtol=2e-3)


def test_returns_are_refreshed_as_far_as_new_rewards_matter() -> None:
    """Without a discount all of an episode depends on them, and nothing of the one before."""
    memory = ReplayMemory(1_000, BOX, ACTION, 2)
    env = counters(2)
    obs = collect(memory, env, 300)
    memory._refresh_returns(np.array([1.0]))
    expected = memory.returns.copy()
    memory.returns[:] = np.where(np.arange(len(expected))[:, None] < 200, -1, expected)
    collect(memory, env, 1, obs)
    memory._refresh_returns(np.array([1.0]))
    assert (memory.returns[:200] == -1).all() and np.allclose(memory.returns[301 - 40 : 301, 0], by_hand(memory, 1.0)[-40:])


def rewards_only(rewards: list[float], ends: bool = False) -> ReplayMemory:
    memory = ReplayMemory(1_000, BOX, ACTION, 1)
    for i, reward in enumerate(rewards):
        end = np.array([ends and i == len(rewards) - 1])
        memory.add(np.zeros((1, 3)), np.zeros((1, 1)), np.array([reward]), np.zeros((1, 3)), end, np.array([False]))
    return memory


@pytest.mark.parametrize(
    ("rewards", "gamma", "scale"),
    [
        # The return-to-go of the first step: 1 + 0.5 + 0.25 + 0.125; the mean's bound is 1 / 0.5
        ([1.0, 1.0, 1.0, 1.0], 0.5, 0.2),
        # A single reward in many steps: the return-to-go is the reward itself
        ([0.0] * 9 + [10.0], 0.99, 1.0),
        # mean|r| / (1 - gamma) = 2 / 0.01, larger than the sum over three steps
        ([2.0, -2.0, 2.0], 0.99, 20.0),
        ([0.0, 0.0], 0.99, 0.0),
    ],
)
def test_return_scale(rewards: list[float], gamma: float, scale: float) -> None:
    expected = max(scale, sum(map(abs, rewards)) / len(rewards) / (1 - gamma) / 10)
    assert rewards_only(rewards, ends=True).return_scale(gamma) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("exponent", [-10, 10])
def test_return_scale_commutes_with_powers_of_two(exponent: int) -> None:
    rewards = np.random.default_rng(0).normal(size=300)
    plain = rewards_only(rewards.tolist()).return_scale(0.97)
    assert rewards_only((rewards * 2.0**exponent).tolist()).return_scale(0.97) == plain * 2.0**exponent


def test_return_scale_is_at_least_a_twentieth_of_the_largest_reward() -> None:
    # 1,000 small rewards: the 99th percentile does not see the large one
    memory = rewards_only([0.001] * 999 + [100.0])
    assert memory.return_scale(0.0) == pytest.approx(5.0)


def test_return_scale_of_another_discount_is_that_of_a_new_memory() -> None:
    def with_rewards() -> ReplayMemory:
        memory = ReplayMemory(100, BOX, ACTION, 1)
        collect(memory, counters(length=20), 60)
        return memory

    memory, fresh = with_rewards(), with_rewards()
    first = memory.return_scale(0.5)
    assert memory.return_scale(0.99) == fresh.return_scale(0.99) > 2 * first
    # The returns of earlier episodes too, whatever the scale is taken from
    assert np.array_equal(memory.returns, fresh.returns)
    assert pickle.loads(pickle.dumps(memory)).return_scale(0.5) == first


def test_return_scale_without_discount_counts_1000_steps() -> None:
    assert rewards_only([1.0] * 50, ends=True).return_scale(1.0) == pytest.approx(100.0)


# ------------------------------------------------------------------- pickle


@pytest.mark.parametrize(
    ("n_steps", "capacity"), [(38, 1_000), (38, 30), (30, 30), (1_023, 1_024), (1_024, 1_024), (3_000, 2_000)]
)
def test_pickle_keeps_sampling_to_the_bit(n_steps: int, capacity: int) -> None:
    memory = filled(n_steps, capacity)
    other = pickle.loads(pickle.dumps(memory))
    check_same_sampling(memory, other)


def check_same_sampling(first: ReplayMemory, second: ReplayMemory) -> None:
    (a, a_obs), (b, b_obs) = draw(first), draw(second)
    assert np.array_equal(a_obs, b_obs)
    for name in ("actions", "rewards", "terminated", "truncated"):
        assert np.array_equal(getattr(a, name), getattr(b, name)), name
    assert first.return_scale(0.9) == second.return_scale(0.9)


@pytest.mark.parametrize(("n_steps", "capacity"), [(38, 1_000), (38, 30), (1_023, 1_024), (1_024, 2_000)])
def test_pickled_memory_goes_on_as_the_first_does(n_steps: int, capacity: int) -> None:
    memory, env = ReplayMemory(capacity, BOX, ACTION, 1), counters()
    obs = collect(memory, env, n_steps)
    other: ReplayMemory = pickle.loads(pickle.dumps(memory))
    twin = counters()
    collect(other, twin, 0, collect(ReplayMemory(capacity, BOX, ACTION, 1), twin, n_steps))
    collect(other, twin, 40, obs)
    collect(memory, env, 40, obs)
    check_same_sampling(memory, other)
    check_sequences(*draw(other))


def test_pickle_leaves_out_what_is_not_in_use() -> None:
    buffer = io.BytesIO()
    pickle.dump(filled(10), buffer)
    assert buffer.tell() < 5_000


# ----------------------------------------------------------- in the algorithm


class StopAt(BaseCallback):
    """Ends training at a step."""

    def __init__(self, at: int):
        super().__init__()
        self.at = at

    def _on_step(self) -> bool:
        return self.num_timesteps < self.at


def from_model(model: Any) -> tuple[Any, np.ndarray]:
    batch = model.replay_buffer.sample(500, LENGTH, np.random.default_rng(0))
    obs = model.replay_buffer.observations_at(batch.states.ravel())
    obs = obs["place"] if isinstance(obs, dict) else obs
    return batch, obs.reshape(*batch.states.shape, -1)


@pytest.mark.parametrize("dict_space", [False, True])
@pytest.mark.parametrize("n_envs", [1, 3])
def test_collection_stores_what_happened(n_envs: int, dict_space: bool) -> None:
    policy = "MultiInputPolicy" if dict_space else "MlpPolicy"
    model = tiny_model(counters(n_envs, dict_space=dict_space), policy, learning_starts=10_000).learn(48 * n_envs)
    batch, obs = from_model(model)
    check_sequences(batch, obs)
    assert {tuple(place) for place in np.unique(obs[..., :2].reshape(-1, 2), axis=0)} >= {(0.0, 1.0), (n_envs - 1.0, 1.0)}
    if dict_space:
        parts: Any = model.replay_buffer.observations_at(batch.states.ravel())
        assert np.array_equal(parts["place"].sum(-1), parts["sum"][:, 0])


def test_aborted_rollout_is_cut() -> None:
    model = tiny_model(counters(), learning_starts=10_000)
    model.learn(48, callback=StopAt(19))
    # The 19th step was played: stored or not, what is collected next must not be taken for its successor
    assert model.replay_buffer.size() in (18, 19)
    model.learn(48, reset_num_timesteps=False)
    batch, obs = from_model(model)
    check_sequences(batch, obs)


class FailAt(StopAt):
    """Fails at a step: the environments have played it, the memory has not seen it."""

    def _on_step(self) -> bool:
        if self.num_timesteps == self.at:
            raise RuntimeError("in a callback")
        return True


def test_after_an_error_in_a_callback_sequences_are_what_happened() -> None:
    model = tiny_model(counters(), learning_starts=10_000)
    with pytest.raises(RuntimeError, match="in a callback"):
        model.learn(48, callback=FailAt(18))
    model.learn(48, reset_num_timesteps=False)
    check_sequences(*from_model(model))


@pytest.mark.parametrize("reset_num_timesteps", [True, False])
def test_learning_again_keeps_sequences_whole(reset_num_timesteps: bool) -> None:
    model = tiny_model(counters(2), learning_starts=10_000)
    for _ in range(3):
        model.learn(32, reset_num_timesteps=reset_num_timesteps)
    check_sequences(*from_model(model))


def test_going_on_without_a_reset_truncates_nothing() -> None:
    model = tiny_model(counters(length=100), learning_starts=10_000)
    model.learn(16)
    model.learn(16, reset_num_timesteps=False)
    assert not model.replay_buffer.truncated[15, 0], "the episode went on"


def test_set_env_cuts() -> None:
    model = tiny_model(counters(), learning_starts=10_000)
    model.learn(16)
    model.set_env(counters())
    model.learn(16, reset_num_timesteps=False)
    check_sequences(*from_model(model))


def test_vec_normalize_raw_in_memory_normalised_when_sampled() -> None:
    env = VecNormalize(counters(2), norm_reward=False, clip_obs=1.5)
    model = tiny_model(env, learning_starts=10_000).learn(64)
    batch, raw = from_model(model)
    assert np.array_equal(raw[0], np.round(raw[0])), "what an action was chosen on is stored raw"
    states = batch.states.ravel()
    sampled = model.replay_buffer.observations_at(states, env)
    assert isinstance(sampled, np.ndarray) and sampled.dtype == np.float32
    assert isinstance(env.obs_rms, RunningMeanStd)
    by_formula = (raw.reshape(-1, 3) - env.obs_rms.mean) / np.sqrt(env.obs_rms.var + env.epsilon)
    assert np.allclose(sampled, np.clip(by_formula, -1.5, 1.5), atol=1e-5)


def test_vec_normalize_rewards_are_stored_raw() -> None:
    with pytest.warns(UserWarning, match="norm_reward=False"):
        model = tiny_model(VecNormalize(counters(2)), learning_starts=10_000).learn(64)
    batch, obs = from_model(model)
    # SB3 gives an episode's last observation normalised only: undoing that rounds
    assert np.allclose(obs, np.round(obs), atol=1e-3)
    check_sequences(batch, np.round(obs))


def test_time_limits_bootstrap_in_the_rollout_and_not_in_memory() -> None:
    # Two episodes of 8 steps: the first terminates, the second is truncated
    model = tiny_model(counters(length=8), learning_starts=10_000, gamma=0.9)
    model.policy.world_model.critics.biases[-1].data[..., 40] = 1.0  # any value but zero
    model.learn(16)
    raw = model.replay_buffer.rewards[:16, 0]
    assert np.array_equal(raw, [11, 12, 13, 14, 15, 16, 17, 18, 21, 22, 23, 24, 25, 26, 27, 28])
    difference = model.rollout_buffer.rewards[:, 0] - raw
    last = np.array([0.0, 2.0, 8.0], np.float32)
    value = model.policy.predict_values(model.policy.obs_to_tensor(last)[0]).item()
    assert abs(value) > 0.01
    assert difference[15] == pytest.approx(0.9 * value, rel=1e-4)
    assert np.all(difference[:15] == 0)


def test_own_buffer_class_and_its_arguments() -> None:
    class Loud(HybridRolloutBuffer):
        pass

    model = tiny_model(counters(), rollout_buffer_class=Loud, rollout_buffer_kwargs=dict(memory_size=20)).learn(48)
    assert isinstance(model.rollout_buffer, Loud)
    assert model.replay_buffer.size() == 20
    assert model._n_updates == 24


def test_sampling_leaves_the_memory_alone() -> None:
    memory = filled(38, 30)
    before = pickle.loads(pickle.dumps(memory.__dict__))
    draw(memory)
    after = memory.__dict__
    assert all(np.array_equal(after[name], before[name]) for name in ("actions", "rewards", "returns", "final_index"))
    assert_same_tensors({"pos": memory.pos}, {"pos": before["pos"]})


@pytest.mark.parametrize("n_envs", [1, 3])
def test_bytes_of_the_full_memory(n_envs: int) -> None:
    memory = ReplayMemory(600, spaces.Box(0, 255, (3, 8, 8), np.uint8), spaces.Box(-1, 1, (2,)), n_envs)
    per_step = 3 * 8 * 8 + 2 * 4
    assert 600 * per_step < memory.nbytes_at_capacity() < 600 * (per_step + 32)


def test_warning_where_the_machine_is_too_small(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("psutil")
    memory = ReplayMemory(10**9, spaces.Box(0, 255, (3, 512, 512), np.uint8), ACTION, 1)
    with pytest.warns(UserWarning, match="smaller `buffer_size`"):
        memory.warn_if_too_large()


def test_counter_env_is_as_it_says() -> None:
    env = CounterEnv(number=2, length=3)
    env.reset()
    steps = [env.step(0) for _ in range(5)]
    assert steps[-1][0].tolist() == [2, 1, 5]
    assert steps[-1][1:4] == (215.0, True, False)
    assert tiny_policy_kwargs(latent_dim=8)["latent_dim"] == 8


# ------------------------------------------------------------ slow observations


def wandering(
    correlation: float, space: spaces.Space, write: Callable[[np.ndarray], Any], episode: int = 10_000
) -> ReplayMemory:
    """:return: A memory of three entries that correlate so much from one step to the next; each episode begins far away"""
    memory, rng = ReplayMemory(4_000, space, ACTION, 1), np.random.default_rng(0)
    x = rng.normal(size=3)
    for step in range(4_000):
        next_x = correlation * x + np.sqrt(1 - correlation**2) * rng.normal(size=3)
        ended = np.array([step % episode == episode - 1])
        memory.add(write(x), np.zeros((1, 1)), np.zeros(1), write(next_x), np.zeros(1, bool), ended)
        x = rng.normal(size=3) if ended[0] else next_x
    return memory


def one_row(x: np.ndarray) -> np.ndarray:
    return x[None].astype(np.float32)


@pytest.mark.parametrize("correlation", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("episode", [10_000, 4])
def test_correlation_from_one_step_to_the_next(correlation: float, episode: int) -> None:
    memory = wandering(correlation, spaces.Box(-9.0, 9.0, (3,), np.float32), one_row, episode)
    assert memory.lag_correlation() == pytest.approx(correlation, abs=0.06)
    assert memory.lag_correlation() == memory.lag_correlation()


def test_correlation_is_that_of_all_vectors_that_move() -> None:
    parts: dict[str, spaces.Space] = dict(
        x=spaces.Box(-9.0, 9.0, (3,), np.float64),
        still=spaces.Box(-9.0, 9.0, (50,), np.float32),
        image=spaces.Box(0, 255, (1, 4, 4), np.uint8),
        kind=spaces.Discrete(5),
    )
    rng = np.random.default_rng(1)

    def write(x: np.ndarray) -> dict[str, np.ndarray]:
        image, kind = rng.integers(256, size=(1, 1, 4, 4)), rng.integers(5, size=1)
        return dict(x=100 * x[None], still=np.full((1, 50), 3.0, np.float32), image=image, kind=kind)

    assert wandering(0.9, spaces.Dict(parts), write).lag_correlation() == pytest.approx(0.9, abs=0.05)


@pytest.mark.parametrize(
    ("space", "write"),
    [
        (spaces.Discrete(3), lambda x: np.array([int(x[0] > 0)])),
        (spaces.Box(-9.0, 9.0, (1, 1, 3), np.float32), lambda x: x[None, None, None]),
    ],
    ids=["number", "image of floats"],
)
def test_correlation_of_observations_that_are_no_vectors_is_zero(
    space: spaces.Space, write: Callable[[np.ndarray], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = wandering(0.9, space, write)
    monkeypatch.setattr(memory, "sample", None)
    assert memory.lag_correlation() == 0, "and nothing is copied for it"


def test_correlation_of_an_empty_memory_is_zero() -> None:
    assert ReplayMemory(10, spaces.Box(-9.0, 9.0, (3,), np.float32), ACTION, 1).lag_correlation() == 0
