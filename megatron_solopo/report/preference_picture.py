"""What `evaluate preference` found, in one picture."""

import math
from pathlib import Path

from matplotlib.figure import Figure

from megatron_solopo.report.axes import Point, banded_line, dress, heat_map, legend, length_axis, short_length
from megatron_solopo.report.preference_results import Estimate, PreferenceResults
from megatron_solopo.report.style import LIGHT, Theme, figure

_CONTEXTS = ("short", "long")


def draw_preference(results: PreferenceResults, path: Path) -> None:
    """Draw a result into a PNG."""
    preference_figure(results, LIGHT).savefig(path, format="png", dpi=150)


def preference_figure(results: PreferenceResults, theme: Theme) -> Figure:
    """Accuracy by length, gap by length, and accuracy by length and depth."""
    drawn = figure(theme, 15, 4.6)
    by_length, by_gap, by_depth = drawn.subplots(1, 3)
    dress(by_length, theme, "Reward accuracy by length", "tokens of the long context, up to", "chosen over rejected")
    for place, context in enumerate(_CONTEXTS):
        if points := metric_points(results, f"rewards/accuracies_{context}"):
            banded_line(by_length, points, theme.colour(place), f"{context} context", place)
    by_length.set_ylim(-0.03, 1.03)
    dress(
        by_gap, theme, "SoLo gap of the chosen answer", "tokens of the long context, up to", "reward, short minus long"
    )
    for place, (name, label) in enumerate((("solo_ra/gap_signed", "signed"), ("solo_ra/gap_abs", "absolute"))):
        if points := metric_points(results, name):
            banded_line(by_gap, points, theme.colour(place + 2), label, place + 2)
    for axis in (by_length, by_gap):
        length_axis(axis, [group.up_to for group in results.by_length])
        legend(axis, theme)
    dress(
        by_depth, theme, "Long-context accuracy by depth", "tokens of the long context, up to", "depth of the evidence"
    )
    heat_map(by_depth, theme, depth_cells(results))
    return drawn


def metric_points(results: PreferenceResults, name: str) -> list[Point]:
    """A metric by length; empty where the result lacks it, as that of plain pairs lacks the long context."""
    return [
        Point(group.up_to, *_values(group.metrics[name]), group.n)
        for group in results.by_length
        if name in group.metrics
    ]


def _values(estimate: Estimate) -> tuple[float, float, float]:
    """An interval that is not known is NaN, which is not drawn."""
    low, high = (math.nan if end is None else end for end in (estimate.low, estimate.high))
    return estimate.mean, low, high


def depth_cells(results: PreferenceResults) -> dict[tuple[str, str], tuple[float, int]]:
    """(length, depth) -> accuracy on the long context (of pairs, on their only one), triplets."""
    cells = {}
    for group in results.by_length_and_depth:
        accuracy = group.metrics.get("rewards/accuracies_long") or group.metrics["rewards/accuracies_short"]
        depth = "unknown" if group.start is None else f"{group.start:.1f} to {group.end:.1f}"
        cells[short_length(group.up_to), depth] = (accuracy.mean, group.n)
    return cells
