"""The pictures of RESULTS.md, from the kept lines of runs."""

import statistics
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from megatron_solopo.files import atomic_path
from megatron_solopo.report.figure import LIGHT, add_legend, empty_figure, style_axes
from miniature.evaluate import LENGTHS
from miniature.lora_tables import TRAINED, lora_runs, trained
from miniature.pairs import SHORT_LENGTH
from miniature.plan import LORA_LOSS_TYPES, LORA_METHODS, LOSS_TYPES, MAP_ALPHAS, STRONG
from miniature.results import Result, Results
from miniature.runs import LONG_LENGTH
from miniature.tables import METHODS, SETTINGS, aligned, chosen, like

matplotlib.use("Agg")
_DPI = 80
_SHOWN_LOSSES = {"simpo": "SimPO", "dpo": "DPO", "orpo": "ORPO"}


def draw_all(results: Results, lora_results: Results, folder: Path) -> None:
    """Write every picture."""
    accuracy_by_length(results, folder / "accuracy.png")
    failure_map(results, folder / "failures.png")
    adapters_by_length(lora_results, folder / "lora.png")


def accuracy_by_length(results: Results, path: Path) -> None:
    """A panel per loss; a line per method, mean over the seeds and their range."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(LOSS_TYPES), figsize=(13, 4), sharey=True, layout="constrained")
    base = _accuracies(results.where(lambda each: each.run.method == "base" and each.run.strength == STRONG))
    for axis, loss_type in zip(axes, LOSS_TYPES, strict=True):
        found = {name: _accuracies(chosen(results, STRONG, loss_type, name)) for name in METHODS}
        draw_lines(axis, {"base": base} | found)
        axis.set_title(loss_type)
    axes[0].set_ylabel("accuracy")
    axes[0].legend()
    _save(figure, path)


def adapters_by_length(results: Results, path: Path) -> None:
    """A panel per loss and method; a line for the whole model and each rank, mean over the seeds and their range."""
    from matplotlib import pyplot

    rows, columns = len(LORA_LOSS_TYPES), len(LORA_METHODS)
    figure, axes = pyplot.subplots(rows, columns, figsize=(13, 4 * rows), sharey=True, layout="constrained")
    base = _accuracies(results.where(lambda each: each.run.method == "base" and each.run.strength == STRONG))
    for axis, (loss_type, method) in zip(axes.flat, product(LORA_LOSS_TYPES, LORA_METHODS), strict=True):
        found = {trained(rank): _accuracies(lora_runs(results, loss_type, rank, method)) for rank in TRAINED}
        draw_lines(axis, {"base": base} | found)
        axis.set_title(f"{loss_type}, {method}")
    axes[0, 0].set_ylabel("accuracy")
    axes[0, 0].legend()
    _save(figure, path)


def _accuracies(found: list[Result]) -> list[dict[int, float]]:
    return [each.accuracy for each in found]


def save_comparison(models: dict[str, dict[int, float]], path: Path) -> None:
    """Accuracy against length of single models, by name, into a PNG."""
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(6, 4), layout="constrained")
    draw_lines(axis, {name: [accuracy] for name, accuracy in models.items()})
    axis.set_ylabel("accuracy")
    axis.legend()
    _save(figure, path)


def draw_lines(axis: Any, lines: dict[str, list[dict[int, float]]]) -> None:
    """Accuracy against length, a line and a band per name; the lengths of training are marked."""
    for name, found in lines.items():
        if found:
            columns = [[each[length] for each in found] for length in LENGTHS]
            (line,) = axis.plot(LENGTHS, [statistics.fmean(column) for column in columns], marker="o", label=name)
            axis.fill_between(
                LENGTHS, *zip(*((min(c), max(c)) for c in columns), strict=True), color=line.get_color(), alpha=0.15
            )
    for length, label in ((SHORT_LENGTH, "short"), (LONG_LENGTH, "long")):
        axis.axvline(length, color="grey", linestyle=":", linewidth=1)
        axis.annotate(label, (length, 0.02), color="grey", xytext=(3, 0), textcoords="offset points")
    axis.set_xscale("log", base=2)
    axis.set_xticks(LENGTHS, LENGTHS)
    axis.set_xlabel("words of context")
    axis.set_ylim(0, 1)
    axis.grid(alpha=0.3)


def failure_map(results: Results, path: Path) -> None:
    """Change of accuracy over base, learning rate, loss and alpha, without and with `detach_short`."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 2, figsize=(11, 9), layout="constrained")
    rows = [
        (strength, rate, loss_type)
        for (strength, rate), loss_type in product(SETTINGS, LOSS_TYPES)
        if any(like(results, aligned(strength, rate, loss_type, alpha, False)) for alpha in MAP_ALPHAS)
    ]
    labels = [f"base {strength} %, lr {rate:g}, {loss_type}" for strength, rate, loss_type in rows]
    for (line, side), (column, detached) in product(enumerate(("short", "long")), enumerate((False, True))):
        axis = axes[line, column]
        cells = [[aligned(*row[:2], row[2], alpha, detached) for alpha in MAP_ALPHAS] for row in rows]
        grid = np.array([[_change(results, like(results, run), side) for run in runs] for runs in cells])
        image = axis.imshow(grid, cmap="RdBu", vmin=-0.5, vmax=0.5, aspect="auto")
        for (place, number), value in np.ndenumerate(grid):
            axis.text(number, place, "" if np.isnan(value) else f"{value:+.2f}", ha="center", va="center", fontsize=8)
        axis.set_xticks(range(len(MAP_ALPHAS)), [f"alpha {alpha:g}" for alpha in MAP_ALPHAS])
        axis.set_yticks(range(len(rows)), labels if column == 0 else [""] * len(rows), fontsize=8)
        axis.set_title(f"{side} accuracy, change{', detach_short' if detached else ''}")
    figure.colorbar(image, ax=axes)
    _save(figure, path)


def _change(results: Results, found: list[Result], side: str) -> float:
    """Mean over the seeds; NaN without a run."""
    changes = [getattr(each, side) - getattr(results.base_of(each), side) for each in found]
    return statistics.fmean(changes) if changes else float("nan")


def draw_precisions(
    lines: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]], order: Sequence[str], path: Path
) -> None:
    """What each precision does to reward gaps and gradients, a column of panels per loss, a point per model.

    Args:
        lines: those of `precisions.jsonl` before the first step, a colour per seed.
        others: those of rescaled models, in grey.
        order: of the precisions, from the top.
        path: PNG to write.
    """
    rows = [each for each in order if each != "fp32" and any(line["precision"] == each for line in lines)]
    points = [(line, LIGHT.muted, 3.5) for line in others] + [(line, LIGHT.colour(line["seed"]), 6.0) for line in lines]
    points = [each for each in points if each[0]["precision"] in rows]
    figure = empty_figure(LIGHT, 3.3 * len(LOSS_TYPES) + 1.2, 0.84 * len(rows) + 1.6)
    axes = figure.subplots(2, len(LOSS_TYPES), sharey=True, sharex="row")
    for (column, loss_type), place in product(enumerate(LOSS_TYPES), (0, 1)):
        axis = axes[place, column]
        what = ("gap error, relative", "1 - cosine of the gradients")[place]
        style_axes(axis, LIGHT, f"SoLo-{_SHOWN_LOSSES[loss_type]}" if place == 0 else "", what)
        for line, colour, size in points:
            value = line[f"gap_error_{loss_type}"] if place == 0 else 1 - line[f"cosine_{loss_type}"]
            axis.plot(value, rows.index(line["precision"]), "o", color=colour, markersize=size, alpha=0.7)
        axis.set_xscale("log")
        axis.set_yticks(range(len(rows)), rows)
    for seed in sorted({line["seed"] for line in lines}):
        axes[1, -1].plot([], [], "o", color=LIGHT.colour(seed), label=f"seed {seed}")
    if others:
        axes[1, -1].plot([], [], "o", color=LIGHT.muted, markersize=3.5, label="rescaled")
    axes[0, 0].invert_yaxis()
    add_legend(axes[1, -1], LIGHT)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    from matplotlib import pyplot

    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI)
    pyplot.close(figure)
