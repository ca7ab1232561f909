"""What a run saves, and how it continues.

A checkpoint holds the state between two steps: weights and optimizer after the last step's update, and the position in
the data after that step. A save that a signal asks for in the middle of a step therefore repeats that step later.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_solopo.checkpoint.adapter_checkpoint import adapter_files
from megatron_solopo.checkpoint.directory import LATEST, checkpoint_name, checkpoints, newest_checkpoint, read_pointer
from megatron_solopo.checkpoint.host_copies import HostCopies
from megatron_solopo.checkpoint.load import load_checkpoint
from megatron_solopo.checkpoint.model_files import read_model_files
from megatron_solopo.checkpoint.save import ShardedSave, new_plans
from megatron_solopo.checkpoint.sharded_state import state_to_save
from megatron_solopo.config import Config
from megatron_solopo.data.loader import GlobalBatchLoader
from megatron_solopo.errors import OutOfSpaceError, UserError
from megatron_solopo.parallel.agreement import on_rank_0
from megatron_solopo.train.callbacks import Callback, say
from megatron_solopo.train.identity import WEIGHTS, RunIdentity, check_reference, summarise_reference
from megatron_solopo.train.policy import Policy, next_learning_rate
from megatron_solopo.train.state import SkippedSteps, TrainState
from megatron_solopo.train.step import ReferenceLogprobs


@dataclass(frozen=True)
class _RunningSave:
    """A save that was begun and is not complete."""

    save: ShardedSave
    state: TrainState
    reason: str
    started: float
    is_last: bool


class Saver:
    """Saves one run and continues it. All ranks call every method together, except `abandon`."""

    def __init__(self, config: Config, identity: RunIdentity, callbacks: Sequence[Callback]) -> None:
        """Read nothing yet.

        Args:
            identity: what the run may not change.
            callbacks: told of every save.
        """
        self._config, self._identity, self._callbacks = config, identity, callbacks
        self._reference: dict[str, Any] | None = None
        self._root = config.run_dir / "checkpoints"
        self._model_files: dict[str, bytes] = {}
        self._policy: Policy | None = None
        self._found: tuple[Path, dict[str, Any]] | None = None
        self._running: _RunningSave | None = None
        self._copies = HostCopies() if config.checkpoint.async_save else None
        self._has_reserved = False
        self._plans = new_plans()
        self._last_saved: TrainState | None = None

    def find_checkpoint(self, loader: GlobalBatchLoader) -> TrainState:
        """Find the checkpoint to continue from, and set `loader` to its position; returns the state to start from.

        Raises UserError if the checkpoints are of another run or of other settings, or are all damaged.
        """
        # Read now, so that checkpoints are complete even if the model's directory disappears during the run.
        on_rank_0(self._read_model_files)
        if not self._config.checkpoint.resume and on_rank_0(lambda: bool(checkpoints(self._root))):
            raise UserError(
                f"{self._config.run_dir}: holds a run with checkpoints, which checkpoint.resume=false would overwrite; "
                "set run_dir to another directory"
            )
        checksums = self._config.checkpoint.verify == "checksums"
        notes: list[str] = []

        def accept(path: Path, saved: dict[str, Any]) -> None:
            notes.extend(self._identity.check(saved, path))
            loader.load_state_dict(saved["loader"])

        self._found = newest_checkpoint(self._root, checksums=checksums, say=say, accept=accept)
        if self._found is None:
            return TrainState(0, loader.state_dict(), SkippedSteps())
        _, saved = self._found
        for line in notes:
            say(line)
        skipped = SkippedSteps(**saved["skipped"])
        state = TrainState(saved["step"], loader.state_dict(), skipped, saved["unrecorded"], saved["metrics"])
        self._last_saved = state
        return state

    def add_reference(self, references: Mapping[str, ReferenceLogprobs]) -> None:
        """Keep a summary of the reference log-probs in checkpoints.

        Raises UserError if the found checkpoint was trained with others, beyond the rounding of another layout.
        """
        self._reference = summarise_reference(references)
        if self._found is None:
            return
        path, saved = self._found
        try:
            note = on_rank_0(partial(check_reference, self._reference, saved, self._config.model))
        except UserError as error:
            raise UserError(
                f"{path}: {error}; bring back {self._config.reference_cache} as it was when the run began, or set "
                "run_dir to another directory"
            ) from None
        if note is not None:
            say(note)

    def _read_model_files(self) -> None:
        config = self._config
        self._model_files = read_model_files(config.model.path)
        if config.lora is not None:
            self._model_files |= adapter_files(config.lora, config.model.path, self._identity.values[WEIGHTS])

    def restore(self, policy: Policy, state: TrainState) -> None:
        """Load the found checkpoint, if there is one, into `policy`, which is saved from now on."""
        self._policy = policy
        if self._found is not None:
            load_checkpoint(self._found[0], policy.chunks, policy.optimizer)
            policy.scheduler.step(increment=state.step - state.skipped.total)
            self._say_redrawn(policy, self._found[1], state)

    def _say_redrawn(self, policy: Policy, saved: Mapping[str, Any], state: TrainState) -> None:
        former, now = self._identity.redrawn_decay(saved), self._identity.values["optimizer.lr_decay_iters"]
        if former is not None:
            before, after = (next_learning_rate(policy, steps) for steps in (former, now))
            say(
                f"note: the learning rate's decay is drawn anew: optimizer.lr_decay_iters={now} (it was {former}); "
                f"learning rate of step {state.step + 1}: {after:.3g} (it would have been {before:.3g})"
            )

    def save(self, state: TrainState, reason: str, *, is_last: bool = True, background: bool = False) -> Path | None:
        """Write a checkpoint; the model and the optimizer must be those of `state`.

        Nothing is written if the newest checkpoint holds `state` already, or if no step has updated anything yet: that
        is the model as it was read, and Adam has no state. It may be called at any moment between two collectives of
        all ranks, as long as the next step's update has not begun.

        Args:
            is_last: the run ends after this save. If it does not, a full disk is a warning, as long as there is an
                older checkpoint.
            background: return while threads still write; `complete_if_written` and `finish` complete it.

        Returns the path of the complete checkpoint of `state`, or None if there is none (yet).

        Raises UserError on every rank if one of them could not write. Older checkpoints are intact then.
        """
        assert self._policy is not None, "restore comes first"
        self.finish()
        if self._last_saved != state and state.step > state.skipped.total:
            started = time.monotonic()
            with self._full_disk_is_a_warning(unless=is_last):
                for callback in self._callbacks:
                    callback.on_save_begin()
                self._policy.gather_parameters()
                save = ShardedSave(
                    self._root,
                    self._policy.chunks,
                    self._policy.optimizer,
                    asdict(state) | {"identity": self._identity.values, "reference": self._reference},
                    self._model_files,
                    copies=self._copies,
                    in_background=background,
                    plans=self._plans,
                )
                self._running = _RunningSave(save, state, reason, started, is_last)
            if not background:
                self.finish()
        return self._root / checkpoint_name(state.step) if self._last_saved == state else None

    def reserve_host_memory(self, state: TrainState) -> None:
        """Let a thread allocate what saves in the background keep, once there is a state to save.

        Cheap after the first time. It asks no other rank.
        """
        if self._copies is None or self._has_reserved or state.step == state.skipped.total:
            return
        assert self._policy is not None, "restore comes first"
        self._has_reserved = True
        self._copies.reserve(state_to_save(self._policy.chunks, self._policy.optimizer))

    def complete_if_written(self) -> None:
        """Complete a save in the background if the files of all ranks are written. Raises as `save` does."""
        if self._running is not None and self._running.save.is_written():
            self.finish()

    def finish(self) -> None:
        """Wait until a save in the background is complete. Raises as `save` does."""
        if self._running is None:
            return
        running, self._running = self._running, None
        with self._full_disk_is_a_warning(unless=running.is_last):
            path = running.save.complete()
            self._last_saved = running.state
            for callback in self._callbacks:
                callback.on_saved()
            say(f"saved {path} ({running.reason}; {time.monotonic() - running.started:.1f} s)")

    @contextmanager
    def _full_disk_is_a_warning(self, *, unless: bool) -> Iterator[None]:
        """Around an error that all ranks raise together: let the run go on if it can continue from an older one."""
        try:
            yield
        except OutOfSpaceError as error:
            older = None if unless else on_rank_0(self._newest_name)
            if older is None:
                raise
            for callback in self._callbacks:
                callback.on_save_failed()
            say(f"warning: {error}; the run goes on, and {older} is the one to continue from")

    def _newest_name(self) -> str | None:
        name = read_pointer(self._root, LATEST)
        return name if name and (self._root / name).is_dir() else None

    @property
    def is_running(self) -> bool:
        """Whether a save was begun and is not complete."""
        return self._running is not None

    def abandon(self) -> None:
        """End this rank's threads: after a failure, wait for its files of an incomplete save, and for no other rank."""
        if self._copies is not None:
            self._copies.close()
        if self._running is not None:
            self._running.save.abandon()
            self._running = None
