"""The implicit world model: what it says before it has learned, and which loss trains which part of it."""

from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.vec_env import DummyVecEnv
from torch import nn

from sb3_m3po import M3PO
from sb3_m3po.actions import CategoricalActions, GaussianActions
from sb3_m3po.learner import Learner
from sb3_m3po.losses import (
    ModelTargets,
    PolicyTerms,
    critic_loss,
    enumerated_values,
    policy_terms,
    trust_region_loss,
    world_model_loss,
)
from sb3_m3po.masked_actions import make_action_codec
from sb3_m3po.math import two_hot
from sb3_m3po.world_model import Sizes, WorldModel
from tests.helpers import RandomEnv, randoms, tiny_model

ACTIONS: dict[str, spaces.Space] = {
    "box": spaces.Box(-1.0, 1.0, (2,), np.float32),
    "discrete": spaces.Discrete(3),
    "large multi-discrete": spaces.MultiDiscrete([2, 5, 3]),
}
SIZES = dict(latent_dim=16, encoder_arch=[12], model_arch=[20, 14], pi_arch=[10], critic_arch=[9], n_critics=3)
FEATURES, BATCH, HORIZON = 5, 6, 3
GAMMA = th.tensor([0.9])
#: Parts of the model; the model's value network has a trunk and a head
MODEL_PARTS = {"encoder", "trunk", "heads", "value_trunk", "value_head"}
PARTS = {*MODEL_PARTS, "critics", "actor"}

every_kind = pytest.mark.parametrize("space", ACTIONS.values(), ids=ACTIONS)


def normal(*shape: int, seed: int = 0) -> th.Tensor:
    return th.randn(*shape, generator=th.Generator().manual_seed(seed))


def make_model(space: spaces.Space) -> WorldModel:
    th.manual_seed(0)
    return WorldModel(FEATURES, make_action_codec(space), Sizes(**SIZES))  # type: ignore[arg-type]


def filled_model(space: spaces.Space) -> WorldModel:
    """:return: A model none of whose layers is zero, for a task that terminates"""
    model = make_model(space)
    with th.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.add_(0.3 * normal(*parameter.shape, seed=i))
        model.can_terminate.fill_(1)
    return model


def some_actions(model: WorldModel, n: int = BATCH, seed: int = 0) -> th.Tensor:
    codec = model.codec
    params = codec.parameters_from(normal(n, codec.params_dim, seed=seed))
    return codec.sample(params, codec.noise((n,), th.Generator().manual_seed(seed)))[0]


def some_targets(model: WorldModel) -> ModelTargets:
    return ModelTargets(
        th.softmax(normal(HORIZON, BATCH, 16, seed=1), -1),
        two_hot(normal(HORIZON, BATCH, seed=2), model.bins),
        (normal(HORIZON, BATCH, seed=3) > 1).float(),
        th.ones(HORIZON + 1, BATCH),
        two_hot(normal(BATCH, seed=4), model.bins),
        value_step=1,
    )


def moved(model: nn.Module) -> set[str]:
    """:return: Parts that a gradient has reached, all of their parameters included"""
    reached = set()
    for name, part in model.named_children():
        gradients = [p.grad is not None and bool(p.grad.abs().sum() > 0) for p in part.parameters()]
        assert all(gradients) or not any(gradients), f"a part of {name} has no gradient"
        reached |= {name} if any(gradients) else set()
    return reached


# ------------------------------------------------------------- before learning


@every_kind
def test_outcomes_and_values_start_at_zero(space: spaces.Space) -> None:
    model = make_model(space)
    z = model.encode(normal(BATCH, FEATURES))
    a = some_actions(model)
    _, reward, termination = model.step(z, a)
    for zero in (reward, model.value(z), model.policy_value(z), model.terminal_value(z), *model.action_values(z, a)):
        assert zero.abs().max() < 1e-5
    assert th.equal(termination, th.zeros(BATCH))


@every_kind
def test_policy_starts_almost_the_same_everywhere(space: spaces.Space) -> None:
    model = make_model(space)
    params = model.prior(model.encode(10 * normal(BATCH, FEATURES)))
    assert (params - params.mean(0)).abs().max() < 0.1
    if isinstance(model.codec, CategoricalActions):
        assert model.codec.entropy(params).min() > 0.99 * model.codec.max_entropy
    else:
        assert params.abs().max() < 0.1  # mean 0, standard deviation 1


@every_kind
def test_shapes(space: spaces.Space) -> None:
    model = filled_model(space)
    z, a = model.encode(normal(BATCH, FEATURES)), some_actions(model)
    f = model.features(z, a)
    next_z, reward_logits, termination_logit = model.outcome(f)
    assert z.shape == next_z.shape == (BATCH, 16)
    assert f.shape == (BATCH, 14)
    assert reward_logits.shape == (BATCH, 51) and termination_logit.shape == (BATCH,)
    assert [x.shape for x in model.step(z, a)] == [(BATCH, 16), (BATCH,), (BATCH,)]
    if isinstance(model.codec, CategoricalActions) and model.codec.enumerable:
        assert model.critic_logits(z).shape == (3, BATCH, 3, 51) and model.action_values(z).shape == (3, BATCH, 3)
    else:
        assert model.critic_logits(f).shape == (3, BATCH, 51) and model.action_values(z, a).shape == (3, BATCH)
    assert model.policy_value(z).shape == model.value(z).shape == model.terminal_value(z).shape == (BATCH,)


def test_latents_are_groups_that_sum_to_one() -> None:
    model = filled_model(ACTIONS["box"])
    z = model.encode(normal(BATCH, FEATURES))
    for latent in (z, model.step(z, some_actions(model))[0]):
        assert th.allclose(latent.view(BATCH, 8, 2).sum(1), th.ones(BATCH, 2))


def test_no_termination_is_predicted_before_there_was_one() -> None:
    model = filled_model(ACTIONS["box"])
    z, a = model.encode(normal(BATCH, FEATURES)), some_actions(model)
    with th.no_grad():
        model.heads.bias[-1] = 3.0
    assert (model.step(z, a)[2] > 0.5).any()
    model.can_terminate.zero_()
    assert th.equal(model.step(z, a)[2], th.zeros(BATCH))


def test_termination_is_unlikely_to_begin_with() -> None:
    model = make_model(ACTIONS["box"])
    model.can_terminate.fill_(1)
    probability = model.step(model.encode(normal(BATCH, FEATURES)), some_actions(model))[2]
    assert probability.detach().tolist() == pytest.approx([1 / (1 + np.exp(5))] * BATCH, rel=1e-4)


# ---------------------------------------------------------------------- values


def test_value_of_the_policy_is_the_expectation_over_its_actions() -> None:
    model = filled_model(ACTIONS["discrete"])
    z = model.encode(normal(BATCH, FEATURES))
    q, pi = model.action_values(z), model.prior(z).exp()
    lower = q.mean(0) - q.std(0, correction=0)
    expected = sum(pi[:, i] * lower[:, i] for i in range(3))
    assert th.allclose(model.policy_value(z), expected, atol=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["box", "large multi-discrete"])
def test_value_of_the_policy_is_that_of_its_mode(name: str) -> None:
    model = filled_model(ACTIONS[name])
    z = model.encode(normal(BATCH, FEATURES))
    q = model.action_values(z, model.codec.mode(model.prior(z)))
    assert th.allclose(model.policy_value(z), q.mean(0) - q.std(0, correction=0))


@every_kind
@pytest.mark.parametrize(("pessimism", "reduced"), [(0.0, th.mean), (1.0, th.amin)], ids=["mean", "minimum"])
def test_pessimism_goes_from_the_mean_of_two_critics_to_the_lower_one(
    space: spaces.Space, pessimism: float, reduced: Any
) -> None:
    th.manual_seed(0)
    model = WorldModel(FEATURES, make_action_codec(space), Sizes(**{**SIZES, "n_critics": 2, "pessimism": pessimism}))  # type: ignore[arg-type]
    with th.no_grad():
        model.critics.weights[-1].normal_()
    z = model.encode(normal(BATCH, FEATURES))
    params = model.prior(z)
    a = None if model.codec.enumerable else model.codec.mode(params)
    q = model.action_values(z, a)
    assert not th.allclose(q[0], q[1])
    if model.codec.enumerable:
        expected = (model.codec.joint_log_prob(params).exp() * reduced(q, 0)).sum(-1)  # type: ignore[operator]
    else:
        expected = reduced(q, 0)
    assert th.allclose(model.policy_value(z), expected, atol=1e-5)


@every_kind
def test_last_value_is_the_lower_of_both(space: spaces.Space) -> None:
    model = filled_model(space)
    z = model.encode(normal(BATCH, FEATURES))
    critics = model.policy_value(z)
    for sign in (1, -1):
        with th.no_grad():
            model.value_head.weight.zero_()
            model.value_head.bias.copy_(sign * 5 * model.bins)
        own = model.value(z)
        assert (own.abs() > critics.abs()).all()
        assert th.equal(model.terminal_value(z), critics if sign > 0 else own)


# ------------------------------------------------------------------- gradients


@every_kind
def test_model_loss_trains_the_model_only(space: spaces.Space) -> None:
    model = filled_model(space)
    actions = th.stack([some_actions(model, seed=i) for i in range(HORIZON)])
    loss, _ = world_model_loss(model, model.encode(normal(BATCH, FEATURES)), actions, some_targets(model))
    loss.backward()
    assert moved(model) == MODEL_PARTS


def test_model_loss_reaches_the_encoder_through_each_of_its_parts() -> None:
    model = filled_model(ACTIONS["box"])
    actions = th.stack([some_actions(model, seed=i) for i in range(HORIZON)])
    targets = some_targets(model)
    weight = model.encoder[1].weight
    gradients = []
    others = targets._replace(next_z=targets.next_z.roll(1)), targets._replace(rewards=targets.rewards.roll(1, -1))
    for some in (targets, *others, targets._replace(values=targets.values.roll(1, -1))):
        loss, _ = world_model_loss(model, model.encode(normal(BATCH, FEATURES)), actions, some)
        gradients.append(th.autograd.grad(loss, weight)[0])  # type: ignore[arg-type]
    assert not any(th.equal(gradients[0], gradient) for gradient in gradients[1:])


@every_kind
def test_policy_loss_trains_the_actor_only(space: spaces.Space) -> None:
    model = filled_model(space)
    for module in (model.trunk, model.heads):
        module.requires_grad_(False)  # as in phase B
    z = model.encode(normal(BATCH, FEATURES)).detach()
    anchor = model.prior(z).detach() + 0.01
    noise = model.codec.noise((BATCH,), th.Generator().manual_seed(0))
    terms = policy_terms(model, z, anchor, noise, th.ones(1), 0.1 * th.ones(1), GAMMA)
    trust_region_loss(terms, None, th.ones(1)).backward()
    assert moved(model) == {"actor"}


@every_kind
@pytest.mark.parametrize("kl_coef", [0.5, 2.0])
def test_policy_outside_of_its_region_is_drawn_back(space: spaces.Space, kl_coef: float) -> None:
    model = filled_model(space)
    z = model.encode(normal(BATCH, FEATURES)).detach()
    anchor = model.prior(z).detach().roll(1, 0)
    noise = model.codec.noise((BATCH,), th.Generator().manual_seed(0))
    terms = policy_terms(model, z, anchor, noise, th.ones(1), th.zeros(1), GAMMA)
    parameters = list(model.actor.parameters())
    pulled = th.autograd.grad(trust_region_loss(terms, 1e-9, th.tensor(kl_coef)), parameters, retain_graph=True)
    expected = th.autograd.grad(kl_coef * terms.kl.mean() + terms.penalty.mean(), parameters)
    assert all(th.allclose(g, e, atol=1e-6) for g, e in zip(pulled, expected, strict=True))


@every_kind
def test_critic_loss_trains_the_critics_only(space: spaces.Space) -> None:
    model = filled_model(space)
    with th.no_grad():
        z = model.encode(normal(BATCH, FEATURES))
        x = z if model.codec.enumerable else model.features(z, some_actions(model))
    logits = model.critic_logits(x)
    critic_loss(logits[:, :, 0] if model.codec.enumerable else logits, two_hot(th.ones(BATCH), model.bins)).backward()
    assert moved(model) == {"critics"}


@every_kind
@pytest.mark.parametrize("gamma", [None, GAMMA])
def test_policy_gradient_is_that_of_the_mean_critic_or_of_a_step_of_the_model(
    space: spaces.Space, gamma: th.Tensor | None
) -> None:
    model = filled_model(space)
    model.can_terminate.fill_(1)
    codec = model.codec
    z = model.encode(normal(BATCH, FEATURES)).detach()
    anchor, noise = model.prior(z).detach(), codec.noise((BATCH,), th.Generator().manual_seed(0))
    terms = policy_terms(model, z, anchor, noise, 4 * th.ones(1), th.zeros(1), gamma)
    params = model.prior(z)
    if isinstance(codec, CategoricalActions) and codec.enumerable:
        q = model.action_values(z).mean(0).detach()
        if gamma is not None:
            for i, action in enumerate(codec.joint_inputs):
                next_z, reward, termination = model.step(z, action.expand(BATCH, -1))
                next_value = (model.prior(next_z).exp() * model.action_values(next_z).mean(0)).sum(-1)
                q[BATCH // 2 :, i] = (reward + gamma * (1 - termination) * next_value).detach()[BATCH // 2 :]
        gain = (params.exp() * q).sum(-1) / 4
    else:
        a = codec.sample(params, noise)[0]
        gain = model.action_values(z, a).mean(0) / 4
        if gamma is not None:
            next_z, reward, termination = model.step(z, a)
            next_a = codec.sample(model.prior(next_z), noise.roll(BATCH // 2, 0))[0]
            looked_ahead = reward + gamma * (1 - termination) * model.action_values(next_z, next_a).mean(0)
            gain = th.cat([gain[: BATCH // 2], looked_ahead[BATCH // 2 :] / 4])
    assert th.allclose(terms.gain, gain, atol=1e-6)
    parameters = list(model.actor.parameters())
    gradients = (th.autograd.grad(x.sum(), parameters) for x in (terms.gain, gain))
    for got, expected in zip(*gradients, strict=True):
        assert th.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(("batch", "ahead"), [(16, 2), (4, 0)])
def test_actions_that_are_many_are_looked_ahead_in_fewer_states(batch: int, ahead: int) -> None:
    model = filled_model(spaces.Discrete(32))
    z, trunk, rows = model.encode(normal(batch, FEATURES)), model.trunk, []
    trunk.register_forward_hook(lambda _, inputs, __: rows.append(len(inputs[0])))
    q = enumerated_values(model, z, GAMMA)
    assert q.shape == (batch, 32) and sum(rows) == ahead * 32
    same = th.isclose(q, model.action_values(z).mean(0), atol=1e-5).all(1)
    assert same.tolist() == [True] * (batch - ahead) + [False] * ahead


# ------------------------------------------------------- both phases, for real


def changed(model: M3PO, before: dict[str, th.Tensor]) -> set[str]:
    """:return: Which parts differ from before: those of the world model, or else entries of the policy's state"""
    names = [name for name, value in model.policy.state_dict().items() if not th.equal(value, before[name])]
    return {name.split(".")[1] if name.startswith("world_model.") else name.split(".")[0] for name in names}


def state(model: M3PO) -> dict[str, th.Tensor]:
    return {name: value.clone() for name, value in model.policy.state_dict().items()}


@every_kind
def test_each_phase_changes_its_own_parts(space: spaces.Space) -> None:
    model = tiny_model(randoms(action_space=space), bonus_coef=0.5).learn(64)
    learner = Learner.of(model)
    learner.bonus_coef = 0.5
    model_batch, value_steps, policy_batch, frozen = learner.draw(8)
    before = state(model)
    learner.fit_world_model(model_batch, value_steps, frozen)
    assert changed(model, before) == MODEL_PARTS
    before = state(model)
    learner.improve_policy(policy_batch, frozen)
    assert changed(model, before) == {"actor", "critics", "log_ent_coef", "log_kl_coef", "q_range", "gap_median"}
    assert all(parameter.requires_grad for parameter in model.policy.world_model.parameters())


@every_kind
@pytest.mark.parametrize("excess", [-0.5, 0.5])
@pytest.mark.parametrize("progress", [0.0, 0.5, 1.0])
def test_temperature_and_multiplier_move_against_the_excess(space: spaces.Space, excess: float, progress: float) -> None:
    model = tiny_model(randoms(action_space=space), target_kl=0.3)
    model._current_progress_remaining = 1 - progress
    policy, learner, zeros = model.policy, Learner.of(model), th.zeros(4)
    model.replay_buffer.is_informative[:] = True
    codec = policy.world_model.codec
    # Of a Box it falls from -0.5 to -1 for each dimension
    falls = progress if isinstance(codec, GaussianActions) else 0.0
    entropy = codec.target_entropy * (1 + falls) + excess + zeros
    for group in policy.coef_optimizer.param_groups:
        group["lr"] *= group["speed"]
    before = [policy.log_ent_coef.item(), policy.log_kl_coef.item()]
    learner._step_coefs(PolicyTerms(zeros, entropy, 0.3 + excess + zeros, zeros), None)
    # Of the temperature the gradient is the excess alone, as SAC's in SB3; Adam's first step is the learning rate
    assert policy.log_ent_coef.grad is not None
    assert policy.log_ent_coef.grad.item() == pytest.approx(excess, rel=1e-5)
    assert policy.log_ent_coef.item() - before[0] == pytest.approx(-np.sign(excess) * 2e-3, rel=1e-3)
    assert policy.log_kl_coef.item() - before[1] == pytest.approx(np.sign(excess) * 2e-2, rel=1e-3)


def test_a_temperature_that_waited_does_not_leap() -> None:
    """However many updates it waited for, its first steps are those of one that never did."""
    moved = []
    for waiting in (0, 500):
        model = tiny_model(randoms(action_space=spaces.Box(-1, 1, (2,))))
        policy, learner, zeros = model.policy, Learner.of(model), th.zeros(4)
        terms = PolicyTerms(zeros, policy.world_model.codec.target_entropy + 0.5 + zeros, zeros, zeros)
        before = policy.log_ent_coef.item()
        for informative in (False, True):
            model.replay_buffer.is_informative[:] = informative
            for _ in range(10 if informative else waiting):
                learner._step_coefs(terms, None)
            assert informative or policy.log_ent_coef.item() == before
        moved.append(before - policy.log_ent_coef.item())
    assert moved == pytest.approx([10 * 2e-3] * 2, rel=1e-3)


@pytest.mark.parametrize("bound", [2.5, 10.0])
def test_a_step_is_that_of_the_clipped_gradient(bound: float) -> None:
    learner = Learner.of(tiny_model(randoms(), max_grad_norm=bound))
    first, second, unused = (nn.Parameter(th.ones(2)) for _ in range(3))
    optimizer = th.optim.SGD([first, second, unused], lr=1.0)
    for _ in range(2):  # what an update leaves behind does not reach the next
        loss = (first @ th.tensor([3.0, 0.0])) + (second @ th.tensor([0.0, 4.0]))
        assert learner._descend(loss, optimizer, [first, second, unused]).item() == pytest.approx(5.0)
    share = min(bound / 5, 1.0)
    assert first.tolist() == pytest.approx([1 - 2 * 3 * share, 1]) and second.tolist() == pytest.approx([1, 1 - 2 * 4 * share])
    assert unused.tolist() == [1, 1]


class Constant(RandomEnv):
    """Every reward is -1; truncated after 5 steps, and terminated once if ``at`` is given."""

    def __init__(self, action_space: spaces.Space, at: int = 0):
        super().__init__(action_space=action_space)
        self.at, self.steps = at, 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        obs, _, terminated, truncated, info = super().step(action)
        self.steps += 1
        return obs, -1.0, self.steps == self.at, terminated or truncated, info


@pytest.mark.parametrize("at", [0, 12])
@every_kind
def test_temperature_waits_for_something_to_learn(space: spaces.Space, at: int) -> None:
    model = tiny_model(DummyVecEnv([lambda: Constant(space, at)]))
    first = model.policy.log_ent_coef.item()
    model.learn(128)
    assert model._n_updates > 50
    assert (model.policy.log_ent_coef.item() == first) == (at == 0)


@pytest.mark.parametrize(("space", "expected"), [(spaces.Box(-1, 1, (2,)), 0.1), (spaces.Discrete(3), 1.0)], ids=str)
def test_first_temperature(space: spaces.Space, expected: float) -> None:
    for ent_coef, first in (("auto", expected), ("auto_0.3", 0.3), (0.2, 0.2)):
        model = tiny_model(randoms(action_space=space), ent_coef=ent_coef)
        assert model.policy.log_ent_coef.exp().item() == pytest.approx(first)


@every_kind
def test_optimizers_share_out_all_parameters(space: spaces.Space) -> None:
    policy = tiny_model(randoms(action_space=space)).policy
    optimizers = (policy.optimizer, policy.model_optimizer, policy.coef_optimizer)
    owned = [id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(owned) == sorted(id(p) for p in policy.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    "changes", [dict(latent_dim=12), dict(latent_dim=0), dict(n_critics=0), dict(pessimism=-0.1)], ids=str
)
def test_sizes_that_cannot_be_built_are_refused(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        Sizes(**changes).check()  # type: ignore[arg-type]
