"""What a run does beside its steps: the hooks of the training loop, and the callbacks about checkpoints.

The callbacks about metrics are in `train.metrics` and `train.alarms`. `train.trainer` builds the list of all.
"""

import gc
import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from megatron_solopo.checkpoint.directory import check_best_metric, surplus, tidy
from megatron_solopo.config import CheckpointConfig, TrainingConfig
from megatron_solopo.errors import UserError, describe_os_error
from megatron_solopo.files import counted, first_few
from megatron_solopo.parallel.agreement import on_rank_0
from megatron_solopo.train.state import Metrics, TrainState

_SLURM_END = "SLURM_JOB_END_TIME"
# The time of one step and one save, until both have been measured.
_ASSUMED_SECONDS = 300.0
_MARGIN = 2.0


class Callback:
    """A subclass overrides the hooks that it needs. All ranks call a hook at the same moment of the run."""

    def on_start(self, state: TrainState) -> None:
        """Before the first step; `state` is the one that the run continues from."""

    def on_step_begin(self, step: int) -> None:
        """Before a step."""

    def on_step_end(self, metrics: Metrics) -> None:
        """After a step and its evaluation, before the run may be saved."""

    def on_save_begin(self) -> None:
        """Before a checkpoint is written; it holds the state of this moment."""

    def on_saved(self) -> None:
        """After a checkpoint is complete."""

    def on_save_failed(self) -> None:
        """After the disk was too full for a checkpoint, if the run goes on."""

    def on_success(self) -> None:
        """After the last step and its save."""

    def close(self) -> None:
        """At the end of the run, also after an error: end threads, close files."""


def say(line: str) -> None:
    """Print a line on the console of rank 0, above a progress bar if there is one.

    A console that takes no more lines, such as a log on a full disk, must not end a run.
    """
    if dist.get_rank() == 0:
        with suppress(OSError):
            tqdm.write(line)


class OnRank0(Callback):
    """Callbacks of rank 0 that write or print. If one of them fails, every rank raises its error at once.

    Otherwise the other ranks would wait for rank 0 in their next collective, until its timeout. This costs two small
    broadcasts at the start, at the end, after every step and before every save.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        """Every rank makes one; `callbacks` is empty on all ranks but rank 0. They must not communicate."""
        self._callbacks = callbacks

    def on_start(self, state: TrainState) -> None:
        """See `Callback`."""
        on_rank_0(lambda: self._tell(lambda callback: callback.on_start(state)))

    def on_step_end(self, metrics: Metrics) -> None:
        """See `Callback`."""
        on_rank_0(lambda: self._tell(lambda callback: callback.on_step_end(metrics)))

    def on_save_begin(self) -> None:
        """See `Callback`."""
        on_rank_0(lambda: self._tell(lambda callback: callback.on_save_begin()))

    def on_success(self) -> None:
        """See `Callback`."""
        on_rank_0(lambda: self._tell(lambda callback: callback.on_success()))

    def close(self) -> None:
        """See `Callback`. It does not communicate, because it is called after a failure as well."""
        self._tell(lambda callback: callback.close())

    def _tell(self, hook: Callable[[Callback], None]) -> None:
        for callback in self._callbacks:
            hook(callback)


class SaveClock(Callback):
    """Says when to save: every so many steps, every so many minutes, and before a deadline.

    Where the time decides, the clock of rank 0 counts for all ranks.
    """

    def __init__(self, config: CheckpointConfig, *, now: Callable[[], float] = time.time) -> None:
        """Raises UserError if the end of the SLURM job is the deadline and is not known."""
        self._config, self._now = config, now
        self._deadline = deadline(config)
        self._is_timed = config.every_minutes is not None or self._deadline is not None
        self._save_began = self._step_began = now()
        self._step = 0
        self._slowest_step: float | None = None
        self._slowest_save: float | None = None

    def on_start(self, state: TrainState) -> None:
        """Count steps, and measure the first one, from here: what came before may have taken hours."""
        self._step, self._step_began = state.step, self._now()

    def reason_to_save(self, step: int, *, is_last: bool) -> str | None:
        """Why the run must be saved after `step`, or None. All ranks call it together, once per step."""
        now = self._now()
        if step > self._step:  # not so if a continued run only completes the evaluation of its last step
            self._slowest_step = max(self._slowest_step or 0.0, now - self._step_began)
        self._step, self._step_began = step, now
        every = self._config.save_steps
        if is_last:
            return "the end"
        if every is not None and step % every == 0:
            return f"checkpoint.save_steps={every}"
        return on_rank_0(lambda: self._timed_reason(now)) if self._is_timed else None

    def on_save_begin(self) -> None:
        """Remember the time."""
        self._save_began = self._now()

    def on_saved(self) -> None:
        """Remember the slowest save."""
        now = self._now()
        self._slowest_save = max(self._slowest_save or 0.0, now - self._save_began)
        self._step_began = now

    def on_save_failed(self) -> None:
        """Leave the failed attempt out of the next step's time. The next save comes when it would after a save."""
        self._step_began = self._now()

    def _timed_reason(self, now: float) -> str | None:
        minutes = self._config.every_minutes
        if minutes is not None and now - self._save_began >= 60 * minutes:
            return f"checkpoint.every_minutes={minutes:g}"
        # Save after the last step from which one more step and one more save would not fit any more.
        if self._deadline is not None and self._save_began < self._deadline - self._lead() <= now < self._deadline:
            return f"checkpoint.must_save_by={self._config.must_save_by}"
        return None

    def _lead(self) -> float:
        """Seconds before the deadline at which to save."""
        measured = _MARGIN * ((self._slowest_step or 0.0) + (self._slowest_save or 0.0))
        is_measured = self._slowest_step is not None and self._slowest_save is not None
        return measured if is_measured else max(measured, _ASSUMED_SECONDS)


def deadline(config: CheckpointConfig) -> float | None:
    """`checkpoint.must_save_by` in seconds since 1970, or None.

    Raises UserError if it is `slurm` and the job's end is not in the environment.
    """
    if config.must_save_by is None:
        return None
    if config.must_save_by != "slurm":
        return datetime.fromisoformat(config.must_save_by).timestamp()
    end = os.environ.get(_SLURM_END, "")
    if not end.isdigit():
        raise UserError(
            f"checkpoint.must_save_by=slurm: {_SLURM_END} is not set, as it is in jobs of SLURM 22.05 and later that "
            "have a time limit; give the time itself, as 2030-01-31T18:00:00"
        )
    return float(end)


class CollectGarbage(Callback):
    """Lets all ranks collect Python's garbage together, after the same steps.

    By itself each rank collects at other moments, and the others wait for it each time.
    """

    def __init__(self, config: TrainingConfig) -> None:
        """On by default if there is more than one rank."""
        self._is_manual = dist.get_world_size() > 1 if config.manual_gc is None else config.manual_gc
        self._interval = config.manual_gc_interval
        self._was_enabled = gc.isenabled()

    def on_start(self, state: TrainState) -> None:
        """Collect what the preparation left; from now on Python collects nothing by itself."""
        if self._is_manual:
            gc.disable()
            gc.collect()

    def on_step_end(self, metrics: Metrics) -> None:
        """Collect after every so many steps."""
        if self._is_manual and int(metrics["step"] or 0) % self._interval == 0:
            gc.collect()

    def close(self) -> None:
        """Let Python collect by itself again."""
        if self._is_manual and self._was_enabled:
            gc.enable()


class TidyCheckpoints(Callback):
    """After every save, updates the pointer to the best checkpoint and removes those that need not be kept."""

    def __init__(
        self, root: Path, config: CheckpointConfig, of_step: Iterable[str], of_evaluation: Sequence[str]
    ) -> None:
        """See `check_best_metric` for the metrics and the UserError that it raises."""
        check_best_metric(config, of_step, of_evaluation)
        self._root, self._config = root, config

    def on_start(self, state: TrainState) -> None:
        """Say what the first save will remove, because the run may have begun when nothing was removed."""
        if found := on_rank_0(lambda: [path.name for path in surplus(self._root, self._config)]):
            say(
                f"note: checkpoint.keep_last={self._config.keep_last}: the next save removes "
                f"{counted(len(found), 'older checkpoint')}: {first_few(found)}"
            )

    def on_saved(self) -> None:
        """Rank 0 does it; the others wait."""
        on_rank_0(self._tidy)

    def _tidy(self) -> None:
        try:
            tidy(self._root, self._config)
        except OSError as error:  # on NFS, files that somebody reads cannot be removed; that must not end a run
            say(f"warning: {self._root} was not tidied: {describe_os_error(error)}")
