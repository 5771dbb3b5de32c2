"""Scores against environment steps and CPU-seconds, drawn from the CSV files alone."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from benchmarks.agents import AGENTS, DM_CONTROL_METHODS, EVERYWHERE, GROUPS, NAMES, env_ids, may_run, stacked, whole_group
from benchmarks.curves import Results, interquartile_means
from benchmarks.suites import BUDGET


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
