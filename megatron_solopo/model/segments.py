"""Segments: which keys the queries of a rank see, under packing, shared prompts and context parallelism.

A segment is a run of this rank's queries, and the runs of keys that they see. The mask is causal at the lower right:
the last query sees all keys of the segment, the one before sees one key less. One such list describes every pack. A
response behind a shared prompt is a segment with two runs of keys: the prompt, and the response itself. A rank of
context parallelism has two chunks of each block, and each chunk has its own segments.

Shapes: T positions of the pack, t = T / CP, K keys of all segments, which occur in several segments.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from megatron_solopo.data.blocks import Block, attended_runs
from megatron_solopo.data.packing import Pack
from megatron_solopo.parallel.context import gathered_order


@dataclass(frozen=True, eq=False)
class Segments:
    """The segments of this rank's queries, in the order of the queries."""

    query_lengths: tuple[int, ...]
    """Queries of each segment. Their sum is t."""
    key_lengths: tuple[int, ...]
    """Keys of each segment. Their sum is K."""
    keys_K: Tensor | None
    """int64: places of the keys among those of all context-parallel ranks, one rank behind the other. None: each key
    occurs once and in its order, so there is nothing to gather."""

    @property
    def boundaries(self) -> tuple[Tensor, Tensor]:
        """Boundaries of the segments among the queries and among the keys, int32."""
        lengths = (self.query_lengths, self.key_lengths)
        queries, keys = (torch.from_numpy(np.cumsum((0, *each), dtype=np.int32)) for each in lengths)
        return queries, keys


def blocks_of(pack: Pack) -> list[Block]:
    """The blocks of a pack, in their order."""
    starts, ends = pack.cu_seqlens_B1[:-1].tolist(), pack.cu_seqlens_B1[1:].tolist()
    responses: list[list[int]] = [[] for _ in starts]
    for block, start in zip(pack.blocks_S.tolist(), pack.response_starts_S.tolist(), strict=True):
        responses[block].append(start)
    prompts = pack.prompt_lengths_B.tolist()
    return [
        Block(start, start + prompt, tuple(sorted(own)), end)
        for start, prompt, own, end in zip(starts, prompts, responses, ends, strict=True)
    ]


def plan_segments(blocks: Sequence[Block], size: int, rank: int) -> Segments:
    """Plan the segments of context-parallel rank `rank` of `size`, on the host."""
    runs = list(attended_runs(blocks, size, rank))
    query_lengths, keys = tuple(len(queries) for queries, _ in runs), [keys for _, keys in runs]
    key_lengths = tuple(sum(map(len, each)) for each in keys)
    if size == 1 and all(len(each) == 1 for each in keys):
        return Segments(query_lengths, key_lengths, None)
    places_K = np.concatenate([np.arange(run.start, run.stop) for each in keys for run in each])
    if size > 1:
        boundaries = torch.tensor([*(block.start for block in blocks), blocks[-1].end], device="cpu")
        places_K = gathered_order(boundaries, size).numpy()[places_K]
    return Segments(query_lengths, key_lengths, torch.from_numpy(places_K))


@lru_cache(maxsize=4)
def segments_of_sequences(boundaries: tuple[int, ...], size: int, rank: int) -> Segments:
    """The segments of sequences that share nothing. Every layer asks for them, also when it is computed again."""
    blocks = [Block(start, end, (), end) for start, end in pairwise(boundaries)]
    return plan_segments(blocks, size, rank)
