"""Exact counts of what torch does on a CPU: bytes of tensors, and floating-point operations. No clock is in them."""

import os
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any, Self

import torch
from torch import Tensor


class TensorPeak:
    """A context in which torch's allocator is watched."""

    bytes: int
    """After it: the most that was handed out at any moment, beyond what was handed out before."""

    def __enter__(self) -> Self:
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")
        activities = [torch.profiler.ProfilerActivity.CPU]
        self._profiler: Any = torch.profiler.profile(activities=activities, profile_memory=True)
        self._profiler.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._profiler.stop()
        events = [event for event in self._profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        changes = [int(event.nbytes()) for event in sorted(events, key=lambda event: event.start_ns())]
        self.bytes = max(accumulate(changes), default=0)


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory that these tensors lie in. What several share counts once."""
    storages = (tensor.untyped_storage() for tensor in tensors)
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """The weights that an optimizer updates, and its state of them. Counters of steps do not count."""
    for group in optimizer.param_groups:
        yield from group["params"]
    for state in optimizer.state.values():
        yield from (value for value in state.values() if torch.is_tensor(value) and value.dim() > 0)
