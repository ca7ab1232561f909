"""The order in which a run draws its triplets: from one source, or from several by their weights.

A source with weight w gets the share p = w / (sum of all weights) of the stream. Its k-th triplet (from 0) is due at
place (k + 1/2) / p. The stream takes the triplets in the order in which they are due; of those due at the same moment,
the one of the first source. So after n triplets every source has n * p of them, rounded: the apportionment of Webster.
Every batch has nearly the same mixture, and no random number decides it.

Within a source, triplets come in the order of a permutation, a new one for each pass over it. A heavy source is passed
over more often than a light one. With one source, this is the plain shuffled stream.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]


def shares(weights: Sequence[float]) -> NDArray[np.float64]:
    """The share of each source in the stream, float64 [len(weights)]; they add up to 1."""
    found: NDArray[np.float64] = np.asarray(weights, dtype=np.float64) / np.sum(weights)
    return found


@dataclass(frozen=True)
class Stream:
    """An endless stream of triplets. Its beginning is no state: each part can be asked for by itself."""

    lengths: Sequence[int]
    """Triplets of each source."""
    weights: Sequence[float]
    """Of the same sources, above 0."""
    seed: int

    def rows(self, start: int, end: int) -> IntArray:
        """The triplets at places start to end, as row numbers [end - start]. They count through all sources."""
        known, sources, draws = self._due(start, end)
        here = slice(start - known.sum(), end - known.sum())
        sources, draws = sources[here], draws[here]
        rows, first_row = np.empty(end - start, dtype=np.int64), 0
        for number, length in enumerate(self.lengths):
            own = sources == number
            rows[own] = first_row + self._rows_of_draws(number, draws[own])
            first_row += length
        return rows

    def drawn(self, places: int) -> tuple[int, ...]:
        """How many of the first `places` triplets come from each source."""
        known, sources, _ = self._due(places, places)
        more = np.bincount(sources[: places - known.sum()], minlength=len(self.lengths))
        return tuple((known + more).tolist())

    def _rows_of_draws(self, number: int, draws: IntArray) -> IntArray:
        """Rows of one source: for its k-th draw, counted from 0."""
        passes, offsets = np.divmod(draws, self.lengths[number])
        rows = np.empty_like(draws)
        for each in np.unique(passes):
            here = passes == each
            rows[here] = pass_order(self.lengths[number], self.seed, int(each), number)[offsets[here]]
        return rows

    def _due(self, start: int, end: int) -> tuple[IntArray, IntArray, IntArray]:
        """Draws in the order in which they are due, among them all that take the places from start to end.

        Returns how many draws of each source come before them, and of each of them its source and its number there.
        """
        portions, num_sources = shares(self.weights), len(self.weights)
        # By the moment t, a source has had p * t + 1/2 draws, rounded down. All together are t plus or minus half the
        # number of sources. So draws due this long before `start` come before it, and those due this long after `end`
        # come after it.
        known = np.maximum(0, np.floor(portions * (start - num_sources) + 0.5).astype(np.int64) - 1)
        last = np.ceil(portions * (end + num_sources) + 0.5).astype(np.int64) + 1
        draws = np.concatenate([np.arange(*span) for span in zip(known, last, strict=True)])
        sources = np.repeat(np.arange(num_sources), last - known)
        order = np.lexsort((sources, (draws + 0.5) / portions[sources]))
        return known, sources[order], draws[order]


def pass_order(length: int, seed: int, number: int, source: int = 0) -> IntArray:
    """Permutation of range(length): the order of pass `number` over a source.

    It sorts the raw output of the generator. numpy keeps that output stable between releases, unlike
    `Generator.permutation`. So a checkpoint continues on the same triplets under a newer numpy.
    """
    keys = np.random.PCG64(np.random.SeedSequence([seed, number, source])).random_raw(length)
    return np.argsort(keys, kind="stable")
