"""
Compare M3PO with other agents on the suites, from the CSV files alone: tables and figures in ``benchmarks/report/``.

A score is 0 for a random policy and 1 for the reference of ``benchmarks.suites``; at a step it is the mean of the three
evaluations up to it. Where steps to a score are compared, both sides cross the same score, 95 % of the opponent's last one.

``python -m benchmarks.report``
"""

import argparse
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
from rliable import library, metrics

from benchmarks.record import RANDOM_CSV, RESULTS, read_rows
from benchmarks.suites import BUDGET, ENVIRONMENTS, OFF_POLICY, SUITES
from benchmarks.table import N_LAST, load_curves

REPORT = Path("benchmarks/report")
PUBLISHED_CSV = Path("benchmarks/published.csv")
#: M3PO's policy; the same agent while it plans
M3PO, PLANNED = "m3po-100k", "m3po-100k,planned"
PPO, SAC = "ppo-zoo", "sac-100k"
OFF_POLICY_AGENTS = (SAC, "tqc-100k", "crossq-100k")
#: Share of an opponent's last score that both sides have to cross
SHARE = 0.95
#: Below this last score an opponent has learned nothing that could be compared
LEARNED = 0.1
CHECKPOINTS = (25_000, 50_000, 100_000)


@dataclass
class Curve:
    """
    An agent on an environment.

    :param steps: environment steps (frames) of its evaluations, shape ``(n,)``
    :param scores: normalised, each the mean of the three evaluations up to it, shape ``(n_seeds, n)``
    :param cpu_seconds: training time until then, shape ``(n_seeds, n)``
    """

    steps: np.ndarray
    scores: np.ndarray
    cpu_seconds: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Over the seeds, shape ``(n,)``."""
        return self.scores.mean(0)

    def at(self, steps: float) -> np.ndarray:
        """
        :param steps: environment steps
        :return: score of each seed then, from the last evaluation up to it, shape ``(n_seeds,)``
        """
        return self.scores[:, max(int(np.searchsorted(self.steps, steps, side="right")) - 1, 0)]

    def steps_to(self, score: float) -> float:
        """
        :param score: normalised
        :return: environment steps at which the mean first reaches it, interpolated between evaluations; infinity if never
        """
        reached = np.flatnonzero(self.mean >= score)
        if not len(reached):
            return np.inf
        last = reached[0]
        # Before the first evaluation it scores what a random policy does
        steps, scores = (np.concatenate([[0.0], x]) for x in (self.steps, self.mean))
        return float(np.interp(score, scores[last : last + 2], steps[last : last + 2]))

    def seconds_to(self, score: float) -> float:
        """
        :param score: normalised
        :return: CPU-seconds of training at which the mean first reaches it; infinity if never
        """
        steps = self.steps_to(score)
        if steps == np.inf:
            return np.inf
        return float(np.interp(steps, np.append(0.0, self.steps), np.append(0.0, self.cpu_seconds.mean(0))))


class Results:
    """
    All that was measured, and what was published.

    :param folder: where the CSV files are
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.random = {row["env"]: float(row["mean_reward"]) for row in read_rows(RANDOM_CSV)}
        self.reference = {environment.env_id: environment.reference for environment in ENVIRONMENTS}
        self._published = read_rows(PUBLISHED_CSV)

    def score(self, env_id: str, returns: np.ndarray) -> np.ndarray:
        """
        :param env_id: an environment
        :param returns: any shape
        :return: normalised, same shape
        """
        low = self.random[env_id]
        return (returns - low) / (self.reference[env_id] - low)

    def curve(self, label: str, env_id: str) -> Curve | None:
        """
        :param label: algorithm and variant, as the folder of the CSV files is called
        :param env_id: an environment
        :return: the runs that have come as far as the longest one; ``None`` if there is none, or no random baseline
        """
        algo, _, variant = label.partition("-")
        runs = list(load_curves(self.folder, algo, variant, env_id).values())
        if not runs or env_id not in self.random:
            return None
        end = max(max(run) for run in runs)
        whole = [run for run in runs if max(run) == end]
        steps = sorted(set.intersection(*map(set, whole)))
        returns, seconds = (np.array([[run[step][i] for step in steps] for run in whole]) for i in (0, 1))
        smooth = [returns[:, max(i + 1 - N_LAST, 0) : i + 1].mean(1) for i in range(len(steps))]
        return Curve(np.array(steps), self.score(env_id, np.stack(smooth, 1)), seconds)

    def published(self, env_id: str, methods: Iterable[str], steps: int = BUDGET) -> dict[str, float]:
        """
        :param env_id: an environment
        :param methods: names of methods
        :param steps: environment steps (frames)
        :return: their published scores at these steps, normalised
        """
        rows = [row for row in self._published if row["env"] == env_id and int(row["steps"]) == steps]
        scores = {row["method"]: self.score(env_id, np.array(float(row["mean"]))) for row in rows}
        return {method: float(scores[method]) for method in methods if method in scores}


# ---------------------------------------------------------------- tables


def scores_table(results: Results) -> str:
    """
    :param results: what was measured
    :return: interquartile means with 95 % bootstrap intervals, over environments and seeds
    """
    columns = [f"{steps:,} steps" for steps in CHECKPOINTS]
    lines = [_row("environments", "agent", "seeds", *columns), _row(*["---"] * (3 + len(columns)))]
    groups = {name: [environment.env_id for environment in suite] for name, suite in SUITES.items()}
    groups |= {"all": [environment.env_id for environment in ENVIRONMENTS], "the six of SAC, TQC and CrossQ": list(OFF_POLICY)}
    for name, env_ids in groups.items():
        for label in (M3PO, PLANNED, PPO, *OFF_POLICY_AGENTS):
            curves = [results.curve(label, env_id) for env_id in env_ids]
            whole = [curve for curve in curves if curve is not None]
            if len(whole) < len(curves):
                continue
            n_seeds = min(len(curve.scores) for curve in whole)
            estimates = [interquartile_mean(np.stack([c.at(steps)[:n_seeds] for c in whole], 1)) for steps in CHECKPOINTS]
            cells = [f"{mean:.2f} ({low:.2f} to {high:.2f})" for mean, low, high in estimates]
            lines.append(_row(name, label, n_seeds, *cells))
    return "\n".join(lines)


def interquartile_mean(scores: np.ndarray) -> tuple[float, float, float]:
    """
    :param scores: shape ``(n_seeds, n_environments)``
    :return: interquartile mean and its 95 % stratified bootstrap interval (Agarwal et al. 2021, arXiv 2108.13264)
    """
    means, intervals = library.get_interval_estimates(
        {"": scores}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=2_000, random_state=np.random.RandomState(0)
    )
    low, high = intervals[""][:, 0]
    return float(means[""][0]), float(low), float(high)


def race_table(results: Results, agent: str, env_ids: Iterable[str], opponents: tuple[str, ...], name: str) -> str:
    """
    :param results: what was measured
    :param agent: label of M3PO's runs
    :param env_ids: environments
    :param opponents: labels; in each environment the one with the highest last score is raced
    :param name: what they are called together
    :return: steps and CPU-seconds that both sides take to 95 % of the opponent's last score
    """
    lines = [
        _row("environment", name, "its last score", "its steps", "M3PO's", "ratio", "its CPU-s", "M3PO's", "M3PO / its"),
        _row(*["---"] * 9),
    ]
    step_ratios, second_ratios, nothing_learned = [], [], []
    for env_id in env_ids:
        mine = results.curve(agent, env_id)
        theirs = {label: curve for label in opponents if (curve := results.curve(label, env_id)) is not None}
        if mine is None or not theirs:
            continue
        label, curve = max(theirs.items(), key=lambda item: item[1].mean[-1])
        last = float(curve.mean[-1])
        if last < LEARNED:
            nothing_learned.append(f"{env_id} ({label}: {last:.2f})")
            continue
        cells, step_ratio, second_ratio = _race(mine, curve, SHARE * last)
        step_ratios.append(step_ratio)
        second_ratios.append(second_ratio)
        lines.append(_row(env_id, label, f"{last:.2f}", *cells))
    if step_ratios:
        medians = f"{np.median(step_ratios):.1f}", f"{np.median(second_ratios):.2f}"
        lines.append(_row("**median**", "", "", "", "", f"**{medians[0]}**", "", "", f"**{medians[1]}**"))
    if nothing_learned:
        lines.append(f"\nNot compared, because the opponent ends below {LEARNED}: {', '.join(nothing_learned)}.")
    return "\n".join(lines)


def _race(mine: Curve, theirs: Curve, score: float) -> tuple[list[str], float, float]:
    """Cells of the table; their steps by mine to a score; my CPU-seconds by theirs."""
    steps, seconds = ([getattr(curve, method)(score) for curve in (theirs, mine)] for method in ("steps_to", "seconds_to"))
    never = f"not in {mine.steps[-1]:,}"
    ratios = steps[0] / steps[1], seconds[1] / seconds[0]
    cells = [f"{steps[0]:,.0f}", f"{steps[1]:,.0f}" if steps[1] < np.inf else never, f"{ratios[0]:.1f}"]
    cells += [f"{value:,.0f}" if value < np.inf else "" for value in seconds] + [f"{ratios[1]:.2f}"]
    return cells, *ratios


def published_table(results: Results, agent: str) -> str:
    """
    :param results: what was measured
    :param agent: label of M3PO's runs
    :return: dm_control beside the published scores of TD-MPC2 and MR.Q at 100,000 frames
    """
    methods = ("TD-MPC2", "MR.Q")
    header = ("environment", "M3PO", *methods, "M3PO's frames to the better one's score", "ratio of frames")
    lines, mine_all, best_all, ratios = [_row(*header), _row(*["---"] * len(header))], [], [], []
    for environment in SUITES["dmc"]:
        mine, theirs = results.curve(agent, environment.env_id), results.published(environment.env_id, methods)
        if mine is None or len(theirs) < len(methods):
            continue
        best = max(theirs.values())
        steps = mine.steps_to(best)
        mine_all.append(float(mine.at(BUDGET).mean()))
        best_all.append(best)
        ratios.append(BUDGET / steps)
        reached = f"{steps:,.0f}" if steps < np.inf else f"not in {mine.steps[-1]:,}"
        cells = [f"{value:.3f}" for value in (mine_all[-1], *theirs.values())]
        lines.append(_row(environment.env_id, *cells, reached, f"{ratios[-1]:.1f}"))
    if mine_all:
        means = f"**{np.mean(mine_all):.3f}**", f"the better one: {np.mean(best_all):.3f}", ""
        ratio = f"mean / mean: **{np.mean(mine_all) / np.mean(best_all):.2f}**"
        lines.append(_row("**mean**, **median** of ratios", *means, ratio, f"**{np.median(ratios):.1f}**"))
    return "\n".join(lines)


def worst_table(results: Results, agent: str) -> str:
    """
    :param results: what was measured
    :param agent: label of M3PO's runs
    :return: M3PO's score at 100,000 steps beside the best one of all others, everywhere
    """
    lines = [_row("environment", "M3PO", "best opponent", "its score", "difference"), _row(*["---"] * 5)]
    for environment in ENVIRONMENTS:
        mine = results.curve(agent, environment.env_id)
        if mine is None:
            continue
        curves = {label: results.curve(label, environment.env_id) for label in (PPO, *OFF_POLICY_AGENTS)}
        scores = {label: float(curve.at(BUDGET).mean()) for label, curve in curves.items() if curve is not None}
        published = results.published(environment.env_id, ("TD-MPC2", "MR.Q", "SAC", "CrossQ"))
        scores |= {f"{method} (published)": score for method, score in published.items()}
        if scores:
            label, score = max(scores.items(), key=lambda item: item[1])
            own = float(mine.at(BUDGET).mean())
            lines.append(_row(environment.env_id, f"{own:.3f}", label, f"{score:.3f}", f"{own - score:+.3f}"))
    return "\n".join(lines)


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


# ---------------------------------------------------------------- figures


def curves_figure(results: Results, against: str, path: Path) -> None:
    """
    Draw scores in every environment, means and ranges of the seeds.

    :param results: what was measured
    :param against: ``steps`` or ``cpu_seconds``
    :param path: of the picture
    """
    figure, axes = plt.subplots(4, 5, figsize=(18, 13), layout="constrained")
    for axis, environment in zip(axes.flat, ENVIRONMENTS, strict=False):
        for label in (M3PO, PLANNED, PPO, *OFF_POLICY_AGENTS):
            curve = results.curve(label, environment.env_id)
            if curve is None:
                continue
            x = curve.steps if against == "steps" else curve.cpu_seconds.mean(0)
            (line,) = axis.plot(x, curve.mean, label=label)
            axis.fill_between(x, curve.scores.min(0), curve.scores.max(0), alpha=0.15, color=line.get_color())
        for method, score in results.published(environment.env_id, ("TD-MPC2", "MR.Q")).items():
            if against == "steps":
                axis.plot([BUDGET], [score], "x" if method == "MR.Q" else "+", color="black", label=f"{method} (published)")
        axis.set_title(environment.env_id.removeprefix("dm_control/"))
        axis.set_xscale("log")
        axis.grid(alpha=0.3)
    for axis in list(axes.flat)[len(ENVIRONMENTS) :]:
        axis.axis("off")
    labels = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(labels.values(), labels.keys(), loc="lower right")
    figure.supxlabel("environment steps (frames)" if against == "steps" else "CPU-seconds of training")
    figure.supylabel("score (0: random, 1: reference)")
    figure.savefig(path, dpi=70)
    plt.close(figure)


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
    everywhere = [environment.env_id for environment in ENVIRONMENTS]
    parts = {"Scores: interquartile means, 95 % intervals": scores_table(results)}
    for agent, suffix in ((M3PO, ""), (PLANNED, ", while M3PO plans")):
        opponents = {"PPO with rl-zoo3's settings and budget": (PPO,), "the best of SAC, TQC and CrossQ": OFF_POLICY_AGENTS}
        for name, labels in {**opponents, "SAC": (SAC,)}.items():
            parts[f"Against {name}{suffix}"] = race_table(results, agent, everywhere, labels, name.split(" with ")[0])
        parts[f"dm_control at 100,000 frames, beside published scores{suffix}"] = published_table(results, agent)
        parts[f"Where M3PO is behind{suffix}"] = worst_table(results, agent)
    text = "".join(f"## {title}\n\n{table}\n\n" for title, table in parts.items())
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tables.md").write_text(f"# Report\n\n{text}".rstrip() + "\n")
    for against in ("steps", "cpu_seconds"):
        curves_figure(results, against, args.out / f"scores-by-{against.replace('_', '-')}.png")
    print(text)


if __name__ == "__main__":
    main()
