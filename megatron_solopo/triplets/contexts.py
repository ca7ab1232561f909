"""The documents of a context: how many tokens they fill, and where the evidence lies among them.

Depth of a document: the position of its middle among the tokens of all documents, from 0 to 1.

Depths are spread by Latin hypercube sampling (McKay et al. 1979). Over the whole data set, the first pieces of
evidence have one stratum each, the second pieces have one stratum each, and so on. The orders of the strata are
independent. Within its stratum, the question's own generator draws the depth. RULER's `qa.py` instead starts from one
seed for every sample, so all samples of one size have their evidence at the same places.

A context is filled up to a length in tokens: never over it, and within 1 % under it. The lengths of the documents are
known. Their sum is the length of the whole but for a few tokens, where a tokenizer merges across documents. So
documents are chosen by their sum, the whole is measured exactly, and documents are added, exchanged or removed until
the exact length fits.
"""

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_solopo.triplets.seeds import generator

TOLERANCE = 0.01
"""A context may end this far below its target, as a fraction of the target."""

_MEASURES = 16
_TRIES = 32
_UNIFORM_AT_5_PERCENT = 1.358


def draw_depths(
    count: int, sample: int, samples: int, seed: int, stream: str, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Depths [count] for the evidence of one sample.

    Args:
        count: Pieces of evidence.
        sample: Number of the sample, below `samples`.
        samples: Size of the data set.
        seed: Seed of the data set. Together with `stream` it orders the strata.
        stream: Tells data sets with one seed apart.
        rng: The sample's own generator.
    """
    strata = [_strata(samples, seed, f"{stream}:{ordinal}")[sample] for ordinal in range(count)]
    return (np.array(strata, dtype=np.float64) + rng.random(count)) / samples


@lru_cache(maxsize=64)
def _strata(samples: int, seed: int, stream: str) -> NDArray[np.int64]:
    return generator(seed, f"strata:{stream}").permutation(samples)


def arrange(
    evidence: Sequence[int], others: Sequence[int], depths: NDArray[np.float64], tokens: NDArray[np.int32]
) -> list[int]:
    """All documents in order: the others as given, and each piece of evidence in the gap nearest to its depth.

    Args:
        evidence: Documents, as indices into `tokens`.
        others: Documents, as indices into `tokens`.
        depths: Depth of each piece of evidence.
        tokens: Length of every document.
    """
    sizes = tokens[np.asarray(evidence, dtype=np.int64)]
    gaps = np.concatenate([[0], np.cumsum(tokens[np.asarray(others, dtype=np.int64)])])
    total = gaps[-1] + sizes.sum()
    arranged, start, placed = list[int](), 0, 0.0
    for index in np.argsort(depths, kind="stable"):
        # Tokens of the others before it, if its middle is at its depth.
        before = depths[index] * total - placed - sizes[index] / 2
        gap = max(start, int(np.abs(gaps - before).argmin()))
        arranged += [*others[start:gap], evidence[index]]
        start, placed = gap, placed + sizes[index]
    return [*arranged, *others[start:]]


def evidence_depths(documents: Sequence[int], evidence: Collection[int], tokens: NDArray[np.int32]) -> list[float]:
    """Depth of each piece of evidence, in the order of the context."""
    sizes = tokens[np.asarray(documents, dtype=np.int64)].astype(np.int64)
    middles = (np.cumsum(sizes) - sizes / 2) / sizes.sum()
    return [round(float(depth), 4) for depth, index in zip(middles, documents, strict=True) if index in evidence]


def uniform_distance(depths: Sequence[float]) -> tuple[float, float]:
    """Kolmogorov-Smirnov distance of depths to the uniform distribution on [0, 1], and its 5 % critical value.

    The critical value is the asymptotic one for independent draws, 1.358 / sqrt(n). Stratified draws stay well below.
    """
    ordered = np.sort(np.asarray(depths, dtype=np.float64))
    steps = np.arange(len(ordered) + 1) / len(ordered)
    distance = max(float(np.max(steps[1:] - ordered)), float(np.max(ordered - steps[:-1])))
    return distance, _UNIFORM_AT_5_PERCENT / len(ordered) ** 0.5


@dataclass(frozen=True)
class Filled:
    """The chosen documents."""

    documents: list[int]
    length: int
    """Exact length of the context with them, in tokens."""
    complete: bool
    """False if no choice from the pool comes within the tolerance."""


class Pool:
    """Documents that distractors are drawn from.

    Args:
        members: Indices of the documents.
        tokens: Tokens that each document adds to a prompt, int32 [documents].
        keys: int32 [documents]. Documents with one key never share a context.
    """

    def __init__(self, members: NDArray[np.int64], tokens: NDArray[np.int32], keys: NDArray[np.int32]) -> None:
        self.members = members
        self.tokens = tokens
        self.keys = keys
        self._by_size = members[np.argsort(tokens[members], kind="stable")]
        self._sizes = tokens[self._by_size]

    def sized(self, low: int, high: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """A few members of `low` to `high` tokens, beginning at a random one."""
        start, end = np.searchsorted(self._sizes, [max(low, 1), high + 1])
        if start >= end:
            return self._by_size[:0]
        first = int(rng.integers(start, end))
        return np.concatenate([self._by_size[first:end], self._by_size[start:first]])[:_TRIES]

    def below(self, high: int) -> NDArray[np.int64]:
        """The largest members of at most `high` tokens, in falling order."""
        end = int(np.searchsorted(self._sizes, high + 1))
        return self._by_size[:end][::-1]


class Filler:
    """Chooses documents for one context.

    Args:
        pool: The documents to choose from.
        usable: Whether a document may be a distractor here. Called late, and once per document.
        count: Exact length in tokens of the context with these documents beside the given ones.
        limit: Most tokens of the context.
        rng: Chooses between documents of equal use.
    """

    def __init__(
        self,
        pool: Pool,
        usable: Callable[[int], bool],
        count: Callable[[Sequence[int]], int],
        limit: int,
        rng: np.random.Generator,
    ) -> None:
        self._pool = pool
        self._count = count
        self._limit = limit
        self._slack = int(limit * TOLERANCE)
        self._rng = rng
        self._usable = usable
        self._verdicts: dict[int, bool] = {}
        self._used: set[int] = set()
        self._taken: list[int] = []
        self._free_tokens = 0

    def fill(self, given: Sequence[int], candidates: Iterable[int]) -> Filled:
        """Take documents. The result is over the limit only if the given documents alone are.

        Args:
            given: Documents that are in the context already.
            candidates: Documents to take first, in this order. Others of the pool follow to reach the length.
        """
        empty_length = self._count([])
        if empty_length > self._limit:
            return Filled([], empty_length, complete=False)
        self._used = {int(self._pool.keys[index]) for index in given}
        self._free_tokens = self._limit - empty_length
        best = Filled([], empty_length, self._fits(empty_length))
        self._take_in_order(candidates)
        for _ in range(_MEASURES):
            while not 0 <= self._free_tokens <= self._slack and self._move():
                pass
            length = self._count(self._taken)
            if best.length < length <= self._limit:
                best = Filled(list(self._taken), length, self._fits(length))
            if best.complete or self._limit - length == self._free_tokens:
                break  # it fits, or no document of the pool makes it fit better
            self._free_tokens = self._limit - length
        return best

    def _fits(self, length: int) -> bool:
        return self._limit - self._slack <= length <= self._limit

    def _take_in_order(self, candidates: Iterable[int]) -> None:
        """Take candidates up to the first that does not fit."""
        for index in candidates:
            if self._free(index):
                if self._pool.tokens[index] > self._free_tokens:
                    return
                self._take(index)

    def _move(self) -> bool:
        """Make one change that brings the sum of lengths nearer to the limit. False if there is none."""
        if (index := self._find(self._free_tokens)) is not None:
            self._take(index)
            return True
        for place in self._rng.permutation(len(self._taken))[:_TRIES]:
            old = self._taken[place]
            if (index := self._find(self._free_tokens + int(self._pool.tokens[old]))) is not None:
                self._remove(old)
                self._take(index)
                return True
        if self._free_tokens < 0 and self._taken:
            self._remove(self._taken[-1])
            return True
        index = next(filter(self._free, map(int, self._pool.below(self._free_tokens))), None)
        if index is not None:
            self._take(index)
        return index is not None

    def _find(self, tokens: int) -> int | None:
        """A free document with this many tokens, or fewer by at most the slack."""
        found = self._pool.sized(tokens - self._slack, tokens, self._rng)
        return next(filter(self._free, map(int, found)), None)

    def _free(self, index: int) -> bool:
        if int(self._pool.keys[index]) in self._used:
            return False
        if index not in self._verdicts:
            self._verdicts[index] = self._usable(index)
        return self._verdicts[index]

    def _take(self, index: int) -> None:
        self._taken.append(index)
        self._used.add(int(self._pool.keys[index]))
        self._free_tokens -= int(self._pool.tokens[index])

    def _remove(self, index: int) -> None:
        self._taken.remove(index)
        self._used.discard(int(self._pool.keys[index]))
        self._free_tokens += int(self._pool.tokens[index])
