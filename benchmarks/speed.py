"""
Time updates, predictions and planned steps, on one thread and at the defaults, on HalfCheetah-v5, with a memory of 50,000
transitions: the frozen copies are evaluated once for each distinct observation, so the first updates take less time.

Everything is timed in rounds, in turn, so that a busy moment of the machine meets all of it. Given are the median over rounds
and, in brackets, the quickest one: other work on the machine only ever adds to it.

With ``--compile`` also what ``torch.compile`` would gain, which M3PO does not use. With ``--tasks`` only what 10 and 50 tasks
cost beside one: as many copies of HalfCheetah-v5, told apart.

``python -m benchmarks.speed --csv benchmarks/results/speed.csv``
"""

import argparse
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch as th
from stable_baselines3 import PPO, SAC
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.utils import obs_as_tensor

from benchmarks.envs import vec_env
from benchmarks.record import Clock, commit, machine, write_rows
from sb3_m3po import M3PO, Task, learner, make_multitask_vec_env

ENV_ID = "HalfCheetah-v5"
N_ENVS = (1, 8, 64)
N_TASKS = (1, 10, 50)
ROUNDS = 7
#: Transitions in memory
FULL = 50_000
LOSSES = ("world_model_loss", "critic_loss", "policy_terms")
COLUMNS = ("measure", "case", "quantity", "value", "commit", "command", "machine")

Row = tuple[str | int, ...]


class TrainingTime(BaseCallback):
    """
    Time what lies between rollouts: ``train()``.

    :param clock: runs from the end of a rollout to the beginning of the next, or to the end of training
    """

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock = clock
        self.running = False

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self.clock.start()
        self.running = True

    def _on_rollout_start(self) -> None:
        if self.running:
            self.clock.stop()
            self.running = False

    def _on_training_end(self) -> None:
        self._on_rollout_start()


def time_updates(model: BaseAlgorithm, steps: int) -> tuple[float, float]:
    """
    :param model: a model whose updates have begun
    :param steps: environment steps to go on for
    :return: milliseconds per update, by the wall and by the CPU
    """
    before, clock = model._n_updates, Clock()
    model.learn(steps, callback=TrainingTime(clock), reset_num_timesteps=False)
    done = model._n_updates - before
    return 1_000 * clock.wall / done, 1_000 * clock.cpu / done


def time_calls(calls: dict[str, Callable[[], object]], seconds: float = 0.3) -> dict[str, list[float]]:
    """
    Time functions in turn, several rounds of each, so that a busy moment of the machine meets all of them.

    :param calls: functions by name
    :param seconds: time for a round of one function
    :return: milliseconds per call, by name and round
    """
    rounds: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(ROUNDS + 1):
        for name, call in calls.items():
            count, start = 0, time.perf_counter()
            while (passed := time.perf_counter() - start) < seconds:
                call()
                count += 1
            if number > 0:  # the first round warms up
                rounds[name].append(1_000 * passed / count)
    return rounds


def text(times: list[float], digits: int) -> str:
    """
    :param times: of rounds
    :param digits: behind the point
    :return: their median, and the quickest in brackets
    """
    return f"{np.median(times):.{digits}f} ({min(times):.{digits}f})"


def show(columns: tuple[str, ...], rows: Iterable[Row]) -> list[dict[str, Any]]:
    """
    Print a table while it is measured.

    :param columns: of the table; the first says what is measured
    :param rows: a cell for each column
    :return: a row for each cell
    """
    print(f"\n| {' | '.join(columns)} |\n|{' --- |' * len(columns)}")
    kept = []
    for case, *cells in rows:
        print(f"| {case} | {' | '.join(map(str, cells))} |", flush=True)
        found = zip(columns[1:], cells, strict=True)
        kept += [{"measure": columns[0], "case": case, "quantity": name, "value": cell} for name, cell in found]
    return kept


def past_the_start(model: M3PO) -> M3PO:
    """
    :param model: a model whose updates have begun
    :return: the same, which goes on as it does in most of a training
    """
    model._n_updates = max(model._n_updates, learner.DELAYED_AFTER)
    return model


#: A batch times the updates, the measure by which learning was seen to go
UPDATES = ("update", "ms (wall)", "ms (CPU)", "samples per CPU-s", "transitions in a loss per CPU-s")


def updates(m3po: M3PO, sac: SAC, steps: int) -> Iterator[Row]:
    """
    Time updates and the samples visited per CPU-second, M3PO's beside SAC's.

    :param m3po: a model whose updates have begun
    :param sac: likewise
    :param steps: environment steps to go on for, in all rounds
    :return: rows of the table
    """
    # an update of M3PO is one of the world model, on a batch of sequences, and one of the critics, on a batch of transitions
    samples = {"M3PO": m3po.batch_size, "SAC": sac.batch_size}
    transitions = {"M3PO": m3po.batch_size * (m3po.horizon + 1), "SAC": sac.batch_size}
    times = time_updates_in_turn({"M3PO": m3po, "SAC": sac}, steps)
    for name, rounds in times.items():
        wall, cpu = (list(x) for x in zip(*rounds, strict=True))
        per_second = (f"{1_000 * count[name] / np.median(cpu):,.0f}" for count in (samples, transitions))
        yield name, text(wall, 1), text(cpu, 1), *per_second


TRAINING = ("training", "environment steps per second (wall)", "per CPU-second")


def training(models: Mapping[str, BaseAlgorithm], steps: int) -> Iterator[Row]:
    """
    Time whole trainings, collecting and updating.

    :param models: models whose updates have begun, by name
    :param steps: environment steps to go on for, in all rounds
    :return: rows of the table
    """
    rates: dict[str, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            before, clock = model.num_timesteps, Clock()
            clock.start()
            model.learn(steps // ROUNDS, reset_num_timesteps=False)
            clock.stop()
            done = model.num_timesteps - before
            rates[name].append((done / clock.wall, done / clock.cpu))
    for name, rounds in rates.items():
        yield name, *(f"{np.median(rate):.0f} ({max(rate):.0f})" for rate in zip(*rounds, strict=True))


def time_updates_in_turn(models: Mapping[Any, BaseAlgorithm], steps: int) -> dict[Any, list[tuple[float, float]]]:
    """
    :param models: models whose updates have begun, by name
    :param steps: environment steps to go on for, in all rounds
    :return: what :func:`time_updates` gives, by name and round
    """
    rounds: dict[Any, list[tuple[float, float]]] = {name: [] for name in models}
    for _ in range(ROUNDS):
        for name, model in models.items():
            rounds[name].append(time_updates(model, steps // ROUNDS))
    return rounds


COMPILING = ("losses", "ms (wall)", "ms (CPU)")


def compiling(m3po: M3PO, steps: int) -> Iterator[Row]:
    """
    Time updates with and without ``torch.compile`` on the losses, which hold the forward and the backward
    passes, and how long compiling takes.

    :param m3po: a model whose updates have begun
    :param steps: environment steps to go on for
    :return: rows of the table
    """
    before = time_updates(m3po, steps)
    clock = Clock()
    clock.start()
    with ExitStack() as stack:
        for name in LOSSES:
            compiled = th.compile(getattr(learner, name), dynamic=False)
            stack.enter_context(patch.object(learner, name, compiled))
        m3po.learn(2 * m3po.sync_interval, reset_num_timesteps=False)
        clock.stop()
        after = time_updates(m3po, steps)
    for name, (wall, cpu) in (("as they are", before), (f"compiled, in {clock.wall:.0f} s with some updates", after)):
        yield name, f"{wall:.1f}", f"{cpu:.1f}"


PREDICTING = ("predict", "microseconds", "relative to PPO")


def predicting(m3po: M3PO, ppo: PPO) -> Iterator[Row]:
    """
    Time predictions of the policy, M3PO's beside PPO's.

    :param m3po: a model
    :param ppo: likewise
    :return: rows of the table
    """
    observation = ppo.observation_space.sample().astype(np.float32)
    models = {"M3PO": m3po, "PPO": ppo}
    times = time_calls({name: partial(model.predict, observation, deterministic=True) for name, model in models.items()})
    for name, rounds in times.items():
        ratio = np.median(rounds) / np.median(times["PPO"])
        yield name, text([1_000 * milliseconds for milliseconds in rounds], 0), f"{ratio:.2f}"


def fill(model: M3PO, size: int) -> None:
    """
    :param model: a model
    :param size: transitions that its memory then holds, random ones, in episodes of 1,000 steps
    """
    memory, n_envs = model.replay_buffer, model.n_envs
    nothing, never = np.zeros(n_envs), np.zeros(n_envs, bool)
    while memory.size() < size:
        seen = np.stack([model.observation_space.sample()] * n_envs)
        memory.add(
            seen, np.zeros((n_envs, memory.action_dim), np.float32), nothing, seen, never, never | (memory.pos % 1_000 == 0)
        )


#: Samples and iterations of the planner
_BUDGETS = ((32, 1), (64, 2))
_PLANNED = ("collecting", *(f"predict {samples} x {iterations}" for samples, iterations in _BUDGETS))
PLANNING = ("planned step of environments", *(f"ms, {name}" for name in _PLANNED), "decisions per second")


def planning(m3po: M3PO) -> Iterator[Row]:
    """
    Time planned steps of several environments: while collecting, and in predictions.

    :param m3po: a model
    :return: rows of the table
    """
    for n_envs in N_ENVS:
        observations = np.stack([m3po.observation_space.sample() for _ in range(n_envs)]).astype(np.float32)
        tensor = th.as_tensor(observations)
        calls: list[Callable[[], object]] = [partial(collecting_step, m3po, tensor, n_envs)]
        calls += [partial(planned_predict, m3po, observations, *budget) for budget in _BUDGETS]
        times = time_calls(dict(zip(_PLANNED, calls, strict=True)))
        rates = " / ".join(f"{1_000 * n_envs / np.median(rounds):,.0f}" for rounds in times.values())
        yield n_envs, *(text(rounds, 2) for rounds in times.values()), rates


TASKS = ("tasks", "CPU-ms per update", "relative to 1", "ms per planned decision", "of a decision, relative to 1")


def tasks(steps: int) -> Iterator[Row]:
    """
    Time updates and planned decisions with several tasks, beside one task's.

    :param steps: environment steps during which updates are timed
    :return: rows of the table
    """
    models = {}
    for n_tasks in N_TASKS:
        env = make_multitask_vec_env([Task(ENV_ID, f"cheetah{i}") for i in range(n_tasks)], seed=0)
        kwargs: dict[str, Any] = dict(n_steps=max(1, 256 // n_tasks), learning_starts=1_000, seed=0, device="cpu")
        models[n_tasks] = M3PO("MultiInputPolicy", env, **kwargs)
        past_the_start(models[n_tasks].learn(1_300))
    times = {n_tasks: [cpu for _, cpu in rounds] for n_tasks, rounds in time_updates_in_turn(models, steps).items()}
    calls: dict[str, Callable[[], object]] = {}
    for n_tasks, model in models.items():
        row = {"observation": np.zeros((1, 17), np.float32), "task": np.array([n_tasks - 1])}
        calls[str(n_tasks)] = partial(collecting_step, model, obs_as_tensor(row, model.device), 1)
    decisions = {name: float(np.median(rounds)) for name, rounds in time_calls(calls).items()}
    for n_tasks in models:
        update, decision = float(np.median(times[n_tasks])), decisions[str(n_tasks)]
        ratios = update / float(np.median(times[N_TASKS[0]])), decision / decisions[str(N_TASKS[0])]
        yield n_tasks, f"{update:.1f}", f"{ratios[0]:.2f}", f"{decision:.2f}", f"{ratios[1]:.2f}"


def collecting_step(model: M3PO, observations: Any, n_envs: int) -> object:
    """
    :param model: a model
    :param observations: one row per environment
    :param n_envs: number of rows
    :return: what a planned step of collection computes: actions, values, log-probabilities, what is logged of the plan
    """
    with th.no_grad():
        noise = model.policy.world_model.codec.noise((n_envs,))
        *acted, planned = model.policy.act_by_plan(observations, noise, np.ones(n_envs, bool))
        return acted, planned.kl.mean(), planned.gain.mean()


def planned_predict(model: M3PO, observations: np.ndarray, samples: int, iterations: int) -> object:
    """
    :param model: a model
    :param observations: one row per environment
    :param samples: the planner's samples
    :param iterations: the planner's iterations
    :return: the prediction
    """
    with model.set_planning(samples, iterations):
        return model.predict(observations, deterministic=True)


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: the command line, ``sys.argv`` by default
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1_792, help="environment steps during which updates are timed")
    parser.add_argument("--compile", action="store_true", help="time updates with compiled losses too")
    parser.add_argument("--tasks", action="store_true", help="time 1, 10 and 50 tasks, and nothing else")
    parser.add_argument("--matmul", default="highest", choices=["highest", "high", "medium"], help="precision of products")
    parser.add_argument("--csv", type=Path, help="where the cells go")
    args = parser.parse_args(argv)
    th.set_num_threads(1)
    th.set_float32_matmul_precision(args.matmul)
    command = "python -m benchmarks.speed" + " --tasks" * args.tasks + " --compile" * args.compile
    command += f" --matmul {args.matmul}" * (args.matmul != "highest") + f" --steps {args.steps}"
    origin = {"commit": commit(), "command": command, "machine": machine()}
    print(f"{ENV_ID}, one thread, defaults; {origin['machine']}; commit {origin['commit']}; {command}", flush=True)
    rows = show(TASKS, tasks(args.steps)) if args.tasks else single_task(args.steps, args.compile)
    if args.csv is not None:
        write_rows(args.csv, [row | origin for row in rows], COLUMNS)


def single_task(steps: int, compiled: bool) -> list[dict[str, Any]]:
    """
    :param steps: environment steps during which updates are timed
    :param compiled: whether to time compiled losses too
    :return: all cells of the tables
    """
    settings: dict[str, Any] = dict(learning_starts=1_000, seed=0, device="cpu")
    m3po = M3PO("MlpPolicy", vec_env(ENV_ID, 1, 0), **settings)
    by_policy = M3PO("MlpPolicy", vec_env(ENV_ID, 1, 0), plan_rollouts=False, **settings)
    sac = SAC("MlpPolicy", vec_env(ENV_ID, 1, 0), seed=0, device="cpu")
    ppo = PPO("MlpPolicy", vec_env(ENV_ID, 1, 0), seed=0, device="cpu")
    for model in (m3po, by_policy):
        past_the_start(model.learn(1_280))  # and past learning_starts
        fill(model, min(FULL, model.buffer_size))
    sac.learn(200)
    rows = show(UPDATES, updates(m3po, sac, steps))
    rows += show(TRAINING, training({"M3PO": m3po, "M3PO, collecting by the policy": by_policy, "SAC": sac}, steps))
    rows += show(PREDICTING, predicting(m3po, ppo))
    rows += show(PLANNING, planning(m3po))
    return rows + (show(COMPILING, compiling(m3po, steps)) if compiled else [])


if __name__ == "__main__":
    main()
