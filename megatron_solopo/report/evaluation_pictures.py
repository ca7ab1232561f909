"""The pictures of evaluations: accuracy by context length, and by the depth at which the evidence lay.

`draw_answers` and `draw_preference` draw one result into PNG files, for the evaluations. `accuracy_pictures` compares
runs, for the page.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_solopo.files import atomic_path, remove
from megatron_solopo.report.figure import (
    LIGHT,
    HeatMapCells,
    LengthPoint,
    Picture,
    Theme,
    add_legend,
    draw_banded_line,
    draw_heat_map,
    draw_heat_maps,
    empty_figure,
    scale_by_length,
    short_length,
    style_axes,
)
from megatron_solopo.report.runs import RunRecord, answer_cells, answer_points, common_tasks, mean_answer_points
from megatron_solopo.results.long_context import LongContextResults
from megatron_solopo.results.preference import PreferenceResults
from megatron_solopo.results.results_file import MeanWithInterval

_DPI = 150
_MAPS_PER_ROW = 3
_TASKS_PER_ROW = 4
_BANDS = "Bands are 95 % confidence intervals."
_LONG, _SHORT = "rewards/accuracies_long", "rewards/accuracies_short"

Curve = tuple[str, int | None, Sequence[LengthPoint]]
"""Label, the run's place (None: the model before training), points."""


def draw_answers(results: LongContextResults, by_length: Path, by_depth: Path) -> None:
    """Draw the results of `evaluate long-context` into PNG files. Removes `by_depth` if no task has depths."""
    drawn = empty_figure(LIGHT, 9.5, 4.6)
    axis = drawn.add_subplot()
    style_axes(axis, LIGHT, results.name, "tokens of the prompt", "mean score, 95 % interval")
    for place, (task, metric) in enumerate(results.main_metrics.items()):
        if points := answer_points(results, task):
            draw_banded_line(axis, points, LIGHT.colour(place), f"{task} ({metric})", place, LIGHT.line(place))
    axis.set_ylim(-0.03, 1.03)
    scale_by_length(axis, results.lengths)
    add_legend(axis, LIGHT)
    _save(drawn, by_length)
    maps = [(f"{task} ({metric})", _depth_map(results, [task])) for task, metric in results.main_metrics.items()]
    if maps := [(title, cells) for title, cells in maps if cells]:
        axes = ("tokens of the prompt", "depth of the evidence, 0 is the start")
        _save(draw_heat_maps(LIGHT, maps, *axes, across=min(len(maps), _MAPS_PER_ROW)), by_depth)
    else:
        remove(by_depth)


def _depth_map(results: LongContextResults, tasks: Sequence[str] | None = None) -> HeatMapCells:
    """Mean score over the tasks (None: all) by length and depth; empty if none of them has depths."""
    return {
        (short_length(length), f"{depth:.2f}"): cell for (length, depth), cell in answer_cells(results, tasks).items()
    }


def _save(drawn: Figure, path: Path) -> None:
    with atomic_path(path) as temporary:
        drawn.savefig(temporary, format="png", dpi=_DPI)


def draw_preference(results: PreferenceResults, path: Path) -> None:
    """Draw the results of `evaluate preference` into a PNG file: accuracy, SoLo gap, and accuracy by depth."""
    drawn = empty_figure(LIGHT, 15, 4.6)
    x = "tokens of the long context, up to"
    by_length, by_gap, by_depth = drawn.subplots(1, 3)
    style_axes(by_length, LIGHT, "Reward accuracy by length", x, "chosen over rejected")
    for place, context in enumerate(("short", "long")):
        if points := _metric_points(results, f"rewards/accuracies_{context}"):
            draw_banded_line(by_length, points, LIGHT.colour(place), f"{context} context", place)
    by_length.set_ylim(-0.03, 1.03)
    style_axes(by_gap, LIGHT, "SoLo gap of the chosen answer", x, "reward, short minus long")
    for place, (name, label) in enumerate((("solo_ra/gap_signed", "signed"), ("solo_ra/gap_abs", "absolute"))):
        if points := _metric_points(results, name):
            draw_banded_line(by_gap, points, LIGHT.colour(place + 2), label, place + 2)
    for axis in (by_length, by_gap):
        scale_by_length(axis, [group.up_to for group in results.by_length])
        add_legend(axis, LIGHT)
    style_axes(by_depth, LIGHT, "Long-context accuracy by depth", x, "depth of the evidence")
    draw_heat_map(by_depth, LIGHT, _reward_depth_map(results))
    drawn.savefig(path, format="png", dpi=_DPI)


def _metric_points(results: PreferenceResults, name: str) -> list[LengthPoint]:
    """A metric by length; empty if the result lacks it. Plain pairs have no metrics of the long context."""
    return [
        LengthPoint(group.up_to, *_values(group.metrics[name]), group.n)
        for group in results.by_length
        if name in group.metrics
    ]


def _values(estimate: MeanWithInterval) -> tuple[float, float, float]:
    """Mean, low and high. An unknown interval becomes NaN, which is not drawn."""
    low, high = (math.nan if end is None else end for end in (estimate.low, estimate.high))
    return estimate.mean, low, high


def _reward_depth_map(results: PreferenceResults) -> HeatMapCells:
    """Reward accuracy on the long context by length and depth. Plain pairs have only one context."""
    cells = {}
    for group in results.by_length_and_depth:
        accuracy = group.metrics.get("rewards/accuracies_long") or group.metrics["rewards/accuracies_short"]
        depth = "unknown" if group.start is None else f"{group.start:.1f} to {group.end:.1f}"
        cells[short_length(group.up_to), depth] = (accuracy.mean, group.n)
    return cells


def accuracy_pictures(runs: Sequence[RunRecord]) -> Iterator[Picture]:
    """The pictures for which some run has an evaluation."""
    tasks = list(dict.fromkeys(task for run in runs for task in _tasks(run)))
    common = common_tasks(_all_answers(runs))
    answers = _answer_curves(runs, common) if common else []
    if answers:
        what = common[0] if len(common) == 1 else f"the mean over {len(common)} tasks"
        what += " that all have" if len(common) < len(tasks) else ""
        yield Picture(
            "accuracy-by-length",
            "Accuracy against context length",
            f"Share of right answers, {what}, against the length of the prompt in tokens. {_BANDS}",
            f"Accuracy by context length. {_describe_curves(answers)}",
            lambda theme: _draw_curves(theme, answers, "score"),
        )
    if len(tasks) > 1 or (tasks and not answers):
        yield Picture(
            "accuracy-by-task",
            "Accuracy against context length by task",
            f"Each task's own score; {_BANDS[0].lower()}{_BANDS[1:]}",
            f"Accuracy by context length for each of the tasks {', '.join(tasks)}.",
            lambda theme: _draw_by_task(theme, runs, tasks),
        )
    if preferences := _preference_curves(runs, _LONG):
        yield Picture(
            "reward-accuracy-by-length",
            "Reward accuracy against context length",
            "Share of held-out triplets whose chosen answer has the higher reward: solid behind the long context, "
            f"dotted behind the short one. {_BANDS}",
            f"Reward accuracy by context length. {_describe_curves(preferences)}",
            lambda theme: _draw_curves(theme, preferences, "reward accuracy", _preference_curves(runs, _SHORT)),
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
                partial(draw_heat_maps, maps=maps),
            )


def _answer_curves(runs: Sequence[RunRecord], tasks: Sequence[str]) -> list[Curve]:
    """Curves of every run that answered questions, then of the models that they started from, each once."""
    curves: list[Curve] = []
    starts = []
    for place, run in enumerate(runs):
        if (after := run.evaluations.answers) is not None:
            curves.append((run.name, place, mean_answer_points(after, tasks)))
        if (before := run.evaluations.answers_before) is not None:
            starts.append((run.name, before.model, mean_answer_points(before, tasks)))
    return [curve for curve in (*curves, *_curves_before_training(starts)) if curve[2]]


def _preference_curves(runs: Sequence[RunRecord], metric: str) -> list[Curve]:
    """Curves of every run whose preferences were evaluated, then of the models that they started from, each once.

    A policy that is its own reference has only equal rewards, so it has no curve.
    """
    curves: list[Curve] = []
    starts = []
    for place, run in enumerate(runs):
        if (after := run.evaluations.preferences) is not None:
            curves.append((run.name, place, _metric_points(after, metric)))
        before = run.evaluations.preferences_before
        if before is not None and before.overall.ties_short != before.overall.n:
            starts.append((run.name, before.model, _metric_points(before, metric)))
    return [curve for curve in (*curves, *_curves_before_training(starts)) if curve[2]]


def _curves_before_training(found: Iterable[tuple[str, str, Sequence[LengthPoint]]]) -> list[Curve]:
    """Curves of (run, model, points), equal ones once. If curves of one name differ, their labels name the run."""
    distinct: dict[tuple[str, tuple[LengthPoint, ...]], str] = {}
    for run, model, points in found:
        label = f"before training ({model.rstrip('/').rsplit('/', 1)[-1]})"
        distinct.setdefault((label, tuple(points)), run)
    counts = Counter(label for label, _ in distinct)
    return [
        (label if counts[label] == 1 else f"{label} of {run}", None, points)
        for (label, points), run in distinct.items()
    ]


def _all_answers(runs: Sequence[RunRecord]) -> list[LongContextResults]:
    """All answers after training and before it."""
    found = [each for run in runs for each in (run.evaluations.answers, run.evaluations.answers_before)]
    return [each for each in found if each is not None]


def _tasks(run: RunRecord) -> Iterable[str]:
    return run.evaluations.answers.main_metrics if run.evaluations.answers is not None else ()


def _describe_curves(curves: Sequence[Curve]) -> str:
    """The first and last point of every line, for readers who do not see it."""
    return " ".join(
        f"{label}: {points[0].mean:.2f} at {points[0].length:,} tokens, {points[-1].mean:.2f} at {points[-1].length:,}."
        for label, _, points in curves
    )


def _draw_curves(theme: Theme, curves: Sequence[Curve], y: str, dotted: Sequence[Curve] = ()) -> Figure:
    drawn = empty_figure(theme, 9.5, 4.6)
    axis = drawn.add_subplot()
    style_axes(axis, theme, x="context length in tokens", y=y)
    for label, place, points in curves:
        _draw_curve(axis, theme, label, place, points)
    for _, place, points in dotted:
        axis.plot(
            [point.length for point in points],
            [point.mean for point in points],
            ":",
            color=theme.muted if place is None else theme.colour(place),
            linewidth=1.5,
        )
    axis.set_ylim(-0.03, 1.03)
    scale_by_length(axis, [point.length for _, _, points in curves for point in points])
    add_legend(axis, theme)
    return drawn


def _draw_curve(axis: Axes, theme: Theme, label: str, place: int | None, points: Sequence[LengthPoint]) -> None:
    if place is None:
        draw_banded_line(axis, points, theme.muted, label, 5, "--")
    else:
        draw_banded_line(axis, points, theme.colour(place), label, place, theme.line(place))


def _draw_by_task(theme: Theme, runs: Sequence[RunRecord], tasks: Sequence[str]) -> Figure:
    rows = -(-len(tasks) // _TASKS_PER_ROW)
    drawn = empty_figure(theme, 12, 2.7 * rows + 0.4)
    axes = drawn.subplots(rows, min(_TASKS_PER_ROW, len(tasks)), squeeze=False, sharey=True).flat
    for axis, task in zip(axes, tasks, strict=False):
        style_axes(axis, theme, task)
        curves = [
            (run.name, place, answer_points(found, task))
            for place, run in enumerate(runs)
            if (found := run.evaluations.answers) is not None and task in found.main_metrics
        ]
        for label, place, points in curves:
            _draw_curve(axis, theme, label, place, points)
        axis.set_ylim(-0.03, 1.03)
        scale_by_length(axis, [point.length for _, _, points in curves for point in points])
    for axis in list(drawn.axes)[len(tasks) :]:
        axis.set_visible(False)
    add_legend(drawn.axes[0], theme)
    return drawn


def _answer_maps(runs: Sequence[RunRecord]) -> list[tuple[str, HeatMapCells]]:
    found = [(run.name, _depth_map(run.evaluations.answers)) for run in runs if run.evaluations.answers is not None]
    return [(name, cells) for name, cells in found if cells]


def _reward_maps(runs: Sequence[RunRecord]) -> list[tuple[str, HeatMapCells]]:
    found = [(run.name, run.evaluations.preferences) for run in runs]
    return [
        (name, _reward_depth_map(results))
        for name, results in found
        if results is not None and any(group.start is not None for group in results.by_depth)
    ]
