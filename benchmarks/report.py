"""
Compare M3PO with other agents on the suites, from the CSV files alone: tables and figures in ``benchmarks/report/``.

A score is 0 for a random policy and 1 for the reference of ``benchmarks.suites``; at a step it is the mean of the evaluations
of the last 15,000 steps (of less, for an agent with a short budget). Where steps to a score are compared, both sides cross the
same score, 95 % of the opponent's last one, and are smoothed over as many steps.

``python -m benchmarks.report``
"""

import argparse
from collections.abc import Iterable
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from benchmarks.curves import Curve, Results, interquartile_means, median_with_bounds
from benchmarks.record import RESULTS
from benchmarks.suites import BUDGET, ENVIRONMENTS, OFF_POLICY, SUITES

REPORT = Path("benchmarks/report")
#: M3PO's policy, which is what the claims are about; the same agent while it plans
M3PO, PLANNED = "m3po-100k", "m3po-100k,planned"
PPO, SAC = "ppo-zoo", "sac-100k"
OFF_POLICY_AGENTS = (SAC, "tqc-100k", "crossq-100k")
AGENTS = (M3PO, PLANNED, PPO, *OFF_POLICY_AGENTS)
NAMES = dict(zip(AGENTS, ("M3PO", "M3PO, planning", "PPO (rl-zoo3's)", "SAC", "TQC", "CrossQ"), strict=True))
#: Share of an opponent's last score that both sides have to cross
SHARE = 0.95
#: Below this last score an opponent has learned nothing that could be compared
LEARNED = 0.1
#: The least that M3PO's score may be above the best opponent's in any environment
WORST = -0.1
CHECKPOINTS = (25_000, 50_000, 100_000)
DM_CONTROL_METHODS = ("TD-MPC2", "MR.Q")
#: Whose published returns stand beside M3PO's
PUBLISHED = ("SAC", "TD-MPC2", "MR.Q", "SimbaV2 (2 updates a step)")

Race = tuple[float, bool]
"""A ratio, and whether it is only a bound because one side never came to the score."""


def env_ids(suite: str) -> list[str]:
    """
    :param suite: its name
    :return: its environments
    """
    return [environment.env_id for environment in SUITES[suite]]


EVERYWHERE = [environment.env_id for environment in ENVIRONMENTS]
GROUPS = {**{name: env_ids(name) for name in SUITES}, "all": EVERYWHERE, "those of SAC, TQC, CrossQ": list(OFF_POLICY)}


# ---------------------------------------------------------------- tables


def scores_table(results: Results) -> str:
    """
    :param results: what was measured
    :return: interquartile means with 95 % bootstrap intervals, over environments and seeds
    """
    columns = [f"{steps:,} steps" for steps in CHECKPOINTS]
    lines, missing = header("environments", "agent", "seeds", *columns), []
    for group, ids in GROUPS.items():
        for label in AGENTS:
            curves = whole_group(results, label, ids)
            if curves:
                scores = stacked([[curve.at(steps) for steps in CHECKPOINTS] for curve in curves])
                cells = [f"{mean:.2f} ({low:.2f} to {high:.2f})" for mean, low, high in interquartile_means(scores).T]
                most = max(len(curve.scores) for curve in curves)
                seeds = len(scores) if len(scores) == most else f"{len(scores)} (of {most})"
                lines.append(row(f"{group} ({len(ids)})", NAMES[label], seeds, *cells))
            elif all(may_run(label, env_id) for env_id in ids):
                missing.append(f"{NAMES[label]} in {group}")
    return with_notes(lines, {"Not run in all of these yet": missing})


def whole_group(results: Results, label: str, ids: Iterable[str]) -> list[Curve]:
    """
    :param results: what was measured
    :param label: algorithm and variant
    :param ids: environments
    :return: its curves in all of them, or none if it has not run everywhere
    """
    curves = [results.curve(label, env_id) for env_id in ids]
    found = [curve for curve in curves if curve is not None]
    return found if len(found) == len(curves) else []


def stacked(scores: list[list[np.ndarray]]) -> np.ndarray:
    """
    :param scores: by environment and point, those of each seed
    :return: shape ``(n_seeds, n_environments, n_points)``; as many seeds as all environments have
    """
    n_seeds = min(len(points[0]) for points in scores)
    return np.array([[seeds[:n_seeds] for seeds in points] for points in scores]).transpose(2, 0, 1)


def race_table(results: Results, ids: Iterable[str], opponents: tuple[str, ...]) -> str:
    """
    :param results: what was measured
    :param ids: environments
    :param opponents: labels; in each environment the one with the highest last score is raced
    :return: steps and CPU-seconds that both sides take to 95 % of the opponent's last score
    """
    lines = header(
        *("environment", "opponent", "seeds (its, M3PO's)", "its last score", "its steps", "M3PO's", "its / M3PO's"),
        *("its CPU-s", "M3PO's", "M3PO's / its"),
    )
    step_ratios: list[Race] = []
    second_ratios: list[Race] = []
    missing, nothing_learned, machines = [], [], []
    for env_id in ids:
        if results.curve(M3PO, env_id) is None or any(results.curve(label, env_id) is None for label in opponents):
            missing.append(env_id)
            continue
        label = max(opponents, key=lambda label: last_score(results, label, env_id))
        mine, theirs = pair(results, label, env_id)
        last = float(theirs.mean[-1])
        if last < LEARNED:
            nothing_learned.append(f"{env_id} ({NAMES[label]}: {last:.2f})")
            continue
        cells, steps, seconds = race(mine, theirs, SHARE * last)
        step_ratios.append(steps)
        second_ratios.append(seconds)
        lines.append(row(env_id, NAMES[label], f"{len(theirs.scores)}, {len(mine.scores)}", f"{last:.2f}", *cells))
        if mine.machines != theirs.machines:
            machines.append(env_id)
    if step_ratios:
        medians = median_with_bounds(step_ratios, "<", 1), median_with_bounds(second_ratios, ">", 2)
        n_never = sum(is_bound for _, is_bound in step_ratios)
        title = f"**median** of {len(step_ratios)}, {n_never} of them never reached"
        lines.append(row(title, *[""] * 5, f"**{medians[0]}**", "", "", f"**{medians[1]}**"))
    below = f"Not compared, because the opponent ends below {LEARNED}"
    unlike = "Seconds of different machines or precisions of matrix products"
    notes = {below: nothing_learned, unlike: machines, "Not run yet": missing}
    return with_notes(lines, notes)


def last_score(results: Results, label: str, env_id: str) -> float:
    """
    :param results: what was measured
    :param label: algorithm and variant
    :param env_id: an environment that it has run in
    :return: its score at the end, mean over seeds
    """
    curve = results.curve(label, env_id)
    assert curve is not None
    return float(curve.mean[-1])


def pair(results: Results, opponent: str, env_id: str) -> tuple[Curve, Curve]:
    """
    :param results: what was measured
    :param opponent: label of others
    :param env_id: an environment in which both have run
    :return: M3PO's curve and theirs, smoothed over the same number of steps
    """
    window = results.window(*(results.budget_of(label, env_id) for label in (M3PO, opponent)))
    mine, theirs = (results.curve(label, env_id, window) for label in (M3PO, opponent))
    assert mine is not None and theirs is not None
    return mine, theirs


def race(mine: Curve, theirs: Curve, score: float) -> tuple[list[str], Race, Race]:
    """
    :param mine: M3PO's curve
    :param theirs: an opponent's, which comes to the score
    :param score: normalised
    :return: cells of the table; their steps by mine to the score; my CPU-seconds by theirs
    """
    steps, seconds = theirs.steps_to(score), theirs.seconds_to(score)
    my_steps, my_seconds = mine.steps_to(score), mine.seconds_to(score)
    if my_steps < np.inf:
        ratios = (steps / my_steps, False), (my_seconds / seconds, False)
        cells = [f"{my_steps:,.0f}", f"{ratios[0][0]:.1f}", f"{my_seconds:,.0f}", f"{ratios[1][0]:.2f}"]
    else:
        end, last = float(mine.steps[-1]), float(mine.cpu_seconds.mean(0)[-1])
        ratios = (steps / end, True), (last / seconds, True)
        cells = [f"> {end:,.0f}", f"< {ratios[0][0]:.1f}", f"> {last:,.0f}", f"> {ratios[1][0]:.2f}"]
    return [f"{steps:,.0f}", *cells[:2], f"{seconds:,.0f}", *cells[2:]], *ratios


def published_table(results: Results, agent: str) -> str:
    """
    :param results: what was measured
    :param agent: label of M3PO's runs
    :return: dm_control beside the published scores of TD-MPC2 and MR.Q at 100,000 frames
    """
    name = NAMES[agent]
    lines = header("environment", name, *DM_CONTROL_METHODS, f"{name}'s frames to the better one's score", "100,000 / those")
    own, best, ratios, nothing_learned, missing = [], [], [], [], []
    for env_id in env_ids("dmc"):
        mine, theirs = results.curve(agent, env_id), results.published(env_id)
        if mine is None:
            missing.append(env_id)
            continue
        scores = [theirs[method] for method in DM_CONTROL_METHODS]
        own.append(float(mine.at(BUDGET).mean()))
        best.append(max(scores))
        # What lies before the first evaluation is not known, and theirs can't be smoothed alike
        frames = max(mine.steps_to(best[-1]), float(mine.steps[0]))
        ratio = BUDGET / min(frames, BUDGET)
        cells = [f"{frames:,.0f}", f"{ratio:.1f}"] if frames < np.inf else [f"> {BUDGET:,}", f"< {ratio:.1f}"]
        if best[-1] < LEARNED:
            nothing_learned.append(env_id)
            cells[1] = ""
        else:
            ratios.append((ratio, frames == np.inf))
        lines.append(row(env_id, *(f"{value:.3f}" for value in (own[-1], *scores)), *cells))
    if own:
        means = f"**{np.mean(own):.3f}**", f"the better one: {np.mean(best):.3f}", ""
        end = f"mean / mean: **{np.mean(own) / np.mean(best):.2f}**", (
            f"**{median_with_bounds(ratios, '<', 1)}**" if ratios else ""
        )
        lines.append(row("**mean**, **median**", *means, *end))
    return with_notes(lines, {f"Not in the median, because both end below {LEARNED}": nothing_learned, "Not run yet": missing})


def worst_table(results: Results, agent: str) -> str:
    """
    :param results: what was measured
    :param agent: label of M3PO's runs
    :return: M3PO's score at 100,000 steps beside the best ones of all others, run here and published
    """
    lines = header("environment", NAMES[agent], "best run here", "difference", "best published", "difference")
    smallest, missing = np.inf, []
    for env_id in EVERYWHERE:
        mine = results.curve(agent, env_id)
        if mine is None:
            missing.append(env_id)
            continue
        own = float(mine.at(BUDGET).mean())
        curves = {NAMES[label]: results.curve(label, env_id) for label in (PPO, *OFF_POLICY_AGENTS) if may_run(label, env_id)}
        here = {name: float(curve.at(BUDGET).mean()) for name, curve in curves.items() if curve is not None}
        cells = []
        for scores in (here, results.published(env_id)):
            name, score = max(scores.items(), key=lambda item: item[1], default=("", np.nan))
            cells += [f"{name} {score:.3f}", f"{own - score:+.3f}"] if scores else ["", ""]
            smallest = min(smallest, own - score) if scores else smallest
        lines.append(row(env_id, f"{own:.3f}", *cells))
    if smallest < np.inf:
        verdict = "met" if smallest >= WORST else "missed"
        lines.append(f"\nThe smallest difference is {smallest:+.3f}: never below {WORST} is {verdict}.")
    return with_notes(lines, {"Not run yet": missing})


def returns_table(results: Results) -> str:
    """
    :param results: what was measured
    :return: M3PO's returns at 100,000 steps (frames) beside published ones
    """
    lines = header("environment", "seeds", NAMES[M3PO], NAMES[PLANNED], *PUBLISHED, "best of all published")
    missing = []
    for env_id in EVERYWHERE:
        mine, planned = (results.curve(agent, env_id) for agent in (M3PO, PLANNED))
        if mine is None or planned is None:
            missing.append(env_id)
            continue
        theirs = results.published(env_id)
        scores = [float(curve.at(BUDGET).mean()) for curve in (mine, planned)] + [
            theirs.get(name, np.nan) for name in PUBLISHED
        ]
        name, best = max(theirs.items(), key=lambda item: item[1], default=("", np.nan))
        cells = [readable(value) for value in results.returns(env_id, np.array([*scores, best])).tolist()]
        cells[-1] = f"{cells[-1]}, {name}" if name else ""
        lines.append(row(env_id, len(mine.scores), *cells))
    return with_notes(lines, {"Not run yet": missing})


def readable(value: float) -> str:
    """
    :param value: a return, or NaN
    :return: with four digits or so; nothing if there is none
    """
    return "" if np.isnan(value) else f"{value:,.0f}" if abs(value) >= 10 else f"{value:.1f}"


def may_run(label: str, env_id: str) -> bool:
    """
    :param label: algorithm and variant
    :param env_id: an environment
    :return: whether this agent is run there
    """
    if label in (M3PO, PLANNED):
        return True
    return env_id not in env_ids("dmc") if label == PPO else env_id in OFF_POLICY


def with_notes(lines: list[str], notes: dict[str, list[str]]) -> str:
    """
    :param lines: of a table
    :param notes: what is to be said of which environments, if there are any
    :return: the table and what is to be said below it
    """
    return "\n".join(lines + [f"\n{note}: {', '.join(names)}." for note, names in notes.items() if names])


def header(*cells: str) -> list[str]:
    """
    :param cells: names of the columns
    :return: the first lines of a table
    """
    return [row(*cells), row(*["---"] * len(cells))]


def row(*cells: object) -> str:
    """
    :param cells: of a row
    :return: the row
    """
    return "| " + " | ".join(map(str, cells)) + " |"


# ---------------------------------------------------------------- figures


def legend() -> list[Line2D]:
    """
    :return: what each colour stands for, everywhere
    """
    lines = [Line2D([], [], color=f"C{i}", label=NAMES[label]) for i, label in enumerate(AGENTS)]
    marks = zip(DM_CONTROL_METHODS, "+x", strict=True)
    return lines + [Line2D([], [], color="black", ls="", marker=m, label=f"{name} (published)") for name, m in marks]


def environments_figure(results: Results, by_steps: bool, path: Path) -> None:
    """
    Draw scores in every environment, means and ranges of the seeds.

    :param results: what was measured
    :param by_steps: whether against environment steps, or CPU-seconds
    :param path: of the picture
    """
    figure, axes = plt.subplots(4, 5, figsize=(18, 13), layout="constrained")
    for axis, env_id in zip(axes.flat, EVERYWHERE, strict=False):
        for i, label in enumerate(AGENTS):
            curve = results.curve(label, env_id) if may_run(label, env_id) else None
            if curve is not None:
                draw(axis, i, curve.steps if by_steps else curve.cpu_seconds.mean(0), curve.mean, *minmax(curve.scores))
        if by_steps and env_id in env_ids("dmc"):
            for method, marker in zip(DM_CONTROL_METHODS, "+x", strict=True):
                axis.plot([BUDGET], [results.published(env_id)[method]], marker, color="black")
        axis.set_title(env_id.removeprefix("dm_control/"))
    finish(figure, list(axes.flat), by_steps, len(EVERYWHERE))
    figure.savefig(path, dpi=70)
    plt.close(figure)


def suites_figure(results: Results, by_steps: bool, path: Path) -> None:
    """
    Draw interquartile means and their 95 % intervals over each group of environments.

    :param results: what was measured
    :param by_steps: whether against environment steps, or CPU-seconds
    :param path: of the picture
    """
    figure, axes = plt.subplots(1, len(GROUPS), figsize=(20, 4), layout="constrained")
    for axis, (group, ids) in zip(axes, GROUPS.items(), strict=True):
        for i, label in enumerate(AGENTS):
            curves = whole_group(results, label, ids)
            if not curves:
                continue
            if by_steps:
                # A run that is done stays what it is
                points = np.geomspace(2_500, max(curve.steps[-1] for curve in curves), 30)
                scores = stacked([[curve.at(steps) for steps in points] for curve in curves])
            else:
                points = np.geomspace(10, max(curve.cpu_seconds[:, -1].max() for curve in curves), 30)
                scores = stacked([[curve.after(seconds) for seconds in points] for curve in curves])
            draw(axis, i, points, *interquartile_means(scores, n_resamples=500))
        axis.set_title(f"{group} ({len(ids)})")
    finish(figure, list(axes), by_steps, len(GROUPS))
    figure.savefig(path, dpi=70)
    plt.close(figure)


def minmax(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """
    :param scores: shape ``(n_seeds, n)``
    :return: lowest and highest seed
    """
    return scores.min(0), scores.max(0)


def draw(axis: Axes, agent: int, x: np.ndarray, mean: np.ndarray, low: np.ndarray, high: np.ndarray) -> None:
    """
    :param axis: where to
    :param agent: its place among the agents, which is its colour
    :param x: steps or seconds
    :param mean: scores
    :param low: lower end of the band
    :param high: upper end
    """
    axis.plot(x, mean, color=f"C{agent}")
    axis.fill_between(x, low, high, alpha=0.15, color=f"C{agent}", lw=0)


def finish(figure: plt.Figure, axes: list[Axes], by_steps: bool, n_used: int) -> None:
    """
    :param figure: what is drawn
    :param axes: its panels
    :param by_steps: whether against environment steps
    :param n_used: how many of the panels
    """
    for axis in axes[:n_used]:
        axis.set_xscale("log")
        axis.grid(alpha=0.3)
    for axis in axes[n_used:]:
        axis.axis("off")
    if n_used < len(axes):
        figure.legend(handles=legend(), loc="lower right")
    else:
        figure.legend(handles=legend()[: len(AGENTS)], loc="outside right center")
    figure.supxlabel("environment steps (frames)" if by_steps else "CPU-seconds of training")
    figure.supylabel("score (0: random, 1: reference)")


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: the command line, ``sys.argv`` by default
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=REPORT)
    args = parser.parse_args(argv)
    matplotlib.use("Agg")
    results = Results(args.results)
    parts = {"Scores: interquartile means, 95 % intervals": scores_table(results)}
    raced = env_ids("classic") + env_ids("mujoco")
    parts["Against PPO with rl-zoo3's settings and budget"] = race_table(results, raced, (PPO,))
    parts["Against the best of SAC, TQC and CrossQ"] = race_table(results, OFF_POLICY, OFF_POLICY_AGENTS)
    parts["Against SAC"] = race_table(results, OFF_POLICY, (SAC,))
    parts["Returns at 100,000 steps, beside published ones"] = returns_table(results)
    for agent, suffix in ((M3PO, ""), (PLANNED, ", while M3PO plans")):
        parts[f"dm_control at 100,000 frames, beside published scores{suffix}"] = published_table(results, agent)
        parts[f"Everywhere, beside the best at 100,000 steps{suffix}"] = worst_table(results, agent)
    text = "".join(f"## {title}\n\n{table}\n\n" for title, table in parts.items())
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tables.md").write_text(f"# Report\n\n{text}".rstrip() + "\n")
    for by_steps, name in ((True, "steps"), (False, "cpu-seconds")):
        suites_figure(results, by_steps, args.out / f"suites-by-{name}.png")
        environments_figure(results, by_steps, args.out / f"scores-by-{name}.png")
    print(text)


if __name__ == "__main__":
    main()
