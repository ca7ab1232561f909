"""The tables of the page: verdict and cost. They mark the best value of a column, and those that may be as good."""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from megatron_solopo.architecture.adapters import num_adapter_parameters, target_modules
from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.errors import UserError
from megatron_solopo.report.figure import LengthPoint, short_length
from megatron_solopo.report.runs import RunRecord, mean_answer_points, status_of
from megatron_solopo.results.long_context import LongContextResults
from megatron_solopo.results.preference import PreferenceResults

Mark = Literal["", "best", "even"]
_EMPTY = "–"  # noqa: RUF001  (an en dash)


@dataclass(frozen=True)
class TableValue:
    """A value of a table. A value that is no estimate has only its text."""

    text: str
    interval: str = ""
    mean: float | None = None
    low: float | None = None
    high: float | None = None
    mark: Mark = ""

    def __str__(self) -> str:
        return f"{self.text} [{self.interval}]" if self.interval else self.text


@dataclass(frozen=True)
class RunTable:
    """A table with one row for each run."""

    columns: list[str]
    rows: list[tuple[str, list[TableValue]]]


TableColumn = tuple[str, bool, Callable[[RunRecord], TableValue]]
"""Title, whether its highest value is the best, and a function from a run to its value."""
_MISSING = TableValue(_EMPTY)


def verdict_table(runs: Sequence[RunRecord]) -> RunTable:
    """How each run ended, and how well its model does."""
    columns: list[TableColumn] = [
        ("status", False, lambda run: TableValue(status_of(run).word)),
        ("steps", False, lambda run: TableValue(f"{run.last_step:,}")),
    ]
    if any(key.startswith("lora.") for run in runs for key, value in run.config.items() if value is not None):
        columns.append(("trained", False, lambda run: TableValue(_trained(run))))
    lengths = _common_lengths(runs)
    for length in dict.fromkeys((lengths[0], lengths[-1]) if lengths else ()):
        title = f"accuracy at {short_length(length)}"
        columns.append((title, True, partial(_answers, length=length)))
    is_ranked = _have_same_triplets(runs)
    columns += [
        ("reward accuracy, short", is_ranked, lambda run: _preference(run, "rewards/accuracies_short")),
        ("reward accuracy, long", is_ranked, lambda run: _preference(run, "rewards/accuracies_long")),
        ("SoLo gap", False, lambda run: _preference(run, "solo_ra/gap_abs")),
        ("last loss", False, lambda run: _last(run, "loss")),
    ]
    return _table(runs, columns)


def _trained(run: RunRecord) -> str:
    """What a run trains: the whole model, or adapters and how large they are."""
    if not run.config:
        return "unknown"
    if (lora := run.lora) is None:
        has_adapters = any(key.startswith("lora.") for key, value in run.config.items() if value is not None)
        return "adapters of unknown settings" if has_adapters else "whole model"
    text = f"LoRA, rank {lora.rank}, {' '.join(target_modules(lora))}"
    try:
        count = num_adapter_parameters(read_architecture(Path(run.config["model.path"])), lora)
    except (UserError, OSError):  # the model has gone
        return text
    return f"{text}: {count:,} parameters"


def cost_table(runs: Sequence[RunRecord]) -> RunTable:
    """Cost of the recorded steps, without evaluation, checkpoints and the reference pass."""
    columns: list[TableColumn] = [
        ("tokens", False, lambda run: _text_of(run.total("num_tokens"), lambda value: f"{value:,.0f}")),
        ("model FLOPs", False, lambda run: _text_of(run.total("flops"), _flops)),
        ("time of steps", False, lambda run: _text_of(run.total("step_time"), _duration)),
        ("process-hours", False, lambda run: _text_of(_process_hours(run), lambda value: f"{value:,.3g}")),
        ("tokens per second", False, lambda run: _text_of(_tokens_per_second(run), lambda value: f"{value:,.0f}")),
        ("MFU", False, lambda run: _text_of(_mean(run, "mfu"), lambda value: f"{value:.1%}")),
        (
            "peak memory",
            False,
            lambda run: _text_of(_maximum(run, "peak_memory_bytes"), lambda value: f"{value / 2**30:.2f} GiB"),
        ),
        ("wait for the slowest rank", False, _wait_for_slowest),
    ]
    return _table(runs, columns)


def verdict_sentences(runs: Sequence[RunRecord]) -> list[str]:
    """Say which run is best at the longest context that all have in common, and whether that may be chance."""
    sentences = []
    lengths = _common_lengths(runs)
    if not _have_same_questions(runs):
        sentences.append("The runs did not all answer the same questions, so their accuracies do not compare.")
    elif lengths:
        scores = [(run.name, value) for run in runs if (value := _answers(run, lengths[-1])).mean is not None]
        sentences.append(_compare(f"At {lengths[-1]:,} tokens", "accuracy", scores))
    rewards = [
        (run.name, value) for run in runs if (value := _preference(run, "rewards/accuracies_long")).mean is not None
    ]
    if not _have_same_triplets(runs):
        sentences.append("The runs were evaluated on different triplets, so their reward accuracies do not compare.")
    elif rewards:
        sentences.append(_compare("On held-out triplets", "reward accuracy behind the long context", rewards))
    return sentences


def _compare(where: str, what: str, scores: Sequence[tuple[str, TableValue]]) -> str:
    (name, best), *others = sorted(scores, key=lambda each: -(each[1].mean or 0.0))
    said = f"{where}, {name} has {'the highest ' if others else ''}{what}, {best}."
    if not others:
        return said
    even = [other for other, value in others if _may_be_equal(best, value)]
    if even:
        return f"{said} The interval of its difference to {' and '.join(even)} holds 0: chance may have decided."
    return f"{said} No interval of its difference to another run holds 0; {others[0][0]} follows with {others[0][1]}."


def _table(runs: Sequence[RunRecord], columns: Sequence[TableColumn]) -> RunTable:
    """Build a table without the columns that are empty for all runs."""
    found = [(title, _mark_best([value(run) for run in runs], is_ranked)) for title, is_ranked, value in columns]
    kept = [(title, values) for title, values in found if any(value.text != _EMPTY for value in values)]
    rows = [(run.name, [values[place] for _, values in kept]) for place, run in enumerate(runs)]
    return RunTable([title for title, _ in kept], rows)


def _mark_best(values: list[TableValue], is_ranked: bool) -> list[TableValue]:
    known = [value for value in values if value.mean is not None]
    if not is_ranked or len({value.mean for value in known}) < 2:
        return values
    best = max(known, key=lambda value: value.mean or 0.0)

    def mark(value: TableValue) -> Mark:
        if value.mean is None:
            return ""
        return "best" if value.mean == best.mean else "even" if _may_be_equal(best, value) else ""

    return [replace(value, mark=mark(value)) for value in values]


def _may_be_equal(best: TableValue, other: TableValue) -> bool:
    """Whether the 95 % interval of the difference holds 0, by Newcombe (1998, method 10) from both means' intervals.

    The method takes the runs as independent. On the same questions they mostly make the same mistakes, so the interval
    is too wide rather than too narrow. Comparing the two intervals for overlap would be wrong: they may overlap
    although the difference is clear.
    """
    if best.mean is None or best.low is None or other.mean is None or other.high is None:
        return False
    return best.mean - other.mean <= math.hypot(best.mean - best.low, other.high - other.mean)


def _common_lengths(runs: Sequence[RunRecord]) -> list[int]:
    """Lengths at which all runs with answers have a mean over the same questions."""
    found = [run.evaluations.answers for run in runs if run.evaluations.answers is not None]
    if not found or not _have_same_questions(runs):
        return []
    lengths = [{point.length for point in mean_answer_points(each)} for each in found]
    return sorted(set.intersection(*lengths))


def _have_same_questions(runs: Sequence[RunRecord]) -> bool:
    """Whether all runs with answers were asked the same: tasks, files and the options that choose among them."""
    found = [run.evaluations.answers for run in runs if run.evaluations.answers is not None]

    def asked(results: LongContextResults) -> str:
        # The lengths of contexts are bounds of buckets. Those of tasks only add cells.
        chosen = ["seed", "samples", "depths", *(["lengths"] if results.settings.get("contexts") else [])]
        return repr((sorted(results.main_metrics.items()), [results.settings.get(name) for name in chosen]))

    # Files of older versions state no hashes.
    files = {tuple(sorted(each.files.values())) for each in found if each.files}
    return len({asked(each) for each in found}) < 2 and len(files) < 2


def _have_same_triplets(runs: Sequence[RunRecord]) -> bool:
    """Whether all runs whose rewards were evaluated were evaluated on the same triplets."""
    found = [run.evaluations.preferences for run in runs if run.evaluations.preferences is not None]
    return len({(each.data_fingerprint, each.split) for each in found}) < 2


def _answers(run: RunRecord, length: int) -> TableValue:
    results = run.evaluations.answers
    points: list[LengthPoint] = [] if results is None else mean_answer_points(results)
    return next((_share(point.mean, point.low, point.high) for point in points if point.length == length), _MISSING)


def _preference(run: RunRecord, name: str) -> TableValue:
    results: PreferenceResults | None = run.evaluations.preferences
    if results is None or name not in results.overall.metrics:
        return _MISSING
    found = results.overall.metrics[name]
    if name.startswith("rewards/accuracies"):
        return _share(found.mean, found.low, found.high)
    interval = "" if found.low is None or found.high is None else f"{found.low:.3g}, {found.high:.3g}"
    return TableValue(f"{found.mean:.3g}", interval, found.mean, found.low, found.high)


def _share(mean: float, low: float | None, high: float | None) -> TableValue:
    interval = "" if low is None or high is None else f"{100 * low:.0f}, {100 * high:.0f}"
    return TableValue(f"{mean:.1%}", interval, mean, low, high)


def _last(run: RunRecord, name: str) -> TableValue:
    values = run.series(name)[1]
    return TableValue(f"{values[-1]:.4g}") if values else _MISSING


def _text_of(value: float | None, text: Callable[[float], str]) -> TableValue:
    return _MISSING if value is None else TableValue(text(value), mean=value)


def _wait_for_slowest(run: RunRecord) -> TableValue:
    """The mean share of a step that replicas waited, and the rank that they waited for most often."""
    share, ranks = _mean(run, "straggler_share"), run.series("straggler_rank")[1]
    if share is None or not ranks:
        return _MISSING
    rank, count = Counter(ranks).most_common(1)[0]
    return TableValue(f"{share:.1%} (rank {rank:.0f} in {count / len(ranks):.0%} of steps)", mean=share)


def _process_hours(run: RunRecord) -> float | None:
    hours = [
        step["step_time"] * step["num_processes"] / 3600
        for step in run.steps
        if step.get("step_time") is not None and step.get("num_processes") is not None
    ]
    return sum(hours) if hours else None


def _tokens_per_second(run: RunRecord) -> float | None:
    tokens, seconds = run.total("num_tokens"), run.total("step_time")
    return tokens / seconds if tokens and seconds else None


def _mean(run: RunRecord, name: str) -> float | None:
    values = run.series(name)[1]
    return sum(values) / len(values) if values else None


def _maximum(run: RunRecord, name: str) -> float | None:
    return max(run.series(name)[1], default=None)


def _flops(value: float) -> str:
    for size, unit in ((1e21, "ZFLOP"), (1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value:,.0f} FLOP"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}"
