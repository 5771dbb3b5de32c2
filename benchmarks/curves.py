"""What an agent scores on an environment, and when: from the CSV files, normalised and smoothed."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rliable import metrics

from benchmarks.algorithms import zoo_steps
from benchmarks.record import load_runs, random_scores, read_rows
from benchmarks.suites import BUDGET, ENVIRONMENTS
from sb3_m3po.evaluation import bootstrap_interval

PUBLISHED_CSV = Path("benchmarks/published.csv")
#: Share of the budget over which evaluations are averaged: of 20 evaluations three
SMOOTHING = 0.15
#: Several environments step together: an evaluation may come so much after the step that it is meant for
OVERSHOOT = 0.01


@dataclass
class Curve:
    """
    An agent on an environment.

    :param steps: environment steps (frames) of its evaluations, shape ``(n,)``
    :param scores: normalised, each the mean of the evaluations of the last steps, shape ``(n_seeds, n)``
    :param cpu_seconds: training time until then, shape ``(n_seeds, n)``
    :param machines: on which it was measured, and with which precision of matrix products
    :param n_untrained: evaluations at the beginning that no update preceded
    """

    steps: np.ndarray
    scores: np.ndarray
    cpu_seconds: np.ndarray
    machines: frozenset[str] = frozenset()
    n_untrained: int = 0

    @property
    def mean(self) -> np.ndarray:
        """Over the seeds, shape ``(n,)``."""
        return self.scores.mean(0)

    def at(self, steps: float) -> np.ndarray:
        """
        :param steps: environment steps
        :return: score of each seed then, at the last evaluation up to it (or just after it); of a random policy before
            there is one, shape ``(n_seeds,)``
        """
        last = int(np.searchsorted(self.steps, steps * (1 + OVERSHOOT), side="right")) - 1
        return self.scores[:, last] if last >= 0 else np.zeros(len(self.scores))

    def after(self, seconds: float) -> np.ndarray:
        """
        :param seconds: CPU-seconds of training
        :return: score of each seed then, likewise
        """
        last = [int(np.searchsorted(mine, seconds, side="right")) - 1 for mine in self.cpu_seconds]
        return np.array([scores[i] if i >= 0 else 0.0 for scores, i in zip(self.scores, last, strict=True)])

    def steps_to(self, score: float) -> float:
        """
        :param score: normalised
        :return: environment steps at which the mean first reaches it, interpolated between evaluations; infinity if never.
            What has not learned yet does not reach it: to stand still is worth 0.26 on MountainCarContinuous
        """
        reached = np.flatnonzero(self.mean[self.n_untrained :] >= score)
        if not len(reached):
            return np.inf
        last = self.n_untrained + reached[0]
        # Before the first evaluation it scores what a random policy does
        steps, scores = (np.concatenate([[0.0], x]) for x in (self.steps, self.mean))
        if scores[last] >= score:
            return float(self.steps[last])
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
    :param budget: environment steps (frames) of a whole run; those with rl-zoo3's settings have its budgets
    """

    def __init__(self, folder: Path, budget: int = BUDGET) -> None:
        self.folder, self.budget = folder, budget
        self.random = random_scores()
        self.reference = {environment.env_id: environment.reference for environment in ENVIRONMENTS}
        self._published = read_rows(PUBLISHED_CSV)

    def score(self, env_id: str, returns: np.ndarray) -> np.ndarray:
        """
        :param env_id: an environment
        :param returns: any shape
        :return: 0 for a random policy, 1 for the reference, same shape
        """
        low = self.random[env_id]
        return (returns - low) / (self.reference[env_id] - low)

    def returns(self, env_id: str, scores: np.ndarray) -> np.ndarray:
        """
        :param env_id: an environment
        :param scores: as of :meth:`score`, any shape
        :return: the returns that score so, same shape
        """
        low = self.random[env_id]
        return low + scores * (self.reference[env_id] - low)

    def budget_of(self, label: str, env_id: str) -> int:
        """
        :param label: algorithm and variant
        :param env_id: an environment
        :return: environment steps (frames) after which its run is whole
        """
        algo, _, variant = label.partition("-")
        return zoo_steps(algo, env_id) if variant == "zoo" else self.budget

    def window(self, *budgets: int) -> float:
        """
        :param budgets: of agents that are compared
        :return: environment steps over which the evaluations of each of them are averaged
        """
        return SMOOTHING * min(self.budget, *budgets)

    def curve(self, label: str, env_id: str, window: float | None = None) -> Curve | None:
        """
        :param label: algorithm and variant, as the folder of the CSV files is called
        :param env_id: an environment
        :param window: environment steps up to an evaluation of which the mean is taken; by default what fits its own budget
        :return: the runs that have come to the end of their budget; ``None`` if there is none
        """
        runs = load_runs(self.folder, label, env_id)
        if not runs:
            return None
        budget = self.budget_of(label, env_id)
        points = [{int(row["steps"]): row for row in rows} for rows in runs.values() if int(rows[-1]["steps"]) >= budget]
        if not points:
            return None
        # Seeds of several environments may have come to slightly different steps
        steps = np.array(sorted(set.intersection(*map(set, points))))
        returns, seconds = (
            np.array([[float(run[step][key]) for step in steps.tolist()] for run in points])
            for key in ("mean_reward", "cpu_seconds")
        )
        width = window or self.window(budget)
        smooth = [returns[:, (steps > step - (1 - OVERSHOOT) * width) & (steps <= step)].mean(1) for step in steps]
        machines = frozenset(measured_on(row) for run in points for row in run.values())
        untrained = sum(any(int(run[step]["n_updates"]) == 0 for run in points) for step in steps.tolist())
        return Curve(steps, self.score(env_id, np.stack(smooth, 1)), seconds, machines, untrained)

    def published(self, env_id: str) -> dict[str, float]:
        """
        :param env_id: an environment
        :return: by method, the highest score that was published for at most as many steps (frames) as the budget
        """
        rows = [row for row in self._published if row["env"] == env_id and int(row["steps"]) <= self.budget]
        rows.sort(key=lambda row: float(row["mean"]))
        return {row["method"]: float(self.score(env_id, np.array(float(row["mean"])))) for row in rows}


def measured_on(row: dict[str, str]) -> str:
    """
    :param row: of a CSV file
    :return: what its seconds depend on: the machine, and the precision of matrix products
    """
    precision = re.search(r"--matmul (\w+)", row["command"])
    return f"{row['machine']}; products {precision[1] if precision else 'highest'}"


def median_with_bounds(ratios: list[tuple[float, bool]], bound: str, digits: int) -> str:
    """
    The median of ratios of which some are only known to lie on one side of a bound.

    :param ratios: each with whether it is a bound
    :param bound: what the bounds are: ``"<"`` for upper ones, ``">"`` for lower ones
    :param digits: behind the point
    :return: the median; with the sign before it, if it is only known to lie on that side
    """
    values = sorted(value for value, _ in ratios)
    middle = values[(len(values) - 1) // 2] if bound == "<" else values[len(values) // 2]
    known = all(value < middle if bound == "<" else value > middle for value, is_bound in ratios if is_bound)
    return f"{'' if known else bound + ' '}{np.median(values):.{digits}f}"


def interquartile_means(scores: np.ndarray, n_resamples: int = 2_000) -> np.ndarray:
    """
    Interquartile means and their 95 % stratified bootstrap intervals (Agarwal et al. 2021, arXiv 2108.13264).

    :param scores: shape ``(n_seeds, n_environments, n_points)``
    :param n_resamples: bootstrap samples, of seeds within each environment
    :return: mean, lower and upper end at each point, shape ``(3, n_points)``
    """

    def means(sample: np.ndarray) -> np.ndarray:
        return np.array([metrics.aggregate_iqm(sample[..., i]) for i in range(sample.shape[-1])])

    return np.concatenate([means(scores)[None], bootstrap_interval(scores, means, n_resamples)])
