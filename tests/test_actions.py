"""Action codecs: what goes in comes out, and densities are those of SB3 and torch."""

import itertools
import math

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.distributions import SquashedDiagGaussianDistribution, make_proba_distribution
from torch.distributions import Categorical, kl_divergence

from sb3_m3po.actions import CategoricalActions, GaussianActions, PersistentNoise, SquashedGaussian
from sb3_m3po.masked_actions import make_action_codec
from sb3_m3po.policies import MlpPolicy
from tests.helpers import VECTOR, tiny_policy_kwargs

BOXES: dict[str, spaces.Box] = {
    "one dimension": spaces.Box(-1.0, 1.0, (1,), np.float32),
    "asymmetric": spaces.Box(np.array([-3.0, 0.1], np.float32), np.array([1.0, 7.3], np.float32)),
    "float64": spaces.Box(-0.1, 0.3, (3,), np.float64),
    "fixed entry": spaces.Box(np.array([-1.0, 0.7, 2.0], np.float32), np.array([1.0, 0.7, 2.5], np.float32)),
    "matrix": spaces.Box(-2.0, 2.0, (2, 3), np.float32),
}
DISCRETE: dict[str, spaces.Space] = {
    "Discrete": spaces.Discrete(3),
    "Discrete from 5": spaces.Discrete(4, start=5),
    "Discrete from -2": spaces.Discrete(4, start=-2),
    "one action": spaces.Discrete(1),
    "MultiDiscrete": spaces.MultiDiscrete([2, 5, 3]),
    "MultiDiscrete from elsewhere": spaces.MultiDiscrete([2, 4], start=[3, -1]),
    "MultiBinary": spaces.MultiBinary(4),
    "MultiBinary matrix": spaces.MultiBinary((2, 3)),
    "large MultiBinary": spaces.MultiBinary(12),
}
all_boxes = pytest.mark.parametrize("box", BOXES.values(), ids=BOXES)
all_discrete = pytest.mark.parametrize("space", DISCRETE.values(), ids=DISCRETE)
#: Factors of unequal sizes: some of their places are padding
PADDED = spaces.MultiDiscrete([2, 5, 3])


def normal(*shape: int, seed: int = 0) -> th.Tensor:
    return th.randn(*shape, generator=th.Generator().manual_seed(seed))


def categorical(space: spaces.Space) -> CategoricalActions:
    codec = make_action_codec(space)
    assert isinstance(codec, CategoricalActions)
    return codec


def random_params(codec: CategoricalActions, n: int, seed: int = 0) -> th.Tensor:
    return codec.parameters_from(2 * normal(n, codec.params_dim, seed=seed))


def random_actions(space: spaces.Space, n: int) -> th.Tensor:
    space.seed(0)
    return th.as_tensor(np.stack([space.sample() for _ in range(n)]))


def factors(codec: CategoricalActions, params: th.Tensor, nvec: list[int]) -> list[Categorical]:
    """:return: torch's distribution of each factor, without the padding"""
    logits = params.unflatten(-1, (codec.n_factors, codec.width))
    return [Categorical(logits=logits[..., i, :n]) for i, n in enumerate(nvec)]


# ------------------------------------------------------------------------ Box


@all_boxes
def test_box_actions_survive_the_round_trip(box: spaces.Box) -> None:
    codec = make_action_codec(box)
    actions = th.tanh(normal(6, *box.shape))
    inputs = codec.to_input(actions)
    assert inputs.shape == (6, math.prod(box.shape)) and inputs.dtype == th.float32
    assert th.equal(codec.to_env(inputs), actions)


@pytest.fixture(params=list(BOXES.values()), ids=list(BOXES))
def box_policy(request: pytest.FixtureRequest) -> MlpPolicy:
    return MlpPolicy(VECTOR, request.param, lambda _: 1e-3, **tiny_policy_kwargs())


def test_box_bounds_are_reached_exactly(box_policy: MlpPolicy) -> None:
    space = box_policy.action_space
    assert isinstance(space, spaces.Box)
    ones = np.ones((1, *space.shape), np.float32)
    assert np.allclose(box_policy.unscale_action(ones)[0], space.high)
    assert np.allclose(box_policy.unscale_action(-ones)[0], space.low)
    middle = 0.5 * (space.low.astype(np.float64) + space.high)
    assert np.allclose(box_policy.unscale_action(0 * ones)[0], middle, atol=1e-6)


@pytest.mark.parametrize("deterministic", [True, False])
def test_box_predictions_lie_in_the_space(box_policy: MlpPolicy, deterministic: bool) -> None:
    obs = normal(200, 3).numpy() * 100
    with th.no_grad():
        box_policy.world_model.actor[1].bias.copy_(  # type: ignore[operator]
            3 * normal(box_policy.world_model.codec.params_dim)
        )
    box_policy.average(restart=True)
    actions, _ = box_policy.predict(obs, deterministic=deterministic)
    space = box_policy.action_space
    assert isinstance(space, spaces.Box)
    assert (actions >= space.low).all() and (actions <= space.high).all()


@all_boxes
def test_box_log_prob_is_that_of_sb3(box: spaces.Box) -> None:
    codec = GaussianActions(box)
    params = codec.parameters_from(0.5 * normal(300, codec.params_dim))
    actions, log_prob = codec.sample(params, 0.7 * normal(300, codec.noise_dim, seed=1))
    theirs = SquashedDiagGaussianDistribution(codec.input_dim).proba_distribution(*params.chunk(2, -1))
    assert actions.abs().max() < 1
    assert th.allclose(log_prob, theirs.log_prob(actions), atol=2e-2, rtol=1e-3)


def test_box_samples_follow_the_parameters() -> None:
    codec = GaussianActions(BOXES["asymmetric"])
    params = th.tensor([[0.3, -0.2, math.log(0.5), math.log(0.1)]])
    noise = codec.noise((100_000,), th.Generator().manual_seed(0))
    u = th.atanh(codec.sample(params, noise)[0])
    assert u.mean(0).tolist() == pytest.approx([0.3, -0.2], abs=0.01)
    assert u.std(0).tolist() == pytest.approx([0.5, 0.1], rel=0.02)


def test_box_samples_carry_the_pathwise_gradient() -> None:
    codec = GaussianActions(BOXES["asymmetric"])
    params = (0.3 * normal(5, 4)).requires_grad_()
    noise = normal(5, 2, seed=1)
    actions, _ = codec.sample(params, noise)
    actions.sum().backward()
    slope = 1 - actions.detach().square()
    expected = th.cat([slope, slope * noise * params.detach().chunk(2, -1)[1].exp()], -1)
    assert params.grad is not None and th.allclose(params.grad, expected, atol=1e-5)


def test_box_mode_is_the_squashed_mean() -> None:
    codec = GaussianActions(BOXES["asymmetric"])
    params = normal(5, 4)
    assert th.equal(codec.mode(params), th.tanh(params[:, :2]))


@pytest.mark.parametrize("log_std_init", [-3.0, -0.5, 0.0, 0.4])
def test_standard_deviation_starts_as_told(log_std_init: float) -> None:
    codec = GaussianActions(BOXES["asymmetric"], log_std_init)
    _, log_std = codec.parameters_from(th.zeros(1, 4)).chunk(2, -1)
    assert log_std.flatten().tolist() == pytest.approx([log_std_init] * 2, abs=1e-5)


@pytest.mark.parametrize("log_std_init", [-4.0, 0.5, 2.0])
def test_standard_deviation_out_of_bounds_is_refused(log_std_init: float) -> None:
    with pytest.raises(ValueError, match="log_std_init"):
        GaussianActions(BOXES["asymmetric"], log_std_init)


def test_standard_deviation_stays_within_bounds() -> None:
    _, log_std = GaussianActions(BOXES["asymmetric"]).parameters_from(1e3 * normal(50, 4)).chunk(2, -1)
    assert log_std.min() >= -4 and log_std.max() <= 0.5


def test_widened_gaussian_keeps_its_mean() -> None:
    codec = GaussianActions(BOXES["asymmetric"])
    params = th.tensor([[0.3, -0.2, math.log(0.9), math.log(0.1)]])
    expected = th.tensor([[0.3, -0.2, math.log(0.9), math.log(0.5)]])
    assert th.allclose(codec.widen(params), expected)


def test_entropy_of_the_squashed_gaussian() -> None:
    mean, log_std = th.tensor([[0.5, -1.0]]), th.tensor([[-0.5, 0.3]])
    u = mean + log_std.exp() * normal(200_000, 2)
    distribution = SquashedGaussian(2).proba_distribution(mean, log_std)
    sampled = -GaussianActions(BOXES["asymmetric"]).sample(th.cat([mean, log_std], -1), (u - mean) / log_std.exp())[1]
    assert distribution.entropy().item() == pytest.approx(sampled.mean().item(), abs=0.02)


# ------------------------------------------------------------- discrete kinds


@all_discrete
def test_discrete_actions_survive_the_round_trip(space: spaces.Space) -> None:
    codec = categorical(space)
    actions = random_actions(space, 20)
    inputs = codec.to_input(actions)
    assert inputs.shape == (20, codec.input_dim)
    assert th.equal(inputs.unflatten(-1, (codec.n_factors, codec.width)).sum(-1), th.ones(20, codec.n_factors))
    back = codec.to_env(inputs)
    assert th.equal(back.long(), actions.long())
    assert all(space.contains(action.numpy()[()]) for action in back)
    assert th.equal(codec.to_input(back), inputs)


@all_discrete
def test_samples_and_modes_are_legal(space: spaces.Space) -> None:
    codec = categorical(space)
    params = random_params(codec, 200)
    inputs, _ = codec.sample(params, codec.noise((200,), th.Generator().manual_seed(0)))
    for actions in (codec.to_env(inputs), codec.to_env(codec.mode(params))):
        assert all(space.contains(action.numpy()[()]) for action in actions)


@all_discrete
def test_log_prob_is_that_of_sb3(space: spaces.Space) -> None:
    codec = categorical(space)
    params = random_params(codec, 100)
    inputs, log_prob = codec.sample(params, codec.noise((100,), th.Generator().manual_seed(0)))
    counted = inputs.unflatten(-1, (codec.n_factors, codec.width)).argmax(-1)
    if isinstance(space, spaces.MultiBinary):
        pairs = params.unflatten(-1, (-1, 2))
        # SB3 knows MultiBinary spaces of one dimension only
        theirs = make_proba_distribution(spaces.MultiBinary(codec.n_factors))
        expected = theirs.proba_distribution(pairs[..., 1] - pairs[..., 0]).log_prob(counted.float())
    else:
        theirs = make_proba_distribution(space)
        actions = counted.squeeze(-1) if isinstance(space, spaces.Discrete) else counted
        expected = theirs.proba_distribution(params[:, codec.legal_index]).log_prob(actions)
    assert th.allclose(log_prob, expected, atol=1e-5)
    assert th.allclose(codec.log_prob(params, inputs), expected, atol=1e-5)


def test_samples_follow_the_probabilities() -> None:
    codec = categorical(PADDED)
    params = random_params(codec, 1)
    noise = codec.noise((100_000,), th.Generator().manual_seed(0))
    frequency = codec.sample(params.expand(100_000, -1), noise)[0].mean(0)
    assert th.allclose(frequency, params.exp().squeeze(0), atol=0.01)


def test_mode_is_the_most_probable_action() -> None:
    codec = categorical(PADDED)
    params = random_params(codec, 50)
    expected = th.stack([f.probs.argmax(-1) for f in factors(codec, params, [2, 5, 3])], -1)
    assert th.equal(codec.to_env(codec.mode(params)), expected)


def test_padding_has_no_probability() -> None:
    codec = categorical(PADDED)
    legal = th.zeros(codec.params_dim, dtype=th.bool)
    legal[codec.legal_index] = True
    outputs = th.where(legal, th.zeros(()), th.full((), 1e4)).expand(3, -1)  # a network that prefers it
    for params in (codec.parameters_from(outputs), codec.widen(codec.parameters_from(outputs))):
        assert params.exp()[:, ~legal].abs().max() == 0
        assert th.allclose(params.exp().unflatten(-1, (3, 5)).sum(-1), th.ones(3, 3))
        inputs, _ = codec.sample(params, 20 * normal(3, codec.noise_dim).abs())
        assert inputs[:, ~legal].sum() == 0


def test_padding_has_no_gradient() -> None:
    codec = categorical(PADDED)
    outputs = normal(10, codec.params_dim).requires_grad_()
    params = codec.parameters_from(outputs)
    inputs, log_prob = codec.sample(params, codec.noise((10,), th.Generator().manual_seed(0)))
    loss = (inputs * normal(10, codec.input_dim, seed=3)).sum() + log_prob.sum()
    loss = loss + codec.entropy(params).sum() + codec.kl(random_params(codec, 10, 1), params).sum()
    loss.backward()
    assert outputs.grad is not None and outputs.grad.isfinite().all()
    padding = th.ones(codec.params_dim, dtype=th.bool)
    padding[codec.legal_index] = False
    assert outputs.grad[:, padding].abs().max() == 0
    assert outputs.grad[:, ~padding].abs().sum() > 0


def test_widened_categorical_is_half_uniform() -> None:
    codec = categorical(PADDED)
    params = random_params(codec, 4)
    for wide, narrow, n in zip(
        factors(codec, codec.widen(params), [2, 5, 3]), factors(codec, params, [2, 5, 3]), (2, 5, 3), strict=True
    ):
        assert th.allclose(wide.probs, 0.5 * narrow.probs + 0.5 / n, atol=1e-5)


def test_entropy_and_kl_are_those_of_torch() -> None:
    codec = categorical(PADDED)
    p, q = random_params(codec, 100), random_params(codec, 100, seed=1)
    first, second = factors(codec, p, [2, 5, 3]), factors(codec, q, [2, 5, 3])
    assert th.allclose(codec.entropy(p), sum(f.entropy() for f in first), atol=1e-5)  # type: ignore[arg-type]
    divergence = sum(kl_divergence(f, s) for f, s in zip(first, second, strict=True))
    assert th.allclose(codec.kl(p, q), divergence, atol=1e-4)  # type: ignore[arg-type]
    assert th.equal(codec.kl(p, p), th.zeros(100))


@all_discrete
def test_uniform_policy_has_the_largest_entropy(space: spaces.Space) -> None:
    codec = categorical(space)
    uniform = codec.parameters_from(th.zeros(1, codec.params_dim))
    assert codec.entropy(uniform).item() == pytest.approx(codec.max_entropy, abs=1e-5)
    assert codec.target_entropy == pytest.approx(0.25 * codec.max_entropy)


@pytest.mark.parametrize(
    ("space", "enumerable"),
    [
        (spaces.Discrete(64), True),
        (spaces.Discrete(65), False),
        (spaces.MultiDiscrete([4, 4]), True),
        (spaces.MultiDiscrete([2, 3, 3]), False),
        (spaces.MultiDiscrete([64]), True),
        (spaces.MultiBinary(4), True),
        (spaces.MultiBinary(5), False),
    ],
    ids=str,
)
def test_small_spaces_are_enumerated(space: spaces.Space, enumerable: bool) -> None:
    assert make_action_codec(space).enumerable == enumerable


@pytest.mark.parametrize("space", [spaces.Discrete(4, start=5), spaces.MultiDiscrete([2, 5]), spaces.MultiBinary(4)], ids=str)
def test_joint_actions_are_all_actions_once(space: spaces.Space) -> None:
    codec = categorical(space)
    actions = codec.to_env(codec.joint_inputs)
    assert len({tuple(action.flatten().tolist()) for action in actions}) == len(actions) == codec.n_joint
    assert all(space.contains(action.numpy()[()]) for action in actions)
    assert codec.n_joint == round(math.exp(codec.max_entropy))


@pytest.mark.parametrize("nvec", [[4], [2, 5], [2, 2, 3]], ids=str)
def test_joint_probabilities_are_products_of_the_factors(nvec: list[int]) -> None:
    codec = categorical(spaces.MultiDiscrete(nvec))
    params = random_params(codec, 10)
    parts = [f.probs for f in factors(codec, params, nvec)]
    expected = [
        math.prod(part[3, i].item() for part, i in zip(parts, joint, strict=True))
        for joint in itertools.product(*map(range, nvec))
    ]
    probabilities = codec.joint_log_prob(params).exp()
    assert th.allclose(probabilities[3], th.tensor(expected), atol=1e-5)
    assert th.allclose(probabilities.sum(-1), th.ones(10))


def test_samples_carry_the_straight_through_gradient() -> None:
    codec = categorical(spaces.MultiDiscrete([2, 3]))
    outputs = normal(8, codec.params_dim).requires_grad_()
    noise = codec.noise((8,), th.Generator().manual_seed(0))
    inputs, _ = codec.sample(codec.parameters_from(outputs), noise)
    wanted = normal(8, codec.input_dim, seed=2)
    (inputs * wanted).sum().backward()
    hard, _ = codec.sample(codec.parameters_from(outputs.detach()), noise)
    assert th.allclose(inputs.detach(), hard, atol=1e-6)
    # The gradient is that of the soft sample
    again = outputs.detach().clone().requires_grad_()
    perturbed = codec.parameters_from(again) + noise
    (th.softmax(perturbed.unflatten(-1, (2, 3)), -1).flatten(-2) * wanted).sum().backward()
    assert outputs.grad is not None and outputs.grad.abs().sum() > 0
    assert again.grad is not None and th.allclose(outputs.grad, again.grad, atol=1e-5)


@pytest.mark.parametrize("space", [BOXES["asymmetric"], PADDED], ids=str)
def test_noise_comes_from_the_generator_that_is_given(space: spaces.Space) -> None:
    codec = make_action_codec(space)
    before = th.get_rng_state()
    first, second = (codec.noise((4, 2), th.Generator().manual_seed(5)) for _ in range(2))
    assert first.shape == (4, 2, codec.noise_dim) and th.equal(first, second)
    assert th.equal(th.get_rng_state(), before)


def test_other_spaces_are_refused() -> None:
    with pytest.raises(ValueError, match="Box, Discrete, MultiDiscrete and MultiBinary"):
        make_action_codec(spaces.Text(3))


def noise_of_steps(persistence: tuple[float, ...], n_steps: int = 6, n_envs: int = 4_000) -> th.Tensor:
    """:return: Shape ``(n_steps, n_envs)``; the second half of the environments begins an episode at each step"""
    noise, generator = PersistentNoise(1), th.Generator().manual_seed(0)
    starts = np.arange(n_envs) >= n_envs // 2
    return th.stack([noise.draw(starts, [persistence] * n_envs, generator).squeeze(-1) for _ in range(n_steps)])


MEMORIES = pytest.mark.parametrize("persistence", [(0.0,), (0.8,), (0.0, 0.8), (0.5, 0.7, 0.9)], ids=str)


@MEMORIES
def test_persistent_noise_is_standard_normal_at_each_step(persistence: tuple[float, ...]) -> None:
    for x in noise_of_steps(persistence):
        assert x.mean().item() == pytest.approx(0, abs=0.06)
        assert x.std().item() == pytest.approx(1, abs=0.05)


@MEMORIES
def test_persistent_noise_remembers_within_an_episode_only(persistence: tuple[float, ...]) -> None:
    within, between = noise_of_steps(persistence).chunk(2, 1)
    for lag in (1, 3):
        assert (within[1] * within[1 + lag]).mean().item() == pytest.approx(np.mean(np.power(persistence, lag)), abs=0.08)
        assert (between[1] * between[1 + lag]).mean().item() == pytest.approx(0, abs=0.08)


def test_episodes_take_the_persistences_in_turn() -> None:
    noise, generator = PersistentNoise(64), th.Generator().manual_seed(0)
    remembers = []
    for _ in range(7):
        # The second environment goes on, the others begin an episode; the first draw of all begins one for each
        starts = np.array([True, False, True, True])
        x = th.stack([noise.draw(starts & (step == 0), [(0.0, 0.0, 0.99)] * len(starts), generator) for step in range(3)])
        remembers.append((x.diff(dim=0).abs().mean((0, -1)) < 0.3).tolist())
    first, going_on, third, fourth = zip(*remembers, strict=True)
    assert first == fourth == (False, False, True, False, False, True, False)
    assert going_on == (False,) * 7
    assert third == (True, False, False, True, False, False, True)


def test_persistent_noise_begins_anew_with_another_number_of_environments() -> None:
    noise, generator = PersistentNoise(2), th.Generator().manual_seed(0)
    assert noise.draw(np.ones(3, bool), [(0.8,)] * 3, generator).shape == (3, 2)
    assert noise.draw(np.zeros(5, bool), [(0.8,)] * 5, generator).shape == (5, 2)


def test_box_noise_remembers_only_where_observations_are_slow() -> None:
    codec = GaussianActions(BOXES["one dimension"])
    assert codec.noise_persistence(0.7) == (0.0,)
    assert codec.noise_persistence(0.9) == (0.0, 0.8, 0.95, 0.99)
    assert categorical(DISCRETE["Discrete"]).noise_persistence(0.0) == (0.8,)
