"""Every action space and every observation space trains, plans and predicts."""

import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.torch_layers import BaseFeaturesExtractor, FlattenExtractor
from stable_baselines3.common.vec_env import VecNormalize
from torch import nn

from sb3_m3po import M3PO
from sb3_m3po.observations import put
from tests.helpers import RandomEnv, randoms, tiny_model, tiny_policy_kwargs

ACTION_SPACES: dict[str, spaces.Space] = {
    "box": spaces.Box(-1.0, 1.0, (2,), np.float32),
    "asymmetric box": spaces.Box(np.array([-0.1, 3.0]), np.array([0.3, 7.0]), dtype=np.float32),
    "float64 box": spaces.Box(-3.0, 1.0, (2,), np.float64),
    "low is high": spaces.Box(np.array([-1.0, 0.5]), np.array([1.0, 0.5]), dtype=np.float32),
    "2-D box": spaces.Box(-2.0, 2.0, (2, 2), np.float32),
    "discrete": spaces.Discrete(3),
    "discrete from 5": spaces.Discrete(3, start=5),
    "discrete from -1": spaces.Discrete(2, start=-1),
    "large discrete": spaces.Discrete(100),
    "multi-discrete": spaces.MultiDiscrete([3, 2]),
    "multi-discrete from 1": spaces.MultiDiscrete([3, 2], start=[1, -4]),
    "large multi-discrete": spaces.MultiDiscrete([5, 3, 7]),
    "multi-binary": spaces.MultiBinary(3),
    "large multi-binary": spaces.MultiBinary(9),
}

VECTORS: dict[str, spaces.Space] = {
    "vector": spaces.Box(-10.0, 10.0, (4,), np.float32),
    "unbounded": spaces.Box(-np.inf, np.inf, (4,), np.float32),
    "float64": spaces.Box(-1.0, 1.0, (4,), np.float64),
    "integers": spaces.Box(-5, 5, (4,), np.int64),
    "2-D box": spaces.Box(-1.0, 1.0, (3, 2), np.float32),
    "discrete": spaces.Discrete(5),
    "multi-discrete": spaces.MultiDiscrete([3, 2, 4]),
    "multi-binary": spaces.MultiBinary(4),
}
CHANNEL_FIRST = spaces.Box(0, 255, (3, 36, 40), np.uint8)
CHANNEL_LAST = spaces.Box(0, 255, (36, 40, 3), np.uint8)
FLOAT_IMAGE = spaces.Box(0.0, 1.0, (3, 36, 36), np.float32)
DICTS: dict[str, spaces.Dict] = {
    "vectors": spaces.Dict({"a": VECTORS["vector"], "b": VECTORS["2-D box"]}),
    "kinds": spaces.Dict(
        {"box": VECTORS["vector"], "one": spaces.Discrete(3), "many": VECTORS["multi-discrete"], "bits": spaces.MultiBinary(2)}
    ),
    "images": spaces.Dict({"last": CHANNEL_LAST, "position": VECTORS["vector"]}),
}
# Cheap: SB3's extractor for images has its own wide output otherwise
SMALL_CNN = tiny_policy_kwargs(features_extractor_kwargs=dict(features_dim=16))


def received_by(model: M3PO) -> list[Any]:
    assert model.env is not None
    return [action for actions in model.env.get_attr("received") for action in actions]


def legal(action: Any, space: spaces.Space) -> bool:
    return space.contains(int(action) if isinstance(space, spaces.Discrete) else action)


def check_predictions(model: M3PO, env: RandomEnv) -> None:
    obs = np.stack([env.observation_space.sample() for _ in range(3)])
    for deterministic in (True, False):
        actions, _ = model.predict(obs, deterministic=deterministic)
        assert actions.shape == (3, *(env.action_space.shape or ()))
        assert actions.dtype == env.action_space.dtype
        assert all(legal(action, env.action_space) for action in actions)
        single, _ = model.predict(obs[0], deterministic=deterministic)
        assert legal(single, env.action_space)


@pytest.mark.parametrize("plan_rollouts", [False, True], ids=["by policy", "by plan"])
@pytest.mark.parametrize("name", ACTION_SPACES)
def test_action_space_trains_plans_and_predicts(name: str, plan_rollouts: bool) -> None:
    space = ACTION_SPACES[name]
    model = tiny_model(randoms(2, action_space=space), plan_rollouts=plan_rollouts).learn(64)
    assert model._n_updates == 32
    received = received_by(model)
    assert len(received) == 64
    assert all(legal(action, space) for action in received)
    if isinstance(space, spaces.Box):
        assert {action.dtype for action in received} == {space.dtype}
    env = RandomEnv(action_space=space)
    check_predictions(model, env)
    with model.set_planning(8, 2):
        check_predictions(model, env)


def legal_values(space: spaces.Space) -> list[set[int]]:
    """:return: The values of each factor of a discrete kind of space"""
    if isinstance(space, spaces.Discrete):
        return [set(range(int(space.start), int(space.start + space.n)))]
    if isinstance(space, spaces.MultiDiscrete):
        return [set(range(int(a), int(a + n))) for a, n in zip(space.start, space.nvec, strict=True)]
    assert isinstance(space, spaces.MultiBinary)
    return [{0, 1}] * math.prod(space.shape)


@pytest.mark.parametrize("name", ACTION_SPACES)
def test_every_action_is_tried(name: str) -> None:
    space = ACTION_SPACES[name]
    model = tiny_model(randoms(1, action_space=space), learning_starts=10_000).learn(208)
    actions = np.stack(received_by(model)).reshape(208, -1)
    if isinstance(space, spaces.Box):
        spread = np.ptp(actions, axis=0)
        assert np.all(spread[(space.high > space.low).flatten()] > 0)
        assert np.all(spread[(space.high == space.low).flatten()] == 0)
    else:
        for column, values in enumerate(legal_values(space)):
            tried = set(actions[:, column].tolist())
            assert tried <= values and len(tried) > 0.7 * len(values)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8])
def test_whole_actions_are_rounded_in_training_and_prediction_alike(dtype: type) -> None:
    low, high = (np.iinfo(dtype).min, np.iinfo(dtype).max) if dtype != np.int32 else (0, 10)
    policy = tiny_model(randoms(1, action_space=spaces.Box(low, high, (4,), dtype))).policy
    chosen = policy.unscale_action(np.array([[-1.0, 0.9999, 1.0, 0.0]], np.float32))
    middle = round((low + high) / 2)
    assert chosen.dtype == dtype and chosen.tolist() == [[low, high, high, middle]]
    action, _ = policy.predict(np.zeros(3, np.float32))
    assert action.dtype == dtype


def test_the_rollout_has_whole_actions_as_they_were_drawn() -> None:
    model = tiny_model(randoms(1, action_space=spaces.Box(-3, 4, (2,), np.int8)), learning_starts=1_000).learn(16)
    buffer = model.rollout_buffer
    assert isinstance(buffer.observations, np.ndarray)
    obs, actions = (th.as_tensor(x[:, 0]) for x in (buffer.observations, buffer.actions))
    _, log_probs, _ = model.policy.evaluate_actions(obs, actions)
    assert actions.abs().max() < 1 and np.allclose(log_probs.detach(), buffer.log_probs[:, 0], atol=1e-4)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_saturated_policy_stays_within_the_bounds(dtype: type, sign: float) -> None:
    # Among many bounds are some for which low + (high - low) rounds to more than high
    low, width = np.random.default_rng(0).normal(size=(2, 50))
    space = spaces.Box(low.astype(dtype), (low + np.abs(width)).astype(dtype), dtype=dtype)
    model = tiny_model(randoms(1, action_space=space), learning_starts=10_000)
    with th.no_grad():
        model.policy.get_parameter("world_model.actor.1.bias")[:50] = 50 * sign
    model.policy.average(restart=True)
    model.learn(16)
    action, _ = model.predict(np.zeros(3, np.float32), deterministic=True)
    for chosen in (action, *received_by(model)):
        assert np.all(chosen <= space.high) and np.all(chosen >= space.low), np.max([chosen - space.high, space.low - chosen])


@pytest.mark.parametrize("name", VECTORS)
def test_vector_observations(name: str) -> None:
    space = VECTORS[name]
    model = tiny_model(randoms(2, observation_space=space), plan_rollouts=True).learn(64)
    assert model._n_updates == 32
    check_predictions(model, RandomEnv(space))
    stored = model.replay_buffer.observations[""]
    assert stored.shape[2:] == (space.shape or ())
    assert stored.dtype == (np.float32 if space.dtype == np.float64 else space.dtype)


@pytest.mark.parametrize("space", [CHANNEL_FIRST, CHANNEL_LAST], ids=["channel first", "channel last"])
def test_images_are_stored_once_as_bytes(space: spaces.Box) -> None:
    model = tiny_model(randoms(1, observation_space=space), "CnnPolicy", policy_kwargs=SMALL_CNN).learn(32)
    assert model._n_updates == 16
    check_predictions(model, RandomEnv(space))
    memory = model.replay_buffer
    stored = memory.observations[""]
    assert stored.dtype == np.uint8 and stored.shape[2:] == (3, 36, 40)
    # One slot per transition, and the last observations of six episodes in a pool
    assert set(memory.observations) == {""}
    assert len(memory.final_pool[""]) - len(memory.free_finals) == 6


@pytest.mark.parametrize("key", ["last", None])
def test_stored_image_is_the_image_that_was_seen(key: str | None) -> None:
    space = DICTS["images"] if key else CHANNEL_LAST
    policy = "MultiInputPolicy" if key else "CnnPolicy"
    kwargs = tiny_policy_kwargs(features_extractor_kwargs=dict(cnn_output_dim=16)) if key else SMALL_CNN
    model = tiny_model(randoms(1, observation_space=space), policy, policy_kwargs=kwargs).learn(16)
    seen: Any = model.rollout_buffer.observations
    stored = model.replay_buffer.observations[key or ""]
    assert np.array_equal(stored[:16], (seen[key] if key else seen).astype(np.uint8))


def test_float_images_need_normalize_images_off() -> None:
    kwargs = {**SMALL_CNN, "normalize_images": False}
    model = tiny_model(randoms(1, observation_space=FLOAT_IMAGE), "CnnPolicy", policy_kwargs=kwargs, plan_rollouts=True)
    model.learn(32)
    assert model._n_updates == 16
    check_predictions(model, RandomEnv(FLOAT_IMAGE))
    assert model.replay_buffer.observations[""].dtype == np.float32
    # It is an image: the extractor sees it as it is
    assert len(model.policy.norms) == 0


@pytest.mark.parametrize("name", DICTS)
def test_dict_observations(name: str) -> None:
    space = DICTS[name]
    kwargs = tiny_policy_kwargs(features_extractor_kwargs=dict(cnn_output_dim=16))
    env = randoms(2, observation_space=space)
    model = tiny_model(env, "MultiInputPolicy", policy_kwargs=kwargs, plan_rollouts=True).learn(64)
    assert model._n_updates == 32
    env.seed(0)
    obs: Any = env.reset()
    for deterministic in (True, False):
        with model.set_planning(8):
            actions, _ = model.predict(obs, deterministic=deterministic)
        assert actions.shape == (2,)
    stored = model.replay_buffer.observations
    assert {key: array.dtype for key, array in stored.items()} == {key: part.dtype for key, part in space.items()}


def test_vectors_are_normalised_and_images_are_not() -> None:
    kwargs = tiny_policy_kwargs(features_extractor_kwargs=dict(cnn_output_dim=16))
    model = tiny_model(randoms(1, observation_space=DICTS["images"]), "MultiInputPolicy", policy_kwargs=kwargs)
    assert set(model.policy.norms) == {"position"}
    model.learn(32)
    assert model.policy.state_dict()["norms.position.count"] == 32


class Embedded(BaseFeaturesExtractor):
    """Takes whole numbers as they are."""

    def __init__(self, space: spaces.Box):
        super().__init__(space, 4)
        self.embedding = nn.Embedding(10, 4)

    def forward(self, x: th.Tensor) -> th.Tensor:
        assert x.equal(x.round())
        return self.embedding(x.long()).mean(1)


@pytest.mark.parametrize("dtype", [np.uint8, np.int64])
def test_whole_vectors_are_seen_as_vec_normalize_makes_them(dtype: type) -> None:
    env = VecNormalize(randoms(2, observation_space=spaces.Box(0, 200, (3,), dtype)), norm_reward=False)
    model = tiny_model(env).learn(64)
    # Normalised, so neither whole nor all positive; and so are the statistics of it
    seen = model.rollout_buffer.observations
    assert isinstance(seen, np.ndarray) and seen.min() < -0.1 and np.abs(seen - np.rint(seen)).max() > 0.1
    assert model.policy.norms["observation"].get_buffer("mean").abs().max() < 1
    # The last observation of an episode comes back from it whole, not cut off
    stored: np.ndarray = np.zeros((1, 3), dtype)
    put(stored, 0, np.array([0.9999, 2.0001, 5.0], np.float32))
    assert stored.tolist() == [[1, 2, 5]]


class Attentive(FlattenExtractor):
    """Notes whether it was in training mode, and whether a gradient was wanted."""

    seen: ClassVar[set[tuple[bool, bool]]] = set()

    def forward(self, observations: th.Tensor) -> th.Tensor:
        self.seen.add((self.training, th.is_grad_enabled()))
        return super().forward(observations)


def test_a_features_extractor_is_in_training_mode_where_it_learns_only() -> None:
    Attentive.seen.clear()
    tiny_model(randoms(1), policy_kwargs=tiny_policy_kwargs(features_extractor_class=Attentive)).learn(64)
    assert Attentive.seen == {(True, True), (False, False)}


def test_a_features_extractor_may_see_observations_as_they_are() -> None:
    kwargs = tiny_policy_kwargs(features_extractor_class=Embedded, normalize_observations=False)
    model = tiny_model(RandomEnv(spaces.Box(0, 9, (2,), np.int64)), policy_kwargs=kwargs).learn(64)
    assert model._n_updates > 0 and len(model.policy.norms) == 0
