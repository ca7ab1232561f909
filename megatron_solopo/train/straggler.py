"""Which rank the others wait for: each rank's own work in a step, and how far the slowest rank is behind.

All ranks end a step together, so step times are equal. What differs is the own work: the time from the moment when all
ranks begin a step until a rank's gradients are complete, before it waits for other ranks to sum them.

The ranks of one replica of the model (TP, CP and PP) wait for each other within their work. So they are late together,
and replicas are compared. A slow rank of a replica is not told from the replica's other ranks.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

# Ranks whose times differ by less than this share of a step cannot be told apart.
_RESOLUTION = 0.01


class WorkClock:
    """Measures this rank's own work in a step, in seconds of the device: on a GPU, with events in its stream."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._moments: list[Any] = []

    def start(self) -> None:
        """The step's work begins."""
        self._moments = []
        self.switch()

    def switch(self) -> None:
        """The work is interrupted for a wait, goes on after one, or ends."""
        if self._is_cuda:
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._moments.append(event)
        else:
            self._moments.append(time.perf_counter())

    def seconds(self) -> float:
        """Time of the work since `start`; waits for the device."""
        if self._is_cuda:
            self._moments[-1].synchronize()
        pairs = zip(self._moments[::2], self._moments[1::2], strict=True)
        return float(sum(begin.elapsed_time(end) / 1000 if self._is_cuda else end - begin for begin, end in pairs))


@dataclass(frozen=True)
class Straggler:
    """The slowest rank of a step."""

    rank: int
    share: float
    """Share of the step that the same stages of the other replicas wait for it, on average."""


def find_straggler(
    work_seconds: Sequence[float], step_seconds: float, *, ranks_per_replica_stage: int, stages: int
) -> Straggler | None:
    """Compare the ranks' work in a step; returns None if there is only one replica of the model.

    Of a replica's ranks that cannot be told apart, the lowest is named.

    Args:
        work_seconds: by rank, in Megatron-Core's order: TP and CP vary first, then DP, then the pipeline stage.
        ranks_per_replica_stage: TP x CP.
        stages: PP.
    """
    # [rank] -> [PP, DP, TP x CP]
    seconds = torch.tensor(work_seconds, dtype=torch.float64, device="cpu").view(stages, -1, ranks_per_replica_stage)
    replicas = seconds.size(1)
    if replicas == 1:
        return None
    of_replica = seconds.mean(dim=2, keepdim=True)
    of_others = (of_replica.sum(dim=1, keepdim=True) - of_replica) / (replicas - 1)
    behind = seconds - of_others
    most = float(behind.max())
    late = int(behind.amax(dim=(0, 2)).argmax())
    ranks = torch.arange(len(work_seconds), device="cpu").view_as(seconds)[:, late]
    named = ranks[behind[:, late] >= most - _RESOLUTION * step_seconds]
    return Straggler(int(named[0]), most / step_seconds)
