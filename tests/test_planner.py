"""The planner on hand-written models whose optimum is known."""

import dataclasses
import math
import time
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch.distributions import Independent, Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform

from sb3_m3po.actions import ActionCodec, CategoricalActions, GaussianActions
from sb3_m3po.masked_actions import make_action_codec
from sb3_m3po.planner import CategoricalPlan, GaussianPlan, Plan, PlannerConfig, _imagine, plan

HORIZON, DRAWS, GAMMA = 3, 100, 0.9
BOX = spaces.Box(-1.0, 1.0, (2,), np.float32)


def noise_of(codec: ActionCodec, batch: int = DRAWS, seed: int = 0) -> Any:
    generator = th.Generator().manual_seed(seed)
    return lambda horizon, n: codec.noise((horizon, batch, n), generator)


class Model:
    """
    A deterministic model whose state counts the steps: rewards, terminations and the last value are what a test says.

    :param prior: Parameters of the policy, everywhere
    """

    def __init__(self, prior: th.Tensor):
        self._prior = prior

    def start(self, batch: int = DRAWS) -> th.Tensor:
        """:return: Step and memory, shape ``(batch, 2)``"""
        return th.tensor([[0.0, 1.0]]).repeat(batch, 1)

    def remember(self, step: th.Tensor, memory: th.Tensor, a: th.Tensor) -> th.Tensor:
        """:return: What the next state remembers"""
        return memory

    def reward(self, step: th.Tensor, memory: th.Tensor, a: th.Tensor) -> th.Tensor:
        """:param memory: With this action"""
        return th.zeros_like(step)

    def termination(self, step: th.Tensor, a: th.Tensor) -> th.Tensor:
        return th.zeros_like(step)

    def step(self, z: th.Tensor, a: th.Tensor) -> tuple[th.Tensor, th.Tensor, th.Tensor]:
        step, memory = z.unbind(-1)
        memory = self.remember(step, memory, a)
        return th.stack([step + 1, memory], -1), self.reward(step, memory, a), self.termination(step, a)

    def prior(self, z: th.Tensor) -> th.Tensor:
        return self._prior.expand(len(z), -1)

    def terminal_value(self, z: th.Tensor) -> th.Tensor:
        return th.zeros(len(z))


class Vault(Model):
    """
    Three right actions in a row open it: 10, in the third step. The decoy pays 1 at once, in every step.

    How right an action is counts by factor (discrete kinds) or by distance (Box), and the three are multiplied.

    :param code: The right actions as model inputs, shape ``(3, input_dim)``
    :param decoy: Model input, shape ``(input_dim,)``
    :param n_factors: Factors of a discrete kind
    """

    def __init__(self, codec: ActionCodec, code: th.Tensor, decoy: th.Tensor):
        # Uniform logits, or the initial policy's Gaussian: mean 0, standard deviation 1
        super().__init__(codec.parameters_from(th.zeros(1, codec.params_dim)))
        self.codec, self.code, self.decoy = codec, code, decoy

    def _closeness(self, a: th.Tensor, to: th.Tensor) -> th.Tensor:
        if isinstance(self.codec, CategoricalActions):
            return (a * to).sum(-1) / self.codec.n_factors
        return (1 - (a - to).square().mean(-1)).clamp_min(0)

    def remember(self, step: th.Tensor, memory: th.Tensor, a: th.Tensor) -> th.Tensor:
        return memory * self._closeness(a, self.code[step.long()])

    def reward(self, step: th.Tensor, memory: th.Tensor, a: th.Tensor) -> th.Tensor:
        is_decoy = self._closeness(a, self.decoy)
        is_decoy = (is_decoy > 0.99).float() if isinstance(self.codec, CategoricalActions) else is_decoy
        return th.where(step == HORIZON - 1, 10 * memory, th.zeros_like(memory)) + is_decoy


def vault(space: spaces.Space) -> Vault:
    """:return: A vault whose code and decoy are different in every factor, and different in every step"""
    codec = make_action_codec(space)
    if not isinstance(codec, CategoricalActions):
        return Vault(codec, th.tensor([[0.6, -0.4], [-0.5, 0.5], [0.3, 0.7]]), th.tensor([-0.6, 0.6]))
    nvec = codec.uniform.count_nonzero(-1)
    base = th.arange(codec.n_factors)
    code = codec._one_hot(th.stack([(base + shift) % nvec for shift in (1, 0, 1)]))
    return Vault(codec, code, codec._one_hot(base % nvec))


KINDS: dict[str, tuple[spaces.Space, int, int]] = {
    "Box": (BOX, 256, 3),
    "Discrete": (spaces.Discrete(4), 256, 2),
    "Discrete from 3": (spaces.Discrete(4, start=3), 256, 2),
    "MultiDiscrete": (spaces.MultiDiscrete([3, 4]), 256, 3),
    "MultiBinary": (spaces.MultiBinary(3), 256, 3),
    "large MultiDiscrete": (spaces.MultiDiscrete([3, 4, 5]), 256, 3),
    "large MultiBinary": (spaces.MultiBinary(6), 256, 3),
}
every_kind = pytest.mark.parametrize(("space", "n_samples", "n_iterations"), KINDS.values(), ids=KINDS)


def share_near(actions: th.Tensor, target: th.Tensor) -> float:
    """:return: How many of the actions are the target: the same, or (Box) nearer than 0.25 in every dimension"""
    return ((actions - target).abs().amax(-1) < 0.25).float().mean().item()


def open_vault(model: Vault, horizon: int, n_samples: int, n_iterations: int) -> th.Tensor:
    """:return: The planner's choice in each draw of the noise"""
    config = PlannerConfig(n_samples=n_samples, horizon=horizon, n_iterations=n_iterations)
    return plan(model, model.codec, model.start(), GAMMA, config, noise_of(model.codec)).mode()


@every_kind
def test_optimum_that_takes_three_steps_of_looking_ahead(space: spaces.Space, n_samples: int, n_iterations: int) -> None:
    model = vault(space)
    found = open_vault(model, 3, n_samples, n_iterations)
    assert share_near(found, model.code[0]) >= 0.95


@every_kind
@pytest.mark.parametrize("horizon", [1, 2])
def test_decoy_is_what_less_looking_ahead_finds(space: spaces.Space, n_samples: int, n_iterations: int, horizon: int) -> None:
    model = vault(space)
    found = open_vault(model, horizon, n_samples, n_iterations)
    assert share_near(found, model.decoy) >= 0.95
    assert share_near(found, model.code[0]) == 0


@every_kind
def test_sampled_actions_are_good_too(space: spaces.Space, n_samples: int, n_iterations: int) -> None:
    model = vault(space)
    config = PlannerConfig(n_samples=n_samples, n_iterations=n_iterations)
    planned = plan(model, model.codec, model.start(), GAMMA, config, noise_of(model.codec))
    actions, _ = planned.sample(seeded(model.codec, len(planned.gain)))
    prior, _ = model.codec.sample(model.prior(actions), noise_of(model.codec)(1, 1).squeeze((0, 2)))
    values = [model._closeness(a, model.code[0]).mean() for a in (actions, prior)]
    assert values[0] > values[1] + 0.1
    assert (planned.gain > 0).all() and (planned.kl > 0).all()


# ---------------------------------------------------------------- equal scores


def plan_blindly(space: spaces.Space, prior: th.Tensor, n_samples: int = 2_048, n_iterations: int = 1) -> Plan:
    codec = make_action_codec(space)
    model = Model(prior)
    config = PlannerConfig(n_samples=n_samples, n_iterations=n_iterations)
    return plan(model, codec, model.start(20), GAMMA, config, noise_of(codec, 20))


@pytest.mark.parametrize("space", [spaces.Discrete(5), spaces.MultiDiscrete([2, 3]), spaces.MultiBinary(3)], ids=str)
@pytest.mark.parametrize("n_iterations", [1, 2])
def test_equal_scores_leave_discrete_plans_at_the_policy(space: spaces.Space, n_iterations: int) -> None:
    codec = make_action_codec(space)
    assert isinstance(codec, CategoricalActions)
    prior = codec.parameters_from(th.randn(1, codec.params_dim, generator=th.Generator().manual_seed(0)))
    planned = plan_blindly(space, prior, 256, n_iterations)
    assert isinstance(planned, CategoricalPlan)
    joint = (planned.candidates @ codec.joint_inputs.T == codec.n_factors).float()
    probabilities = (planned.weights.unsqueeze(-1) * joint).sum(1)
    assert th.allclose(probabilities, codec.joint_log_prob(prior).exp().expand(20, -1), atol=1e-4)
    assert planned.kl.abs().max() < 1e-4 and planned.gain.abs().max() < 1e-6
    assert th.equal(planned.mode(), codec.mode(prior).expand(20, -1))


@pytest.mark.parametrize("std", [0.2, 0.5, 1.2])
def test_equal_scores_leave_gaussian_plans_at_the_proposal(std: float) -> None:
    mean = th.tensor([0.4, -0.3])
    prior = th.cat([mean, th.full((2,), math.log(std))]).unsqueeze(0)
    planned = plan_blindly(BOX, prior)
    assert isinstance(planned, GaussianPlan)
    proposed = math.sqrt(0.5 * std**2 + 0.5 * max(std, 0.5) ** 2)
    planned_mean, log_std = planned.codec.gaussian(planned.params)
    assert th.allclose(planned_mean, mean.expand(20, 2), atol=0.15)
    assert th.allclose(log_std.exp(), th.full((20, 2), proposed), rtol=0.1)
    assert planned.gain.abs().max() < 1e-6


def test_standard_deviation_of_a_plan_has_a_floor() -> None:
    codec = make_action_codec(BOX)
    model = vault(BOX)
    config = PlannerConfig(n_samples=64, n_iterations=4, n_effective=1, min_std=0.3)
    planned = plan(model, codec, model.start(5), GAMMA, config, noise_of(codec, 5))
    assert isinstance(planned, GaussianPlan)
    assert th.allclose(planned.codec.gaussian(planned.params)[1].exp().min(), th.tensor(0.3), atol=1e-3)


# ------------------------------------------------------------------- densities


def many(planned: CategoricalPlan, n: int) -> CategoricalPlan:
    """:return: A plan's first row, ``n`` times"""
    first = (x[:1].expand(n, *x.shape[1:]) for x in (planned.candidates, planned.weights, planned.log_prior, planned.same))
    return CategoricalPlan(planned.gain, planned.prior, planned.codec, *first)


def seeded(codec: ActionCodec, n: int) -> th.Tensor:
    """:return: Noise for one sample of each of ``n`` rows"""
    return codec.noise((n,), th.Generator().manual_seed(0))


@pytest.mark.parametrize("space", [spaces.Discrete(4), spaces.MultiDiscrete([3, 4, 5])], ids=str)
def test_discrete_samples_have_the_density_that_they_say(space: spaces.Space) -> None:
    model = vault(space)
    config = PlannerConfig(n_samples=16, n_effective=8)
    planned = plan(model, model.codec, model.start(1), GAMMA, config, noise_of(model.codec, 1))
    assert isinstance(planned, CategoricalPlan)
    inputs, log_prob = many(planned, 20_000).sample(seeded(model.codec, 20_000))
    actions, inverse, count = inputs.unique(dim=0, return_inverse=True, return_counts=True)
    said = th.zeros(len(actions)).scatter_(0, inverse, log_prob.exp())
    assert 1 < len(actions) <= 16
    assert th.equal(said[inverse], log_prob.exp())
    assert th.allclose(count / 20_000, said, atol=0.015)
    assert said.sum().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("space", [spaces.Discrete(4), spaces.MultiDiscrete([3, 4, 5])], ids=str)
def test_discrete_samples_are_the_same_in_whatever_order_the_candidates_came(space: spaces.Space) -> None:
    # Or noise that remembers would be forgotten: candidates are drawn anew at each step
    model = vault(space)
    config = PlannerConfig(n_samples=16, n_effective=8)
    planned = plan(model, model.codec, model.start(50), GAMMA, config, noise_of(model.codec, 50))
    assert isinstance(planned, CategoricalPlan)
    noise, order = seeded(model.codec, 50), th.randperm(16, generator=th.Generator().manual_seed(1))
    actions, log_prob = planned.sample(noise)
    shuffled = dataclasses.replace(planned, candidates=planned.candidates[:, order], weights=planned.weights[:, order])
    assert th.equal(shuffled.sample(noise)[0], actions)
    assert th.allclose(shuffled.sample(noise)[1], log_prob, atol=1e-5)
    assert len(actions.unique(dim=0)) > 1


def gaussian_plan() -> GaussianPlan:
    codec = make_action_codec(BOX)
    assert isinstance(codec, GaussianActions)
    params = th.tensor([[0.3, -1.0, -1.0, 0.2]]).repeat(1_000, 1)
    return GaussianPlan(th.zeros(1_000), params, codec, params)


def test_gaussian_samples_have_the_density_that_they_say() -> None:
    planned = gaussian_plan()
    actions, log_prob = planned.sample(seeded(planned.codec, 1_000))
    mean, log_std = planned.codec.gaussian(planned.params.double())
    normal = Normal(mean, log_std.exp())
    expected = TransformedDistribution(Independent(normal, 1), TanhTransform()).log_prob(actions.double())
    assert th.allclose(log_prob.double(), expected, atol=1e-2)
    u = th.atanh(actions)
    assert u.mean(0).tolist() == pytest.approx([0.3, -1.0], abs=0.1)
    assert u.std(0).tolist() == pytest.approx([math.exp(-1.0), math.exp(0.2)], rel=0.1)


def test_gaussian_mode_is_the_squashed_mean() -> None:
    assert th.equal(gaussian_plan().mode()[0], th.tanh(th.tensor([0.3, -1.0])))


def test_divergence_from_the_policy_is_logged_right() -> None:
    model = vault(BOX)
    planned = plan(model, model.codec, model.start(5), GAMMA, PlannerConfig(), noise_of(model.codec, 5))
    assert isinstance(planned, GaussianPlan)
    mean, log_std = model.prior(th.zeros(5)).chunk(2, -1)
    planned_mean, planned_log_std = planned.codec.gaussian(planned.params)
    expected = kl_divergence(Normal(planned_mean, planned_log_std.exp()), Normal(mean, log_std.exp())).sum(-1)
    assert th.allclose(planned.kl, expected, atol=1e-5)


def test_discrete_plans_stay_near_the_policy() -> None:
    model = vault(spaces.Discrete(4))
    config = PlannerConfig(n_samples=64, n_effective=16)
    planned = plan(model, model.codec, model.start(), GAMMA, config, noise_of(model.codec))
    assert (planned.kl <= 0.5 * math.log(4) + 1e-4).all()  # half of what a single action would be worth


@pytest.mark.parametrize("space", [spaces.Discrete(18), spaces.MultiDiscrete([10, 10])], ids=str)
def test_divergence_of_a_discrete_plan_counts_actions_that_were_not_drawn(space: spaces.Space) -> None:
    model = vault(space)
    planned = plan(model, model.codec, model.start(3), GAMMA, PlannerConfig(), noise_of(model.codec, 3))
    assert isinstance(planned, CategoricalPlan)
    for row, kl in enumerate(planned.kl):
        probabilities: dict[tuple[float, ...], float] = {}
        for action, weight in zip(planned.candidates[row].tolist(), planned.weights[row].tolist(), strict=True):
            probabilities[tuple(action)] = probabilities.get(tuple(action), 0.0) + weight
        actions, p = th.tensor(list(probabilities)), th.tensor(list(probabilities.values()))
        expected = (p * (p.log() - planned.codec.log_prob(planned.prior[row : row + 1], actions))).sum()
        assert kl == pytest.approx(expected.item(), abs=1e-4)
        assert len(actions) < math.prod(getattr(space, "nvec", [18]))


# ---------------------------------------------------------------------- scores


class Payments(Model):
    """Rewards 1, 10, 100 in turn, then 1,000; each step terminates with a probability."""

    def __init__(self, prior: th.Tensor, probability: float):
        super().__init__(prior)
        self.probability = probability

    def reward(self, step: th.Tensor, memory: th.Tensor, a: th.Tensor) -> th.Tensor:
        return 10.0**step

    def termination(self, step: th.Tensor, a: th.Tensor) -> th.Tensor:
        return th.full_like(step, self.probability)

    def terminal_value(self, z: th.Tensor) -> th.Tensor:
        return th.full((len(z),), 1000.0)


@pytest.mark.parametrize(("probability", "going_on"), [(0.0, 0.9), (0.5, 0.45), (1.0, 0.0)])
def test_scores_by_hand(probability: float, going_on: float) -> None:
    codec = make_action_codec(spaces.Discrete(2))
    model = Payments(codec.parameters_from(th.zeros(1, 2)), probability)
    z = model.start(2)
    scores = _imagine(model, codec, z, model.prior(z), GAMMA, noise_of(codec, 2)(3, 4), None).scores
    expected = 1 + going_on * 10 + going_on**2 * 100 + going_on**3 * 1000
    assert th.allclose(scores, th.full((2, 4), expected))


class Cliff(Model):
    """Action 1 leads to 100 in every later step, action 0 pays 1 once. It may be that action 1 ends the episode."""

    def __init__(self, prior: th.Tensor, deadly: bool):
        super().__init__(prior)
        self.deadly = deadly

    def remember(self, step: th.Tensor, memory: th.Tensor, a: th.Tensor) -> th.Tensor:
        return th.where(step == 0, a[:, 1], memory)

    def reward(self, step: th.Tensor, memory: th.Tensor, a: th.Tensor) -> th.Tensor:
        return th.where(step == 0, 1 - memory, 100 * memory)

    def termination(self, step: th.Tensor, a: th.Tensor) -> th.Tensor:
        return self.deadly * (step == 0) * a[:, 1]

    def terminal_value(self, z: th.Tensor) -> th.Tensor:
        return 100 * z[:, 1]


@pytest.mark.parametrize("deadly", [False, True])
def test_nothing_is_earned_behind_a_termination(deadly: bool) -> None:
    codec = make_action_codec(spaces.Discrete(2))
    model = Cliff(codec.parameters_from(th.zeros(1, 2)), deadly)
    planned = plan(model, codec, model.start(), GAMMA, PlannerConfig(), noise_of(codec))
    assert (planned.mode().argmax(-1) == (0 if deadly else 1)).all()


def test_last_value_decides_where_rewards_do_not() -> None:
    codec = make_action_codec(spaces.Discrete(2))
    model = Cliff(codec.parameters_from(th.zeros(1, 2)), False)
    config = PlannerConfig(horizon=1)
    planned = plan(model, codec, model.start(), GAMMA, config, noise_of(codec))
    assert (planned.mode().argmax(-1) == 1).all()


# --------------------------------------------------------------- good manners


@every_kind
def test_rows_of_a_batch_do_not_know_each_other(space: spaces.Space, n_samples: int, n_iterations: int) -> None:
    model = vault(space)
    codec = model.codec
    config = PlannerConfig(n_samples=32, n_iterations=n_iterations)
    bank = [codec.noise((HORIZON, 4, 32), th.Generator().manual_seed(i)) for i in range(n_iterations)]

    def plan_rows(rows: slice) -> Plan:
        noise = iter(bank)
        return plan(model, codec, model.start(4)[rows], GAMMA, config, lambda *_: next(noise)[:, rows])

    together = plan_rows(slice(None))
    for i in range(4):
        alone = plan_rows(slice(i, i + 1))
        assert th.allclose(alone.mode(), together.mode()[i : i + 1], atol=1e-5)
        assert th.allclose(alone.gain, together.gain[i : i + 1], atol=1e-5)
        assert th.allclose(alone.kl, together.kl[i : i + 1], atol=1e-5)


def test_one_noise_serves_all_rows() -> None:
    model = vault(BOX)
    noise = noise_of(model.codec, 1)(HORIZON, 32)
    planned = plan(model, model.codec, model.start(4), GAMMA, PlannerConfig(), lambda *_: noise)
    assert th.equal(planned.mode(), planned.mode()[:1].expand(4, -1))


@every_kind
def test_plans_leave_the_global_generator_alone(space: spaces.Space, n_samples: int, n_iterations: int) -> None:
    model = vault(space)
    before = th.get_rng_state()
    config = PlannerConfig(n_iterations=n_iterations)
    planned = plan(model, model.codec, model.start(), GAMMA, config, noise_of(model.codec))
    planned.mode()
    planned.sample(seeded(model.codec, len(planned.gain)))
    assert th.equal(th.get_rng_state(), before)


def test_plans_carry_no_gradient() -> None:
    codec = make_action_codec(BOX)
    model = Model(th.zeros(1, 4, requires_grad=True))
    planned = plan(model, codec, model.start(2), GAMMA, PlannerConfig(), noise_of(codec, 2))
    assert not planned.mode().requires_grad


@pytest.mark.parametrize(("seconds", "most"), [(-1.0, 1), (0.05, 10_000)])
def test_no_iteration_starts_behind_the_deadline(seconds: float, most: int) -> None:
    model = vault(spaces.Discrete(4))
    draw, calls = noise_of(model.codec, 1), []

    def noise(horizon: int, n: int) -> th.Tensor:
        calls.append(n)
        return draw(horizon, n)

    begun = time.perf_counter()
    config = PlannerConfig(n_samples=8, n_iterations=50)
    plan(model, model.codec, model.start(1), GAMMA, config, noise, deadline=begun + seconds)
    assert 1 <= len(calls) <= most
    assert time.perf_counter() - begun >= seconds


def test_a_single_sequence_is_a_plan() -> None:
    for space in (BOX, spaces.Discrete(4), spaces.MultiBinary(6)):
        model = vault(space)
        config = PlannerConfig(n_samples=1, horizon=1, n_effective=1)
        planned = plan(model, model.codec, model.start(3), GAMMA, config, noise_of(model.codec, 3))
        assert planned.mode().shape == (3, model.codec.input_dim) and planned.kl.isfinite().all()


# --------------------------------------------------------------------- budgets


@pytest.mark.parametrize(
    "changes",
    [
        dict(n_samples=0),
        dict(n_samples=8.5),
        dict(horizon=0),
        dict(horizon=-1),
        dict(n_iterations=0),
        dict(n_effective=0.5),
        dict(n_effective=33),
        dict(n_samples=4),
        dict(min_std=0.0),
        dict(min_std=-0.1),
    ],
    ids=str,
)
def test_budgets_that_make_no_sense_are_refused(changes: dict[str, Any]) -> None:
    name = "n_effective" if changes == dict(n_samples=4) else next(iter(changes))
    with pytest.raises(ValueError, match=name):
        PlannerConfig(**changes)


@pytest.mark.parametrize("name", ["n_samples", "n_effective", "min_std"])
def test_budgets_that_are_no_number_are_refused(name: str) -> None:
    with pytest.raises(ValueError):
        PlannerConfig(**{name: float("nan")})  # type: ignore[arg-type]


def test_unknown_settings_are_refused() -> None:
    with pytest.raises(TypeError, match="samples"):
        PlannerConfig(samples=3)  # type: ignore[call-arg]
