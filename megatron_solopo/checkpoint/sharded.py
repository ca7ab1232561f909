"""Writes this rank's share of a sharded state: Megatron plans who writes what, threads of this process write it.

Megatron's own writer forks processes for the same work, from a process that runs threads of CUDA and of the process
groups, and passes results through a further process that outlives a killed rank. Here nothing outlives anything, and
a write in the background is the same code as one that is waited for.
"""

import inspect
import queue
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedBase, is_main_replica
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch import Tensor

_FORMAT = CheckpointingConfig("torch_dist", 1)
# Files per rank, each written by a thread of its own.
_THREADS = 2


def state_bytes(state: dict[str, Any]) -> int:
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
        # Results stay in this process; Megatron's queue would be a process of its own.
        filesystem_async._results_queue = queue.Queue()
        strategy = _Planner(_FORMAT.sharded_backend, _FORMAT.sharded_backend_version, thread_count=_THREADS)
        options: dict[str, Any] = {}
        if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:
            options["async_strategy"] = "mcore"
        dist_checkpointing.save(
            state, str(folder), strategy, async_sharded_save=True, content_metadata=content_metadata, **options
        )
        self._folder, self._writer, self._metadata = folder, strategy.writer, strategy.metadata
        self._results: list[Any] = []

    @property
    def files(self) -> list[str]:
        """Names of the files that this rank writes."""
        return [name for _, name, _ in self._writer.write_buckets]

    def stage(self, *, copy: bool) -> None:
        """Bring the tensors to host memory; with `copy` also those that lie there, for training will change them."""
        for _, _, (_, tensors) in self._writer.write_buckets:
            for place, (item, tensor) in enumerate(tensors):
                staged = tensor.to("cpu")
                tensors[place] = (item, staged.clone() if copy and staged is tensor else staged)

    def write(self) -> None:
        """Write this rank's files, to the disk; raises what the file system raises."""
        buckets = self._writer.write_buckets
        with ThreadPoolExecutor(_THREADS) as pool:
            for results in pool.map(self._write_file, range(len(buckets)), buckets):
                self._results += results
        self._writer.write_buckets = []  # the copies are needed no more

    def _write_file(self, number: int, bucket: Any) -> list[Any]:
        transforms = [self._writer.transforms] if hasattr(self._writer, "transforms") else []
        results, running = queue.Queue[Any](), queue.Queue[int]()
        running.put(number)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, number, bucket, results, running, use_fsync=True
        )
        _, found = results.get()
        if isinstance(found, Exception):
            raise found
        written: list[Any] = found
        return written

    def gather(self) -> list[Any] | None:
        """On all ranks together, once each has written: what `finish` needs, on rank 0."""
        gathered: list[Any] | None = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
        dist.gather_object(self._results, gathered)
        return gathered

    def finish(self, gathered: list[Any]) -> None:
        """On rank 0: write the list of pieces, then the file that makes the directory a checkpoint."""
        self._writer.finish(self._metadata, gathered)
        save_config(_FORMAT, str(self._folder))


class _Planner(TorchDistSaveShardedStrategy):
    """Keeps the plan, of which Megatron would make functions to be called later."""

    writer: Any
    metadata: Any

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *strategy: Any) -> Any:
        self.writer, self.metadata = writer, planned[1]
        return super()._get_save_and_finalize_callbacks(writer, planned, *strategy)
