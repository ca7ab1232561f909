"""The timeline of a pipeline: when each stage runs each pass, and how long it waits."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from megatron_solopo.architecture.pipeline_layout import parse_layout
from megatron_solopo.architecture.pipeline_schedule import ChunkPass, stage_order
from megatron_solopo.config import ParallelConfig


class TimedPass(NamedTuple):
    """A pass with its start and end, in seconds from the start of the step."""

    work: ChunkPass
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The passes of all stages of one pipeline."""

    stages: tuple[tuple[TimedPass, ...], ...]

    @property
    def seconds(self) -> float:
        """Seconds until the last stage is done."""
        return max(spans[-1].end for spans in self.stages)

    @property
    def bubble(self) -> float:
        """Share of all stages' time that is spent waiting, in [0, 1)."""
        busy = sum(span.end - span.start for spans in self.stages for span in spans)
        return 1 - busy / (self.seconds * len(self.stages))


def simulate_schedule(
    size: int, chunks: int, microbatches: int, seconds_of: Callable[[int, ChunkPass], float], message_seconds: float
) -> Timeline:
    """Time the schedule. Each stage keeps its order and starts a pass as soon as its input has arrived.

    Args:
        seconds_of: (pipeline rank, pass) -> its seconds.
        message_seconds: seconds of a message from one stage to the next.
    """
    orders = [stage_order(rank, size, chunks, microbatches) for rank in range(size)]
    done: dict[tuple[int, ChunkPass], float] = {}
    spans: list[list[TimedPass]] = [[] for _ in range(size)]
    clocks = [0.0] * size
    waiting = set(range(size))
    while waiting:
        for rank in sorted(waiting):
            for work in orders[rank][len(spans[rank]) :]:
                ready = _ready(rank, work, size, chunks, done, message_seconds)
                if ready is None:
                    break
                start = max(clocks[rank], ready)
                clocks[rank] = start + seconds_of(rank, work)
                done[rank, work] = clocks[rank]
                spans[rank].append(TimedPass(work, start, clocks[rank]))
            if len(spans[rank]) == len(orders[rank]):
                waiting.remove(rank)
    return Timeline(tuple(tuple(each) for each in spans))


def pipeline_bubble(parallel: ParallelConfig, num_packs: int) -> float:
    """Share of time that a pipeline's ranks wait in a step of equal packs, in [0, 1).

    Of equal stages it is (PP - 1) / (VPP x packs + PP - 1): Megatron-LM, arXiv 2104.04473, section 2.2, as a share of
    the whole step. In a layout, embedding and loss count as a layer each. Backward takes twice as long as forward.
    """
    size, chunks = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    layout = parallel.pipeline_model_parallel_layout
    work = [1] * (size * chunks) if layout is None else [len(stage) for stage in parse_layout(layout)]

    def seconds(rank: int, each: ChunkPass) -> float:
        return work[each.chunk * size + rank] * (1 if each.is_forward else 2)

    return simulate_schedule(size, chunks, num_packs, seconds, message_seconds=0.0).bubble


def _ready(
    rank: int, work: ChunkPass, size: int, chunks: int, done: dict[tuple[int, ChunkPass], float], message: float
) -> float | None:
    """When the input of a pass is there; None: the pass that makes it is not simulated yet."""
    stage = work.chunk * size + rank
    if work.is_forward:
        if stage == 0:
            return 0.0
        before = stage - 1
    elif stage == size * chunks - 1:
        return done.get((rank, work._replace(is_forward=True)))
    else:
        before = stage + 1
    chunk, other = divmod(before, size)
    end = done.get((other, work._replace(chunk=chunk)))
    return None if end is None else end + (message if other != rank else 0.0)
