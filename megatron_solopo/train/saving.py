"""What a run keeps from its first step to its last.

When a run is saved: by steps, by the clock, and before a deadline.

What of a run is saved, and how it continues.

A save holds the state at the last step boundary: weights and optimizer as the step's update left them, and the place in
the data behind it, so that one asked for in the middle of a step repeats that step.
"""

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from megatron_solopo.architecture.model_directory import huggingface_directory
from megatron_solopo.checkpoint.directory import (
    check_best_metric,
    checkpoint_name,
    checkpoints,
    newest_checkpoint,
    tidy,
)
from megatron_solopo.checkpoint.load import load_checkpoint
from megatron_solopo.checkpoint.model_files import read_model_files
from megatron_solopo.checkpoint.save import ShardedSave
from megatron_solopo.config import CheckpointConfig, Config
from megatron_solopo.data.loader import GlobalBatchLoader
from megatron_solopo.errors import UserError
from megatron_solopo.files import sha256_file
from megatron_solopo.model.build import precision_settings
from megatron_solopo.objective import metric_names
from megatron_solopo.parallel.agreement import describe_os_error, on_rank_0
from megatron_solopo.train.bad_numbers import SkippedSteps
from megatron_solopo.train.metrics import Metrics
from megatron_solopo.train.policy import Policy
from megatron_solopo.train.run_data import Splits


def run_identity(config: Config, splits: Splits) -> dict[str, Any]:
    """JSON-able values, by the key that sets each."""
    sections = {"objective": config.objective, "optimizer": config.optimizer}
    keys = {f"{name}.{key}": value for name, section in sections.items() for key, value in section}
    return keys | {
        "model.dtype": config.model.dtype,
        "model.fp8": precision_settings(config.model) or None,
        "model.path (its config.json)": sha256_file(huggingface_directory(config.model.path) / "config.json"),
        "data.path (its content)": splits.manifest.fingerprint,
    }


def check_unchanged(identity: Mapping[str, Any], saved: Mapping[str, Any], checkpoint: Path) -> None:
    """Raise ValueError naming what differs from the identity that a checkpoint of this run was saved with."""
    changed = [
        f"{key}={value!r} (it was {saved.get(key)!r})" for key, value in identity.items() if saved.get(key) != value
    ]
    if changed:
        raise UserError(
            f"{checkpoint}: a run keeps its objective, optimizer, model, data and reference, but now "
            f"{', '.join(changed)}; restore that, or set run_dir to another directory"
        )


_SLURM_END = "SLURM_JOB_END_TIME"
# Until a save and a step have been timed.
_ASSUMED_SECONDS = 300.0
_MARGIN = 2.0


class SaveClock:
    """Says when a save is due. All ranks ask together; where the time decides, rank 0's clock does for all."""

    def __init__(
        self, config: CheckpointConfig, last_step: int, *, first_step: int = 0, now: Callable[[], float] = time.time
    ) -> None:
        """`last_step` is saved in any case; raises UserError if the end of the SLURM job is asked for and unknown."""
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
        timed = _MARGIN * ((self._slowest_step or 0.0) + (self._slowest_save or 0.0))
        both = self._slowest_step is not None and self._slowest_save is not None
        return timed if both else max(timed, _ASSUMED_SECONDS)


def deadline(config: CheckpointConfig) -> float | None:
    """`must_save_by` in seconds since 1970, None where there is none."""
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


@dataclass(frozen=True)
class Boundary:
    """Where a run stands between two steps; the same on every rank."""

    step: int
    """Steps done."""
    loader: dict[str, int]
    skipped: SkippedSteps
    unrecorded: Metrics | None = None
    """The last step's metrics, until its evaluation is done and they are written: a run continues with just that."""
    metrics: Metrics | None = None
    """The last step's metrics, its evaluation among them, once they are written."""

    @property
    def first_unrecorded_step(self) -> int:
        """From here on, what is written of steps is not of this state."""
        return self.step + (0 if self.unrecorded is not None else 1)


class Saver:
    """Saves one run and continues it. Every method is called by all ranks together."""

    def __init__(self, config: Config, loader: GlobalBatchLoader, identity: Mapping[str, Any], max_steps: int) -> None:
        """Find the checkpoint to continue from, and put `loader` where it left it; nothing else is touched yet.

        Args:
            identity: what a run keeps, see `run_identity`.
            max_steps: the step that is always saved.

        Raises UserError if the checkpoints are of another run or another one's settings, or damaged, all of them.
        """
        self._config, self._loader, self._identity = config, loader, dict(identity)
        self._root = config.run_dir / "checkpoints"
        check_best_metric(
            config.checkpoint, metric_names(config.objective), evaluates=config.training.eval_steps is not None
        )
        # Now, so that checkpoints stay complete if the model's directory goes meanwhile.
        self._model_files = read_model_files(config.model.path) if dist.get_rank() == 0 else {}
        self._policy: Policy | None = None
        self._pending: _Pending | None = None
        self._resumed, self._resumed_state = self._find()
        self.boundary = self._boundary_of(self._resumed_state)
        self._last_saved = self.boundary if self._resumed is not None else None
        self._clock = SaveClock(config.checkpoint, max_steps, first_step=self.boundary.step)
        self._max_steps = max_steps

    def keep(self, key: str, value: str) -> None:
        """Add to what a run keeps from its first step to its last; raises UserError if it is another than it was."""
        self._identity[key] = value
        if self._resumed is not None:
            check_unchanged({key: value}, self._resumed_state["identity"], self._resumed)

    def restore(self, policy: Policy) -> None:
        """Give `policy` the state of the checkpoint that was found, if one was; it is what is saved from now on."""
        self._policy = policy
        if self._resumed is None:
            return
        load_checkpoint(self._resumed, policy.chunks, policy.optimizer)
        policy.scheduler.step(increment=self.boundary.step - self.boundary.skipped.total)

    def step_done(self, metrics: Metrics, skipped: SkippedSteps) -> None:
        """Told right after an optimizer step: what is saved from here on is the state behind it."""
        self.boundary = Boundary(int(metrics["step"] or 0), self._loader.state_dict(), skipped, metrics)

    def recorded(self, metrics: Metrics) -> None:
        """Told when the step's metrics are written, its evaluation among them where one was due."""
        self.boundary = replace(self.boundary, unrecorded=None, metrics=metrics)

    def due(self) -> str | None:
        """Why the run must be saved at this boundary, or None; asked once per step. Completes what is written by now.

        Raises UserError on every rank if a save in the background failed.
        """
        self._settle(wait=False)
        return self._clock.due(self.boundary.step)

    def save_due(self, reason: str) -> None:
        """Save at a step's end: in the background where `async_save` says so, but for the last step."""
        is_last = self.boundary.step == self._max_steps
        self._save(reason, background=self._config.checkpoint.async_save and not is_last)

    def save(self, reason: str) -> Path | None:
        """Write the state at the last boundary, complete on return, and return its path.

        None where no step has updated anything yet: that state is the model as it was read, and Adam has none.
        Nothing is written where that is what the newest checkpoint holds. It may be called at any moment between two
        collectives that all ranks reach, as long as no update of the next step has begun. Raises UserError on every
        rank if one of them could not write; what was saved before is intact then.
        """
        self._save(reason, background=False)
        self.finish()
        return self._root / checkpoint_name(self.boundary.step) if self._last_saved == self.boundary else None

    def finish(self) -> None:
        """Wait until what was begun is complete; called before the process ends in whatever way. Raises as `save`."""
        self._settle(wait=True)

    @property
    def is_pending(self) -> bool:
        """Whether a save was begun and is not complete."""
        return self._pending is not None

    def abandon(self) -> None:
        """After a failure: wait for this rank's part of what was begun, and for no other rank. It stays incomplete."""
        if self._pending is not None:
            self._pending.save.abandon()
            self._pending = None

    def _save(self, reason: str, *, background: bool) -> None:
        assert self._policy is not None, "restore comes first"
        self.finish()
        if self._last_saved == self.boundary or self.boundary.step == self.boundary.skipped.total:
            return
        started = time.monotonic()
        self._clock.begun()
        state = asdict(self.boundary) | {"identity": self._identity}
        chunks, optimizer = self._policy.chunks, self._policy.optimizer
        save = ShardedSave(self._root, chunks, optimizer, state, self._model_files, background=background)
        self._pending = _Pending(save, self.boundary, reason, started)
        self._settle(wait=not background)

    def _settle(self, *, wait: bool) -> None:
        """Complete what was begun, if it is written or shall be waited for."""
        pending = self._pending
        if pending is None or not (wait or pending.save.is_written()):
            return
        self._pending = None
        path = pending.save.complete()
        self._last_saved = pending.boundary
        on_rank_0(self._tidy)
        seconds = time.monotonic() - pending.started
        self._clock.saved(seconds)
        _say(f"saved {path} ({pending.reason}; {seconds:.1f} s)")

    def _tidy(self) -> None:
        """Old checkpoints that cannot be removed, because somebody reads them on NFS, do not end a run."""
        try:
            tidy(self._root, self._config.checkpoint)
        except OSError as error:
            _say(f"warning: {self._root} was not tidied: {describe_os_error(error)}")

    def _find(self) -> tuple[Path | None, dict[str, Any]]:
        if not self._config.checkpoint.resume and on_rank_0(lambda: bool(checkpoints(self._root))):
            raise UserError(
                f"{self._config.run_dir}: holds a run with checkpoints, which checkpoint.resume=false would overwrite; "
                "set run_dir to another directory"
            )
        newest = newest_checkpoint(self._root, checksums=self._config.checkpoint.verify == "checksums", say=_say)
        return newest if newest is not None else (None, {})

    def _boundary_of(self, state: dict[str, Any]) -> Boundary:
        if self._resumed is None:
            return Boundary(0, self._loader.state_dict(), SkippedSteps())
        self._loader.load_state_dict(state["loader"])
        check_unchanged(self._identity, state["identity"], self._resumed)
        skipped = SkippedSteps(**state["skipped"])
        return Boundary(state["step"], self._loader.state_dict(), skipped, state["unrecorded"], state["metrics"])


@dataclass(frozen=True)
class _Pending:
    """A save that was begun."""

    save: ShardedSave
    boundary: Boundary
    reason: str
    started: float


def _say(line: str) -> None:
    """A line on the console of rank 0, above a progress bar if there is one."""
    if dist.get_rank() == 0:
        tqdm.write(line)
