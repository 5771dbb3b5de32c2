"""Building blocks of the networks."""

import numpy as np
import pytest
import torch as th
from torch import nn
from torch.nn import functional as F

from sb3_m3po.nets import MLP, Ensemble, RunningNorm, SimNorm

MEMBERS, INPUT, OUTPUT = 3, 5, 4


@pytest.fixture
def x() -> th.Tensor:
    return th.randn(7, INPUT, generator=th.Generator().manual_seed(0))


def filled_ensemble(hidden: list[int]) -> Ensemble:
    """:return: An ensemble none of whose layers is zero"""
    ensemble = Ensemble(INPUT, hidden, OUTPUT, MEMBERS, nn.SiLU)
    generator = th.Generator().manual_seed(1)
    with th.no_grad():
        for parameter in ensemble.parameters():
            parameter.copy_(th.randn(parameter.shape, generator=generator))
    return ensemble


# -------------------------------------------------------------------- SimNorm


def test_simnorm_is_a_softmax_of_each_group(x: th.Tensor) -> None:
    z = SimNorm(8)(x.new_tensor(np.random.default_rng(0).normal(size=(7, 24))))
    assert z.shape == (7, 24)
    assert (z > 0).all()
    assert th.allclose(z.view(7, 8, 3).sum(1), th.ones(7, 3))


def test_simnorm_groups_do_not_mix() -> None:
    x = th.zeros(2, 16)
    x[1, ::2] = th.arange(8.0)
    z = SimNorm(8)(x)
    assert th.allclose(z[0], th.full((16,), 1 / 8))
    assert th.equal(z[1, 1::2], z[0, 1::2])
    assert th.allclose(z[1, ::2], th.softmax(th.arange(8.0), 0))


# ----------------------------------------------------------------------- MLPs


def test_mlp_without_hidden_layers_is_the_identity(x: th.Tensor) -> None:
    assert MLP(INPUT, [], nn.SiLU)(x) is x


def test_mlp_normalises_before_it_activates(x: th.Tensor) -> None:
    net = MLP(INPUT, [6, 8], nn.ReLU)
    first, second = net.linears
    assert isinstance(first, nn.Linear)
    assert th.allclose(first.weight.T @ first.weight, th.eye(INPUT), atol=1e-5)
    with th.no_grad():
        net.norms[0].weight.fill_(2.0)  # type: ignore[operator]
    by_hand = F.relu(F.layer_norm(second(F.relu(2 * F.layer_norm(first(x), (6,)))), (8,)))
    assert by_hand.shape == (7, 8)
    assert th.allclose(net(x), by_hand, atol=1e-6)


@pytest.mark.parametrize("hidden", [[], [8], [8, 6]], ids=str)
def test_ensemble_is_its_members_one_by_one(hidden: list[int], x: th.Tensor) -> None:
    ensemble = filled_ensemble(hidden)
    outputs = ensemble(x)
    assert outputs.shape == (MEMBERS, 7, OUTPUT)
    for member in range(MEMBERS):
        h = x
        for i, (weight, bias) in enumerate(zip(ensemble.weights, ensemble.biases, strict=True)):
            h = h @ weight[member] + bias[member]
            if i < len(hidden):
                h = F.silu(F.layer_norm(h, h.shape[-1:]))
        assert th.allclose(outputs[member], h, atol=1e-4)


def test_ensemble_members_start_different_and_at_zero(x: th.Tensor) -> None:
    ensemble = Ensemble(INPUT, [8], OUTPUT, MEMBERS, nn.SiLU)
    assert not th.equal(ensemble.weights[0][0], ensemble.weights[0][1])
    assert th.equal(ensemble(x), th.zeros(MEMBERS, 7, OUTPUT))


def test_ensemble_members_learn_apart(x: th.Tensor) -> None:
    ensemble = filled_ensemble([8])
    ensemble(x)[1].square().sum().backward()
    for parameter in ensemble.parameters():
        assert parameter.grad is not None
        assert parameter.grad[1].abs().sum() > 0
        assert parameter.grad[[0, 2]].abs().sum() == 0


def test_frozen_ensemble_passes_gradients_to_its_input_only(x: th.Tensor) -> None:
    ensemble = filled_ensemble([8])
    gradients: list[th.Tensor] = []
    for frozen in (True, False):
        x.grad = None
        ensemble(x.requires_grad_(), frozen=frozen).square().sum().backward()
        assert x.grad is not None
        gradients.append(x.grad.clone())
        assert all((parameter.grad is None) == frozen for parameter in ensemble.parameters())
    assert th.equal(*gradients)
    assert gradients[0].abs().sum() > 0


# -------------------------------------------------------- running statistics


def observations(n: int = 500) -> np.ndarray:
    return np.random.default_rng(0).normal([3.0, -100.0, 0.5], [2.0, 50.0, 0.1], (n, 3)).astype(np.float32)


def test_statistics_are_those_of_all_data() -> None:
    norm, data = RunningNorm((3,)), observations()
    for part in np.split(data, [1, 2, 100, 350]):
        norm.update(part)
    assert norm.count.item() == 500
    assert np.allclose(norm.mean.numpy(), data.mean(0, dtype=np.float64))
    assert np.allclose(norm.var.sqrt().numpy(), data.std(0, dtype=np.float64))


def test_statistics_apply_from_the_next_freeze_on() -> None:
    norm, data = RunningNorm((3,)), observations()
    x = th.as_tensor(data[:10])
    norm.update(data[:100])
    assert th.equal(norm(x), x.clamp(-10, 10))
    norm.freeze()
    frozen = norm(x)
    expected = (data[:10] - data[:100].mean(0)) / data[:100].std(0)
    assert np.allclose(frozen.numpy(), expected, atol=1e-4)
    norm.update(data[100:] * 7)
    assert th.equal(norm(x), frozen)
    norm.freeze()
    assert not th.allclose(norm(x), frozen)


def test_freezing_without_data_changes_nothing() -> None:
    norm = RunningNorm((3,))
    norm.freeze()
    x = th.tensor([[1.0, 2.0, 3.0]])
    assert th.equal(norm(x), x)


def test_normalised_values_are_clipped() -> None:
    norm = RunningNorm((3,))
    norm.update(observations())
    norm.freeze()
    assert norm(th.full((1, 3), 1e6)).tolist() == [[10.0] * 3]
    assert norm(th.full((1, 3), -1e6)).tolist() == [[-10.0] * 3]


def test_constant_entries_are_not_blown_up() -> None:
    norm = RunningNorm((2,))
    norm.update(np.full((100, 2), 5.0))
    norm.freeze()
    assert norm(th.tensor([[5.0, 5.01]])) == pytest.approx(th.tensor([[0.0, 1.0]]), abs=1e-3)


def test_statistics_of_observations_with_several_dimensions() -> None:
    norm = RunningNorm((2, 3))
    norm.update(observations(100).reshape(50, 2, 3))
    norm.freeze()
    assert norm(th.zeros(4, 2, 3)).shape == (4, 2, 3)


def test_statistics_are_saved_as_floating_point_numbers() -> None:
    state = RunningNorm((3,)).state_dict()
    assert set(state) == {"count", "mean", "var", "shift", "scale"}
    assert all(value.is_floating_point() for value in state.values())
