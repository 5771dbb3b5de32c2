"""The discount factor that follows from a time limit, wherever an environment keeps it."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AsyncVectorEnv, AutoresetMode
from gymnasium.wrappers import TimeLimit
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize

from sb3_m3po import M3PO, Task, make_multitask_vec_env
from sb3_m3po.discount import gamma_for, time_limit_of
from sb3_m3po.envs import ActionRepeat, VectorEnvAdapter
from sb3_m3po.tasks import TaskSpec
from tests.helpers import tiny_model


class Endless(gym.Env):
    observation_space = gym.spaces.Box(-1.0, 1.0, (2,))
    action_space = gym.spaces.Box(-1.0, 1.0, (1,))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return np.zeros(2, np.float32), 1.0, False, False, {}


def limited(steps: int) -> gym.Env:
    return TimeLimit(Endless(), steps)


def processes(makers: list[Callable[[], gym.Env]]) -> SubprocVecEnv:
    return SubprocVecEnv(makers, start_method="fork")


def vector(mode: str, wrappers: Sequence[Any] = ()) -> VectorEnvAdapter:
    kwargs = {"autoreset_mode": AutoresetMode.SAME_STEP}
    return VectorEnvAdapter(gym.make_vec("Pendulum-v1", 2, vectorization_mode=mode, vector_kwargs=kwargs, wrappers=wrappers))


@pytest.mark.parametrize(
    ("time_limit", "gamma"), [(None, 0.99), (1, 0.95), (100, 0.95), (200, 0.975), (500, 0.99), (1000, 0.99), (100_000, 0.99)]
)
def test_rule(time_limit: int | None, gamma: float) -> None:
    assert gamma_for(time_limit) == pytest.approx(gamma)


@pytest.mark.parametrize(("time_limit", "gamma"), [(None, 0.99), (200, 0.975), (500, 0.99), (800, 0.99375), (1000, 0.995)])
def test_rule_of_episodes_that_can_end_early(time_limit: int | None, gamma: float) -> None:
    assert gamma_for(time_limit, can_terminate=True) == pytest.approx(gamma)


class Falling(Endless):
    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        return np.zeros(2, np.float32), 1.0, True, False, {}


def test_it_grows_with_the_first_termination_and_is_loaded(tmp_path: Path) -> None:
    """By default, of one task and of that one of two that terminates; a number stays."""
    makers: list[Callable[[], gym.Env]] = [partial(TimeLimit, Falling(), 1_000), partial(limited, 1_000)]
    for number, gammas in (({}, [0.995, 0.99]), ({"gamma": 0.9}, [0.9, 0.9])):
        model = tiny_model(makers[0](), **number)
        assert model.policy.gammas.tolist() == pytest.approx(gammas[1:])
        model.learn(64).save(tmp_path / "model")
        for known in (model, M3PO.load(tmp_path / "model")):
            assert known.policy.gammas.tolist() == pytest.approx(gammas[:1])
        env = make_multitask_vec_env([Task(maker, name) for maker, name in zip(makers, ("falling", "lasting"), strict=True)])
        tasks = tiny_model(env, "MultiInputPolicy", **number).learn(64)
        assert tasks.policy.gammas.tolist() == pytest.approx(gammas)


def test_the_first_unit_is_that_of_the_discount_that_is_learned_with() -> None:
    model = M3PO("MlpPolicy", limited(1_000))
    asked: list[float] = []

    def return_scale(gammas: np.ndarray) -> np.ndarray:
        asked.extend(gammas.tolist())
        return np.ones(1)

    model.policy.sync(return_scale, np.array([True]))
    assert asked == pytest.approx([0.995]) == model.policy.gammas.tolist()


def test_learning_goes_by_it() -> None:
    model = tiny_model(limited(200), gamma="auto").learn(64)
    # The rewards are 1, so the scale is that of the mean reward: a tenth of 1 / (1 - gamma)
    assert model._learner().gamma == pytest.approx(0.975) and model.policy.return_scale.item() == pytest.approx(4.0, rel=1e-4)


VEC_ENVS: list[tuple[Callable[[], VecEnv], float]] = [
    (lambda: make_vec_env("Pendulum-v1"), 0.975),
    (lambda: VecNormalize(make_vec_env("Pendulum-v1")), 0.975),
    # Of 1,000 frames, four at a time
    (lambda: DummyVecEnv([lambda: ActionRepeat(limited(1_000), 4)]), 0.98),
    (lambda: DummyVecEnv([partial(limited, 200), partial(limited, 250)]), 0.98),
    (lambda: DummyVecEnv([partial(limited, 200), Endless]), 0.99),
    (lambda: DummyVecEnv([lambda: ActionRepeat(Endless(), 4)]), 0.99),
    (lambda: processes([partial(limited, 200)] * 2), 0.975),
    (lambda: processes([Endless] * 2), 0.99),
    (lambda: vector("sync"), 0.975),
    (lambda: vector("async"), 0.975),
    (lambda: vector("sync", wrappers=[lambda env: ActionRepeat(env, 4)]), 0.95),
    (lambda: vector("sync", wrappers=[lambda env: TimeLimit(env, 150)]), 1 - 5 / 150),
    (lambda: VectorEnvAdapter(AsyncVectorEnv([Endless] * 2, autoreset_mode=AutoresetMode.SAME_STEP)), 0.99),
]


@pytest.mark.parametrize(("make", "gamma"), VEC_ENVS)
def test_the_time_limit_is_found(make: Callable[[], VecEnv], gamma: float) -> None:
    env = make()
    model = M3PO("MlpPolicy", env, gamma="auto")
    assert model.policy.gammas.tolist() == pytest.approx([gamma])
    # The question has not cost an environment its life
    env.reset()
    env.close()


@pytest.mark.parametrize(
    ("limit", "gamma"), [(np.int64(50), 0.95), (np.float32(50), 0.95), (float("inf"), 0.99), (True, 0.99), (None, 0.99)]
)
def test_a_time_limit_is_any_finite_number(limit: Any, gamma: float) -> None:
    class Limited(Endless):
        _max_episode_steps = limit

    assert gamma_for(time_limit_of(Limited())) == pytest.approx(gamma)


def test_each_task_has_its_own(tmp_path: Path) -> None:
    limits = [Task(partial(limited, 300), "three hundred"), Task(Endless, "endless")]
    env = make_multitask_vec_env(["Pendulum-v1", Task("MountainCarContinuous-v0", gamma=0.9), *limits])
    by_length, fixed = [0.975, 0.9, 1 - 5 / 300, 0.99], [0.8, 0.9, 0.8, 0.8]
    model = M3PO("MultiInputPolicy", env, gamma="auto")
    assert model.policy.gammas.tolist() == pytest.approx(by_length)
    model.save(tmp_path / "model")
    assert M3PO.load(tmp_path / "model").policy.gammas.tolist() == pytest.approx(by_length)
    assert M3PO.load(tmp_path / "model", gamma=0.8).policy.gammas.tolist() == pytest.approx(fixed)
    assert M3PO("MultiInputPolicy", env, gamma=0.8).policy.gammas.tolist() == pytest.approx(fixed)


def test_tasks_without_a_table_have_the_environments_time_limit() -> None:
    class Told(gym.ObservationWrapper):
        def __init__(self, env: gym.Env) -> None:
            super().__init__(env)
            self.observation_space = gym.spaces.Dict({"x": env.observation_space, "task": gym.spaces.Discrete(2)})

        def observation(self, observation: Any) -> Any:
            return {"x": observation, "task": 1}

    assert M3PO("MultiInputPolicy", Told(limited(200)), gamma="auto").policy.gammas.tolist() == pytest.approx([0.975] * 2)


def test_the_only_task_has_its_own() -> None:
    env = make_multitask_vec_env([Task("Pendulum-v1", gamma=0.9)])
    assert M3PO("MultiInputPolicy", env).policy.gammas.tolist() == pytest.approx([0.9])
    assert M3PO("MultiInputPolicy", make_multitask_vec_env("Pendulum-v1")).policy.gammas.tolist() == pytest.approx([0.975])


def test_a_task_without_a_time_limit_does_not_take_that_of_others(tmp_path: Path) -> None:
    tasks = [Task(partial(limited, 200), "limited"), Task(Endless, "endless")]
    model = tiny_model(make_multitask_vec_env(tasks), "MultiInputPolicy", gamma="auto")
    model.save(tmp_path / "model")
    limited_alone = make_multitask_vec_env(tasks[:1], like=model)
    assert M3PO.load(tmp_path / "model", env=limited_alone).policy.gammas.tolist() == pytest.approx([0.975, 0.99])
    model.add_tasks(make_multitask_vec_env([Task(partial(limited, 300), "new")], like=model))
    assert model.policy.gammas.tolist() == pytest.approx([0.975, 0.99, 1 - 5 / 300])


def test_other_environments_have_their_own(tmp_path: Path) -> None:
    model = tiny_model(limited(100), gamma="auto")
    model.save(tmp_path / "model")
    for limit, gamma in ((200, 0.975), (500, 0.99)):
        model.set_env(limited(limit))
        loaded = M3PO.load(tmp_path / "model", env=limited(limit))
        assert model.policy.gammas.tolist() == loaded.policy.gammas.tolist() == pytest.approx([gamma])
    model.save(tmp_path / "model")
    assert M3PO.load(tmp_path / "model").policy.gammas.tolist() == pytest.approx([0.99])


def test_tasks_of_other_environments_have_their_own(tmp_path: Path) -> None:
    def env(limit: int) -> VecEnv:
        return make_multitask_vec_env([Task(partial(limited, limit), "one"), Task(partial(limited, 200), "two")])

    first = env(100)
    model = tiny_model(first, "MultiInputPolicy", gamma="auto")
    model.save(tmp_path / "model")
    model.set_env(env(500))
    loaded = M3PO.load(tmp_path / "model", env=env(500))
    assert model.policy.gammas.tolist() == loaded.policy.gammas.tolist() == pytest.approx([0.99, 0.975])
    model.save(tmp_path / "again")
    assert M3PO.load(tmp_path / "again").policy.gammas.tolist() == pytest.approx([0.99, 0.975])
    # What the first environments know is not changed
    assert tiny_model(first, "MultiInputPolicy", gamma="auto").policy.gammas.tolist() == pytest.approx([0.95, 0.975])


def test_a_number_stands_and_is_loaded(tmp_path: Path) -> None:
    model = M3PO("MlpPolicy", "Pendulum-v1", gamma=0.9)
    assert model.policy.gammas.tolist() == pytest.approx([0.9])
    model.save(tmp_path / "model")
    assert M3PO.load(tmp_path / "model").policy.gammas.tolist() == pytest.approx([0.9])
    # The time limit is known to the model
    assert M3PO.load(tmp_path / "model", gamma="auto").policy.gammas.tolist() == pytest.approx([0.975])
    assert M3PO.load(
        tmp_path / "model", env=TimeLimit(gym.make("Pendulum-v1"), 250), gamma="auto"
    ).policy.gammas.tolist() == pytest.approx([0.98])


def test_tasks_of_another_length_are_the_same_tasks() -> None:
    assert TaskSpec("a", 2, 1, time_limit=200) == TaskSpec("a", 2, 1, time_limit=1_000)
