"""Pictures of an evaluation: score against length, and over length and depth."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from megatron_solopo.evaluation_results import LongContextResults
from megatron_solopo.files import atomic_path


def plot_length(results: LongContextResults, path: Path) -> None:
    """Draw each task's main score with its interval against the prompt's length."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis = figure.add_subplot()
    for task, metric in results.main_metrics.items():
        found = [results.cell(task, metric, length=length) for length in results.lengths]
        cells = [cell for cell in found if cell is not None and cell.length is not None]
        if cells:
            scores = np.array([cell.score for cell in cells])
            errors = np.array([[cell.score - cell.low for cell in cells], [cell.high - cell.score for cell in cells]])
            lengths = np.array([cell.length for cell in cells])
            axis.errorbar(lengths, scores, np.maximum(errors, 0), marker="o", capsize=3, label=f"{task} ({metric})")
    axis.set_xscale("log", base=2)
    axis.set_xticks(results.lengths, [f"{length:,}" for length in results.lengths], rotation=30)
    axis.set_xlabel("tokens of the prompt")
    axis.set_ylabel("mean score, 95 % interval")
    axis.set_ylim(-0.03, 1.03)
    axis.set_title(results.name)
    axis.grid(alpha=0.3)
    if results.main_metrics:
        axis.legend(fontsize="small")
    _save(figure, path)


def plot_depth(results: LongContextResults, path: Path) -> bool:
    """Draw a heat map of length and depth for each task that has depths; False, without a file, if none has."""
    tasks = [task for task in results.main_metrics if _grid(results, task) is not None]
    if not tasks:
        return False
    figure = Figure(figsize=(6 * len(tasks), 4.5), layout="constrained")
    for place, task in enumerate(tasks, start=1):
        axis = figure.add_subplot(1, len(tasks), place)
        grid = _grid(results, task)
        assert grid is not None
        image = axis.imshow(grid, vmin=0, vmax=1, aspect="auto", cmap="RdYlGn")
        for row, column in np.argwhere(~np.isnan(grid)):
            axis.text(column, row, f"{100 * grid[row, column]:.0f}", ha="center", va="center")
        axis.set_xticks(range(len(results.lengths)), [f"{length:,}" for length in results.lengths], rotation=30)
        axis.set_yticks(range(len(results.depths)), [f"{depth:g}" for depth in results.depths])
        axis.set_xlabel("tokens of the prompt")
        axis.set_ylabel("depth of the evidence, 0 is the start")
        axis.set_title(f"{task} ({results.main_metrics[task]})")
        figure.colorbar(image, label="mean score")
    _save(figure, path)
    return True


def _grid(results: LongContextResults, task: str) -> np.ndarray | None:
    """Scores [depths, lengths], NaN where there are no samples; None for a task without depths."""
    metric = results.main_metrics[task]
    rows = [
        [results.cell(task, metric, length=length, depth=depth) for length in results.lengths]
        for depth in results.depths
    ]
    grid = np.array([[np.nan if cell is None else cell.score for cell in row] for row in rows])
    return None if not grid.size or np.isnan(grid).all() else grid


def _save(figure: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
