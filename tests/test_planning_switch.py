"""Planning in ``predict``: switched on and off, pure, and without a trace in any global generator."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces

from sb3_m3po import M3PO
from tests.helpers import randoms, tiny_model

ACTIONS: dict[str, spaces.Space] = {
    "box": spaces.Box(-1.0, 1.0, (2,), np.float32),
    "discrete": spaces.Discrete(3, start=1),
    "multi-discrete": spaces.MultiDiscrete([3, 2]),
    "large multi-binary": spaces.MultiBinary(9),
}
OBS = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)


@pytest.fixture(scope="module", params=list(ACTIONS))
def model(request: pytest.FixtureRequest) -> M3PO:
    """A model that has learned a little, so that its plans differ from its policy."""
    model = tiny_model(randoms(2, action_space=ACTIONS[request.param]), planner_kwargs={}).learn(96)
    return model


@pytest.fixture(scope="module")
def box_model() -> M3PO:
    return tiny_model(randoms(2, action_space=ACTIONS["box"]), planner_kwargs=dict(n_effective=4)).learn(64)


def best(model: M3PO, obs: Any = OBS) -> np.ndarray:
    actions, _ = model.predict(obs, deterministic=True)
    return actions


def test_switched_on_and_off_by_call(box_model: M3PO) -> None:
    plain = best(box_model)
    box_model.set_planning(32)
    planned = best(box_model)
    box_model.set_planning(0)
    assert not np.array_equal(plain, planned)
    assert np.array_equal(plain, best(box_model))


def test_fixed_noise_pushes_no_way(model: M3PO) -> None:
    """The same noise serves every decision: with a mean of its own it would shift all plans alike."""
    with model.set_planning(9, 2):
        best(model)
    gaussian = isinstance(model.action_space, spaces.Box)
    for (_, _, n), noise in model.policy._noise_bank.items():
        own = (n + 1) // 2
        means = th.stack([noise[:, :, :own].mean(2), noise[:, :, own:].mean(2)])
        assert (means.abs().max() < 1e-6) == gaussian


def test_one_sequence_is_that_of_the_policy(box_model: M3PO) -> None:
    """A single one has no direction but the policy's mode."""
    plain = best(box_model)
    with box_model.set_planning(1, 1):
        assert np.allclose(best(box_model), plain, atol=1e-6)


@pytest.mark.parametrize("off", [0, None])
def test_contexts_restore_what_was_before(box_model: M3PO, off: int | None) -> None:
    plain = best(box_model)
    with box_model.set_planning(32):
        outer = best(box_model)
        with box_model.set_planning(8, 1):
            inner = best(box_model)
        with box_model.set_planning(off):
            assert np.array_equal(plain, best(box_model))
        assert np.array_equal(outer, best(box_model))
    assert not np.array_equal(inner, outer)
    assert np.array_equal(plain, best(box_model))


def test_context_ends_with_an_exception(box_model: M3PO) -> None:
    plain = best(box_model)
    with pytest.raises(KeyError), box_model.set_planning(32):
        raise KeyError
    assert np.array_equal(plain, best(box_model))


def test_policy_has_the_same_switch(box_model: M3PO) -> None:
    with box_model.set_planning(32):
        expected = best(box_model)
    with box_model.policy.set_planning(32):
        assert np.array_equal(expected, box_model.policy.predict(OBS, deterministic=True)[0])


def test_deterministic_plans_are_pure(model: M3PO) -> None:
    with model.set_planning(32):
        first = best(model)
        for _ in range(4):
            model.predict(OBS)
            assert np.array_equal(first, best(model))


# Products over batches of another size round differently; the plan's temperature amplifies that a little
@pytest.mark.parametrize(("samples", "tolerance"), [(0, 1e-5), (32, 1e-2)], ids=["policy", "planned"])
def test_a_row_does_not_depend_on_its_batch(model: M3PO, samples: int, tolerance: float) -> None:
    with model.set_planning(samples):
        together = best(model)
        alone = np.stack([best(model, row) for row in OBS])
        shuffled = best(model, OBS[::-1])[::-1]
    assert np.allclose(together, alone, atol=tolerance)
    assert np.allclose(together, shuffled, atol=tolerance)


def test_more_budget_changes_the_plan(box_model: M3PO) -> None:
    plans = []
    for samples, iterations in ((8, 1), (64, 1), (64, 3)):
        with box_model.set_planning(samples, iterations):
            plans.append(best(box_model))
    assert not np.array_equal(plans[0], plans[1]) and not np.array_equal(plans[1], plans[2])


@pytest.mark.parametrize("samples", [0, 16])
def test_deterministic_predictions_draw_nothing(model: M3PO, samples: int) -> None:
    np.random.seed(1)
    torch_state, numpy_state = th.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    own_state, sampling_state = model._generator.get_state(), model._rng.bit_generator.state
    with model.set_planning(samples):
        best(model)
    assert th.equal(torch_state, th.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])  # type: ignore[index]
    assert th.equal(own_state, model._generator.get_state())
    assert sampling_state == model._rng.bit_generator.state


@pytest.mark.parametrize("samples", [0, 16])
def test_stochastic_predictions_leave_the_training_generators(model: M3PO, samples: int) -> None:
    own_state, sampling_state = model._generator.get_state(), model._rng.bit_generator.state
    with model.set_planning(samples):
        model.predict(OBS)
    assert th.equal(own_state, model._generator.get_state())
    assert sampling_state == model._rng.bit_generator.state


def test_stochastic_plans_vary_and_follow_the_global_seed(model: M3PO) -> None:
    many = np.repeat(OBS, 20, axis=0)
    with model.set_planning(16):
        th.manual_seed(3)
        first, second = model.predict(many)[0], model.predict(many)[0]
        th.manual_seed(3)
        again = model.predict(many)[0]
    assert not np.array_equal(first, second)
    assert np.array_equal(first, again)


def test_milliseconds_warn_and_work(model: M3PO) -> None:
    with pytest.warns(UserWarning, match="not reproducible"):
        switch = model.set_planning(16, milliseconds=5)
    with switch:
        assert best(model).shape == (6, *(model.action_space.shape or ()))
        model.predict(OBS)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_planning(0)


def test_milliseconds_end_with_their_context(box_model: M3PO) -> None:
    with pytest.warns(UserWarning, match="milliseconds"), box_model.set_planning(8, milliseconds=1):
        assert box_model.policy._planning_milliseconds == 1
    assert box_model.policy._planning_milliseconds is None and box_model.policy._planning is None


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (dict(samples=-4), "samples=-4 must be a whole number and not negative"),
        (dict(samples=2.5), "samples=2.5 must be a whole number"),
        (dict(iterations=0), "iterations=0 one of at least 1"),
        (dict(iterations=1.5), "iterations=1.5 one of at least 1"),
        (dict(milliseconds=0), "milliseconds=0 must be positive"),
        (dict(milliseconds=-1.0), "milliseconds=-1.0 must be positive"),
    ],
)
@pytest.mark.filterwarnings("ignore:Planning for a number")
def test_wrong_budgets(box_model: M3PO, budget: dict[str, Any], message: str) -> None:
    plain = best(box_model)
    with pytest.raises(ValueError, match=message):
        box_model.set_planning(**budget)
    assert np.array_equal(plain, best(box_model)), "a wrong budget switches nothing"


def test_true_is_the_default_budget(box_model: M3PO) -> None:
    with box_model.set_planning():
        planned = best(box_model)
    with box_model.set_planning(True):
        assert np.array_equal(planned, best(box_model))


def test_planning_of_an_untrained_model_is_harmless() -> None:
    model = tiny_model(randoms(action_space=ACTIONS["box"]))
    with model.set_planning(16):
        assert np.isfinite(best(model)).all()


def test_predict_leaves_gradients_and_modes_alone(box_model: M3PO) -> None:
    box_model.policy.set_training_mode(False)
    with box_model.set_planning(8):
        best(box_model)
    copies = (box_model.policy.bar, box_model.policy.mean)
    assert all(not p.requires_grad for copy in copies for p in copy.parameters())
    assert all(p.requires_grad for p in box_model.policy.world_model.parameters())
    assert not box_model.policy.training
