"""Predictions act by a running mean of the networks, which follows their training and nothing else."""

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from torch import nn

from sb3_m3po.planning import MeanNetworks
from tests.helpers import assert_same_model, randoms, tiny_model

OBS = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)


def averaged(values: list[float]) -> float:
    """:return: The mean of a weight that has had these values"""
    weight, other = nn.Linear(1, 1), nn.Identity()
    mean = MeanNetworks(other, weight)  # type: ignore[arg-type]
    for value in values:
        nn.init.constant_(weight.weight, value)
        mean.update(other, weight)  # type: ignore[arg-type]
    return mean.world_model.weight.item()  # type: ignore[union-attr, operator]


def test_the_first_state_is_the_mean() -> None:
    assert averaged([3.0]) == 3.0


def test_of_two_states_the_new_one_counts_for_nine_tenths() -> None:
    assert averaged([0.0, 1.0]) == pytest.approx(0.9)


def test_what_grows_by_one_is_behind_by_a_tenth_of_the_states_and_at_most_fifteen() -> None:
    # With weights 9 / (9 + n) the lag is n / 10 behind n + 1 states; with 1 / 16 it tends to 15
    assert averaged([float(i) for i in range(101)]) == pytest.approx(100 - 100 / 10)
    assert averaged([float(i) for i in range(1_000)]) == pytest.approx(999 - 15, abs=1e-3)


def test_buffers_are_the_newest() -> None:
    norm, other = nn.BatchNorm1d(1), nn.Identity()
    mean = MeanNetworks(norm, other)  # type: ignore[arg-type]
    for _ in range(3):
        norm(th.randn(4, 1) + 5)
        mean.update(norm, other)  # type: ignore[arg-type]
    assert th.equal(mean.features_extractor.running_mean, norm.running_mean)  # type: ignore[arg-type]


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("planned", [0, 8])
def test_predictions_are_of_the_mean_alone(planned: int, deterministic: bool) -> None:
    model = tiny_model(randoms(action_space=spaces.Box(-1.0, 1.0, (2,), np.float32))).learn(64)
    model.set_planning(planned)
    policy, obs = model.policy, th.as_tensor(OBS)

    def predicted() -> np.ndarray:
        th.manual_seed(0)
        return model.predict(OBS, deterministic=deterministic)[0]

    before = predicted()
    with th.no_grad():
        for parameter in policy.world_model.parameters():
            parameter.add_(0.1 * th.randn_like(parameter))
        assert not th.allclose(policy.encode_mean(obs), policy.encode(obs))
    assert np.array_equal(predicted(), before)
    policy.average()
    assert not np.array_equal(predicted(), before)
    with th.no_grad():
        assert not th.allclose(policy.encode_mean(obs), policy.encode(obs), atol=1e-5)
        policy.average(restart=True)
        assert th.equal(policy.encode_mean(obs), policy.encode(obs))
    assert policy.mean.n_averaged == 1


def test_training_takes_each_period_into_the_mean_and_never_reads_it() -> None:
    model, other = (tiny_model(randoms()) for _ in range(2))
    with th.no_grad():
        for parameter in other.policy.mean.parameters():
            parameter.fill_(float("nan"))
    model.learn(64), other.learn(64)
    assert model.policy.mean.n_averaged == model._n_updates // model.sync_interval > 1
    # The first period's networks replace whatever was in the mean
    assert_same_model(model, other)
    assert not any(p.requires_grad for p in model.policy.mean.parameters())
    first, now = model.policy.mean.world_model, model.policy.world_model
    assert all(not th.equal(a, b) for a, b in zip(first.actor.parameters(), now.actor.parameters(), strict=True))


def test_an_untrained_model_predicts_by_its_networks() -> None:
    policy = tiny_model(randoms()).policy
    with th.no_grad():
        assert th.equal(policy.encode_mean(th.as_tensor(OBS)), policy.encode(th.as_tensor(OBS)))
