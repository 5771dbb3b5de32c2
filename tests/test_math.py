"""Classified values are unbiased, densities are those of torch, and the planner's temperature keeps its bound."""

import math

import pytest
import torch as th
from torch.distributions import Independent, Normal, TransformedDistribution, kl_divergence
from torch.distributions.transforms import TanhTransform

from sb3_m3po.math import (
    cross_entropy,
    decode,
    gaussian_kl,
    gaussian_log_prob,
    kl_bounded_weights,
    log_det_tanh,
    symexp,
    two_hot,
    value_bins,
)

BINS = value_bins()


def normal(*shape: int, seed: int = 0) -> th.Tensor:
    return th.randn(*shape, generator=th.Generator().manual_seed(seed))


# --------------------------------------------------------------- two-hot


@pytest.mark.parametrize(("n_bins", "limit"), [(51, 3.2), (3, 1.0), (101, 5.0)])
def test_bins_are_symmetric_about_zero(n_bins: int, limit: float) -> None:
    bins = value_bins(n_bins, limit)
    assert bins.shape == (n_bins,)
    assert th.equal(bins, -bins.flip(0))
    assert bins[n_bins // 2] == 0
    assert (bins.diff() > 0).all()
    assert bins[-1].item() == pytest.approx(math.expm1(limit))


def test_symexp_undoes_symlog() -> None:
    x = th.linspace(-20, 20, 41)
    assert th.allclose(symexp(x.sign() * x.abs().log1p()), x, rtol=1e-5)


def test_two_hot_keeps_the_value() -> None:
    x = th.linspace(BINS[0], BINS[-1], 1_001)
    weights = two_hot(x, BINS)
    assert weights.shape == (1_001, 51)
    assert th.allclose(weights.sum(-1), th.ones(1_001))
    assert th.allclose(weights @ BINS, x, rtol=1e-5, atol=1e-5)


def test_two_hot_uses_the_two_neighbours_only() -> None:
    weights = two_hot(normal(500) * 5, BINS)
    assert (weights >= 0).all()
    first, last = (weights > 0).float().argmax(-1), 50 - (weights.flip(-1) > 0).float().argmax(-1)
    assert ((last - first) <= 1).all()


def test_two_hot_on_a_bin_is_one_hot() -> None:
    assert th.equal(two_hot(BINS, BINS), th.eye(51))


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_two_hot_is_linear_between_bins(share: float) -> None:
    weights = two_hot(BINS[:-1] + share * BINS.diff(), BINS)
    expected = (1 - share) * th.eye(51)[:-1] + share * th.eye(51)[1:]
    assert th.allclose(weights, expected, atol=1e-4)


@pytest.mark.parametrize("x", [1e3, -1e3])
def test_two_hot_clips_to_the_outermost_bins(x: float) -> None:
    weights = two_hot(th.tensor([x]), BINS)
    assert weights[0, -1 if x > 0 else 0] == 1 and weights.sum() == 1


def test_two_hot_keeps_leading_dimensions() -> None:
    x = normal(3, 4).T  # not contiguous
    assert th.equal(two_hot(x, BINS)[2, 1], two_hot(x[2, 1], BINS))


def test_fair_coin_of_0_or_20_decodes_to_10() -> None:
    target = two_hot(th.tensor([0.0, 20.0]), BINS).mean(0)
    assert (target @ BINS).item() == pytest.approx(10, rel=1e-5)


def test_fair_coin_of_0_or_20_is_learned_as_10() -> None:
    logits = th.zeros(51, requires_grad=True)
    coins = two_hot(th.tensor([0.0, 20.0]), BINS)
    optimizer = th.optim.Adam([logits], lr=0.1)
    for _ in range(300):
        optimizer.zero_grad()
        cross_entropy(logits, coins).mean().backward()
        optimizer.step()
    assert decode(logits, BINS).item() == pytest.approx(10, rel=0.01)


def test_cross_entropy_is_that_of_torch() -> None:
    logits, target = normal(6, 51), two_hot(normal(6, seed=1), BINS)
    assert th.allclose(cross_entropy(logits, target), th.nn.functional.cross_entropy(logits, target, reduction="none"))


# -------------------------------------------------------------- Gaussians


def gaussian(seed: int, n: int = 200, dim: int = 3) -> tuple[th.Tensor, th.Tensor]:
    return normal(n, dim, seed=seed), (0.7 * normal(n, dim, seed=seed + 100)).clamp(-4, 0.5)


def as_torch(mean: th.Tensor, log_std: th.Tensor) -> Independent:
    return Independent(Normal(mean, log_std.exp()), 1)


def test_gaussian_log_prob_is_that_of_torch() -> None:
    mean, log_std = gaussian(1)
    u = mean + log_std.exp() * normal(200, 3)
    assert th.allclose(gaussian_log_prob(u, mean, log_std), as_torch(mean, log_std).log_prob(u), atol=1e-4)


def test_squashed_log_prob_is_that_of_torch() -> None:
    mean, log_std = (x.double() for x in gaussian(2))
    u = mean + log_std.exp() * normal(200, 3).double()
    squashed = TransformedDistribution(Normal(mean, log_std.exp()), TanhTransform(cache_size=1))
    expected = squashed.log_prob(th.tanh(u)).sum(-1)
    assert th.allclose(gaussian_log_prob(u, mean, log_std) - log_det_tanh(u), expected, atol=1e-6)


@pytest.mark.parametrize("u", [-40.0, -10.0, 0.0, 10.0, 40.0])
def test_log_det_of_tanh_is_exact_where_tanh_is_flat(u: float) -> None:
    expected = 2 * (math.log(2) - abs(u) - math.log1p(math.exp(-2 * abs(u))))
    assert log_det_tanh(th.tensor([u])).item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


def test_gaussian_kl_is_that_of_torch() -> None:
    p, q = gaussian(3), gaussian(4)
    assert th.allclose(gaussian_kl(*p, *q), kl_divergence(as_torch(*p), as_torch(*q)), rtol=1e-4, atol=1e-4)
    assert th.allclose(gaussian_kl(*p, *p), th.zeros(200), atol=1e-6)


# ------------------------------------------------------------ temperature


def random_prior(batch: int = 50, n: int = 16) -> th.Tensor:
    return normal(batch, n, seed=7).log_softmax(-1)


def uniform_prior(batch: int = 50, n: int = 16) -> th.Tensor:
    return th.full((batch, n), -math.log(n))


def kl(weights: th.Tensor, log_prior: th.Tensor) -> th.Tensor:
    return (weights * (weights.clamp_min(1e-30).log() - log_prior)).sum(-1)


@pytest.mark.parametrize("score", [0.0, -3.0, 1e4])
def test_equal_scores_give_back_the_prior(score: float) -> None:
    log_prior = random_prior()
    weights = kl_bounded_weights(th.full((50, 16), score), log_prior, bound=1.0)
    assert th.allclose(weights, log_prior.exp(), atol=1e-6)


@pytest.mark.parametrize("bound", [0.05, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("prior", [uniform_prior, random_prior])
def test_bound_is_kept_and_spent(prior: type, bound: float) -> None:
    log_prior = prior()
    spent = kl(kl_bounded_weights(normal(50, 16), log_prior, bound), log_prior)
    assert (spent <= bound + 1e-4).all()
    # Where the best action is likely enough already, no temperature can spend it
    spendable = -log_prior.gather(1, normal(50, 16).argmax(-1, keepdim=True)).squeeze(-1) > 1.1 * bound
    assert spendable.sum() > 10
    assert (spent[spendable] >= 0.95 * bound).all()


def test_bound_that_cannot_be_spent_picks_the_best() -> None:
    scores = normal(50, 16)
    weights = kl_bounded_weights(scores, uniform_prior(), bound=100.0)
    assert weights.isfinite().all()
    assert (weights.gather(1, scores.argmax(-1, keepdim=True)) > 0.99).all()


def test_better_scores_never_weigh_less() -> None:
    scores, log_prior = normal(50, 16), random_prior()
    ratio = kl_bounded_weights(scores, log_prior, bound=0.5) / log_prior.exp()
    assert (ratio.gather(1, scores.argsort(-1)).diff() >= -1e-5).all()
    weights = kl_bounded_weights(scores, uniform_prior(), bound=0.5)
    assert (weights.gather(1, scores.argsort(-1)).diff() >= 0).all()


def test_looser_bound_scores_higher() -> None:
    scores, log_prior = normal(50, 16), random_prior()
    values = th.stack([(kl_bounded_weights(scores, log_prior, b) * scores).sum(-1) for b in (0.1, 0.5, 1.0, 2.0)])
    assert (values.diff(dim=0) >= -1e-6).all()


def test_weights_sum_to_one() -> None:
    assert th.allclose(kl_bounded_weights(normal(50, 16), random_prior(), 1.0).sum(-1), th.ones(50))


@pytest.mark.parametrize("power", [-10, -1, 1, 10])
def test_weights_do_not_know_the_unit_of_the_scores(power: int) -> None:
    scores, log_prior = normal(50, 16), random_prior()
    expected = kl_bounded_weights(scores, log_prior, 1.0)
    assert th.equal(kl_bounded_weights(scores * 2.0**power, log_prior, 1.0), expected)


def test_weights_do_not_know_the_origin_of_the_scores() -> None:
    scores, log_prior = normal(50, 16), random_prior()
    expected = kl_bounded_weights(scores, log_prior, 1.0)
    assert th.allclose(kl_bounded_weights(scores + 8, log_prior, 1.0), expected, atol=1e-4)


def test_weights_of_a_row_do_not_depend_on_the_others() -> None:
    scores, log_prior = normal(50, 16), random_prior()
    together = kl_bounded_weights(scores, log_prior, 1.0)
    assert th.allclose(kl_bounded_weights(scores[7:8], log_prior[7:8], 1.0), together[7:8], atol=1e-6)
