"""
M3PO and PPO learn HalfCheetah-v5 side by side, for equal CPU-seconds: ``make demo``.

M3PO has its defaults. PPO has the settings that rl-zoo3 tuned for HalfCheetah, observation and reward normalisation
included. Each learns in a process of its own with one thread; evaluations do not count. The model and a figure go to
``demo_output/``.
"""

import os

os.environ.update(OMP_NUM_THREADS="1", TORCHINDUCTOR_COMPILE_THREADS="1", MUJOCO_GL="disable", MPLBACKEND="Agg")

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

from sb3_m3po import M3PO

ENV_ID = "HalfCheetah-v5"
STEP_MARKS = [1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000]
N_CPU_MARKS = 8
NAMES = ("M3PO", "PPO")


class Point(NamedTuple):
    """An evaluation: environment steps and CPU-seconds of learning before it, and the score."""

    steps: int
    cpu: float
    score: float


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


def make_eval_env(model: BaseAlgorithm, n_envs: int = 3) -> VecEnv:
    """Environments with other seeds than training's, one per episode, normalised as training's are."""
    env = make_vec_env(ENV_ID, n_envs=n_envs, seed=1_000)
    return env if model.get_vec_normalize_env() is None else VecNormalize(env, training=False, norm_reward=False)


def mean_score(model: BaseAlgorithm, env: VecEnv) -> float:
    """Mean return of one deterministic episode in each of the environments."""
    if model.env is not None:
        sync_envs_normalization(model.env, env)
    env.seed(1_000)
    return float(np.mean(evaluate_policy(model, env, n_eval_episodes=env.num_envs)[0]))


def cpu_seconds() -> float:
    """CPU-seconds of this process, and of the compilers that it started."""
    return time.process_time() + sum(os.times()[2:4])


class LearnFor(BaseCallback):
    """Learn for some CPU-seconds, evaluate on the way without counting it, and tell the parent process."""

    queue: Queue  # to the parent process

    def __init__(self, name: str, budget: float) -> None:
        super().__init__()
        self.name, self.budget = name, budget
        self.points: list[Point] = []
        self.step_marks, self.cpu_marks = list(STEP_MARKS), list(np.linspace(0, budget, N_CPU_MARKS + 1)[1:])

    def _on_training_start(self) -> None:
        self.eval_env = make_eval_env(self.model)
        self.not_counted = cpu_seconds()
        self._evaluate(0.0)

    def _on_step(self) -> bool:
        cpu = cpu_seconds() - self.not_counted
        if cpu >= self.cpu_marks[0] or self.num_timesteps >= self.step_marks[0]:
            self._evaluate(cpu)
            self.cpu_marks = [mark for mark in self.cpu_marks if mark > cpu]
            self.step_marks = [mark for mark in self.step_marks if mark > self.num_timesteps] or [10**9]
        elif self.num_timesteps % 50 == 0:
            self._report(cpu)
        return bool(self.cpu_marks)

    def _evaluate(self, cpu: float) -> None:
        started = cpu_seconds()
        self.points.append(Point(self.num_timesteps, cpu, mean_score(self.model, self.eval_env)))
        self._report(cpu)
        self.not_counted += cpu_seconds() - started

    def _report(self, cpu: float) -> None:
        self.queue.put((self.name, self.num_timesteps, cpu, self.points[-1].score))


def learn(name: str, budget: float, folder: Path) -> list[Point]:
    """Learn for ``budget`` CPU-seconds on one thread, save the model, return its curve."""
    th.set_num_threads(1)
    model = M3PO("MlpPolicy", make_vec_env(ENV_ID, seed=0), seed=0, device="cpu") if name == "M3PO" else make_ppo()
    callback = LearnFor(name, budget)
    model.learn(10**9, callback=callback)
    model.save(folder / f"{name.lower()}_halfcheetah.zip")
    return callback.points


def learn_side_by_side(budget: float, folder: Path) -> dict[str, list[Point]]:
    """Both algorithms at once, each in its process, with a progress bar over CPU-seconds for each."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    columns = (TextColumn("{task.description:5}"), BarColumn(), TextColumn("{task.fields[text]}"), TimeElapsedColumn())
    with Progress(*columns) as progress, ProcessPoolExecutor(2, context, setattr, (LearnFor, "queue", queue)) as pool:
        bars = {name: progress.add_task(name, total=budget, text="starting") for name in NAMES}
        futures = {name: pool.submit(learn, name, budget, folder) for name in NAMES}
        while not all(future.done() for future in futures.values()):
            time.sleep(0.2)
            while not queue.empty():
                name, steps, cpu, score = queue.get()
                text = f"{min(cpu, budget):4.0f} of {budget:.0f} CPU-s  {steps:>7,} steps  score {score:>6,.0f}"
                progress.update(bars[name], completed=cpu, text=text)
        return {name: future.result() for name, future in futures.items()}


def show_tables(console: Console, curves: dict[str, list[Point]]) -> None:
    """The scores against environment steps and against CPU-seconds, interpolated between evaluations."""
    columns = {name: np.array(points).T for name, points in curves.items()}
    cpu_marks = np.linspace(0, min(columns[name][1][-1] for name in NAMES), 7)
    longest = max(columns[name][0][-1] for name in NAMES)
    marks = ([mark for mark in STEP_MARKS if mark <= longest], cpu_marks)
    for axis, title in enumerate(("environment steps", "CPU-seconds of learning")):
        table = Table(*(Column(text, justify="right") for text in (title, *NAMES)), title=f"Score against {title}")
        for mark in marks[axis]:
            scores = [np.interp(mark, columns[name][axis], columns[name][2], right=np.nan) for name in NAMES]
            table.add_row(f"{mark:,.0f}", *("-" if np.isnan(score) else f"{score:,.0f}" for score in scores))
        console.print(table)
    for name, points in curves.items():
        console.print(f"{name}: {points[-1].steps:,} steps in {points[-1].cpu:.1f} CPU-seconds, score {points[-1].score:,.0f}")


def draw(curves: dict[str, list[Point]], path: Path) -> None:
    """Both curves against both axes."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for name, points in curves.items():
        steps, cpu, scores = np.array(points).T
        axes[0].plot(steps, scores, marker=".", label=name)
        axes[1].plot(cpu, scores, marker=".", label=name)
    axes[0].set(xlabel="environment steps", ylabel="score (3 deterministic episodes)")
    axes[1].set(xlabel="CPU-seconds of learning, one thread")
    axes[1].legend()
    figure.suptitle(f"{ENV_ID}, one seed: M3PO (defaults) and PPO (rl-zoo3's settings)")
    figure.savefig(path, dpi=120)


def main() -> None:
    """Learn, show, save, load, evaluate."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=130.0, help="CPU-seconds of learning for each algorithm")
    parser.add_argument("--output", type=Path, default=Path("demo_output"))
    args = parser.parse_args()
    started, console = time.perf_counter(), Console(width=110)
    args.output.mkdir(parents=True, exist_ok=True)
    curves = learn_side_by_side(args.seconds, args.output)
    show_tables(console, curves)
    draw(curves, args.output / "curves.png")
    th.set_num_threads(1)
    path = args.output / "m3po_halfcheetah.zip"
    model = M3PO.load(path, device="cpu")
    env = make_eval_env(model, n_envs=5)
    console.print(f"{path} loaded, 5 episodes: {mean_score(model, env):,.0f} with the policy alone")
    with model.set_planning(32, 1):
        console.print(f"{path} loaded, 5 episodes: {mean_score(model, env):,.0f} with planning (32 samples, 1 iteration)")
    console.print(f"Curves: {args.output / 'curves.png'}. The demo took {time.perf_counter() - started:.0f} seconds.")


if __name__ == "__main__":
    main()
