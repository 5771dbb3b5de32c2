"""One agent over several tasks: masks, statistics, scales, discounts and embeddings per task, and new tasks."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize
from torch.distributions import Categorical, Independent, Normal, TanhTransform, TransformedDistribution, kl_divergence

from sb3_m3po import M3PO
from sb3_m3po.actions import CategoricalActions, GaussianActions
from sb3_m3po.learner import Learner
from sb3_m3po.losses import excess_entropy, n_step_return
from sb3_m3po.masked_actions import MaskedCategoricalActions, MaskedGaussianActions, make_action_codec
from sb3_m3po.memory import ReplayMemory
from sb3_m3po.nets import RunningNorm
from sb3_m3po.planner import PlannerConfig, plan
from sb3_m3po.tasks import TaskReader, TaskSpace, TaskSpec, TaskTable, find_tasks
from tests.helpers import RandomEnv, randoms, tiny_model, tiny_policy_kwargs

WIDTH = 4
SMALL, LARGE = TaskSpec("small", 2, 1), TaskSpec("large", 4, 3)
TABLE = TaskTable([SMALL, LARGE])
BOX, DISCRETE = spaces.Box(-1.0, 1.0, (3,)), spaces.Discrete(3)


def task_space(table: TaskTable) -> spaces.Dict:
    return spaces.Dict({"observation": spaces.Box(-np.inf, np.inf, (WIDTH,)), "task": TaskSpace(table)})


class Target(gym.Env):
    """
    Reward ``scale (1 - (a - target)^2)`` of the first action, or ``scale`` for one of the discrete ones; episodes of one step.

    :param table: The tasks
    :param name: Which of them this is
    """

    def __init__(self, table: TaskTable, name: str, target: float = 0.0, scale: float = 1.0, action_space: spaces.Space = BOX):
        self.observation_space, self.action_space = task_space(table), action_space
        self.task, self.dim = table.id_of(name), table[table.id_of(name)].observation_dim or WIDTH
        self.target, self.scale = target, scale
        self.actions: list[Any] = []

    def _obs(self) -> dict[str, Any]:
        vector = np.zeros(WIDTH, np.float32)
        vector[: self.dim] = self.np_random.normal(self.target, 1.0, self.dim)
        return {"observation": vector, "task": self.task}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
        super().reset(seed=seed)
        return self._obs(), {}

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        self.actions.append(action)
        if isinstance(self.action_space, spaces.Box):
            reward = self.scale * (1 - (float(action[0]) - self.target) ** 2)
        else:
            reward = self.scale * float(action == self.target)
        return self._obs(), reward, True, False, {}


def two_targets(action_space: spaces.Space = BOX, table: TaskTable = TABLE, **second: Any) -> DummyVecEnv:
    """:return: Environments of two tasks, two of the second"""
    first = dict(target=1.0 if action_space is DISCRETE else 0.5)
    second = {"target": -0.5, **second}
    return DummyVecEnv(
        [
            lambda: Target(table, table.names[0], action_space=action_space, **first),
            lambda: Target(table, table.names[1], action_space=action_space, **second),
            lambda: Target(table, table.names[1], action_space=action_space, **second),
        ]
    )


def rows(tasks: list[int], seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {"observation": rng.normal(size=(len(tasks), WIDTH)).astype(np.float32), "task": np.array(tasks)}


def tensors(obs: dict[str, np.ndarray]) -> dict[str, th.Tensor]:
    return {key: th.as_tensor(value) for key, value in obs.items()}


# ----------------------------------------------------------------------- table


def test_table_says_what_it_was_told() -> None:
    table = TaskTable([SMALL, TaskSpec("large", 4, 3, gamma=0.9)])
    assert table.names == ["small", "large"] and table.id_of("large") == 1 and len(table) == 2
    assert table.action_masks(3).tolist() == [[True, False, False], [True, True, True]]
    assert table.gammas(0.99).tolist() == [0.99, 0.9]
    grown = table.with_tasks([SMALL, TaskSpec("new", 1, 2)])
    assert grown.names == ["small", "large", "new"] and grown.extends(table) and not table.extends(grown)


@pytest.mark.parametrize(
    ("specs", "message"),
    [([], "at least one"), ([SMALL, SMALL], "'small'"), ([TaskSpec("a"), TaskSpec("b"), TaskSpec("a")], r"\['a'\]")],
)
def test_bad_tables_are_refused(specs: list[TaskSpec], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TaskTable(specs)


@pytest.mark.parametrize("wrong", [dict(name=""), dict(observation_dim=0), dict(action_dim=-1), dict(gamma=1.5)], ids=str)
def test_bad_tasks_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        TaskSpec(**{"name": "a", **wrong})


def test_a_task_cannot_change() -> None:
    with pytest.raises(ValueError, match="'small' is in the table"):
        TABLE.with_tasks([TaskSpec("small", 3, 1)])
    with pytest.raises(ValueError, match="small, large"):
        TABLE.id_of("medium")


def test_other_tasks_are_another_space() -> None:
    assert TaskSpace(TABLE) == TaskSpace(TaskTable([SMALL, LARGE]))
    assert TaskSpace(TABLE) != TaskSpace(TaskTable([LARGE, SMALL]))
    assert TaskSpace(TABLE) != spaces.Discrete(2)


def test_where_the_task_is_read() -> None:
    vector = spaces.Box(-1, 1, (5,))
    key = find_tasks(spaces.Dict({"x": vector, "which": spaces.Discrete(3)}), "which", None)
    assert key is not None and key.ids({"which": np.array([[2.0], [0.0]])}).tolist() == [2, 0]
    tail = find_tasks(vector, "task", 2)
    assert tail is not None and tail.ids(th.tensor([[9.0, 9, 9, 0, 1], [9, 9, 9, 1, 0]])).tolist() == [1, 0]
    # No other Discrete key is taken for a task (MiniGrid's direction is none), and no vector without being told
    assert find_tasks(spaces.Dict({"x": vector, "direction": spaces.Discrete(4)}), "task", None) is None
    assert find_tasks(vector, "task", None) is None
    assert find_tasks(task_space(TaskTable([SMALL])), "task", None) is None


@pytest.mark.parametrize(
    ("space", "key", "n_tasks", "message"),
    [
        (spaces.Dict({"x": BOX}), "which", None, "which"),
        (spaces.Dict({"task": BOX}), "task", None, "Discrete.*task_key=None"),
        (spaces.Dict({"task": spaces.Discrete(3)}), "task", None, "nothing but the task's id"),
        (spaces.Discrete(4), "task", 2, "vectors"),
        (BOX, "task", 3, "between 1 and"),
    ],
    ids=str,
)
def test_missing_tasks_are_named(space: spaces.Space, key: str, n_tasks: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_tasks(space, key, n_tasks)


def test_a_key_that_only_sounds_like_a_task() -> None:
    space = spaces.Dict({"task": BOX, "x": BOX})
    model = tiny_model(DummyVecEnv([lambda: RandomEnv(space)]), "MultiInputPolicy", task_key=None).learn(32)
    assert model.task_table is None and model._n_updates > 0 and model.policy.seen_space == space


# ---------------------------------------------------------------------- masks

MASKS = TABLE.action_masks(3)


def masked_params(tasks: list[int]) -> tuple[MaskedGaussianActions, th.Tensor, th.Tensor]:
    codec = MaskedGaussianActions(BOX, MASKS)
    output = th.randn(len(tasks), codec.output_dim, generator=th.Generator().manual_seed(0)).requires_grad_()
    return codec, output, codec.parameters_from(output, th.tensor(tasks))


def test_masked_gaussian_is_the_smaller_gaussian() -> None:
    codec, _, params = masked_params([0] * 50)
    _, _, others = masked_params([0] * 50)
    others = codec.with_gaussian(others, *(x + 0.3 for x in codec.gaussian(others)))
    mean, log_std = (x[:, :1].double() for x in codec.gaussian(params))
    normal = Normal(mean, log_std.exp())
    a, log_prob = codec.sample(params, codec.noise((50,)))
    assert (a[:, 1:] == 0).all() and (a[:, 0] != 0).all()
    expected = TransformedDistribution(Independent(normal, 1), TanhTransform()).log_prob(a[:, :1].double())
    assert th.allclose(log_prob.double(), expected, atol=1e-3)
    other_mean, other_log_std = (x[:, :1].double() for x in codec.gaussian(others))
    expected = kl_divergence(normal, Normal(other_mean, other_log_std.exp())).sum(-1)
    assert th.allclose(codec.kl(params, others).double(), expected, atol=1e-5)
    plain = GaussianActions(spaces.Box(-1.0, 1.0, (1,)))
    smaller = plain.distribution(th.cat([mean, log_std], -1).float())
    assert th.allclose(codec.distribution(params).entropy(), smaller.entropy(), atol=1e-5)
    assert th.allclose(codec.distribution(params).log_prob(a), smaller.log_prob(a[:, :1]), atol=1e-5)
    assert (codec.mode(params)[:, 1:] == 0).all()


def test_a_widened_masked_gaussian_keeps_its_mask() -> None:
    codec, _, params = masked_params([0] * 50 + [1] * 50)
    mean, log_std = codec.gaussian(params - 1.0)
    narrow = codec.with_gaussian(params, mean, log_std)
    expected = codec.with_gaussian(narrow, mean, log_std.clamp_min(np.log(0.5)))
    assert th.equal(codec.widen(narrow), expected) and not th.equal(narrow, expected)


def test_padded_dimensions_have_no_gradient() -> None:
    codec, output, params = masked_params([0, 1])
    a, log_prob = codec.sample(params, codec.noise((2,)))
    (a.sum() + log_prob.sum() + codec.kl(params, params.detach() + 0.1).sum()).backward()
    assert output.grad is not None
    assert (output.grad[0].view(2, 3)[:, 1:] == 0).all() and (output.grad[0].view(2, 3)[:, 0] != 0).all()
    assert (output.grad[1] != 0).all()


def test_entropy_targets_count_own_actions() -> None:
    assert MaskedGaussianActions(BOX, MASKS).target_entropy.tolist() == [-0.5, -1.5]
    assert MaskedCategoricalActions(DISCRETE, TABLE.action_masks(3)).target_entropy.tolist() == pytest.approx(
        [0, 0.25 * np.log(3)]
    )


def test_impossible_actions_are_never_drawn() -> None:
    table = TaskTable([TaskSpec("two", 2, 2), TaskSpec("three", 2, 3)])
    codec = make_action_codec(DISCRETE, table=table)
    assert isinstance(codec, MaskedCategoricalActions)
    output = th.tensor([[0.0, 1.0, 50.0]]).repeat(2, 1)
    params = codec.parameters_from(output, th.tensor([0, 1]))
    smaller = Categorical(logits=output[0, :2])
    assert th.allclose(params[0, :2], smaller.logits, atol=1e-6)
    assert codec.entropy(params)[0].item() == pytest.approx(smaller.entropy().item(), abs=1e-5)
    assert codec.mode(params).argmax(-1).tolist() == [1, 2]
    for drawn in (params, codec.widen(params)):
        assert drawn.exp().sum(-1).tolist() == pytest.approx([1, 1], abs=1e-5)
        a = codec.sample(drawn.repeat(500, 1), codec.noise((1_000,)))[0].argmax(-1)
        assert a[::2].max() == 1 and a[1::2].max() == 2
    assert codec.widen(params).exp()[0, :2].tolist() == pytest.approx((0.5 * smaller.probs + 0.25).tolist(), abs=1e-5)


def test_equal_sizes_need_no_masks() -> None:
    table = TaskTable([TaskSpec("a", 2, 3), TaskSpec("b", 4, 3)])
    assert type(make_action_codec(BOX, table=table)) is GaussianActions
    assert type(make_action_codec(DISCRETE, table=table)) is CategoricalActions


class Liar:
    """A model in which the impossible action is the best, and rewards count what the gamma of a row makes of them."""

    def __init__(self, codec: Any, tasks: th.Tensor):
        self.codec, self.tasks = codec, tasks

    def prior(self, z: th.Tensor) -> th.Tensor:
        return self.codec.parameters_from(th.zeros(len(z), self.codec.output_dim), z[:, -1].long())

    def step(self, z: th.Tensor, a: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        return z, a @ th.tensor([0.0, 1.0, 10.0]), th.zeros(len(z))

    def terminal_value(self, z: th.Tensor) -> th.Tensor:
        return th.zeros(len(z))


@pytest.mark.parametrize("iterations", [1, 3])
@pytest.mark.parametrize("space", [BOX, DISCRETE], ids=["box", "discrete"])
def test_planner_keeps_to_the_mask(space: spaces.Space, iterations: int) -> None:
    table = TaskTable([TaskSpec("two", 2, 2), TaskSpec("three", 2, 3)])
    codec = make_action_codec(space, table=table)
    z = th.tensor([0.0, 1.0]).repeat(100).unsqueeze(-1)
    config = PlannerConfig(n_iterations=iterations, n_effective=2)
    planned = plan(Liar(codec, z), codec, z, 0.9, config, lambda h, n: codec.noise((h, len(z), n)))
    sampled, log_prob = planned.sample(codec.noise((len(z),)))
    for a in (planned.mode(), sampled):
        assert (a[::2, 2] == 0).all()
        assert (a[1::2, 2] > 0).float().mean() > 0.6
    assert planned.kl.isfinite().all() and planned.gain.isfinite().all() and log_prob.isfinite().all()


def test_each_row_is_planned_with_its_own_discount() -> None:
    codec = make_action_codec(DISCRETE)
    z, config = th.zeros(2, 1), PlannerConfig(n_samples=9, horizon=5)
    model, noise = Liar(codec, z), codec.noise((5, 1, 9), th.Generator().manual_seed(0))
    both = plan(model, codec, z, th.tensor([0.1, 0.9]), config, lambda h, n: noise)
    alone = [plan(model, codec, z[:1], gamma, config, lambda h, n: noise).gain.item() for gamma in (0.1, 0.9)]
    assert both.gain.tolist() == pytest.approx(alone, rel=1e-5)
    assert alone[0] != pytest.approx(alone[1], rel=0.1)


# --------------------------------------------------------------------- memory


def filled_memory(shares: tuple[int, ...] = (1, 1, 8), n_steps: int = 200, n_tasks: int = 2) -> ReplayMemory:
    """:return: Environments in order of their task; task 1 has the larger rewards and the longer episodes"""
    table = TaskTable([TaskSpec(f"t{i}", 4, 1) for i in range(n_tasks)])
    n_envs = len(shares)
    memory = ReplayMemory(n_steps * n_envs, task_space(table), BOX, n_envs, TaskReader(table, "task"))
    rng = np.random.default_rng(0)
    tasks = np.minimum(np.arange(n_envs), 1)
    for step in range(n_steps):
        obs = {"observation": np.full((n_envs, WIDTH), step, np.float32) + tasks[:, None] * 1_000, "task": tasks}
        following = {**obs, "observation": obs["observation"] + 1}
        terminated = (tasks == 0) & (step % 5 == 4)
        rewards = np.where(tasks, 1_000.0, 0.01) * rng.uniform(0.1, 1.0, n_envs)
        memory.add(obs, np.zeros((n_envs, 3)), rewards, following, terminated, ~terminated & (step % 50 == 49))
    return memory


def test_every_task_is_drawn_as_often() -> None:
    memory = filled_memory((1,) * 10)
    batch = memory.sample(20_000, 3, np.random.default_rng(0))
    assert batch.tasks is not None and np.mean(batch.tasks) == pytest.approx(0.5, abs=0.02)
    obs = memory.observations_at(batch.states[0])
    assert isinstance(obs, dict)
    assert (obs["task"] == batch.tasks).all() and ((obs["observation"][:, 0] >= 1_000) == batch.tasks).all()
    assert (batch.rewards > 1).all(0).sum() == batch.tasks.sum()
    # Within a task each transition is drawn as often, and all of them are
    steps = obs["observation"][batch.tasks == 1, 0] - 1_000
    assert set(steps) == set(range(200)) and np.mean(steps) == pytest.approx(99.5, abs=2)


def test_a_task_without_data_is_not_drawn() -> None:
    assert set(filled_memory((1, 1), n_tasks=5).sample(100, 1, np.random.default_rng(0)).tasks.tolist()) == {0, 1}  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("lengths", "enough"),
    [((50, 100), 500), ((10, 450), 2_250), ((10, 9_999), 2_500), ((250,), 1_250)],
    ids=["1,000", "five episodes of each", "5,000", "of those that have appeared"],
)
def test_updates_wait_for_every_task(lengths: tuple[int, ...], enough: int) -> None:
    table = TaskTable([TaskSpec(f"t{i}", 4, 1) for i in range(2)])
    n_envs = len(lengths)
    memory = ReplayMemory(20_000, task_space(table), BOX, n_envs, TaskReader(table, "task"))
    assert not memory.is_enough(None)
    obs: dict[str, np.ndarray] = {"observation": np.zeros((n_envs, WIDTH), np.float32), "task": np.arange(n_envs)}
    for step in range(1, enough + 1):
        assert not memory.is_enough(None)
        ended = step % np.array(lengths) == 0
        memory.add(obs, np.zeros((n_envs, 3)), np.zeros(n_envs), obs, ended, np.zeros(n_envs, bool))
    assert memory.is_enough(None)


def test_the_policy_is_delayed_after_the_first_updates_of_each_task(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sb3_m3po.learner.DELAYED_AFTER", 16)
    model = tiny_model(two_targets(), "MultiInputPolicy")
    for n_updates, delay in ((32, 1), (40, 2)):
        model._n_updates = n_updates
        assert Learner.of(model).policy_delay == delay


def test_statistics_are_those_of_the_task_alone() -> None:
    memory = filled_memory()
    assert memory.has_terminated.tolist() == [True, False] and memory.is_informative.tolist() == [True, True]
    scales = memory.return_scale(np.array([0.9, 0.99]))
    for task, envs in enumerate(([0], [1, 2])):
        alone = ReplayMemory(10_000, spaces.Box(-1, 1, (WIDTH,)), BOX, len(envs))
        for step in range(200):
            ends = memory.terminated[step, envs], memory.truncated[step, envs]
            obs = np.zeros((len(envs), WIDTH), np.float32)
            alone.add(obs, np.zeros((len(envs), 3)), memory.rewards[step, envs], obs, *ends)
        assert scales[task] == pytest.approx(alone.return_scale((0.9, 0.99)[task])[0], rel=1e-6)
    assert scales[1] > 1e4 * scales[0]


def test_lag_correlation_is_measured_for_each_task() -> None:
    table = TaskTable([TaskSpec("slow", 4, 1), TaskSpec("fast", 4, 1), TaskSpec("unseen", 4, 1)])
    memory = ReplayMemory(10_000, task_space(table), BOX, 2, TaskReader(table, "task"))
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, WIDTH))
    for _ in range(2_000):
        y = np.array([[0.95], [0.2]]) * x + np.sqrt(1 - np.array([[0.95], [0.2]]) ** 2) * rng.normal(size=x.shape)
        obs, following = ({"observation": v.astype(np.float32), "task": np.array([0, 1])} for v in (x, y))
        memory.add(obs, np.zeros((2, 3)), np.zeros(2), following, np.zeros(2, bool), np.zeros(2, bool))
        x = y
    assert memory.lag_correlation().tolist() == pytest.approx([0.95, 0.2, 0.0], abs=0.05)


# ------------------------------------------------------------------ statistics


def test_observations_are_normalised_by_their_own_task() -> None:
    rng, tasks = np.random.default_rng(0), np.array([0, 1] * 500)
    x = rng.normal(np.where(tasks, 50.0, -3.0)[:, None], np.where(tasks, 9.0, 0.5)[:, None], (1_000, 3))
    both, alone = RunningNorm((3,), n_tasks=3), [RunningNorm((3,)) for _ in range(2)]
    for part in range(0, 1_000, 250):
        piece = slice(part, part + 250)
        both.update(x[piece], tasks[piece])
        for task, norm in enumerate(alone):
            norm.update(x[piece][tasks[piece] == task])
    for norm in (both, *alone):
        norm.freeze()
    found = both(th.as_tensor(x, dtype=th.float32), th.as_tensor(tasks))
    for task, norm in enumerate(alone):
        mine = th.as_tensor(tasks == task)
        assert th.allclose(found[mine], norm(th.as_tensor(x, dtype=th.float32)[mine]), atol=1e-5)
    unseen = th.randn(4, 3)
    assert th.equal(both(unseen, th.full((4,), 2)), unseen)


def test_returns_are_discounted_by_their_own_task() -> None:
    rewards, zeros = th.ones(3, 2), th.zeros(3, 2)
    found = n_step_return(rewards, zeros, zeros, th.tensor([0.5, 0.9]))
    assert found.rewards.tolist() == pytest.approx([1.75, 2.71]) and found.discount.tolist() == pytest.approx([0.125, 0.729])


def test_excess_entropy_by_hand() -> None:
    entropy, tasks = th.tensor([1.0, 3.0, 10.0]), th.tensor([0, 0, 2])
    assert excess_entropy(entropy, th.tensor([0.5, 0.5, 4.0]), tasks, 3).tolist() == [1.5, 0.0, 6.0]
    assert excess_entropy(entropy, 1.0, tasks, 3).tolist() == [1.0, 0.0, 9.0]


def test_scales_are_kept_for_each_task() -> None:
    policy = tiny_model(two_targets(), "MultiInputPolicy").policy
    never, first = np.zeros(2, bool), np.array([True, False])
    policy.sync(lambda gammas: np.array([0.0, 5.0]), never)
    assert policy.return_scale.tolist() == [1, 5] and policy.bar_ratio.tolist() == [1, 1]
    policy.sync(lambda gammas: np.array([0.01, 4.0]), first)
    # The first nonzero reward sets a scale, a known scale never shrinks
    assert policy.return_scale.tolist() == pytest.approx([0.01, 5]) and policy.bar_ratio.tolist() == [1, 1]
    policy.sync(lambda gammas: np.array([0.02, 10.0]), never)
    assert policy.bar_ratio.tolist() == pytest.approx([0.5, 0.5])
    assert policy.world_model.can_terminate.tolist() == [1, 0]


def test_a_task_that_never_terminates_predicts_none() -> None:
    policy = tiny_model(two_targets(), "MultiInputPolicy").policy
    model = policy.world_model
    model.can_terminate.copy_(th.tensor([1.0, 0.0]))
    model.heads.bias.data[-1] = 3.0
    z = policy.encode(tensors(rows([0, 1, 0, 1])))
    termination = model.step(z, th.zeros(4, 3))[2]
    assert (termination[::2] > 0.5).all() and (termination[1::2] == 0).all()


# ---------------------------------------------------------------- whole models


def test_a_latent_knows_its_task() -> None:
    policy = tiny_model(two_targets(), "MultiInputPolicy", policy_kwargs=tiny_policy_kwargs(task_embedding_dim=5)).policy
    model = policy.world_model
    obs = rows([0, 1, 1])
    z = policy.encode(tensors(obs))
    assert z.shape == (3, 16 + 5 + 1)
    assert model.task_ids(z).tolist() == [0, 1, 1]  # type: ignore[union-attr]
    assert th.equal(z[:, 16:21], model.task_embeddings()[[0, 1, 1]])
    next_z = model.step(z, th.zeros(3, 3))[0]
    assert th.equal(next_z[:, 16:], z[:, 16:]) and not th.equal(next_z[:, :16], z[:, :16])
    assert model.task_embeddings().norm(dim=-1).max() <= 1 + 1e-6
    other = policy.encode(tensors({**obs, "task": np.array([1, 1, 1])}))
    assert not th.equal(other[0, :16], z[0, :16]) and th.equal(other[1:], z[1:])


def test_one_task_pays_nothing() -> None:
    table = TaskTable([LARGE])
    model = tiny_model(DummyVecEnv([lambda: Target(table, "large")]), "MultiInputPolicy")
    assert model.task_table is None and model.policy.world_model.z_dim == 16
    assert not any("embedding" in name for name in model.policy.state_dict())


def test_every_embedding_learns() -> None:
    model = tiny_model(two_targets(), "MultiInputPolicy")
    before = model.policy.world_model.task_embedding.clone()
    model.learn(96)
    assert model._n_updates > 0
    assert (model.policy.world_model.task_embedding != before).all()


@pytest.mark.parametrize("planning", [False, True], ids=["policy", "planning"])
@pytest.mark.parametrize("space", [BOX, DISCRETE], ids=["box", "discrete"])
def test_actions_of_every_kind_stay_within_the_task(space: spaces.Space, planning: bool) -> None:
    env = two_targets(space)
    model = tiny_model(env, "MultiInputPolicy", plan_rollouts=planning, bonus_coef=0.1).learn(150)
    played = np.array(env.envs[0].get_wrapper_attr("actions")).reshape(-1, 3 if space is BOX else 1)
    if space is BOX:
        # Of the action that a task does not have, the middle of its bounds
        assert (played[:, 1:] == 0).all() and (played[:, 0] != 0).all()
    else:
        assert (played == 0).all()
    with model.set_planning(8, 1):
        for deterministic in (True, False):
            actions = model.predict(rows([0] * 20 + [1] * 20), deterministic=deterministic)[0].reshape(40, -1)
            assert (actions[:20, 1:] == 0).all() if space is BOX else (actions[:20] == 0).all()


def test_sb3_s_methods_agree_over_tasks() -> None:
    model = tiny_model(two_targets(), "MultiInputPolicy").learn(96)
    obs = tensors(rows([0, 1, 0, 1]))
    with th.no_grad():
        actions, values, log_prob = model.policy(obs)
        again, log_prob_again, entropy = model.policy.evaluate_actions(obs, actions)
        expected = model.policy.get_distribution(obs).log_prob(actions)
    assert th.equal(values, again) and th.equal(values, model.policy.predict_values(obs))
    assert th.allclose(log_prob, log_prob_again, atol=1e-3) and th.equal(expected, log_prob_again)
    assert entropy is not None and entropy.shape == (4,)


def test_values_are_in_each_task_s_reward_units() -> None:
    policy = tiny_model(two_targets(), "MultiInputPolicy").policy
    obs = tensors(rows([0, 1]))
    policy.world_model.critics.biases[-1].data.add_(th.randn(1, 1, 51))
    before = policy.predict_values(obs).flatten()
    policy.return_scale.copy_(th.tensor([2.0, 100.0]))
    assert policy.predict_values(obs).flatten().tolist() == pytest.approx((before * th.tensor([2.0, 100.0])).tolist())


def test_values_of_several_tasks_are_the_mean_of_the_critics(tmp_path: Any) -> None:
    envs = two_targets(), DummyVecEnv([lambda: Target(TaskTable([LARGE]), "large")])
    several, single = (tiny_model(env, "MultiInputPolicy") for env in envs)
    several.save(tmp_path / "model")
    for model, pessimism in ((several, 0.0), (M3PO.load(tmp_path / "model"), 0.0), (single, 1.0)):
        assert model.policy.world_model.pessimism == model.policy.bar.pessimism == pessimism
    for env in envs:
        model = tiny_model(env, "MultiInputPolicy", policy_kwargs=tiny_policy_kwargs(pessimism=0.5))
        assert model.policy.world_model.pessimism == 0.5


@pytest.mark.expensive
def test_rewards_of_unlike_size_train_side_by_side() -> None:
    table = TaskTable([TaskSpec("cents", 2, 3), TaskSpec("thousands", 4, 3)])
    env = two_targets(DISCRETE, table, target=2.0, scale=1_000.0)
    env.envs[0].unwrapped.scale = 0.01  # type: ignore[attr-defined]
    model = tiny_model(env, "MultiInputPolicy", gamma=0.5, utd_ratio=1.0).learn(600)
    actions = model.predict(rows([0] * 50 + [1] * 50), deterministic=True)[0]
    assert (actions[:50] == 1).all() and (actions[50:] == 2).all()
    assert model.policy.return_scale[1] > 1e4 * model.policy.return_scale[0]
    with th.no_grad():
        values = model.policy.predict_values(tensors(rows([0] * 50 + [1] * 50))).flatten()
    # Of the policy that still explores a little, and pessimistic
    assert 0.3 < values[:50].mean() / 0.01 < 1.1 and 0.3 < values[50:].mean() / 1_000 < 1.1


class Endless(Target):
    """Reward 1 at every step, for ever."""

    def step(self, action: Any) -> tuple[dict[str, Any], float, bool, bool, dict[str, Any]]:
        return self._obs(), 1.0, False, False, {}


@pytest.mark.expensive
def test_rollouts_are_discounted_by_their_own_task() -> None:
    table = TaskTable([TaskSpec("small", 2, 1, gamma=0.5), TaskSpec("large", 4, 3)])
    env = DummyVecEnv([lambda name=name: TimeLimit(Endless(table, name), 5) for name in table.names])  # type: ignore[misc]
    model = tiny_model(env, "MultiInputPolicy", n_steps=12, learning_starts=10_000, gamma=0.9, gae_lambda=1.0)
    with th.no_grad():
        model.policy.world_model.critics.biases[-1].zero_()
    model.policy.predict_values = lambda obs: th.full((len(obs["task"]), 1), 10.0)  # type: ignore[method-assign, index]
    model.learn(24)
    rewards, returns = model.rollout_buffer.rewards, model.rollout_buffer.returns
    for env_id, gamma in enumerate([0.5, 0.9]):
        # The fifth step of each episode meets the time limit; what comes behind it is worth 10
        raw = model.replay_buffer.rewards[:12, env_id]
        assert rewards[4, env_id] == pytest.approx(raw[4] + 10 * gamma)
        assert returns[3, env_id] == pytest.approx(raw[3] + gamma * rewards[4, env_id])


def test_each_task_is_valued_with_its_own_discount() -> None:
    table = TaskTable([TaskSpec("short", 2, 1, gamma=0.5), TaskSpec("long", 4, 3)])
    env = DummyVecEnv([lambda: Endless(table, "short"), lambda: Endless(table, "long")])
    model = tiny_model(env, "MultiInputPolicy", gamma=0.8, utd_ratio=2.0).learn(600)
    with th.no_grad():
        values = model.policy.predict_values(tensors(rows([0] * 20 + [1] * 20))).flatten()
    assert values[:20].mean().item() == pytest.approx(2.0, rel=0.1)
    assert values[20:].mean().item() == pytest.approx(5.0, rel=0.1)


@th.no_grad()
def test_the_gap_of_each_task_has_its_own_discount() -> None:
    table = TaskTable([TaskSpec("short", 2, 1, gamma=0.1), TaskSpec("long", 4, 3)])
    env = DummyVecEnv([lambda: Endless(table, "short"), lambda: Endless(table, "long")])
    model = tiny_model(env, "MultiInputPolicy", gamma=0.8)
    with th.enable_grad():
        model.learn(48)
    learner, policy, world = Learner.of(model), model.policy, model.policy.world_model
    for parameter in (*world.parameters(), *policy.bar.parameters()):
        parameter.add_(0.3 * th.randn(parameter.shape, generator=th.Generator().manual_seed(0)))
    learner.bonus_coef = 0.5
    _, _, batch, frozen = learner.draw(4)
    assert batch.tasks is not None and len(np.unique(batch.states[0])) < len(batch.tasks)
    gamma = th.tensor([0.1, 0.8])[batch.tasks]
    z = policy.encode(learner._observations(batch.states[0]))
    next_z, reward, _ = world.step(z, batch.actions[0])
    free = batch.rewards[0] + gamma * frozen.value[frozen.rows(batch.states[1])]
    expected = (free - reward - gamma * world.value(next_z)).abs()
    assert th.allclose(learner._encode_transitions(batch, frozen)[2], expected, atol=1e-5)


def test_an_unknown_task_is_named() -> None:
    model = tiny_model(two_targets(), "MultiInputPolicy")
    for task in (2, -1):
        with pytest.raises(ValueError, match=f"Task {task} is not in the table of 2 tasks"):
            model.predict(rows([0, task]))


class Tail(gym.ObservationWrapper):
    """The task as a one-hot in the last entries."""

    def __init__(self, env: gym.Env):
        super().__init__(env)
        self.observation_space = spaces.Box(-np.inf, np.inf, (WIDTH + 2,))

    def observation(self, observation: dict[str, Any]) -> np.ndarray:
        return np.concatenate([observation["observation"], np.eye(2, dtype=np.float32)[observation["task"]]])


def test_a_one_hot_tail_is_read_if_told() -> None:
    def env() -> VecEnv:
        return DummyVecEnv([lambda: Tail(Target(TABLE, "small")), lambda: Tail(Target(TABLE, "large"))])

    assert tiny_model(env()).task_table is None
    model = tiny_model(env(), n_tasks=2).learn(64)
    assert model.task_table == TaskTable.anonymous(2)
    obs = np.zeros((2, WIDTH + 2), np.float32)
    obs[[0, 1], [WIDTH, WIDTH + 1]] = 1
    assert model.policy.world_model.task_ids(model.policy.encode(th.as_tensor(obs))).tolist() == [0, 1]  # type: ignore[union-attr]
    assert model.replay_buffer.sample(100, 1, np.random.default_rng(0)).tasks.mean() == pytest.approx(0.5, abs=0.2)  # type: ignore[union-attr]


# ------------------------------------------------------------ saving, growing


def test_a_tail_that_is_no_one_hot_is_refused() -> None:
    model = tiny_model(randoms(2), n_tasks=2)
    with pytest.raises(ValueError, match=r"environment 0 ends in .* no one-hot of n_tasks=2"):
        model.learn(16)
    assert model.replay_buffer.size() == 0
    for tail in ([0.0, 0.0], [1.0, 1.0], [0.3, 0.2]):
        with pytest.raises(ValueError, match="which is no one-hot of 2 tasks"):
            model.predict(np.array([*np.zeros(model.observation_space.shape[0] - 2), *tail], np.float32))  # type: ignore[index]
    with pytest.raises(ValueError, match=r"one-hot in the observations \(n_tasks=\), which can't grow"):
        model.add_tasks(grown_env("new"))


def test_tasks_are_saved(tmp_path: Any) -> None:
    model = tiny_model(two_targets(), "MultiInputPolicy").learn(96)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "memory")
    loaded = M3PO.load(tmp_path / "model", env=two_targets())
    loaded.load_replay_buffer(tmp_path / "memory")
    obs = rows([0, 1, 1])
    assert loaded.task_table == TABLE
    assert np.array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    assert np.array_equal(loaded.replay_buffer.reward_abs_max, model.replay_buffer.reward_abs_max)
    loaded.learn(48, reset_num_timesteps=False)
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        M3PO.load(tmp_path / "model", env=two_targets(table=TaskTable([TaskSpec("other", 2, 1), LARGE])))


GROWN = TABLE.with_tasks([TaskSpec("new", 3, 2)])


def grown_env(*names: str) -> DummyVecEnv:
    def make(name: str) -> Callable[[], gym.Env]:
        return lambda: Target(GROWN, name, target=0.2)

    return DummyVecEnv([make(name) for name in names])


def trained() -> M3PO:
    return tiny_model(two_targets(), "MultiInputPolicy").learn(96)


def test_new_tasks_leave_the_known_ones_as_they_were() -> None:
    model, obs = trained(), rows([0, 1, 1, 0])
    before, values = model.predict(obs, deterministic=True)[0], model.policy.predict_values(tensors(obs))
    embeddings = model.policy.world_model.task_embeddings()
    model.add_tasks(grown_env("new"))
    assert model.task_table == GROWN and model.n_envs == 1
    assert np.array_equal(model.predict(obs, deterministic=True)[0], before)
    assert th.equal(model.policy.predict_values(tensors(obs)), values)
    found = model.policy.world_model.task_embeddings()
    assert th.allclose(found[:2], embeddings) and th.allclose(found[2], embeddings.mean(0), atol=1e-6)
    found = model.policy.mean.world_model.task_embeddings()
    assert not th.equal(found[:2], embeddings) and th.allclose(found[2], found[:2].mean(0), atol=1e-6)
    assert np.isfinite(model.predict(rows([2]))[0]).all()
    steps = model.policy.optimizer.state_dict()["state"][0]["step"]
    assert steps == model._n_updates > 0


def test_observations_of_a_new_task_are_normalised_as_where_they_are_known() -> None:
    """Of three entries the known tasks have one and two: what rests at 0 in all of them is not blown up."""
    norm = RunningNorm((3,), n_tasks=2)
    known = np.random.default_rng(0).normal([3.0, -5.0, 0.0], [2.0, 4.0, 0.0], (1_000, 3))
    norm.update(known, np.arange(1_000) % 2)
    norm.update(np.zeros((5, 3)), np.zeros(5, int))
    norm.freeze()
    shift, scale = norm.mean_over_tasks()
    np.testing.assert_allclose(shift, [3.0, -5.0, 0.0], atol=0.5)
    np.testing.assert_allclose(scale, [2.0, 4.0, 1.0], atol=0.3)
    norm.scale[0, 1], norm.shift[0, 1] = 0.01, 0.0
    shift, scale = norm.mean_over_tasks()
    assert shift[1] == norm.shift[1, 1] and scale[1] == norm.scale[1, 1]


def test_a_grown_model_begins_with_these_statistics() -> None:
    model = trained()
    norm = model.policy.norms["observation"]
    assert isinstance(norm, RunningNorm)
    expected = norm.mean_over_tasks()
    model.add_tasks(grown_env("new"))
    norm = model.policy.norms["observation"]
    assert isinstance(norm, RunningNorm)
    for found, part in zip((norm.shift, norm.scale), expected, strict=True):
        assert th.equal(found[2], part)
    # The third entry is that of "large" alone
    assert norm.scale[0, 2] == norm.min_std and norm.scale[2, 2] == norm.scale[1, 2] > norm.min_std


def test_the_embedding_of_a_new_task_does_not_leap() -> None:
    """Its moments are new where all count many steps: its first steps must not be longer than the known ones'."""
    model = trained()
    embedding = model.policy.world_model.task_embedding
    state = model.policy.model_optimizer.state[embedding]
    state["exp_avg_sq"].fill_(1.0)
    state["step"].fill_(10_000)
    model.add_tasks(grown_env("new"))
    policy = model.policy
    optimizer, embedding = policy.model_optimizer, policy.world_model.task_embedding
    state = optimizer.state[embedding]
    assert (state["exp_avg_sq"] == 1).all() and (state["exp_avg"][2] == 0).all() and (state["exp_avg"][:2] != 0).any()
    for group in optimizer.param_groups:
        group["lr"], group["weight_decay"] = 1e-3, 0.0
    before = embedding[2].clone()
    for _ in range(10):
        embedding.grad = th.ones_like(embedding)
        optimizer.step()
    moved = before - embedding[2]
    assert (moved > 0).all() and (moved < 10 * 1e-3).all()


@pytest.mark.parametrize("names", [("new",), ("new", "small", "large", "new")], ids=len)
def test_a_grown_model_goes_on(names: tuple[str, ...], tmp_path: Any) -> None:
    model = trained()
    updates = model._n_updates
    model.add_tasks(grown_env(*names))
    before = model.policy.world_model.task_embedding.clone()
    model.learn(64 * len(names), reset_num_timesteps=False)
    assert model._n_updates > updates
    assert (model.policy.lag_correlation != 0).all(), "measured of the new task, too"
    assert (model.policy.world_model.task_embedding[2] != before[2]).all()
    model.save(tmp_path / "grown")
    loaded = M3PO.load(tmp_path / "grown", env=grown_env(*names))
    obs = rows([0, 1, 2])
    assert np.array_equal(loaded.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0])
    for key, value in model.policy.state_dict().items():
        assert th.equal(value, loaded.policy.state_dict()[key]), key


def test_what_predicts_follows_a_grown_model_as_at_the_start() -> None:
    """A mean over the states of a long training would be of a policy that does not know the new task."""
    model = trained()
    model.policy.mean.n_averaged.fill_(1_000)
    model.add_tasks(grown_env("new"))
    now, mean = (list(part.world_model.actor.parameters()) for part in (model.policy, model.policy.mean))
    with th.no_grad():
        now[-1].add_(1.0)
    model.policy.average()
    assert th.equal(now[-1], mean[-1])


def test_a_grown_model_plans_as_it_did() -> None:
    model = trained()
    model.set_planning(16, 1)
    model.add_tasks(grown_env("new"))
    assert model.policy._planning is not None and model.policy._planning.n_samples == 16


def test_only_the_new_learns_if_told(tmp_path: Any) -> None:
    model = trained()
    model.add_tasks(grown_env("new"), train="new")
    before = {name: value.clone() for name, value in model.policy.named_parameters() if not name.startswith(("bar", "mean"))}
    model.learn(64, reset_num_timesteps=False)
    model.save(tmp_path / "model")
    model = M3PO.load(tmp_path / "model", env=grown_env("new"))
    model.learning_starts = 16
    model.learn(64, reset_num_timesteps=False)
    changed = {name for name, value in model.policy.named_parameters() if name in before and not th.equal(value, before[name])}
    assert changed == {
        *(f"world_model.{layer}.{part}" for layer in ("heads", "value_head", "actor.1") for part in ("weight", "bias")),
        *("world_model.critics.weights.1", "world_model.critics.biases.1", "world_model.task_embedding"),
        *("log_ent_coef", "log_kl_coef"),
    }
    assert th.equal(model.policy.world_model.task_embedding[:2], before["world_model.task_embedding"][:2])


@pytest.mark.parametrize(
    ("env", "train", "message"),
    [
        (two_targets, "all", "no new task"),
        (lambda: grown_env("new"), "some", "'all'"),
        (lambda: DummyVecEnv([lambda: Target(TaskTable([LARGE, SMALL, TaskSpec("new")]), "new")]), "all", "must begin with"),
        (lambda: DummyVecEnv([lambda: Target(GROWN, "new", action_space=spaces.Box(-1.0, 1.0, (5,)))]), "all", "widths"),
    ],
    ids=["known", "train", "order", "width"],
)
def test_tasks_that_do_not_fit_are_refused(env: Callable[[], VecEnv], train: str, message: str) -> None:
    model = tiny_model(two_targets(), "MultiInputPolicy")
    with pytest.raises(ValueError, match=message):
        model.add_tasks(env(), train=train)
    assert model.task_table == TABLE


def test_new_tasks_are_normalised_as_the_known_ones_or_refused(tmp_path: Any) -> None:
    def normalised(env: VecEnv) -> VecNormalize:
        return VecNormalize(env, norm_reward=False, norm_obs_keys=["observation"])

    model = tiny_model(normalised(two_targets()), "MultiInputPolicy")
    with pytest.raises(ValueError, match=r"both be in a VecNormalize, or none.*VecNormalize\.load\(path, env\)"):
        model.add_tasks(grown_env("new"))
    assert model.task_table == TABLE
    with pytest.raises(ValueError, match="both be in a VecNormalize, or none"):
        tiny_model(two_targets(), "MultiInputPolicy").add_tasks(normalised(grown_env("new")))
    # Where the model has no environments nothing is known of them
    model.save(tmp_path / "model")
    for grown in (model, M3PO.load(tmp_path / "model")):
        grown.add_tasks(normalised(grown_env("new")))
        assert grown.task_table == GROWN


def test_tasks_of_too_many_environments_leave_the_model_as_it_was() -> None:
    model = tiny_model(two_targets(), "MultiInputPolicy", buffer_size=12)
    before = {name: value for name, value in vars(model).items()}
    with pytest.raises(ValueError, match=r"fit into the memory's 2 steps"):
        model.add_tasks(grown_env(*["new"] * 6))
    assert all(value is before[name] for name, value in vars(model).items())
    model.learn(32)


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (lambda: grown_env("new"), r"does not know the tasks new: .*add_tasks\(env\)"),
        (lambda: two_targets(table=TaskTable([LARGE, SMALL])), r"tasks \(large, small\) are not the model's .*like=model"),
        (lambda: two_targets(table=TaskTable([SMALL, replace(LARGE, gamma=0.5)])), "gamma=0.5.* the model's .*gamma=None"),
        (lambda: two_targets(spaces.Box(-1.0, 1.0, (5,))), r"wider or narrower than the model: .*like=model"),
        (lambda: randoms(), "^Observation spaces do not match"),
    ],
    ids=["new", "order", "discount", "width", "no tasks"],
)
def test_environments_that_do_not_fit_are_explained(env: Callable[[], VecEnv], message: str, tmp_path: Any) -> None:
    model = tiny_model(two_targets(), "MultiInputPolicy")
    model.save(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        M3PO.load(tmp_path / "model", env=env())
    if env().num_envs == model.n_envs:
        with pytest.raises(ValueError, match=message):
            model.set_env(env())


def test_a_single_task_does_not_grow() -> None:
    model = tiny_model(DummyVecEnv([lambda: Target(TaskTable([LARGE]), "large")]), "MultiInputPolicy")
    with pytest.raises(ValueError, match="single task"):
        model.add_tasks(grown_env("new"))


def test_long_names_are_logged(capsys: Any) -> None:
    names = ["button-press-topdown-wall-v3", "button-press-topdown-wall-v4"]
    table = TaskTable([TaskSpec(name, 4, 3) for name in names])
    env = DummyVecEnv([lambda name=name: Monitor(Target(table, name)) for name in names])  # type: ignore[misc]
    tiny_model(env, "MultiInputPolicy", verbose=1).learn(64)
    printed = capsys.readouterr().out
    assert all(f"   {name}/{what} " in printed for name in names for what in ("ep_rew_mean", "ep_len_mean", "return_scale"))
