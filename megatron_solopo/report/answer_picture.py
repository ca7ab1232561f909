"""What `evaluate long-context` found, in two pictures."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from megatron_solopo.evaluation_results import LongContextResults
from megatron_solopo.files import atomic_path, remove
from megatron_solopo.report.axes import Cells, banded_line, dress, heat_maps, legend, length_axis, short_length
from megatron_solopo.report.evaluations import answer_cells, answer_points
from megatron_solopo.report.style import LIGHT, Theme, figure

_DPI = 150
_ACROSS = 3


def draw_answers(results: LongContextResults, by_length: Path, by_depth: Path) -> None:
    """Draw a result into PNGs; `by_depth` is removed where no task has depths."""
    _save(length_figure(results, LIGHT), by_length)
    if maps := depth_maps(results):
        axes = ("tokens of the prompt", "depth of the evidence, 0 is the start")
        _save(heat_maps(LIGHT, maps, *axes, across=min(len(maps), _ACROSS)), by_depth)
    else:
        remove(by_depth)


def length_figure(results: LongContextResults, theme: Theme) -> Figure:
    """Each task's main score with its interval against the length of the prompt."""
    drawn = figure(theme, 9.5, 4.6)
    axis = drawn.add_subplot()
    dress(axis, theme, results.name, "tokens of the prompt", "mean score, 95 % interval")
    for place, (task, metric) in enumerate(results.main_metrics.items()):
        if points := answer_points(results, task):
            banded_line(axis, points, theme.colour(place), f"{task} ({metric})", place, theme.line(place))
    axis.set_ylim(-0.03, 1.03)
    length_axis(axis, results.lengths)
    legend(axis, theme)
    return drawn


def depth_maps(results: LongContextResults) -> list[tuple[str, Cells]]:
    """Of each task that has depths: its title, and its scores by length and depth."""
    maps = ((f"{task} ({metric})", depth_map(results, [task])) for task, metric in results.main_metrics.items())
    return [(title, cells) for title, cells in maps if cells]


def depth_map(results: LongContextResults, tasks: Sequence[str] | None = None) -> Cells:
    """The mean over the tasks (None: all) by length and depth; empty where none has depths."""
    return {
        (short_length(length), f"{depth:.2f}"): cell for (length, depth), cell in answer_cells(results, tasks).items()
    }


def _save(drawn: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        drawn.savefig(temporary, format="png", dpi=_DPI)
