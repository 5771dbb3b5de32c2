"""Bad input: the error names what was given and what to do, as early as possible."""

from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.buffers import DictRolloutBuffer, RolloutBuffer
from stable_baselines3.common.callbacks import CheckpointCallback
from stable_baselines3.common.policies import ActorCriticPolicy
from stable_baselines3.common.save_util import save_to_pkl
from stable_baselines3.common.vec_env import DummyVecEnv, VecFrameStack, VecNormalize

from sb3_m3po import M3PO, HybridDictRolloutBuffer, HybridRolloutBuffer, MlpPolicy
from tests.helpers import VECTOR, BrokenEnv, RandomEnv, assert_same_tensors, randoms, tiny_model, tiny_policy_kwargs

BOX_ACTION = spaces.Box(-1.0, 1.0, (2,), np.float32)
FLOAT_MAX = float(np.finfo(np.float32).max)


# ------------------------------------------------------------------- spaces


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Tuple((VECTOR, VECTOR)), "Tuple.*not supported.*Dict"),
        (spaces.Text(5), "Text.*not supported"),
        (spaces.Dict({"say": spaces.Text(5)}), "Text.*under key 'say'.*not supported"),
        (spaces.Dict({"inner": spaces.Tuple((VECTOR,))}), "Tuple.*under key 'inner'.*not supported"),
        (spaces.Dict({"inner": spaces.Dict({"vector": VECTOR})}), "under key 'inner'.*nested Dicts must be flattened"),
        (spaces.MultiDiscrete(np.array([[2, 3], [4, 5]])), "(?s)MultiDiscrete.*flatten its `nvec`"),
        (spaces.Discrete(3, start=1), "Discrete.*subtract `start`"),
        (spaces.Dict({"nothing": spaces.Box(-1.0, 1.0, (0,)), "vector": VECTOR}), "under key 'nothing'.*it is empty"),
        (spaces.Dict({"n": spaces.MultiDiscrete([2, 3], start=[0, 1])}), "under key 'n'.*subtract `start`"),
        (spaces.Box(-1.0, 1.0, ()), r"Box.*shape of \(1,\)"),
    ],
    ids=[
        *("tuple", "text", "text in dict", "tuple in dict", "nested dict", "matrix of numbers", "discrete from 1"),
        *("empty in dict", "numbers from 1 in dict", "scalar"),
    ],
)
def test_observation_spaces(space: spaces.Space, message: str) -> None:
    # Of nested spaces SB3 says that they are not implemented
    with pytest.raises(NotImplementedError if "'inner'" in message else ValueError, match=message):
        tiny_model(RandomEnv(space), "MultiInputPolicy" if isinstance(space, spaces.Dict) else "MlpPolicy")


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Box(-np.inf, np.inf, (2,), np.float32), "Box.*finite lower and upper bound.*TransformAction"),
        (spaces.Box(np.array([-1.0, 0.0]), np.array([1.0, np.inf]), dtype=np.float64), "finite lower and upper bound"),
        (spaces.Box(-FLOAT_MAX, FLOAT_MAX, (2,), np.float32), "finite lower and upper bound"),
        (spaces.Box(-1.0, 1.0, (0,), np.float32), "must have a dimension"),
        (spaces.MultiDiscrete(np.array([[2, 3], [4, 5]])), r"(?s)[Mm]ulti-dimensional MultiDiscrete.*\[2 3\].*flatten"),
        (spaces.MultiBinary([2, 3]), r"[Mm]ulti-dimensional MultiBinary.*flatten"),
        (spaces.Tuple((spaces.Discrete(2), spaces.Discrete(3))), "Tuple.*not supported: use Box, Discrete"),
        (spaces.Dict({"a": spaces.Discrete(2)}), "Dict.*not supported: use Box, Discrete"),
    ],
    ids=[
        "unbounded",
        "half bounded",
        "as good as unbounded",
        "without dimensions",
        "multi-discrete",
        "multi-binary",
        "tuple",
        "dict",
    ],
)
def test_action_spaces(space: spaces.Space, message: str) -> None:
    # SB3 asserts that of a MultiBinary itself
    with pytest.raises(AssertionError if isinstance(space, spaces.MultiBinary) else ValueError, match=message):
        tiny_model(RandomEnv(action_space=space))


@pytest.mark.parametrize("policy", ["MlpPolicy", "CnnPolicy", MlpPolicy], ids=["MlpPolicy", "CnnPolicy", "class"])
def test_dict_observations_need_their_policy(policy: Any) -> None:
    with pytest.raises(ValueError, match="MultiInputPolicy"):
        tiny_model(RandomEnv(spaces.Dict({"a": VECTOR})), policy)


def test_environments_that_need_a_wrapper(tmp_path: Path) -> None:
    vectorised = gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode="sync")
    model = tiny_model(randoms())
    model.save(tmp_path / "model")
    given: Any
    for given, message in (
        (vectorised, r"SyncVectorEnv.*sb3_m3po\.VectorEnvAdapter"),
        (["CartPole-v1", "Acrobot-v1"], r"\['CartPole-v1', 'Acrobot-v1'\].*sb3_m3po\.make_multitask_vec_env\(tasks"),
    ):
        for use in (tiny_model, model.set_env, model.add_tasks, lambda env: M3PO.load(tmp_path / "model", env=env)):
            with pytest.raises(ValueError, match=message):
                use(given)
    with pytest.raises(ValueError, match=r"\['Acrobot-v1'\].*make_multitask_vec_env\(tasks, like=model\)"):
        model.add_tasks(given[1])


# ----------------------------------------------------------------- features


def test_use_sde_as_a_policy_argument() -> None:
    with pytest.raises(ValueError, match=r"State-Dependent Exploration.*use_sde=False"):
        tiny_model(randoms(action_space=BOX_ACTION), policy_kwargs=tiny_policy_kwargs(use_sde=True))


def test_use_sde_as_an_argument() -> None:
    tiny_model(randoms(action_space=BOX_ACTION), use_sde=False)
    with pytest.raises(ValueError, match=r"State-Dependent Exploration.*use_sde=False"):
        M3PO("MlpPolicy", randoms(action_space=BOX_ACTION), use_sde=True)


def test_dict_policy_without_dict_observations() -> None:
    with pytest.raises(ValueError, match=r"MultiInputPolicy needs a Dict observation space, not Box.*'MlpPolicy'"):
        tiny_model(randoms(), "MultiInputPolicy")


@pytest.mark.parametrize("name", ["gamma", "planner_kwargs"])
def test_arguments_in_the_wrong_place(name: str) -> None:
    with pytest.raises(ValueError, match=rf"policy_kwargs hold \['{name}'\]: pass them to M3PO itself"):
        tiny_model(randoms(), policy_kwargs={name: None})


def test_net_arch_of_another_algorithm() -> None:
    with pytest.raises(ValueError, match=r"\['qf'\]: its keys are 'pi' and 'vf'"):
        tiny_model(randoms(), policy_kwargs=tiny_policy_kwargs(net_arch=dict(pi=[16], qf=[16])))


def test_separate_features_extractors() -> None:
    with pytest.raises(ValueError, match="share_features_extractor=True"):
        tiny_model(randoms(), policy_kwargs=tiny_policy_kwargs(share_features_extractor=False))


@pytest.mark.parametrize("buffer", [RolloutBuffer, DictRolloutBuffer, HybridDictRolloutBuffer, "RolloutBuffer"])
def test_rollout_buffer_of_another_kind(buffer: Any) -> None:
    with pytest.raises(
        ValueError, match=r"RolloutBuffer'? is no HybridRolloutBuffer, the buffer with a replay memory for Box"
    ):
        tiny_model(randoms(), rollout_buffer_class=buffer)


def test_rollout_buffer_without_dicts() -> None:
    env = RandomEnv(spaces.Dict({"vector": VECTOR}))
    with pytest.raises(ValueError, match=r"HybridRolloutBuffer is no HybridDictRolloutBuffer.*Dict observations"):
        tiny_model(env, "MultiInputPolicy", rollout_buffer_class=HybridRolloutBuffer)


@pytest.mark.parametrize("policy", [ActorCriticPolicy, object])
def test_policy_of_another_kind(policy: Any) -> None:
    with pytest.raises(ValueError, match=rf"must subclass WorldModelPolicy.*{policy.__name__}.*'MlpPolicy'"):
        tiny_model(randoms(), policy)


def test_unknown_policy_name() -> None:
    with pytest.raises(ValueError, match="LstmPolicy"):
        tiny_model(randoms(), "LstmPolicy")


@pytest.mark.parametrize("name", ["horizon", "n_step_returns"])
@pytest.mark.parametrize(("buffer_size", "n_envs"), [(4, 1), (16, 4)])
def test_horizon_longer_than_the_memory(name: str, buffer_size: int, n_envs: int) -> None:
    with pytest.raises(ValueError, match=rf"{name}=5.*4 steps per environment.*buffer_size={buffer_size}"):
        tiny_model(randoms(n_envs), buffer_size=buffer_size, **{name: 5})


def test_frames_stacked_around_vec_normalize() -> None:
    # The raw frames are not stacked: what was seen can't be had without normalisation
    env = VecFrameStack(VecNormalize(randoms(), norm_reward=False), 2)
    with pytest.raises(ValueError, match=r"VecNormalize\(VecFrameStack"):
        tiny_model(env)


# ---------------------------------------------------------------- arguments

NAN = float("nan")
WRONG: list[tuple[str, Any]] = [
    ("n_steps", 0),
    ("n_steps", -5),
    ("batch_size", 0),
    ("batch_size", -1),
    ("sync_interval", 0),
    ("n_step_returns", 0),
    ("horizon", 0),
    ("buffer_size", 0),
    ("learning_starts", -1),
    ("utd_ratio", -0.5),
    ("utd_ratio", NAN),
    ("bonus_coef", -0.1),
    ("bonus_coef", NAN),
    ("target_kl", 0.0),
    ("target_kl", -1.0),
    ("target_kl", NAN),
    ("gamma", -0.1),
    ("gamma", 1.1),
    ("gamma", NAN),
    ("gae_lambda", -0.1),
    ("gae_lambda", 1.5),
    ("plan_rollouts", 1.5),
    ("plan_rollouts", "half"),
    ("max_grad_norm", 0.0),
    ("max_grad_norm", -1.0),
    ("ent_coef", -0.1),
    ("ent_coef", "learned"),
    ("ent_coef", "auto_much"),
    ("ent_coef", "auto_-1"),
    ("ent_coef", "auto_inf"),
    ("ent_coef", float("inf")),
    ("batch_size", 2.5),
    ("horizon", 2.5),
    ("horizon", 3.0),
    ("n_steps", 16.0),
    ("buffer_size", 1e4),
    ("batch_size", float("inf")),
    ("batch_size", None),
    ("utd_ratio", float("inf")),
    ("utd_ratio", "much"),
    ("gamma", None),
    ("target_kl", "small"),
]


@pytest.mark.parametrize(("name", "value"), WRONG, ids=str)
def test_wrong_arguments(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        tiny_model(randoms(), **{name: value})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("latent_dim", 12, "latent_dim=12.*multiple of 8"),
        ("latent_dim", 0, "latent_dim=0"),
        ("n_critics", 0, "n_critics=0.*at least 1"),
        ("pessimism", -1.0, "pessimism=-1.0 must be"),
        ("pessimism", float("nan"), "pessimism=nan must be"),
        ("model_arch", [0], r"model_arch=\[0\] must hold widths of at least 1"),
        ("net_arch", dict(pi=[16, -1]), r"pi_arch=\[16, -1\] must"),
        ("log_std_init", 0.5, "log_std_init=0.5 must lie between"),
        ("log_std_init", -4.0, "log_std_init=-4.0 must lie between"),
    ],
)
def test_wrong_policy_arguments(name: str, value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_model(randoms(action_space=BOX_ACTION), policy_kwargs=tiny_policy_kwargs(**{name: value}))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n_samples", 0),
        ("n_samples", 2.5),
        ("n_samples", 32.0),
        ("n_samples", float("inf")),
        ("n_samples", float("nan")),
        ("horizon", 0),
        ("n_iterations", 0),
        ("n_effective", 0.5),
        ("n_effective", 100),
    ],
)
def test_wrong_planner_arguments(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"planner_kwargs\['{name}'\]={value}"):
        tiny_model(randoms(), planner_kwargs={name: value})


def test_planner_without_spread() -> None:
    with pytest.raises(ValueError, match=r"planner_kwargs\['min_std'\]=0.0 must be positive"):
        tiny_model(randoms(), planner_kwargs=dict(min_std=0.0))


def test_planner_arguments_by_the_names_of_set_planning() -> None:
    with pytest.raises(
        TypeError, match=r"planner_kwargs got unexpected keyword arguments \['samples'\]: the keys are n_samples, horizon, "
    ):
        tiny_model(randoms(), planner_kwargs=dict(samples=8))


@pytest.mark.parametrize("where", ["planner_kwargs", "policy_kwargs", "rollout_buffer_kwargs"])
def test_unknown_keywords_are_named(where: str) -> None:
    with pytest.raises(TypeError, match="wrong_keyword"):
        tiny_model(randoms(), **{where: dict(wrong_keyword=1)})


def test_the_nearest_policy_keyword_is_named() -> None:
    message = r"policy_kwargs got unexpected keyword arguments \['latent_dims'\]: .*do you mean 'latent_dim'\?"
    with pytest.raises(TypeError, match=message):
        M3PO("MlpPolicy", randoms(), policy_kwargs=dict(latent_dims=3))


def test_wrong_arguments_are_found_when_loading(tmp_path: Path) -> None:
    tiny_model(randoms()).save(tmp_path / "model")
    with pytest.raises(ValueError, match="batch_size=0"):
        M3PO.load(tmp_path / "model", env=randoms(), batch_size=0)


# ------------------------------------------------------------- bad numbers


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("what", ["observation", "reward", "last observation"])
@pytest.mark.parametrize("normalized", [False, True], ids=["plain", "VecNormalize"])
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:VecNormalize's reward normalisation:UserWarning")
def test_bad_numbers_do_not_reach_the_memory(what: str, value: float, normalized: bool) -> None:
    if what == "last observation" and normalized and np.isinf(value):
        pytest.skip("VecNormalize clips it to a finite number")
    # The third step of the second rollout
    env: Any = DummyVecEnv([RandomEnv, lambda: BrokenEnv(what, value, at=19)])
    model = tiny_model(VecNormalize(env) if normalized else env, n_steps=16, learning_starts=10_000)
    kind = "reward" if what == "reward" else "observation"
    with pytest.raises(ValueError, match=rf"Environment \[1\] returned a NaN or infinite {kind} at step 36"):
        model.learn(64)
    memory = model.replay_buffer
    assert memory.size() == 36
    assert np.isfinite(memory.observations[""]).all() and np.isfinite(memory.final_pool[""]).all()
    assert np.isfinite(memory.rewards).all()


def test_bad_number_of_a_reset() -> None:
    class Env(RandomEnv):
        def _observe(self) -> Any:
            return np.full(3, np.nan, np.float32)

    with pytest.raises(ValueError, match=r"Environment \[0\] returned a NaN or infinite observation at step 0"):
        tiny_model(Env()).learn(16)


def test_bad_number_of_a_dict_names_the_environment() -> None:
    class Env(BrokenEnv):
        def __init__(self) -> None:
            super().__init__(at=3)
            self.observation_space = spaces.Dict({"vector": VECTOR, "bits": spaces.MultiBinary(2)})

        def _observe(self) -> Any:
            return {"vector": super()._observe(), "bits": np.zeros(2, np.int8)}

        def step(self, action: Any) -> Any:
            obs, *rest = RandomEnv.step(self, action)
            self.total += 1
            if self.total == 3:
                obs["vector"][0] = np.inf
            return obs, *rest

    with pytest.raises(ValueError, match=r"Environment \[0\].*observation under key 'vector' at step 2"):
        tiny_model(Env(), "MultiInputPolicy").learn(16)


def test_observation_too_large_for_the_memory() -> None:
    class Env(RandomEnv):
        def __init__(self) -> None:
            super().__init__(spaces.Box(-np.inf, np.inf, (3,), np.float64))

        def _observe(self) -> Any:
            return np.full(3, 1e300)

    # 1e300 is finite in float64, in which the environment counts, but not in float32, in which the networks do
    with pytest.raises(ValueError, match=r"Environment \[0\].*observation"):
        tiny_model(Env()).learn(16)


@pytest.mark.parametrize("reset_num_timesteps", [True, False])
def test_training_goes_on_after_a_bad_number(reset_num_timesteps: bool) -> None:
    model = tiny_model(BrokenEnv(at=19))
    with pytest.raises(ValueError, match="NaN"):
        model.learn(64)
    model.learn(32, reset_num_timesteps=reset_num_timesteps)
    assert model.replay_buffer.size() >= 48
    assert np.isfinite(model.replay_buffer.observations[""]).all()


def test_spoiled_statistics_are_named() -> None:
    env = VecNormalize(DummyVecEnv([lambda: BrokenEnv(at=19)]), norm_reward=False)
    model = tiny_model(env)
    with pytest.raises(ValueError, match="NaN or infinite observation"):
        model.learn(64)
    with pytest.raises(ValueError, match="VecNormalize's statistics hold NaN"):
        model.learn(32)


# ------------------------------------------------------------------ diverged

WEIGHTS = {
    "actor": "world_model.actor.1.weight",
    "critics": "world_model.critics.weights.0",
    "encoder": "world_model.encoder.1.weight",
    "dynamics": "world_model.heads.weight",
}


def break_weight(model: M3PO, name: str) -> None:
    with th.no_grad():
        model.policy.get_parameter(WEIGHTS[name]).view(-1)[0] = float("nan")


@pytest.mark.parametrize("action_space", [BOX_ACTION, spaces.Discrete(3)], ids=["box", "discrete"])
@pytest.mark.parametrize("name", WEIGHTS)
def test_diverged_model_raises_and_leaves_its_checkpoint(name: str, action_space: spaces.Space, tmp_path: Path) -> None:
    model = tiny_model(randoms(action_space=action_space))
    model.learn(32, callback=CheckpointCallback(32, str(tmp_path), save_replay_buffer=True))
    good = {key: value.clone() for key, value in model.policy.state_dict().items()}
    model._update_credits += 8
    break_weight(model, name)
    with pytest.raises(ValueError, match=r"Training diverged: \w+/\w+=nan after \d+ updates.*learning_rate"):
        model.train()
    other = M3PO.load(tmp_path / "rl_model_32_steps", env=randoms(action_space=action_space))
    other.load_replay_buffer(tmp_path / "rl_model_replay_buffer_32_steps")
    assert all(th.isfinite(value).all() for value in other.policy.state_dict().values())
    assert good.keys() == other.policy.state_dict().keys()
    other.learn(16, reset_num_timesteps=False)


@pytest.mark.parametrize("action_space", [BOX_ACTION, spaces.Discrete(3)], ids=["box", "discrete"])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("samples", [0, 8], ids=["policy", "planned"])
def test_diverged_model_does_not_act(action_space: spaces.Space, deterministic: bool, samples: int) -> None:
    model = tiny_model(randoms(action_space=action_space))
    break_weight(model, "encoder")
    model.policy.average(restart=True)
    with model.set_planning(samples), pytest.raises(ValueError, match=r"NaN|nan"):
        model.predict(np.ones(3, np.float32), deterministic=deterministic)


@pytest.mark.parametrize("action_space", [BOX_ACTION, spaces.Discrete(3)], ids=["box", "discrete"])
def test_diverged_model_does_not_collect(action_space: spaces.Space) -> None:
    model = tiny_model(randoms(action_space=action_space), learning_starts=10_000)
    break_weight(model, "actor")
    with pytest.raises(ValueError, match=r"NaN|nan"):
        model.learn(16)
    assert model.replay_buffer.size() == 0


# --------------------------------------------------------------------- files


def test_memory_file_of_something_else(tmp_path: Path) -> None:
    save_to_pkl(tmp_path / "list.pkl", [1, 2, 3])
    with pytest.raises(ValueError, match=r"list.pkl holds a list, not a ReplayMemory"):
        tiny_model(randoms()).load_replay_buffer(tmp_path / "list.pkl")


@pytest.mark.parametrize(
    "other",
    [
        dict(observation_space=spaces.Box(-1, 1, (7,), np.float32)),
        dict(observation_space=spaces.Box(-2, 2, (3,), np.float32)),
        dict(action_space=spaces.MultiDiscrete([2, 2])),
        dict(action_space=BOX_ACTION),
        dict(action_space=spaces.Discrete(5)),
    ],
    ids=["shape", "bounds", "actions", "kind of actions", "number of actions"],
)
def test_memory_of_other_spaces(other: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(randoms(**other), learning_starts=10_000).learn(16)
    model.save_replay_buffer(tmp_path / "memory")
    mine = tiny_model(randoms())
    with pytest.raises(ValueError, match=r"spaces .* are not the model's"):
        mine.load_replay_buffer(tmp_path / "memory")
    assert mine.replay_buffer.size() == 0


def test_memory_of_other_tasks(tmp_path: Path) -> None:
    tiny_model(randoms(), learning_starts=10_000).learn(16).save_replay_buffer(tmp_path / "memory")
    mine = tiny_model(randoms(), n_tasks=2)
    with pytest.raises(ValueError, match=r"apart by None, the model by \(None, TaskTable\(task0, task1\)\)"):
        mine.load_replay_buffer(tmp_path / "memory")


def test_missing_files(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        M3PO.load(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        tiny_model(randoms()).load_replay_buffer(tmp_path / "nothing")


def test_refused_memory_changes_nothing(tmp_path: Path) -> None:
    model = tiny_model(randoms()).learn(16)
    save_to_pkl(tmp_path / "wrong", "text")
    before = {key: value.clone() for key, value in model.policy.state_dict().items()}
    with pytest.raises(ValueError, match="holds a str"):
        model.load_replay_buffer(tmp_path / "wrong")
    assert model.replay_buffer.size() == 16
    assert_same_tensors(before, dict(model.policy.state_dict()))
