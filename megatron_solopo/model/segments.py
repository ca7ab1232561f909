"""Segments: which keys the queries of a rank see, under packing, shared prompts and context parallelism.

A segment is a run of this rank's queries, and the runs of keys that they see. The mask is causal at the lower right:
the last query sees all keys of the segment, the one before sees one key less. One such list describes every pack. A
response behind a shared prompt is a segment with two runs of keys: the prompt, and the response itself. A rank of
context parallelism has two chunks of each block, and each chunk has its own segments.

Shapes: T positions of the pack, t = T / CP, K keys of all segments, which occur in several segments.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_solopo.data.blocks import Block, attended_runs
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
    copies: tuple[tuple[Tensor, Tensor], ...] = ()
    """The same from the place to its copies: the places that have a first copy, and the rows of `keys_K` with it; then
    those that have a second one, and so on. int64, and no place comes twice among those of one number."""
    _masks: list[dict[str, Any]] = field(default_factory=list, init=False)

    @property
    def boundaries(self) -> tuple[Tensor, Tensor]:
        """Boundaries of the segments among the queries and among the keys, int32."""
        lengths = (self.query_lengths, self.key_lengths)
        queries, keys = (torch.from_numpy(np.cumsum((0, *each), dtype=np.int32)) for each in lengths)
        return queries, keys

    def masks(self, query: Tensor) -> list[dict[str, Any]]:
        """The mask of each segment, see `causal_mask`. Built once, and shared by all layers."""
        if not self._masks:
            lengths = zip(self.query_lengths, self.key_lengths, strict=True)
            self._masks.extend(causal_mask(*each, query) for each in lengths)
        return self._masks

    def moved(self, move: Callable[[Tensor], Tensor]) -> "Segments":
        """The same on the device that `move` brings tensors to."""
        keys_K = None if self.keys_K is None else move(self.keys_K)
        copies = tuple((move(places), move(rows)) for places, rows in self.copies)
        return Segments(self.query_lengths, self.key_lengths, keys_K, copies)


def causal_mask(num_queries: int, num_keys: int, query: Tensor) -> dict[str, Any]:
    """The mask for queries that are the last positions of the keys, as keywords of torch's attention.

    Args:
        query: any tensor of the precision and on the device of the queries.
    """
    if num_queries == num_keys:
        return {"is_causal": True}
    if query.device.type == "cuda":  # no tensor: the kernel knows this mask
        # Imports torch's compiler, which takes a second.
        from torch.nn.attention.bias import causal_lower_right

        return {"attn_mask": causal_lower_right(num_queries, num_keys)}
    # Of booleans, the kernel would make this for itself in every layer, and keep it for backward.
    hidden = query.new_full((num_queries, num_keys), -torch.inf)
    return {"attn_mask": hidden.triu(num_keys - num_queries + 1)}


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
    return Segments(query_lengths, key_lengths, torch.from_numpy(places_K), _copies(places_K))


def _copies(places_K: NDArray[np.int64]) -> tuple[tuple[Tensor, Tensor], ...]:
    """See `Segments.copies`."""
    rows_K = np.argsort(places_K, kind="stable")
    ordered_K = places_K[rows_K]
    first = np.flatnonzero(np.diff(ordered_K, prepend=-1))
    number_K = np.arange(len(rows_K)) - np.repeat(first, np.diff(first, append=len(rows_K)))
    chosen = [number_K == number for number in range(number_K.max() + 1)]
    return tuple((torch.from_numpy(ordered_K[here]), torch.from_numpy(rows_K[here])) for here in chosen)
