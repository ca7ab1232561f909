"""Triplets by the length of their long context and by the depth of their evidence."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Mask = NDArray[np.bool_]
DEPTH_EDGES = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


def bucket_bound(tokens: int) -> int:
    """The least power of two that is not below this number of tokens."""
    return 1 << (max(tokens, 1) - 1).bit_length()


def by_length(tokens: NDArray[np.int64]) -> Iterator[tuple[dict[str, Any], Mask]]:
    """Powers of two: {"above": 4096, "up_to": 8192} holds lengths in (4096, 8192]; only buckets that hold any."""
    bounds = np.array([bucket_bound(int(each)) for each in tokens], dtype=np.int64)
    for up_to in map(int, np.unique(bounds)):
        yield {"above": up_to // 2, "up_to": up_to}, bounds == up_to


def by_depth(depths: Sequence[Sequence[float]]) -> Iterator[tuple[dict[str, Any], Mask]]:
    """Fifths of the long context, {"start": 0.2, "end": 0.4}; {"start": None, "end": None} where the depth is unknown.

    A triplet whose evidence lies in several pieces counts once in every fifth that holds one.
    """
    last = len(DEPTH_EDGES) - 2
    fifths = [{min(int(np.searchsorted(DEPTH_EDGES, d, "right")) - 1, last) for d in each} for each in depths]
    for place in range(last + 1):
        mask = np.array([place in each for each in fifths], dtype=bool)
        if mask.any():
            yield {"start": DEPTH_EDGES[place], "end": DEPTH_EDGES[place + 1]}, mask
    unknown = np.array([not each for each in fifths], dtype=bool)
    if unknown.any():
        yield {"start": None, "end": None}, unknown
