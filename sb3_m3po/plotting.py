"""Pictures of a model of several tasks. Needs matplotlib."""

import importlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sb3_m3po.evaluation import check_bounds

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Pictures of that many tasks, and of fewer, have text of the usual size; from the second number on it is as small as it gets
_FEW, _MANY = 12, 50
#: The cells of a heat map get narrower from that width on, in inches
_MAX_WIDTH = 10.0


def _figure(width: float, height: float) -> "Figure":
    """Without pyplot, so that no window and no global state is touched."""
    try:
        return importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    except ImportError as error:
        raise ImportError(f'Pictures need matplotlib: pip install "sb3_m3po[plots]" ({error})') from error


def _between(n_tasks: int, few: float, many: float) -> float:
    """:return: A size that changes from that for few tasks to that for many"""
    return float(np.interp(n_tasks, (_FEW, _MANY), (few, many)))


# -------------------------------------------------------------------- heat map


def plot_task_heatmap(
    evaluations: str | os.PathLike[str] | Mapping[str, Any], bounds: Mapping[str, tuple[float, float]] | None = None
) -> "Figure":
    """
    Scores over tasks and time, what the tasks are compared by elsewhere, too: returns between their bounds where these are
    given; else rates of success, where every task tells its successes; else returns.

    :param evaluations: Path to the ``evaluations.npz`` of a :class:`~sb3_m3po.callbacks.TaskEvalCallback` or to its folder, or
        a mapping with its ``timesteps`` ``(n_evaluations,)``, ``tasks``, ``task_results`` ``(n_evaluations, n_tasks)`` and, if
        there are any, ``successes``, of that shape or with the tasks' episodes one behind another
    :param bounds: By task's name: the returns that count as 0 and as 1; by default, where returns are shown, a task's lowest
        and highest
    :return: One row for each task, one column for each evaluation
    :raises ValueError: if there are no evaluations of tasks, or tasks without bounds
    """
    names, steps, results, successes = _evaluations(evaluations)
    check_bounds(bounds, names)
    label = "score" if bounds else "score, lowest to highest"
    if bounds is None and np.isfinite(successes[~np.isnan(results)]).all():
        results, bounds, label = successes, dict.fromkeys(names, (0.0, 1.0)), "success rate"
    known = {name: column[~np.isnan(column)] for name, column in zip(names, results.T, strict=True)}
    found = {name: (column.min(), column.max()) if len(column) else (0.0, 1.0) for name, column in known.items()}
    low, high = np.array([(bounds or found)[name] for name in names]).T
    scores = (results - low) / np.where(high > low, high - low, 1.0)
    size = _between(len(names), 10, 8)
    labels = max(map(len, names)) * size * 0.6 / 72
    height = max(1.5 + _between(len(names), 0.35, 0.2) * len(names), 3.0)
    figure = _figure(min(1.5 + 0.35 * len(steps), _MAX_WIDTH) + labels, height)
    axes = figure.subplots()
    image = axes.imshow(scores.T, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 6)).astype(int))
    axes.set_xticks(shown, [f"{steps[i]:,}" for i in shown], rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names, fontsize=size)
    axes.set_xlabel("environment steps")
    figure.colorbar(image, label=label)
    return figure


def _evaluations(source: Any) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """:return: Names of the tasks; steps, shape ``(n_evaluations,)``; returns and successes, ``(n_evaluations, n_tasks)``"""
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        source = np.load(path / "evaluations.npz" if path.is_dir() else path)
    if missing := [key for key in ("timesteps", "tasks", "task_results") if key not in source]:
        raise ValueError(
            f"The evaluations have no {', '.join(missing)} (they have {', '.join(source)}): give what a TaskEvalCallback wrote"
        )
    results = np.asarray(source["task_results"], float)
    successes = np.asarray(source["successes"], float) if "successes" in source else np.full_like(results, np.nan)
    rates = successes.reshape(*results.shape, -1).mean(-1)
    return [str(name) for name in source["tasks"]], np.asarray(source["timesteps"]), results, rates


# ------------------------------------------------------------------ embeddings


def plot_task_embeddings(embeddings: Any, names: Sequence[str] | np.ndarray | None = None) -> "Figure":
    """
    Where the tasks' embeddings lie, by their two principal components.

    :param embeddings: A model of several tasks, or embeddings of shape ``(n_tasks, dim)`` with ``names``
    :param names: Of the tasks; a model knows its own
    :return: One labelled point for each task
    :raises ValueError: for a model without embeddings of tasks, or another number of names
    """
    if hasattr(embeddings, "policy"):
        names, embeddings = _embeddings(embeddings)
    centred = np.asarray(embeddings, float) - np.mean(embeddings, 0)
    labels = [str(name) for name in (range(len(centred)) if names is None else names)]
    if len(labels) != len(centred):
        raise ValueError(f"There are {len(labels)} names for {len(centred)} embeddings: give one name for each")
    left, strengths, _ = np.linalg.svd(centred, full_matrices=False)
    points = np.pad(left * strengths, ((0, 0), (0, 2)))[:, :2]
    shares = np.pad(strengths**2 / max((strengths**2).sum(), 1e-12), (0, 2))[:2]
    figure = _figure(_between(len(labels), 6, 12), _between(len(labels), 5, 9))
    axes = figure.subplots()
    axes.scatter(*points.T)
    axes.margins(0.15)
    axes.set_xlabel(f"first component ({shares[0]:.0%} of the variance)")
    axes.set_ylabel(f"second component ({shares[1]:.0%})")
    _label(figure, points, labels, _between(len(labels), 10, 7))
    return figure


def _embeddings(model: Any) -> tuple[list[str], np.ndarray]:
    """:return: Names of a model's tasks; their embeddings, shape ``(n_tasks, dim)``"""
    if not hasattr(model, "task_table"):
        raise ValueError(
            f"{type(model).__name__} has no embeddings of tasks: give an M3PO, or an array of embeddings with names"
        )
    if model.task_table is None:
        raise ValueError("This model has a single task: there is no embedding to draw")
    return model.task_table.names, model.policy.world_model.task_embeddings().detach().cpu().numpy()


def _label(figure: "Figure", points: np.ndarray, labels: list[str], size: float) -> None:
    """Write a label beside each point, where it covers least of what is there already and stays inside; near if it can."""
    axes = figure.axes[0]
    figure.draw_without_rendering()  # only now it is known where the points will be
    inside = np.asarray(axes.bbox.extents) * 72 / figure.dpi
    where = axes.transData.transform(points) * 72 / figure.dpi
    rows = sorted(range(-12, 13), key=abs)
    taken = [np.array([x - 3, y - 3, x + 3, y + 3]) for x, y in where]
    for label, point, (x, y) in zip(labels, points, where, strict=True):
        # Towards the middle first, where there is room for it
        sides = (-1, 1) if point[0] > 0 else (1, -1)
        places = [(side, 2 + 1.3 * size * row) for row in rows for side in sides]
        boxes = [_box(x + 4 * side, y + up, side, 0.6 * size * len(label), 1.25 * size) for side, up in places]
        # What lies inside of the axes counts as a gain
        covered = [sum(_overlap(box, other) for other in taken) - _overlap(box, inside) for box in boxes]
        best = int(np.argmin(np.round(covered)))
        side, up = places[best]
        taken.append(boxes[best])
        axes.annotate(
            label,
            point,
            xytext=(4 * side, up),
            textcoords="offset points",
            ha="left" if side > 0 else "right",
            va="bottom",
            fontsize=size,
            arrowprops=dict(arrowstyle="-", lw=0.5, alpha=0.5) if best > 1 else None,
        )


def _box(x: float, y: float, side: int, width: float, height: float) -> np.ndarray:
    """:return: Lower left and upper right corner of a text that begins, or ends, at a place"""
    return np.array([min(x, x + side * width), y, max(x, x + side * width), y + height])


def _overlap(one: np.ndarray, other: np.ndarray) -> float:
    """:return: The area that two boxes share"""
    width, height = np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2])
    return max(float(width), 0.0) * max(float(height), 0.0)
