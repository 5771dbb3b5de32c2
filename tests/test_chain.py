"""Tasks so small that values and bonuses are known: what the critics learn, and the bonus, are compared with them."""

from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_m3po import M3PO
from sb3_m3po.learner import Learner, Prepared
from sb3_m3po.losses import ModelTargets, n_step_return, world_model_loss
from sb3_m3po.math import decode
from sb3_m3po.world_model import WorldModel
from tests.helpers import randoms, tiny_model

GAMMA = 0.9
ACTIONS: dict[str, spaces.Space] = {
    "discrete": spaces.Discrete(2),
    "box": spaces.Box(-1.0, 1.0, (1,), np.float32),
    "large multi-binary": spaces.MultiBinary(5),
}
#: Steps of collection, of two updates each
STEPS = 192


class Chain(gym.Env):
    """
    Two states, one after the other, whatever is done; the observation is the state's one-hot.

    :param rewards: Of the step from the first state, and of that from the second
    :param terminates: Whether the second step terminates; if not, the second state leads back to the first
    :param limit: Steps after which an episode is truncated
    :param coin: Whether rewards are nothing or twice as much, as a coin says: of two in a row that count, each shows once
    :param action_space: Action space
    """

    def __init__(
        self,
        rewards: tuple[float, float],
        terminates: bool = True,
        limit: int = 1_000,
        coin: bool = False,
        action_space: spaces.Space | None = None,
    ):
        self.observation_space = spaces.Box(0.0, 1.0, (2,), np.float32)
        self.action_space = ACTIONS["discrete"] if action_space is None else action_space
        self.rewards, self.terminates, self.limit, self.coin = rewards, terminates, limit, coin
        self.state = self.t = 0
        self.coins: list[list[int]] = [[], []]

    def _toss(self) -> int:
        """:return: 0 or 2; as often, lest what is learned depends on the luck of a few hundred tosses"""
        coins = self.coins[self.state]
        if not coins:
            coins += self.np_random.permutation([0, 2]).tolist()
        return coins.pop()

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.state = self.t = 0
        return STATES[0].copy(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = self.rewards[self.state] * (self._toss() if self.coin else 1)
        terminated = self.terminates and self.state == 1
        self.state = 1 - self.state
        self.t += 1
        return STATES[self.state].copy(), float(reward), terminated, self.t >= self.limit, {}


STATES = np.eye(2, dtype=np.float32)


def learn(env: gym.Env, total_timesteps: int = STEPS, **changes: Any) -> M3PO:
    """:return: A model that has learned for a few hundred updates"""
    policy_kwargs = dict(latent_dim=32, encoder_arch=[32], model_arch=[64], net_arch=dict(pi=[32], vf=[32]), n_critics=2)
    kwargs: dict[str, Any] = dict(
        gamma=GAMMA,
        n_steps=16,
        utd_ratio=2.0,
        batch_size=64,
        sync_interval=16,
        learning_starts=32,
        horizon=1,
        # Falling: the last updates average
        learning_rate=lambda progress: 1e-2 * progress,
        policy_kwargs=policy_kwargs,
    )
    return tiny_model(env, **{**kwargs, **changes}).learn(total_timesteps)


def values(model: M3PO) -> list[float]:
    """:return: The critics' values of both states, in reward units"""
    with th.no_grad():
        return model.policy.predict_values(th.as_tensor(STATES)).flatten().tolist()


def model_values(model: M3PO) -> list[float]:
    """:return: The world model's own values of both states, in reward units"""
    policy = model.policy
    with th.no_grad():
        return (policy.return_scale * policy.world_model.value(policy.encode(th.as_tensor(STATES)))).tolist()


every_kind = pytest.mark.parametrize("action_space", ACTIONS.values(), ids=ACTIONS)


# ---------------------------------------------------------------------- values


@every_kind
def test_values_before_a_termination(action_space: spaces.Space) -> None:
    model = learn(Chain((1.0, 2.0), action_space=action_space))
    assert values(model) == pytest.approx([1 + GAMMA * 2, 2], rel=0.02)


@pytest.mark.parametrize("name", ["discrete", "box"])
def test_values_of_an_endless_chain_with_a_time_limit(name: str) -> None:
    # Were the time limit taken for a termination, the values would be 0.2 less at the least
    gamma, env = 0.7, Chain((1.0, 0.0), terminates=False, limit=5, action_space=ACTIONS[name])
    first = 1 / (1 - gamma**2)
    assert values(learn(env, gamma=gamma)) == pytest.approx([first, gamma * first], rel=0.02)


def test_values_of_costs() -> None:
    assert values(learn(Chain((-1.0, -200.0)))) == pytest.approx([-1 - GAMMA * 200, -200], rel=0.02)


@pytest.mark.parametrize(
    ("name", "gamma"), [("discrete", 0.0), ("discrete", GAMMA), ("box", GAMMA), ("large multi-binary", 0.0)]
)
def test_fair_coin_of_0_or_20_is_valued_at_10(name: str, gamma: float) -> None:
    # Many tosses for each action: a few can be learned by heart, and a planner would go on with what was lucky
    env = Chain((10.0, 10.0), coin=True, action_space=ACTIONS[name])
    model = learn(env, 2_000, gamma=gamma, utd_ratio=0.16, n_steps=100, plan_rollouts=False)
    # Over seeds they scatter by 3 % of that; on a scale that is not linear they would be off by half
    assert values(model) == pytest.approx([10 + gamma * 10, 10], rel=0.1)


def test_values_of_the_model_are_those_of_the_critics() -> None:
    model = learn(Chain((1.0, 2.0)), horizon=3)
    assert model_values(model) == pytest.approx([1 + GAMMA * 2, 2], rel=0.05)


def test_values_from_single_steps() -> None:
    model = learn(Chain((1.0, 2.0)), n_step_returns=1)
    assert values(model) == pytest.approx([1 + GAMMA * 2, 2], rel=0.02)


def test_bonus_fades_where_the_critics_are_right() -> None:
    model = learn(Chain((1.0, 2.0)), bonus_coef=0.5)
    assert values(model) == pytest.approx([1 + GAMMA * 2, 2], rel=0.02)


# ----------------------------------------------------------------------- bonus


SAMPLES = 80


class Setup:
    """
    A learner on a small memory whose networks say something, and one batch of phase B.

    :param action_space: Action space
    """

    def __init__(self, action_space: spaces.Space):
        with th.enable_grad():
            model = tiny_model(randoms(action_space=action_space)).learn(48)
        self.policy, self.learner = model.policy, Learner.of(model)
        generator = th.Generator().manual_seed(0)
        with th.no_grad():
            for network in (self.policy.world_model, self.policy.bar):
                for parameter in network.parameters():
                    parameter.add_(0.3 * th.randn(parameter.shape, generator=generator))
            self.policy.bar_scale.fill_(2.0)
            self.policy.return_scale.fill_(4.0)
        self.learner.bonus_coef = 0.5
        _, _, self.batch, self.frozen = self.learner.draw(SAMPLES // self.learner.batch_size)

    def observations(self, states: np.ndarray) -> th.Tensor:
        return th.as_tensor(self.learner.memory.observations_at(states))

    def gap(self) -> th.Tensor:
        """:return: By the model's verbs, in scaled units"""
        policy, batch, model = self.policy, self.batch, self.policy.world_model
        raw = batch.rewards[0] * policy.return_scale
        free = raw / 4.0 + self.learner.gamma * (1 - batch.terminated[0]) * self.next_values()
        z = policy.encode(self.observations(batch.states[0]))
        next_z, reward, termination = model.step(z, batch.actions[0])
        return (free - (reward + self.learner.gamma * (1 - termination) * model.value(next_z))).abs()

    def prepare(self) -> Prepared:
        return self.learner._prepare(self.batch, self.frozen)

    def next_values(self) -> th.Tensor:
        """:return: What the frozen critics say of the next observations: in half as large units"""
        return self.frozen.value[self.frozen.rows(self.batch.states[1])]


@pytest.fixture(params=list(ACTIONS.values()), ids=list(ACTIONS))
def setup(request: pytest.FixtureRequest) -> Setup:
    return Setup(request.param)


@th.no_grad()
def test_gap_by_hand(setup: Setup) -> None:
    prepared = setup.prepare()
    assert setup.batch.terminated[0].sum() > 0
    assert prepared.gap.std() > 0.01
    assert th.allclose(prepared.gap, setup.gap(), atol=1e-5)


@th.no_grad()
def test_model_free_value_by_hand() -> None:
    # Enumerable actions: the expectation needs no sample
    setup = Setup(ACTIONS["discrete"])
    policy, bar = setup.policy, setup.policy.bar
    z = policy.encode_bar(setup.observations(setup.batch.states[1]))
    expected = (bar.prior(z).exp() * bar.action_values(z).amin(0)).sum(-1) * 2.0 / 4.0
    assert expected.std() > 1e-3
    assert th.allclose(setup.next_values(), expected, atol=1e-5)


@th.no_grad()
def test_median_of_the_gap_runs(setup: Setup) -> None:
    before = setup.policy.gap_median.item()
    prepared = setup.prepare()
    expected = before + 0.3 * (prepared.gap.median().item() - before)
    assert setup.policy.gap_median.item() == pytest.approx(expected, rel=1e-5)


@th.no_grad()
def test_bonus_by_hand(setup: Setup) -> None:
    prepared = setup.prepare()
    model, median = setup.policy.world_model, setup.policy.gap_median
    _, logged = setup.learner._critic_loss(prepared)
    if model.codec.enumerable:
        chosen = setup.batch.actions[0].argmax(-1)
        q = model.action_values(prepared.z)[:, th.arange(SAMPLES), chosen].mean(0)
    else:
        q = model.action_values(prepared.z, setup.batch.actions[0]).mean(0)
    error = (prepared.target - q).abs()
    expected = 0.5 * th.minimum(th.maximum(setup.gap() - median, -error), error)
    assert 0 < (expected.abs() < 0.499 * error).float().mean() < 1
    assert logged["bonus_abs"].item() == pytest.approx(expected.abs().mean().item(), rel=1e-4)
    assert logged["gap"].item() == pytest.approx(setup.gap().mean().item(), rel=1e-4)
    assert logged["bonus_coef"].item() == 0.5


def test_bonus_moves_the_target(setup: Setup) -> None:
    """The gradient of the critics' loss vanishes where their outputs are the target with its bonus, and only there."""
    learner, policy = setup.learner, setup.policy
    prepared = setup.prepare()
    with_bonus, logged = learner._critic_loss(prepared)
    learner.bonus_coef = 0.0
    without, nothing = learner._critic_loss(prepared)
    assert nothing == {} and logged["bonus_abs"] > 0
    critics = list(policy.world_model.critics.parameters())
    gradients = (th.autograd.grad(loss, critics) for loss in (with_bonus, without))
    assert any(not th.equal(a, b) for a, b in zip(*gradients, strict=True))


@th.no_grad()
def test_frozen_values_are_evaluated_where_they_are_read() -> None:
    learner = Setup(ACTIONS["box"]).learner
    learner.bonus_coef = 0.0
    model_batch, value_steps, policy_batch, frozen = learner.draw(n_updates=40)
    assert set(value_steps) == {0, 1, 2, 3}
    for update, step in enumerate(value_steps):
        columns = slice(update * learner.batch_size, (update + 1) * learner.batch_size)
        assert frozen.value[frozen.rows(model_batch.states[step, columns])].isfinite().all()
    anchors = frozen.anchor[frozen.rows(policy_batch.states[0])]
    assert anchors.isfinite().all()
    z = learner.policy.encode_bar(th.as_tensor(learner.memory.observations_at(policy_batch.states[0])))
    assert th.allclose(anchors, learner.policy.bar.prior(z), atol=1e-6)
    assert th.equal(th.as_tensor(frozen.states[frozen.rows(model_batch.states[1:])]), th.as_tensor(model_batch.states[1:]))


def test_the_model_fits_the_value_of_the_step_that_was_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = Setup(ACTIONS["box"]).learner
    batch, value_steps, _, frozen = learner.draw(n_updates=40)
    seen: list[ModelTargets] = []

    def recorded(model: WorldModel, z: th.Tensor, actions: th.Tensor, targets: ModelTargets) -> Any:
        seen.append(targets)
        return world_model_loss(model, z, actions, targets)

    monkeypatch.setattr("sb3_m3po.learner.world_model_loss", recorded)
    learner.fit_world_model(batch, value_steps, frozen)
    assert [targets.value_step for targets in seen] == value_steps.tolist()
    for i, (targets, step) in enumerate(zip(seen, value_steps, strict=True)):
        states = batch.states[step, i * learner.batch_size : (i + 1) * learner.batch_size]
        values = targets.values @ learner.policy.world_model.bins
        assert th.allclose(values, frozen.value[frozen.rows(states)], atol=1e-4)
        assert values.std() > 1e-3


@th.no_grad()
def test_targets_of_values_by_hand(setup: Setup) -> None:
    prepared, batch = setup.prepare(), setup.batch
    gamma, expected, values = setup.learner.gamma, [], setup.frozen.value[setup.frozen.rows(batch.states)]
    for i in range(SAMPLES):
        total, discount, bootstrap = 0.0, 1.0, 1.0
        for t in range(3):
            total += discount * batch.rewards[t, i].item()
            discount *= gamma
            bootstrap = 1 - batch.terminated[t, i].item()
            if batch.terminated[t, i] or batch.truncated[t, i]:
                break
        expected.append(total + discount * bootstrap * values[t + 1, i].item())
    assert len({round(x, 3) for x in expected}) > 10
    assert prepared.target.tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("scale", "refreshes"), [(4.0, [256]), (4.1, [])])
def test_in_a_much_larger_unit_all_targets_come_from_the_frozen_copies(
    scale: float, refreshes: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # The frozen copies are in units of 2
    learner, refreshed, made = Setup(ACTIONS["box"]).learner, [], []
    learner.policy.return_scale.fill_(scale)
    prepare, refresh = Learner._prepare, Learner._refresh_targets

    def preparing(*args: Any) -> Prepared:
        made.append(prepare(*args))
        return made[-1]

    def refreshing(learner: Learner, prepared: Prepared, batch: Any, start: int) -> None:
        refreshed.append(start)
        refresh(learner, prepared, batch, start)

    monkeypatch.setattr(Learner, "_prepare", preparing)
    monkeypatch.setattr(Learner, "_refresh_targets", refreshing)
    _, _, batch, frozen = learner.draw(n_updates=40)
    learner.improve_policy(batch, frozen)
    assert refreshed == refreshes and made[0].target.isfinite().all()


@pytest.mark.parametrize(("delay", "n_updates", "delayed"), [(1, 6, 6), (2, 6, 3), (2, 5, 3), (2, 1, 1)])
def test_policy_is_updated_as_often_as_told(delay: int, n_updates: int, delayed: int) -> None:
    setup = Setup(ACTIONS["box"])
    setup.learner.policy_delay, policy = delay, setup.policy

    def steps(optimizer: th.optim.Optimizer, parameter: th.Tensor) -> int:
        return int(optimizer.state.get(parameter, {"step": 0})["step"])

    model = policy.world_model
    learned = (
        (policy.optimizer, model.critics.weights[0]),
        (policy.optimizer, model.actor[-1].weight),
        (policy.model_optimizer, model.heads.weight),
        (policy.coef_optimizer, policy.log_kl_coef),
    )
    before = [steps(*one) for one in learned]
    setup.learner.run(n_updates)
    taken = [steps(*one) - old for one, old in zip(learned, before, strict=True)]
    assert taken == [n_updates, delayed, n_updates, delay * delayed]


def test_policy_is_delayed_after_the_first_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    delays, of = [], Learner.of

    def recorded(model: Any) -> Learner:
        delays.append(of(model).policy_delay)
        return of(model)

    monkeypatch.setattr("sb3_m3po.learner.DELAYED_AFTER", 16)
    monkeypatch.setattr(Learner, "of", recorded)
    tiny_model(randoms(action_space=ACTIONS["box"]), sync_interval=8).learn(64)
    assert delays[:4] == [1, 1, 2, 2]


@th.no_grad()
def test_refreshed_targets_bootstrap_from_the_critics_as_they_are() -> None:
    setup = Setup(ACTIONS["discrete"])
    learner, policy, batch = setup.learner, setup.policy, setup.batch
    prepared = setup.prepare()
    old = prepared.target.clone()
    n_step = n_step_return(batch.rewards, batch.terminated, batch.truncated, learner.gamma)
    learner._refresh_targets(prepared, batch, 8)
    states = batch.states[n_step.steps.numpy(), np.arange(SAMPLES)]
    expected = n_step.rewards + n_step.discount * policy.world_model.policy_value(policy.encode(setup.observations(states)))
    assert th.equal(prepared.target[:8], old[:8])
    assert th.allclose(prepared.target[8:], expected[8:], atol=1e-5)
    assert not th.allclose(prepared.target[8:], old[8:], atol=1e-3)


def test_logits_of_the_chosen_actions_are_trained(setup: Setup) -> None:
    learner, model = setup.learner, setup.policy.world_model
    learner.bonus_coef = 0.0
    prepared = setup.prepare()
    optimizer = th.optim.Adam(model.critics.parameters(), lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        learner._critic_loss(prepared)[0].backward()
        optimizer.step()
    with th.no_grad():
        if model.codec.enumerable:
            q = model.action_values(prepared.z)[:, th.arange(SAMPLES), setup.batch.actions[0].argmax(-1)]
        else:
            q = decode(model.critic_logits(prepared.f), model.bins)
    assert (q - prepared.target).abs().mean() < 0.3 * prepared.target.std()
