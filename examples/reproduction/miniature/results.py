"""What `runs.jsonl` holds, as numbers that tables and pictures share."""

import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_solopo.train.alarms import WINDOW, StepMetrics, gap_closes_from_below
from miniature.evaluate import LENGTHS
from miniature.pairs import SHORT_LENGTH
from miniature.plan import DEFAULT_ALPHA
from miniature.runs import LEARNING_RATE, LONG_LENGTH, Run

LONG_LENGTHS = tuple(length for length in LENGTHS if length >= LONG_LENGTH)
"""From the long contexts of training on."""
HARM = 0.1
"""A run did harm where it lost this share of its base's short accuracy."""


@dataclass(frozen=True)
class Result:
    """One line of `runs.jsonl`."""

    run: Run
    accuracy: dict[int, float]
    """By context length."""
    recorded: dict[str, Any]
    """All else: tokens, flops, step_seconds, trajectories."""

    @property
    def short(self) -> float:
        """Accuracy at the length of the short contexts."""
        return self.accuracy[SHORT_LENGTH]

    @property
    def long(self) -> float:
        """Mean accuracy over `LONG_LENGTHS`."""
        return statistics.fmean(self.accuracy[length] for length in LONG_LENGTHS)

    @property
    def is_default(self) -> bool:
        """Trained as the paper has it, or a baseline."""
        run = self.run
        as_usual = not run.detach_short and run.learning_rate == LEARNING_RATE
        as_usual = as_usual and run.rank is None and run.token_weight is None
        return as_usual and run.alpha in (None, DEFAULT_ALPHA.get(run.loss_type))

    def warned_at(self) -> int | None:
        """The step at which the trainer's warning begins, None without one."""
        trajectories = self.recorded["trajectories"]
        steps: list[StepMetrics] = [
            dict(zip(trajectories, values, strict=True)) for values in zip(*trajectories.values(), strict=True)
        ]
        for end in range(1, len(steps) + 1):
            if gap_closes_from_below(steps[max(0, end - WINDOW) : end]):
                return end
        return None


class Results:
    """All runs."""

    def __init__(self, path: Path) -> None:
        self._all = [_parse(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
        self._bases = {(each.run.strength, each.run.seed): each for each in self._all if each.run.method == "base"}

    def where(self, condition: Callable[[Result], bool]) -> list[Result]:
        """Those for which `condition` holds, by seed."""
        return sorted(filter(condition, self._all), key=lambda each: each.run.seed)

    def base_of(self, result: Result) -> Result:
        """The model that the run began with."""
        return self._bases[result.run.strength, result.run.seed]

    def harmed(self, result: Result) -> bool:
        """Whether short accuracy was lost."""
        return self.lost(result) >= HARM

    def lost(self, result: Result) -> float:
        """Share of its base's short accuracy that a run lost."""
        return 1 - result.short / self.base_of(result).short


def _parse(line: dict[str, Any]) -> Result:
    fields = Run.__dataclass_fields__
    run = Run(**{name: value for name, value in line.items() if name in fields})
    accuracy = {int(length): value for length, value in line["accuracy"].items()}
    recorded = {name: value for name, value in line.items() if name not in fields and name not in ("accuracy", "name")}
    return Result(run, accuracy, recorded)


def spread(values: Iterable[float], digits: int = 2) -> str:
    """Mean and sample standard deviation over the seeds: "0.76 ± 0.03"."""
    numbers = list(values)
    if not numbers:
        return "-"
    deviation = f" ± {statistics.stdev(numbers):.{digits}f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.{digits}f}{deviation}"


def paired(left: Sequence[float], right: Sequence[float]) -> str:
    """Mean and sample standard deviation of the differences, seed by seed."""
    numbers = [a - b for a, b in zip(left, right, strict=True)]
    deviation = f" ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):+.2f}{deviation}"
