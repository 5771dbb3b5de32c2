"""Vec-envs of unlike tasks: padding, masks, ids, suites; the single environment; Gymnasium's vector environments."""

import copy
import multiprocessing
import os
import signal
from collections.abc import Callable
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env as check_gymnasium_env
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from stable_baselines3 import A2C, PPO, SAC
from stable_baselines3.common.env_checker import check_env
from stable_baselines3.common.monitor import Monitor, load_results
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv, VecNormalize

from sb3_m3po import M3PO, Task, VectorEnvAdapter, evaluate_per_task, make_multitask_vec_env
from sb3_m3po.checks import dead_workers_named
from sb3_m3po.envs import DM_CONTROL_EASY, ActionRepeat, MultiTaskEnv, TaskWrapper
from sb3_m3po.tasks import TaskSpace, TaskSpec
from tests.helpers import RandomEnv, tiny_model

ONE = spaces.Box(-1.0, 1.0, (1,))


class Echo(gym.Env):
    """
    Its observation is an element of the space, always another one; its reward the mean of the action it was given. Episodes
    of ``length`` steps, which end by truncation if ``truncates``. It fails in the step before its end if it ``fails``.

    :param received: The actions, as they arrived
    """

    def __init__(
        self,
        observation_space: spaces.Space = ONE,
        action_space: spaces.Space = ONE,
        length: int = 4,
        truncates: bool = False,
        fails: str = "",
        success_at: int | None = None,
    ):
        self.observation_space, self.action_space = copy.deepcopy(observation_space), action_space
        self.length, self.truncates, self.fails, self.success_at = length, truncates, fails, success_at
        self.received: list[Any] = []
        self.sent: list[Any] = []
        self.t = 0

    def _observe(self) -> Any:
        self.sent.append(self.observation_space.sample())
        return self.sent[-1]

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.t = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.received.append(action)
        self.t += 1
        if self.t == self.length - 1 and self.fails == "error":
            raise ZeroDivisionError("by zero")
        if self.t == self.length - 1 and self.fails == "death":
            os.kill(os.getpid(), signal.SIGKILL)
        ended = self.t >= self.length
        info = {} if self.success_at is None else {"success": float(self.t == self.success_at)}
        return self._observe(), float(np.mean(action)), ended and not self.truncates, ended and self.truncates, info


class Mortal(Echo):
    """:param at: Where its process dies, unless that is the one which starts the others: "make", "reset" or "second reset" """

    def __init__(self, at: str):
        super().__init__()
        self.at, self.resets = at, 0
        self._live("make")

    def _live(self, at: str) -> None:
        if self.at == at and multiprocessing.parent_process() is not None:
            os.kill(os.getpid(), signal.SIGKILL)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.resets += 1
        self._live("second reset" if self.resets == 2 else "reset")
        return super().reset(seed=seed, options=options)


def box(n: int, low: float = -1.0, high: float = 1.0, dtype: Any = np.float32) -> spaces.Box:
    return spaces.Box(low, high, (n,), dtype)


SMALL = Task(Echo, "small", env_kwargs=dict(observation_space=box(2), action_space=spaces.Box(-2.0, 6.0, (1,))))
LARGE = Task(
    Echo,
    "large",
    env_kwargs=dict(
        observation_space=spaces.Dict({"b": box(3), "a": spaces.Discrete(2)}),
        action_space=spaces.Box(np.array([[0.0], [-1.0]]), np.array([[1.0], [-1.0]]), dtype=np.float64),
        length=6,
        truncates=True,
    ),
)
FEW = Task(Echo, "few", env_kwargs=dict(observation_space=box(2), action_space=spaces.Discrete(2)))
MANY = Task(Echo, "many", env_kwargs=dict(observation_space=box(3), action_space=spaces.Discrete(5, start=10)))


def echoes(env: VecEnv) -> list[Any]:
    """:return: The innermost environments"""
    return [inner.unwrapped for inner in env.unwrapped.envs]  # type: ignore[attr-defined]


# --------------------------------------------------------------------- padding


def test_spaces_are_as_wide_as_the_widest_task() -> None:
    env = make_multitask_vec_env([SMALL, LARGE], n_envs_per_task=2)
    assert env.num_envs == 4
    assert env.observation_space["observation"] == spaces.Box(-np.inf, np.inf, (5,), np.float32)  # type: ignore[index]
    assert env.action_space == spaces.Box(-1.0, 1.0, (2,), np.float32)
    task = env.observation_space["task"]  # type: ignore[index]
    assert isinstance(task, TaskSpace) and list(task.table) == [TaskSpec("small", 2, 1), TaskSpec("large", 5, 2)]


def test_observations_are_the_tasks_own_behind_which_zeros_stand() -> None:
    env = make_multitask_vec_env([SMALL, LARGE], seed=0)
    obs: Any = env.reset()
    small, large = (echo.sent[-1] for echo in echoes(env))
    assert obs["task"].tolist() == [0, 1]
    assert obs["observation"][0].tolist() == [*small.tolist(), 0, 0, 0]
    # Keys in the order of the space, Discrete as one-hot
    assert obs["observation"][1].tolist() == [*np.eye(2)[large["a"]].tolist(), *large["b"].tolist()]


@pytest.mark.parametrize(
    ("space", "element", "expected"),
    [
        (spaces.Box(-1, 1, ()), np.array(0.5), [0.5]),
        (spaces.Box(-1, 1, (2, 2)), np.array([[1.0, 2.0], [3.0, 4.0]]), [1.0, 2.0, 3.0, 4.0]),
        (spaces.Discrete(3, start=-1), -1, [1.0, 0.0, 0.0]),
        (spaces.MultiDiscrete([2, 3]), np.array([1, 0]), [0.0, 1.0, 1.0, 0.0, 0.0]),
        (spaces.MultiBinary(2), np.array([0, 1]), [0.0, 1.0]),
        (spaces.Dict({"x": spaces.Dict({"y": box(1)}), "w": box(1)}), {"x": {"y": [2.0]}, "w": [1.0]}, [1.0, 2.0]),
        (spaces.Box(0, 255, (36, 36, 1), np.uint8), np.full((36, 36, 1), 51, np.uint8), [0.2] * 1296),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_kind_of_observation_becomes_numbers(space: spaces.Space, element: Any, expected: list[float]) -> None:
    env: Any = make_multitask_vec_env(Task(Echo, env_kwargs=dict(observation_space=space)))
    wrapper = env.envs[0].env
    assert isinstance(wrapper, TaskWrapper)
    np.testing.assert_allclose(wrapper.observation(element)["observation"], expected, rtol=1e-6)


def test_actions_are_stretched_to_each_tasks_own_bounds() -> None:
    env = make_multitask_vec_env([SMALL, LARGE])
    env.reset()
    for action in ([-1.0, 9.0], [0.0, 0.0], [0.5, -1.0], [1.0, 1.0], [3.0, 3.0]):
        env.step(np.array([action, action], np.float32))
    small, large = (echo.received for echo in echoes(env))
    # Bounds -2 and 6; what lies behind the only dimension is ignored, what lies outside is clipped
    assert np.ravel(small).tolist() == [-2.0, 2.0, 4.0, 6.0, 6.0]
    # Bounds 0 and 1 in the first dimension, of shape (2, 1) and float64; the second has one value only
    assert [a.shape for a in large] == [(2, 1)] * 5 and large[0].dtype == np.float64
    np.testing.assert_allclose(np.array(large)[:, 0, 0], [0.0, 0.5, 0.75, 1.0, 1.0])
    assert np.array(large)[:, 1, 0].tolist() == [-1.0] * 5
    assert all(echo.action_space.contains(a) for echo in echoes(env) for a in echo.received)


def test_whole_numbers_are_reached_evenly() -> None:
    whole = Task(Echo, "whole", env_kwargs=dict(action_space=spaces.Box(0, 3, (1,), np.int64)))
    wide = Task(Echo, "wide", env_kwargs=dict(action_space=spaces.Box(-3e38, 3e38, (1,), np.float32)))
    env = make_multitask_vec_env([whole, wide])
    env.reset()
    for action in (-1.0, -0.5, 0.1, 0.5, 1.0):
        env.step(np.array([[action]] * 2, np.float32))
    whole_numbers, wide_numbers = (np.ravel(echo.received) for echo in echoes(env))
    assert whole_numbers.tolist() == [0, 1, 2, 2, 3] and whole_numbers.dtype == np.int64
    np.testing.assert_allclose(wide_numbers, np.array([-3e38, -1.5e38, 3e37, 1.5e38, 3e38]), rtol=1e-6)


def test_an_action_that_a_task_does_not_have_becomes_one_that_it_has() -> None:
    env = make_multitask_vec_env([FEW, MANY])
    env.reset()
    assert env.action_space == spaces.Discrete(5)
    for action in range(5):
        env.step(np.array([action, action]))
    few, many = (echo.received for echo in echoes(env))
    assert few == [0, 1, 0, 1, 0]
    assert many == [10, 11, 12, 13, 14]


def test_equal_multi_actions_are_left_as_they_are() -> None:
    space = spaces.MultiDiscrete([2, 3])
    tasks = [Task(Echo, name, env_kwargs=dict(action_space=space)) for name in "ab"]
    env = make_multitask_vec_env(tasks)
    env.reset()
    env.step(np.array([[1, 2], [0, 1]]))
    assert env.action_space == space
    assert [echo.received[0].tolist() for echo in echoes(env)] == [[1, 2], [0, 1]]


@pytest.mark.parametrize(("tasks", "width"), [([SMALL, LARGE], [[1, 0], [1, 1]]), ([FEW, MANY], [[1, 1, 0, 0, 0], [1] * 5])])
def test_masks_can_be_keys(tasks: list[Task], width: list[list[int]]) -> None:
    env = make_multitask_vec_env(tasks, expose_masks=True)
    obs: Any = env.reset()
    assert obs["action_mask"].tolist() == width
    wide = obs["observation"].shape[1]
    assert obs["observation_mask"].tolist() == [[1] * 2 + [0] * (wide - 2), [1] * wide]
    assert "action_mask" not in make_multitask_vec_env(tasks).observation_space.spaces  # type: ignore[attr-defined]
    check_env(env.envs[0], warn=False)  # type: ignore[attr-defined]


@pytest.mark.parametrize("task", [SMALL, LARGE, FEW, MANY], ids=str)
def test_each_environment_passes_the_checkers(task: Task) -> None:
    env: Any = make_multitask_vec_env([task, Task(task.env, "other", env_kwargs=task.env_kwargs)])
    check_env(env.envs[0], warn=False)


# ------------------------------------------------------- episodes and their ends


def test_ends_are_told_apart_and_the_last_observation_is_padded() -> None:
    env = make_multitask_vec_env([SMALL, LARGE], seed=0)
    env.reset()
    ends: dict[int, Any] = {}
    for _ in range(6):
        _, _, dones, infos = env.step(np.zeros((2, 2)))
        for i in np.flatnonzero(dones).tolist():
            ends[i] = infos[i]
    small, large = (echo.sent for echo in echoes(env))
    assert not ends[0]["TimeLimit.truncated"] and ends[1]["TimeLimit.truncated"]
    # The one before the last of each is the last of its episode; "small" went on for two more steps
    assert ends[0]["terminal_observation"]["observation"].tolist() == [*small[4].tolist(), 0, 0, 0]
    assert ends[1]["terminal_observation"]["observation"][2:].tolist() == large[-2]["b"].tolist()
    assert [ends[i]["terminal_observation"]["task"] for i in (0, 1)] == [0, 1]
    assert [ends[i]["task"] for i in (0, 1)] == ["small", "large"]
    assert [ends[i]["episode"]["l"] for i in (0, 1)] == [4, 6]


@pytest.mark.parametrize(("at", "expected"), [(2, True), (4, True), (9, False)])
def test_an_episode_succeeded_if_it_ever_did(at: int, expected: bool) -> None:
    env = make_multitask_vec_env(Task(Echo, env_kwargs=dict(success_at=at)))
    env.reset()
    infos = [env.step(np.zeros((1, 1)))[3][0] for _ in range(8)]
    assert [info.get("is_success") for info in infos] == [None, None, None, expected] * 2


@pytest.mark.parametrize("at", [1, 4, 5])
def test_a_task_may_repeat_its_actions(at: int) -> None:
    env: Any = make_multitask_vec_env(Task(Echo, env_kwargs=dict(length=5, success_at=at), action_repeat=3))
    env.reset()
    steps = [env.step(np.full((1, 1), value)) for value in (0.5, -0.25)]
    assert [step[1][0] for step in steps] == [1.5, -0.5] and [step[2][0] for step in steps] == [False, True]
    assert [step[3][0]["success"] for step in steps] == [float(at == 1), float(at > 3)]
    assert steps[1][3][0]["is_success"]
    assert env.envs[0].unwrapped.received == [0.5] * 3 + [-0.25] * 2


class Sparse(Echo):
    """Tells a success only in the step in which it happens, and in every second episode."""

    episode = 0

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        *outcome, info = super().step(action)
        succeeds = bool(info.pop("success")) and self.episode % 2 == 0
        self.episode += outcome[2]
        return *outcome, {"success": True} if succeeds else {}


@pytest.mark.parametrize("at", [2, 4])
def test_success_that_is_told_once_is_not_lost(at: int) -> None:
    envs: Any = make_multitask_vec_env(Task(Sparse, env_kwargs=dict(success_at=at)))
    envs.reset()
    infos = [envs.step(np.zeros((1, 1)))[3][0] for _ in range(16)]
    assert [info.get("is_success") for info in infos[3::4]] == [True, False, True, False]
    adapter: Any = VectorEnvAdapter(gym.vector.SyncVectorEnv([lambda: Sparse(success_at=at)] * 2))
    adapter.reset()
    infos = [info for _ in range(16) for info in adapter.step(np.zeros((2, 1)))[3] if "terminal_observation" in info]
    assert [info.get("is_success") for info in infos] == [True, True, False, False] * 2


def test_an_observation_of_another_length_is_named() -> None:
    class Grows(Echo):
        def _observe(self) -> Any:
            return np.zeros(1 + 2 * (self.t > 1), np.float32)

    env = make_multitask_vec_env(
        [Task(Grows, "grows"), Task(Echo, "wide", env_kwargs=dict(observation_space=spaces.Box(-1, 1, (3,))))]
    )
    env.reset()
    env.step(np.zeros((2, 1)))
    with pytest.raises(ValueError, match=r"'grows' gave an observation of 3 numbers, but its observation_space .* has 1"):
        env.step(np.zeros((2, 1)))


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        (Task(lambda size: Echo(), "needs"), RuntimeError, r"Task 'needs' could not be made: TypeError: .*missing.*'size'"),
        (Task("Pendulum-v1", "odd", env_kwargs=dict(foo=1)), ValueError, r"Task 'odd': .*unexpected keyword argument 'foo'"),
        (Task("Meta-World/reach-v3", env_kwargs=dict(foo=1)), ValueError, r"Task 'Meta-World/reach-v3': .* argument 'foo'"),
    ],
    ids=["callable", "id", "meta-world"],
)
def test_a_task_that_can_not_be_made_is_named(task: Task, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make_multitask_vec_env([SMALL, task])


def test_success_is_left_out_where_no_task_says_so() -> None:
    env = make_multitask_vec_env(SMALL)
    env.reset()
    assert all("is_success" not in env.step(np.zeros((1, 1)))[3][0] for _ in range(5))


def test_seeds_make_environments_equal_and_each_its_own() -> None:
    tasks = ["Pendulum-v1", "MountainCarContinuous-v0"]

    def play(seed: int | None) -> np.ndarray:
        env = make_multitask_vec_env(tasks, n_envs_per_task=2, seed=seed)
        first: Any = env.reset()
        env.step(np.zeros((4, 1)))
        return np.concatenate([first["observation"], np.array([env.action_space.sample() for _ in range(4)])], 1)

    np.testing.assert_array_equal(play(3)[:, :3], play(3)[:, :3])
    assert not np.array_equal(play(3)[:, :3], play(4)[:, :3])
    one = play(3)
    assert not np.array_equal(one[0, :3], one[1, :3]) and not np.array_equal(one[2, :3], one[3, :3])


def test_workers_do_the_same_as_one_process() -> None:
    tasks: list[Any] = ["Pendulum-v1", "MountainCarContinuous-v0", SMALL]

    def play(vec_env_cls: type[VecEnv], **kwargs: Any) -> list[Any]:
        env = make_multitask_vec_env(tasks, seed=1, vec_env_cls=vec_env_cls, vec_env_kwargs=kwargs)
        seen: list[Any] = [env.reset()]
        for action in np.random.default_rng(0).uniform(-1, 1, (6, 3, 1)):
            obs, rewards, dones, infos = env.step(action.astype(np.float32))
            seen += [
                obs,
                {"rewards": np.float32(rewards), "dones": dones, "tasks": np.array([info.get("task", "") for info in infos])},
            ]
        env.close()
        return seen

    here, there = play(DummyVecEnv), play(SubprocVecEnv, start_method="fork")
    for mine, theirs in zip(here, there, strict=True):
        for key, value in mine.items():
            np.testing.assert_array_equal(value, theirs[key], err_msg=key)


def test_monitor_files_are_written(tmp_path: Any) -> None:
    env = make_multitask_vec_env([SMALL, LARGE], monitor_dir=str(tmp_path / "logs"))
    env.reset()
    for _ in range(12):
        env.step(np.zeros((2, 2)))
    assert sorted(load_results(str(tmp_path / "logs"))["l"]) == [4, 4, 4, 6, 6]


# ------------------------------------------------------------ names and suites


def pendulum(g: float = 10.0) -> gym.Env:
    return gym.make("Pendulum-v1", g=g)


def test_names_of_tasks() -> None:
    tasks: list[Any] = [
        "Pendulum-v1",
        pendulum,
        Task("Pendulum-v1", "moon", env_kwargs=dict(g=1.6)),
        lambda: gym.make("Acrobot-v1"),
    ]
    env = make_multitask_vec_env(tasks[:3])
    assert env.observation_space["task"].table.names == ["Pendulum-v1", "pendulum", "moon"]  # type: ignore[index]
    assert [echo.g for echo in echoes(env)] == [10.0, 10.0, 1.6]
    only = make_multitask_vec_env(tasks[3])
    assert only.observation_space["task"].table.names == ["Acrobot-v1"]  # type: ignore[index]


def test_a_discount_comes_into_the_table() -> None:
    env = make_multitask_vec_env([Task("Pendulum-v1", gamma=0.9), "MountainCarContinuous-v0"])
    assert env.observation_space["task"].table.gammas(0.99).tolist() == [0.9, 0.99]  # type: ignore[index]


def test_later_tasks_fit_into_room_given_from_the_start() -> None:
    env = make_multitask_vec_env(SMALL, observation_dim=7, action_dim=3)
    assert env.observation_space["observation"].shape == (7,) and env.action_space.shape == (3,)  # type: ignore[index]
    both = make_multitask_vec_env([LARGE, SMALL], like=env)
    assert both.observation_space["task"].table.names == ["small", "large"]  # type: ignore[index]
    assert both.reset()["task"].tolist() == [1, 0]  # type: ignore[call-overload]
    assert both.action_space == env.action_space


@pytest.mark.parametrize("tasks", [[SMALL, LARGE], [FEW, MANY]], ids=["box", "discrete"])
def test_later_tasks_have_the_masks_that_the_model_sees(tasks: list[Task]) -> None:
    env = make_multitask_vec_env(tasks, expose_masks=True)
    model = tiny_model(env, "MultiInputPolicy").learn(32)
    new = make_multitask_vec_env(Task(tasks[0].env, "new", env_kwargs=tasks[0].env_kwargs), like=model)
    assert {"observation_mask", "action_mask"} <= set(new.observation_space.spaces)  # type: ignore[attr-defined]
    model.add_tasks(new)
    assert model.learn(32, reset_num_timesteps=False).task_table.names[-1] == "new"  # type: ignore[union-attr]


# ------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("tasks", "kwargs", "message"),
    [
        ([], {}, "tasks is empty"),
        (["Pendulum-v1", "Pendulum-v1"], {}, r"\['Pendulum-v1'\] occur more than once"),
        (["Pendulum-v1", "CartPole-v1"], {}, "Box: Pendulum-v1; Discrete: CartPole-v1.*one agent for each kind"),
        (["NoSuch-v0"], {}, "NoSuch"),
        (["Meta-World/MT7"], {}, "Meta-World's suites are MT10, MT25, MT50"),
        (["Meta-World/mt10"], {}, "Meta-World's suites are MT10, MT25, MT50"),
        (["Meta-World/ML10"], {}, "Meta-World's suites are MT10, MT25, MT50"),
        ([SMALL], dict(vec_env_cls="subproc"), "vec_env_cls='subproc' is no class of vec-envs: give SubprocVecEnv itself"),
        (["BabyAI-NoSuchLevel-v0"], {}, "Task 'BabyAI-NoSuchLevel-v0': Environment `BabyAI-NoSuchLevel` doesn't exist"),
        ([Task("LunarLander-v3", env_kwargs=dict(gravity=5.0))], {}, r"Task 'LunarLander-v3': gravity \(current value: 5.0\)"),
        (["dm_control/hard"], {}, "'dm_control/easy'"),
        ([LARGE], dict(observation_dim=4), "'large' has observation_dim=5, but there is room for 4"),
        ([LARGE], dict(action_dim=1), "'large' has action_dim=2, but there is room for 1"),
        ([SMALL], dict(like=7), "no table of tasks"),
        (
            [Task(Echo, "t", env_kwargs=dict(action_space=box(1, -np.inf)))],
            {},
            "'t' has actions without bounds.*TransformAction",
        ),
        (
            [Task(Echo, n, env_kwargs=dict(action_space=spaces.MultiBinary(i))) for i, n in ((1, "a"), (2, "b"))],
            {},
            "can't be padded.*a: MultiBinary",
        ),
        ([Task(Echo, "t", gamma=2.0)], {}, "gamma=2.0 of task 't'"),
    ],
    ids=lambda value: None,
)
def test_what_does_not_fit_is_explained(tasks: Any, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_multitask_vec_env(tasks, **kwargs)


PENDULUM = gym.make("Pendulum-v1")


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        (
            PENDULUM,
            r"Pendulum.* is one environment, but each copy .* give an id \('Pendulum-v1'\).*lambda: gym.make\('Pendulum-v1'\)",
        ),
        ([PENDULUM], "is one environment"),
        (PENDULUM.spec, "Pendulum-v1's EnvSpec is no task: give an id .'Pendulum-v1'"),
        (None, r"None is no task: give an id"),
        ([None], r"None is no task: give an id"),
        ([3], r"3 is no task: give an id"),
        ({"mine": "Pendulum-v1"}, r"\{'mine': 'Pendulum-v1'\} is no task: give .* or a list of these"),
        ("MT10", "Unknown task 'MT10': the suite is called 'Meta-World/MT10'"),
        ("mt50", "Unknown task 'mt50': the suite is called 'Meta-World/MT50'"),
        (lambda: None, "Task '<lambda>' made None, which is no gymnasium.Env"),
        (Task("dm_control/easy", "x"), "name='x' is one name for the 8 tasks of 'dm_control/easy': leave it out"),
    ],
    ids=lambda value: None,
)
def test_what_is_no_task_is_explained(tasks: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_multitask_vec_env(tasks)


@pytest.mark.parametrize("name", ["n_envs_per_task", "observation_dim", "action_dim"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "2"])
def test_numbers_that_are_no_counts(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name}={value!r} must be a whole number .* of at least 1"):
        make_multitask_vec_env(SMALL, **{name: value})


@pytest.mark.parametrize("value", [0, -1, 2.5, "2"])
def test_actions_are_repeated_a_whole_number_of_times(value: Any) -> None:
    with pytest.raises(ValueError, match=rf"action_repeat={value!r} must be a whole number .* of task 'Pendulum-v1'"):
        Task("Pendulum-v1", action_repeat=value)
    with pytest.raises(ValueError, match=f"repeat={value!r} must be a whole number .* the frames per decision"):
        ActionRepeat(Echo(), value)


TEXT = spaces.Text(3)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (TEXT, "'t' has a Text observation, which has no fixed length: turn it into numbers with .*TransformObservation"),
        (spaces.Dict({"k": spaces.Tuple([ONE])}), "a Tuple observation under key 'k', .*length: turn it"),
        (
            spaces.Dict({"k": TEXT, "x": ONE, "y": ONE}),
            r"under key 'k', .*: leave out 'k' with .*\(env, \['x', 'y'\]\), or turn",
        ),
        (
            spaces.Dict({"k": spaces.Dict({"i": TEXT}), "x": ONE}),
            r"under key 'k/i', .*: leave out 'k' with .*\(env, \['x'\]\), or",
        ),
    ],
    ids=["alone", "only key", "key", "key of a key"],
)
def test_observations_without_a_length_are_left_out_where_they_can_be(space: spaces.Space, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_multitask_vec_env(Task(Echo, "t", env_kwargs=dict(observation_space=space)))


def test_what_the_messages_advise_works() -> None:
    free = Echo(spaces.Dict({"k": spaces.Dict({"i": TEXT}), "x": ONE}), box(1, -np.inf, np.inf))
    made = gym.wrappers.FilterObservation(free, ["x"])
    bounded = gym.wrappers.TransformAction(made, lambda action: action, spaces.Box(-2.0, 2.0, (1,)))
    env = make_multitask_vec_env(lambda: bounded)
    env.reset()
    env.step(np.ones((1, 1)))
    assert free.received == [2.0]


def test_like_needs_the_same_kind_of_actions() -> None:
    env = make_multitask_vec_env(SMALL)
    with pytest.raises(ValueError, match=r"few.*Discrete.*one agent for each kind"):
        make_multitask_vec_env(FEW, like=env)


@pytest.mark.parametrize(
    ("task", "package"),
    [
        ("Meta-World/reach-v3", "metaworld"),
        ("dm_control/walker-walk-v0", "shimmy"),
        ("dm_control/walker-walk-v0", "dm_control"),
        ("MiniGrid-Empty-5x5-v0", "minigrid"),
        ("BabyAI-GoToObj-v0", "minigrid"),
    ],
)
def test_a_missing_package_is_named(task: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("shimmy")  # it registers, once, what it finds
    monkeypatch.setitem(__import__("sys").modules, package, None)
    with pytest.raises(ImportError, match=rf'{package}: pip install "sb3_m3po\[envs\]"'):
        make_multitask_vec_env(task)


def test_a_task_that_fails_is_named() -> None:
    broken = Task(Echo, "broken", env_kwargs=dict(fails="error"))
    model = tiny_model(make_multitask_vec_env([SMALL, broken]), "MultiInputPolicy")
    with pytest.raises(RuntimeError, match=r"Task 'broken' failed in step\(\): ZeroDivisionError: by zero"):
        model.learn(100)


@pytest.mark.parametrize("fails", ["death", "error"])
def test_a_worker_that_dies_is_named_and_nothing_is_lost(fails: str, tmp_path: Any) -> None:
    broken = Task(Echo, "broken", env_kwargs=dict(fails=fails, length=30))
    # Not by fork: there a process holds the pipes of those after it, which SB3 then waits for in vain
    env = make_multitask_vec_env([SMALL, broken], vec_env_cls=SubprocVecEnv, vec_env_kwargs=dict(start_method="forkserver"))
    model = tiny_model(VecNormalize(env, norm_reward=False, norm_obs_keys=["observation"]), "MultiInputPolicy")
    with pytest.raises(RuntimeError, match=r"environment 1 \(task 'broken'\) died"):
        model.learn(1_000)
    # It would wait for an answer
    model.get_env().close()  # type: ignore[union-attr]
    model.save(tmp_path / "saved")
    mended = make_multitask_vec_env([SMALL, Task(Echo, "broken")])
    model.set_env(VecNormalize(mended, norm_reward=False, norm_obs_keys=["observation"]))
    model.learn(100, reset_num_timesteps=False)
    assert M3PO.load(tmp_path / "saved").num_timesteps == 56


@pytest.mark.parametrize(("at", "place", "copies"), [("make", 0, 1), ("make", 1, 1), ("reset", 1, 2)])
def test_a_worker_that_dies_before_its_first_step_is_named(at: str, place: int, copies: int) -> None:
    tasks = [SMALL, Task(Mortal, "mortal", env_kwargs=dict(at=at))]
    kwargs: Any = dict(vec_env_cls=SubprocVecEnv, vec_env_kwargs=dict(start_method="forkserver"))
    with pytest.raises(RuntimeError, match=r"environment \d \(task 'mortal'\).* died"):
        env = make_multitask_vec_env(tasks if place else tasks[::-1], copies, **kwargs)
        tiny_model(VecNormalize(env, norm_reward=False, norm_obs_keys=["observation"]), "MultiInputPolicy").learn(16)


@pytest.mark.parametrize("where", ["construct", "load", "set_env", "add_tasks"])
def test_a_worker_that_died_before_a_model_meets_it_is_named(where: str, tmp_path: Any) -> None:
    def subproc(tasks: list[Any], **kwargs: Any) -> VecEnv:
        return make_multitask_vec_env(
            tasks, vec_env_cls=SubprocVecEnv, vec_env_kwargs=dict(start_method="forkserver"), **kwargs
        )

    model = tiny_model(make_multitask_vec_env([SMALL, Task(Echo, "one")]), "MultiInputPolicy")
    model.save(tmp_path / "saved")
    new = [Task(Echo, "three"), Task(Echo, "two")] if where == "add_tasks" else [SMALL, Task(Echo, "one")]
    env: Any = subproc(new, like=model)
    os.kill(env.processes[1].pid, signal.SIGKILL)
    env.processes[1].join()
    actions: dict[str, Callable[[], Any]] = dict(
        construct=lambda: tiny_model(env, "MultiInputPolicy"),
        load=lambda: M3PO.load(tmp_path / "saved", env=env),
        set_env=lambda: model.set_env(env),
        add_tasks=lambda: model.add_tasks(env),
    )
    name = "two" if where == "add_tasks" else "one"
    with pytest.raises(RuntimeError, match=rf"environment 1 \(task '{name}'\) died"):
        actions[where]()


def test_a_worker_that_dies_is_named_without_a_model() -> None:
    tasks = [SMALL, Task(Mortal, "mortal", env_kwargs=dict(at="reset"))]
    kwargs: Any = dict(vec_env_cls=SubprocVecEnv, vec_env_kwargs=dict(start_method="forkserver"))
    env = VecNormalize(make_multitask_vec_env(tasks, **kwargs), norm_obs_keys=["observation"])
    with pytest.raises(RuntimeError, match=r"environment 1 \(task 'mortal'\) died: .* make it anew"):
        evaluate_per_task(None, env)


@pytest.mark.parametrize("evaluates", [False, True])
def test_a_worker_that_draws_its_tasks_is_named_by_the_last_one(evaluates: bool) -> None:
    tasks = [Task(Mortal, name, env_kwargs=dict(at="second reset")) for name in ("one", "two")]
    model = tiny_model(DummyVecEnv([lambda: MultiTaskEnv(tasks)]), "MultiInputPolicy")
    model.set_env(SubprocVecEnv([lambda: MultiTaskEnv(tasks)], start_method="fork"))
    with pytest.raises(RuntimeError, match=r"environment 0 \(last seen in task '(one|two)'\) died"):
        if evaluates:
            evaluate_per_task(model, model.env, 5)  # type: ignore[arg-type]
        else:
            model.learn(100)


def test_a_worker_of_gymnasium_that_dies_is_named() -> None:
    made = vector(AutoresetMode.SAME_STEP, AsyncVectorEnv, fails="death")
    model = tiny_model(VectorEnvAdapter(made), "MlpPolicy")
    with pytest.raises(RuntimeError, match=r"The process of environment 0.* died"):
        model.learn(16)
    # It would wait for an answer
    made.close()
    assert not any(process.is_alive() for process in made.processes)


@pytest.mark.parametrize("error", [EOFError, ConnectionResetError])
def test_what_no_dead_worker_is_to_blame_for_is_left_as_it_is(error: type[Exception]) -> None:
    env = make_multitask_vec_env(SMALL)
    for owner in (env, tiny_model(env, "MultiInputPolicy"), None):
        with pytest.raises(error), dead_workers_named(owner):
            raise error


# ------------------------------------------------------------ a single environment


@pytest.mark.parametrize("kwargs", [{}, dict(tasks=[]), dict(tasks="")])
def test_a_single_environment_without_tasks_says_how_to_give_them(kwargs: dict[str, Any]) -> None:
    with pytest.raises(
        ValueError, match=r"""tasks is empty: .*tasks=\['Pendulum-v1', .* --env-kwargs "tasks:\['Pendulum-v1',"""
    ):
        gym.make("sb3_m3po/MultiTask-v0", **kwargs)


def test_each_episode_draws_a_task() -> None:
    env: Any = gym.make("sb3_m3po/MultiTask-v0", tasks=[SMALL, LARGE], disable_env_checker=True)
    tasks = [int(env.reset(seed=i)[0]["task"]) for i in range(200)]
    assert 70 < sum(tasks) < 130
    assert [env.reset(options={"task": name})[0]["task"] for name in ("large", "small")] == [1, 0]
    with pytest.raises(ValueError, match=r"'medium'.*small, large"):
        env.reset(options={"task": "medium"})


def test_the_single_environment_passes_the_checkers() -> None:
    env = MultiTaskEnv(["Pendulum-v1", SMALL])
    check_env(env, warn=False)
    check_gymnasium_env(env, skip_render_check=True)


def test_one_seed_tells_all_episodes() -> None:
    def play() -> list[Any]:
        env = MultiTaskEnv(["Pendulum-v1", "MountainCarContinuous-v0"])
        observations = [env.reset(seed=5)[0]] + [env.reset()[0] for _ in range(6)]
        return [np.append(obs["observation"], obs["task"]).tolist() for obs in observations]

    first = play()
    assert first == play()
    assert len({tuple(row) for row in first}) == len(first)


def test_the_single_environment_trains_and_draws_pictures() -> None:
    env = gym.make("sb3_m3po/MultiTask-v0", tasks=["Pendulum-v1", SMALL], render_mode="rgb_array")
    env.reset(options={"task": "Pendulum-v1"})
    picture: Any = env.render()
    assert picture.shape == (500, 500, 3)
    model = tiny_model(env, "MultiInputPolicy").learn(100)
    assert model._n_updates > 0 and model.task_table is not None
    env.close()


# ---------------------------------------------------- Gymnasium's vector environments


def vector(mode: AutoresetMode, sub: Callable[..., Any] = SyncVectorEnv, **kwargs: Any) -> Any:
    kwargs = dict(observation_space=box(2), **kwargs)
    makers = [lambda: Echo(length=3, **kwargs), lambda: Echo(length=4, truncates=True, **kwargs)]
    return sub(makers, autoreset_mode=mode)


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=str)
def test_adapter_does_what_dummy_vec_env_does(mode: AutoresetMode) -> None:
    space: dict[str, Any] = dict(observation_space=box(2))
    mine = VectorEnvAdapter(vector(mode))
    dummy = DummyVecEnv([lambda: Echo(length=3, **space), lambda: Echo(length=4, truncates=True, **space)])
    for env in (mine, dummy):
        env.seed(7)
    np.testing.assert_array_equal(mine.reset(), dummy.reset())  # type: ignore[arg-type]
    for action in np.random.default_rng(0).uniform(-1, 1, (13, 2, 1)).astype(np.float32):
        obs, rewards, dones, infos = mine.step(action)
        expected_obs, expected_rewards, expected_dones, expected_infos = dummy.step(action)
        np.testing.assert_array_equal(obs, expected_obs)  # type: ignore[arg-type]
        np.testing.assert_allclose(rewards, expected_rewards)
        assert dones.tolist() == expected_dones.tolist()
        for info, expected in zip(infos, expected_infos, strict=True):
            assert info.keys() == expected.keys() and info["TimeLimit.truncated"] == expected["TimeLimit.truncated"]
            np.testing.assert_array_equal(info.get("terminal_observation", 0), expected.get("terminal_observation", 0))


@pytest.mark.parametrize("dicts", [False, True])
def test_what_the_adapter_returned_does_not_change(dicts: bool) -> None:
    """Whether or not the vector environment has one array for all steps."""
    kwargs: dict[str, Any] = {"observation_space": spaces.Dict(x=box(2)) if dicts else box(2)}
    env = VectorEnvAdapter(SyncVectorEnv([lambda: Echo(length=3, **kwargs)], copy=False))
    returned = [env.reset()]
    kept = copy.deepcopy(returned)
    for _ in range(4):
        obs, _, dones, infos = env.step(np.ones((1, 1), np.float32))
        returned += [obs, *[info["terminal_observation"] for info, done in zip(infos, dones, strict=True) if done]]
        kept += copy.deepcopy(returned[len(kept) :])
    assert len(kept) == 6
    for now, then in zip(returned, kept, strict=True):
        np.testing.assert_equal(now, then)


def test_adapter_passes_attributes_methods_and_pictures() -> None:
    env = VectorEnvAdapter(SyncVectorEnv([lambda: Monitor(gym.make("Pendulum-v1", render_mode="rgb_array"))] * 2))
    env.reset()
    assert env.get_attr("g") == [10.0, 10.0] and env.get_attr("g", [1]) == [10.0]
    env.set_attr("g", 5.0, indices=[0])
    assert env.get_attr("g") == [5.0, 10.0]
    assert len(env.env_method("get_wrapper_attr", "g", indices=0)) == 1
    assert env.env_is_wrapped(Monitor) == [True, True] and env.env_is_wrapped(TaskWrapper) == [False, False]
    assert [picture.shape for picture in env.get_images() if picture is not None] == [(500, 500, 3)] * 2
    env.close()


def test_adapter_passes_gymnasium_s_statistics() -> None:
    env = VectorEnvAdapter(gym.wrappers.vector.RecordEpisodeStatistics(vector(AutoresetMode.SAME_STEP)))
    env.reset()
    counted: list[list[int]] = [[], []]
    for _ in range(8):
        _, _, _, infos = env.step(np.ones((2, 1), np.float32))
        for i, info in enumerate(infos):
            counted[i] += [int(info["episode"]["l"])] if "episode" in info else []
    assert counted == [[3, 3], [4, 4]]


def test_adapter_has_one_dict_of_options() -> None:
    env = VectorEnvAdapter(vector(AutoresetMode.SAME_STEP))
    env.set_options({"a": 1})
    env.reset()
    env.set_options([{"a": 1}, {"a": 2}])
    with pytest.raises(ValueError, match=r"one dict of options for all environments, not .*'a': 2"):
        env.reset()


class Told(Echo):
    """Says its task, and that there are two."""

    def __init__(self, task: int):
        super().__init__()
        self.task, self.observation_space = task, spaces.Dict({"x": ONE, "task": spaces.Discrete(2)})

    def _observe(self) -> Any:
        return {"x": np.zeros(1, np.float32), "task": self.task}


def test_evaluation_leaves_processes_alive() -> None:
    makers = [lambda: Told(0), lambda: Told(1)]
    env = VectorEnvAdapter(AsyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP))
    model = tiny_model(env, "MultiInputPolicy")
    assert {name: len(found) for name, found in evaluate_per_task(model, env, 2).returns.items()} == {"task0": 2, "task1": 2}
    model.learn(32)
    env.close()


def test_adapter_works_with_processes() -> None:
    env = VectorEnvAdapter(vector(AutoresetMode.SAME_STEP, AsyncVectorEnv))
    model = tiny_model(env, "MlpPolicy").learn(100)
    assert model._n_updates > 0
    assert env.env_is_wrapped(Monitor) == [False, False]
    env.close()


@pytest.mark.parametrize("mode", list(AutoresetMode), ids=str)
@pytest.mark.parametrize(("at", "expected"), [(1, [True, True]), (4, [False, True]), (9, [False, False])])
def test_adapter_says_whether_an_episode_ever_succeeded(mode: AutoresetMode, at: int, expected: list[bool]) -> None:
    env = VectorEnvAdapter(vector(mode, success_at=at))
    env.reset()
    found: list[list[Any]] = [[], []]  # of the episodes of 3 and of 4 steps
    for step in range(12):
        _, _, dones, infos = env.step(np.zeros((2, 1), np.float32))
        for i, info in enumerate(infos):
            assert ("is_success" in info) == dones[i] and "task" not in info
            found[i] += [info["is_success"]] if dones[i] else []
        if step == 1:
            env.reset()  # in the middle of an episode: the next one begins anew
    assert found == [[expected[0]] * 3, [expected[1]] * 2]


@pytest.mark.parametrize(
    ("make", "fix"),
    [
        (
            lambda: vector(AutoresetMode.NEXT_STEP, AsyncVectorEnv),
            "pass autoreset_mode=AutoresetMode.SAME_STEP to AsyncVectorEnv, or",
        ),
        (
            lambda: gym.wrappers.vector.RecordEpisodeStatistics(vector(AutoresetMode.NEXT_STEP)),
            r"to SyncVectorEnv, or vector_kwargs=\{'autoreset_mode': gymnasium.*SAME_STEP\} to gym.make_vec",
        ),
        (
            lambda: gym.make_vec("CartPole-v1", vectorization_mode="vector_entry_point"),
            r"CartPoleVectorEnv can't, so make it by gym.make_vec\(..., vectorization_mode='sync'\) or by 'async' with",
        ),
    ],
    ids=["async", "wrapped", "of its own"],
)
def test_adapter_refuses_what_resets_too_late(make: Callable[[], Any], fix: str) -> None:
    env = make()
    with pytest.raises(ValueError, match=fix):
        VectorEnvAdapter(env)
    env.close()


@pytest.mark.parametrize(
    ("make", "fix"),
    [
        (
            lambda: PENDULUM,
            r"give what gym.make_vec\('Pendulum-v1', num_envs=...\) returns, or a single environment to the alg",
        ),
        (Echo, r"give what gym.make_vec\(..., num_envs=...\) returns, or a single environment to the algorithm itself"),
        (lambda: DummyVecEnv([Echo]), "it is a vec-env of Stable-Baselines3, which algorithms take as it is"),
        (lambda: "Pendulum-v1", r"give what gym.make_vec\(..., num_envs=...\) returns$"),
    ],
    ids=["environment", "no id", "vec-env", "text"],
)
def test_adapter_refuses_what_is_no_vector_environment(make: Callable[[], Any], fix: str) -> None:
    with pytest.raises(ValueError, match=f"is no gymnasium.vector.VectorEnv: {fix}"):
        VectorEnvAdapter(make())


def test_adapter_reads_a_one_hot_if_told() -> None:
    env = VectorEnvAdapter(vector(AutoresetMode.SAME_STEP, SyncVectorEnv), n_tasks=None)
    assert isinstance(env.observation_space, spaces.Box)
    for n_tasks in (2, 0, -1, 1.5):
        with pytest.raises(ValueError, match=f"n_tasks={n_tasks}"):
            VectorEnvAdapter(vector(AutoresetMode.SAME_STEP), n_tasks=n_tasks)  # type: ignore[arg-type]


def test_a_model_of_gymnasium_s_environments_takes_in_tasks_of_others() -> None:
    class Tailed(Echo):
        """Its observation ends in the one-hot of a task."""

        def _observe(self) -> Any:
            return np.concatenate([super()._observe()[:2], np.eye(2, dtype=np.float32)[0]])

    makers = [lambda: Tailed(box(4))] * 2
    env = VectorEnvAdapter(SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP), n_tasks=2)
    model = tiny_model(env, "MultiInputPolicy").learn(32)
    model.add_tasks(make_multitask_vec_env(Task(Echo, "new"), like=model))
    assert model.task_table is not None and model.task_table.names == ["task0", "task1", "new"]
    without = VectorEnvAdapter(SyncVectorEnv([lambda: Echo(box(4))], autoreset_mode=AutoresetMode.SAME_STEP), n_tasks=2)
    with pytest.raises(ValueError, match=r"environment 0 ends in .* no one-hot of n_tasks=2"):
        without.reset()


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_adapter_takes_what_make_vec_makes(mode: str) -> None:
    settings = {} if mode == "sync" else {"autoreset_mode": AutoresetMode.SAME_STEP}
    env = VectorEnvAdapter(gym.make_vec("CartPole-v1", num_envs=2, vectorization_mode=mode, vector_kwargs=settings))
    PPO("MlpPolicy", env, n_steps=32, batch_size=32).learn(200)
    env.close()


# -------------------------------------------------------------- other algorithms


@pytest.mark.parametrize("cls", [PPO, A2C, SAC, M3PO])
def test_stock_algorithms_train_on_the_very_same_env(cls: Any) -> None:
    env = make_multitask_vec_env(["Pendulum-v1", SMALL, LARGE], seed=0, expose_masks=cls is not M3PO)
    kwargs = dict(n_steps=16) if cls in (PPO, A2C) else dict(learning_starts=32)
    if cls is PPO:
        kwargs["batch_size"] = 16
    model = cls("MultiInputPolicy", env, seed=0, **kwargs).learn(100)
    assert sorted(evaluate_per_task(model, env, n_eval_episodes=1)) == ["Pendulum-v1", "large", "small"]


def test_stock_ppo_trains_on_unlike_numbers_of_actions() -> None:
    env = make_multitask_vec_env([FEW, MANY, "CartPole-v1"])
    PPO("MultiInputPolicy", env, n_steps=16, batch_size=16).learn(96)
    assert all(echo.action_space.contains(action) for echo in echoes(env)[:2] for action in echo.received)


# ---------------------------------------------------------------- the real suites


def test_dm_control_easy() -> None:
    pytest.importorskip("dm_control")
    env = make_multitask_vec_env("dm_control/easy", seed=0)
    table = env.observation_space["task"].table  # type: ignore[index]
    assert table.names == [name.rpartition("/")[2] for name in DM_CONTROL_EASY]
    assert {spec.observation_dim for spec in table} == {5, 6, 8, 9, 17, 24}
    assert {spec.action_dim for spec in table} == {1, 2, 6}
    env.reset()
    obs: Any = env.step(np.zeros((8, 6)))[0]
    assert np.isfinite(obs["observation"]).all()
    env.close()


def test_meta_world_s_tasks_among_others() -> None:
    pytest.importorskip("metaworld")
    tasks = ["Meta-World/reach-v3", "Meta-World/push-v3", "Pendulum-v1"]
    env = make_multitask_vec_env(tasks, seed=0)
    table = env.observation_space["task"].table  # type: ignore[index]
    assert table.names == ["reach-v3", "push-v3", "Pendulum-v1"]
    assert [(spec.observation_dim, spec.action_dim) for spec in table] == [(39, 4), (39, 4), (3, 1)]
    goals = {tuple(env.reset()["observation"][0].tolist()) for _ in range(5)}  # type: ignore[call-overload]
    assert len(goals) == 5
    for _ in range(500):
        _, _, dones, infos = env.step(np.zeros((3, 4)))
    assert dones[:2].tolist() == [True, True] and infos[0]["TimeLimit.truncated"] and infos[0]["is_success"] is False
    env.close()
    with pytest.raises(ValueError, match="'reech-v3'"):
        make_multitask_vec_env("Meta-World/reech-v3")


def test_a_meta_world_suite_has_its_tasks_in_their_order() -> None:
    pytest.importorskip("metaworld")
    from sb3_m3po.envs.suites import expand

    ten = [str(task) for task in expand("Meta-World/MT10")]
    assert expand(Task("Meta-World/MT10", gamma=0.9)) == [Task(name, gamma=0.9) for name in ten]
    assert len(ten) == 10 and ten[0] == "Meta-World/reach-v3" and len(expand(["Meta-World/MT50", "Pendulum-v1"])) == 51


def test_goals_of_meta_world_s_own_vector_env_follow_the_seed() -> None:
    pytest.importorskip("metaworld")
    env = VectorEnvAdapter(gym.make_vec("Meta-World/MT10", vector_strategy="sync", seed=1))

    def goals(seed: int) -> np.ndarray:
        env.seed(seed)
        seen: list[Any] = [env.reset() for _ in range(2)]
        return np.stack([obs["observation"] for obs in seen])  # (episodes, tasks, 39)

    first, other, again = goals(0), goals(1), goals(0)
    assert np.array_equal(first, again) and not np.array_equal(first[0], first[1]) and not np.array_equal(first, other)
    env.close()


def test_copies_of_a_meta_world_task_draw_goals_of_their_own() -> None:
    pytest.importorskip("metaworld")

    def goals(seed: int) -> np.ndarray:
        env = make_multitask_vec_env("Meta-World/reach-v3", n_envs_per_task=2, seed=seed)
        seen: list[Any] = [env.reset() for _ in range(4)]
        env.close()
        return np.stack([obs["observation"][:, 36:39] for obs in seen])  # (episodes, copies, 3)

    first, again, other = goals(0), goals(0), goals(1)
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first[:, 0], first[:, 1]) and not np.allclose(first[:, 0], other[:, 0])
    assert len(np.unique(first[:, 0], axis=0)) > 1


@pytest.mark.parametrize("one_hot", [False, True])
def test_meta_world_s_own_vector_env(one_hot: bool) -> None:
    pytest.importorskip("metaworld")
    made = gym.make_vec("Meta-World/MT10", vector_strategy="sync", seed=1, use_one_hot=one_hot)
    env = VectorEnvAdapter(made)
    assert env.observation_space["observation"].shape == (39,)  # type: ignore[index]
    assert env.observation_space["task"].table.names[:2] == ["reach-v3", "push-v3"]  # type: ignore[index]
    obs: Any = env.reset()
    assert obs["task"].tolist() == list(range(10))
    model = tiny_model(env, "MultiInputPolicy", learning_starts=4, n_steps=2).learn(100)
    assert model._n_updates > 0 and model.task_table is not None and len(model.task_table) == 10
    env.close()


def test_meta_world_s_own_vector_env_says_what_succeeded() -> None:
    pytest.importorskip("metaworld")
    ids = ["reach-v3", "push-v3"]
    made = gym.make_vec("Meta-World/custom-mt-envs", vector_strategy="sync", envs_list=ids, max_episode_steps=3)
    env = VectorEnvAdapter(made)
    env.reset()
    infos = [env.step(np.zeros((2, 4), np.float32))[3] for _ in range(3)]
    assert [info["task"] for info in infos[-1]] == ids == env.task_names
    assert [info["is_success"] for info in infos[-1]] == [False, False]
    assert not any("is_success" in info or "task" in info for step in infos[:-1] for info in step)
    model = tiny_model(env, "MultiInputPolicy")
    assert evaluate_per_task(model, env, n_eval_episodes=2).success_rate == {"reach-v3": 0.0, "push-v3": 0.0}
    env.close()


def test_copies_of_one_meta_world_task_are_no_benchmark() -> None:
    pytest.importorskip("metaworld")
    env = VectorEnvAdapter(gym.make_vec("Meta-World/MT1", env_name="reach-v3", num_envs=2, vectorization_mode="sync"))
    assert env.observation_space.shape == (39,)
    env.close()


def test_minigrid_s_direction_is_no_task() -> None:
    pytest.importorskip("minigrid")
    env = make_multitask_vec_env(["MiniGrid-Empty-5x5-v0", "CartPole-v1"])
    table = env.observation_space["task"].table  # type: ignore[index]
    assert [(spec.observation_dim, spec.action_dim) for spec in table] == [(7 * 7 * 3 + 4, 7), (4, 2)]
    obs: Any = env.reset()
    codes = echoes(env)[0].gen_obs()["image"]
    direction = np.eye(4)[echoes(env)[0].agent_dir]
    assert obs["observation"][0].tolist() in ([*direction, *codes.ravel()], [*codes.ravel(), *direction])
    alone = tiny_model(gym.wrappers.FilterObservation(gym.make("MiniGrid-Empty-5x5-v0"), ["direction"]), "MultiInputPolicy")
    assert alone.task_table is None


@pytest.mark.parametrize("wrapped", ["", "filtered", "alone", "picture", "filtered picture"])
def test_minigrid_s_codes_are_no_picture(wrapped: str) -> None:
    """However its environment is made; but a picture of it is one."""
    wrappers = pytest.importorskip("minigrid.wrappers")

    def made() -> gym.Env:
        env = gym.make("MiniGrid-Empty-5x5-v0")
        if "picture" in wrapped:
            env = wrappers.RGBImgPartialObsWrapper(env)
        if "filtered" in wrapped:
            return gym.wrappers.FilterObservation(env, ["image"])
        return wrappers.ImgObsWrapper(env) if wrapped else env

    env = make_multitask_vec_env([made])
    numbers: Any = env.reset()["observation"][0]  # type: ignore[index, call-overload]
    inner: Any = env.unwrapped.envs[0].unwrapped  # type: ignore[attr-defined]
    if "picture" in wrapped:
        assert len(numbers) == 56 * 56 * 3 and 0 < numbers.max() <= 1
    else:
        codes = inner.gen_obs()["image"].ravel()
        assert numbers[: len(codes)].tolist() == codes.tolist() or numbers[-len(codes) :].tolist() == codes.tolist()


def test_a_task_is_named_for_what_is_none_of_its_observations() -> None:
    space = spaces.Dict(a=box(1), b=box(1))

    class Forgetful(Echo):
        def _observe(self) -> Any:
            return {"a": np.zeros(1, np.float32)}

    env = make_multitask_vec_env([SMALL, Task(Forgetful, "forgetful", env_kwargs=dict(observation_space=space))])
    with pytest.raises(RuntimeError, match=r"Task 'forgetful' failed in an observation that is none of Dict.*KeyError: 'b'"):
        env.reset()


def test_a_task_is_named_for_its_bad_numbers() -> None:
    class Bad(Echo):
        def _observe(self) -> Any:
            return np.full(1, np.nan, np.float32)

    env = make_multitask_vec_env([SMALL, Task(Bad, "bad")], n_envs_per_task=2)
    with pytest.raises(ValueError, match=r"Environment \[2, 3\] \(task 'bad'\) returned a NaN or infinite observation"):
        tiny_model(env, "MultiInputPolicy").learn(16)


@pytest.mark.parametrize("n_eval_episodes", [0, 2.5, "3"])
def test_episodes_of_an_evaluation_are_counted(n_eval_episodes: Any) -> None:
    env = make_multitask_vec_env(SMALL)
    with pytest.raises(ValueError, match=f"n_eval_episodes={n_eval_episodes!r} must be a whole number"):
        evaluate_per_task(tiny_model(env, "MultiInputPolicy"), env, n_eval_episodes)


@pytest.mark.parametrize("env", ["Pendulum-v1", [SMALL], None])
def test_an_evaluation_needs_an_environment(env: Any) -> None:
    with pytest.raises(ValueError, match=r"make.* one.*by sb3_m3po\.make_multitask_vec_env"):
        evaluate_per_task(None, env)


def test_random_spaces_survive_the_round_trip() -> None:
    """Whatever the tasks, an action of the shared space is a legal one of theirs."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        tasks = []
        for i in range(3):
            low = rng.uniform(-5, 5, rng.integers(1, 4))
            space = spaces.Box(low, low + rng.uniform(0, 3, low.shape), dtype=(np.float32, np.float64)[i % 2])  # type: ignore[arg-type]
            tasks.append(Task(RandomEnv, f"t{i}", env_kwargs=dict(action_space=space)))
        env = make_multitask_vec_env(tasks)
        env.reset()
        for _ in range(4):
            env.step(rng.uniform(-1.2, 1.2, (3, *(env.action_space.shape or ()))).astype(np.float32))
        for inner in echoes(env):
            assert all(inner.action_space.contains(np.asarray(a, inner.action_space.dtype)) for a in inner.received)


# ------------------------------------------------------------------ action repeat


class Counting(gym.Env):
    """Rewards are the frame's number; terminates at the fifth."""

    observation_space = action_space = gym.spaces.Box(-1.0, 1.0, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        self.frame = 0
        return np.zeros(1, np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.frame += 1
        return np.full(1, self.frame / 10, np.float32), float(self.frame), self.frame == 5, False, {}


def test_repeated_actions_sum_rewards_up_to_the_episode_s_end() -> None:
    env = ActionRepeat(Counting(), 3)
    env.reset()
    observation, *outcome = env.step(np.zeros(1))
    assert observation[0] == pytest.approx(0.3) and outcome[:3] == [1 + 2 + 3, False, False]
    observation, *outcome = env.step(np.zeros(1))
    assert observation[0] == pytest.approx(0.5) and outcome[:3] == [4 + 5, True, False]
