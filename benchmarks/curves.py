"""What an agent scores on an environment, and when: from the CSV files, normalised and smoothed."""

import re
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rliable import metrics

from benchmarks.algorithms import zoo_steps
from benchmarks.record import load_runs, random_scores, read_rows
from benchmarks.suites import BUDGET, ENVIRONMENTS
from sb3_m3po.evaluation import bootstrap_interval

PUBLISHED_CSV = Path("benchmarks/published.csv")
#: Share of the steps so far over which evaluations are averaged: at the end of 100,000 steps that are three. A share, since
#: steps are compared as ratios: an agent that learns ten times as fast as another is then found to, whenever it is looked at
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
    :param centres: mean steps of the evaluations that a score is the mean of, over the seeds, shape ``(n,)``; by default
        each is one evaluation's
    :param central_seconds: mean training time of the same, shape ``(n,)``
    :param commits: of the code
    :param reference_ms: how long the reference work took beside each evaluation, where that was measured
    """

    steps: np.ndarray
    scores: np.ndarray
    cpu_seconds: np.ndarray
    machines: frozenset[str] = frozenset()
    n_untrained: int = 0
    centres: np.ndarray = field(default_factory=lambda: np.array([]))
    central_seconds: np.ndarray = field(default_factory=lambda: np.array([]))
    commits: frozenset[str] = frozenset()
    reference_ms: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if not len(self.centres):
            self.centres, self.central_seconds = self.steps, self.cpu_seconds.mean(0)

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
            A mean of several evaluations stands for the middle of them: at the last of them it would come late, by the more
            steps the faster an agent learns. What has not learned yet does not reach it: to stand still is worth 0.26 on
            MountainCarContinuous
        """
        reached = np.flatnonzero(self.mean[self.n_untrained :] >= score)
        if not len(reached):
            return np.inf
        last = self.n_untrained + reached[0]
        # Before the first evaluation it scores what a random policy does
        steps, scores = (np.concatenate([[0.0], x]) for x in (self.centres, self.mean))
        if scores[last] >= score:
            return float(self.centres[last])
        return float(np.interp(score, scores[last : last + 2], steps[last : last + 2]))

    def seconds_to(self, score: float) -> float:
        """
        :param score: normalised
        :return: CPU-seconds of training at which the mean first reaches it; infinity if never
        """
        steps = self.steps_to(score)
        if steps == np.inf:
            return np.inf
        return float(np.interp(steps, np.append(0.0, self.centres), np.append(0.0, self.central_seconds)))


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

    def curve(self, label: str, env_id: str) -> Curve | None:
        """
        :param label: algorithm and variant, as the folder of the CSV files is called
        :param env_id: an environment
        :return: the runs that have come to the end of their budget; ``None`` if there is none
        """
        runs = load_runs(self.folder, label, env_id)
        if not runs:
            return None
        budget = self.budget_of(label, env_id)
        whole = [rows for rows in runs.values() if int(rows[-1]["steps"]) >= budget]
        if not whole:
            return None
        # Seeds may have been evaluated at different steps: between its own, a seed's curve is interpolated
        grid = np.array(sorted({int(row["steps"]) for rows in whole for row in rows}))
        seeds = [self._smooth(env_id, rows, grid) for rows in whole]
        scores, seconds, centres, central_seconds = (np.stack(column) for column in zip(*seeds, strict=True))
        every = [row for rows in whole for row in rows]
        last_untrained = max((int(row["steps"]) for row in every if int(row["n_updates"]) == 0), default=0)
        return Curve(
            *(grid, scores, seconds, frozenset(map(measured_on, every)), int((grid <= last_untrained).sum())),
            *(centres.mean(0), central_seconds.mean(0), frozenset(row["commit"] for row in every)),
            tuple(float(row["reference_ms"]) for row in every if row.get("reference_ms")),
        )

    def _smooth(self, env_id: str, rows: list[dict[str, str]], grid: np.ndarray) -> list[np.ndarray]:
        """
        :param env_id: an environment
        :param rows: of one seed
        :param grid: environment steps at which it is asked
        :return: there, the mean score, the CPU-seconds, and the mean steps and CPU-seconds of the evaluations in the mean
        """
        steps, returns, seconds = (
            np.array([float(row[name]) for row in rows]) for name in ("steps", "mean_reward", "cpu_seconds")
        )
        # Each evaluation stands for the steps since the one before, of those that lie in the window that ends at a step
        begin, end = (1 - SMOOTHING) * steps[:, None], steps[:, None]
        gaps = np.minimum(np.diff(steps, prepend=0), steps - begin)
        within = (steps > begin + OVERSHOOT * (end - begin)) & (steps <= end)
        weights = np.where(within, gaps, 0)
        weights /= weights.sum(1, keepdims=True)
        scores, centres, central = (weights @ x for x in (self.score(env_id, returns), steps, seconds))
        # At the beginning everything is 0, the score of a random policy too
        return [np.interp(grid, np.append(0, steps), np.append(0, x)) for x in (scores, seconds, centres, central)]

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
