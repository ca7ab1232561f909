"""The evaluations that lie in a run's directory, and which of them a page shows."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from megatron_solopo.evaluation_results import EVALUATION_FOLDER, LongContextResults, read_long_context
from megatron_solopo.report.axes import Point
from megatron_solopo.report.preference_results import PreferenceResults, read_preference

Result = TypeVar("Result", LongContextResults, PreferenceResults)


@dataclass(frozen=True)
class Evaluations:
    """Of one run: each the newest checkpoint's, and of the model before training where that was evaluated too."""

    answers: LongContextResults | None = None
    preferences: PreferenceResults | None = None
    answers_before: LongContextResults | None = None
    preferences_before: PreferenceResults | None = None


def read_evaluations(run_dir: Path, base: str | None, notes: list[str]) -> Evaluations:
    """Read `<run_dir>/evaluation/*.json`; what cannot be read, or is not shown, goes into the notes.

    Args:
        base: the model that the run started from, as its config names it.
    """
    found = read_files(sorted((run_dir / EVALUATION_FOLDER).glob("*.json")), notes)
    shown = chosen(found, base)
    kept = [shown.answers, shown.preferences, shown.answers_before, shown.preferences_before]
    if left := [each.name for each in found if not any(each is one for one in kept)]:
        notes.append(
            f"Not shown: {', '.join(left)} in {EVALUATION_FOLDER}; of the run, and of the model before it, the newest "
            "of each kind is."
        )
    return shown


def read_files(paths: Sequence[Path], notes: list[str]) -> list[LongContextResults | PreferenceResults]:
    """Results of either kind; files of another kind are left alone."""
    found: list[LongContextResults | PreferenceResults] = []
    for path in paths:
        try:
            content = json.loads(path.read_bytes())
            kind = content.get("kind") if isinstance(content, dict) else None
            if kind == "long_context":
                found.append(read_long_context(path))
            elif kind == "preference":
                found.append(read_preference(path))
        except (OSError, ValueError) as error:
            reason = "not valid JSON" if isinstance(error, json.JSONDecodeError) else str(error)
            notes.append(f"{EVALUATION_FOLDER}/{path.name} was left out: {reason}")
    return found


def chosen(results: Sequence[LongContextResults | PreferenceResults], base: str | None) -> Evaluations:
    """The newest of each kind; of the model before training those of `base`, which an export of the run is not."""
    answers = [each for each in results if isinstance(each, LongContextResults)]
    preferences = [each for each in results if isinstance(each, PreferenceResults)]
    return Evaluations(
        _newest([each for each in answers if each.step is not None]),
        _newest([each for each in preferences if each.step is not None]),
        _newest([each for each in answers if _is_of(each, base)]),
        _newest([each for each in preferences if _is_of(each, base)]),
    )


def _is_of(results: Result, base: str | None) -> bool:
    return results.step is None and base is not None and Path(results.model).resolve() == Path(base).resolve()


def _newest(results: Sequence[Result]) -> Result | None:
    return max(results, key=lambda each: (each.step or 0, each.created), default=None)


def answer_points(results: LongContextResults, task: str) -> list[Point]:
    """A task's main score by length."""
    cells = (results.cell(task, results.main_metrics[task], length=length) for length in results.lengths)
    return [Point(each.length or 0, each.score, each.low, each.high, each.n) for each in cells if each is not None]


def common_tasks(found: Iterable[LongContextResults]) -> list[str]:
    """Tasks that all results have, with the same main metric."""
    first, *others = [each.main_metrics for each in found] or [{}]
    return [task for task, metric in first.items() if all(other.get(task) == metric for other in others)]


def mean_answer_points(results: LongContextResults, tasks: Sequence[str] | None = None) -> list[Point]:
    """Mean over the tasks (None: all), each weighing the same, at the lengths that all of them have.

    The tasks' samples are independent, so that the half-widths of their intervals add in squares.
    """
    by_task = [
        {point.length: point for point in answer_points(results, task)} for task in tasks or results.main_metrics
    ]
    points = []
    for length in results.lengths:
        here = [points_of[length] for points_of in by_task if length in points_of]
        if here and len(here) == len(by_task):
            mean = sum(point.mean for point in here) / len(here)
            below = sum((point.mean - point.low) ** 2 for point in here) ** 0.5 / len(here)
            above = sum((point.high - point.mean) ** 2 for point in here) ** 0.5 / len(here)
            points.append(Point(length, mean, mean - below, mean + above, sum(point.count for point in here)))
    return points


def answer_cells(
    results: LongContextResults, tasks: Sequence[str] | None = None
) -> dict[tuple[int, float], tuple[float, int]]:
    """(length, depth) -> score, samples: mean over the tasks (None: all) that have it, weighing the same."""
    found: dict[tuple[int, float], tuple[float, int]] = {}
    for length in results.lengths:
        for depth in results.depths:
            places = (
                results.cell(task, results.main_metrics[task], length=length, depth=depth)
                for task in tasks or results.main_metrics
            )
            cells = [each for each in places if each is not None]
            if count := sum(each.n for each in cells):
                found[length, depth] = (sum(each.score for each in cells) / len(cells), count)
    return found
