"""How a run ended, in a word and a sentence."""

import statistics
from dataclasses import dataclass
from typing import Literal

from megatron_solopo.report.runs import Run, is_finite

Word = Literal["finished", "unfinished", "diverged", "not started", "steps unknown"]

_WATCHED = ("loss", "po_loss", "grad_norm")
_LEAST_STEPS = 20
_ROSE = 2.0


@dataclass(frozen=True)
class Status:
    """What the page says of a run."""

    word: Word
    sentence: str


def status_of(run: Run) -> Status:
    """From what was recorded; a run that is still going and one that was stopped look alike."""
    if not run.steps:
        return Status("not started", "No step was recorded.")
    for step in run.steps:
        broken = [f"{name} is {step[name]}" for name in _WATCHED if _is_broken(step.get(name))]
        if broken:
            return Status("diverged", f"At step {step['step']} {', '.join(broken)}.")
    if rose := _rose(run):
        return Status("diverged", rose)
    if run.total_steps is None:
        return Status("steps unknown", f"{run.last_step:,} steps recorded; how many were asked for is not known.")
    if run.last_step < run.total_steps:
        return Status("unfinished", f"{run.last_step:,} of {run.total_steps:,} steps: still running, or stopped.")
    return Status("finished", f"All {run.total_steps:,} steps.")


def _is_broken(value: object) -> bool:
    return isinstance(value, float) and not is_finite(value)


def _rose(run: Run) -> str:
    """Compares medians of the first and the last tenth: a single spike is no divergence."""
    losses = run.series("loss")[1]
    if len(losses) < _LEAST_STEPS:
        return ""
    tenth = len(losses) // 10
    first, last = statistics.median(losses[:tenth]), statistics.median(losses[-tenth:])
    if last <= _ROSE * max(first, 0.1):
        return ""
    return f"The loss rose from {first:.3g} to {last:.3g} (medians of the first and the last tenth of the steps)."
