"""The order of forward and backward passes on every pipeline stage, and what they keep in memory.

The schedules are plain 1F1B and the interleaved one of megatron/core/pipeline_parallel/schedules.py.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple


class ChunkPass(NamedTuple):
    """A forward or backward pass of one micro-batch through one model chunk."""

    is_forward: bool
    chunk: int
    microbatch: int


@cache
def stage_order(rank: int, size: int, chunks: int, microbatches: int) -> tuple[ChunkPass, ...]:
    """The passes of a pipeline rank in order.

    Args:
        chunks: model chunks per rank; with more than one, `microbatches` is a multiple of `size`.
    """
    total = chunks * microbatches
    to_come = size - rank - 1
    warm_up = min(to_come if chunks == 1 else 2 * to_come + (chunks - 1) * size, total)

    def work(number: int, is_forward: bool) -> ChunkPass:
        group, within = divmod(number, size * chunks)
        chunk, place = divmod(within, size)
        if chunks == 1:
            return ChunkPass(is_forward, 0, number)
        return ChunkPass(is_forward, chunk if is_forward else chunks - 1 - chunk, group * size + place)

    order = [work(number, True) for number in range(warm_up)]
    for number in range(total - warm_up):
        order += [work(warm_up + number, True), work(number, False)]
    return tuple(order + [work(number, False) for number in range(total - warm_up, total)])


def packs_at_peak(size: int, chunks: int) -> int:
    """The fewest packs of a step with which each stage keeps as much as with any larger number.

    Before its first backward pass, the first stage runs PP - 1 forward passes. With VPP chunks it runs
    2 x (PP - 1) + (VPP - 1) x PP. It keeps one more. These (VPP + 1) x PP - 1 passes are more than the VPP x PP of the
    first PP packs, but fewer than those of 2 x PP packs. Later passes only repeat what is in flight by then.
    """
    return size if chunks == 1 else 2 * size


def receiving_order(rank: int, size: int, chunks: int, microbatches: int) -> tuple[list[int], list[int]]:
    """The micro-batches whose hidden states, and whose gradients, come from another stage, in order of arrival."""
    order = stage_order(rank, size, chunks, microbatches)
    from_previous = [work for work in order if work.is_forward and (rank, work.chunk) != (0, 0)]
    from_next = [work for work in order if not work.is_forward and (rank, work.chunk) != (size - 1, chunks - 1)]
    return [work.microbatch for work in from_previous], [work.microbatch for work in from_next]


def peak_in_flight(order: Sequence[ChunkPass], bytes_of: Callable[[int, int], float]) -> float:
    """Most bytes that forward passes keep at any moment; each keeps its bytes until its backward pass.

    Args:
        bytes_of: (chunk, microbatch) -> bytes that its forward pass keeps.
    """
    kept = most = 0.0
    for work in order:
        amount = bytes_of(work.chunk, work.microbatch)
        kept += amount if work.is_forward else -amount
        most = max(most, kept)
    return most
