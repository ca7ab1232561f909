"""What `evaluate long-context` found, in two pictures.

What `evaluate preference` found, in one picture.

The pictures of evaluations: accuracy against length, and where in the context the evidence lay.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_solopo.files import atomic_path, remove
from megatron_solopo.report.figure import (
    LIGHT,
    Cells,
    Picture,
    Point,
    Theme,
    banded_line,
    dress,
    figure,
    heat_map,
    heat_maps,
    legend,
    length_axis,
    short_length,
)
from megatron_solopo.report.runs import RunRecord, answer_cells, answer_points, common_tasks, mean_answer_points
from megatron_solopo.results.long_context import LongContextResults
from megatron_solopo.results.preference import PreferenceResults
from megatron_solopo.results.results_file import MeanWithInterval

_DPI = 150
_INCHES_PER_PANEL = 3


def draw_answers(results: LongContextResults, by_length: Path, by_depth: Path) -> None:
    """Draw a result into PNGs; `by_depth` is removed where no task has depths."""
    _save(length_figure(results, LIGHT), by_length)
    if maps := depth_maps(results):
        axes = ("tokens of the prompt", "depth of the evidence, 0 is the start")
        _save(heat_maps(LIGHT, maps, *axes, across=min(len(maps), _INCHES_PER_PANEL)), by_depth)
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


def _values(estimate: MeanWithInterval) -> tuple[float, float, float]:
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


Curve = tuple[str, int | None, Sequence[Point]]
"""Label, the run's place (None: the model before training), points."""

BAND = "Bands are 95 % confidence intervals."
_ACROSS = 4
LONG, SHORT = "rewards/accuracies_long", "rewards/accuracies_short"


def accuracy_pictures(runs: Sequence[RunRecord]) -> Iterator[Picture]:
    """Those for which there is an evaluation."""
    tasks = list(dict.fromkeys(task for run in runs for task in _tasks(run)))
    common = common_tasks(_all_answers(runs))
    answers = answer_curves(runs, mean_answer_points, common) if common else []
    if answers:
        what = common[0] if len(common) == 1 else f"the mean over {len(common)} tasks"
        what += " that all have" if len(common) < len(tasks) else ""
        yield Picture(
            "accuracy-by-length",
            "Accuracy against context length",
            f"Share of right answers, {what}, against the length of the prompt in tokens. {BAND}",
            f"Accuracy by context length. {_in_words(answers)}",
            lambda theme: _lines(theme, answers, "score"),
        )
    if len(tasks) > 1 or (tasks and not answers):
        yield Picture(
            "accuracy-by-task",
            "Accuracy against context length by task",
            f"Each task's own score; {BAND[0].lower()}{BAND[1:]}",
            f"Accuracy by context length for each of the tasks {', '.join(tasks)}.",
            lambda theme: _small_multiples(theme, runs, tasks),
        )
    if preferences := preference_curves(runs, LONG):
        yield Picture(
            "reward-accuracy-by-length",
            "Reward accuracy against context length",
            "Share of held-out triplets whose chosen answer has the higher reward: solid behind the long context, "
            f"dotted behind the short one. {BAND}",
            f"Reward accuracy by context length. {_in_words(preferences)}",
            lambda theme: _lines(theme, preferences, "reward accuracy", preference_curves(runs, SHORT)),
        )
    for name, title, maps in (
        ("accuracy-by-depth", "Accuracy by length and depth of the evidence", _answer_maps(runs)),
        ("reward-accuracy-by-depth", "Reward accuracy by length and depth of the evidence", _reward_maps(runs)),
    ):
        if maps:
            yield Picture(
                name,
                title,
                "Across: length of the context in tokens. Down: depth of the evidence in it, from its start, 0, to 1.",
                f"{title}: one heat map for each of {', '.join(label for label, _ in maps)}.",
                partial(heat_maps, maps=maps),
            )


def answer_curves(runs: Sequence[RunRecord], points: Callable[..., list[Point]], *arguments: Any) -> list[Curve]:
    """Of every run that answered questions, then of the models that they started from, each once."""
    after = [
        (run.name, place, points(run.evaluations.answers, *arguments))
        for place, run in enumerate(runs)
        if run.evaluations.answers is not None
    ]
    before = {
        (found.model, tuple(found.main_metrics)): (
            f"before training ({_short(found.model)})",
            None,
            points(found, *arguments),
        )
        for run in runs
        if (found := run.evaluations.answers_before) is not None
    }
    return [curve for curve in (*after, *before.values()) if curve[2]]


def preference_curves(runs: Sequence[RunRecord], metric: str) -> list[Curve]:
    """Of every run whose preferences were evaluated; a policy that is its own reference has none to draw."""
    after = [
        (run.name, place, metric_points(run.evaluations.preferences, metric))
        for place, run in enumerate(runs)
        if run.evaluations.preferences is not None
    ]
    before = {
        (found.model, found.data_fingerprint, found.split): (
            f"before training ({_short(found.model)})",
            None,
            metric_points(found, metric),
        )
        for run in runs
        if (found := run.evaluations.preferences_before) is not None and found.overall.ties_short != found.overall.n
    }
    return [curve for curve in (*after, *before.values()) if curve[2]]


def _all_answers(runs: Sequence[RunRecord]) -> list[LongContextResults]:
    """After training and before."""
    found = [each for run in runs for each in (run.evaluations.answers, run.evaluations.answers_before)]
    return [each for each in found if each is not None]


def _tasks(run: RunRecord) -> Iterable[str]:
    return run.evaluations.answers.main_metrics if run.evaluations.answers is not None else ()


def _short(model: str) -> str:
    return model.rstrip("/").rsplit("/", 1)[-1]


def _in_words(curves: Sequence[Curve]) -> str:
    """The first and last point of every line, for those who cannot see it."""
    return " ".join(
        f"{label}: {points[0].mean:.2f} at {points[0].length:,} tokens, {points[-1].mean:.2f} at {points[-1].length:,}."
        for label, _, points in curves
    )


def _lines(theme: Theme, curves: Sequence[Curve], y: str, dotted: Sequence[Curve] = ()) -> Figure:
    drawn = figure(theme, 9.5, 4.6)
    axis = drawn.add_subplot()
    dress(axis, theme, x="context length in tokens", y=y)
    for label, place, points in curves:
        _line(axis, theme, label, place, points)
    for _, place, points in dotted:
        axis.plot(
            [point.length for point in points],
            [point.mean for point in points],
            ":",
            color=theme.muted if place is None else theme.colour(place),
            linewidth=1.5,
        )
    axis.set_ylim(-0.03, 1.03)
    length_axis(axis, [point.length for _, _, points in curves for point in points])
    legend(axis, theme)
    return drawn


def _line(axis: Axes, theme: Theme, label: str, place: int | None, points: Sequence[Point]) -> None:
    if place is None:
        banded_line(axis, points, theme.muted, label, 5, "--")
    else:
        banded_line(axis, points, theme.colour(place), label, place, theme.line(place))


def _small_multiples(theme: Theme, runs: Sequence[RunRecord], tasks: Sequence[str]) -> Figure:
    rows = -(-len(tasks) // _ACROSS)
    drawn = figure(theme, 12, 2.7 * rows + 0.4)
    axes = drawn.subplots(rows, min(_ACROSS, len(tasks)), squeeze=False, sharey=True).flat
    for axis, task in zip(axes, tasks, strict=False):
        dress(axis, theme, task)
        curves = [
            (run.name, place, answer_points(found, task))
            for place, run in enumerate(runs)
            if (found := run.evaluations.answers) is not None and task in found.main_metrics
        ]
        for label, place, points in curves:
            _line(axis, theme, label, place, points)
        axis.set_ylim(-0.03, 1.03)
        length_axis(axis, [point.length for _, _, points in curves for point in points])
    for axis in list(drawn.axes)[len(tasks) :]:
        axis.set_visible(False)
    legend(drawn.axes[0], theme)
    return drawn


def _answer_maps(runs: Sequence[RunRecord]) -> list[tuple[str, Cells]]:
    found = [(run.name, depth_map(run.evaluations.answers)) for run in runs if run.evaluations.answers is not None]
    return [(name, cells) for name, cells in found if cells]


def _reward_maps(runs: Sequence[RunRecord]) -> list[tuple[str, Cells]]:
    found = [(run.name, run.evaluations.preferences) for run in runs]
    return [
        (name, depth_cells(results))
        for name, results in found
        if results is not None and any(group.start is not None for group in results.by_depth)
    ]
