"""What one sees of several tasks: scores, callbacks, logs and pictures."""

import copy
import inspect
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from matplotlib.text import Text
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback, StopTrainingOnRewardThreshold
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.logger import KVWriter, configure
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import DummyVecEnv, VecEnv, VecNormalize

from sb3_m3po import M3PO, Task, TaskEvalCallback, TaskScores, TaskStatsCallback, evaluate_per_task, make_multitask_vec_env
from sb3_m3po.envs import MultiTaskEnv
from sb3_m3po.evaluation import iqm
from sb3_m3po.plotting import plot_task_embeddings, plot_task_heatmap
from tests.helpers import tiny_model

VECTOR = spaces.Box(-1.0, 1.0, (2,))


class Known(gym.Env):
    """
    Episode ``k`` (from 1 on) has ``length`` steps, times ``k`` if it ``grows``, and rewards that sum up to ``score + k``.

    :param score: See above
    :param length: See above
    :param succeeds: Which of the episodes succeed, over and over; ``None`` for a task that does not say
    """

    def __init__(self, score: float = 0.0, length: int = 3, grows: bool = False, succeeds: tuple[bool, ...] | None = None):
        self.observation_space, self.action_space = VECTOR, spaces.Box(-1.0, 1.0, (1,))
        self.score, self.length, self.grows, self.succeeds = score, length, grows, succeeds
        self.episode = self.t = 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.episode += 1
        self.t = 0
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.t += 1
        steps = self.length * (self.episode if self.grows else 1)
        info: dict[str, Any] = {}
        if self.t == steps and self.succeeds is not None:
            info["is_success"] = self.succeeds[(self.episode - 1) % len(self.succeeds)]
        return np.zeros(2, np.float32), (self.score + self.episode) / steps, self.t == steps, False, info


def known(name: str, **kwargs: Any) -> Task:
    return Task(Known, name, env_kwargs=kwargs)


TWO = [known("short", score=10.0, length=2, succeeds=(True, False)), known("long", score=-100.0, length=9)]


class Still:
    """Stands in for a model: does nothing."""

    def __init__(self, env: VecEnv):
        self.action_space = env.action_space

    def predict(self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False) -> Any:
        return np.zeros((len(observation["task"]), *(self.action_space.shape or ()))), state


# ---------------------------------------------------------------------- scores


@pytest.mark.parametrize("copies", [1, 2, 3])
def test_each_task_has_its_episodes(copies: int) -> None:
    env = make_multitask_vec_env(TWO, n_envs_per_task=copies)
    scores = evaluate_per_task(Still(env), env, n_eval_episodes=4)
    assert list(scores) == ["short", "long"]
    assert [len(scores.returns[name]) for name in scores] == [4, 4]
    expected = {1: [1, 2, 3, 4], 2: [1, 1, 2, 2], 3: [1, 1, 1, 2]}[copies]
    np.testing.assert_allclose(np.sort(scores.returns["short"]), np.array(expected) + 10.0, rtol=1e-6)
    np.testing.assert_allclose(np.sort(scores.returns["long"]), np.array(expected) - 100.0, rtol=1e-6)
    assert scores.lengths["long"].tolist() == [9] * 4
    assert scores.success_rate == {"short": {1: 0.5, 2: 0.5, 3: 0.75}[copies]}
    assert scores["short"] == pytest.approx(10 + np.mean(expected)) and len(scores) == 2


def test_short_episodes_do_not_count_more() -> None:
    """Two environments of a task, one of which plays episodes that get longer: each plays half of them."""
    space = make_multitask_vec_env(known("a")).observation_space

    class Like(gym.ObservationWrapper):
        def __init__(self, env: gym.Env):
            super().__init__(env)
            self.observation_space = space

        def observation(self, observation: Any) -> Any:
            return {"observation": observation, "task": 0}

    env = DummyVecEnv([lambda: Like(Known(0.0, 1)), lambda: Like(Known(100.0, 5, grows=True))])
    scores = evaluate_per_task(Still(env), env, n_eval_episodes=6)
    np.testing.assert_allclose(np.sort(scores.returns["a"]), np.array([1, 2, 3, 101, 102, 103]), rtol=1e-6)


def test_an_environment_that_draws_its_tasks_plays_all_of_them() -> None:
    env = MultiTaskEnv(TWO)
    env.reset(seed=0)
    scores = evaluate_per_task(Still(DummyVecEnv([lambda: env])), env, n_eval_episodes=3)
    assert {name: len(found) for name, found in scores.returns.items()} == {"short": 3, "long": 3}
    assert scores.lengths["short"].tolist() == [2, 2, 2]


class Lasting(gym.Env):
    """Each episode has 1 or 50 steps, at even odds, and a reward of 1 in each."""

    def __init__(self) -> None:
        self.observation_space, self.action_space = VECTOR, spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.left = int(self.np_random.choice([1, 50]))
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.left -= 1
        return np.zeros(2, np.float32), 1.0, self.left == 0, False, {}


def test_short_episodes_of_drawn_tasks_do_not_count_more() -> None:
    tasks = [Task(Lasting, name) for name in "ab"]
    env = make_vec_env(partial(MultiTaskEnv, tasks), 8, seed=0)
    found = [evaluate_per_task(Still(env), env, 10)[name] for _ in range(60) for name in "ab"]
    # Its standard error is 0.7; by the first ten to end it would be about 19
    assert np.mean(found) == pytest.approx(25.5, abs=2.5)


class Drawing(gym.Env):
    """Plays tasks in turn, ``order`` over and over, of which ``n_tasks`` are in the table; it does not say that it draws."""

    def __init__(self, order: list[int], n_tasks: int):
        self.observation_space = spaces.Dict({"observation": VECTOR, "task": spaces.Discrete(n_tasks)})
        self.action_space = spaces.Box(-1.0, 1.0, (1,))
        self.order, self.episode = order, -1

    def _observe(self) -> Any:
        return {"observation": np.zeros(2, np.float32), "task": self.order[self.episode % len(self.order)]}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.episode += 1
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._observe(), 1.0 + self.order[self.episode % len(self.order)], True, False, {}


def test_an_environment_that_draws_its_tasks_unasked_is_found_out() -> None:
    env = Drawing([0, 2, 2, 2, 1, 1], 3)
    scores = evaluate_per_task(Still(DummyVecEnv([lambda: env])), env, n_eval_episodes=4)
    assert {name: found.tolist() for name, found in scores.returns.items()} == {
        "task0": [1.0] * 4,
        "task1": [2.0] * 4,
        "task2": [3.0] * 4,
    }
    assert scores.iqm == 2.0


def test_a_task_that_never_comes_up_is_given_up() -> None:
    env = Drawing([0, 2], 3)
    assert dict(evaluate_per_task(Still(DummyVecEnv([lambda: env])), env, n_eval_episodes=2)) == {"task0": 1.0, "task2": 3.0}


@pytest.mark.parametrize("masks", [False, True])
def test_environments_may_be_narrower_than_the_model(masks: bool) -> None:
    tasks = ["Pendulum-v1", "MountainCarContinuous-v0", "InvertedPendulum-v5"]
    model = tiny_model(make_multitask_vec_env(tasks, expose_masks=masks), "MultiInputPolicy")
    own, padded = (make_multitask_vec_env(tasks[1], seed=0, expose_masks=masks, like=like) for like in (None, model))
    scores = evaluate_per_task(model, own, 1)
    assert list(scores) == ["MountainCarContinuous-v0"] and dict(scores) == dict(evaluate_per_task(model, padded, 1))
    normalised = VecNormalize(make_multitask_vec_env(tasks[1], expose_masks=masks), norm_obs_keys=["observation"])
    with pytest.raises(ValueError, match=r"VecNormalize's statistics are as wide as the model: make_multitask.*like=model"):
        evaluate_per_task(model, normalised, 1)


def test_what_a_model_has_no_room_for_is_named() -> None:
    model = Named(make_multitask_vec_env("Pendulum-v1"))
    wide = make_multitask_vec_env("Pendulum-v1", observation_dim=5)
    with pytest.raises(
        ValueError, match=r"'observation' \(Box.*5.*\) is not the model's \(Box.*3.*\): make them by .*like=model"
    ):
        evaluate_per_task(model, wide, 1)
    masked = Named(make_multitask_vec_env("Pendulum-v1", expose_masks=True))
    with pytest.raises(ValueError, match=r"_mask' \(missing\) is not the model's"):
        evaluate_per_task(masked, make_multitask_vec_env("Pendulum-v1"), 1)
    # The other way round nothing is missing
    assert len(evaluate_per_task(model, make_multitask_vec_env("Pendulum-v1", expose_masks=True), 1)) == 1


def test_training_goes_on_after_an_evaluation_on_its_environments() -> None:
    env = make_multitask_vec_env(TWO)
    model = tiny_model(env, "MultiInputPolicy").learn(64)
    evaluate_per_task(model, env, 1)
    model.learn(64, reset_num_timesteps=False)
    memory = model.replay_buffer
    # An observation of these tasks is zeros: what tells episodes apart are their rewards, (score + episode) / length
    sequences = memory.sample(500, 2, np.random.default_rng(0))
    ongoing = (sequences.terminated[0] + sequences.truncated[0]) == 0
    np.testing.assert_allclose(sequences.rewards[0, ongoing], sequences.rewards[1, ongoing], rtol=1e-5)
    with pytest.raises(ValueError, match=r"eval_env is the training environment.*make another"):
        model.learn(64, callback=TaskEvalCallback(env, verbose=0))


def test_tasks_that_are_not_in_the_env_have_no_score() -> None:
    both = make_multitask_vec_env(TWO)
    env = make_multitask_vec_env(TWO[1], like=both)
    assert list(evaluate_per_task(Still(env), env, 2)) == ["long"]


def test_scores_need_tasks() -> None:
    env = DummyVecEnv([Known])
    with pytest.raises(ValueError, match=r"task_key='task' is no key.*make_multitask_vec_env.*evaluate_policy\(\)"):
        evaluate_per_task(None, env)


def test_rendering() -> None:
    env, shown = make_multitask_vec_env(TWO), []
    env.render = lambda mode=None: shown.append(mode)  # type: ignore[method-assign, assignment]
    evaluate_per_task(Still(env), env, 1)
    assert not shown
    evaluate_per_task(Still(env), env, 1, render=True)
    assert len(shown) == 9  # steps of the longer task's episode
    model = tiny_model(make_multitask_vec_env(TWO), "MultiInputPolicy")
    model.learn(16, callback=TaskEvalCallback(env, n_eval_episodes=1, eval_freq=16, render=True, verbose=0))
    assert len(shown) == 18


def test_the_callback_takes_what_that_of_sb3_takes() -> None:
    theirs, ours = (list(inspect.signature(cls.__init__).parameters) for cls in (EvalCallback, TaskEvalCallback))
    assert ours[: len(theirs)] == theirs and ours[len(theirs) :] == ["bounds", "task_key"]


def test_iqm_by_hand() -> None:
    assert iqm(np.array([[100.0, 1.0], [2.0, -50.0]])) == 1.5
    assert iqm(np.arange(8.0)) == 3.5
    assert iqm(np.array([0.0, 0.0, 6.0])) == 2.0  # a quarter of 3 is less than one


def scores_of(successes: dict[str, Any] | None = None, bounds: Any = None) -> TaskScores:
    returns = {"a": np.array([0.0, 10.0, 10.0, 20.0]), "b": np.array([-100.0, -100.0, -50.0, -50.0])}
    return TaskScores(returns, {name: np.ones(4) for name in returns}, successes or {}, bounds)


def test_what_tasks_are_compared_by() -> None:
    np.testing.assert_allclose(scores_of().scores, [[0.0, -100.0], [10.0, -100.0], [10.0, -50.0], [20.0, -50.0]])
    bounded = scores_of(bounds={"a": (0, 20), "b": (-100, 0)})
    np.testing.assert_allclose(bounded.scores, [[0.0, 0.0], [0.5, 0.0], [0.5, 0.5], [1.0, 0.5]])
    assert bounded.iqm == bounded.mean_score == pytest.approx((2 / 4 + 1 / 4) / 2)
    some = {"a": np.array([1.0, 0.0, 0.0, 0.0])}
    assert scores_of(some).iqm == scores_of().iqm
    every = {**some, "b": np.ones(4)}
    assert scores_of(every).iqm == pytest.approx((1 / 4 + 1) / 2)
    assert [scores.are_comparable for scores in (scores_of(), bounded, scores_of(some), scores_of(every))] == [0, 1, 0, 1]
    with pytest.raises(ValueError, match="missing for b"):
        _ = scores_of(bounds={"a": (0, 1)}).scores
    with pytest.raises(
        ValueError, match=r"bounds\['b'\]=\(3, 3\) leave nothing between 0 and 1: give \(return that counts as 0"
    ):
        evaluate_per_task(None, make_multitask_vec_env([known("a"), known("b")]), bounds={"a": (0, 1), "b": (3, 3)})
    model = tiny_model(make_multitask_vec_env(TWO), "MultiInputPolicy")
    with pytest.raises(ValueError, match="bounds are missing for long"):
        model.learn(16, callback=TaskEvalCallback(make_multitask_vec_env(TWO), bounds={"short": (0, 1)}))


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.8, 0.9])
def test_successes_are_compared_by_rates_of_tasks(rate: float) -> None:
    """Of single episodes, 0 or 1, the middle half would be all ones or all zeros."""
    successes = {name: np.repeat([1.0, 0.0], [round(10 * rate), 10 - round(10 * rate)]) for name in "abcdefgh"}
    scores = TaskScores(successes, successes, successes)
    assert scores.iqm == pytest.approx(rate)
    pytest.importorskip("rliable")
    low, high = scores.interval()
    assert low < rate < high


def test_interval_holds_the_mean_and_is_narrower_with_more_episodes() -> None:
    pytest.importorskip("rliable")
    rng = np.random.default_rng(0)

    def interval(n: int) -> tuple[float, float]:
        returns = {name: rng.normal(0.5, 0.1, n) for name in "abc"}
        return TaskScores(returns, returns).interval()

    (low, high), (lower, higher) = interval(200), interval(5)
    assert low < 0.5 < high and high - low < 0.05
    assert higher - lower > 2 * (high - low)
    # One number for one set of scores, and none of the training's random numbers are used up
    np.random.seed(3)
    assert interval(5) != interval(5)  # of other scores
    first = scores_of().interval()
    drawn = np.random.random()
    np.random.seed(3)
    assert drawn == np.random.random() and first == scores_of().interval()
    constant = {"a": np.full(5, 2.0)}
    assert TaskScores(constant, constant).interval() == (2.0, 2.0)


def test_a_table_of_scores() -> None:
    scores = scores_of({"a": np.array([1.0, 0.0, 0.0, 0.0])})
    lines = repr(scores).splitlines()
    interval = ["95", "%", "interval", f"{scores.interval()[0]:.2f}", "to", f"{scores.interval()[1]:.2f}"]
    assert [line.split() for line in lines] == [
        ["a", "10.00", "+-", "7.07", "success", "0.25"],
        ["b", "-75.00", "+-", "25.00"],
        ["IQM", "-32.50", *interval],
    ]


# ------------------------------------------------------------------- callbacks


class Written(KVWriter):
    """Keeps what was logged."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []

    def write(self, key_values: dict[str, Any], key_excluded: Any, step: int = 0) -> None:
        self.rows.append(dict(key_values))

    def close(self) -> None:
        pass

    def latest(self, key: str) -> Any:
        return [row[key] for row in self.rows if key in row][-1]


def watched(model: Any) -> Written:
    """:return: What the model will log"""
    logger, writer = configure(None, []), Written()
    logger.output_formats.append(writer)
    model.set_logger(logger)
    return writer


def test_training_logs_each_task() -> None:
    env = make_multitask_vec_env(TWO, n_envs_per_task=2)
    model = tiny_model(env, "MultiInputPolicy", stats_window_size=4)
    log = watched(model)
    model.learn(4 * 4 * 16)
    # 64 steps of each environment: 32 episodes of 2, 7 of 9; the last two of each of two environments
    assert log.latest("rollout/short/ep_rew_mean") == pytest.approx(10 + 31.5)
    assert log.latest("rollout/long/ep_rew_mean") == pytest.approx(-100 + 6.5)
    assert (log.latest("rollout/short/ep_len_mean"), log.latest("rollout/long/ep_len_mean")) == (2, 9)
    assert log.latest("rollout/short/success_rate") == 0.5
    assert not any("rollout/long/success_rate" in row for row in log.rows)


def test_one_task_has_no_logs_of_its_own() -> None:
    model = tiny_model(make_multitask_vec_env(TWO[0]), "MultiInputPolicy")
    log = watched(model)
    model.learn(64)
    assert not any(key.startswith("rollout/short") for row in log.rows for key in row)


def test_other_algorithms_log_each_task_by_a_callback() -> None:
    env = make_multitask_vec_env(TWO)
    model = PPO("MultiInputPolicy", env, n_steps=32, batch_size=32)
    log = watched(model)
    model.learn(128, callback=TaskStatsCallback(window=2, log_freq=16))
    assert log.latest("rollout/short/ep_rew_mean") == pytest.approx(10 + np.mean([31, 32]), abs=1)
    assert log.latest("rollout/long/ep_rew_mean") == pytest.approx(-100 + 6.5)


def test_evaluations_are_logged_and_written(tmp_path: Any) -> None:
    env = make_multitask_vec_env(TWO)
    model = tiny_model(env, "MultiInputPolicy")
    log = watched(model)
    eval_env = make_multitask_vec_env(TWO)
    callback = TaskEvalCallback(
        eval_env, n_eval_episodes=2, eval_freq=32, log_path=str(tmp_path), best_model_save_path=str(tmp_path), verbose=0
    )
    model.learn(128, callback=callback)
    # While "long" played its episodes 1 and 2, "short" played 9, and both began another; so these are 11, 12 and 4, 5
    assert log.latest("eval/short/mean_reward") == pytest.approx(10 + 11.5)
    assert log.latest("eval/long/mean_reward") == pytest.approx(-100 + 4.5)
    assert log.latest("eval/mean_reward") == pytest.approx((21.5 - 95.5) / 2)
    assert log.latest("eval/mean_ep_length") == pytest.approx((2 + 9) / 2)
    assert log.latest("eval/iqm") == pytest.approx((21.5 - 95.5) / 2)
    assert log.latest("eval/short/success_rate") == log.latest("eval/success_rate") == 0.5
    documented = (Path(__file__).parents[1] / "docs" / "metrics.md").read_text(encoding="utf-8")
    for key in {key for row in log.rows for key in row}:
        section, *task, name = key.split("/")
        assert f"`{section}/<task>/" in documented if task else f"`{key}`" in documented, key
        assert f"{name}`" in documented, key
    found = np.load(tmp_path / "evaluations.npz")
    assert sorted(found) == ["ep_lengths", "results", "successes", "task_results", "tasks", "timesteps"]
    assert found["timesteps"].tolist() == [64, 128] and found["tasks"].tolist() == ["short", "long"]
    assert found["results"].shape == found["ep_lengths"].shape == (2, 4)
    np.testing.assert_allclose(found["task_results"], [[11.5, -98.5], [21.5, -95.5]])
    assert M3PO.load(tmp_path / "best_model").num_timesteps == 128


def test_a_task_that_was_never_drawn_is_told_by_nan(tmp_path: Path) -> None:
    """Task 1 comes in every 60th episode: in an evaluation of 2 episodes of each now and then, and mostly not."""
    train, drawing = Drawing([0, 1], 2), Drawing([0] * 59 + [1], 2)
    drawing.draws_tasks = True  # type: ignore[attr-defined]
    model = tiny_model(DummyVecEnv([lambda: train]), "MultiInputPolicy", learning_starts=10_000)
    options: dict[str, Any] = dict(log_path=str(tmp_path), best_model_save_path=str(tmp_path), verbose=0, warn=False)
    callback = TaskEvalCallback(DummyVecEnv([lambda: drawing]), n_eval_episodes=2, eval_freq=8, **options)
    model.learn(64, callback=callback)
    found = np.load(tmp_path / "evaluations.npz")
    missing = np.isnan(found["task_results"])
    assert found["results"].shape == found["ep_lengths"].shape == (8, 4) and found["tasks"].tolist() == ["task0", "task1"]
    assert not missing[:, 0].any() and missing[:, 1].any() and not missing[:, 1].all()
    assert (np.isnan(found["results"][:, 2:]) == missing[:, 1:]).all()
    assert callback.best_mean_reward == 1.5 and (tmp_path / "best_model.zip").exists()
    assert plot_task_heatmap(tmp_path).axes


def test_successes_count_more_than_returns(monkeypatch: pytest.MonkeyPatch) -> None:
    """A task that tells its first success in the second evaluation has an IQM of another unit from then on."""
    returns, callback = {"a": np.array([50.0])}, TaskEvalCallback(make_multitask_vec_env(TWO), verbose=0)
    callback.names = ["a"]
    best = []
    for successes in ({}, {"a": np.zeros(1)}, {}, {"a": np.ones(1)}, {"a": np.zeros(1)}):
        callback._keep_if_best(TaskScores(returns, {}, successes))
        best.append(callback.best_mean_reward)
    assert best == [50.0, 0.0, 0.0, 1.0, 1.0]


def test_an_episode_that_tells_no_success_has_none() -> None:
    class Silent(Known):
        def step(self, action: Any) -> Any:
            *outcome, info = super().step(action)
            return *outcome, {"is_success": True} if info.get("is_success") else {}

    env = make_multitask_vec_env(Task(Silent, "a", env_kwargs=dict(succeeds=(True, False, False))))
    scores = evaluate_per_task(Still(env), env, n_eval_episodes=4)
    assert scores.successes["a"].tolist() == [1, 0, 0, 1] and scores.are_comparable
    assert scores == {"a": scores["a"]} and scores in [scores]


def test_a_task_that_comes_up_no_more_is_given_up() -> None:
    class Once(Drawing):
        def _observe(self) -> Any:
            return {"observation": np.zeros(2, np.float32), "task": int(self.episode > 0)}

    once = Once([0], 2)
    scores = evaluate_per_task(Still(DummyVecEnv([lambda: once])), DummyVecEnv([lambda: once]), n_eval_episodes=2)
    assert list(scores) == ["task1"] and len(scores.returns["task1"]) == 2
    assert once.episode < 100


def test_the_best_model_is_that_of_the_best_iqm(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second has the highest mean, by one lucky task; the third the best middle half."""
    found = [[0.0, 0.0, 0.0, 0.0], [0.0, 0.1, 0.1, 9.0], [0.5, 0.5, 0.5, 0.5], [0.4, 0.4, 0.4, 3.0]]
    results = iter(
        TaskScores({n: np.array([x]) for n, x in zip("abcd", row, strict=True)}, {"a": np.ones(1)}) for row in found
    )
    monkeypatch.setattr("sb3_m3po.callbacks.evaluate_per_task", lambda *args, **kwargs: next(results))
    env = make_multitask_vec_env(TWO)
    model = tiny_model(make_multitask_vec_env(TWO), "MultiInputPolicy")
    callback = TaskEvalCallback(env, eval_freq=16, best_model_save_path=str(tmp_path), verbose=0, warn=False)
    model.learn(128, callback=callback)
    assert callback.best_mean_reward == 0.5
    assert M3PO.load(tmp_path / "best_model").num_timesteps == 96


def test_among_equal_iqms_the_mean_decides(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the outer quarters learn counts too."""
    found = [[0.0, 1.0, 1.0, 1.0], [0.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.5, 1.0, 1.0, 1.0]]
    results = iter(TaskScores({n: np.array([x]) for n, x in zip("abcd", row, strict=True)}, {}) for row in found)
    monkeypatch.setattr("sb3_m3po.callbacks.evaluate_per_task", lambda *args, **kwargs: next(results))
    env = make_multitask_vec_env(TWO)
    model = tiny_model(make_multitask_vec_env(TWO), "MultiInputPolicy")
    monkeypatch.setattr(TaskEvalCallback, "_log", lambda self, scores: None)
    with pytest.warns(UserWarning, match="unlike rewards: give bounds"):
        model.learn(128, callback=TaskEvalCallback(env, eval_freq=16, best_model_save_path=str(tmp_path), verbose=0))
    assert M3PO.load(tmp_path / "best_model").num_timesteps == 96


class Named:
    """Stands in for a model of some tasks, and says which of them it was asked about."""

    def __init__(self, env: VecEnv):
        self.observation_space, self.action_space = env.observation_space, env.action_space
        self.asked: list[int] = []

    def predict(self, observation: Any, **kwargs: Any) -> Any:
        self.asked += observation["task"].ravel().tolist()
        return np.zeros((len(observation["task"]), *(self.action_space.shape or ()))), None


def test_tasks_go_by_their_names() -> None:
    model = Named(make_multitask_vec_env(TWO))
    scores = evaluate_per_task(model, make_multitask_vec_env(TWO[1]), 1)
    assert list(scores) == ["long"] and set(model.asked) == {1}
    model.asked.clear()
    scores = evaluate_per_task(model, make_multitask_vec_env(TWO[::-1]), 1)
    assert list(scores) == ["long", "short"] and model.asked[:2] == [1, 0]
    assert scores["long"] < -90 < 10 < scores["short"]
    with pytest.raises(ValueError, match=r"does not know the tasks stranger, only short, long: add_tasks\(\)"):
        evaluate_per_task(model, make_multitask_vec_env([TWO[0], known("stranger")]), 1)


@pytest.mark.parametrize("where", ["tail", "key", "key beside a misleading one"])
def test_a_model_knows_where_its_tasks_are_told(where: str) -> None:
    tail, misleading = where == "tail", "misleading" in where

    class Elsewhere(gym.ObservationWrapper):
        """The task under another key, or in a one-hot tail."""

        def __init__(self, env: gym.Env, task: int):
            super().__init__(env)
            self.task = task
            vector = spaces.Box(-1.0, 1.0, (4,))
            parts = {"x": VECTOR, "which": spaces.Discrete(2)} | ({"task": spaces.Discrete(2)} if misleading else {})
            self.observation_space = vector if tail else spaces.Dict(parts)

        def observation(self, observation: Any) -> Any:
            if tail:
                return np.concatenate([observation, np.eye(2, dtype=np.float32)[self.task]])
            return {"x": observation, "which": self.task} | ({"task": 1 - self.task} if misleading else {})

    env = DummyVecEnv([lambda task=task: Monitor(Elsewhere(Known(10.0 * task), task)) for task in (0, 1)])  # type: ignore[misc]
    options: Any = {"n_tasks": 2} if tail else {"task_key": "which"}
    model = tiny_model(env, "MlpPolicy" if tail else "MultiInputPolicy", **options)
    log = watched(model)
    model.learn(
        64, callback=[TaskEvalCallback(copy.deepcopy(env), eval_freq=16, n_eval_episodes=2, verbose=0), TaskStatsCallback()]
    )
    assert log.latest("eval/task1/mean_reward") > 10 + log.latest("eval/task0/mean_reward") - 5


def test_callbacks_of_the_evaluation_are_called() -> None:
    class Count(BaseCallback):
        calls = 0

        def _on_step(self) -> bool:
            self.calls += 1
            return True

    env, after = make_multitask_vec_env(TWO), Count()
    model = tiny_model(make_multitask_vec_env(TWO), "MultiInputPolicy")
    model.learn(128, callback=TaskEvalCallback(env, None, after, 1, eval_freq=32, verbose=0, warn=False))
    assert after.calls == 2
    # The first IQM of two episodes is (11 - 99) / 2: the training ends there
    env = make_multitask_vec_env(TWO)
    stop = StopTrainingOnRewardThreshold(reward_threshold=-50)
    model = tiny_model(make_multitask_vec_env(TWO), "MultiInputPolicy")
    model.learn(1_000, callback=TaskEvalCallback(env, stop, None, 1, eval_freq=32, verbose=0, warn=False))
    assert model.num_timesteps == 64


def test_evaluation_under_vec_normalize_takes_the_training_s_statistics() -> None:
    kwargs = dict(norm_reward=False, norm_obs_keys=["observation"])
    train = VecNormalize(make_multitask_vec_env(["Pendulum-v1", TWO[0]], seed=0), **kwargs)  # type: ignore[arg-type]
    test = VecNormalize(make_multitask_vec_env(["Pendulum-v1", TWO[0]], seed=1), training=False, **kwargs)  # type: ignore[arg-type]
    model = tiny_model(train, "MultiInputPolicy")
    model.learn(64, callback=TaskEvalCallback(test, n_eval_episodes=1, eval_freq=32, verbose=0))
    np.testing.assert_array_equal(test.obs_rms["observation"].mean, train.obs_rms["observation"].mean)  # type: ignore[index]


def test_looking_changes_nothing() -> None:
    def trained(callback: Any) -> M3PO:
        return tiny_model(make_multitask_vec_env(TWO, seed=0), "MultiInputPolicy").learn(128, callback=callback)

    looked = trained(TaskEvalCallback(make_multitask_vec_env(TWO), n_eval_episodes=1, eval_freq=16, verbose=0))
    alone = trained(None)
    for mine, theirs in zip(looked.policy.parameters(), alone.policy.parameters(), strict=True):
        assert mine.equal(theirs)


# -------------------------------------------------------------------- pictures


def test_heatmap_shows_the_scores(tmp_path: Any) -> None:
    path = str(tmp_path / "evaluations.npz")
    np.savez(path, timesteps=[100, 200, 300], tasks=["a", "b"], task_results=[[0.0, -5.0], [5.0, -5.0], [10.0, -1.0]])
    figure = plot_task_heatmap(path)
    drawn = figure.axes[0].images[0].get_array()
    np.testing.assert_allclose(np.asarray(drawn), [[0.0, 0.5, 1.0], [0.0, 0.0, 1.0]])
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["a", "b"]
    assert [label.get_text() for label in figure.axes[0].get_xticklabels()] == ["100", "200", "300"]
    bounded = plot_task_heatmap(path, bounds={"a": (0, 20), "b": (-9, -1)})
    np.testing.assert_allclose(np.asarray(bounded.axes[0].images[0].get_array())[:, 2], [0.5, 1])
    figure.savefig(tmp_path / "heatmap.png")


def test_heatmap_shows_successes_where_all_tasks_tell_them() -> None:
    nan = float("nan")
    data: dict[str, Any] = dict(timesteps=[1, 2], tasks=["a", "b"], task_results=[[1.0, 5.0], [2.0, 5.0]])

    def drawn(**changes: Any) -> Any:
        return np.asarray(plot_task_heatmap(data | changes).axes[0].images[0].get_array()).tolist()

    assert drawn(successes=[[0.0, 1.0], [0.0, 0.5]]) == [[0, 0], [1, 0.5]]
    assert drawn(successes=[[0.0, nan], [0.0, nan]]) == drawn() == [[0, 1], [0, 0]]
    bounds = {"a": (0.0, 4.0), "b": (0.0, 5.0)}
    bounded = plot_task_heatmap(data | dict(successes=[[0.0, 1.0], [0.0, 0.5]]), bounds).axes[0].images[0].get_array()
    assert np.asarray(bounded).tolist() == [[0.25, 0.5], [1, 1]]
    # A task that was not drawn is told by neither
    figure = plot_task_heatmap(data | dict(task_results=[[1.0, nan], [2.0, 5.0]], successes=[[0.0, nan], [1.0, 1.0]]))
    assert figure.axes[1].get_ylabel() == "success rate"


@pytest.mark.parametrize("n_episodes", [1, 2])
def test_heatmap_shows_what_the_callback_wrote(tmp_path: Path, n_episodes: int) -> None:
    tasks = [TWO[0], known("other", length=4, succeeds=(True, True, False, False))]
    model = tiny_model(make_multitask_vec_env(tasks), "MultiInputPolicy", learning_starts=10_000)
    env = make_multitask_vec_env(tasks)
    model.learn(64, callback=TaskEvalCallback(env, eval_freq=8, n_eval_episodes=n_episodes, log_path=str(tmp_path), verbose=0))
    figure = plot_task_heatmap(tmp_path)
    assert figure.axes[1].get_ylabel() == "success rate"
    # Of the short task every third episode begins an evaluation (every fifth), of the other one every second (third)
    expected = {1: [[1, 0, 1, 0], [1, 0, 1, 0]], 2: [[0.5] * 4, [1, 0.5, 0, 0.5]]}[n_episodes]
    assert np.asarray(figure.axes[0].images[0].get_array()).tolist() == expected


def written(folder: Path, names: list[str] = ["a", "b"]) -> dict[str, Any]:  # noqa: B006
    """:return: What is in ``evaluations.npz`` of that folder"""
    data: dict[str, Any] = dict(timesteps=[100, 200], tasks=names, task_results=[range(len(names))] * 2)
    np.savez(folder / "evaluations.npz", **data)
    return data


def test_heatmap_finds_the_evaluations(tmp_path: Any) -> None:
    data = written(tmp_path)
    expected = np.asarray(plot_task_heatmap(data).axes[0].images[0].get_array())
    for source in (tmp_path / "evaluations.npz", tmp_path, str(tmp_path)):
        found = plot_task_heatmap(source).axes[0].images[0].get_array()
        np.testing.assert_array_equal(np.asarray(found), expected)


def test_heatmap_says_what_is_missing(tmp_path: Any) -> None:
    written(tmp_path, ["a", "b", "c"])
    with pytest.raises(ValueError, match="bounds are missing for a, c: give"):
        plot_task_heatmap(tmp_path, bounds={"b": (0, 1)})
    # As SB3's own callback writes it
    np.savez(tmp_path / "evaluations.npz", timesteps=[100], results=[[1.0]], ep_lengths=[[5]])
    with pytest.raises(
        ValueError, match=r"no tasks, task_results \(they have timesteps, results, ep_lengths\).*TaskEvalCallback"
    ):
        plot_task_heatmap(tmp_path)


def test_heatmap_of_many_tasks_and_evaluations_fits_on_a_screen() -> None:
    names = [f"button-press-topdown-wall-v{i}" for i in range(50)]
    data = dict(timesteps=range(100), tasks=names, task_results=np.random.default_rng(0).random((100, 50)))
    figure = plot_task_heatmap(data)
    width, height = figure.get_size_inches()
    assert 8 < width < 13 and 8 < height < 13
    figure.draw_without_rendering()
    assert figure.axes[0].get_position().width > 0.6
    boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
    assert all(above.y0 >= below.y1 for above, below in pairwise(boxes))
    # As large as it needs for two
    assert max(plot_task_heatmap(dict(data, tasks=names[:2], task_results=np.zeros((100, 2)))).get_size_inches()) < 13


def test_embeddings_are_drawn_by_their_principal_components(tmp_path: Any) -> None:
    model = tiny_model(make_multitask_vec_env([*TWO, known("third")]), "MultiInputPolicy")
    figure = plot_task_embeddings(model)
    assert [text.get_text() for text in figure.axes[0].texts] == ["short", "long", "third"]
    figure.savefig(tmp_path / "embeddings.png")
    # Three points on a line: all is in the first component
    line = plot_task_embeddings(np.outer([-3.0, 1.0, 2.0], [0.6, 0.8, 0.0]), list("abc")).axes[0]
    points = np.asarray(line.collections[0].get_offsets())
    np.testing.assert_allclose(np.abs(points[:, 0]), np.array([3, 1, 2]), atol=1e-12)
    np.testing.assert_allclose(points[:, 1], 0, atol=1e-12)
    assert "100%" in line.get_xlabel()
    named = plot_task_embeddings(np.eye(2), np.array(["a", "b"])).axes[0]
    assert [text.get_text() for text in named.texts] == ["a", "b"]
    numbered = plot_task_embeddings(np.eye(2)).axes[0]
    assert [text.get_text() for text in numbered.texts] == ["0", "1"]


@pytest.mark.parametrize("close", [False, True])
def test_labels_of_many_tasks_can_be_read(close: bool) -> None:
    embeddings = np.random.default_rng(0).normal(size=(50, 8))
    embeddings[:10] *= 0.1 if close else 1.0
    figure = plot_task_embeddings(embeddings, [f"button-press-wall-v{i}" for i in range(50)])
    figure.draw_without_rendering()
    axes = figure.axes[0]
    # Of the texts alone, without the lines to their points
    boxes = [Text.get_window_extent(text) for text in axes.texts]
    assert not [(i, j) for i, one in enumerate(boxes) for j, other in enumerate(boxes[:i]) if one.overlaps(other)]
    assert all(axes.bbox.x0 <= box.x0 and box.x1 <= axes.bbox.x1 for box in boxes)
    assert all(float(text.get_fontsize()) >= 7 for text in axes.texts)


def test_one_task_has_no_embedding_to_draw() -> None:
    with pytest.raises(ValueError, match="single task"):
        plot_task_embeddings(tiny_model(make_multitask_vec_env(TWO[0]), "MultiInputPolicy"))
    with pytest.raises(ValueError, match="PPO has no embeddings of tasks: give an M3PO"):
        plot_task_embeddings(PPO("MultiInputPolicy", make_multitask_vec_env(TWO)))
    with pytest.raises(ValueError, match="There are 3 names for 2 embeddings"):
        plot_task_embeddings(np.eye(2), list("abc"))
