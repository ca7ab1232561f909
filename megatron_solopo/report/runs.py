"""Reads run directories as they are: finished or not, whole or damaged. Says how each run ended and what differs.

What cannot be read becomes a note of the run, which the page shows.
"""

import json
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import ValidationError

from megatron_solopo.config import LoRAConfig, TrainingConfig, dotted
from megatron_solopo.errors import UserError
from megatron_solopo.files import counted, first_few
from megatron_solopo.report.figure import LengthPoint
from megatron_solopo.results.long_context import LongContextResults, read_long_context
from megatron_solopo.results.preference import PreferenceResults, read_preference
from megatron_solopo.results.results_file import EVALUATION_FOLDER
from megatron_solopo.run_directory import METRICS, RUN_CONFIG

_MANIFEST = "manifest.json"
_MIN_STEPS_TO_JUDGE = 20
_DIVERGENCE_FACTOR = 2.0
_ABSENT = object()

Result = TypeVar("Result", LongContextResults, PreferenceResults)
RecordedStep = dict[str, Any]
StatusWord = Literal["finished", "unfinished", "diverged", "not started", "steps unknown"]


@dataclass(frozen=True)
class Evaluations:
    """The evaluations of one run that a page shows: of its newest checkpoint, and of the model before training."""

    answers: LongContextResults | None = None
    preferences: PreferenceResults | None = None
    answers_before: LongContextResults | None = None
    preferences_before: PreferenceResults | None = None


@dataclass(frozen=True)
class RunRecord:
    """What one run directory holds."""

    path: Path
    name: str
    """The shortest end of its path that no other run of the page has."""
    config: dict[str, Any]
    """Settings by dotted key; empty without a config.yaml."""
    steps: list[RecordedStep]
    """Readable lines of metrics.jsonl, by step. Values that are not finite are kept."""
    total_steps: int | None
    """Steps that the run was asked for; None if neither its config nor its data say."""
    evaluations: Evaluations
    notes: list[str] = field(default_factory=list)
    """What was wrong with its files, one sentence each."""

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and finite values of a metric."""
        points = [(int(step["step"]), float(step[name])) for step in self.steps if _is_finite(step.get(name))]
        return [place for place, _ in points], [value for _, value in points]

    def total(self, name: str) -> float | None:
        """Sum of a metric over the steps; None if no step has it."""
        values = self.series(name)[1]
        return sum(values) if values else None

    @property
    def lora(self) -> LoRAConfig | None:
        """Settings of its adapters; None if it has none, or if its config cannot be read."""
        found = {key.removeprefix("lora."): value for key, value in self.config.items() if key.startswith("lora.")}
        try:
            return LoRAConfig.model_validate(found) if found else None
        except (ValidationError, UserError):
            return None

    @property
    def last_step(self) -> int:
        """The last recorded step; 0 before the first."""
        return int(self.steps[-1]["step"]) if self.steps else 0


def _is_finite(value: Any) -> bool:
    """Whether a value is a number other than NaN and infinity."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_runs(paths: Sequence[Path]) -> list[RunRecord]:
    """Read run directories. Raises UserError that names the first path that is no run, or that is given twice."""
    resolved = [path.resolve() for path in paths]
    for path, place in zip(paths, resolved, strict=True):
        if resolved.count(place) > 1:
            raise UserError(f"{path}: is named twice; name each run once")
        _check_is_run(path)
    return [_read_run(path, name) for path, name in zip(paths, _shortest_names(resolved), strict=True)]


def _check_is_run(path: Path) -> None:
    if not path.is_dir():
        found = "is a file" if path.exists() else "no such directory"
        raise UserError(f"{path}: {found}; name the run_dir of a training run")
    if not (path / RUN_CONFIG).is_file() and not (path / METRICS).is_file():
        inside = [each.parent.name for each in sorted(path.glob(f"*/{METRICS}"))]
        meant = f"; did you mean {', '.join(str(path / name) for name in inside[:3])}?" if inside else ""
        raise UserError(f"{path}: is no run directory, it holds neither {RUN_CONFIG} nor {METRICS}{meant}")


def _shortest_names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as make the names different."""
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _read_run(path: Path, name: str) -> RunRecord:
    notes: list[str] = []
    config = _read_config(path / RUN_CONFIG, notes)
    steps = _read_steps(path / METRICS, notes)
    evaluations = _read_evaluations(path, config.get("model.path"), notes)
    return RunRecord(path, name, config, steps, _total_steps(config), evaluations, notes)


def _read_config(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{path.name} is missing: its settings are not known.")
        return {}
    except (yaml.YAMLError, UnicodeDecodeError):
        notes.append(f"{path.name} cannot be read: its settings are not known.")
        return {}
    return dict(dotted(loaded)) if isinstance(loaded, dict) else {}


def _read_steps(path: Path, notes: list[str]) -> list[RecordedStep]:
    """Every readable line. If two lines have the same step, as after a restart, the last one counts."""
    if not path.is_file():
        notes.append(f"{path.name} is missing: no step was recorded.")
        return []
    steps: dict[int, RecordedStep] = {}
    damaged = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            step = json.loads(line)
            steps[int(step["step"])] = step
        except (ValueError, TypeError, KeyError):
            damaged.append(number)
    if damaged:
        notes.append(f"{path.name}: {counted(len(damaged), 'damaged line')} left out ({first_few(damaged)}).")
    return [steps[step] for step in sorted(steps)]


def _total_steps(config: dict[str, Any]) -> int | None:
    """`training.max_steps`, or the epochs over the prepared data; None if some of them are not there any more."""
    if isinstance(steps := config.get("training.max_steps"), int):
        return steps
    try:
        paths = [source["path"] for source in config.get("data.sources") or [{"path": config["data.path"]}]]
        rows = sum(int(json.loads((Path(str(path)) / _MANIFEST).read_bytes())["train"]) for path in paths)
        return math.ceil(float(config["training.num_train_epochs"]) * rows / int(config["training.global_batch_size"]))
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


def _read_evaluations(run_dir: Path, base: str | None, notes: list[str]) -> Evaluations:
    """Read `<run_dir>/evaluation/*.json`. Files that are damaged or not shown get a note.

    Args:
        base: the model that the run started from, as its config names it.
    """
    found: list[LongContextResults | PreferenceResults] = []
    for path in sorted((run_dir / EVALUATION_FOLDER).glob("*.json")):
        try:
            content = json.loads(path.read_bytes())
            kind = content.get("kind") if isinstance(content, dict) else None
            if kind == "long_context":
                found.append(read_long_context(path))
            elif kind == "preference":
                found.append(read_preference(path))
        except (json.JSONDecodeError, UnicodeDecodeError):
            notes.append(f"{EVALUATION_FOLDER}/{path.name} was left out: not valid JSON")
        except (OSError, UserError) as error:
            notes.append(f"{EVALUATION_FOLDER}/{path.name} was left out: {error}")
    answers = [each for each in found if isinstance(each, LongContextResults)]
    preferences = [each for each in found if isinstance(each, PreferenceResults)]
    shown = Evaluations(
        _newest([each for each in answers if each.step is not None]),
        _newest([each for each in preferences if each.step is not None]),
        _newest([each for each in answers if _is_of_base(each, base)]),
        _newest([each for each in preferences if _is_of_base(each, base)]),
    )
    kept = (shown.answers, shown.preferences, shown.answers_before, shown.preferences_before)
    if left := [each.name for each in found if not any(each is one for one in kept)]:
        notes.append(
            f"Not shown: {', '.join(left)} in {EVALUATION_FOLDER}. The page shows the newest of each kind, of the run "
            "and of the model before it."
        )
    return shown


def _is_of_base(results: Result, base: str | None) -> bool:
    """Whether results are of the model before training. An export of the run is not that model."""
    return results.step is None and base is not None and Path(results.model).resolve() == Path(base).resolve()


def _newest(results: Sequence[Result]) -> Result | None:
    return max(results, key=lambda each: (each.step or 0, each.created), default=None)


@dataclass(frozen=True)
class RunStatus:
    """How a run ended, in a word and in a sentence."""

    word: StatusWord
    sentence: str


def status_of(run: RunRecord) -> RunStatus:
    """The status by what was recorded. A run that still goes on and one that was stopped look alike."""
    if not run.steps:
        return RunStatus("not started", "No step was recorded.")
    broken = sum(map(_is_broken, run.steps))
    of_broken = f" In {counted(broken, 'step')} the loss or the gradient was not finite." if broken else ""
    if run.last_step != run.total_steps and _gave_up(run):
        return RunStatus("diverged", f"It ends at step {run.last_step:,}.{of_broken}")
    if risen := _describe_divergence(run):
        return RunStatus("diverged", risen + of_broken)
    if run.total_steps is None:
        recorded = f"{run.last_step:,} steps recorded; how many were asked for is not known."
        return RunStatus("steps unknown", recorded + of_broken)
    if run.last_step < run.total_steps:
        recorded = f"{run.last_step:,} of {run.total_steps:,} steps: still running, or stopped."
        return RunStatus("unfinished", recorded + of_broken)
    return RunStatus("finished", f"All {run.total_steps:,} steps.{of_broken}")


def _gave_up(run: RunRecord) -> bool:
    """Whether so many steps in a row were skipped that the run ended. The last of them has no line.

    Megatron-LM's own loop skips none, and ends at the first.
    """
    in_a_row = sum(1 for _ in takewhile(_is_broken, reversed(run.steps)))
    default = TrainingConfig.model_fields["max_skipped_steps_in_a_row"].default
    most = run.config.get("training.max_skipped_steps_in_a_row", default) if "skipped" in run.steps[-1] else 1
    return in_a_row >= max(1, most - 1)


def _is_broken(step: RecordedStep) -> bool:
    """Whether the loss or the gradient was not finite. Our trainer skips such a step, Megatron-LM's writes null."""
    return bool(step["skipped"]) if "skipped" in step else step.get("loss", 0.0) is None


def _describe_divergence(run: RunRecord) -> str:
    """A sentence if the loss rose. It compares medians, because a single spike is no divergence."""
    losses = run.series("loss")[1]
    if len(losses) < _MIN_STEPS_TO_JUDGE:
        return ""
    tenth = len(losses) // 10
    first, last = statistics.median(losses[:tenth]), statistics.median(losses[-tenth:])
    if last <= _DIVERGENCE_FACTOR * max(first, 0.1):
        return ""
    return f"The loss rose from {first:.3g} to {last:.3g} (medians of the first and the last tenth of the steps)."


def config_differences(runs: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Dotted keys that are not the same in all runs, each with every run's value. `run_dir` is left out."""
    known = [run for run in runs if run.config]
    keys = dict.fromkeys(key for run in known for key in run.config)
    differing = [
        key for key in keys if key != "run_dir" and len({repr(run.config.get(key, _ABSENT)) for run in known}) > 1
    ]
    return [(key, [_setting_text(run, key) for run in runs]) for key in differing]


def _setting_text(run: RunRecord, key: str) -> str:
    if not run.config:
        return "unknown"
    value: Any = run.config.get(key, _ABSENT)
    if value is _ABSENT:
        return "no such key"  # a run of another version
    if key == "data.sources" and value:
        return "; ".join(
            ", ".join(f"{name} {part}" for name, part in source.items() if part is not None) for source in value
        )
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def answer_points(results: LongContextResults, task: str) -> list[LengthPoint]:
    """A task's main score by length."""
    cells = (results.cell(task, results.main_metrics[task], length=length) for length in results.lengths)
    return [
        LengthPoint(each.length or 0, each.score, each.low, each.high, each.n) for each in cells if each is not None
    ]


def common_tasks(found: Iterable[LongContextResults]) -> list[str]:
    """Tasks that all results have, with the same main metric."""
    first, *others = [each.main_metrics for each in found] or [{}]
    return [task for task, metric in first.items() if all(other.get(task) == metric for other in others)]


def mean_answer_points(results: LongContextResults, tasks: Sequence[str] | None = None) -> list[LengthPoint]:
    """Mean over the tasks (None: all) with equal weights, at the lengths that all of them have.

    The tasks' samples are independent. So the squares of the half-widths of their intervals add up.
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
            points.append(LengthPoint(length, mean, mean - below, mean + above, sum(point.count for point in here)))
    return points


def answer_cells(
    results: LongContextResults, tasks: Sequence[str] | None = None
) -> dict[tuple[int, float], tuple[float, int]]:
    """(length, depth) -> mean score and number of samples, over the tasks (None: all) that have the cell."""
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
