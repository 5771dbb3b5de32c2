"""
Train an algorithm on an environment with several seeds, evaluate it on the way, write one CSV row per evaluation.

``python -m benchmarks.run --algo m3po --env CartPole-v1 --steps 40000 --seeds 0 1 2``

A set of tasks stands where an environment does (see ``benchmarks.task_sets``), and has one row per evaluation and task:

``python -m benchmarks.run --algo m3po --env mt10 --steps 1000000``

The same command goes on after a kill, and skips the seeds that are done.
"""

import argparse
import contextlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch as th
from gymnasium import spaces
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, sync_envs_normalization

from benchmarks.algorithms import Settings, algorithm_class, apply_overrides, policy_name, zoo_settings
from benchmarks.envs import frames_per_decision, vec_env
from benchmarks.record import (
    CHECKPOINTS,
    RESULTS,
    Clock,
    append_row,
    commit,
    machine,
    read_rows,
    reference_ms,
    stem,
    train_alike,
    write_rows,
)
from benchmarks.task_sets import frames_of, is_task_set, task_vec_env, tasks_of
from sb3_m3po import evaluate_per_task

N_EPISODES = 20
# of each task of several, in turn in so many environments
N_TASK_EPISODES, N_TASK_COPIES = 10, 2
EVALUATION_SEED = 100_000_000
#: Where agents of different budgets are compared: up to which step they are evaluated how often. Some learn within 3,000
_CLOSELY = ((20_000, 1_000), (50_000, 2_500), (100_000, 5_000))
#: Steps between the three evaluations of a mean, beyond these
_CLOSEST = 5_000
COLUMNS = (
    *("algo", "variant", "env", "seed", "steps", "mean_reward", "std_reward", "n_episodes"),
    *("wall_seconds", "cpu_seconds", "eval_seconds", "reference_ms", "n_updates", "commit", "command", "machine"),
)
TASK_COLUMNS = (*COLUMNS[:3], "task", *COLUMNS[3:6], "success_rate", *COLUMNS[6:])


@dataclass
class Run:
    """
    One training run.

    :param algo: name of the algorithm, or ``module:Class``
    :param variant: name of its settings
    :param env_id: id of the environment
    :param seed: seed of the training
    :param steps: budget in environment steps (frames where actions are repeated)
    :param settings: what the algorithm is built with
    :param command: the command that repeats this run
    :param out: folder of the CSV files
    :param checkpoints: folder of the checkpoints
    :param reward_scale: factor on the training rewards; evaluations are never scaled
    :param eval_planning: samples and iterations of the planner with which some evaluations are done once more, or ``None``;
        their rows are those of a variant of its own
    :param grown_from: the set of tasks whose final model takes these tasks in, or ``None`` to begin anew
    :param train: what of it then learns, ``"all"`` or ``"new"``
    :param matmul: PyTorch's precision of matrix products
    """

    algo: str
    variant: str
    env_id: str
    seed: int
    steps: int
    settings: Settings
    command: str
    out: Path = RESULTS
    checkpoints: Path = CHECKPOINTS
    reward_scale: float = 1.0
    eval_planning: tuple[int, int] | None = None
    grown_from: str | None = None
    train: str = "all"
    matmul: str = "highest"
    provenance: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.provenance = {"commit": commit(), "command": self.command, "machine": machine()}

    @property
    def algo_name(self) -> str:
        """What the algorithm is called in the results."""
        return self.algo.rpartition(":")[-1]

    @property
    def evaluations(self) -> dict[str, tuple[int, int] | None]:
        """What is recorded: variant, and how its evaluations plan (``None``: the policy acts)."""
        planned = {} if self.eval_planning is None else {f"{self.variant},planned": self.eval_planning}
        return {self.variant: None, **planned}

    def csv_path(self, variant: str) -> Path:
        """
        :param variant: a key of ``evaluations``
        :return: the file of its rows
        """
        return self.out / f"{self.algo_name}-{variant}" / f"{self._stem}.csv"

    @property
    def checkpoint_dir(self) -> Path:
        """The folder of this run's checkpoints and of its last model."""
        return self.checkpoints / f"{self.algo_name}-{self.variant}" / self._stem

    @property
    def _stem(self) -> str:
        return stem(self.env_id, self.seed)

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the file."""
        return TASK_COLUMNS if is_task_set(self.env_id) else COLUMNS

    def evaluates_plans(self, steps: int) -> bool:
        """
        :param steps: environment steps so far
        :return: whether an evaluation then is done with the planner too, which is dear: at each quarter of the budget and
            over its last 15 %
        """
        interval = _CLOSEST if self._thrice(steps) else self._interval(steps)
        return steps > 0.85 * self.steps or steps % (self.steps / 4) < interval

    def next_evaluation(self, steps: int) -> int:
        """
        :param steps: environment steps so far
        :return: when it is evaluated next: at each twentieth of the budget; a single environment or task with a budget of
            100,000 or more as ``_CLOSELY`` says, and then three times before each twentieth, so that the mean over as many
            steps is one of as many evaluations, whatever the budget
        """
        interval = self._interval(steps)
        due = min((steps // interval + 1) * interval, self.steps)
        return next(when for when in (due - 2 * _CLOSEST, due - _CLOSEST, due) if when > steps) if self._thrice(steps) else due

    @property
    def _is_single(self) -> bool:
        return not is_task_set(self.env_id) or len(tasks_of(self.env_id)) == 1

    def _thrice(self, steps: int) -> bool:
        return steps >= _CLOSELY[-1][0] and self._interval(steps) > 3 * _CLOSEST and self._is_single

    def _interval(self, steps: int) -> int:
        interval, last = max(1_000, self.steps // 20), _CLOSELY[-1][0]
        if steps >= last or self.steps < last or not self._is_single:
            return interval
        return min(interval, next(every for until, every in _CLOSELY if steps < until))

    @property
    def frames(self) -> int:
        """Environment steps per decision."""
        return frames_of(self.env_id) if is_task_set(self.env_id) else frames_per_decision(self.env_id)

    def done(self) -> bool:
        """Whether all rows reach the end of the budget, those of each task there."""
        return all(map(self._is_whole, (read_rows(self.csv_path(variant)) for variant in self.evaluations)))

    def _is_whole(self, rows: list[dict[str, str]]) -> bool:
        if not rows or int(rows[-1]["steps"]) < self.steps:
            return False
        return sum(row["steps"] == rows[-1]["steps"] for row in rows) == len({row.get("task") for row in rows})


class Evaluate(BaseCallback):
    """
    Evaluate when it is due, record it, keep a checkpoint, and stop at the end of the budget.

    :param run: the run
    :param eval_env: environments of its own, one per episode, so that each evaluation has the same start states
    :param clock: seconds of training so far; evaluations and checkpoints are no training
    """

    def __init__(self, run: Run, eval_env: VecEnv, clock: Clock) -> None:
        super().__init__()
        self.run, self.eval_env, self.clock = run, eval_env, clock
        self._next = 0
        self._saved_at, self._save_cost = 0.0, 0.0

    def _on_training_start(self) -> None:
        self._saved_at = self.clock.wall
        if self.run.grown_from is not None and self.num_timesteps == 0:
            # Before it has seen anything of the new task
            self._record(0)
        self._next = self.run.next_evaluation(self.num_timesteps * self.run.frames)
        self.clock.start()

    def _on_step(self) -> bool:
        steps = self.num_timesteps * self.run.frames
        if steps < self._next:
            return True
        self.clock.stop()
        finished = steps >= self.run.steps
        if finished:
            # Before the rows that say that it is done
            self.model.save(self.run.checkpoint_dir / "final.zip")
        self._record(steps)
        if not finished:
            self._next = self.run.next_evaluation(steps)
            self._checkpoint(steps)
            self.clock.start()
        return not finished

    def _record(self, steps: int) -> None:
        """Evaluate and write the rows."""
        quickness = reference_ms()
        for variant, planning in self.run.evaluations.items():
            if planning is not None and not self.run.evaluates_plans(steps):
                continue
            started = time.perf_counter()
            results = evaluate(self.model, self.eval_env, self.run.seed, planning)
            self._write(variant, steps, results, time.perf_counter() - started, quickness)

    def _write(self, variant: str, steps: int, results: list[dict[str, Any]], seconds: float, quickness: float) -> None:
        """One row for each result."""
        run, clock = self.run, self.clock
        for result in results:
            row = {"algo": run.algo_name, "variant": variant, "env": run.env_id, "seed": run.seed, "steps": steps, **result}
            row |= {"wall_seconds": round(clock.wall, 2), "cpu_seconds": round(clock.cpu, 2)}
            row |= {"eval_seconds": round(seconds, 2), "reference_ms": round(quickness, 1)}
            row |= {"n_updates": self.model._n_updates, **run.provenance}
            append_row(run.csv_path(variant), {name: row[name] for name in run.columns})
            score = (
                f"{row['mean_reward']:10.2f} +- {row['std_reward']:8.2f} {row.get('task', '')} {row.get('success_rate', '')}"
            )
            print(
                f"{run.algo_name}-{variant} {run.env_id} seed {run.seed}: {steps:>8,} steps {score} {clock.cpu:8.1f} CPU-s",
                flush=True,
            )

    def _checkpoint(self, steps: int) -> None:
        """Save all that a rerun needs; less often where saving takes long."""
        if not hasattr(self.model, "save_replay_buffer"):
            # The rollout that it is in the middle of would be lost
            return
        if self.clock.wall - self._saved_at < max(20.0, 20.0 * self._save_cost):
            return
        started = time.perf_counter()
        save_checkpoint(self.model, self.run, {"steps": steps, "wall": self.clock.wall, "cpu": self.clock.cpu})
        self._saved_at, self._save_cost = self.clock.wall, time.perf_counter() - started


def evaluate(
    model: BaseAlgorithm, eval_env: VecEnv, seed: int, planning: tuple[int, int] | None = None
) -> list[dict[str, Any]]:
    """
    Run deterministic episodes, always from the same seeds.

    :param model: what is evaluated; its ``VecNormalize`` statistics are copied, not changed
    :param eval_env: one environment per episode, or some of each of several tasks
    :param seed: the training seed, from which the evaluation's are derived
    :param planning: samples and iterations of M3PO's planner, or ``None``
    :return: mean and standard deviation of the returns; of each of several tasks, with its success rate
    """
    training_env = model.get_env()
    assert training_env is not None
    if model.get_vec_normalize_env() is not None:
        sync_envs_normalization(training_env, eval_env)
    eval_env.seed(EVALUATION_SEED + 1_000 * seed)
    context = model.set_planning(*planning) if planning else contextlib.nullcontext()  # type: ignore[attr-defined]
    with context:
        if is_multitask(eval_env):
            scores = evaluate_per_task(model, eval_env, N_TASK_EPISODES)
            return [
                scored(returns) | {"task": task, "success_rate": scores.success_rate.get(task, "")}
                for task, returns in scores.returns.items()
            ]
        returns, _ = evaluate_policy(model, eval_env, eval_env.num_envs, deterministic=True, return_episode_rewards=True)
    return [scored(np.array(returns))]


def is_multitask(env: VecEnv) -> bool:
    """
    :param env: environments
    :return: whether they say which task they are of
    """
    return isinstance(env.observation_space, spaces.Dict) and "task" in env.observation_space.spaces


def scored(returns: np.ndarray) -> dict[str, Any]:
    """
    :param returns: one per episode
    :return: what a row says of them
    """
    mean, std = round(float(returns.mean()), 4), round(float(returns.std()), 4)
    return {"mean_reward": mean, "std_reward": std, "n_episodes": len(returns)}


def save_checkpoint(model: BaseAlgorithm, run: Run, state: dict[str, float]) -> None:
    """
    Save model, memory and normalisation; ``state.json`` comes last, so a checkpoint that has it is whole.

    :param model: what is trained
    :param run: its run
    :param state: steps and seconds so far
    """
    folder = run.checkpoint_dir / f"step{int(state['steps'])}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    model.save(folder / "model.zip")
    if hasattr(model, "save_replay_buffer"):
        model.save_replay_buffer(folder / "memory.pkl")
    if (normalizer := model.get_vec_normalize_env()) is not None:
        normalizer.save(str(folder / "normalize.pkl"))
    (folder / "state.json").write_text(json.dumps(state))
    for other in run.checkpoint_dir.glob("step*"):
        if other != folder:
            shutil.rmtree(other)


def last_checkpoint(run: Run) -> tuple[Path | None, dict[str, float]]:
    """
    :param run: a run
    :return: the folder of its last whole checkpoint whose rows are there (``None`` without one), and its steps and seconds
    """
    recorded = {int(row["steps"]) for row in read_rows(run.csv_path(run.variant))}
    whole = {int(path.parent.name.removeprefix("step")): path for path in run.checkpoint_dir.glob("step*/state.json")}
    if not (usable := recorded & set(whole)):
        return None, {"steps": 0, "wall": 0.0, "cpu": 0.0}
    state = whole[max(usable)]
    return state.parent, json.loads(state.read_text())


def check_sources(run: Run, checkpoint: Path, steps: int) -> None:
    """
    :param run: a run
    :param checkpoint: folder of its last checkpoint
    :param steps: environment steps of the checkpoint
    :raises RuntimeError: if other code has trained it
    """
    rows, now = read_rows(run.csv_path(run.variant)), run.provenance["commit"]
    before = next(row["commit"] for row in rows if int(row["steps"]) == steps)
    if not train_alike(before, now):
        raise RuntimeError(
            f"{checkpoint} is of commit {before}, and the code of {now} trains otherwise: check out {before} to go on, "
            f"or delete {run.checkpoint_dir} to begin anew"
        )


def build(run: Run, checkpoint: Path | None, steps: int) -> BaseAlgorithm:
    """
    Make the model, or load it from a checkpoint.

    :param run: the run
    :param checkpoint: folder of a checkpoint, or ``None`` to begin
    :param steps: environment steps of the checkpoint
    :return: a model with its training environments
    """
    settings = run.settings
    if run.grown_from is not None and checkpoint is None:
        return grow(run)
    env = training_env(run, checkpoint)
    if settings.normalize is not None:
        saved = None if checkpoint is None else str(checkpoint / "normalize.pkl")
        env = VecNormalize(env, **settings.normalize) if saved is None else VecNormalize.load(saved, env)
    cls = algorithm_class(run.algo)
    if checkpoint is None:
        return cls(policy_name(env.observation_space), env, seed=run.seed, device="cpu", **settings.kwargs)
    model = cls.load(checkpoint / "model.zip", env=env, device="cpu")
    if hasattr(model, "load_replay_buffer"):
        model.load_replay_buffer(checkpoint / "memory.pkl")
    # Another one than at the start, and none of the evaluations'
    model.set_random_seed(run.seed + 500 + 1_000 * steps)
    return model


def training_env(run: Run, checkpoint: Path | None) -> VecEnv:
    """
    :param run: the run
    :param checkpoint: folder of a checkpoint, or ``None`` to begin
    :return: its environments, without normalisation
    """
    if not is_task_set(run.env_id):
        return vec_env(run.env_id, run.settings.n_envs, run.seed, run.reward_scale)
    like = None
    if run.grown_from is not None and checkpoint is not None:
        # Its tasks stand behind others in the table
        like = algorithm_class(run.algo).load(checkpoint / "model.zip", device="cpu")
    return task_vec_env(run.env_id, run.settings.n_envs, run.seed, like)


def grow(run: Run) -> BaseAlgorithm:
    """
    :param run: a run that begins with the final model of another one, of the same seed and settings
    :return: that model, with the run's tasks taken in
    """
    assert run.grown_from is not None
    name = f"{run.algo_name}-{run.variant.removesuffix(f',grown-{run.train}')}"
    path = run.checkpoints / name / stem(run.grown_from, run.seed) / "final.zip"
    rows = read_rows(run.out / name / f"{stem(run.grown_from, run.seed)}.csv")
    if not path.exists() or not rows:
        raise FileNotFoundError(
            f"{path} or its rows are missing: first run --env {run.grown_from} --seeds {run.seed} in this folder (rows from "
            "elsewhere, which say that it is done, must be deleted before)"
        )
    if not train_alike(rows[-1]["commit"], run.provenance["commit"]):
        raise RuntimeError(
            f"{path} is of commit {rows[-1]['commit']}, which trains otherwise: check it out, or repeat that run"
        )
    model: Any = algorithm_class(run.algo).load(path, device="cpu")
    model.add_tasks(task_vec_env(run.env_id, run.settings.n_envs, run.seed, like=model), train=run.train)
    model.num_timesteps = 0
    return model


def train(run: Run) -> None:
    """
    Carry out a run from where it stands.

    :param run: the run
    """
    if run.done():
        print(f"{run.csv_path(run.variant)}: done already", flush=True)
        return
    th.set_num_threads(1)
    th.set_float32_matmul_precision(run.matmul)
    checkpoint, state = last_checkpoint(run)
    if checkpoint is not None:
        check_sources(run, checkpoint, int(state["steps"]))
    for path in map(run.csv_path, run.evaluations):
        known = [] if checkpoint is None else read_rows(path)
        write_rows(path, [row for row in known if int(row["steps"]) <= state["steps"]], run.columns)
    run.checkpoint_dir.mkdir(parents=True, exist_ok=True)
    # One of a former run would pass for this one's
    (run.checkpoint_dir / "final.zip").unlink(missing_ok=True)
    model = build(run, checkpoint, int(state["steps"]))
    eval_env = evaluation_env(run, model)
    if run.settings.normalize is not None:
        eval_env = VecNormalize(eval_env, **{**run.settings.normalize, "training": False, "norm_reward": False})
    callback = Evaluate(run, eval_env, Clock(state["wall"], state["cpu"]))
    decisions = -(-run.steps // run.frames) - model.num_timesteps
    model.learn(decisions, callback=callback, reset_num_timesteps=checkpoint is None)
    for folder in run.checkpoint_dir.glob("step*"):
        shutil.rmtree(folder)


def evaluation_env(run: Run, model: BaseAlgorithm) -> VecEnv:
    """
    :param run: the run
    :param model: its model
    :return: environments to evaluate it in, without normalisation
    """
    if not is_task_set(run.env_id):
        return vec_env(run.env_id, N_EPISODES, EVALUATION_SEED)
    return task_vec_env(run.env_id, N_TASK_COPIES, EVALUATION_SEED, like=model)


def run_commands(commands: list[list[str]], jobs: int) -> int:
    """
    Run commands in processes of their own, so many at a time, in the order given.

    :param commands: arguments of ``python -m``
    :param jobs: how many at a time
    :return: how many failed
    """
    with ThreadPoolExecutor(jobs) as pool:
        return sum(pool.map(_run_command, commands))


def _run_command(command: list[str]) -> bool:
    """Run ``python -m`` with these arguments; whether it failed."""
    code = subprocess.run([sys.executable, "-m", *command], check=False).returncode
    if code != 0:
        print(f"FAILED ({code}): python -m {shlex.join(command)}", flush=True)
    return code != 0


def add_settings_arguments(parser: argparse.ArgumentParser) -> None:
    """
    :param parser: gets the options that ``run`` and ``suite`` share
    """
    parser.add_argument("--algo", default="m3po", help="m3po, ppo, sac, or module:Class")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n-envs", type=int, help="number of training environments")
    parser.add_argument("--zoo", action="store_true", help="rl-zoo3's tuned hyperparameters, its normalize included")
    parser.add_argument("-p", dest="overrides", action="append", default=[], metavar="KEY:VALUE", help="constructor argument")
    parser.add_argument("--name", help="name of the settings in the results; defaults to what differs from the defaults")
    parser.add_argument("--reward-scale", type=float, default=1.0, help="factor on the training rewards")
    parser.add_argument(
        "--eval-planning", type=int, nargs=2, metavar=("SAMPLES", "ITERATIONS"), help="evaluate with the planner too"
    )
    parser.add_argument("--grown-from", metavar="TASKS", help="take the tasks into the final model of another set's run")
    parser.add_argument("--train", default="all", help="what a grown model learns: all, or new")
    parser.add_argument("--matmul", default="highest", choices=["highest", "high", "medium"], help="precision of products")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--checkpoints", type=Path, default=CHECKPOINTS)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each in a process with one thread")


def settings_options(args: argparse.Namespace) -> list[str]:
    """
    :param args: what ``add_settings_arguments`` parsed
    :return: the options that say the same, without the seeds and the number of jobs
    """
    options = ["--algo", args.algo]
    options += ["--n-envs", str(args.n_envs)] if args.n_envs else []
    options += ["--zoo"] if args.zoo else []
    options += [part for override in args.overrides for part in ("-p", override)]
    options += ["--name", args.name] if args.name else []
    options += ["--reward-scale", f"{args.reward_scale:g}"] if args.reward_scale != 1.0 else []
    options += ["--eval-planning", *map(str, args.eval_planning)] if args.eval_planning else []
    options += ["--grown-from", args.grown_from] if args.grown_from else []
    options += ["--train", args.train] if args.train != "all" else []
    options += ["--matmul", args.matmul] if args.matmul != "highest" else []
    options += ["--out", str(args.out)] if args.out != RESULTS else []
    return options + (["--checkpoints", str(args.checkpoints)] if args.checkpoints != CHECKPOINTS else [])


def make_run(args: argparse.Namespace, seed: int) -> Run:
    """
    :param args: the parsed command line
    :param seed: one of its seeds
    :return: the run
    """
    settings = zoo_settings(args.algo, args.env) if args.zoo else Settings()
    settings.kwargs = apply_overrides(settings.kwargs, args.overrides)
    settings.n_envs = args.n_envs or settings.n_envs
    words = ["zoo"] * args.zoo + [override.replace(":", "=") for override in args.overrides]
    words += [f"envs={args.n_envs}"] if args.n_envs else []
    words += [f"rewards={args.reward_scale:g}"] if args.reward_scale != 1.0 else []
    words += [f"matmul={args.matmul}"] if args.matmul != "highest" else []
    variant = args.name or ",".join(words) or "default"
    variant += f",grown-{args.train}" if args.grown_from else ""
    options = ["--env", args.env, "--steps", str(args.steps), "--seeds", str(seed), *settings_options(args)]
    command = shlex.join(["python", "-m", "benchmarks.run", *options])
    run = Run(args.algo, variant, args.env, seed, args.steps, settings, command)
    run.out, run.checkpoints = args.out, args.checkpoints
    run.reward_scale, run.matmul = args.reward_scale, args.matmul
    run.grown_from, run.train = args.grown_from, args.train
    run.eval_planning = tuple(args.eval_planning) if args.eval_planning else None
    return run


def make_parser() -> argparse.ArgumentParser:
    """
    :return: the parser of the command line
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--env", required=True, help="id of the environment")
    parser.add_argument("--steps", type=int, required=True, help="budget in environment steps (frames)")
    add_settings_arguments(parser)
    return parser


def is_done(argv: list[str]) -> bool:
    """
    :param argv: a command line
    :return: whether there is nothing left to do for it
    """
    args = make_parser().parse_args(argv)
    return all(make_run(args, seed).done() for seed in args.seeds)


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: the command line, ``sys.argv`` by default
    """
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.grown_from and args.overrides:
        parser.error("a model that takes tasks in keeps its settings: give -p where --grown-from was trained")
    if args.jobs == 1 or len(args.seeds) == 1:
        for seed in args.seeds:
            train(make_run(args, seed))
        return
    options = ["benchmarks.run", "--env", args.env, "--steps", str(args.steps), *settings_options(args)]
    sys.exit(run_commands([[*options, "--seeds", str(seed)] for seed in args.seeds], args.jobs))


if __name__ == "__main__":
    main()
