"""
Print what one agent scores on sets of tasks, from the CSV files: successes, shares of the single-task agents' scores, and
how much faster a new task is learned by an agent that knows others.

``python -m benchmarks.task_table``; with ``--images docs/images`` it also draws the successes.
"""

import argparse
import re
from dataclasses import dataclass
from functools import reduce
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from benchmarks.curves import median_with_bounds
from benchmarks.record import RESULTS, load_runs, random_scores
from benchmarks.table import N_LAST, number
from benchmarks.targets import LEARNED
from benchmarks.task_sets import name_of, tasks_of
from sb3_m3po.plotting import plot_task_heatmap

#: Set of tasks -> algorithm and variant of the agents that have one of its tasks each, and what their environments are called
#: in front of the task's name
SINGLES = {
    "dm-mix": ("m3po-100k", "dm_control/"),
    "dm-family": ("m3po-100k", "dm_control/"),
    "discrete-mix": ("m3po-tasks", "discrete-mix:"),
}
SHARE_TO_REACH = 0.8
#: What is aimed at: mean success, how many times that of others, mean share, how many times as fast
SUCCESS, TIMES, SHARE, FASTER = 0.7, 2.0, 0.9, 2.0


@dataclass
class Curve:
    """
    One task in one run.

    :param steps: environment steps of the run at each evaluation
    :param scores: mean reward of each
    :param successes: success rate of each, ``nan`` where the task says nothing of it
    :param cpu_minutes: training time until each
    """

    steps: np.ndarray
    scores: np.ndarray
    successes: np.ndarray
    cpu_minutes: np.ndarray

    @property
    def final(self) -> float:
        """Mean of the last evaluations."""
        return float(self.scores[-N_LAST:].mean())

    def reaches(self, score: float, steps: np.ndarray) -> float:
        """
        :param score: mean reward
        :param steps: environment steps at which it is looked at, beside 0
        :return: environment steps until the first evaluation that reaches the score, infinity if none does
        """
        found = np.flatnonzero((self.scores >= score) & (np.isin(self.steps, steps) | (self.steps == 0)))
        return float(self.steps[found[0]]) if len(found) else np.inf


def load(folder: Path, label: str, env_id: str) -> dict[int, dict[str, Curve]]:
    """
    :param folder: where the CSV files are
    :param label: algorithm and variant, as the folder is called
    :param env_id: a set of tasks, a part of one, or an environment
    :return: by seed and task, of the runs that have come to the end of their budget
    """
    found: dict[int, dict[str, Curve]] = {}
    for seed, rows in load_runs(folder, label, env_id).items():
        if not is_whole(rows):
            continue
        # Without tasks the environment is the only one
        names = [row.get("task", env_id.rpartition("/")[2]) for row in rows]
        for task in dict.fromkeys(names):
            mine = [row for row, name in zip(rows, names, strict=True) if name == task]
            steps, scores = ([float(row[key]) for row in mine] for key in ("steps", "mean_reward"))
            successes = [float(row.get("success_rate") or "nan") for row in mine]
            minutes = [float(row["cpu_seconds"]) / 60 for row in mine]
            found.setdefault(seed, {})[task] = Curve(*map(np.array, (steps, scores, successes, minutes)))
    return found


def is_whole(rows: list[dict[str, str]]) -> bool:
    """
    :param rows: of a run
    :return: whether they reach the budget that its command says, those of each task
    """
    budget = re.search(r"--steps (\d+)", rows[-1]["command"])
    last = [row for row in rows if row["steps"] == rows[-1]["steps"]]
    return (
        budget is not None
        and int(rows[-1]["steps"]) >= int(budget[1])
        and {row.get("task") for row in last} == {row.get("task") for row in rows}
    )


def success_table(folder: Path, env_id: str, labels: list[str]) -> None:
    """
    Print mean successes of the final policies, and how many times as often the first agent succeeds as the others.

    :param folder: where the CSV files are
    :param env_id: a set of tasks
    :param labels: algorithms and their variants
    """
    tasks = [name_of(task) for task in tasks_of(env_id)]
    print(f"\n| {env_id} | env steps | mean success | the first's / its | per seed | {' | '.join(tasks)} | CPU-min |")
    print("| --- " * (6 + len(tasks)) + "|")
    first = None
    for label in labels:
        runs = load(folder, label, env_id)
        if not runs:
            continue
        end = max(run[tasks[0]].steps[-1] for run in runs.values())
        table = np.array([[run[task].successes[-1] for task in tasks] for run in runs.values()])
        minutes = np.mean([run[tasks[0]].cpu_minutes[-1] for run in runs.values()])
        per_seed = ", ".join(f"{value:.2f}" for value in table.mean(1))
        per_task = " | ".join(f"{value:.2f}" for value in table.mean(0))
        first = table.mean() if first is None else first
        ratio = f"{first / table.mean():.1f}" if table.mean() else "only it succeeds"
        print(f"| {label} | {end:,.0f} | {table.mean():.2f} | {ratio} | {per_seed} | {per_task} | {minutes:.0f} |")
    if first is not None:
        print(f"\nAimed at: a mean success of {SUCCESS:.2f}, and {TIMES:g} times that of PPO and SAC.")


def successes_over_time(runs: dict[int, dict[str, Curve]], tasks: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """
    :param runs: by seed and task, of at least one seed
    :param tasks: names of the tasks
    :return: environment steps at which all seeds were evaluated, shape ``(n,)``; successes, shape ``(n_seeds, n_tasks, n)``
    """
    steps = reduce(np.intersect1d, (curves[tasks[0]].steps for curves in runs.values()))
    found = [[curves[task].successes[np.isin(curves[task].steps, steps)] for task in tasks] for curves in runs.values()]
    return steps, np.array(found)


def legend(label: str) -> str:
    """
    :param label: algorithm and variant, as the folder is called
    :return: the algorithm's name, and its variant where it is not the usual one of task sets
    """
    algo, _, variant = label.partition("-")
    return ", ".join([algo.upper(), *(part for part in variant.split(",") if part != "tasks")])


def success_figures(folder: Path, env_id: str, labels: list[str], images: Path) -> None:
    """
    Draw the mean success of all agents over time, and that of the first one in each task.

    :param folder: where the CSV files are
    :param env_id: a set of tasks
    :param labels: algorithms and their variants
    :param images: folder of the pictures
    """
    tasks = [name_of(task) for task in tasks_of(env_id)]
    runs = {label: found for label in labels if (found := load(folder, label, env_id))}
    if not runs:
        return
    images.mkdir(parents=True, exist_ok=True)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, found in runs.items():
        steps, successes = successes_over_time(found, tasks)
        mean = successes.mean(1)
        (line,) = axes.plot(steps, mean.mean(0), label=f"{legend(label)} ({len(mean)} seeds)")
        axes.fill_between(steps, mean.min(0), mean.max(0), alpha=0.15, color=line.get_color())
    axes.set(xlabel="environment steps, all tasks together", ylabel=f"mean success over the tasks of {env_id}", ylim=(0, 1))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize=8)
    figure.savefig(images / f"{env_id}-success.png", dpi=80)
    steps, successes = successes_over_time(next(iter(runs.values())), tasks)
    evaluations = {"tasks": tasks, "timesteps": steps.astype(int), "task_results": successes.mean(0).T}
    plot_task_heatmap(evaluations, dict.fromkeys(tasks, (0.0, 1.0))).savefig(images / f"{env_id}-tasks.png", dpi=80)


def share_table(folder: Path, env_id: str, label: str) -> None:
    """
    Print the scores of one agent beside those of agents with a task each, between a random policy (0) and those (1). In the
    mean that is judged no task counts for more than 1: one that an agent of its own failed to learn would decide it. Those
    that did are named.

    :param folder: where the CSV files are
    :param env_id: a set of tasks
    :param label: algorithm and variant of the one agent; while it plans, it is compared with those while they plan
    """
    (single, prefix), runs, random = SINGLES[env_id], load(folder, label, env_id), random_scores()
    if not runs:
        return
    single += ",planned" * label.endswith(",planned")
    print(f"\n| {env_id} ({label}) | one agent | an agent each ({single}) | random | share |")
    print("| --- " * 5 + "|")
    shares, failed, tasks = [], [], tasks_of(env_id)
    for name in map(name_of, tasks):
        mine = [run[name].final for run in runs.values()]
        budgets = {run[name].steps[-1] / len(tasks) for run in runs.values()}
        theirs = [run[name].final for run in load(folder, single, prefix + name).values() if {run[name].steps[-1]} == budgets]
        low = random.get(prefix + name)
        cells = [per_seed(mine), per_seed(theirs) if theirs else "not run", "" if low is None else number(low), ""]
        if theirs and low is not None:
            shares.append((np.mean(mine) - low) / (np.mean(theirs) - low))
            cells[-1] = f"{shares[-1]:.2f}"
            if np.mean(theirs) < (bar := LEARNED[prefix + name]):
                failed.append(f"{name} ({number(bar)})")
        print(f"| {name} | {' | '.join(cells)} |")
    if shares:
        capped = float(np.minimum(shares, 1).mean())
        known = "not all run yet" if len(shares) < len(tasks) else "met" if capped >= SHARE else "missed"
        print(f"| mean of {len(shares)} of {len(tasks)}, each at most 1 | | | | {capped:.2f} |")
        print(f"\nAimed at: a mean of {SHARE:.2f}, {known}. Without the bound of 1 it is {np.mean(shares):.2f}.")
        print(f"Agents of one task below what was set down for them: {', '.join(failed) or 'none'}.")


def per_seed(scores: list[float]) -> str:
    """
    :param scores: of each seed
    :return: their mean, and all of them
    """
    return f"{number(float(np.mean(scores)))} ({', '.join(map(number, scores))})"


def growth_table(folder: Path, env_id: str, label: str) -> None:
    """
    Print in how many steps each task reaches most of its single-task score: from scratch, and left out of the set and then
    taken in by the agent that learned the others.

    :param folder: where the CSV files are
    :param env_id: a set of tasks
    :param label: algorithm and variant of the agent that learned the others
    """
    ratios: list[tuple[float, bool]] = []
    lines = []
    single, prefix = SINGLES[env_id]
    for task in map(name_of, tasks_of(env_id)):
        alone = load(folder, single, prefix + task)
        for train in ("all", "new"):
            grown = load(folder, f"{label},grown-{train}", f"{env_id}:{task}")
            if not (grown and alone):
                continue
            goal = SHARE_TO_REACH * float(np.mean([run[task].final for run in alone.values()]))
            groups = [[run[task] for run in group.values()] for group in (alone, grown)]
            # Who is looked at more often is seen to reach it earlier
            steps = reduce(np.intersect1d, (curve.steps[curve.steps > 0] for curves in groups for curve in curves))
            scratch, taken_in = ([curve.reaches(goal, steps) for curve in curves] for curves in groups)
            zero_shot, final = (float(np.mean(x)) for x in ([c.scores[0] for c in groups[1]], [c.final for c in groups[1]]))
            ratio, bound = how_much_faster(scratch, taken_in, steps)
            if train == "all" and bound != ">":
                ratios.append((ratio, bound == "<"))
            cells = [", ".join(f"{value:,.0f}" for value in values) for values in (scratch, taken_in)]
            cells += [f"{bound} {ratio:.1f}".strip() + " (not in the median)" * (bound == ">")]
            random = random_scores().get(prefix + task)
            scores = number(goal), "" if random is None else number(random), number(zero_shot), number(final)
            lines.append(f"| {task} ({train}) | {' | '.join([*scores, *cells])} |")
    if lines:
        columns = [f"new task of {env_id} ({label})", "reach", "random", "at 0 steps", "at the end"]
        print("\n| " + " | ".join([*columns, "steps from scratch", "steps taken in", "ratio"]) + " |")
        median = median_with_bounds(ratios, "<", 1) if ratios else ""
        print("| --- " * 8 + "|", *lines, f"| median of {len(ratios)} |" + " |" * 6 + f" {median} |", sep="\n")
        print(f"\nAimed at: a median of {FASTER:g} over all {len(tasks_of(env_id))}.")


def how_much_faster(scratch: list[float], taken_in: list[float], steps: np.ndarray) -> tuple[float, str]:
    """
    :param scratch: steps to a score from scratch, of each seed; infinity if it never came there
    :param taken_in: the same of the agent that knows other tasks
    :param steps: when both were evaluated, but for 0; a task that it can do at once counts as one interval
    :return: the first by the second, of the median seeds, and what it is: ``"<"`` for an upper bound, ``">"`` for a lower one
        (of neither anything is known)
    """
    theirs, mine = (float(np.median(found)) for found in (scratch, taken_in))
    bound = ">" if theirs == np.inf else "<" if mine == np.inf else ""
    return float(min(theirs, steps[-1]) / np.clip(mine, steps[0], steps[-1])), bound


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: the command line, ``sys.argv`` by default
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--label", default="m3po-tasks", help="algorithm and variant of the agent over tasks")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--images", type=Path, help="folder of the pictures")
    args = parser.parse_args(argv)
    labels = [args.label, *sorted(path.name for path in args.results.glob("*") if path.name != args.label)]
    success_table(args.results, "mt10", labels)
    if args.images is not None:
        success_figures(args.results, "mt10", labels, args.images)
    for env_id in ("dm-mix", "discrete-mix"):
        share_table(args.results, env_id, args.label)
    growth_table(args.results, "dm-family", args.label)


if __name__ == "__main__":
    main()
