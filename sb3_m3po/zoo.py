"""
M3PO in rl-zoo3: its registration, the default settings file, the search space of Optuna, the command ``m3po-zoo``.

Nothing of rl-zoo3 or Optuna is imported before it is asked for.
"""

import difflib
import functools
import importlib
import importlib.util
import inspect
import os
import runpy
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from traceback import walk_tb
from typing import Any

import gymnasium as gym
from gymnasium.error import Error as GymnasiumError
from stable_baselines3.common.utils import LinearSchedule

from sb3_m3po.envs.suites import REGISTERED_BY
from sb3_m3po.m3po import M3PO

#: What rl-zoo3 itself reads in a settings file, beside the algorithm's arguments
ZOO_KEYS = (
    *("n_timesteps", "policy", "n_envs", "normalize", "env_wrapper", "vec_env_wrapper", "frame_stack", "callback"),
    *("env_kwargs", "monitor_kwargs"),
)
#: Arguments that rl-zoo3 gives the algorithm itself
_GIVEN = ("self", "policy", "env", "tensorboard_log", "verbose", "seed", "device", "_init_setup_model")
_OPTIONS = {"seed": "--seed", "device": "--device", "verbose": "--verbose", "tensorboard_log": "-tb", "env": "--env"}
#: Scripts of ``m3po-zoo``
SCRIPTS = {
    **{name: f"rl_zoo3.{name}" for name in ("train", "enjoy", "record_video", "record_training", "benchmark")},
    **{name: f"rl_zoo3.plots.{name}" for name in ("plot_train", "all_plots", "plot_from_file")},
}
_USAGE = f"usage: m3po-zoo {{{','.join(SCRIPTS)}}} [options of the script; --help lists them]"
#: Which of them start others of rl-zoo3's, that know M3PO by the hook alone
_WITH_CHILDREN = ("record_training", "benchmark")
#: Whose messages are meant for users
_OURS = {"sb3_m3po", "stable_baselines3", "sb3_contrib", "rl_zoo3", "gymnasium", "optuna"}
#: These take several algorithms, or none
_WITHOUT_ALGO = ("benchmark", "all_plots", "plot_from_file")
#: These make no environment
_WITHOUT_ENV = ("plot_train", "all_plots", "plot_from_file")
#: Of rl-zoo3: where a wrapper or a callback is looked up by its name
_CLASS_LOOKUPS = ("get_wrapper_class", "get_class_by_name")

#: Networks of the search space: width relative to the defaults
NETWORKS = {"small": 0.5, "medium": 1.0, "large": 1.5}
#: An environment step of a trial takes at most as long as so many updates of the defaults, whose own step is one update and
#: one planned decision (with Discrete actions half of one)
MAX_COST = 3.0


def settings_file() -> Path:
    """
    :return: ``hyperparams/m3po.yml``: inside the installed package, or at the top of a source tree
    :raises FileNotFoundError: if the installation has lost it
    """
    inside = Path(str(files("sb3_m3po"))) / "hyperparams" / "m3po.yml"
    beside = Path(__file__).resolve().parents[1] / "hyperparams" / "m3po.yml"
    for path in (inside, beside):
        if path.is_file():
            return path
    raise FileNotFoundError(f"M3PO's settings are neither at {inside} nor at {beside}: install sb3_m3po again")


def register() -> None:
    """
    Make ``m3po`` known to rl-zoo3: the algorithm, its settings and its search space. Once or many times.

    :raises ImportError: if rl-zoo3 is missing
    """
    try:
        from rl_zoo3 import exp_manager, hyperparams_opt, utils
    except ImportError as error:
        raise ImportError(f'M3PO in rl-zoo3 needs rl-zoo3: pip install "sb3_m3po[zoo]" ({error})') from error
    # In place: all modules of rl-zoo3 hold the same dictionaries
    utils.ALGOS["m3po"] = M3PO
    hyperparams_opt.HYPERPARAMS_SAMPLER["m3po"] = sample_m3po_params
    hyperparams_opt.HYPERPARAMS_CONVERTER["m3po"] = convert_m3po_params
    manager: Any = exp_manager.ExperimentManager
    if not hasattr(manager, "_knows_m3po"):
        manager._knows_m3po = True
        manager.read_hyperparameters = _reading_our_settings(manager.read_hyperparameters)
        manager._preprocess_schedules = staticmethod(_keeping_schedules(manager._preprocess_schedules))
        manager.hyperparameters_optimization = _searching_by_grpc(manager.hyperparameters_optimization)
        manager.load_trial = _loading_by_grpc(manager.load_trial)


def _reading_our_settings(read: Any) -> Any:
    """rl-zoo3 looks for ``m3po.yml`` inside of its own package."""

    @functools.wraps(read)
    def read_hyperparameters(manager: Any) -> Any:
        if manager.algo != "m3po":
            return read(manager)
        if manager.args.conf_file is None:
            manager.config = str(settings_file())
        if manager.trial_id is not None:
            if not (manager.storage and manager.study_name):
                raise ValueError("--trial-id needs the --storage and the --study-name of the study")
            manager.trial_id = _TrialId(manager.trial_id)
        try:
            hyperparams, saved = read(manager)
        except (KeyError, TypeError, AttributeError) as error:
            raise _bad_entry(error, manager) from error
        _check_entry(hyperparams, manager)
        return hyperparams, saved

    return read_hyperparameters


def _check_entry(hyperparams: dict[str, Any], manager: Any) -> None:
    """Before rl-zoo3 stumbles over it."""
    check_settings(hyperparams, manager.config)
    if "n_timesteps" not in hyperparams and manager.n_timesteps <= 0:
        raise ValueError(f"The entry in {manager.config} has no n_timesteps: add it, or give -n")
    if "policy" not in hyperparams:
        raise ValueError(f"The entry in {manager.config} has no policy: add policy: 'MlpPolicy'")
    if manager.env_name.gym_id.startswith("MiniGrid-") and not hyperparams.get("env_wrapper"):
        raise ValueError(
            f"{manager.env_name.gym_id} needs an env_wrapper, since its mission is a text: copy the entry of "
            f"MiniGrid-Empty-5x5-v0 in {settings_file()} into a file of your own (-conf)"
        )
    if hyperparams.get("gamma") == "auto" and hyperparams.get("normalize"):
        raise ValueError("rl-zoo3 hands gamma on to VecNormalize, which needs a number: leave out gamma='auto' or normalize")


class _TrialId(int):
    """The number of a trial; rl-zoo3 takes trial 0 for none."""

    def __bool__(self) -> bool:
        return True


def _bad_entry(error: Exception, manager: Any) -> Exception:
    """:return: A sentence where rl-zoo3 stumbles over a settings file, any other error as it is"""
    if error.args == ("atari",):
        return ValueError(
            f"{manager.config} has no entry for {manager.env_name.gym_id}, and none named 'atari': write one into a file of "
            "your own (-conf), with CnnPolicy, the env_wrapper, frame_stack and a buffer_size that fits into your memory"
        )
    if "NoneType" in str(error):
        return ValueError(
            f"The entry for {manager.env_name.gym_id} in {manager.config} is empty: it needs n_timesteps and policy"
        )
    if isinstance(error, (AttributeError, TypeError)):
        return ValueError(
            f"{manager.config} can't be read ({error}): it must map environments to entries, and each entry settings to "
            "values, as in Pendulum-v1: {n_timesteps: 8000, policy: 'MlpPolicy'}"
        )
    return error


def _keeping_schedules(preprocess: Any) -> Any:
    """rl-zoo3 makes schedules of numbers and texts (``lin_0.002``), and refuses what is one already, as a trial's is."""

    @functools.wraps(preprocess)
    def preprocess_schedules(hyperparams: dict[str, Any]) -> dict[str, Any]:
        ready = {key: hyperparams.pop(key) for key in list(hyperparams) if isinstance(hyperparams[key], LinearSchedule)}
        return {**preprocess(hyperparams), **ready}

    return preprocess_schedules


def _searching_by_grpc(search: Any) -> Any:
    @functools.wraps(search)
    def hyperparameters_optimization(manager: Any) -> None:
        name, manager.storage = manager.storage, _opened(manager.storage)
        try:
            search(manager)
        except Exception as error:
            if not _is_of_storage(error, name):
                raise
            raise ValueError(f"--storage {name} can't be used: {error}") from error

    return hyperparameters_optimization


def _is_of_storage(error: Exception, name: Any) -> bool:
    if isinstance(error, OSError):
        return None not in (name, error.filename) and Path(name).is_relative_to(error.filename)
    return type(error).__module__.partition(".")[0] in ("json", "sqlalchemy")


def _loading_by_grpc(load: Any) -> Any:
    @functools.wraps(load)
    def load_trial(manager: Any, storage: Any, study_name: str, trial_id: int | None = None, **kwargs: Any) -> Any:
        try:
            return load(manager, _opened(storage), study_name, trial_id, **kwargs)
        except (KeyError, IndexError) as error:
            raise ValueError(f"There is no trial {trial_id} of --study-name {study_name} in --storage {storage}") from error
        except OSError as error:
            raise ValueError(f"--storage {storage} can't be used: {error}") from error

    return load_trial


def _opened(storage: Any) -> Any:
    """
    rl-zoo3 takes the name of a storage, and Optuna has none for its gRPC proxy: here it is ``grpc://host:port``.

    :param storage: A name, or what this function made of one
    :return: Optuna's proxy for such a name, anything else as it is
    :raises ValueError: if the name has no host and port, or no server answers there
    """
    if not isinstance(storage, str) or not storage.startswith("grpc://"):
        return storage
    host, _, port = storage.removeprefix("grpc://").rpartition(":")
    if not host or not port.isdecimal():
        raise ValueError(f"--storage {storage} is no address of a gRPC storage: give grpc://host:port")
    from optuna.storages import GrpcStorageProxy

    proxy: Any = GrpcStorageProxy(host=host, port=int(port))
    try:
        proxy.wait_server_ready(timeout=20)
    except Exception as error:
        raise ValueError(f"No storage answers at {storage}: start optuna.storages.run_grpc_proxy_server there") from error
    # rl-zoo3 asks a storage whether its name ends with ".log"
    proxy.endswith = storage.endswith
    return proxy


def check_settings(hyperparams: dict[str, Any], config: str) -> None:
    """
    :param hyperparams: One entry of a settings file, with what the command line put over it
    :param config: Name of the file, for the message
    :raises ValueError: for a key that neither M3PO nor rl-zoo3 knows, it names the nearest one; for a text that should be a
        number, a schedule or a mapping
    """
    known = [*ZOO_KEYS, *(name for name in inspect.signature(M3PO).parameters if name not in _GIVEN)]
    for key, value in hyperparams.items():
        where = f"of m3po (in {config} or on the command line)"
        if key in _OPTIONS:
            raise ValueError(f"{key!r} is no setting {where}: rl-zoo3 has the option {_OPTIONS[key]} for it")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"Unknown setting {key!r} {where}: do you mean {near!r}?")
        if isinstance(value, str) and (problem := _text_problem(key, value)):
            raise ValueError(f"The setting {key}={value!r} {where} is a text: {problem}")


def _text_problem(key: str, text: str) -> str:
    """:return: What to write in its place; nothing for what may be a text"""
    if key in ("planner_kwargs", "rollout_buffer_kwargs"):
        return f"write its keys as a mapping, {key}: {{name: value}}"
    if _is_number(text) and key != "ent_coef":
        return f"write {float(text):g} without quotes; YAML takes 1e-3 for a text, and !!float 1e-3 for a number"
    if key == "learning_rate" and not (text.startswith("lin_") and _is_number(text[4:])):
        return "write a number, or lin_ and a number for a rate that falls from it to 0"
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# -------------------------------------------------------------- search space


def sample_m3po_params(trial: Any, n_actions: int, n_envs: int, additional_args: dict[str, Any]) -> dict[str, Any]:
    """
    What Optuna searches: what changes most how M3PO learns, within :data:`MAX_COST`.

    :param trial: Optuna's trial
    :param n_actions: Dimensions of a Box action; not read
    :param n_envs: Number of training environments; not read
    :param additional_args: Of other algorithms; not read
    :return: Arguments of M3PO
    """
    sampled: dict[str, Any] = {
        "learning_rate": trial.suggest_float("learning_rate", 3e-4, 5e-3, log=True),
        "one_minus_gamma": trial.suggest_float("one_minus_gamma", 0.003, 0.05, log=True),
        "n_step_returns": trial.suggest_int("n_step_returns", 1, 5),
        "batch_size_pow": trial.suggest_int("batch_size_pow", 6, 8),
        "samples_per_step_pow": trial.suggest_int("samples_per_step_pow", 5, 8),
        "target_kl": trial.suggest_float("target_kl", 0.1, 3.0, log=True),
        "bonus_coef": trial.suggest_categorical("bonus_coef", [0.0, 0.1, 0.3]),
        "planner_samples": trial.suggest_categorical("planner_samples", [0, 16, 32, 64]),
        "network": trial.suggest_categorical("network", list(NETWORKS)),
    }
    return convert_m3po_params(sampled)


def convert_m3po_params(sampled_params: dict[str, Any]) -> dict[str, Any]:
    """
    :param sampled_params: What Optuna has of a trial
    :return: Arguments of M3PO; the same whenever they are rebuilt (``--trial-id``)
    """
    sampled = dict(sampled_params)
    width, rate = NETWORKS[sampled.pop("network")], sampled.pop("learning_rate")
    batch_size, samples = 2 ** sampled.pop("batch_size_pow"), 2 ** sampled.pop("samples_per_step_pow")
    planner_samples = sampled.pop("planner_samples")
    affordable = (MAX_COST - _planning_cost(planner_samples, width)) / _update_cost(batch_size, width)
    # Said in either case: the settings file may have its own
    planning: dict[str, Any] = {"plan_rollouts": None if planner_samples else False}
    if planner_samples:
        planning["planner_kwargs"] = dict(n_samples=planner_samples)
    return {
        "learning_rate": LinearSchedule(rate, rate / 10, 1.0),
        "gamma": 1 - sampled.pop("one_minus_gamma"),
        "batch_size": batch_size,
        "utd_ratio": min(samples / batch_size, affordable),
        "policy_kwargs": _networks(width),
        **planning,
        **sampled,
    }


def _networks(width: float) -> dict[str, Any]:
    wide = round(256 * width)
    return dict(latent_dim=wide // 2, encoder_arch=[wide], model_arch=[wide, wide], net_arch=[wide, wide])


def _update_cost(batch_size: int, width: float) -> float:
    """
    Time of an update, relative to the defaults': calls, which take the same time for any size, and products. No less than
    ``benchmarks.search_space`` measured, since machines differ.
    """
    return 0.45 + 0.65 * batch_size / 128 * width**2


def _planning_cost(n_samples: int, width: float) -> float:
    """Time of a planned decision, relative to an update of the defaults."""
    return (0.2 + 0.12 * n_samples / 32 * width**2) if n_samples else 0.0


# ------------------------------------------------------------------- command


def main() -> None:
    """
    ``m3po-zoo train --env CartPole-v1``: a script of rl-zoo3 that knows M3PO, which is its default algorithm.

    It ends with a message and a status that is not zero for what can't work.
    """
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if name in ("-h", "--help"):
        print(_USAGE)
        return
    if name not in SCRIPTS:
        sys.exit(_USAGE)
    if name not in _WITHOUT_ALGO and not any(x == "--algo" or x.startswith(("--algo=", "-a")) for x in arguments):
        arguments = ["--algo", "m3po", *arguments]
    if name == "all_plots" and not any(x.startswith(("-a", "--algos")) for x in arguments):
        arguments = ["-a", "m3po", *arguments]
    if name in _WITH_CHILDREN:
        os.environ["SB3_M3PO_ZOO_HOOK"] = "1"
    try:
        if name not in _WITHOUT_ENV:
            _register_environments(arguments)
        register()
        sys.argv = [f"m3po-zoo {name}", *arguments]
        runpy.run_module(SCRIPTS[name], run_name="__main__")
    except Exception as error:
        if not (sentence := _sentence(error)):
            raise
        sys.exit(f"m3po-zoo {name}: {sentence}")


def _register_environments(arguments: Sequence[str]) -> None:
    """Of packages that are not imported by Gymnasium: some of rl-zoo3's scripts have no ``--gym-packages``."""
    for env_id in (x.removeprefix("--env=") for x in arguments):
        package = next((name for prefix, name in REGISTERED_BY.items() if env_id.startswith(prefix)), None)
        if package is None:
            continue
        try:
            importlib.import_module(package)
            # shimmy is there without it
            if env_id.startswith("dm_control/") and importlib.util.find_spec("dm_control") is None:
                raise ImportError("No module named 'dm_control'")
        except ImportError as error:
            raise ImportError(f'{env_id} needs the extra envs: pip install "sb3_m3po[envs]" ({error})') from error
        if env_id.startswith("Meta-World/") and env_id not in gym.registry:
            raise ValueError(
                f"Gymnasium does not know {env_id}: give --env sb3_m3po/MultiTask-v0 --env-kwargs \"tasks:['{env_id}']\""
            )


def _sentence(error: Exception) -> str:
    """:return: The error's message if it is about what was asked for, and says enough; nothing for a bug"""
    codes = [frame.f_code for frame, _ in walk_tb(error.__traceback__)]
    if isinstance(error, (NameError, SyntaxError)) and any(
        code.co_name == "__call__" and code.co_filename.endswith("utils.py") for code in codes
    ):
        return f"Values on the command line are Python, texts in quotes: learning_rate:\"'lin_0.001'\" ({error})"
    if type(error).__module__.partition(".")[0] in ("sqlalchemy", "yaml"):
        return str(error)
    if not _OURS & set(_last_file(code.co_filename for code in codes).parts):
        # Of an environment, a wrapper or a callback of the user's: where it happened says most
        return ""
    if isinstance(error, TypeError):
        return str(error) if "unexpected keyword argument" in str(error) else ""
    if isinstance(error, AttributeError):
        return str(error) if codes[-1].co_name in _CLASS_LOOKUPS else ""
    return str(error) if isinstance(error, (ImportError, OSError, ValueError, AssertionError, GymnasiumError)) else ""


def _last_file(names: Iterable[str]) -> Path:
    """:return: The innermost file of a traceback, but for Python's own"""
    own = Path(sysconfig.get_path("stdlib"))
    written = [Path(name) for name in names if not name.startswith("<")]
    packaged = {"site-packages", "dist-packages"}
    return [path for path in written if packaged & set(path.parts) or not path.is_relative_to(own)][-1]
