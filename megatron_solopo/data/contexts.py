"""Fill a context with documents up to a length in tokens: never over it, and within 1 % under.

Lengths of documents are known beforehand; their sum is the length of the whole but for a few tokens, where a
tokenizer merges across documents. So documents are chosen by sums, the whole is then measured exactly, and what the
measure says is corrected by adding, exchanging or removing a document, until it fits.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

TOLERANCE = 0.01
"""How far below its target a context may end, as a fraction of the target."""

_MEASURES = 16
_TRIES = 32


@dataclass(frozen=True)
class Filled:
    """Documents that were chosen, and the exact length with them.

    `complete` is False where no choice from the pool comes within the tolerance.
    """

    documents: list[int]
    length: int
    complete: bool


class Pool:
    """Documents that distractors are drawn from.

    Args:
        members: Indices of the documents.
        tokens: int32 [documents], what each adds to a prompt.
        keys: int32 [documents]; documents of one key never share a context.
    """

    def __init__(self, members: NDArray[np.int64], tokens: NDArray[np.int32], keys: NDArray[np.int32]) -> None:
        self.members = members
        self.tokens = tokens
        self.keys = keys
        self._by_size = members[np.argsort(tokens[members], kind="stable")]
        self._sizes = tokens[self._by_size]

    def sized(self, low: int, high: int, rng: np.random.Generator) -> NDArray[np.int64]:
        """A few members of `low` to `high` tokens, from a random place among them on."""
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
        pool: Where they come from.
        usable: Whether a document may be a distractor here; asked late, and once per document.
        count: Exact length in tokens of a sample with these documents beside the given ones.
        limit: Tokens that are never exceeded.
        rng: Decides between documents that serve equally.
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
        self._room = 0

    def fill(self, given: Sequence[int], candidates: Iterable[int], empty_length: int) -> Filled:
        """Take documents.

        Args:
            given: Documents that are in the context already.
            candidates: What to take, first come first served; any of the pool is taken to end at the right length.
            empty_length: Exact length with the given documents alone, at most the limit.
        """
        self._used = {int(self._pool.keys[index]) for index in given}
        self._room = self._limit - empty_length
        best = Filled([], empty_length, self._fits(empty_length))
        self._take_in_order(candidates)
        for _ in range(_MEASURES):
            while not 0 <= self._room <= self._slack and self._move():
                pass
            length = self._count(self._taken)
            if best.length < length <= self._limit:
                best = Filled(list(self._taken), length, self._fits(length))
            if best.complete or self._limit - length == self._room:
                break  # it fits, or nothing in the pool makes it fit better
            self._room = self._limit - length
        return best

    def _fits(self, length: int) -> bool:
        return self._limit - self._slack <= length <= self._limit

    def _take_in_order(self, candidates: Iterable[int]) -> None:
        """Take what comes, up to the first that does not fit any more."""
        for index in candidates:
            if self._free(index):
                if self._pool.tokens[index] > self._room:
                    return
                self._take(index)

    def _move(self) -> bool:
        """One change that brings the sum of lengths nearer to the limit; False if there is none."""
        if (index := self._find(self._room)) is not None:
            self._take(index)
            return True
        for place in self._rng.permutation(len(self._taken))[:_TRIES]:
            old = self._taken[place]
            if (index := self._find(self._room + int(self._pool.tokens[old]))) is not None:
                self._remove(old)
                self._take(index)
                return True
        if self._room < 0 and self._taken:
            self._remove(self._taken[-1])
            return True
        index = next(filter(self._free, map(int, self._pool.below(self._room))), None)
        if index is not None:
            self._take(index)
        return index is not None

    def _find(self, tokens: int) -> int | None:
        """A free document that has as many tokens, or less by at most the slack."""
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
        self._room -= int(self._pool.tokens[index])

    def _remove(self, index: int) -> None:
        self._taken.remove(index)
        self._used.discard(int(self._pool.keys[index]))
        self._room += int(self._pool.tokens[index])
