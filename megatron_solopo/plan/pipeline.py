"""Megatron-Core's pipeline schedules: the order of work on every stage, its timeline, what is alive when.

Plain 1F1B and the interleaved schedule of megatron/core/pipeline_parallel/schedules.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple


class Work(NamedTuple):
    """A forward or backward pass of one micro-batch through one model chunk."""

    is_forward: bool
    chunk: int
    microbatch: int


class Span(NamedTuple):
    """When a stage does it, in seconds from the start of the step."""

    work: Work
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """All stages of one pipeline."""

    stages: tuple[tuple[Span, ...], ...]

    @property
    def seconds(self) -> float:
        """Until the last stage is done."""
        return max(spans[-1].end for spans in self.stages)

    @property
    def bubble(self) -> float:
        """Share of all stages' time that is spent waiting."""
        busy = sum(span.end - span.start for spans in self.stages for span in spans)
        return 1 - busy / (self.seconds * len(self.stages))


@cache
def stage_order(rank: int, size: int, chunks: int, microbatches: int) -> tuple[Work, ...]:
    """What a pipeline rank does, in order.

    Args:
        chunks: model chunks per rank; with more than one, `microbatches` is a multiple of `size`.
    """
    total = chunks * microbatches
    to_come = size - rank - 1
    warm_up = min(to_come if chunks == 1 else 2 * to_come + (chunks - 1) * size, total)

    def work(number: int, is_forward: bool) -> Work:
        group, within = divmod(number, size * chunks)
        chunk, place = divmod(within, size)
        if chunks == 1:
            return Work(is_forward, 0, number)
        return Work(is_forward, chunk if is_forward else chunks - 1 - chunk, group * size + place)

    order = [work(number, True) for number in range(warm_up)]
    for number in range(total - warm_up):
        order += [work(warm_up + number, True), work(number, False)]
    return tuple(order + [work(number, False) for number in range(total - warm_up, total)])


def most_alive(order: Sequence[Work], bytes_of: Callable[[int, int], float]) -> float:
    """Greatest sum, at any moment, over forwards whose backward is still to come.

    Args:
        bytes_of: (chunk, microbatch) -> what its forward keeps.
    """
    alive = most = 0.0
    for work in order:
        amount = bytes_of(work.chunk, work.microbatch)
        alive += amount if work.is_forward else -amount
        most = max(most, alive)
    return most


def simulate(
    size: int, chunks: int, microbatches: int, seconds_of: Callable[[int, Work], float], message_seconds: float
) -> Timeline:
    """Run the schedule: each stage in its order, each piece as soon as what it needs has arrived.

    Args:
        seconds_of: (rank, work) -> how long it takes.
        message_seconds: from one stage to the next.
    """
    orders = [stage_order(rank, size, chunks, microbatches) for rank in range(size)]
    done: dict[tuple[int, Work], float] = {}
    spans: list[list[Span]] = [[] for _ in range(size)]
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
                spans[rank].append(Span(work, start, clocks[rank]))
            if len(spans[rank]) == len(orders[rank]):
                waiting.remove(rank)
    return Timeline(tuple(tuple(each) for each in spans))


def _ready(
    rank: int, work: Work, size: int, chunks: int, done: dict[tuple[int, Work], float], message: float
) -> float | None:
    """When its input is there; None: what makes it has not been simulated yet."""
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
