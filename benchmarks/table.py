"""
Print the table of results from the CSV files.

``python -m benchmarks.table --algo m3po --variant default``
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.record import RESULTS, load_runs, random_scores
from benchmarks.targets import TARGETS, Target

N_LAST = 3
WORST_SEED = 0.8
HEADER = "| environment | reach | within env steps | mean | per seed | worst seed, normalised | CPU-min per seed | |"

Curve = dict[int, tuple[float, float]]
"""One seed: steps -> (mean reward, CPU-seconds)."""


@dataclass
class Score:
    """
    What one row of the table says.

    :param per_seed: mean of the last evaluations up to the budget, for each seed
    :param later: lowest mean over seeds of an evaluation after the budget, and lowest of a single seed, if there are any
    :param cpu_minutes: training time up to the budget, mean over seeds
    """

    per_seed: dict[int, float]
    later: tuple[float, float] | None
    cpu_minutes: float


def load_curves(folder: Path, label: str, env_id: str) -> dict[int, Curve]:
    """
    :param folder: where the CSV files are
    :param label: algorithm and variant, as the folder of the files is called
    :param env_id: id of the environment
    :return: the evaluations of each seed
    """
    return {
        seed: {int(row["steps"]): (float(row["mean_reward"]), float(row["cpu_seconds"])) for row in rows}
        for seed, rows in load_runs(folder, label, env_id).items()
    }


def score(curves: dict[int, Curve], target: Target) -> Score | None:
    """
    :param curves: the evaluations of each seed
    :param target: the row
    :return: the scores of the seeds that have come to the end and were evaluated in time, ``None`` if none was
    """
    whole = {seed: curve for seed, curve in curves.items() if max(curve) >= target.until and min(curve) <= target.within}
    if not whole:
        return None
    per_seed, minutes = {}, []
    for seed, curve in whole.items():
        last = sorted(steps for steps in curve if steps <= target.within)[-N_LAST:]
        per_seed[seed] = float(np.mean([curve[steps][0] for steps in last]))
        minutes.append(curve[last[-1]][1] / 60)
    steps_after = sorted({steps for curve in whole.values() for steps in curve if steps > target.within})
    after = [[curve[steps][0] for curve in whole.values() if steps in curve] for steps in steps_after]
    later = (min(float(np.mean(scores)) for scores in after), min(map(min, after))) if after else None
    return Score(per_seed, later, float(np.mean(minutes)))


def passes(result: Score, target: Target, random: float, share: float, n_seeds: int) -> bool:
    """
    :param result: what was measured
    :param target: the row
    :param random: return of a random policy
    :param share: part of the way from random to the bar that is asked for
    :param n_seeds: how many seeds there must be
    :return: whether the mean reaches the bar (and stays there), and each seed most of it
    """
    bar = random + share * (target.bar - random)
    seeds = list(result.per_seed.values())
    worst = (min(seeds) - random) / (bar - random)
    stays = result.later is None or result.later[0] >= bar
    return len(seeds) >= n_seeds and float(np.mean(seeds)) >= bar and worst >= WORST_SEED and stays


def line(target: Target, result: Score | None, random: float | None, args: argparse.Namespace) -> str:
    """
    :param target: the row
    :param result: what was measured, if anything was
    :param random: return of a random policy, if it was measured
    :param args: the parsed command line
    :return: a line of markdown
    """
    start = f"| {target.env_id} | {target.bar:,g} | {target.within:,} |"
    if result is None or random is None:
        return f"{start} | | | | {'not run' if result is None else 'no random baseline'} |"
    seeds = list(result.per_seed.values())
    mean = number(float(np.mean(seeds)))
    if result.later is not None:
        mean += f"; to {target.until:,}: at least {number(result.later[0])} (one seed: {number(result.later[1])})"
    worst = (min(seeds) - random) / (target.bar - random)
    verdict = "pass" if passes(result, target, random, args.share, args.seeds) else "**fail**"
    if len(seeds) < args.seeds:
        below = "" if passes(result, target, random, args.share, len(seeds)) else ", **below** so far"
        verdict = f"{len(seeds)} of {args.seeds} seeds{below}"
    return f"{start} {mean} | {', '.join(map(number, seeds))} | {worst:.2f} | {result.cpu_minutes:.1f} | {verdict} |"


def number(value: float) -> str:
    """
    :param value: a return
    :return: it with three or more digits
    """
    return f"{value:,.3f}" if abs(value) < 10 else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}"


def main(argv: list[str] | None = None) -> None:
    """
    :param argv: the command line, ``sys.argv`` by default
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algo", default="m3po")
    parser.add_argument("--variant", default="default", help="name of the settings, as in benchmarks.run --name")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds a row needs")
    parser.add_argument("--share", type=float, default=1.0, help="part of the way from random to the bar that is asked for")
    args = parser.parse_args(argv)
    random = random_scores()
    print(HEADER + "\n" + "| --- " * 8 + "|")
    for target in TARGETS:
        curves = load_curves(args.results, f"{args.algo}-{args.variant}", target.env_id)
        print(line(target, score(curves, target), random.get(target.env_id), args))


if __name__ == "__main__":
    main()
