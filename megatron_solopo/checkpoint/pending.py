"""A checkpoint on its way to the disk: under a temporary name, listed in its manifest, renamed, then `latest`."""

import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_solopo.checkpoint.directory import checkpoint_name, publish, temporary_path
from megatron_solopo.checkpoint.manifest import Entry, sealed_files, write_manifest
from megatron_solopo.checkpoint.model_files import write_files
from megatron_solopo.checkpoint.sharded import ShardedWrite, state_bytes
from megatron_solopo.files import described_bytes, remove, write_json
from megatron_solopo.model_directory import HUGGINGFACE_FOLDER
from megatron_solopo.parallel.agreement import on_rank_0, together

TRAINER_STATE = "trainer.json"
# Room for what is no tensor: Megatron's lists of pieces and the file system's own.
_SMALL_FILES_BYTES = 1 << 20
_RESERVE_BYTES = 1 << 16


@dataclass(frozen=True)
class Content:
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
        self, root: Path, state: dict[str, Any], content_metadata: dict[str, Any], content: Content, *, background: bool
    ) -> None:
        """Begin. On return the training state may change if `background`, and this rank's files are written if not.

        Raises ValueError on every rank, and leaves nothing behind, if there is no room or the directory cannot be
        written.
        """
        step = content.trainer_state["step"]
        self.path, self._temporary = root / checkpoint_name(step), temporary_path(root, step)
        self._content = content
        small = [*content.model_files.values(), *content.rank_files.values()]
        needed = _total(state_bytes(state) + sum(map(len, small))) + _SMALL_FILES_BYTES
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

        Raises ValueError on every rank if one of them failed; then nothing of it is left, and what was saved before
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
            raise ValueError(f"{self.path} was not saved: {error}; what was saved before is intact") from None

    def _prepare(self, needed: int) -> None:
        remove(self._temporary)
        self._temporary.parent.mkdir(parents=True, exist_ok=True)
        free = _free_bytes(self._temporary.parent)
        if free < needed:
            raise ValueError(
                f"it takes {described_bytes(needed)}, but {described_bytes(free)} are free on its file system (make "
                "room, or set checkpoint.keep_last or run_dir)"
            )
        self._temporary.mkdir()
        # Megatron writes a small file in the midst of its planning, on rank 0, while the others wait: if it cannot be
        # written, let it be here.
        reserve = self._temporary / "reserve"
        reserve.write_bytes(bytes(_RESERVE_BYTES))
        reserve.unlink()

    def _write_files(self) -> dict[str, Entry]:
        names = [*self._write.files, *self._content.rank_files]
        self._write.write()
        write_files(self._content.rank_files, self._temporary)
        return sealed_files(self._temporary, names)

    def _seal(self, gathered: list[Any], listed: list[dict[str, Entry]]) -> None:
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
