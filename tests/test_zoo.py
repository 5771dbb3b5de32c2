"""M3PO in rl-zoo3: from Python, and on the command line of an environment that has the wheel and nothing else of ours."""

import argparse
import ast
import csv
import importlib.metadata
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gymnasium as gym
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from stable_baselines3.common.utils import LinearSchedule

from benchmarks.envs import frames_per_decision
from benchmarks.targets import TARGETS
from sb3_m3po import M3PO, _zoo_hook, zoo
from tests.test_packaging import wheel  # noqa: F401

optuna = pytest.importorskip("optuna")
pytest.importorskip("rl_zoo3")
ROOT = Path(__file__).parents[1]
SMALL = "policy_kwargs:dict(latent_dim=16,encoder_arch=[16],model_arch=[16],net_arch=dict(pi=[16],vf=[16]))"
TINY = ["-params", "learning_starts:100", "sync_interval:32", SMALL]

# ------------------------------------------------------------------ in Python


def test_registering_twice_is_registering_once() -> None:
    zoo.register()
    from rl_zoo3 import ALGOS
    from rl_zoo3.exp_manager import ExperimentManager
    from rl_zoo3.hyperparams_opt import HYPERPARAMS_CONVERTER, HYPERPARAMS_SAMPLER

    before = ExperimentManager.read_hyperparameters
    zoo.register()
    assert ExperimentManager.read_hyperparameters is before
    assert ALGOS["m3po"] is M3PO and ALGOS["ppo"].__name__ == "PPO"
    assert "m3po" in HYPERPARAMS_CONVERTER and "m3po" in HYPERPARAMS_SAMPLER


def settings() -> dict[str, dict[str, Any]]:
    return yaml.safe_load(zoo.settings_file().read_text(encoding="utf-8"))


def test_default_settings_are_the_library_s() -> None:
    assert set(settings()["default"]) == {"n_timesteps", "policy"}


@pytest.mark.parametrize("name", settings())
def test_settings_are_known(name: str) -> None:
    entry = settings()[name]
    zoo.check_settings(entry, "m3po.yml")
    assert entry["n_timesteps"] >= 1_000 and entry["policy"] in M3PO.policy_aliases
    if name != "default":
        pytest.importorskip("minigrid"), pytest.importorskip("shimmy")  # register their ids
        gym.spec(name)


def test_settings_reach_the_bars_within_their_steps() -> None:
    for target in TARGETS:
        entry = settings()[target.env_id]
        assert entry["n_timesteps"] == target.within / frames_per_decision(target.env_id)
        # The table is of the defaults: an entry has no others
        assert set(entry) <= {"n_timesteps", "policy", "env_wrapper", "buffer_size"}


def test_scores_in_the_settings_file_are_those_of_committed_rows() -> None:
    scores = re.findall(r"^(\S+):  # (\S+)$", (ROOT / "hyperparams/m3po.yml").read_text(), re.MULTILINE)
    for env_id, score in scores:
        rows = list(csv.DictReader((ROOT / f"benchmarks/results/m3po-100k/{env_id.replace('/', '-')}_seed0.csv").open()))
        steps = int(rows[-1]["steps"]) / frames_per_decision(env_id)
        assert steps == settings()[env_id]["n_timesteps"]
        assert f"{sum(float(row['mean_reward']) for row in rows[-3:]) / 3:,.0f}" == score
    assert scores


@pytest.mark.parametrize("variant", ["study-tuned", "study-default", "study-tuned-again", "study-default-again"])
def test_the_gain_of_the_study_is_that_of_its_rows(variant: str) -> None:
    files = [ROOT / f"benchmarks/results/m3po-{variant}/Pendulum-v1_seed{seed}.csv" for seed in range(3, 8)]
    last = [list(csv.DictReader(file.open()))[-1] for file in files]
    assert {row["steps"] for row in last} == {"2000"}
    scores, seconds = ([float(row[column]) for row in last] for column in ("mean_reward", "cpu_seconds"))
    cells = (f"{sum(scores) / 5:,.0f}", ", ".join(f"{score:,.0f}" for score in scores), f"{sum(seconds) / 5:.0f}")
    assert " | ".join(cells) in (ROOT / "docs/zoo.md").read_text()


@pytest.mark.parametrize(
    ("key", "near"), [("learning_rat", "learning_rate"), ("n_timestep", "n_timesteps"), ("utd", "utd_ratio")]
)
def test_an_unknown_setting_is_named_with_the_nearest_known_one(key: str, near: str) -> None:
    with pytest.raises(ValueError, match=rf"'{key}' of m3po \(in some.yml .*'{near}'"):
        zoo.check_settings({"policy": "MlpPolicy", key: 1}, "some.yml")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 3}, "'seed' is no setting .*rl-zoo3 has the option --seed for it"),
        ({"learning_rate": "1e-3"}, "learning_rate='1e-3'.*is a text: write 0.001 without quotes"),
        ({"n_timesteps": "1e5"}, "n_timesteps='1e5'.*is a text: write 100000 without quotes"),
        ({"learning_rate": "lin0.001"}, "learning_rate='lin0.001'.*or lin_ and a number"),
        ({"learning_rate": "exp_0.001"}, "learning_rate='exp_0.001'.*or lin_ and a number"),
        ({"planner_kwargs": "dict(n_samples=16)"}, r"is a text: write its keys as a mapping, planner_kwargs: \{name"),
    ],
)
def test_a_setting_of_another_kind_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        zoo.check_settings({"policy": "MlpPolicy", **settings}, "some.yml")
    zoo.check_settings({"learning_rate": "lin_1e-3", "ent_coef": "0.3", "gamma": "auto", "normalize": "{}"}, "some.yml")


def trials(n: int) -> Iterator[tuple[Any, dict[str, Any]]]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(n):
        trial = study.ask()
        yield trial, zoo.sample_m3po_params(trial, 1, 1, {})


def test_a_trial_is_rebuilt_from_what_the_study_has_of_it() -> None:
    for trial, arguments in trials(20):
        rebuilt = zoo.convert_m3po_params(trial.params)
        assert repr(rebuilt) == repr(arguments)
        assert trial.params == zoo_params(trial), "the study's copy is left alone"


def zoo_params(trial: Any) -> dict[str, Any]:
    """:return: What was suggested, as the study's storage has it"""
    return trial.study.trials[trial.number].params


def test_every_trial_is_a_model_within_its_cost() -> None:
    costs = []
    for trial, arguments in trials(60):
        zoo.check_settings({"policy": "MlpPolicy", **arguments}, "")
        width = zoo.NETWORKS[trial.params["network"]]
        planning = zoo._planning_cost(trial.params["planner_samples"], width)
        costs.append(arguments["utd_ratio"] * zoo._update_cost(arguments["batch_size"], width) + planning)
        assert 0 < arguments["utd_ratio"] <= 256 / arguments["batch_size"]
        # Said by all of them, since the settings that a trial is laid over may plan
        assert arguments["plan_rollouts"] is (None if trial.params["planner_samples"] else False)
        if trial.number < 12:
            model = M3PO("MlpPolicy", "Pendulum-v1", **arguments)
            assert model.policy.world_model.latent_dim == 128 * width and model.lr_schedule(0) < model.lr_schedule(1)
            assert model.plan_rollouts == (trial.params["planner_samples"] > 0)
    assert min(costs) < 0.5 and zoo.MAX_COST - 0.01 < max(costs) <= zoo.MAX_COST + 1e-9


def ask(monkeypatch: pytest.MonkeyPatch, *arguments: str, error: Exception | None = None) -> None:
    """Call ``m3po-zoo``, whose script fails if told to."""
    names: dict[str, Any] = {"error": error}
    # Not of this file, which is a user's
    exec(compile("def run_module(*args, **kwargs):\n    if error:\n        raise error", "<script>", "exec"), names)
    monkeypatch.setattr("sys.argv", ["m3po-zoo", *arguments])
    monkeypatch.setattr("runpy.run_module", names["run_module"])
    zoo.main()


@pytest.mark.parametrize("env", [("--env", "dm_control/walker-walk-v0"), ("--env=dm_control/walker-walk-v0",)], ids=len)
def test_environments_of_other_packages_are_registered(env: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    imported: list[str] = []
    monkeypatch.setattr(zoo, "register", lambda: None)
    util = SimpleNamespace(find_spec=lambda name: name)
    monkeypatch.setattr(zoo, "importlib", SimpleNamespace(import_module=imported.append, util=util))
    ask(monkeypatch, "train", *env)
    assert imported == ["shimmy"]
    # Pictures are made of what was logged
    ask(monkeypatch, "plot_train", *env)
    assert imported == ["shimmy"]


@pytest.mark.parametrize(("env", "missing"), [("dm_control/walker-walk-v0", "dm_control"), ("MiniGrid-X-v0", "minigrid")])
def test_a_missing_package_is_named_with_the_extra_that_brings_it(
    env: str, missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def import_module(name: str) -> None:
        if name == missing:
            raise ImportError(f"No module named {name!r}")

    util = SimpleNamespace(find_spec=lambda name: None)
    monkeypatch.setattr(zoo, "importlib", SimpleNamespace(import_module=import_module, util=util))
    with pytest.raises(SystemExit, match=rf"{env} needs the extra envs: .*sb3_m3po\[envs\].*No module named '{missing}'"):
        ask(monkeypatch, "train", "--env", env)


def test_a_task_of_meta_world_is_an_environment_of_one_task(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("metaworld")
    with pytest.raises(
        SystemExit, match=r"not know Meta-World/reach-v3: .*MultiTask-v0 --env-kwargs \"tasks:\['Meta-World/re"
    ):
        ask(monkeypatch, "train", "--env", "Meta-World/reach-v3")
    ask(monkeypatch, "train", "--env", "Meta-World/MT1")


def test_scripts_that_start_others_need_the_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SB3_M3PO_ZOO_HOOK", "0")
    ask(monkeypatch, "train", "--env", "CartPole-v1")
    assert os.environ["SB3_M3PO_ZOO_HOOK"] == "0"
    ask(monkeypatch, "record_training", "--env", "CartPole-v1")
    assert os.environ["SB3_M3PO_ZOO_HOOK"] == "1"


def test_m3po_is_what_is_plotted_unless_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    ask(monkeypatch, "all_plots", "-e", "CartPole-v1")
    assert sys.argv[1:] == ["-a", "m3po", "-e", "CartPole-v1"]
    ask(monkeypatch, "all_plots", "--algos", "ppo")
    assert sys.argv[1:] == ["--algos", "ppo"]


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_no_failure(option: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    ask(monkeypatch, option)
    assert capsys.readouterr().out.startswith("usage: m3po-zoo {train,enjoy,")
    for arguments in ((), ("trian",)):
        with pytest.raises(SystemExit, match=r"usage: m3po-zoo \{train,enjoy,"):
            ask(monkeypatch, *arguments)


@pytest.mark.parametrize(
    "error",
    [
        gym.error.DependencyNotInstalled('Box2D is not installed, run `pip install "gymnasium[box2d]"`'),
        gym.error.NameNotFound("Environment `Nothing` doesn't exist."),
        TypeError("PendulumEnv.__init__() got an unexpected keyword argument 'gravity'"),
        ValueError("tasks is empty"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_user_can_mend_is_one_sentence(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as ended:
        ask(monkeypatch, "train", error=error)
    assert ended.value.code == f"m3po-zoo train: {error}"


class Broken(gym.Env):
    observation_space = action_space = gym.spaces.Box(-1, 1, (1,))

    def __init__(self, error: Exception):
        self.error = error

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> Any:
        raise self.error


@pytest.mark.parametrize("error", [AssertionError(), ValueError("shapes"), FileNotFoundError("data.csv")], ids=repr)
def test_an_error_of_the_user_s_environment_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["m3po-zoo", "train"])
    monkeypatch.setattr("runpy.run_module", lambda *args, **kwargs: M3PO("MlpPolicy", Broken(error)).learn(8))
    with pytest.raises(type(error)):
        zoo.main()
    # Not only where it learns
    monkeypatch.setattr("sys.argv", ["m3po-zoo", "enjoy"])
    monkeypatch.setattr("runpy.run_module", lambda *args, **kwargs: Broken(error).step(0))
    with pytest.raises(type(error)):
        zoo.main()


@pytest.mark.parametrize("value", ["lin_0.001", "auto"])
def test_texts_on_the_command_line_need_quotes(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from rl_zoo3.utils import StoreDict

    monkeypatch.setattr("sys.argv", ["m3po-zoo", "train"])
    store = StoreDict(["-params"], "params")
    monkeypatch.setattr("runpy.run_module", lambda *args, **kwargs: store(None, None, [f"learning_rate:{value}"]))
    with pytest.raises(SystemExit, match="m3po-zoo train: Values on the command line are Python, texts in quotes: learn"):
        zoo.main()


@pytest.mark.parametrize("error", [TypeError("unsupported operand"), RuntimeError("shapes"), KeyError("x")], ids=repr)
def test_a_bug_keeps_its_traceback(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(type(error)):
        ask(monkeypatch, "train", error=error)


def requirements(extra: str) -> set[str]:
    """:return: Names of all distributions that come with ``sb3_m3po[extra]``"""
    found: set[str] = set()
    todo = [("sb3_m3po", extra)]
    while todo:
        name, extra = todo.pop()
        key = canonicalize_name(name)
        if f"{key}[{extra}]" in found:
            continue
        found |= {key, f"{key}[{extra}]"}
        for line in importlib.metadata.requires(name) or []:
            needed = Requirement(line)
            if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                todo += [(needed.name, chosen) for chosen in {"", *needed.extras}]
    return found


def imports(package: Path) -> set[str]:
    """:return: Top-level modules without which a module of the package can't be imported"""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in package.rglob("*.py")]
    absolute = {x.module for tree in trees for x in tree.body if isinstance(x, ast.ImportFrom) and x.module and not x.level}
    plain = {alias.name for tree in trees for x in tree.body if isinstance(x, ast.Import) for alias in x.names}
    return {name.partition(".")[0] for name in absolute | plain}


def test_the_extra_brings_all_that_rl_zoo3_imports() -> None:
    import rl_zoo3

    needed = imports(Path(rl_zoo3.__file__).parent) - sys.stdlib_module_names - {"rl_zoo3"}
    distributions = importlib.metadata.packages_distributions()
    brought = requirements("zoo")
    missing = {name for name in needed if not {canonicalize_name(x) for x in distributions.get(name, ())} & brought}
    assert "torch" in needed and missing == set()


def test_rl_zoo3_keeps_a_schedule_that_is_one_and_makes_its_own() -> None:
    zoo.register()
    from rl_zoo3.exp_manager import ExperimentManager

    schedule = LinearSchedule(1.0, 0.1, 1.0)
    found = ExperimentManager._preprocess_schedules({"learning_rate": schedule, "gamma": 0.9})
    assert found == {"learning_rate": schedule, "gamma": 0.9}
    assert ExperimentManager._preprocess_schedules({"learning_rate": "lin_0.5"})["learning_rate"](0.5) == 0.25
    with pytest.raises(ValueError, match="Invalid value"):
        ExperimentManager._preprocess_schedules({"learning_rate": [1]})


def manager(**given: Any) -> Any:
    """:return: What of rl-zoo3's manager reads settings, for Pendulum-v1"""
    zoo.register()
    from rl_zoo3.exp_manager import ExperimentManager
    from rl_zoo3.utils import EnvironmentName

    args = argparse.Namespace(conf_file=given.pop("conf_file", None))
    made = ExperimentManager.__new__(ExperimentManager)
    defaults = dict(algo="m3po", args=args, config=args.conf_file or "somewhere/hyperparams/m3po.yml", trial_id=None)
    more: dict[str, Any] = dict(
        storage=None, study_name=None, n_timesteps=-1, _is_atari=False, custom_hyperparams=None, env_kwargs={}
    )
    vars(made).update({**defaults, **more, "env_name": EnvironmentName("Pendulum-v1"), **given})
    return made


def test_settings_are_read_from_the_file_that_was_named(tmp_path: Path) -> None:
    assert manager().read_hyperparameters()[0]["n_timesteps"] == 8_000
    with pytest.raises(FileNotFoundError, match="mine"):
        manager(conf_file="mine/hyperparams/m3po.yml").read_hyperparameters()
    mine = tmp_path / "mine.yml"
    mine.write_text("Pendulum-v1: {n_timesteps: 5, policy: MlpPolicy, gamma: auto, normalize: true}")
    with pytest.raises(ValueError, match="needs a number: leave out gamma='auto' or normalize"):
        manager(conf_file=str(mine)).read_hyperparameters()


@pytest.mark.parametrize(
    ("content", "given", "message"),
    [
        ("Pendulum-v1:", {}, "entry for Pendulum-v1 in .*mine.yml is empty: it needs n_timesteps and policy"),
        ("Pendulum-v1: {policy: MlpPolicy}", {}, "mine.yml has no n_timesteps: add it, or give -n"),
        ("Pendulum-v1: {n_timesteps: 5}", {}, "mine.yml has no policy: add policy: 'MlpPolicy'"),
        (
            "default: {n_timesteps: 5, policy: MlpPolicy}",
            {"trial_id": 3},
            "--trial-id needs the --storage and the --study-name",
        ),
        (
            "default: {n_timesteps: 5, policy: MlpPolicy}",
            {"env_name": SimpleNamespace(gym_id="MiniGrid-DoorKey-5x5-v0", nice_name="MiniGrid-DoorKey-5x5-v0")},
            "DoorKey-5x5-v0 needs an env_wrapper, since its mission is a text: copy the entry of MiniGrid-Empty-5x5-v0 in",
        ),
        ("default: {policy: MlpPolicy}", {"_is_atari": True}, "has no entry for Pendulum-v1, and none named 'atari'"),
        ("[Pendulum-v1]", {}, "mine.yml can't be read .*: it must map environments to entries, .* as in Pendulum-v1: {"),
        ("Pendulum-v1: [5, MlpPolicy]", {}, "mine.yml can't be read .*: it must map environments to entries"),
        ("Pendulum-v1: 5", {}, "mine.yml can't be read .*: it must map environments to entries"),
    ],
)
def test_what_a_settings_file_lacks_is_named(content: str, given: dict[str, Any], message: str, tmp_path: Path) -> None:
    mine = tmp_path / "mine.yml"
    mine.write_text(content)
    with pytest.raises(ValueError, match=message):
        manager(conf_file=str(mine), **given).read_hyperparameters()


def test_every_trial_can_be_rebuilt_and_others_are_named(tmp_path: Path) -> None:
    storage = str(tmp_path / "s.log")
    study = optuna.create_study(storage=zoo_storage(storage), study_name="s")
    study.optimize(lambda trial: float(zoo.sample_m3po_params(trial, 1, 1, {})["gamma"]), n_trials=1)
    asked = dict(storage=storage, study_name="s")
    found = manager(trial_id=0, **asked).read_hyperparameters()[0]
    assert found["gamma"] == study.trials[0].value
    for wrong in (dict(asked, trial_id=7), dict(asked, trial_id=1, study_name="t")):
        with pytest.raises(ValueError, match=r"no trial \d of --study-name \w in --storage .*s.log"):
            manager(**wrong).read_hyperparameters()


def test_a_storage_that_cannot_be_read_is_named() -> None:
    search = zoo._searching_by_grpc(lambda made: json.loads("no journal"))
    with pytest.raises(ValueError, match=r"--storage s.log can't be used: Expecting value"):
        search(manager(storage="s.log"))


def test_a_storage_that_cannot_be_opened_is_named_and_other_files_are_not_taken_for_it(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    storage = str(tmp_path / "file" / "s.log")
    search = zoo._searching_by_grpc(lambda made: Path(made.storage).parent.mkdir(exist_ok=True))
    with pytest.raises(ValueError, match=r"--storage .*file/s.log can't be used: .*File exists"):
        search(manager(storage=storage))
    with pytest.raises(ValueError, match=r"--storage .*/none/s.log can't be used: .*No such file"):
        manager(trial_id=0, study_name="s", storage=str(tmp_path / "none" / "s.log")).read_hyperparameters()
    for given in (storage, None):
        with pytest.raises(FileNotFoundError):
            zoo._searching_by_grpc(lambda made: open(tmp_path / "elsewhere"))(manager(storage=given))


def zoo_storage(path: str) -> Any:
    return optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(path))


def test_rl_zoo3_goes_on_without_m3po_where_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zoo, "register", lambda: 1 / 0)
    spec = _zoo_hook.ZooHook.find_spec
    # As if it were not imported yet, and no hook installed
    monkeypatch.delitem(sys.modules, "rl_zoo3.utils")
    others = [finder for finder in sys.meta_path if type(finder).__name__ != "ZooHook"]
    monkeypatch.setattr(sys, "meta_path", [hook := _zoo_hook.ZooHook(), *others])
    found: Any = spec(hook, "rl_zoo3.utils")
    with pytest.warns(UserWarning, match="goes without m3po: ZeroDivisionError.*SB3_M3PO_ZOO_HOOK=0"):
        found.loader.exec_module(importlib.util.module_from_spec(found))


@pytest.mark.parametrize("arguments", [[], ["dance"]])
def test_the_command_lists_its_scripts(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["m3po-zoo", *arguments])
    with pytest.raises(SystemExit, match=r"usage: m3po-zoo .*train.*enjoy"):
        zoo.main()
    for module in zoo.SCRIPTS.values():
        assert importlib.util.find_spec(module) is not None, module


# -------------------------------------------------------- on the command line


class Installed:
    """
    An environment with a Python of its own that finds this one's packages, but nothing of ours before it is installed.

    :param folder: Where it is made, and where commands run
    """

    def __init__(self, folder: Path):
        self.bin, self.folder = folder / "venv" / "bin", folder
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True)
        (self.packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
        # Without what the .pth files of an editable install say
        (self.packages / "others.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        self.at_first = self.files()

    def files(self) -> set[str]:
        """:return: What is installed"""
        return {path.name for path in self.packages.iterdir() if path.name != "__pycache__"}

    def pip(self, *arguments: str) -> None:
        """Run this environment's pip on that one."""
        command = [sys.executable, "-m", "pip", "--python", str(self.bin / "python"), *arguments]
        subprocess.run(command, check=True, capture_output=True)

    def run(self, *command: str, fails: bool = False, **environment: str) -> str:
        """:return: What it printed"""
        return self.finish(self.start(*command, **environment), fails)

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        """:return: A command that runs"""
        path, *arguments = command
        variables = {
            "OMP_NUM_THREADS": "1",
            "PATH": "/usr/bin:/bin",
            "HOME": str(self.bin.parent),
            "MPLBACKEND": "Agg",
            "SDL_VIDEODRIVER": "dummy",
            **environment,
        }
        return subprocess.Popen(
            [str(self.bin / path), *arguments],
            cwd=self.folder,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def finish(self, process: subprocess.Popen[str], fails: bool = False) -> str:
        """:return: What it printed"""
        try:
            output, _ = process.communicate(timeout=300)
        finally:
            process.kill()
        assert (process.returncode != 0) == fails, output
        return output


@pytest.fixture(scope="module")
def with_wheel(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:  # noqa: F811
    """:return: An environment that has the wheel"""
    environment = Installed(tmp_path_factory.mktemp("zoo"))
    environment.pip("install", "--no-deps", str(wheel))
    return environment


@pytest.fixture
def installed(with_wheel: Installed, tmp_path: Path) -> Installed:
    """:return: That environment, in a folder of the test's own: whatever other tests ran before"""
    with_wheel.folder = tmp_path
    return with_wheel


TRAIN = ("python", "-m", "rl_zoo3.train", "--algo", "m3po", "--env", "Pendulum-v1")


def test_train_continue_and_enjoy(installed: Installed) -> None:
    often = ("--eval-freq", "200", "--save-freq", "200", "--save-replay-buffer")
    shown = ("--vec-env", "subproc", "-tb", "logs/tb", "--progress")
    printed = installed.run(*TRAIN, "-n", "500", *often, *shown, *TINY)
    assert "site-packages/sb3_m3po/hyperparams/m3po.yml" in printed and "n_updates" in printed and "100%" in printed
    assert list((installed.folder / "logs" / "tb").rglob("events.out.tfevents.*"))
    folder = installed.folder / "logs" / "m3po" / "Pendulum-v1_1"
    names = {"Pendulum-v1.zip", "best_model.zip", "evaluations.npz", "rl_model_200_steps.zip", "replay_buffer.pkl"}
    assert names <= {path.name for path in folder.iterdir()}
    printed = installed.run(*TRAIN, "-n", "300", "-i", str(folder / "Pendulum-v1.zip"))
    assert "Loading replay buffer" in printed
    enjoy = ("rl_zoo3.enjoy", "--algo", "m3po", "--env", "Pendulum-v1", "--folder", "logs/", "--no-render", "-n", "200")
    assert "Mean reward: -" in installed.run("python", "-m", *enjoy)
    assert "Mean reward: -" in installed.run("m3po-zoo", "enjoy", *enjoy[3:])
    assert "Mean reward: -" in installed.run("python", "-m", "rl_zoo3.cli", "enjoy", *enjoy[1:])


def test_tracking_by_weights_and_biases(installed: Installed) -> None:
    pytest.importorskip("wandb")
    project = ("--track", "--wandb-project-name", "tasks")
    installed.run(*TRAIN, "-n", "300", "-f", "tracked", *project, *TINY, WANDB_MODE="offline")
    (run,) = (installed.folder / "wandb").glob("offline-run-*/*.wandb")
    content = run.read_bytes()
    assert b"world_model/reward_loss" in content and b'learning_starts":100' in content


def test_a_settings_file_as_for_ppo(installed: Installed) -> None:
    (installed.folder / "mine.yml").write_text("""
Pendulum-v1:
  n_timesteps: 600
  policy: 'MlpPolicy'
  gamma: 0.98
  learning_rate: lin_0.002
  learning_starts: 100
  normalize: true
  env_wrapper: [{gymnasium.wrappers.RescaleAction: {min_action: -0.5, max_action: 0.5}}]
  callback: [{stable_baselines3.common.callbacks.CheckpointCallback: {save_freq: 200, save_path: called}}]
  policy_kwargs: dict(latent_dim=16, encoder_arch=[16], model_arch=[16], net_arch=[16])
""")
    printed = installed.run(*TRAIN, "-conf", "mine.yml", "-f", "mine", "--eval-freq", "-1")
    rates = [float(rate) for rate in re.findall(r"learning_rate +\| ([\d.e-]+)", printed)]
    assert "n_updates" in printed and 0.002 > rates[0] > rates[-1]
    saved = str(installed.folder / "called" / "rl_model_400_steps.zip")
    code = f"from sb3_m3po import M3PO; m = M3PO.load({saved!r}); print(m.action_space.high, m.policy.sizes.latent_dim)"
    assert installed.run("python", "-c", code).split() == ["[0.5]", "16"]
    enjoy = ("rl_zoo3.enjoy", "--algo", "m3po", "--env", "Pendulum-v1", "-f", "mine", "--no-render", "-n", "200")
    printed = installed.run("python", "-m", *enjoy)
    assert "Loading running average" in printed and "Mean reward: -" in printed


DIVERGING = """
import gymnasium as gym


class Diverging(gym.RewardWrapper):
    made = 0

    def __init__(self, env):
        super().__init__(env)
        Diverging.made += 1
        self.diverges = Diverging.made <= 3  # a first look at the spaces, then training and evaluation of a trial

    def reward(self, reward):
        return float("nan") if self.diverges else reward
"""


def test_a_trial_that_diverges_is_pruned(installed: Installed) -> None:
    (installed.packages / "diverging.py").write_text(DIVERGING)
    (installed.folder / "bad.yml").write_text(
        "Pendulum-v1: {n_timesteps: 220, policy: MlpPolicy, env_wrapper: diverging.Diverging}"
    )
    printed = installed.run(*search("logs/bad.log", "--n-trials 2", "bad"), "-conf", "bad.yml", "-f", "bad")
    (installed.packages / "diverging.py").unlink()
    assert printed.count("NaN or infinite reward") == 1, printed
    assert "Number of finished trials:  2" in printed
    assert "Trial 0 pruned" in printed and "Trial 1 finished" in printed


def search(storage: str, trials: str, name: str = "s", plots: bool = False) -> list[str]:
    """:return: The command of a study whose trials take a second"""
    study = ["--study-name", name, "--storage", storage, "--sampler", "tpe", "--pruner", "median"]
    study += [] if plots else ["--no-optim-plots"]
    return [*TRAIN, "-n", "220", "-optimize", *trials.split(), *study, "-params", "learning_starts:1000"]


def test_a_study_and_one_of_its_trials(installed: Installed) -> None:
    printed = installed.run(*search("logs/s.log", "--n-trials 2 --n-jobs 2", plots=True))
    assert "Number of finished trials:  2" in printed and "planner_samples" in printed
    study = ["--study-name", "s", "--storage", "logs/s.log", "--trial-id", "1"]
    printed = installed.run(*TRAIN, "-n", "220", *study, "-params", "learning_starts:1000")
    assert "Loading from Optuna study" in printed and "'target_kl'" in printed


@pytest.fixture
def server(installed: Installed) -> Iterator[str]:
    """:return: Name of a storage that a server shares"""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    code = """
import sys
from optuna.storages import JournalStorage, run_grpc_proxy_server
from optuna.storages.journal import JournalFileBackend
run_grpc_proxy_server(JournalStorage(JournalFileBackend("shared.log")), host="localhost", port=int(sys.argv[1]))
"""
    process = installed.start("python", "-c", code, str(port))
    yield f"grpc://localhost:{port}"
    process.terminate()
    process.communicate()


def assert_shared(installed: Installed, storage: str) -> None:
    """Two processes must share one study of four trials, and one of its trials must be found again."""
    command = search(storage, "--max-total-trials 4", "shared")
    outputs = [installed.finish(process) for process in [installed.start(*command), installed.start(*command)]]
    numbers = [set(re.findall(r"Trial (\d+) (?:finished|pruned)", printed)) for printed in outputs]
    # Between counting and starting the other process may start one more
    assert all(numbers) and not numbers[0] & numbers[1] and 4 <= len(numbers[0] | numbers[1]) <= 5, outputs
    study = ["--study-name", "shared", "--storage", storage, "--trial-id", "3"]
    assert "'target_kl'" in installed.run(*TRAIN, "-n", "220", *study, "-params", "learning_starts:1000")


def test_two_processes_share_a_study_in_one_file(installed: Installed) -> None:
    assert_shared(installed, "logs/shared.log")


def test_two_processes_share_a_study_by_grpc(installed: Installed, server: str) -> None:
    assert_shared(installed, server)


def test_pictures_and_videos(installed: Installed) -> None:
    train = ("train", "--env", "CartPole-v1", "-n", "600", "--eval-freq", "200", "-f", "agents", *TINY)
    for seed in ("0", "1"):  # the tables need two runs
        installed.run("python", "-m", "rl_zoo3.cli", train[0], "--algo", "m3po", *train[1:], "--seed", seed)
    plots = ("python", "-m", "rl_zoo3.plots.plot_train", "-a", "m3po", "-e", "CartPole-v1", "-f", "agents", "-w", "2")
    assert "Traceback" not in installed.run(*plots)
    installed.run(
        *("python", "-m", "rl_zoo3.plots.all_plots", "-a", "m3po", "-e", "CartPole-v1", "-f", "agents"),
        *("-o", "results", "--no-million", "-max", "600"),
    )
    assert (installed.folder / "results.pkl").stat().st_size > 0
    installed.run("python", "-m", "rl_zoo3.plots.plot_from_file", "-i", "results.pkl", "-l", "m3po")
    agent = ("--algo", "m3po", "--env", "CartPole-v1", "-f", "agents")
    installed.run("python", "-m", "rl_zoo3.record_video", *agent, "-n", "30", "-o", "videos")
    assert next((installed.folder / "videos").rglob("*.mp4")).stat().st_size > 1_000


def test_scripts_that_start_others(installed: Installed) -> None:
    imageio_ffmpeg = pytest.importorskip("imageio_ffmpeg")
    (installed.bin / "ffmpeg").symlink_to(imageio_ffmpeg.get_ffmpeg_exe())
    # They start "python" and "ffmpeg", whichever come first
    path = f"{installed.bin}:/usr/bin:/bin"
    train = ("m3po-zoo", "train", "--env", "CartPole-v1", "-n", "300", "--eval-freq", "-1", "--save-freq", "200")
    installed.run(*train, "-f", "started", *TINY)
    agent = ("--env", "CartPole-v1", "--algo", "m3po", "-f", "started")
    installed.run("python", "-m", "rl_zoo3.record_training", *agent, "-n", "20", "-o", "training", PATH=path)
    videos = {video.name.split("-step")[0] for video in (installed.folder / "training").glob("*.mp4")}
    assert {"checkpoint-200-m3po-CartPole-v1", "final-model-m3po-CartPole-v1"} <= videos
    # rl_zoo3.benchmark starts a file that only a clone of rl-zoo3 has
    (installed.folder / "enjoy.py").write_text("from rl_zoo3.enjoy import enjoy\n\nenjoy()\n")
    printed = installed.run("python", "-m", "rl_zoo3.benchmark", "--log-dir", "started", "--no-hub", "-n", "300", PATH=path)
    assert "Evaluating m3po on CartPole-v1" in printed
    assert "|m3po|CartPole-v1|" in (installed.folder / "benchmark.md").read_text().replace(" ", "")


# 1,000 frames in 500 decisions; an image of 5 x 5 tiles of 8 pixels, without the mission
@pytest.mark.parametrize(
    ("env_id", "shows"),
    [
        ("dm_control/cartpole-swingup-v0", r"Mean episode length: 500\.00"),
        ("MiniGrid-Empty-5x5-v0", r"Box\(0, 255, \(3, 40, 40\), uint8\)"),
    ],
)
def test_environments_that_are_wrapped(installed: Installed, env_id: str, shows: str) -> None:
    pytest.importorskip("shimmy"), pytest.importorskip("minigrid")
    agent = ("--env", env_id, "--gym-packages", "shimmy", "-f", "wrapped")
    printed = installed.run("m3po-zoo", "train", *agent, "-n", "600", "--eval-freq", "-1", *TINY, MUJOCO_GL="disable")
    assert "n_updates" in printed
    printed = installed.run("m3po-zoo", "enjoy", *agent, "--no-render", "-n", "600", MUJOCO_GL="disable")
    name = env_id.replace("/", "-")
    path = installed.folder / "wrapped" / "m3po" / f"{name}_1" / f"{name}.zip"
    printed += installed.run("python", "-c", f"from sb3_m3po import M3PO; print(M3PO.load('{path}').observation_space)")
    assert re.search(shows, printed), printed


def test_several_tasks_by_the_command_of_our_own(installed: Installed) -> None:
    tasks = "tasks:['Pendulum-v1','InvertedPendulum-v5']"
    printed = installed.run(
        "m3po-zoo", "train", "--env", "sb3_m3po/MultiTask-v0", "--env-kwargs", tasks, "-n", "500", "--seed", "0", *TINY
    )
    assert "Pendulum-v1/ep_rew_mean" in printed and "n_updates" in printed
    assert (installed.folder / "logs/m3po/sb3_m3po-MultiTask-v0_1/sb3_m3po-MultiTask-v0.zip").exists()


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (("train", "--env", "Pendulumm-v1"), "Pendulumm-v1 not found .* Pendulum-v1"),
        (("train", "--env", "Pendulum-v1", "-params", "learning_rat:0.1"), "'learning_rat'.* do you mean 'learning_rate'"),
        (("train", "--env", "sb3_m3po/MultiTask-v0", "-n", "10"), r"tasks is empty: .*--env-kwargs \"tasks:\['Pendulum-v1',"),
        (("enjoy", "--env", "Acrobot-v1", "-f", "logs/", "--no-render"), "No model found for m3po on Acrobot-v1"),
        (("train", "--env", "Pendulum-v1", "-optimize", "--storage", "sqlite:////no/x.db"), "unable to open database file"),
        (("train", "--env", "Pendulum-v1", "-optimize", "--storage", "/dev/null/x.log"), "/dev/null/x.log can't be used: "),
        (("train", "--env", "Pendulum-v1", "-optimize", "--storage", "grpc://here"), "grpc://here is no address .*host:port"),
    ],
)
def test_what_cannot_work_says_so(installed: Installed, command: tuple[str, ...], message: str) -> None:
    (installed.folder / "logs" / "m3po").mkdir(parents=True)  # as after training something else
    printed = installed.run("m3po-zoo", *command, fails=True)
    assert re.search(rf"m3po-zoo {command[0]}: .*{message}", printed, re.DOTALL), printed
    assert "Traceback" not in printed


def test_the_hook_can_be_switched_off_and_costs_nothing_without_rl_zoo3(installed: Installed) -> None:
    assert "invalid choice: 'm3po'" in installed.run(*TRAIN, fails=True, SB3_M3PO_ZOO_HOOK="0")
    code = "import sys; print([m for m in ('torch', 'sb3_m3po', 'importlib.util', 'rl_zoo3', 'typing') if m in sys.modules])"
    # A bare Python has what its own start-up imports
    loaded = installed.run("python", "-c", code)
    assert loaded == installed.run("python", "-c", code, SB3_M3PO_ZOO_HOOK="0") and "torch" not in loaded


@pytest.mark.parametrize("editable", [False, True])
def test_nothing_is_left_after_uninstalling(editable: bool, wheel: Path, tmp_path: Path) -> None:  # noqa: F811
    environment = Installed(tmp_path)
    source = ["--no-build-isolation", "-e", str(wheel.parent / "source")] if editable else [str(wheel)]
    environment.pip("install", "--no-deps", *source)
    assert {"_sb3_m3po_zoo_hook.py", "sb3_m3po_zoo_hook.pth"} <= environment.files()
    code = "import rl_zoo3, sb3_m3po.zoo; print('m3po' in rl_zoo3.ALGOS, sb3_m3po.zoo.settings_file())"
    known, path = environment.run("python", "-c", code).split()
    assert known == "True" and ("source/hyperparams" in path) == editable
    environment.pip("uninstall", "-y", "sb3_m3po")
    assert environment.files() == environment.at_first and not (environment.bin / "m3po-zoo").exists()
    assert not [path for path in environment.packages.rglob("*") if "m3po" in path.name]
    assert "invalid choice: 'm3po'" in environment.run(*TRAIN, fails=True)
    environment.run("python", "-m", "rl_zoo3.train", "--algo", "ppo", "--env", "CartPole-v1", "-n", "32", "--eval-freq", "-1")
    assert (tmp_path / "logs" / "ppo" / "CartPole-v1_1" / "CartPole-v1.zip").exists()
