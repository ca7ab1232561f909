"""What of a run is saved, and how it continues.

A save holds the state at the last step boundary: weights and optimizer as the step's update left them, and the place in
the data behind it, so that one asked for in the middle of a step repeats that step.
"""

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from megatron_solopo.checkpoint.directory import checkpoint_name, checkpoints
from megatron_solopo.checkpoint.distributed import begin_save, load_checkpoint
from megatron_solopo.checkpoint.model_files import read_model_files
from megatron_solopo.checkpoint.newest import newest_checkpoint
from megatron_solopo.checkpoint.pending import Content, PendingSave
from megatron_solopo.checkpoint.retention import check_best_metric, tidy
from megatron_solopo.checkpoint.rng import restore_rng, rng_state
from megatron_solopo.config import Config
from megatron_solopo.data.loader import GlobalBatchLoader
from megatron_solopo.objective import metric_names
from megatron_solopo.parallel.agreement import described_error, on_rank_0, together
from megatron_solopo.train.bad_numbers import Skipped
from megatron_solopo.train.due import SaveClock
from megatron_solopo.train.identity import check_unchanged
from megatron_solopo.train.metrics import Metrics
from megatron_solopo.train.policy import Policy


@dataclass(frozen=True)
class Boundary:
    """Where a run stands between two steps; the same on every rank, but for `rng`."""

    step: int
    """Steps done."""
    loader: dict[str, int]
    skipped: Skipped
    unrecorded: Metrics | None = None
    """The last step's metrics, until its evaluation is done and they are written: a run continues with just that."""
    metrics: Metrics | None = None
    """The last step's metrics, its evaluation among them, once they are written."""
    rng: bytes = field(default_factory=rng_state, repr=False, compare=False)

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

        Raises ValueError if the checkpoints are of another run or another one's settings, or damaged, all of them.
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
        """Add to what a run keeps from its first step to its last; raises ValueError if it is another than it was."""
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
        if self._resumed_state["layout"] == self._layout():
            content = together((self._resumed / _rng_file()).read_bytes)
            restore_rng(content)
            self.boundary = replace(self.boundary, rng=content)

    def step_done(self, metrics: Metrics, skipped: Skipped) -> None:
        """Told right after an optimizer step: what is saved from here on is the state behind it."""
        self.boundary = Boundary(int(metrics["step"] or 0), self._loader.state_dict(), skipped, metrics)

    def recorded(self, metrics: Metrics) -> None:
        """Told when the step's metrics are written, its evaluation among them where one was due."""
        self.boundary = replace(self.boundary, unrecorded=None, metrics=metrics)

    def due(self) -> str | None:
        """Why the run must be saved at this boundary, or None; asked once per step. Completes what is written by now.

        Raises ValueError on every rank if a save in the background failed.
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
        collectives that all ranks reach, as long as no update of the next step has begun. Raises ValueError on every
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
        state = asdict(self.boundary) | {"identity": self._identity, "layout": self._layout()}
        content = Content(state, self._model_files, {_rng_file(): state.pop("rng")})
        policy = self._policy
        save = begin_save(self._root, policy.chunks, policy.optimizer, content, background=background)
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
            _say(f"warning: {self._root} was not tidied: {described_error(error)}")

    def _find(self) -> tuple[Path | None, dict[str, Any]]:
        if not self._config.checkpoint.resume and on_rank_0(lambda: bool(checkpoints(self._root))):
            raise ValueError(
                f"{self._config.run_dir}: holds a run with checkpoints, which checkpoint.resume=false would overwrite; "
                "set run_dir to another directory"
            )
        newest = newest_checkpoint(self._root, checksums=self._config.checkpoint.verify == "checksums", say=_say)
        return newest if newest is not None else (None, {})

    def _boundary_of(self, state: dict[str, Any]) -> Boundary:
        if self._resumed is None:
            return Boundary(0, self._loader.state_dict(), Skipped())
        self._loader.load_state_dict(state["loader"])
        check_unchanged(self._identity, state["identity"], self._resumed)
        skipped = Skipped(**state["skipped"])
        return Boundary(state["step"], self._loader.state_dict(), skipped, state["unrecorded"], state["metrics"])

    def _layout(self) -> dict[str, int]:
        """What a rank's number means."""
        parallel = self._config.parallel
        return {
            "world": dist.get_world_size(),
            "tensor": parallel.tensor_model_parallel_size,
            "pipeline": parallel.pipeline_model_parallel_size,
            "context": parallel.context_parallel_size,
        }


@dataclass(frozen=True)
class _Pending:
    """A save that was begun."""

    save: PendingSave
    boundary: Boundary
    reason: str
    started: float


def _rng_file() -> str:
    return f"rng/rank_{dist.get_rank():05d}.safetensors"


def _say(line: str) -> None:
    """A line on the console of rank 0, above a progress bar if there is one."""
    if dist.get_rank() == 0:
        tqdm.write(line)
