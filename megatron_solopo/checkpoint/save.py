"""Writes this rank's share of a sharded state: Megatron plans who writes what, threads of this process write it.

Megatron's own writer forks processes for the same work, from a process that runs threads of CUDA and of the process
groups, and passes results through a further process that outlives a killed rank. Here nothing outlives anything, and
a write in the background is the same code as one that is waited for.

A checkpoint on its way to the disk: under a temporary name, listed in its manifest, renamed, then `latest`.
"""

import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, is_main_replica
from torch import Tensor

from megatron_solopo.architecture.model_directory import HUGGINGFACE_FOLDER
from megatron_solopo.checkpoint.directory import TRAINER_STATE, checkpoint_name, publish, temporary_path
from megatron_solopo.checkpoint.manifest import FileEntry, sealed_files, write_manifest
from megatron_solopo.checkpoint.model_files import write_files
from megatron_solopo.errors import UserError
from megatron_solopo.files import described_bytes, remove, write_json
from megatron_solopo.parallel.agreement import on_rank_0, together
from megatron_solopo.parallel.megatron_internals import ShardedFiles

_FORMAT = CheckpointingConfig("torch_dist", 1)
# Files per rank, each written by a thread of its own.
_THREADS = 2


def bytes_to_write(state: dict[str, Any]) -> int:
    """Bytes of tensors that this rank would write; the sum over the ranks is what a checkpoint takes."""
    return sum(
        each.data.nbytes
        for each in nested_values(state)
        if isinstance(each, ShardedBase) and isinstance(each.data, Tensor) and is_main_replica(each.replica_id)
    )


class ShardedWrite:
    """One rank's part of one checkpoint: planned by all ranks together, then written by each alone."""

    def __init__(self, state: dict[str, Any], folder: Path, content_metadata: dict[str, Any]) -> None:
        """Plan, on all ranks together; writes nothing but, with megatron-core 0.16, rank 0's `common.pt`."""
        self._files = ShardedFiles(state, folder, content_metadata, files_per_rank=_THREADS)
        self._folder = folder
        self._results: list[Any] = []

    @property
    def files(self) -> list[str]:
        """Names of the files that this rank writes."""
        return self._files.names

    def stage(self, *, copy: bool) -> None:
        """Bring the tensors to host memory; with `copy` also those that lie there, for training will change them."""
        self._files.stage(copy=copy)

    def write(self) -> None:
        """Write this rank's files, to the disk; raises what the file system raises."""
        with ThreadPoolExecutor(_THREADS) as pool:
            for results in pool.map(self._files.write, range(len(self._files.names))):
                self._results += results
        self._files.release()

    def gather(self) -> list[Any] | None:
        """On all ranks together, once each has written: what `finish` needs, on rank 0."""
        gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(self._results, gathered)
        return gathered

    def finish(self, gathered: list[Any]) -> None:
        """On rank 0: write the list of pieces, then the file that makes the directory a checkpoint."""
        self._files.finish(gathered)
        save_config(_FORMAT, str(self._folder))


# Room for what is no tensor: Megatron's lists of pieces and the file system's own.
_SMALL_FILES_BYTES = 1 << 20
_RESERVE_BYTES = 1 << 16


@dataclass(frozen=True)
class CheckpointContent:
    """What a checkpoint holds besides the sharded tensors."""

    trainer_state: dict[str, Any]
    """JSON-able, the same on every rank, `step` among it."""
    model_files: Mapping[str, bytes]
    """The config, tokenizer and so on that travel with the weights; rank 0's are written."""
    rank_files: Mapping[str, bytes] = field(default_factory=dict)
    """This rank's own, by names that no other rank has."""


class PendingSave:
    """Begun and completed by all ranks together; in between each rank writes its files."""

    def __init__(
        self,
        root: Path,
        state: dict[str, Any],
        content_metadata: dict[str, Any],
        content: CheckpointContent,
        *,
        background: bool,
    ) -> None:
        """Begin. On return the training state may change if `background`, and this rank's files are written if not.

        Raises UserError on every rank, and leaves nothing behind, if there is no room or the directory cannot be
        written.
        """
        step = content.trainer_state["step"]
        self.path, self._temporary = root / checkpoint_name(step), temporary_path(root, step)
        self._content = content
        small = [*content.model_files.values(), *content.rank_files.values()]
        needed = _total(bytes_to_write(state) + sum(map(len, small))) + _SMALL_FILES_BYTES
        with self._complete_or_absent():
            on_rank_0(lambda: self._prepare(needed))
        self._write = ShardedWrite(state, self._temporary, content_metadata)
        with self._complete_or_absent():
            together(lambda: self._write.stage(copy=background))
        self._pool = ThreadPoolExecutor(1)
        self._written = self._pool.submit(self._write_files)
        if not background:
            self._written.exception()  # waits; `complete` raises it on all ranks

    def is_written(self) -> bool:
        """Whether every rank's files are on the disk, or failed to get there; asked on all ranks together."""
        return _total(0 if self._written.done() else 1) == 0

    def complete(self) -> Path:
        """Wait for all ranks' files, give the checkpoint its name, point `latest` to it, and return its path.

        Raises UserError on every rank if one of them failed; then nothing of it is left, and what was saved before
        is as it was.
        """
        try:
            with self._complete_or_absent():
                files = together(self._written.result)
                gathered = self._write.gather()
                listed: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
                dist.gather_object(files, listed)
                on_rank_0(lambda: self._seal(gathered or [], listed or []))
        finally:
            self._pool.shutdown()
        return self.path

    def abandon(self) -> None:
        """Instead of `complete`, after a failure: wait for this rank's own thread, and for no other rank.

        What is written stays under its temporary name; the next save of that step removes it.
        """
        self._pool.shutdown()

    @contextmanager
    def _complete_or_absent(self) -> Iterator[None]:
        """Around what fails on all ranks together: by then no rank writes any more."""
        try:
            yield
        except ValueError as error:
            if dist.get_rank() == 0:
                # Where nothing can be written, nothing can be removed; the next run tries again.
                with suppress(OSError):
                    remove(self._temporary)
            raise UserError(f"{self.path} was not saved: {error}; what was saved before is intact") from None

    def _prepare(self, needed: int) -> None:
        remove(self._temporary)
        self._temporary.parent.mkdir(parents=True, exist_ok=True)
        free = _free_bytes(self._temporary.parent)
        if free < needed:
            raise UserError(
                f"it takes {described_bytes(needed)}, but {described_bytes(free)} are free on its file system (make "
                "room, or set checkpoint.keep_last or run_dir)"
            )
        self._temporary.mkdir()
        # Megatron writes a small file in the midst of its planning, on rank 0, while the others wait: if it cannot be
        # written, let it be here.
        reserve = self._temporary / "reserve"
        reserve.write_bytes(bytes(_RESERVE_BYTES))
        reserve.unlink()

    def _write_files(self) -> dict[str, FileEntry]:
        names = [*self._write.files, *self._content.rank_files]
        self._write.write()
        write_files(self._content.rank_files, self._temporary)
        return sealed_files(self._temporary, names)

    def _seal(self, gathered: list[Any], listed: list[dict[str, FileEntry]]) -> None:
        """On rank 0."""
        self._write.finish(gathered)
        write_files(self._content.model_files, self._temporary / HUGGINGFACE_FOLDER)
        write_json(self._temporary / TRAINER_STATE, self._content.trainer_state)
        files = {name: entry for each in listed for name, entry in each.items()}
        present = (str(path.relative_to(self._temporary)) for path in self._temporary.rglob("*") if path.is_file())
        files |= sealed_files(self._temporary, [name for name in present if name not in files])
        write_manifest(self._temporary, files)
        publish(self._temporary, self.path)


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(path).free


def _total(count: int) -> int:
    """Sum over the ranks."""
    device = "cpu" if dist.get_backend() == "gloo" else torch.cuda.current_device()
    total: Tensor = torch.tensor(count, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return int(total)
