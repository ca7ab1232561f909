"""Writes one checkpoint of a run: planned by all ranks together, then written by each rank alone, in threads.

Megatron plans which rank writes what, and gives the file format (`ShardedFiles`). The threads end with their process,
and a save in the background runs the same code as any other.
"""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, is_main_replica
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_solopo.architecture.model_directory import HUGGINGFACE_FOLDER, MEGATRON_LM_VERSION
from megatron_solopo.checkpoint.directory import TRAINER_STATE, checkpoint_name, publish, temporary_path
from megatron_solopo.checkpoint.host_copies import HostCopies
from megatron_solopo.checkpoint.manifest import FileEntry, sealed_files, write_manifest
from megatron_solopo.checkpoint.model_files import write_files
from megatron_solopo.checkpoint.sharded_state import SHARDING, state_to_save
from megatron_solopo.errors import OutOfSpaceError, UserError
from megatron_solopo.files import described_bytes, remove, write_json
from megatron_solopo.parallel.agreement import on_every_rank, on_rank_0
from megatron_solopo.parallel.megatron_internals import SavePlans, ShardedFiles

_FORMAT = CheckpointingConfig("torch_dist", 1)
# Each rank writes this many files, each in a thread of its own.
FILES_PER_RANK = 2
# For everything that is not a tensor: Megatron's lists of pieces, and the file system's own data.
_SMALL_FILES_BYTES = 1 << 20
_RESERVE_BYTES = 1 << 16


class ShardedSave:
    """One checkpoint on its way to the disk. All ranks create and complete it together.

    The constructor plans which rank writes what, stages the tensors in host memory and starts the thread that writes.
    `complete` waits for the files of all ranks, gathers what was written, seals the checkpoint (metadata, manifest,
    everything on the disk) and publishes it: it gets its name, and `latest` points to it.
    """

    def __init__(
        self,
        root: Path,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        trainer_state: dict[str, Any],
        model_files: Mapping[str, bytes],
        *,
        copies: HostCopies | None = None,
        in_background: bool = False,
        plans: SavePlans | None = None,
    ) -> None:
        """Begin `root/iter_<step>`.

        Args:
            trainer_state: JSON values, equal on every rank, among them `step`.
            model_files: the config, tokenizer and so on that travel with the weights; those of rank 0 are written.
            copies: where to copy what is written. It must live until the save is complete. None: what is not in host
                memory is copied there for this save alone.
            in_background: return while threads still write. The training state may change then, because `copies` holds
                what is written. False: this rank's files are written on return.
            plans: those of this run's save before, which this one takes over where no rank writes other pieces. They
                become those of this save. All ranks have them, or none.

        Raises UserError on every rank, and leaves nothing behind, if a rank finds no room or cannot write.
        """
        assert copies is not None or not in_background, "the training state changes beside a save in the background"
        step = trainer_state["step"]
        self.path, self._folder = root / checkpoint_name(step), temporary_path(root, step)
        self._trainer_state, self._model_files = trainer_state, model_files
        state = state_to_save(chunks, optimizer) | MEGATRON_LM_VERSION
        small_files = sum(map(len, model_files.values()))
        self._needed = _sum_over_ranks(_bytes_to_write(state) + small_files) + _SMALL_FILES_BYTES
        with self._removed_on_failure():
            on_rank_0(self._make_folder)
        if copies is not None:
            copies.take(state)
        plans = plans or new_plans()
        if _sum_over_ranks(0 if plans.are_of(state) else 1):
            plans.forget()
        self._files = ShardedFiles(state, self._folder, dict(SHARDING), plans)
        with self._removed_on_failure():
            on_every_rank(self._files.stage)
        self._pool = ThreadPoolExecutor(1)
        self._written = self._pool.submit(self._write)
        if not in_background:
            self._written.exception()  # waits; `complete` raises it on all ranks

    def is_written(self) -> bool:
        """Whether the files of all ranks are on the disk, or failed to get there. All ranks call it together."""
        return _sum_over_ranks(0 if self._written.done() else 1) == 0

    def complete(self) -> Path:
        """Wait for the files of all ranks, then seal and publish the checkpoint; returns its path.

        Raises UserError on every rank if the file system refused a file of one of them. Then nothing of this
        checkpoint is left, and the older ones are unchanged.
        """
        try:
            with self._removed_on_failure():
                written = on_every_rank(self._written.result)
                gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
                dist.gather_object(written, gathered)
                on_rank_0(lambda: self._seal(gathered or []))
        finally:
            self._pool.shutdown()
        return self.path

    def abandon(self) -> None:
        """After a failure, call this instead of `complete`: wait for this rank's own thread, and for no other rank.

        The files stay under their temporary name. The next save of that step removes them.
        """
        self._pool.shutdown()

    @contextmanager
    def _removed_on_failure(self) -> Iterator[None]:
        """Around an error that all ranks raise together, when no rank writes any more."""
        try:
            yield
        except UserError as error:
            room = on_rank_0(self._discard)
            if isinstance(error, OutOfSpaceError):
                error = OutOfSpaceError(f"{error} ({room}; make room, or set checkpoint.keep_last or run_dir)")
            raise type(error)(f"{self.path} was not saved: {error}; what was saved before is intact") from None

    def _discard(self) -> str:
        """On rank 0: remove what was written; returns how much room there is now, and how much a checkpoint takes."""
        # Where nothing can be written, nothing can be removed either; the next run tries again.
        with suppress(OSError):
            remove(self._folder)
        return f"it takes {described_bytes(self._needed)}, and its file system has {_described_room(self.path.parent)}"

    def _make_folder(self) -> None:
        """On rank 0."""
        remove(self._folder)
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        if _free_bytes(self._folder.parent) < self._needed:
            raise OutOfSpaceError("there is too little room")
        self._folder.mkdir()
        # While it plans, Megatron writes a small file on rank 0, and the other ranks wait. If the disk refuses such a
        # file, let that happen here, where all ranks learn of it.
        reserve = self._folder / "reserve"
        reserve.write_bytes(bytes(_RESERVE_BYTES))
        reserve.unlink()

    def _write(self) -> tuple[list[Any], dict[str, FileEntry]]:
        """In the thread: write this rank's files; returns Megatron's results and the manifest's entries."""
        names = self._files.names
        with ThreadPoolExecutor(FILES_PER_RANK) as pool:
            results = [each for file in pool.map(self._write_file, range(len(names))) for each in file]
        self._files.release()
        return results, sealed_files(self._folder, names)

    def _write_file(self, number: int) -> list[Any]:
        try:
            return self._files.write(number)
        except RuntimeError as error:
            # torch's writer turns a full disk into a RuntimeError; the operating system's error is behind it.
            for cause in (error.__cause__, error.__context__):
                if isinstance(cause, OSError):
                    raise cause from None
            raise

    def _seal(self, written: list[tuple[list[Any], dict[str, FileEntry]]]) -> None:
        """On rank 0: write the list of pieces, the files that make the folder a checkpoint, and the manifest."""
        self._files.finish([results for results, _ in written])
        save_config(_FORMAT, str(self._folder))
        write_files(self._model_files, self._folder / HUGGINGFACE_FOLDER)
        write_json(self._folder / TRAINER_STATE, self._trainer_state)
        files = {name: entry for _, entries in written for name, entry in entries.items()}
        present = (str(path.relative_to(self._folder)) for path in self._folder.rglob("*") if path.is_file())
        files |= sealed_files(self._folder, [name for name in present if name not in files])
        write_manifest(self._folder, files)
        publish(self._folder, self.path)


def new_plans() -> SavePlans:
    """Plans of no save, for all saves of a run."""
    return SavePlans(FILES_PER_RANK)


def _bytes_to_write(state: dict[str, Any]) -> int:
    """Bytes of the tensors that this rank writes; their sum over the ranks is what a checkpoint takes."""
    return sum(
        each.data.nbytes
        for each in nested_values(state)
        if isinstance(each, ShardedBase) and isinstance(each.data, Tensor) and is_main_replica(each.replica_id)
    )


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(path).free


def _described_room(root: Path) -> str:
    """Free bytes of the file system of `root`, or that they are not known: an unmounted one does not tell."""
    try:
        return f"{described_bytes(_free_bytes(root))} free"
    except OSError:
        return "an unknown number of bytes free"


def _sum_over_ranks(count: int) -> int:
    device = "cpu" if dist.get_backend() == "gloo" else torch.cuda.current_device()
    total = torch.tensor(count, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return int(total)
