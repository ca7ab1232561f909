"""Host memory for copies of what one rank saves. It is allocated once, in a thread beside the steps, and kept.

A save in the background copies the state before it returns. To fill fresh memory takes five times as long as to fill
memory that this process has had before, because the operating system clears it page by page. No step waits for that.
"""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories, is_main_replica
from torch import Tensor

_Place = tuple[str, tuple[int, ...]]


class HostCopies:
    """Copies of the tensors that this rank writes, by their places in a checkpoint."""

    def __init__(self) -> None:
        self._tensors: dict[_Place, Tensor] = {}
        self._pool = ThreadPoolExecutor(1, "host memory")
        self._reserved: Future[None] | None = None
        self._closed = threading.Event()

    def reserve(self, state: dict[str, Any]) -> None:
        """Begin to allocate and to fill the memory for `state` in a thread; returns at once. No other rank is asked."""
        self.wait()
        # The thread sees no tensor of the run: only places, shapes and types.
        wanted = [(_place(each), each.data.shape, each.data.dtype) for each in _written(state)]
        self._reserved = self._pool.submit(self._fill, wanted)

    def wait(self) -> None:
        """Wait until the reserved memory is there. Raises RuntimeError, torch's own, if there is too little."""
        if self._reserved is not None:
            reserved, self._reserved = self._reserved, None
            reserved.result()

    def take(self, state: dict[str, Any]) -> None:
        """Copy the tensors that this rank writes, and put the copies into `state`. Waits and raises as `wait` does."""
        self.wait()
        for each in _written(state):
            each.data = self._memory(_place(each), each.data.shape, each.data.dtype).copy_(each.data.detach())

    def close(self) -> None:
        """End the thread, also in the middle of its work. It raises nothing."""
        self._closed.set()
        self._pool.shutdown()

    def _fill(self, wanted: Sequence[tuple[_Place, torch.Size, torch.dtype]]) -> None:
        """The thread."""
        for place, shape, dtype in wanted:
            if self._closed.is_set():
                return
            self._memory(place, shape, dtype).zero_()

    def _memory(self, place: _Place, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        held = self._tensors.get(place)
        if held is None or (held.shape, held.dtype) != (shape, dtype):
            held = self._tensors[place] = torch.empty(shape, dtype=dtype, device="cpu")
        return held


def _written(state: dict[str, Any]) -> Iterator[ShardedTensor]:
    """The tensors of `state` that this rank writes.

    Quantized weights take another way: they are copied when they are dequantized.
    """
    apply_factories(state)
    for each in nested_values(state):
        is_plain = isinstance(each, ShardedTensor) and type(each.data) in (Tensor, torch.nn.Parameter)
        if is_plain and is_main_replica(each.replica_id):
            yield each


def _place(tensor: ShardedTensor) -> _Place:
    return tensor.key, tensor.global_offset
