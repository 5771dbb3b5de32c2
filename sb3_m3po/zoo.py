"""
M3PO in rl-zoo3: its registration, the default settings file, the search space of Optuna, the command ``m3po-zoo``.

Nothing of rl-zoo3 or Optuna is imported before it is asked for.
"""

import contextlib
import difflib
import functools
import importlib
import inspect
import runpy
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from traceback import walk_tb
from typing import Any

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
#: Scripts of ``m3po-zoo``
SCRIPTS = {
    **{name: f"rl_zoo3.{name}" for name in ("train", "enjoy", "record_video", "record_training", "benchmark")},
    **{name: f"rl_zoo3.{name}" for name in ("push_to_hub", "load_from_hub")},
    **{name: f"rl_zoo3.plots.{name}" for name in ("plot_train", "all_plots", "plot_from_file")},
}
_USAGE = f"usage: m3po-zoo {{{','.join(SCRIPTS)}}} [options of the script; --help lists them]"
#: Whose messages are meant for users
_OURS = {"sb3_m3po", "stable_baselines3", "sb3_contrib", "rl_zoo3", "gymnasium", "optuna"}
#: These take several algorithms, or none
_WITHOUT_ALGO = ("benchmark", "all_plots", "plot_from_file")

#: Networks of the search space: width relative to the defaults
NETWORKS = {"small": 0.5, "medium": 1.0, "large": 1.5}
#: An environment step of a trial takes at most as long as so many updates of the defaults, whose own step is one update and
#: one planned decision
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
            manager.trial_id = _TrialId(manager.trial_id)
        try:
            hyperparams, saved = read(manager)
        except (KeyError, TypeError, AttributeError) as error:
            raise _bad_entry(error, manager) from error
        check_settings(hyperparams, manager.config)
        if "n_timesteps" not in hyperparams and manager.n_timesteps <= 0:
            raise ValueError(f"The entry in {manager.config} has no n_timesteps: add it, or give -n")
        if hyperparams.get("gamma") == "auto" and hyperparams.get("normalize"):
            raise ValueError(
                "rl-zoo3 hands gamma on to VecNormalize, which needs a number: leave out gamma='auto' or normalize"
            )
        return hyperparams, saved

    return read_hyperparameters


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
        manager.storage = _opened(manager.storage)
        search(manager)

    return hyperparameters_optimization


def _loading_by_grpc(load: Any) -> Any:
    @functools.wraps(load)
    def load_trial(manager: Any, storage: Any, study_name: str, trial_id: int | None = None, **kwargs: Any) -> Any:
        try:
            return load(manager, _opened(storage), study_name, trial_id, **kwargs)
        except (KeyError, IndexError) as error:
            raise ValueError(f"There is no trial {trial_id} of --study-name {study_name} in --storage {storage}") from error

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
    :raises ValueError: for a key that neither M3PO nor rl-zoo3 knows; it names the nearest one
    """
    known = [*ZOO_KEYS, *(name for name in inspect.signature(M3PO).parameters if name not in _GIVEN)]
    for key in hyperparams:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)[0]
            raise ValueError(f"Unknown setting {key!r} of m3po (in {config} or on the command line): do you mean {near!r}?")


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
    planning: dict[str, Any] = {"plan_rollouts": planner_samples > 0}
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
    try:
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
    for prefix, package in REGISTERED_BY.items():
        if any(x.removeprefix("--env=").startswith(prefix) for x in arguments):
            with contextlib.suppress(ImportError):
                importlib.import_module(package)


def _sentence(error: Exception) -> str:
    """:return: The error's message if it is about what was asked for, and says enough; nothing for a bug"""
    codes = [frame.f_code for frame, _ in walk_tb(error.__traceback__)]
    if isinstance(error, (NameError, SyntaxError)) and any(
        code.co_name == "__call__" and code.co_filename.endswith("utils.py") for code in codes
    ):
        return f"Values on the command line are Python, texts in quotes: learning_rate:\"'lin_0.001'\" ({error})"
    if any(code.co_name == "learn" for code in codes) and not _OURS & set(Path(codes[-1].co_filename).parts):
        # Of an environment, a wrapper or a callback of the user's: where it happened says most
        return ""
    if isinstance(error, TypeError):
        return str(error) if "unexpected keyword argument" in str(error) else ""
    known = (ImportError, OSError, ValueError, AssertionError, GymnasiumError)
    return str(error) if isinstance(error, known) or type(error).__module__.partition(".")[0] in ("sqlalchemy", "yaml") else ""
