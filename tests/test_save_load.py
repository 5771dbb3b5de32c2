"""Saving and loading: the zip, the memory, both of them, the policy alone; going on afterwards."""

import io
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.torch_layers import FlattenExtractor
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_m3po import M3PO, CnnPolicy, MultiInputPolicy, WorldModelPolicy
from tests.helpers import (
    RandomEnv,
    assert_same_model,
    assert_same_tensors,
    counters,
    randoms,
    tiny_model,
    tiny_policy_kwargs,
)

BOX_ACTION = spaces.Box(-1.0, 1.0, (2,), np.float32)
ACTIONS: dict[str, spaces.Space] = {
    "box": BOX_ACTION,
    "discrete": spaces.Discrete(3, start=1),
    "large multi-discrete": spaces.MultiDiscrete([5, 3, 7]),
    "multi-binary": spaces.MultiBinary(3),
}


def saved_and_loaded(model: M3PO, path: Path, env: Any, **kwargs: Any) -> M3PO:
    """:return: A copy out of the zip and the memory's file, with the generators of the first"""
    model.save(path / "model")
    model.save_replay_buffer(path / "memory")
    other = M3PO.load(path / "model", env=env, device="cpu", **kwargs)
    other.load_replay_buffer(path / "memory", truncate_last_traj=False)
    other._generator.set_state(model._generator.get_state())
    other._rng.bit_generator.state = model._rng.bit_generator.state
    return other


def logged_by_training(model: M3PO) -> dict[str, float]:
    """Make one call of train() with updates, and return what it logs."""
    model._update_credits += 16
    model.logger.name_to_value.clear()
    model.logger.name_to_count.clear()
    model.train()
    values = dict(model.logger.name_to_value)
    # Of the rollout, which is not saved
    values.pop("train/explained_variance")
    return values


@pytest.mark.parametrize("extras", [{}, dict(bonus_coef=0.5, plan_rollouts=True)], ids=["plain", "exploring"])
@pytest.mark.parametrize("name", ACTIONS)
def test_next_train_is_equal_to_the_bit(name: str, extras: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(randoms(2, action_space=ACTIONS[name]), **extras).learn(64)
    other = saved_and_loaded(model, tmp_path, randoms(2, action_space=ACTIONS[name]))
    other.set_logger(model.logger)
    assert_same_model(model, other)
    first, second = logged_by_training(model), logged_by_training(other)
    assert any(key.startswith("world_model/") for key in first)
    assert first == second
    assert_same_model(model, other)


def test_next_train_is_equal_to_the_bit_with_vec_normalize(tmp_path: Path) -> None:
    env = VecNormalize(randoms(2), norm_reward=False)
    model = tiny_model(env).learn(64)
    env.save(str(tmp_path / "statistics"))
    other = saved_and_loaded(model, tmp_path, VecNormalize.load(str(tmp_path / "statistics"), randoms(2)))
    other.set_logger(model.logger)
    assert logged_by_training(model) == logged_by_training(other)
    assert_same_model(model, other)


def test_everything_learned_is_saved(tmp_path: Path) -> None:
    """Temperature, multiplier, scales, statistics, bars and counters must have moved, or the test above shows nothing."""
    model = tiny_model(randoms(2, action_space=BOX_ACTION), bonus_coef=0.5).learn(64)
    fresh = tiny_model(randoms(2, action_space=BOX_ACTION))
    state, initial = model.policy.state_dict(), fresh.policy.state_dict()
    for name in ("log_ent_coef", "log_kl_coef", "return_scale", "bar_scale", "q_range", "gap_median", "lag_correlation"):
        assert not th.equal(state[name], initial[name]), name
    for name in (
        "scale_is_known",
        "norms.observation.mean",
        "norms.observation.scale",
        "bar.actor.1.weight",
        "mean.n_averaged",
        "mean.module.1.actor.1.weight",
        "world_model.can_terminate",
    ):
        assert not th.equal(state[name], initial[name]), name
    assert model._n_updates > 0
    model.save(tmp_path / "model")
    other = M3PO.load(tmp_path / "model", device="cpu")
    assert_same_model(model, other)


def test_pending_updates_are_saved(tmp_path: Path) -> None:
    model = tiny_model(randoms(), sync_interval=12).learn(32)
    assert model._update_credits == 4
    model.save(tmp_path / "model")
    assert M3PO.load(tmp_path / "model")._update_credits == 4


def test_never_terminated_flag_is_saved(tmp_path: Path) -> None:
    # Episode 1 terminates after 40 steps: the flag must be what it was before, and must change afterwards
    model = tiny_model(counters(length=40)).learn(32)
    other = saved_and_loaded(model, tmp_path, counters(length=40))
    assert not other.replay_buffer.has_terminated
    assert float(other.policy.world_model.can_terminate) == 0
    other.learn(48)
    other = saved_and_loaded(other, tmp_path, counters(length=40))
    assert other.replay_buffer.has_terminated
    assert float(other.policy.world_model.can_terminate) == 1


def test_zip_alone_remembers_that_the_task_terminates(tmp_path: Path) -> None:
    model = tiny_model(counters()).learn(32)
    model.save(tmp_path / "model")
    other = M3PO.load(tmp_path / "model", env=counters(length=1_000))
    other.learn(32, reset_num_timesteps=False)
    assert float(other.policy.world_model.can_terminate) == 1


def test_zip_holds_neither_memory_nor_generators(tmp_path: Path) -> None:
    small = tiny_model(randoms(observation_space=spaces.Box(-1, 1, (100,), np.float32)), learning_starts=10_000).learn(16)
    small.save(tmp_path / "before.zip")
    small.learn(320, reset_num_timesteps=False).save(tmp_path / "after.zip")
    growth = (tmp_path / "after.zip").stat().st_size - (tmp_path / "before.zip").stat().st_size
    # 320 observations of 400 bytes
    assert growth < 30_000
    assert {"_generator", "_rng", "rollout_buffer", "policy", "env"} <= set(small._excluded_save_params())


def test_state_dict_holds_non_empty_floats_only() -> None:
    for action_space in ACTIONS.values():
        for name, value in tiny_model(randoms(action_space=action_space)).policy.state_dict().items():
            assert value.is_floating_point() and value.numel() > 0, name


# ----------------------------------------------------------------- going on


@pytest.mark.parametrize(("before", "after"), [(1, 3), (3, 1)])
def test_other_number_of_environments(before: int, after: int, tmp_path: Path) -> None:
    model = tiny_model(randoms(before), n_steps=None).learn(256)
    model.save(tmp_path / "model")
    model.save_replay_buffer(tmp_path / "memory")
    other = M3PO.load(tmp_path / "model", env=randoms(after))
    assert other.n_envs == after
    assert other.rollout_buffer.buffer_size == 256 // after
    with pytest.raises(ValueError, match=f"saved with {before} environments, the model has {after}"):
        other.load_replay_buffer(tmp_path / "memory")
    other.learn(256, reset_num_timesteps=False)
    assert other._n_updates > model._n_updates


def test_set_env(tmp_path: Path) -> None:
    model = tiny_model(randoms()).learn(32)
    model.set_env(randoms())
    model.learn(32, reset_num_timesteps=False)
    assert model.num_timesteps == 64 and model._n_updates == 32
    with pytest.raises(AssertionError, match="number of environments"):
        model.set_env(randoms(2))
    with pytest.raises(ValueError, match="Observation spaces do not match"):
        model.set_env(randoms(observation_space=spaces.Box(-1, 1, (7,), np.float32)))


def test_loaded_without_environment(tmp_path: Path) -> None:
    model = tiny_model(randoms()).learn(32)
    model.save(tmp_path / "model")
    other = M3PO.load(tmp_path / "model")
    obs = np.zeros(3, np.float32)
    assert model.predict(obs, deterministic=True)[0] == other.predict(obs, deterministic=True)[0]
    other.set_env(randoms())
    other.learn(32, reset_num_timesteps=False)
    assert other.num_timesteps == 64


def test_continued_with_the_memory_learns_at_once(tmp_path: Path) -> None:
    model = tiny_model(randoms(), learning_starts=64).learn(64)
    other = saved_and_loaded(model, tmp_path, randoms())
    other.learn(16, reset_num_timesteps=False)
    assert other.num_timesteps == 80
    assert other.replay_buffer.size() == 80
    assert other._n_updates == model._n_updates + 8


def test_continued_without_the_memory_refills_it_first(tmp_path: Path) -> None:
    model = tiny_model(randoms(), learning_starts=64).learn(64)
    model.save(tmp_path / "model")
    other = M3PO.load(tmp_path / "model", env=randoms())
    before = {key: value.clone() for key, value in other.policy.world_model.state_dict().items()}
    other.learn(48, reset_num_timesteps=False)
    assert other.replay_buffer.size() == 48
    assert other._n_updates == model._n_updates
    # It acts by the loaded policy, which is unchanged
    assert_same_tensors(before, dict(other.policy.world_model.state_dict()))
    after, count = dict(other.policy.state_dict()), "norms.observation.count"
    assert after[count] > model.policy.state_dict()[count]
    other.learn(16, reset_num_timesteps=False)
    assert other._n_updates > model._n_updates


def test_saved_trajectory_goes_on_unless_it_is_cut(tmp_path: Path) -> None:
    model = tiny_model(counters(length=100), learning_starts=10_000).learn(16)
    model.save_replay_buffer(tmp_path / "memory")
    model.load_replay_buffer(tmp_path / "memory", truncate_last_traj=True)
    assert model.replay_buffer.truncated[15, 0]
    model.load_replay_buffer(tmp_path / "memory", truncate_last_traj=False)
    assert not model.replay_buffer.truncated[15, 0]
    model.learn(16, reset_num_timesteps=False)
    assert not model.replay_buffer.truncated[15, 0]


def test_checkpoints_hold_model_and_memory(tmp_path: Path) -> None:
    model = tiny_model(randoms())
    model.learn(64, callback=CheckpointCallback(32, str(tmp_path), save_replay_buffer=True))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {
        *(f"rl_model_{n}_steps.zip" for n in (32, 64)),
        *(f"rl_model_replay_buffer_{n}_steps.pkl" for n in (32, 64)),
    }
    other = M3PO.load(tmp_path / "rl_model_32_steps", env=randoms())
    other.load_replay_buffer(tmp_path / "rl_model_replay_buffer_32_steps")
    other.learn(32, reset_num_timesteps=False)
    assert other._n_updates > 8


def test_load_with_other_arguments(tmp_path: Path) -> None:
    model = tiny_model(randoms()).learn(32)
    model.save(tmp_path / "model")
    other = M3PO.load(tmp_path / "model", env=randoms(), utd_ratio=1.0, learning_rate=0.0, target_kl=None, buffer_size=50)
    assert other.utd_ratio == 1.0 and other.target_kl is None and other.replay_buffer.capacity == 50
    before = {key: value.clone() for key, value in other.policy.world_model.actor.state_dict().items()}
    other.learn(32, reset_num_timesteps=False)
    assert other._n_updates == model._n_updates + 32
    assert_same_tensors(before, dict(other.policy.world_model.actor.state_dict()))
    with pytest.raises(ValueError, match="policy kwargs"):
        M3PO.load(tmp_path / "model", policy_kwargs=tiny_policy_kwargs(latent_dim=8))


@pytest.mark.parametrize("ent_coef", [0.03, 0.0, "0.03"])
def test_load_with_a_given_entropy_coefficient(ent_coef: float | str, tmp_path: Path) -> None:
    tiny_model(randoms()).learn(32).save(tmp_path / "model")
    model = M3PO.load(tmp_path / "model", env=randoms(), ent_coef=ent_coef).learn(32, reset_num_timesteps=False)
    assert model.policy.log_ent_coef.exp().item() == pytest.approx(float(ent_coef))


def test_custom_objects_may_replace_the_schedule(tmp_path: Path) -> None:
    tiny_model(randoms(), learning_rate=lambda progress: 1e-3 * progress).save(tmp_path / "model")
    objects = {"learning_rate": 0.0, "lr_schedule": lambda _: 0.0, "clip_range": lambda _: 0.0}
    model = M3PO.load(tmp_path / "model", custom_objects=objects)
    assert model.lr_schedule(1) == 0.0


def test_files_may_be_objects() -> None:
    model = tiny_model(randoms()).learn(32)
    zipped, memory = io.BytesIO(), io.BytesIO()
    model.save(zipped)
    model.save_replay_buffer(memory)
    zipped.seek(0)
    memory.seek(0)
    other = M3PO.load(zipped, env=randoms())
    other.load_replay_buffer(memory)
    assert other.replay_buffer.size() == 32


def test_own_settings_stay_as_given(tmp_path: Path) -> None:
    policy_kwargs = tiny_policy_kwargs(features_extractor_kwargs={})
    copy_of_it = {**policy_kwargs, "features_extractor_kwargs": {}}
    model = tiny_model(randoms(), policy_kwargs=policy_kwargs)
    assert policy_kwargs == copy_of_it and model.policy_kwargs == copy_of_it


# --------------------------------------------------------------- parameters


def test_set_parameters_copies_everything_learned() -> None:
    model = tiny_model(randoms(action_space=BOX_ACTION)).learn(32)
    other = tiny_model(randoms(action_space=BOX_ACTION), seed=1)
    parameters: Any = model.get_parameters()
    assert list(parameters) == ["policy", "policy.optimizer", "policy.model_optimizer", "policy.coef_optimizer"]
    other.set_parameters(parameters)
    assert_same_tensors(dict(model.policy.state_dict()), dict(other.policy.state_dict()))
    for name in ("optimizer", "model_optimizer", "coef_optimizer"):
        assert_same_tensors(getattr(model.policy, name).state_dict(), getattr(other.policy, name).state_dict())


def test_set_parameters_wants_all_unless_told() -> None:
    model = tiny_model(randoms())
    parameters: Any = model.get_parameters()
    parameters.pop("policy.model_optimizer")
    with pytest.raises(ValueError, match="model_optimizer"):
        model.set_parameters(parameters)
    model.set_parameters(parameters, exact_match=False)


class ScaledExtractor(FlattenExtractor):
    """Multiplies by a constant, an argument of its own."""

    def __init__(self, observation_space: gym.Space, factor: float = 1.0):
        super().__init__(observation_space)
        self.factor = factor

    def forward(self, observations: th.Tensor) -> th.Tensor:
        return self.factor * super().forward(observations)


OTHER_ARGUMENTS: dict[str, Any] = dict(
    net_arch=dict(pi=[24, 16], vf=[12]),
    activation_fn=nn.ELU,
    log_std_init=-0.7,
    features_extractor_class=ScaledExtractor,
    features_extractor_kwargs=dict(factor=2.0),
    share_features_extractor=True,
    normalize_images=False,
    normalize_observations=False,
    optimizer_class=th.optim.Adam,
    optimizer_kwargs=dict(weight_decay=0.01),
    latent_dim=24,
    encoder_arch=[12, 16],
    model_arch=[16, 24],
    n_critics=3,
    pessimism=0.3,
    task_embedding_dim=7,
    task_key="which",
    n_tasks=2,
    gamma=0.9,
    time_limit=50,
    planner_kwargs=dict(n_samples=16, horizon=2, min_std=0.2),
)


def test_policy_alone_keeps_every_argument(tmp_path: Path) -> None:
    env = RandomEnv(action_space=BOX_ACTION)
    policy = WorldModelPolicy(env.observation_space, env.action_space, lambda _: 1e-3, **OTHER_ARGUMENTS)
    policy.save(str(tmp_path / "policy"))
    other = WorldModelPolicy.load(str(tmp_path / "policy"))
    parameters = other._get_constructor_parameters()
    assert {name: parameters[name] for name in OTHER_ARGUMENTS} == OTHER_ARGUMENTS
    assert isinstance(other.features_extractor, ScaledExtractor) and other.features_extractor.factor == 2.0
    assert_same_tensors(dict(policy.state_dict()), dict(other.state_dict()))
    obs = np.tile(np.array([1, 0, 1], np.float32), (4, 1))  # the last two say the task
    assert np.array_equal(policy.predict(obs, deterministic=True)[0], other.predict(obs, deterministic=True)[0])
    with policy.set_planning(16), other.set_planning(16):
        assert np.array_equal(policy.predict(obs, deterministic=True)[0], other.predict(obs, deterministic=True)[0])


def test_all_arguments_of_the_policy_are_tried_above() -> None:
    import inspect

    names = set(inspect.signature(WorldModelPolicy.__init__).parameters)
    assert names == {"self", "observation_space", "action_space", "lr_schedule", "use_sde", *OTHER_ARGUMENTS}


@pytest.mark.parametrize("policy_class", [CnnPolicy, MultiInputPolicy])
def test_policy_alone_of_images_and_dicts(policy_class: type[WorldModelPolicy], tmp_path: Path) -> None:
    space: spaces.Space = spaces.Box(0, 255, (3, 36, 36), np.uint8)
    space = spaces.Dict({"image": space}) if policy_class is MultiInputPolicy else space
    policy = policy_class(space, BOX_ACTION, lambda _: 1e-3, **tiny_policy_kwargs())
    policy.save(str(tmp_path / "policy"))
    other = policy_class.load(str(tmp_path / "policy"))
    obs = space.sample()
    assert np.array_equal(policy.predict(obs, deterministic=True)[0], other.predict(obs, deterministic=True)[0])


@pytest.mark.parametrize("name", ACTIONS)
def test_any_weights_give_finite_repeatable_actions(name: str) -> None:
    model = tiny_model(randoms(action_space=ACTIONS[name]))
    generator = th.Generator().manual_seed(0)
    model.policy.load_state_dict({k: th.rand(v.shape, generator=generator) for k, v in model.policy.state_dict().items()})
    obs = np.ones((2, 3), np.float32)
    for samples in (0, 8):
        with model.set_planning(samples):
            first, second = (model.predict(obs, deterministic=True)[0] for _ in range(2))
            assert np.isfinite(first).all() and np.array_equal(first, second)


def test_unseeded_models_draw_different_noise() -> None:
    first, second = (tiny_model(randoms(), seed=None) for _ in range(2))
    assert not th.equal(first._generator.get_state(), second._generator.get_state())
