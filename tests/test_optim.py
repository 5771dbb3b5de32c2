"""The optimizer must be torch's AdamW to the bit, whatever happens to its state."""

import copy
import io

import pytest
import torch as th

from sb3_m3po.optim import FusedAdamW


def parameters() -> list[th.nn.Parameter]:
    generator = th.Generator().manual_seed(0)
    return [th.nn.Parameter(th.randn(shape, generator=generator)) for shape in ((3, 4), (5,), ())]


def groups(params: list[th.nn.Parameter]) -> list[dict]:
    return [dict(params=params[:2], lr=1e-2), dict(params=params[2:], lr=3e-2)]


def pair() -> tuple[FusedAdamW, th.optim.AdamW]:
    """:return: The optimizer and torch's, of equal parameters in two groups"""
    return FusedAdamW(groups(parameters())), th.optim.AdamW(groups(parameters()), weight_decay=1e-4, fused=True)


def learned(optimizer: th.optim.Optimizer) -> list[th.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def take_steps(optimizer: th.optim.Optimizer, n: int, seed: int = 0, without: int | None = None) -> None:
    """Steps along random gradients; parameter ``without`` has none."""
    generator = th.Generator().manual_seed(seed)
    for _ in range(n):
        for i, parameter in enumerate(learned(optimizer)):
            gradient = th.randn(parameter.shape, generator=generator)
            parameter.grad = None if i == without else gradient
        optimizer.step()


def assert_equal(one: th.optim.Optimizer, other: th.optim.Optimizer) -> None:
    assert all(map(th.equal, learned(one), learned(other)))
    states = one.state_dict()["state"], other.state_dict()["state"]
    assert states[0].keys() == states[1].keys()
    for key, state in states[0].items():
        for name, value in state.items():
            assert th.equal(value, states[1][key][name]), name


@pytest.mark.parametrize("without", [None, 0, 2])
def test_equals_torch(without: int | None) -> None:
    optimizers = pair()
    for optimizer in optimizers:
        take_steps(optimizer, 5)
        take_steps(optimizer, 3, seed=1, without=without)
        optimizer.param_groups[0]["lr"] = 5e-3
        take_steps(optimizer, 5, seed=2)
    assert_equal(*optimizers)


def test_a_parameter_that_never_takes_part() -> None:
    optimizers = pair()
    for optimizer in optimizers:
        take_steps(optimizer, 5, without=1)
    assert_equal(*optimizers)


def test_some_parameters_move_less_often() -> None:
    optimizers = pair()
    for optimizer in optimizers:
        for seed, without in enumerate((0, None, 0, None, 0, 2, None, 0, None)):
            take_steps(optimizer, 1, seed, without)
    assert_equal(*optimizers)
    mine = optimizers[0]
    # After their ways have parted for the last time, each way has a list of its own in its group
    assert sorted(len(packed.params) for packed in mine._packed) == [1, 1, 1]


def test_goes_on_after_loading() -> None:
    mine, torchs = pair()
    take_steps(mine, 4)
    early = io.BytesIO()
    th.save((mine.state_dict(), [parameter.detach() for parameter in learned(mine)]), early)
    take_steps(mine, 4, seed=1)
    late = copy.deepcopy(mine.state_dict())
    early.seek(0)
    state, values = th.load(early)
    # A state that is replaced before it was used must leave nothing behind
    mine.load_state_dict(late)
    mine.load_state_dict(state)
    with th.no_grad():
        for parameter, value in zip(learned(mine), values, strict=True):
            parameter.copy_(value)
    take_steps(mine, 4, seed=2)
    take_steps(torchs, 4)
    take_steps(torchs, 4, seed=2)
    assert_equal(mine, torchs)


def test_a_copy_is_on_its_own() -> None:
    mine, torchs = pair()
    take_steps(mine, 4)
    other = copy.deepcopy(mine)
    take_steps(other, 7, seed=3)
    take_steps(mine, 4, seed=1)
    take_steps(torchs, 4)
    take_steps(torchs, 4, seed=1)
    assert_equal(mine, torchs)


def test_closure_and_new_group() -> None:
    mine, torchs = pair()
    results = []
    for optimizer in (mine, torchs):
        take_steps(optimizer, 2)
        optimizer.add_param_group(dict(params=[th.nn.Parameter(th.ones(3))], lr=1e-1))
        take_steps(optimizer, 3)
        results.append(optimizer.step(lambda: 7.0))
    assert results == [7.0, 7.0]
    assert_equal(mine, torchs)
