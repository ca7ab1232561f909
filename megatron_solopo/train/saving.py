"""When a run is saved, what of it, and how it continues.

A save holds the state at the last step boundary: weights and optimizer as the step's update left them, and the place in
the data behind it, so that one asked for in the middle of a step repeats that step.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
from tqdm import tqdm

from megatron_solopo.checkpoint.directory import checkpoint_name, checkpoints
from megatron_solopo.checkpoint.distributed import begin_save, load_checkpoint
from megatron_solopo.checkpoint.model_files import read_model_files
from megatron_solopo.checkpoint.newest import newest_checkpoint
from megatron_solopo.checkpoint.pending import Content
from megatron_solopo.config import Config
from megatron_solopo.data.loader import GlobalBatchLoader
from megatron_solopo.parallel.agreement import on_rank_0
from megatron_solopo.train.bad_numbers import Skipped
from megatron_solopo.train.identity import check_unchanged
from megatron_solopo.train.metrics import Metrics
from megatron_solopo.train.policy import Policy
from megatron_solopo.train.signals import spared_children


@dataclass(frozen=True)
class Boundary:
    """Where a run stands between two steps; the same on every rank."""

    step: int
    """Steps done."""
    loader: dict[str, int]
    skipped: Skipped
    unrecorded: Metrics | None = None
    """The last step's metrics, until its evaluation is done and they are written: a run continues with just that."""


class Saver:
    """Saves one run and continues it. Every method is called by all ranks together."""

    def __init__(self, config: Config, loader: GlobalBatchLoader, identity: Mapping[str, Any], max_steps: int) -> None:
        """Find the checkpoint to continue from, and put `loader` where it left it; nothing else is touched yet.

        Args:
            identity: what a run keeps, see `run_identity`.
            max_steps: the step that is always saved.

        Raises ValueError if the checkpoints are of another run or another one's settings.
        """
        self._config, self._loader, self._identity, self._max_steps = config, loader, dict(identity), max_steps
        self._root = config.run_dir / "checkpoints"
        # Now, so that checkpoints stay complete if the model's directory goes meanwhile.
        self._model_files = read_model_files(config.model.path) if dist.get_rank() == 0 else {}
        self._policy: Policy | None = None
        self._resumed: Path | None = None
        self.boundary = Boundary(0, loader.state_dict(), Skipped())
        self._last_saved = self._find()

    def restore(self, policy: Policy) -> None:
        """Give `policy` the state of the checkpoint that was found, if one was; it is what is saved from now on."""
        self._policy = policy
        if self._resumed is not None:
            load_checkpoint(self._resumed, policy.chunks, policy.optimizer)
            policy.scheduler.step(increment=self.boundary.step - self.boundary.skipped.total)

    def step_done(self, metrics: Metrics, skipped: Skipped) -> None:
        """Told right after an optimizer step: what is saved from here on is the state behind it."""
        self.boundary = Boundary(int(metrics["step"] or 0), self._loader.state_dict(), skipped, metrics)

    def recorded(self) -> None:
        """Told when the step's metrics are written, its evaluation among them where one was due."""
        self.boundary = replace(self.boundary, unrecorded=None)

    def due(self) -> str | None:
        """Why the run must be saved at this boundary, or None."""
        step, every = self.boundary.step, self._config.checkpoint.save_steps
        if step == self._max_steps:
            return "the end"
        return "save_steps" if every is not None and step % every == 0 else None

    def save(self, reason: str) -> Path | None:
        """Write the state at the last boundary, complete on return, and return its path.

        None where no step has updated anything yet: that state is the model as it was read, and Adam has none.
        Nothing is written where that is what the newest checkpoint holds. It may be called at any moment between two
        collectives that all ranks reach, as long as no update of the next step has begun.
        """
        assert self._policy is not None, "restore comes first"
        if self.boundary.step == self.boundary.skipped.total:
            return None
        path = self._root / checkpoint_name(self.boundary.step)
        if self._last_saved != self.boundary:
            state = asdict(self.boundary) | {"identity": self._identity}
            content = Content(state, self._model_files)
            with spared_children():
                begin_save(self._root, self._policy.chunks, self._policy.optimizer, content).complete()
            self._last_saved = self.boundary
            _say(f"saved {path} ({reason})")
        return path

    def finish(self) -> None:
        """Wait until everything that was begun is on the disk; called before the process ends in whatever way."""

    def _find(self) -> Boundary | None:
        if not self._config.checkpoint.resume and on_rank_0(lambda: bool(checkpoints(self._root))):
            raise ValueError(
                f"{self._config.run_dir}: holds a run with checkpoints, which checkpoint.resume=false would overwrite; "
                "set run_dir to another directory"
            )
        newest = newest_checkpoint(self._root, checksums=self._config.checkpoint.verify == "checksums", say=_say)
        if newest is None:
            return None
        self._resumed, state = newest
        self._loader.load_state_dict(state["loader"])
        check_unchanged(self._identity, state["identity"], self._resumed)
        self.boundary = Boundary(
            state["step"], self._loader.state_dict(), Skipped(**state["skipped"]), state["unrecorded"]
        )
        return self.boundary


def _say(line: str) -> None:
    """A line on the console of rank 0, above a progress bar if there is one."""
    if dist.get_rank() == 0:
        tqdm.write(line)
