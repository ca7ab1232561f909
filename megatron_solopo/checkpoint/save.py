"""Writes one checkpoint of a run: planned by all ranks together, then written by each rank alone, in threads.

Megatron plans which rank writes what, and gives the file format. Megatron's own writer is not used: it forks processes
from a process that runs threads of CUDA and of the process groups, and one more process passes the results on and
outlives a killed rank. Threads end with their process, and a save in the background runs the same code as any other.
"""

import inspect
import queue
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megatron_solopo.architecture.model_directory import HUGGINGFACE_FOLDER, MEGATRON_LM_VERSION
from megatron_solopo.checkpoint.directory import TRAINER_STATE, checkpoint_name, publish, temporary_path
from megatron_solopo.checkpoint.manifest import FileEntry, sealed_files, write_manifest
from megatron_solopo.checkpoint.model_files import write_files
from megatron_solopo.checkpoint.sharded_state import SHARDING, model_state, optimizer_state_to_save
from megatron_solopo.errors import UserError
from megatron_solopo.files import described_bytes, remove, write_json
from megatron_solopo.parallel.agreement import on_every_rank, on_rank_0

_FORMAT = CheckpointingConfig("torch_dist", 1)
# Each rank writes this many files, each in a thread of its own.
_FILES_PER_RANK = 2
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
        background: bool = False,
    ) -> None:
        """Begin `root/iter_<step>`.

        Args:
            trainer_state: JSON values, equal on every rank, among them `step`.
            model_files: the config, tokenizer and so on that travel with the weights; those of rank 0 are written.
            background: on return the training state may change, because copies of it are being written. Otherwise this
                rank's files are written on return.

        Raises UserError on every rank, and leaves nothing behind, if a rank finds no room or cannot write.
        """
        step = trainer_state["step"]
        self.path, self._folder = root / checkpoint_name(step), temporary_path(root, step)
        self._trainer_state, self._model_files = trainer_state, model_files
        model = model_state(chunks)
        state = model | {"optimizer": optimizer_state_to_save(optimizer, model)} | MEGATRON_LM_VERSION
        needed = _sum_over_ranks(_bytes_to_write(state) + sum(map(len, model_files.values()))) + _SMALL_FILES_BYTES
        with self._removed_on_failure():
            on_rank_0(lambda: self._make_folder(needed))
        self._writer, self._metadata = _plan(state, self._folder)
        with self._removed_on_failure():
            on_every_rank(lambda: self._stage(copy=background))
        self._pool = ThreadPoolExecutor(1)
        self._written = self._pool.submit(self._write)
        if not background:
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
            if dist.get_rank() == 0:
                # Where nothing can be written, nothing can be removed either; the next run tries again.
                with suppress(OSError):
                    remove(self._folder)
            raise UserError(f"{self.path} was not saved: {error}; what was saved before is intact") from None

    def _make_folder(self, needed: int) -> None:
        """On rank 0."""
        remove(self._folder)
        self._folder.parent.mkdir(parents=True, exist_ok=True)
        free = _free_bytes(self._folder.parent)
        if free < needed:
            raise UserError(
                f"it takes {described_bytes(needed)}, but {described_bytes(free)} are free on its file system (make "
                "room, or set checkpoint.keep_last or run_dir)"
            )
        self._folder.mkdir()
        # While it plans, Megatron writes a small file on rank 0, and the other ranks wait. If the disk refuses such a
        # file, let that happen here, where all ranks learn of it.
        reserve = self._folder / "reserve"
        reserve.write_bytes(bytes(_RESERVE_BYTES))
        reserve.unlink()

    def _stage(self, *, copy: bool) -> None:
        """Bring the tensors to host memory. With `copy`, also copy those there, because training changes them."""
        for _, _, (_, tensors) in self._writer.write_buckets:
            for index, (item, tensor) in enumerate(tensors):
                staged = tensor.to("cpu")
                tensors[index] = (item, staged.clone() if copy and staged is tensor else staged)

    def _write(self) -> tuple[list[Any], dict[str, FileEntry]]:
        """In the thread: write this rank's files; returns Megatron's results and the manifest's entries."""
        buckets = self._writer.write_buckets
        with ThreadPoolExecutor(_FILES_PER_RANK) as pool:
            results = [each for file in pool.map(self._write_file, range(len(buckets)), buckets) for each in file]
        self._writer.write_buckets = []  # frees the staged tensors
        return results, sealed_files(self._folder, [name for _, name, _ in buckets])

    def _write_file(self, number: int, bucket: Any) -> list[Any]:
        transforms = [self._writer.transforms] if hasattr(self._writer, "transforms") else []
        results, running = queue.Queue[Any](), queue.Queue[int]()
        running.put(number)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, number, bucket, results, running, use_fsync=True
        )
        _, found = results.get()
        if isinstance(found, Exception):
            # torch's writer turns a full disk into a RuntimeError; the operating system's error is behind it.
            causes = (each for each in (found.__cause__, found.__context__) if isinstance(each, OSError))
            raise next(causes, found)
        written: list[Any] = found
        return written

    def _seal(self, written: list[tuple[list[Any], dict[str, FileEntry]]]) -> None:
        """On rank 0: write the list of pieces, the files that make the folder a checkpoint, and the manifest."""
        self._writer.finish(self._metadata, [results for results, _ in written])
        save_config(_FORMAT, str(self._folder))
        write_files(self._model_files, self._folder / HUGGINGFACE_FOLDER)
        write_json(self._folder / TRAINER_STATE, self._trainer_state)
        files = {name: entry for _, entries in written for name, entry in entries.items()}
        present = (str(path.relative_to(self._folder)) for path in self._folder.rglob("*") if path.is_file())
        files |= sealed_files(self._folder, [name for name in present if name not in files])
        write_manifest(self._folder, files)
        publish(self._folder, self.path)


class _KeptPlan(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """Keeps the plan that Megatron would turn into functions to be called later."""

    writer: Any
    metadata: Any

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *strategy: Any) -> Any:
        self.writer, self.metadata = writer, planned[1]
        return super()._get_save_and_finalize_callbacks(writer, planned, *strategy)


def _plan(state: dict[str, Any], folder: Path) -> tuple[Any, Any]:
    """Plan on all ranks together; returns this rank's writer and, on rank 0, the checkpoint's metadata.

    It writes nothing, except rank 0's `common.pt` under megatron-core 0.16.
    """
    # Keep results in this process; Megatron would start another process for its queue.
    filesystem_async._results_queue = queue.Queue()
    plan = _KeptPlan(_FORMAT.sharded_backend, _FORMAT.sharded_backend_version, thread_count=_FILES_PER_RANK)
    options: dict[str, Any] = {}
    if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:  # from megatron-core 0.19 on
        options["async_strategy"] = "mcore"
    dist_checkpointing.save(
        state, str(folder), plan, async_sharded_save=True, content_metadata=dict(SHARDING), **options
    )
    return plan.writer, plan.metadata


def _bytes_to_write(state: dict[str, Any]) -> int:
    """Bytes of the tensors that this rank writes; their sum over the ranks is what a checkpoint takes."""
    return sum(
        each.data.nbytes
        for each in nested_values(state)
        if isinstance(each, ShardedBase) and isinstance(each.data, Tensor) and is_main_replica(each.replica_id)
    )


def _free_bytes(path: Path) -> int:
    return shutil.disk_usage(path).free


def _sum_over_ranks(count: int) -> int:
    device = "cpu" if dist.get_backend() == "gloo" else torch.cuda.current_device()
    total = torch.tensor(count, dtype=torch.int64, device=device)
    dist.all_reduce(total)
    return int(total)
