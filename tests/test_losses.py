"""What is minimised, worked out by hand."""

import math

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch.nn import functional as F

from sb3_m3po.losses import (
    ModelTargets,
    PolicyTerms,
    alive_mask,
    critic_loss,
    discrepancy_bonus,
    n_step_return,
    spread_loss,
    trust_region_loss,
    world_model_loss,
)
from sb3_m3po.masked_actions import make_action_codec
from sb3_m3po.math import two_hot
from sb3_m3po.world_model import Sizes, WorldModel

HORIZON, BATCH, LATENT = 3, 5, 16


def normal(*shape: int, seed: int = 0) -> th.Tensor:
    return th.randn(*shape, generator=th.Generator().manual_seed(seed))


def column(*values: float) -> th.Tensor:
    """:return: One sequence, shape ``(length, 1)``"""
    return th.tensor(values, dtype=th.float32).unsqueeze(-1)


# ----------------------------------------------------------------------- masks


@pytest.mark.parametrize(
    ("terminated", "truncated", "expected"),
    [
        ((0, 0, 0), (0, 0, 0), [1, 1, 1, 1]),
        ((0, 1, 0), (0, 0, 0), [1, 1, 0, 0]),
        ((0, 0, 0), (1, 0, 0), [1, 0, 0, 0]),
        ((0, 0, 1), (0, 0, 0), [1, 1, 1, 0]),
        ((0, 1, 0), (0, 1, 0), [1, 1, 0, 0]),
        ((0, 1, 0), (1, 0, 1), [1, 0, 0, 0]),
    ],
)
def test_mask_is_zero_behind_the_first_end(
    terminated: tuple[float, ...], truncated: tuple[float, ...], expected: list[int]
) -> None:
    assert alive_mask(column(*terminated), column(*truncated)).flatten().tolist() == expected


# ---------------------------------------------------------- multi-step returns

REWARDS = (1.0, 10.0, 100.0)


@pytest.mark.parametrize(
    ("terminated", "truncated", "rewards", "steps", "discount"),
    [
        pytest.param((0, 0, 0), (0, 0, 0), 1 + 5 + 25, 3, 0.125, id="goes on"),
        pytest.param((1, 0, 0), (0, 0, 0), 1, 1, 0, id="terminates at once"),
        pytest.param((0, 1, 0), (0, 0, 0), 1 + 5, 2, 0, id="terminates"),
        pytest.param((0, 0, 1), (0, 0, 0), 1 + 5 + 25, 3, 0, id="terminates at the end"),
        pytest.param((0, 0, 0), (1, 0, 0), 1, 1, 0.5, id="is truncated at once"),
        pytest.param((0, 0, 0), (0, 1, 0), 1 + 5, 2, 0.25, id="is truncated"),
        pytest.param((0, 0, 0), (0, 0, 1), 1 + 5 + 25, 3, 0.125, id="is truncated at the end"),
        pytest.param((0, 0, 1), (0, 1, 0), 1 + 5, 2, 0.25, id="another episode's termination"),
        pytest.param((0, 1, 0), (0, 1, 0), 1 + 5, 2, 0, id="terminates at the time limit"),
    ],
)
def test_return_is_cut_where_the_episode_ends(
    terminated: tuple[float, ...], truncated: tuple[float, ...], rewards: float, steps: int, discount: float
) -> None:
    result = n_step_return(column(*REWARDS), column(*terminated), column(*truncated), gamma=0.5)
    assert [x.item() for x in result] == [rewards, steps, discount]


def test_returns_of_a_batch_are_those_of_its_columns() -> None:
    terminated, truncated = (normal(2, 4, 20) > 0.8).float()
    rewards = normal(4, 20, seed=1)
    together = n_step_return(rewards, terminated, truncated, gamma=0.9)
    for i in range(20):
        alone = n_step_return(*(x[:, i : i + 1] for x in (rewards, terminated, truncated)), gamma=0.9)  # type: ignore[misc, arg-type]
        assert all(th.allclose(x[i], y[0]) for x, y in zip(together, alone, strict=True))


@pytest.mark.parametrize(("gamma", "discount"), [(0.0, 0.0), (1.0, 1.0)])
def test_return_at_the_ends_of_gamma(gamma: float, discount: float) -> None:
    result = n_step_return(column(*REWARDS), column(0, 0, 0), column(0, 0, 0), gamma)
    assert result.rewards.item() == (111 if gamma else 1)
    assert result.discount.item() == discount


# --------------------------------------------------------------- critics, bonus


def test_critic_loss_is_summed_over_critics_and_averaged_over_samples() -> None:
    logits, target = normal(2, 4, 51), th.softmax(normal(4, 51, seed=1), -1)
    expected = sum(F.cross_entropy(logits[k], target) for k in range(2))
    assert critic_loss(logits, target).shape == ()
    assert th.allclose(critic_loss(logits, target), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gap", "td_error", "bonus"),
    [
        pytest.param(3.0, 10.0, 0.5 * 2, id="larger than usual"),
        pytest.param(0.5, 10.0, 0.5 * -0.5, id="smaller than usual"),
        pytest.param(1.0, 10.0, 0.0, id="as usual"),
        pytest.param(3.0, 0.4, 0.5 * 0.4, id="clipped"),
        pytest.param(3.0, -0.4, 0.5 * 0.4, id="clipped, value too high"),
        pytest.param(0.0, 0.4, 0.5 * -0.4, id="clipped below"),
        pytest.param(0.0, -0.4, 0.5 * -0.4, id="clipped below, value too high"),
        pytest.param(9.0, 0.0, 0.0, id="critic is right"),
    ],
)
def test_bonus_by_hand(gap: float, td_error: float, bonus: float) -> None:
    result = discrepancy_bonus(th.tensor([gap]), th.tensor([1.0]), th.tensor([td_error]), coef=0.5)
    assert result.item() == pytest.approx(bonus)


@pytest.mark.parametrize("coef", [0.1, 0.5, 1.0])
def test_bonus_never_flips_the_error(coef: float) -> None:
    td_error, gap = normal(10_000), 3 * normal(10_000, seed=1).abs()
    with_bonus = td_error + discrepancy_bonus(gap, th.ones(1), td_error, coef)
    assert (with_bonus * td_error >= 0).all()
    assert (with_bonus.abs() <= (1 + coef) * td_error.abs() + 1e-6).all()


def test_bonus_has_no_unit() -> None:
    td_error, gap = normal(100), normal(100, seed=1).abs()
    bonus = discrepancy_bonus(gap, th.ones(1), td_error, 0.3)
    assert th.equal(discrepancy_bonus(1024 * gap, 1024 * th.ones(1), 1024 * td_error, 0.3), 1024 * bonus)


# ----------------------------------------------------------------- trust region


def terms() -> PolicyTerms:
    """:return: Two states inside of a region of 0.5 nats, one on its border, one outside"""
    return PolicyTerms(
        gain=th.tensor([1.0, -2.0, 30.0, 400.0]),
        entropy=th.zeros(4),
        kl=th.tensor([0.0, 0.4, 0.5, 2.0]),
        penalty=th.tensor([0.1, 0.0, 0.0, 0.3]),
    )


def test_trust_region_by_hand() -> None:
    loss = trust_region_loss(terms(), 0.5, th.tensor(3.0))
    assert loss.item() == pytest.approx((-1.0 + 2.0 + 3 * 0.5 + 3 * 2.0 + 0.4) / 4)


def test_no_trust_region_by_hand() -> None:
    loss = trust_region_loss(terms(), None, th.tensor(3.0))
    assert loss.item() == pytest.approx((-1.0 + 2.0 - 30.0 - 400.0 + 0.4) / 4)


# ------------------------------------------------------------------ world model


@pytest.fixture
def model() -> WorldModel:
    """A model none of whose layers is zero, for a task that terminates."""
    codec = make_action_codec(spaces.Box(-1.0, 1.0, (2,)))
    sizes = Sizes(latent_dim=LATENT, encoder_arch=[12], model_arch=[12], pi_arch=[8], critic_arch=[8], n_critics=2)
    model = WorldModel(4, codec, sizes)
    with th.no_grad():
        for i, parameter in enumerate(model.parameters()):
            parameter.copy_(0.5 * normal(*parameter.shape, seed=i))
        model.can_terminate.fill_(1)
    return model


def sequence(
    model: WorldModel, garbage: float = 0.0, behind: th.Tensor | None = None, value_step: int = 2
) -> tuple[th.Tensor, ModelTargets]:
    """
    :param garbage: Added to everything behind the ends
    :param behind: Behind the ends, shape ``(horizon + 1, batch)``: 1 where nothing counts
    :param value_step: The step whose value is fitted
    :return: Actions and targets
    """
    mask = th.zeros(HORIZON + 1, BATCH) if behind is None else behind
    off = garbage * mask
    terminated = (normal(HORIZON, BATCH, seed=3) > 1).float() * (1 - mask[:-1])
    return th.tanh(normal(HORIZON, BATCH, 2, seed=5)) + off[:-1].unsqueeze(-1), ModelTargets(
        # The last latent that counts is the one that an action before the end leads to
        th.softmax(normal(HORIZON, BATCH, LATENT, seed=1), -1) + off[:-1].unsqueeze(-1),
        two_hot(normal(HORIZON, BATCH, seed=2), model.bins) + off[:-1].unsqueeze(-1),
        terminated + off[:-1],
        1 - mask,
        two_hot(normal(BATCH, seed=4), model.bins) + off[value_step].unsqueeze(-1),
        value_step,
    )


def latents(seed: int = 9) -> th.Tensor:
    return th.softmax(normal(BATCH, 2, 8, seed=seed), -1).flatten(1)


#: The first sequence ends with its first step, the second with its second; one with its last; two go on
BEHIND = th.tensor([[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]).float()


def by_hand(model: WorldModel, z: th.Tensor, actions: th.Tensor, targets: ModelTargets) -> dict[str, th.Tensor]:
    """:return: The parts of the loss, one sequence and one step at a time"""
    sums = {name: th.zeros(()) for name in ("consistency_loss", "reward_loss", "termination_loss", "value_loss")}
    for i in range(BATCH):
        latent = z[i : i + 1]
        for t in range(HORIZON + 1):
            m = targets.alive[t, i]
            if t == targets.value_step:
                sums["value_loss"] += m * F.cross_entropy(model.value_logits(latent), targets.values[i : i + 1])
            if t == HORIZON:
                continue
            latent, reward, termination = model.outcome(model.features(latent, actions[t, i : i + 1]))
            sums["consistency_loss"] += m * F.mse_loss(latent[0], targets.next_z[t, i])
            sums["reward_loss"] += m * F.cross_entropy(reward, targets.rewards[t, i : i + 1])
            bce = F.binary_cross_entropy_with_logits(termination, targets.terminated[t, i : i + 1])
            sums["termination_loss"] += m * bce
    means = {name: x / BATCH / (1 if name == "value_loss" else HORIZON) for name, x in sums.items()}
    columns = z.detach().numpy().astype(np.float64).T
    spreads = [max(0.0, 0.05 - math.sqrt(np.mean((x - x.mean()) ** 2) + 1e-4)) for x in columns]
    return {**means, "spread_loss": th.tensor(np.mean(spreads))}


@pytest.mark.parametrize("value_step", range(HORIZON + 1))
@pytest.mark.parametrize("behind", [None, BEHIND], ids=["no end", "ends"])
def test_model_loss_by_hand(model: WorldModel, behind: th.Tensor | None, value_step: int) -> None:
    actions, targets = sequence(model, behind=behind, value_step=value_step)
    loss, parts = world_model_loss(model, latents(), actions, targets)
    expected = by_hand(model, latents(), actions, targets)
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(value.item(), rel=1e-4), name
    weights = dict(consistency_loss=20.0, reward_loss=0.1, termination_loss=1.0, value_loss=0.1, spread_loss=10.0)
    total = sum(weight * expected[name].item() for name, weight in weights.items())
    assert loss.item() == parts["loss"].item() == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize(("size", "expected"), [(0.0, 0.04), (0.01, 0.05 - math.sqrt(2e-4)), (1.0, 0.0)])
def test_latents_that_stand_still_are_spread(model: WorldModel, size: float, expected: float) -> None:
    """The term is zero for latents that differ, and its gradient is finite for latents that don't."""
    unit = th.linspace(-1, 1, BATCH).unsqueeze(-1) * math.sqrt(2)  # of five, with standard deviation 1
    z = (0.5 + size * unit * th.ones_like(latents())).requires_grad_()
    loss, parts = world_model_loss(model, z, *sequence(model))
    assert parts["spread_loss"].item() == pytest.approx(expected, abs=1e-6)
    (gradient,) = th.autograd.grad(loss, z)
    assert gradient.isfinite().all()


def test_neighbours_hide_no_task_that_stands_still() -> None:
    tasks = th.arange(3).repeat_interleave(16)
    latent = normal(48, LATENT) + 5 * tasks.unsqueeze(-1)
    assert spread_loss(latent, tasks) == 0
    latent[tasks == 1] = 7.0
    expected = 0.05 - 0.01  # of constants, the root of 1e-4 is left
    assert spread_loss(latent, tasks).item() == pytest.approx(expected / 3, abs=1e-5)
    assert spread_loss(latent[tasks == 1], None).item() == pytest.approx(expected, abs=1e-5)
    latent.requires_grad_()
    assert th.autograd.grad(spread_loss(latent, tasks), latent)[0].isfinite().all()


def test_tasks_that_move_are_left_alone() -> None:
    """However few samples they have, and where they are."""
    tasks = th.arange(64) // 3
    latent = 0.15 * normal(64, LATENT) + normal(64, LATENT, seed=1)[tasks]
    assert spread_loss(latent, tasks) == spread_loss(latent, None) == 0
    # Of all dimensions together: that some stand still is the whole batch's matter
    latent[:, :8] = 0.0
    assert spread_loss(latent, tasks) == spread_loss(latent, None) > 0


def test_model_loss_has_exactly_these_parts(model: WorldModel) -> None:
    loss, parts = world_model_loss(model, latents(), *sequence(model))
    names = {"consistency_loss", "reward_loss", "termination_loss", "value_loss", "spread_loss"}
    assert set(parts) == {"loss", *names}
    assert loss.requires_grad and loss.shape == ()
    assert all(part.shape == () and not part.requires_grad for part in parts.values())


def test_garbage_behind_an_end_changes_nothing(model: WorldModel) -> None:
    results = []
    for garbage in (0.0, 1e3):
        z = latents().requires_grad_()
        loss, parts = world_model_loss(model, z, *sequence(model, garbage, BEHIND))
        gradients = th.autograd.grad(loss, [z, *model.model_parameters()], allow_unused=True)
        results.append([loss, *parts.values(), *(g for g in gradients if g is not None)])
    assert len(results[0]) > 10
    assert all(th.equal(x, y) for x, y in zip(*results, strict=True))


def test_garbage_before_an_end_changes_the_loss(model: WorldModel) -> None:
    clean, _ = world_model_loss(model, latents(), *sequence(model, 0.0, BEHIND))
    actions, targets = sequence(model, 1e3, BEHIND)
    loss, _ = world_model_loss(model, latents(), actions, targets._replace(alive=th.ones(HORIZON + 1, BATCH)))
    assert loss > clean


def test_termination_counts_once_the_task_has_terminated(model: WorldModel) -> None:
    model.can_terminate.zero_()
    loss, parts = world_model_loss(model, latents(), *sequence(model))
    assert parts["termination_loss"] == 0
    (gradient,) = th.autograd.grad(loss, model.heads.bias)
    assert gradient[-1] == 0 and gradient[:-1].abs().sum() > 0
