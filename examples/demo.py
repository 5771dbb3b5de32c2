"""
M3PO and PPO side by side, for equal CPU-seconds: ``make demo``.

First both learn HalfCheetah-v5: M3PO with its defaults, but that it updates from the first episode on, PPO with the settings
that rl-zoo3 tuned for HalfCheetah, observation and reward normalisation included. Then one agent of each learns three tasks of
different shapes at once, both with their defaults. Each learns in a process of its own with one thread; evaluations do not
count. Models and figures go to ``demo_output/``.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", MUJOCO_GL="disable", MPLBACKEND="Agg")

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from importlib.resources import files
from multiprocessing.queues import Queue
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch as th
import yaml
from matplotlib import pyplot as plt
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Column, Table
from stable_baselines3 import PPO
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.vec_env import VecEnv, VecNormalize, sync_envs_normalization

from sb3_m3po import M3PO, evaluate_per_task, make_multitask_vec_env

ENV_ID = "HalfCheetah-v5"
TASKS = ["Pendulum-v1", "InvertedPendulum-v5", "Reacher-v5"]
STEP_MARKS = [1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000]
N_CPU_MARKS = 8
NAMES = ("M3PO", "PPO")


class Point(NamedTuple):
    """An evaluation: environment steps and CPU-seconds of learning before it, and the score of each task."""

    steps: int
    cpu: float
    scores: list[float]


Curves = dict[str, list[Point]]


def make_ppo() -> BaseAlgorithm:
    """PPO with rl-zoo3's settings for HalfCheetah."""
    settings = yaml.safe_load((files("rl_zoo3") / "hyperparams" / "ppo.yml").read_text())["HalfCheetah-v4"]
    env = make_vec_env(ENV_ID, n_envs=settings.pop("n_envs"), seed=0)
    if settings.pop("normalize"):
        env = VecNormalize(env, gamma=settings["gamma"])
    del settings["n_timesteps"]
    # text in the zoo's file: dict(activation_fn=nn.ReLU, ...)
    settings["policy_kwargs"] = eval(settings["policy_kwargs"], {"nn": th.nn})
    return PPO(settings.pop("policy"), env, seed=0, device="cpu", **settings)


def make_model(name: str, tasks: list[str]) -> BaseAlgorithm:
    """One agent: of HalfCheetah, or of several tasks."""
    if tasks:
        algorithm = M3PO if name == "M3PO" else PPO
        return algorithm("MultiInputPolicy", make_multitask_vec_env(tasks, seed=0), seed=0, device="cpu")
    if name == "PPO":
        return make_ppo()
    # The first update after one episode, not five: there is time for a few thousand steps
    return M3PO("MlpPolicy", make_vec_env(ENV_ID, seed=0), learning_starts=1_000, seed=0, device="cpu")


def make_eval_env(model: BaseAlgorithm, tasks: list[str], n_envs: int = 3) -> VecEnv:
    """Environments with other seeds than training's, one per episode, normalised as training's are."""
    if tasks:
        return make_multitask_vec_env(tasks, n_envs, seed=1_000)
    env = make_vec_env(ENV_ID, n_envs=n_envs, seed=1_000)
    return env if model.get_vec_normalize_env() is None else VecNormalize(env, training=False, norm_reward=False)


def mean_scores(model: BaseAlgorithm, env: VecEnv, tasks: list[str]) -> list[float]:
    """Mean return of one deterministic episode in each of the environments, for each task."""
    env.seed(1_000)
    if tasks:
        return list(evaluate_per_task(model, env, n_eval_episodes=env.num_envs // len(tasks)).values())
    if model.env is not None:
        sync_envs_normalization(model.env, env)
    return [float(np.mean(evaluate_policy(model, env, n_eval_episodes=env.num_envs)[0]))]


class LearnFor(BaseCallback):
    """Learn for some CPU-seconds, evaluate on the way without counting it, and tell the parent process."""

    queue: Queue  # to the parent process

    def __init__(self, name: str, tasks: list[str], budget: float) -> None:
        super().__init__()
        self.name, self.tasks, self.budget = name, tasks, budget
        self.points: list[Point] = []
        self.step_marks, self.cpu_marks = list(STEP_MARKS), list(np.linspace(0, budget, N_CPU_MARKS + 1)[1:])

    def _on_training_start(self) -> None:
        self.eval_env = make_eval_env(self.model, self.tasks)
        self.not_counted = time.process_time()
        self._evaluate(0.0)

    def _on_step(self) -> bool:
        cpu = time.process_time() - self.not_counted
        if cpu >= self.cpu_marks[0] or self.num_timesteps >= self.step_marks[0]:
            self._evaluate(cpu)
            self.cpu_marks = [mark for mark in self.cpu_marks if mark > cpu]
            self.step_marks = [mark for mark in self.step_marks if mark > self.num_timesteps] or [10**9]
        elif self.n_calls % 50 == 0:
            self._report(cpu)
        return bool(self.cpu_marks)

    def _evaluate(self, cpu: float) -> None:
        started = time.process_time()
        self.points.append(Point(self.num_timesteps, cpu, mean_scores(self.model, self.eval_env, self.tasks)))
        self._report(cpu)
        self.not_counted += time.process_time() - started

    def _report(self, cpu: float) -> None:
        scores = " ".join(f"{score:,.0f}" for score in self.points[-1].scores)
        text = f"{min(cpu, self.budget):4.0f} of {self.budget:.0f} CPU-s  {self.num_timesteps:>7,} steps  score {scores}"
        self.queue.put((self.name, cpu, text))


def learn(name: str, tasks: list[str], budget: float, folder: Path) -> list[Point]:
    """Learn for ``budget`` CPU-seconds on one thread, save the model, return its curve."""
    th.set_num_threads(1)
    model, callback = make_model(name, tasks), LearnFor(name, tasks, budget)
    model.learn(10**9, callback=callback)
    model.save(folder / f"{name.lower()}_{'tasks' if tasks else 'halfcheetah'}.zip")
    return callback.points


def learn_side_by_side(console: Console, tasks: list[str], budget: float, folder: Path) -> Curves:
    """Both algorithms at once, each in its process, with a progress bar over CPU-seconds for each."""
    console.rule(f"One agent, three tasks: {', '.join(tasks)}" if tasks else ENV_ID)
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    columns = (TextColumn("{task.description:5}"), BarColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
    pool = ProcessPoolExecutor(2, context, setattr, (LearnFor, "queue", queue))
    with Progress(*columns, console=console) as progress, pool:
        bars = {name: progress.add_task(name, total=budget, text="starting") for name in NAMES}
        futures = {name: pool.submit(learn, name, tasks, budget, folder) for name in NAMES}
        while not all(future.done() for future in futures.values()):
            time.sleep(0.2)
            while not queue.empty():
                name, cpu, text = queue.get()
                progress.update(bars[name], completed=cpu, text=text)
        return {name: future.result() for name, future in futures.items()}


def show_marks(console: Console, curves: Curves) -> None:
    """The scores against environment steps and against CPU-seconds, interpolated between evaluations."""
    columns = {name: np.array([(p.steps, p.cpu, p.scores[0]) for p in points]).T for name, points in curves.items()}
    cpu_marks = np.linspace(0, min(columns[name][1][-1] for name in NAMES), 7)
    longest = max(columns[name][0][-1] for name in NAMES)
    marks = ([mark for mark in STEP_MARKS if mark <= longest], cpu_marks)
    for axis, title in enumerate(("environment steps", "CPU-seconds of learning")):
        table = Table(*(Column(text, justify="right") for text in (title, *NAMES)), title=f"Score against {title}")
        for mark in marks[axis]:
            scores = [np.interp(mark, columns[name][axis], columns[name][2], right=np.nan) for name in NAMES]
            table.add_row(f"{mark:,.0f}", *("-" if np.isnan(score) else f"{score:,.0f}" for score in scores))
        console.print(table)


def show_tasks(console: Console, curves: Curves) -> None:
    """What each agent scores on each task at the end."""
    table = Table("task", *(Column(text, justify="right") for text in ("untrained M3PO", *NAMES)), title="Score of each task")
    for i, task in enumerate(TASKS):
        scores = [curves["M3PO"][0].scores[i], *(curves[name][-1].scores[i] for name in NAMES)]
        table.add_row(task, *(f"{score:,.0f}" for score in scores))
    console.print(table)


def show_ends(console: Console, curves: Curves) -> None:
    """How far each of them came."""
    for name, points in curves.items():
        scores = " ".join(f"{score:,.0f}" for score in points[-1].scores)
        console.print(f"{name}: {points[-1].steps:,} steps in {points[-1].cpu:.1f} CPU-seconds, score {scores}")


def draw(curves: Curves, titles: list[str], path: Path) -> None:
    """Both curves against both axes, one row for each task."""
    figure, axes = plt.subplots(
        len(titles), 2, figsize=(10, 1 + 3 * len(titles)), sharey="row", sharex="col", layout="constrained", squeeze=False
    )
    for i, title in enumerate(titles):
        for name, points in curves.items():
            scores = [point.scores[i] for point in points]
            axes[i, 0].plot([point.steps for point in points], scores, marker=".", label=name)
            axes[i, 1].plot([point.cpu for point in points], scores, marker=".", label=name)
        axes[i, 0].set(title=title, ylabel="score (3 deterministic episodes)")
    axes[-1, 0].set(xlabel="environment steps")
    axes[-1, 1].set(xlabel="CPU-seconds of learning, one thread")
    axes[0, 1].legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def use_saved_model(console: Console, path: Path) -> None:
    """Load the model and evaluate it with and without planning."""
    th.set_num_threads(1)
    model = M3PO.load(path, device="cpu")
    env = make_eval_env(model, [], n_envs=5)
    console.print(f"{path} loaded, 5 episodes: {mean_scores(model, env, [])[0]:,.0f} with the policy alone")
    with model.set_planning(32, 1):
        score = mean_scores(model, env, [])[0]
        console.print(f"{path} loaded, 5 episodes: {score:,.0f} with planning (32 samples, 1 iteration)")


def main() -> None:
    """Learn one task, then several; show, save, load, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=70.0, help="CPU-seconds of learning for each algorithm and part")
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    args = parser.parse_args()
    started, console = time.perf_counter(), Console(width=110)
    args.output.mkdir(parents=True, exist_ok=True)

    curves = learn_side_by_side(console, [], args.seconds, args.output)
    show_marks(console, curves)
    show_ends(console, curves)
    draw(curves, [f"{ENV_ID}, one seed: M3PO, PPO (rl-zoo3's settings)"], args.output / "curves.png")
    use_saved_model(console, args.output / "m3po_halfcheetah.zip")

    curves = learn_side_by_side(console, TASKS, args.seconds, args.output)
    show_tasks(console, curves)
    show_ends(console, curves)
    draw(curves, [f"{task}, one agent for {len(TASKS)} tasks, one seed" for task in TASKS], args.output / "tasks.png")
    pictures = f"{args.output / 'curves.png'}, {args.output / 'tasks.png'}"
    console.print(f"Curves: {pictures}. The demo took {time.perf_counter() - started:.0f} seconds.")


if __name__ == "__main__":
    main()
