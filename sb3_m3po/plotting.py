"""Pictures of a model of several tasks. Needs matplotlib."""

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def _figure(width: float, height: float) -> "Figure":
    """Without pyplot, so that no window and no global state is touched."""
    try:
        return importlib.import_module("matplotlib.figure").Figure(figsize=(width, height), layout="constrained")
    except ImportError as error:
        raise ImportError(f'Pictures need matplotlib: pip install "sb3_m3po[plots]" ({error})') from error


def plot_task_heatmap(
    evaluations: str | Mapping[str, Any], bounds: Mapping[str, tuple[float, float]] | None = None
) -> "Figure":
    """
    Scores over tasks and time.

    :param evaluations: Path to the ``evaluations.npz`` of a :class:`~sb3_m3po.callbacks.TaskEvalCallback`, or a mapping with
        its ``timesteps`` ``(n_evaluations,)``, ``tasks`` and ``task_results`` ``(n_evaluations, n_tasks)``
    :param bounds: By task's name: the returns that count as 0 and as 1; by default a task's lowest and highest score
    :return: One row for each task, one column for each evaluation
    """
    data = np.load(evaluations) if isinstance(evaluations, str) else evaluations
    names, steps = [str(name) for name in data["tasks"]], np.asarray(data["timesteps"])
    results = np.asarray(data["task_results"], float)
    found = {name: (column.min(), column.max()) for name, column in zip(names, results.T, strict=True)}
    low, high = np.array([(bounds or found)[name] for name in names]).T
    scores = (results - low) / np.where(high > low, high - low, 1.0)
    figure = _figure(2.5 + 0.35 * len(steps), 1.5 + 0.35 * len(names))
    axes = figure.subplots()
    image = axes.imshow(scores.T, aspect="auto", vmin=0, vmax=1, cmap="viridis")
    shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), 6)).astype(int))
    axes.set_xticks(shown, [f"{steps[i]:,}" for i in shown], rotation=45, ha="right")
    axes.set_yticks(range(len(names)), names)
    axes.set_xlabel("environment steps")
    figure.colorbar(image, label="score" if bounds else "score, lowest to highest")
    return figure


def plot_task_embeddings(embeddings: Any, names: Sequence[str] | None = None) -> "Figure":
    """
    Where the tasks' embeddings lie, by their two principal components.

    :param embeddings: A model of several tasks, or embeddings of shape ``(n_tasks, dim)`` with ``names``
    :param names: Of the tasks; a model knows its own
    :return: One labelled point for each task
    :raises ValueError: for a model of a single task
    """
    if hasattr(embeddings, "policy"):
        model = embeddings
        if model.task_table is None:
            raise ValueError("This model has a single task: there is no embedding to draw")
        names, embeddings = model.task_table.names, model.policy.world_model.task_embeddings().detach().cpu().numpy()
    centred = np.asarray(embeddings, float) - np.mean(embeddings, 0)
    left, strengths, _ = np.linalg.svd(centred, full_matrices=False)
    points = np.pad(left * strengths, ((0, 0), (0, 2)))[:, :2]
    shares = np.pad(strengths**2 / max((strengths**2).sum(), 1e-12), (0, 2))[:2]
    figure = _figure(6, 5)
    axes = figure.subplots()
    axes.scatter(*points.T)
    for name, point in zip(names or map(str, range(len(points))), points, strict=True):
        # Towards the middle, where there is room for it
        side = -1 if point[0] > 0 else 1
        axes.annotate(name, point, xytext=(4 * side, 4), textcoords="offset points", ha="left" if side > 0 else "right")
    axes.margins(0.15)
    axes.set_xlabel(f"first component ({shares[0]:.0%} of the variance)")
    axes.set_ylabel(f"second component ({shares[1]:.0%})")
    return figure
