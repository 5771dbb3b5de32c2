"""
Compare M3PO with other agents on the suites, from the CSV files alone: tables and figures in ``benchmarks/report/``.

A score is 0 for a random policy and 1 for the reference of ``benchmarks.suites``; at a step it is the mean of the evaluations
of the last 15 % of the steps so far. Where steps to a score are compared, both sides cross the same score, 95 % of the
opponent's last one.

``python -m benchmarks.report``
"""

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib
import numpy as np

from benchmarks.agents import (
    AGENTS,
    DM_CONTROL_METHODS,
    EVERYWHERE,
    GROUPS,
    M3PO,
    NAMES,
    OFF_POLICY_AGENTS,
    PLANNED,
    PPO,
    SAC,
    env_ids,
    last_score,
    may_run,
    stacked,
    whole_group,
)
from benchmarks.curves import Curve, Results, interquartile_means, median_with_bounds
from benchmarks.figures import environments_figure, suites_figure
from benchmarks.record import RESULTS, read_rows, train_alike
from benchmarks.suites import BUDGET, OFF_POLICY

REPORT = Path("benchmarks/report")
#: Share of an opponent's last score that both sides have to cross
SHARE = 0.95
#: Below this last score an opponent has learned nothing that could be compared
LEARNED = 0.1
#: The least that M3PO's score may be above the best opponent's in any environment
WORST = -0.1
#: Seeds of which an interval is given
FEWEST = 3
CHECKPOINTS = (25_000, 50_000, 100_000)
#: Whose published returns stand beside M3PO's
PUBLISHED = ("SAC", "TD-MPC2", "MR.Q", "SimbaV2 (2 updates a step)")

#: What ``benchmarks.speed`` calls them
SAMPLES = "samples per CPU-s"
#: Where M3PO races whom
RACES: dict[str, tuple[list[str], tuple[str, ...]]] = {
    "Against PPO with rl-zoo3's settings and budget": (env_ids("classic") + env_ids("mujoco"), (PPO,)),
    "Against the best of SAC, TQC and CrossQ": (list(OFF_POLICY), OFF_POLICY_AGENTS),
    "Against SAC": (list(OFF_POLICY), (SAC,)),
}

Race = tuple[float, bool]
"""A ratio, and whether it is only a bound because one side never came to the score."""


@dataclass
class Comparison:
    """
    M3PO beside others in some environments.

    :param lines: of a table
    :param notes: what is to be said below it, of which environments
    :param ratios: of steps, theirs by M3PO's
    :param seconds: ratios of CPU-seconds, M3PO's by theirs
    :param scores: M3PO's at 100,000 steps, and the best of the others, by environment
    :param missing: environments and agents that have not been run
    """

    lines: list[str]
    notes: dict[str, list[str]] = field(default_factory=dict)
    ratios: list[Race] = field(default_factory=list)
    seconds: list[Race] = field(default_factory=list)
    scores: dict[str, tuple[float, float]] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    @property
    def table(self) -> str:
        """The lines and the notes."""
        return with_notes(self.lines, {**self.notes, "Not run yet": self.missing})

    @property
    def mean_ratio(self) -> float:
        """M3PO's mean score by the mean of the best others."""
        own, best = np.sum(list(self.scores.values()) or [(np.nan, np.nan)], axis=0)
        return float(own / best)

    @property
    def smallest(self) -> float:
        """The smallest difference between M3PO's score and the best other."""
        return min((own - best for own, best in self.scores.values()), default=np.inf)


# ---------------------------------------------------------------- tables


def scores_table(results: Results) -> str:
    """
    :param results: what was measured
    :return: interquartile means over environments and seeds, of three seeds or more with 95 % bootstrap intervals
    """
    columns = [f"{steps:,} steps" for steps in CHECKPOINTS]
    lines, missing = header("environments", "agent", "seeds", *columns), []
    for group, ids in GROUPS.items():
        for label in AGENTS:
            curves = whole_group(results, label, ids)
            if curves:
                scores = stacked([[curve.at(steps) for steps in CHECKPOINTS] for curve in curves])
                # Of fewer seeds the interval says nothing of other seeds
                known = len(scores) >= FEWEST
                cells = [f"{m:.2f}" + f" ({low:.2f} to {high:.2f})" * known for m, low, high in interquartile_means(scores).T]
                most = max(len(curve.scores) for curve in curves)
                seeds = len(scores) if len(scores) == most else f"{len(scores)} (of {most})"
                lines.append(row(f"{group} ({len(ids)})", NAMES[label], seeds, *cells))
            elif all(may_run(label, env_id) for env_id in ids):
                missing.append(f"{NAMES[label]} in {group}")
    return with_notes(lines, {"Not run in all of these yet": missing})


def races(results: Results, ids: Iterable[str], opponents: tuple[str, ...]) -> Comparison:
    """
    :param results: what was measured
    :param ids: environments
    :param opponents: labels; in each environment the one with the highest last score is raced
    :return: steps and CPU-seconds that both sides take to 95 % of the opponent's last score
    """
    found = Comparison(
        header(
            *("environment", "opponent", "seeds (its, M3PO's)", "its last score", "its steps", "M3PO's", "its / M3PO's"),
            *("its CPU-s", "M3PO's", "M3PO's / its"),
        )
    )
    nothing_learned, machines, work = [], [], []
    for env_id in ids:
        if any(results.curve(label, env_id) is None for label in (M3PO, *opponents)):
            found.missing.append(env_id)
            continue
        label = max(opponents, key=lambda label: last_score(results, label, env_id))
        mine, theirs = results.curve(M3PO, env_id), results.curve(label, env_id)
        assert mine is not None and theirs is not None
        last = float(theirs.mean[-1])
        if last < LEARNED:
            nothing_learned.append(f"{env_id} ({NAMES[label]}: {last:.2f})")
            continue
        cells, steps, seconds = race(mine, theirs, SHARE * last)
        found.ratios.append(steps)
        found.seconds.append(seconds)
        found.lines.append(row(env_id, NAMES[label], f"{len(theirs.scores)}, {len(mine.scores)}", f"{last:.2f}", *cells))
        if mine.machines != theirs.machines:
            machines.append(env_id)
        if mine.reference_ms and theirs.reference_ms:
            work.append(f"{env_id} {np.median(mine.reference_ms) / np.median(theirs.reference_ms):.2f}")
    if found.ratios:
        n_never = sum(is_bound for _, is_bound in found.ratios)
        title = f"**median** of {len(found.ratios)}, {n_never} of them never reached"
        medians = f"**{median_with_bounds(found.ratios, '<', 1)}**", f"**{median_with_bounds(found.seconds, '>', 2)}**"
        found.lines.append(row(title, *[""] * 5, medians[0], "", "", medians[1]))
    found.notes = {
        f"Not compared, because the opponent ends below {LEARNED}": nothing_learned,
        "Seconds of different machines or precisions of matrix products": machines,
        "CPU-milliseconds of a fixed piece of work, in M3PO's runs by those in the opponent's": work,
    }
    return found


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


def beside_published(results: Results, agent: str) -> Comparison:
    """
    :param results: what was measured
    :param agent: label of M3PO's runs
    :return: dm_control beside the published scores of TD-MPC2 and MR.Q at 100,000 frames
    """
    name, nothing_learned = NAMES[agent], []
    columns = "environment", name, *DM_CONTROL_METHODS, f"{name}'s frames to the better one's score", "100,000 / those"
    found = Comparison(header(*columns))
    for env_id in env_ids("dmc"):
        mine, theirs = results.curve(agent, env_id), results.published(env_id)
        if mine is None:
            found.missing.append(env_id)
            continue
        scores = [theirs[method] for method in DM_CONTROL_METHODS]
        own, best = float(mine.at(BUDGET).mean()), max(scores)
        found.scores[env_id] = own, best
        # What lies before the first evaluation is not known, and theirs can't be smoothed alike
        frames = max(mine.steps_to(best), float(mine.steps[0]))
        ratio = BUDGET / min(frames, BUDGET)
        cells = [f"{frames:,.0f}", f"{ratio:.1f}"] if frames < np.inf else [f"> {BUDGET:,}", f"< {ratio:.1f}"]
        if best < LEARNED:
            nothing_learned.append(env_id)
            cells[1] = ""
        else:
            found.ratios.append((ratio, frames == np.inf))
        found.lines.append(row(env_id, *(f"{value:.3f}" for value in (own, *scores)), *cells))
    if found.scores:
        own, best = np.mean(list(found.scores.values()), axis=0)
        median = f"**{median_with_bounds(found.ratios, '<', 1)}**" if found.ratios else ""
        means = f"**{own:.3f}**", f"the better one: {best:.3f}", "", f"mean / mean: **{found.mean_ratio:.2f}**"
        found.lines.append(row("**mean**, **median**", *means, median))
    found.notes[f"Not in the median, because both end below {LEARNED}"] = nothing_learned
    return found


def everywhere(results: Results, agent: str) -> Comparison:
    """
    :param results: what was measured
    :param agent: label of M3PO's runs
    :return: M3PO's score at 100,000 steps beside the best ones of all others, run here and published
    """
    found = Comparison(header("environment", NAMES[agent], "best run here", "difference", "best published", "difference"))
    for env_id in EVERYWHERE:
        mine = results.curve(agent, env_id)
        curves = {NAMES[label]: results.curve(label, env_id) for label in (PPO, *OFF_POLICY_AGENTS) if may_run(label, env_id)}
        found.missing += [f"{name} on {env_id}" for name, curve in {NAMES[agent]: mine, **curves}.items() if curve is None]
        if mine is None:
            continue
        own = float(mine.at(BUDGET).mean())
        here = {name: float(curve.at(BUDGET).mean()) for name, curve in curves.items() if curve is not None}
        published, cells = results.published(env_id), []
        for scores in (here, published):
            name, score = max(scores.items(), key=lambda item: item[1], default=("", np.nan))
            cells += [f"{name} {score:.3f}", f"{own - score:+.3f}"] if scores else ["", ""]
        if here or published:
            found.scores[env_id] = own, max([*here.values(), *published.values()])
        found.lines.append(row(env_id, f"{own:.3f}", *cells))
    return found


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


def verdict(found: str, reach: float, least: bool) -> str:
    """
    :param found: a number, with ``<`` or ``>`` before it if it is a bound
    :param reach: what is aimed at
    :param least: whether it should be at least that, or at most
    :return: ``met``, ``missed``, or ``not known`` of a bound that leaves it open
    """
    number = float(found.strip("<> ").partition(" (")[0])
    good = number >= reach if least else number <= reach
    return "missed" if not good else "not known" if found[0] in "<>" else "met"


def claims_table(results: Results) -> str:
    """
    :param results: what was measured
    :return: what is aimed at, how far it was reached, and of how much of it that is known
    """
    ppo, best, sac = (races(results, ids, them) for ids, them in RACES.values())
    published, worst = beside_published(results, M3PO), everywhere(results, M3PO)
    aims = [
        ("tuned PPO's steps to its last score / M3PO's, median", 15, True, ppo, median_of(ppo.ratios, "<", 1)),
        ("steps of the best of SAC, TQC, CrossQ / M3PO's, median", 2.3, True, best, median_of(best.ratios, "<", 1)),
        ("mean score on dm_control / the better of TD-MPC2 and MR.Q", 1.1, True, published, f"{published.mean_ratio:.2f}"),
        ("100,000 frames / M3PO's to that one's score, median", 1.5, True, published, median_of(published.ratios, "<", 1)),
        ("smallest difference to the best opponent's score", WORST, True, worst, f"{worst.smallest:+.3f}"),
        ("M3PO's CPU-seconds / tuned PPO's, median", 1.0, False, ppo, median_of(ppo.seconds, ">", 2)),
        ("M3PO's CPU-seconds / SAC's, median", 0.3, False, sac, median_of(sac.seconds, ">", 2)),
    ]
    lines = header("aim", "reach", "found", "")
    for aim, reach, least, compared, found in aims:
        lines.append(row(aim, f"{reach:g}", found, "not all run yet" if compared.missing else verdict(found, reach, least)))
    return "\n".join(lines)


def median_of(ratios: list[Race], bound: str, digits: int) -> str:
    """
    :param ratios: as of :func:`~benchmarks.curves.median_with_bounds`, or none
    :param bound: likewise
    :param digits: likewise
    :return: the median, and of how many
    """
    return f"{median_with_bounds(ratios, bound, digits)} (of {len(ratios)})" if ratios else ""


def commits_table(results: Results) -> str:
    """
    :param results: what was measured
    :return: of which code the rows of each agent are, and whether it trains alike
    """
    lines = header("agent", "commits", "all of them train alike")
    for label in AGENTS:
        curves = [results.curve(label, env_id) for env_id in EVERYWHERE]
        commits = sorted(set().union(*(curve.commits for curve in curves if curve is not None)))
        if commits:
            alike = all(train_alike(commits[0], other) for other in commits)
            lines.append(row(NAMES[label], ", ".join(commits), "yes" if alike else "no"))
    return "\n".join(lines)


def speed_table(folder: Path) -> str:
    """
    :param folder: where the CSV files are
    :return: what ``benchmarks.speed`` measured of M3PO, on each machine
    """
    lines = header(
        "machine", "precision of products", "samples per CPU-second", "environment steps per second", "by the policy"
    )
    for path in sorted(folder.glob("speed*.csv")):
        rows = read_rows(path)
        cells = {(row["measure"], row["case"], row["quantity"]): row["value"] for row in rows}
        if ("update", "M3PO", SAMPLES) not in cells:
            continue
        rates = (
            cells["training", f"M3PO{by}", "environment steps per second (wall)"] for by in ("", ", collecting by the policy")
        )
        precision = re.search(r"--matmul (\w+)", rows[0]["command"])
        machine = rows[0]["machine"].partition(";")[0]
        lines.append(row(machine, precision[1] if precision else "highest", cells["update", "M3PO", SAMPLES], *rates))
    return "\n".join(
        [*lines, "\nAimed at are 10,000 samples per CPU-second, 100 environment steps per second, and 150 by the policy."]
    )


def readable(value: float) -> str:
    """
    :param value: a return, or NaN
    :return: with four digits or so; nothing if there is none
    """
    return "" if np.isnan(value) else f"{value:,.0f}" if abs(value) >= 10 else f"{value:.1f}"


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
    parts = {"Aims": claims_table(results), "Scores: interquartile means, 95 % intervals": scores_table(results)}
    parts |= {title: races(results, *raced).table for title, raced in RACES.items()}
    parts["Returns at 100,000 steps, beside published ones"] = returns_table(results)
    for agent, suffix in ((M3PO, ""), (PLANNED, ", while M3PO plans")):
        beside = beside_published(results, agent).table
        parts[f"dm_control at 100,000 frames, beside published scores{suffix}"] = beside
        parts[f"Everywhere, beside the best at 100,000 steps{suffix}"] = everywhere(results, agent).table
    parts |= {"Seconds": speed_table(args.results), "Code": commits_table(results)}
    text = "".join(f"## {title}\n\n{table}\n\n" for title, table in parts.items())
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tables.md").write_text(f"# Report\n\n{text}".rstrip() + "\n")
    for by_steps, name in ((True, "steps"), (False, "cpu-seconds")):
        suites_figure(results, by_steps, args.out / f"suites-by-{name}.png")
        environments_figure(results, by_steps, args.out / f"scores-by-{name}.png")
    print(text)


if __name__ == "__main__":
    main()
