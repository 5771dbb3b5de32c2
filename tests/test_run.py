"""Training as a whole: callbacks, wrappers, vec-envs, seeds, logs."""

import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch as th
from gymnasium import spaces
from stable_baselines3.common.callbacks import BaseCallback, CallbackList, EvalCallback, EveryNTimesteps
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.logger import configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.utils import set_random_seed
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecFrameStack, VecNormalize

from sb3_m3po import M3PO
from sb3_m3po.actions import PersistentNoise
from sb3_m3po.learner import Learner
from sb3_m3po.planner import CategoricalPlan, GaussianPlan
from tests.helpers import RandomEnv, assert_same_model, assert_same_tensors, counters, randoms, tiny_model, tiny_policy_kwargs

BOX_ACTION = spaces.Box(-1.0, 1.0, (2,), np.float32)
EXPLORING: dict[str, Any] = dict(bonus_coef=0.5, plan_rollouts=True)


class Recorder(BaseCallback):
    """Keeps what was logged, and which of the collection's local names it found."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: set[str] = set()
        self.names: set[str] = set()
        self.events: list[str] = []

    def _on_step(self) -> bool:
        self.names = set(self.locals)
        assert self.locals["new_obs"].shape[0] == self.training_env.num_envs
        return True

    def _on_training_start(self) -> None:
        self.events.append("training starts")

    def _on_rollout_start(self) -> None:
        self.events.append("rollout starts")
        self.keys |= set(self.logger.name_to_value)

    def _on_rollout_end(self) -> None:
        self.events.append("rollout ends")
        self.keys |= set(self.logger.name_to_value)

    def _on_training_end(self) -> None:
        self.events.append("training ends")
        self.keys |= set(self.logger.name_to_value)


# -------------------------------------------------------------------- loops


@pytest.mark.parametrize(
    ("n_envs", "utd_ratio", "learning_starts"), [(1, 0.5, 16), (8, 0.5, 16), (1, 2.0, 16), (8, 0.125, 16), (8, 0.5, 200)]
)
def test_updates_per_transition(n_envs: int, utd_ratio: float, learning_starts: int) -> None:
    model = tiny_model(randoms(n_envs), utd_ratio=utd_ratio, learning_starts=learning_starts, batch_size=2)
    model.learn(256)
    assert model.num_timesteps == 256
    assert model._n_updates == int(256 * utd_ratio)


def test_what_is_less_than_a_sync_interval_waits() -> None:
    model = tiny_model(randoms(), sync_interval=12).learn(16)
    assert model._n_updates == 0
    model.learn(16, reset_num_timesteps=False)
    assert model._n_updates == 12


def test_no_update_before_learning_starts() -> None:
    model = tiny_model(randoms(), learning_starts=40).learn(32)
    assert model._n_updates == 0
    model.learn(16, reset_num_timesteps=False)
    assert model._n_updates == 24


def test_a_training_without_an_update_is_told() -> None:
    with pytest.warns(UserWarning, match=r"Nothing was learned yet.*memory: 0 and 32.*pass learning_starts"):
        model = tiny_model(counters(length=100), learning_starts=None).learn(32)
    assert model._n_updates == 0
    with pytest.warns(UserWarning, match=r"Nothing was learned yet: 16 updates are due, of sync_interval=64"):
        tiny_model(counters(), sync_interval=64).learn(32)
    with pytest.warns(UserWarning, match=r"Nothing was learned yet: updates follow full rollouts, .* pass a smaller n_steps"):
        model = tiny_model(counters(), n_steps=32)
        model.learn(32, callback=_Call(lambda: model.num_timesteps < 20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Asked for, or learning at last
        tiny_model(counters(), learning_starts=40).learn(32)
        model.learning_starts = 32
        model.learn(32)


def test_learning_starts_beyond_the_memory_means_a_full_memory() -> None:
    model = tiny_model(randoms(), learning_starts=10_000, buffer_size=32).learn(32)
    assert model._n_updates == 16


@pytest.mark.parametrize(
    ("n_envs", "length", "few", "enough"),
    [(1, 250, 1_249, 1_250), (1, 100, 999, 1_000), (5, 100, 995, 1_000), (2, 450, 2_698, 2_700), (2, 9_999, 4_998, 5_000)],
    ids=["five episodes", "1,000 transitions", "of five environments", "three of each of two", "no end: 5,000"],
)
def test_by_default_updates_wait_for_five_episodes(n_envs: int, length: int, few: int, enough: int) -> None:
    memory = tiny_model(counters(n_envs), buffer_size=10_000).replay_buffer
    nothing, action = np.zeros((n_envs, 3), np.float32), np.zeros((n_envs, 1))
    verdicts = {}
    for step in range(1, enough // n_envs + 1):
        ended = np.full(n_envs, step % length == 0)
        memory.add(nothing, action, np.zeros(n_envs), nothing, ended & (step % 2 == 0), ended & (step % 2 == 1))
        verdicts[memory.size()] = memory.is_enough(None)
    assert not verdicts[few] and verdicts[enough]
    assert memory.is_enough(enough) and not memory.is_enough(enough + 1)


def test_a_memory_of_few_transitions_is_enough_when_full() -> None:
    model = tiny_model(randoms(), learning_starts=None, buffer_size=32).learn(32)
    assert model._n_updates == 16


@pytest.mark.parametrize(("n_envs", "n_steps"), [(1, 256), (8, 32), (300, 1)])
def test_rollouts_are_256_transitions_by_default(n_envs: int, n_steps: int) -> None:
    model = M3PO("MlpPolicy", randoms(n_envs), policy_kwargs=tiny_policy_kwargs())
    assert model.rollout_buffer.buffer_size == n_steps


def test_callbacks_see_what_they_do_with_ppo() -> None:
    recorder, calls = Recorder(), []
    every = EveryNTimesteps(16, callback=_Call(lambda: calls.append(1)))
    model = tiny_model(randoms()).learn(48, callback=CallbackList([recorder, every]))
    assert recorder.n_calls == model.num_timesteps == 48
    assert recorder.names >= {
        *("new_obs", "dones", "infos", "rewards", "actions", "clipped_actions", "values", "log_probs", "obs_tensor"),
        *("n_steps", "env", "rollout_buffer"),
    }
    assert recorder.events == ["training starts", *["rollout starts", "rollout ends"] * 3, "training ends"]
    assert len(calls) == 3


class _Call(BaseCallback):
    """Calls a function at each event."""

    def __init__(self, function: Any):
        super().__init__()
        self.function = function

    def _on_step(self) -> bool:
        return self.function() is not False


class Sparing(DummyVecEnv):
    """Gives what SB3's PPO asks of a VecEnv, and no more."""

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        if attr_name != "render_mode":
            raise NotImplementedError(attr_name)
        return super().get_attr(attr_name, indices)

    def step_wait(self) -> Any:
        obs, rewards, dones, infos = super().step_wait()
        return obs, rewards, dones.astype(np.float32), infos if dones.any() else []


def test_environments_that_answer_only_what_ppo_asks() -> None:
    models = [tiny_model(kind([RandomEnv, RandomEnv])).learn(64) for kind in (Sparing, DummyVecEnv)]
    assert_same_model(*models)
    memories = [model.replay_buffer for model in models]
    assert np.array_equal(memories[0].terminated, memories[1].terminated)
    assert memories[0].terminated.any()


def test_callback_ends_training() -> None:
    steps = iter(range(1, 101))
    model = tiny_model(randoms()).learn(100, callback=_Call(lambda: next(steps) < 10))
    assert model.num_timesteps == 10
    model.learn(32, reset_num_timesteps=False)
    assert model._n_updates == 16


def test_rollouts_leave_the_networks_alone() -> None:
    model = tiny_model(randoms())
    before: dict[str, th.Tensor] = {}
    recorder = _Compare(before)
    model.learn(48, callback=recorder)
    assert recorder.rollouts == 3


class _Compare(BaseCallback):
    """Checks that collecting changes nothing but the running statistics."""

    def __init__(self, before: dict[str, th.Tensor]):
        super().__init__()
        self.before, self.rollouts = before, 0

    def _networks(self) -> dict[str, th.Tensor]:
        return {k: v.clone() for k, v in self.model.policy.state_dict().items() if not k.startswith("norms.")}

    def _on_step(self) -> bool:
        return True

    def _on_rollout_start(self) -> None:
        self.before = self._networks()

    def _on_rollout_end(self) -> None:
        self.rollouts += 1
        assert_same_tensors(self.before, self._networks())


class Slow(RandomEnv):
    """Its observations move by a little at each step."""

    def _observe(self) -> Any:
        return np.cos(0.1 * self.t + 2 * self.episode + np.arange(3)).astype(np.float32)


@pytest.mark.parametrize("options", [dict(), dict(plan_rollouts=False), dict(learning_starts=1_000)], ids=str)
@pytest.mark.parametrize("env, persistence", [(Slow, (0.0, 0.8, 0.95, 0.99)), (RandomEnv, (0.0,))])
@pytest.mark.filterwarnings("ignore:Nothing was learned yet")
def test_box_noise_remembers_where_observations_are_slow(
    env: type[RandomEnv], persistence: tuple[float, ...], options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn, draw = [], PersistentNoise.draw

    def recorded(self: PersistentNoise, starts: np.ndarray, persistence: list[tuple[float, ...]], generator: Any) -> th.Tensor:
        drawn.extend(persistence)
        return draw(self, starts, persistence, generator)

    monkeypatch.setattr(PersistentNoise, "draw", recorded)
    model = tiny_model(env(action_space=BOX_ACTION), **options).learn(96)
    assert len(drawn) == 96 and (model._n_updates > 0) == ("learning_starts" not in options)
    # Nothing is known before the end of the first rollout
    assert set(drawn[: model.n_steps]) == {(0.0,)}
    assert set(drawn[model.n_steps :]) == {persistence}


def test_slowness_is_that_of_what_has_not_been_learned_yet() -> None:
    model = tiny_model(RandomEnv(action_space=BOX_ACTION)).learn(96)
    measured = model.policy.lag_correlation.clone()
    assert model._n_updates > 0 and abs(measured.item()) < 0.5
    # A trained policy may run more smoothly
    model.set_env(Slow(action_space=BOX_ACTION))
    model.learn(96, reset_num_timesteps=False)
    assert th.equal(model.policy.lag_correlation, measured)
    assert model.replay_buffer.lag_correlation().item() > 0.5, "now"


@pytest.mark.parametrize("space", [BOX_ACTION, spaces.Discrete(3)], ids=str)
def test_planned_actions_are_made_of_the_noise_that_remembers(space: spaces.Space, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn, taken, draw = [], [], PersistentNoise.draw
    kind = GaussianPlan if space is BOX_ACTION else CategoricalPlan
    sample = kind.sample

    def recorded_draw(self: PersistentNoise, *args: Any) -> th.Tensor:
        drawn.append(draw(self, *args).clone())
        return drawn[-1]

    def recorded_sample(self: Any, noise: th.Tensor) -> tuple[th.Tensor, th.Tensor]:
        taken.append(noise)
        return sample(self, noise)

    monkeypatch.setattr(PersistentNoise, "draw", recorded_draw)
    monkeypatch.setattr(kind, "sample", recorded_sample)
    model = tiny_model(Slow(action_space=space), plan_rollouts=True).learn(64)
    assert 0 < len(taken) < len(drawn) == 64
    codec = model.policy.world_model.codec
    assert all(th.equal(noise, codec.noise_from_normal(x)) for noise, x in zip(taken[::-1], drawn[::-1], strict=False))


# ----------------------------------------------------------------- wrappers


def test_monitor_reports_episodes() -> None:
    model = tiny_model(RandomEnv()).learn(32)
    assert len(model.ep_info_buffer or []) == 6
    assert {info["l"] for info in model.ep_info_buffer or []} == {5}
    assert isinstance(model.get_env().envs[0], Monitor)  # type: ignore[union-attr]


def reward_warnings(env: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tiny_model(env).learn(48).learn(16)
    return [str(w.message) for w in caught if "VecNormalize" in str(w.message)]


def test_reward_normalisation_warns_once() -> None:
    messages = reward_warnings(VecNormalize(randoms(2)))
    assert len(messages) == 1 and "norm_reward=False" in messages[0]


@pytest.mark.parametrize("env", [VecNormalize(randoms(), norm_reward=False), randoms()], ids=["observations", "none"])
def test_no_warning_without_reward_normalisation(env: Any) -> None:
    assert reward_warnings(env) == []


def test_warning_points_at_the_call() -> None:
    model = tiny_model(VecNormalize(randoms()))
    with pytest.warns(UserWarning, match="norm_reward") as caught:
        model.learn(16)
    assert [Path(w.filename).name for w in caught if "norm_reward" in str(w.message)] == ["test_run.py"]


def test_normalised_images_with_vectors_are_stored_as_they_are_seen() -> None:
    space = spaces.Dict({"image": spaces.Box(0, 255, (36, 40, 3), np.uint8), "vector": spaces.Box(-1, 1, (3,), np.float32)})
    env = VecNormalize(randoms(2, observation_space=space), norm_reward=False, norm_obs_keys=["vector"])
    kwargs = tiny_policy_kwargs(features_extractor_kwargs=dict(cnn_output_dim=16))
    model = tiny_model(env, "MultiInputPolicy", policy_kwargs=kwargs).learn(64)
    seen: Any = model.rollout_buffer.observations["image"]
    assert np.array_equal(model.replay_buffer.observations["image"][16:32], seen.astype(np.uint8))


def test_frames_are_stacked() -> None:
    env = VecFrameStack(counters(2), 3)
    model = tiny_model(env).learn(64)
    assert model.observation_space.shape == (9,)
    batch = model.replay_buffer.sample(200, 1, np.random.default_rng(0))
    obs, then = (model.replay_buffer.observations_at(states) for states in batch.states)
    assert isinstance(obs, np.ndarray) and isinstance(then, np.ndarray)
    going = obs[:, -1] > 0
    # The newest two frames of an observation are the oldest two of the next, also at an episode's end
    assert np.array_equal(obs[going][:, 3:], then[going][:, :6])


def test_frames_are_stacked_under_vec_normalize() -> None:
    model = tiny_model(VecNormalize(VecFrameStack(randoms(2), 2), norm_reward=False)).learn(64)
    assert model._n_updates == 32


def make_random_env() -> RandomEnv:
    """:return: An environment, for other processes"""
    return RandomEnv(action_space=BOX_ACTION)


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_processes_do_as_one_process_does(start_method: str) -> None:
    models = []
    for env in (DummyVecEnv([make_random_env] * 2), SubprocVecEnv([make_random_env] * 2, start_method=start_method)):
        models.append(tiny_model(env).learn(64))
        env.close()
    assert models[0]._n_updates == 32
    assert_same_tensors(dict(models[0].policy.state_dict()), dict(models[1].policy.state_dict()))


# -------------------------------------------------------------------- seeds


@pytest.mark.parametrize("action_space", [BOX_ACTION, spaces.Discrete(3), spaces.MultiDiscrete([5, 3, 7])], ids=str)
def test_one_seed_one_result(action_space: spaces.Space) -> None:
    first, second = (tiny_model(randoms(2, action_space=action_space), **EXPLORING).learn(64) for _ in range(2))
    assert_same_model(first, second)
    assert np.array_equal(first.replay_buffer.rewards, second.replay_buffer.rewards)


def test_without_a_seed_the_global_generators_decide() -> None:
    def learned() -> M3PO:
        env = randoms(action_space=BOX_ACTION)
        env.seed(0)
        return tiny_model(env, seed=None, **EXPLORING).learn(48)

    set_random_seed(3)
    first, other = learned(), learned()
    set_random_seed(3)
    assert_same_model(first, learned())
    with pytest.raises(AssertionError):
        assert_same_model(first, other)


def test_other_seed_other_result() -> None:
    first, second = (tiny_model(randoms(), seed=seed).learn(32) for seed in (0, 1))
    name = "world_model.actor.1.weight"
    assert not th.equal(first.policy.get_parameter(name), second.policy.get_parameter(name))


@pytest.mark.parametrize("samples", [0, 8], ids=["policy", "planned"])
@pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "stochastic"])
def test_evaluating_changes_nothing(deterministic: bool, samples: int, tmp_path: Path) -> None:
    alone = tiny_model(randoms(2, action_space=BOX_ACTION), **EXPLORING).learn(96)
    watched = tiny_model(randoms(2, action_space=BOX_ACTION), **EXPLORING)
    watched.set_planning(samples)
    evaluation = EvalCallback(
        Monitor(RandomEnv(action_space=BOX_ACTION)),
        eval_freq=5,
        n_eval_episodes=1,
        deterministic=deterministic,
        best_model_save_path=str(tmp_path),
        verbose=0,
    )
    watched.learn(96, callback=evaluation)
    assert evaluation.best_mean_reward > -np.inf
    assert_same_model(alone, watched)


def test_evaluate_policy_with_normalised_observations() -> None:
    env = VecNormalize(randoms(2), norm_reward=False)
    model = tiny_model(env).learn(32)
    mean, std = evaluate_policy(model, env, n_eval_episodes=2, warn=False)
    assert np.isfinite([mean, std]).all()


# --------------------------------------------------------------------- logs


def documented_metrics() -> set[str]:
    text = (Path(__file__).parent.parent / "docs" / "metrics.md").read_text(encoding="utf-8")
    return set(re.findall(r"^\| `([a-z_]+/[a-z_]+)` \|", text, flags=re.MULTILINE))


@pytest.fixture(scope="module")
def logged() -> set[str]:
    """:return: Every key that is logged with all features on"""
    recorder = Recorder()
    model = tiny_model(Monitor(RandomEnv(action_space=BOX_ACTION)), **EXPLORING)
    model.learn(96, callback=recorder)
    return recorder.keys


# Logged where an environment reports it, and over several tasks
ELSEWHERE = {"rollout/success_rate", "eval/success_rate", "eval/iqm"}


@pytest.mark.parametrize("metric", sorted(documented_metrics() - ELSEWHERE))
def test_documented_metric_is_logged(metric: str, logged: set[str]) -> None:
    if metric.startswith(("time/", "rollout/", "eval/")):
        pytest.skip("SB3 logs it, and clears it at once")
    assert metric in logged


def test_logged_metrics_are_documented(logged: set[str]) -> None:
    assert logged <= documented_metrics()


def test_exploration_is_logged_only_where_it_happens() -> None:
    recorder = Recorder()
    tiny_model(randoms(), plan_rollouts=False).learn(64, callback=recorder)
    assert not [key for key in recorder.keys if key.startswith("exploration/")]


@pytest.mark.parametrize(
    ("space", "share"), [(BOX_ACTION, 1.0), (spaces.Discrete(3), 0.5), (spaces.MultiDiscrete([2, 3]), 0.0)]
)
def test_how_much_is_planned_follows_from_the_actions_unless_it_is_said(space: spaces.Space, share: float) -> None:
    assert tiny_model(randoms(action_space=space)).plan_rollouts == share
    assert tiny_model(randoms(action_space=space), plan_rollouts=False).plan_rollouts is False
    assert tiny_model(randoms(action_space=space), plan_rollouts=0.2).plan_rollouts == 0.2


class Named(spaces.Discrete):
    """A user's own kind of space."""


def test_spaces_are_planned_as_those_that_they_derive_from() -> None:
    assert tiny_model(randoms(action_space=Named(3))).plan_rollouts == 0.5


def test_what_is_nan_is_told_of_environments_that_do_not_plan_too() -> None:
    model = tiny_model(randoms(2)).learn(64)
    obs, noise = th.randn(2, 3), model.policy.world_model.codec.noise((2,))
    obs[1] = th.nan
    with pytest.raises(ValueError, match="outputs are NaN"):
        model.policy.act_by_plan(obs, noise, np.array([True, False]))


@pytest.mark.parametrize(("share", "least", "most"), [(True, 1.0, 1.0), (0.5, 0.35, 0.65), (0.2, 0.08, 0.32)])
def test_share_of_episodes_is_planned_from_their_beginning_to_their_end(share: float, least: float, most: float) -> None:
    model = tiny_model(randoms(8), plan_rollouts=share, utd_ratio=1 / 8)
    plans, starts = [], []

    class Plans(BaseCallback):
        def _on_step(self) -> bool:
            plans.append(model._plans.copy())
            starts.append(np.array(model._last_episode_starts, bool))
            return True

    model.learn(8 * 60, callback=Plans())
    for t in range(1, len(plans)):
        assert (plans[t] == plans[t - 1])[~starts[t]].all()
    episodes = np.concatenate([planned[began] for planned, began in zip(plans, starts, strict=True)])
    assert len(episodes) >= 8 * 12 and least <= episodes.mean() <= most


@pytest.mark.parametrize("space", [BOX_ACTION, spaces.Discrete(3)], ids=str)
def test_some_environments_plan_beside_others_that_do_not(space: spaces.Space) -> None:
    model = tiny_model(randoms(4, action_space=space)).learn(64)
    policy, obs, plans = model.policy, th.randn(4, 3), np.array([True, False, True, False])
    noise = policy.world_model.codec.noise((4,))

    def planned(rows: np.ndarray, plans: np.ndarray) -> list[th.Tensor]:
        policy.generator = th.Generator().manual_seed(0)
        with th.no_grad():
            *acted, plan = policy.act_by_plan(obs[rows], noise[rows], plans)
        assert len(plan.gain) == 2
        return acted

    together = planned(np.arange(4), plans)
    alone = planned(np.flatnonzero(plans), np.ones(2, bool))
    with th.no_grad():
        by_policy = policy(obs, noise=noise)
    for both, by_plan, otherwise in zip(together, alone, by_policy, strict=True):
        th.testing.assert_close(both[plans], by_plan, rtol=1e-3, atol=1e-3)
        th.testing.assert_close(both[~plans], otherwise[~plans], rtol=1e-3, atol=1e-3)
    assert not th.equal(together[2], by_policy[2]), "the log-probability is that of the plan"


def test_bonus_coefficient_falls_to_zero() -> None:
    values: list[float] = []
    model = tiny_model(randoms(), bonus_coef=0.5)
    model.learn(96, callback=_Call(lambda: values.append(model.logger.name_to_value.get("exploration/bonus_coef", np.nan))))
    seen = [value for value in values if np.isfinite(value)]
    assert seen and max(seen) < 0.5 and seen[-1] < seen[0]


def test_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model = tiny_model(Monitor(RandomEnv(action_space=BOX_ACTION)), tensorboard_log=str(tmp_path), **EXPLORING)
    evaluations = EvalCallback(Monitor(RandomEnv(action_space=BOX_ACTION)), eval_freq=32, verbose=0)
    model.learn(64, callback=evaluations).learn(32, reset_num_timesteps=False)
    assert {path.name for path in tmp_path.iterdir()} == {"M3PO_1"}
    events = accumulator.EventAccumulator(str(tmp_path / "M3PO_1"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    unheard = {"time/iterations", "time/time_elapsed", "time/total_timesteps", "train/n_updates"}
    assert documented_metrics() - ELSEWHERE - unheard - {"train/std"} <= tags
    # As with PPO, what was learned last in a call of learn() is not logged
    assert len(events.Scalars("world_model/loss")) == 3 + 1


def test_csv_log(tmp_path: Path) -> None:
    model = tiny_model(RandomEnv())
    model.set_logger(configure(str(tmp_path), ["csv"]))
    model.learn(64)
    header = (tmp_path / "progress.csv").read_text().splitlines()[0]
    assert {"train/n_updates", "rollout/ep_rew_mean", "world_model/loss"} <= set(header.split(","))


@pytest.mark.parametrize("log_interval", [None, 2])
def test_log_interval(log_interval: int | None) -> None:
    assert tiny_model(randoms()).learn(64, log_interval=log_interval)._n_updates == 32  # type: ignore[arg-type]


def test_progress_bar() -> None:
    pytest.importorskip("rich")
    pytest.importorskip("tqdm")
    assert tiny_model(randoms()).learn(32, progress_bar=True).num_timesteps == 32


def test_learning_rate_falls_by_default() -> None:
    model = tiny_model(randoms())
    assert [model.lr_schedule(progress) for progress in (1.0, 0.5, 0.0)] == pytest.approx([2e-3, 1.1e-3, 2e-4])
    model.learn(64)
    assert 2e-4 <= model.policy.optimizer.param_groups[0]["lr"] < 2e-3
    model.learning_rate = 1e-3
    model._setup_lr_schedule()
    assert model.lr_schedule(0.0) == 1e-3


def test_beyond_the_budget_nothing_is_unlearned() -> None:
    # Rollouts of 32 steps: the last ends at 64
    model = tiny_model(
        randoms(), n_steps=32, learning_starts=16, learning_rate=lambda progress: 1e-2 * progress, bonus_coef=0.1
    )
    model.learn(40)
    assert model.num_timesteps >= 64 and model._current_progress_remaining == 0.0
    optimizers = (model.policy.optimizer, model.policy.model_optimizer, model.policy.coef_optimizer)
    assert [group["lr"] for optimizer in optimizers for group in optimizer.param_groups if group["lr"] != 0.0] == []
    assert Learner.of(model).bonus_coef == 0.0


def test_learning_rate_schedule_reaches_all_optimizers() -> None:
    model = tiny_model(randoms(), learning_rate=lambda progress: 1e-2 * (2 - progress)).learn(64)
    policy = model.policy
    rates = {
        name: [group["lr"] for group in getattr(policy, name).param_groups]
        for name in ("optimizer", "model_optimizer", "coef_optimizer")
    }
    # The last rollout ends where no progress remains. Encoder, rest of the model; temperature, multiplier
    expected = {"optimizer": [2e-2], "model_optimizer": [6e-3, 2e-2], "coef_optimizer": [2e-2, 0.2]}
    assert rates == {name: pytest.approx(values) for name, values in expected.items()}
    encoding = policy.model_optimizer.param_groups[0]["params"]
    assert {id(p) for p in encoding} == {id(p) for p in policy.world_model.encoder.parameters()}


# ------------------------------------------------------- devices, compilers


def train_compiled(backend: str, folder: Path) -> None:
    model = tiny_model(randoms(2, action_space=BOX_ACTION))
    plain = tiny_model(randoms(2, action_space=BOX_ACTION))
    model.policy = th.compile(model.policy, backend=backend)  # type: ignore[assignment]
    model.learn(64)
    assert model._n_updates == 32
    obs = np.ones((2, 3), np.float32)
    assert model.predict(obs, deterministic=True)[0].shape == (2, 2)
    with model.set_planning(8):
        model.predict(obs, deterministic=True)
    # Parameters go under the names of the policy that was compiled
    parameters: Any = model.get_parameters()
    plain.set_parameters(parameters)
    assert np.allclose(plain.predict(obs, deterministic=True)[0], model.predict(obs, deterministic=True)[0], atol=1e-5)
    # and so they are saved: what is loaded is not compiled
    model.save(folder / "compiled")
    loaded = type(model).load(folder / "compiled", env=randoms(2, action_space=BOX_ACTION), device="cpu")
    assert np.array_equal(plain.predict(obs, deterministic=True)[0], loaded.predict(obs, deterministic=True)[0])
    loaded.learn(32, reset_num_timesteps=False)


def test_compiled_policy_trains_and_saves(tmp_path: Path) -> None:
    train_compiled("eager", tmp_path)


@pytest.mark.expensive
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("gcc") is None, reason="needs a C compiler")
def test_policy_compiled_by_inductor(tmp_path: Path) -> None:
    train_compiled("inductor", tmp_path)


@pytest.mark.cuda
@pytest.mark.skipif(not th.cuda.is_available(), reason="needs a CUDA device")
def test_cuda(tmp_path: Path) -> None:
    model = tiny_model(randoms(2, action_space=BOX_ACTION), device="cuda", **EXPLORING).learn(64)
    assert model._n_updates == 32 and model.policy.device.type == "cuda"
    with model.set_planning(8):
        model.predict(np.ones((2, 3), np.float32), deterministic=True)
    model.save(tmp_path / "model")
    assert M3PO.load(tmp_path / "model", device="cpu").policy.device.type == "cpu"


def test_environment_by_name() -> None:
    model = tiny_model("CartPole-v1").learn(32)
    assert model._n_updates == 16
    model = tiny_model(make_vec_env("CartPole-v1", 2)).learn(32)
    assert model._n_updates == 16


@pytest.mark.parametrize("options", [dict(target_kl=None), dict(ent_coef=0.01), dict(ent_coef="auto_0.5"), dict(gamma=1.0)])
@pytest.mark.parametrize("action_space", [BOX_ACTION, spaces.Discrete(2)], ids=str)
def test_options_train(options: dict[str, Any], action_space: spaces.Space) -> None:
    model = tiny_model(randoms(action_space=action_space), **options).learn(32)
    assert model._n_updates == 16
    coef = float(model.policy.log_ent_coef.detach().exp())
    if options.get("ent_coef") == 0.01:
        assert coef == pytest.approx(0.01)
    if "target_kl" in options:
        assert float(model.policy.log_kl_coef.detach()) == 0


@pytest.mark.parametrize(
    "changes",
    [
        dict(net_arch=[]),
        dict(net_arch=[16]),
        dict(net_arch=dict(pi=[16])),
        dict(encoder_arch=[]),
        dict(model_arch=[]),
        dict(n_critics=1),
        dict(pessimism=0.0),
        dict(activation_fn=th.nn.Tanh),
        dict(optimizer_class=th.optim.RMSprop),
    ],
    ids=str,
)
@pytest.mark.parametrize("action_space", [BOX_ACTION, spaces.Discrete(2)], ids=["box", "discrete"])
def test_network_options_train(changes: dict[str, Any], action_space: spaces.Space) -> None:
    model = tiny_model(randoms(action_space=action_space), policy_kwargs=tiny_policy_kwargs(**changes)).learn(32)
    assert model._n_updates == 16


@pytest.mark.parametrize(("horizon", "n_step_returns", "batch_size"), [(1, 1, 1), (1, 5, 8), (5, 1, 8), (3, 3, 1)])
def test_lengths_train(horizon: int, n_step_returns: int, batch_size: int) -> None:
    model = tiny_model(randoms(), horizon=horizon, n_step_returns=n_step_returns, batch_size=batch_size).learn(32)
    assert model._n_updates == 16


@pytest.mark.parametrize("phase", ["_prepare", "_step_coefs"])
def test_interrupted_training_goes_on_whole(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    model = tiny_model(randoms(action_space=spaces.Box(-1.0, 1.0, (2,), np.float32)))
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Learner, phase, interrupt)
        model.learn(64)
    before = model.policy.world_model.trunk.state_dict()
    before = {name: value.clone() for name, value in before.items()}
    model.learn(64, reset_num_timesteps=False)
    assert all((value != before[name]).any() for name, value in model.policy.world_model.trunk.state_dict().items())


@pytest.mark.parametrize(("given", "known"), [("0.3", 0.3), (1, 1.0), ("auto", "auto"), ("auto_0.3", "auto_0.3")])
def test_only_what_begins_with_auto_is_learned(given: Any, known: Any) -> None:
    model = tiny_model(randoms(), ent_coef=given).learn(64)
    assert model.ent_coef == known and model._n_updates > 0
    started = {"0.3": 0.3, 1: 1.0, "auto": 1.0, "auto_0.3": 0.3}[given]
    assert (model.policy.log_ent_coef.exp().item() == pytest.approx(started)) == isinstance(known, float)
