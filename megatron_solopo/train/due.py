"""When a run is saved: by steps, by the clock, and before a deadline."""

import os
import time
from collections.abc import Callable
from datetime import datetime

from megatron_solopo.config_checkpoint import CheckpointConfig
from megatron_solopo.parallel.agreement import on_rank_0

_SLURM_END = "SLURM_JOB_END_TIME"
# Until a save and a step have been timed.
_ASSUMED_SECONDS = 300.0
_MARGIN = 2.0


class SaveClock:
    """Says when a save is due. All ranks ask together; where the time decides, rank 0's clock does for all."""

    def __init__(
        self, config: CheckpointConfig, last_step: int, *, first_step: int = 0, now: Callable[[], float] = time.time
    ) -> None:
        """`last_step` is saved in any case; raises ValueError if the end of the SLURM job is asked for and unknown."""
        self._config, self._last_step, self._now = config, last_step, now
        self._deadline = deadline(config)
        self._saved_at = self._stepped_at = now()
        self._slowest_step: float | None = None
        self._slowest_save: float | None = None
        self._is_timed = config.every_minutes is not None or self._deadline is not None
        self._step = first_step

    def due(self, step: int) -> str | None:
        """Why the run must be saved behind `step`, or None; asked once per step."""
        now = self._now()
        if step > self._step:  # a step has passed since it was asked last, and not a save
            self._slowest_step = max(self._slowest_step or 0.0, now - self._stepped_at)
        self._step, self._stepped_at = step, now
        every = self._config.save_steps
        if step == self._last_step:
            return "the end"
        if every is not None and step % every == 0:
            return f"checkpoint.save_steps={every}"
        return on_rank_0(lambda: self._timed_reason(now)) if self._is_timed else None

    def begun(self) -> None:
        """Told when a save begins: it holds the state of this moment."""
        self._saved_at = self._now()

    def saved(self, seconds: float) -> None:
        """Told when it is complete, and how long that took."""
        self._slowest_save = max(self._slowest_save or 0.0, seconds)
        self._stepped_at = self._now()

    def _timed_reason(self, now: float) -> str | None:
        minutes = self._config.every_minutes
        if minutes is not None and now - self._saved_at >= 60 * minutes:
            return f"checkpoint.every_minutes={minutes:g}"
        # The last boundary from which one more step and a save still fit is the one to save at.
        if self._deadline is not None and self._saved_at < self._deadline - self._lead() <= now < self._deadline:
            return f"checkpoint.must_save_by={self._config.must_save_by}"
        return None

    def _lead(self) -> float:
        if self._slowest_save is None or self._slowest_step is None:
            return _ASSUMED_SECONDS
        return _MARGIN * (self._slowest_step + self._slowest_save)


def deadline(config: CheckpointConfig) -> float | None:
    """`must_save_by` in seconds since 1970, None where there is none."""
    if config.must_save_by is None:
        return None
    if config.must_save_by != "slurm":
        return datetime.fromisoformat(config.must_save_by).timestamp()
    end = os.environ.get(_SLURM_END, "")
    if not end.isdigit():
        raise ValueError(
            f"checkpoint.must_save_by=slurm: {_SLURM_END} is not set, as it is in jobs of SLURM 22.05 and later that "
            "have a time limit; give the time itself, as 2030-01-31T18:00:00"
        )
    return float(end)
