"""The rows that `data build` writes, as `data sample`, `data select` and `evaluate` read them.

Where the evidence lies in a long context.

Depth of a document: where its middle lies among the tokens of all documents, from 0 to 1.

Depths are spread by Latin hypercube sampling (McKay et al. 1979): over the whole data set, the first piece of evidence
of every sample has a stratum of its own, so has the second, and so on, in orders that know nothing of each other;
within its stratum each depth is drawn by the sample's own generator. RULER's `qa.py` draws from one seed again for
every sample, and all samples of a size have their evidence at the same places.

Fill a context with documents up to a length in tokens: never over it, and within 1 % under.

Lengths of documents are known beforehand; their sum is the length of the whole but for a few tokens, where a
tokenizer merges across documents. So documents are chosen by sums, the whole is then measured exactly, and what the
measure says is corrected by adding, exchanging or removing a document, until it fits.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_solopo.data.rows import Content
from megatron_solopo.errors import UserError, first_problem
from megatron_solopo.triplets.seeds import generator

_Row = TypeVar("_Row", bound=BaseModel)


class ContextRow(BaseModel):
    """One pair of contexts that waits for responses."""

    model_config = ConfigDict(frozen=True, strict=True)

    id: str
    question_id: str
    prompt_short: Content
    prompt_long: Content
    question: str
    answers: list[str] = Field(min_length=1)
    evidence_depths: list[float]
    response_tokens: int = Field(ge=1)
    """Room for a response, in tokens, its end included."""


def read_contexts(path: Path, row: type[_Row]) -> Iterator[tuple[int, int, _Row]]:
    """Every row with its line number and byte offset.

    Args:
        row: what is read of each, `ContextRow` or fewer fields.

    Raises UserError naming the line and field of the first that is none.
    """
    offset = 0
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(stream, start=1):
                yield number, offset, parse_context(line, f"{path}:{number}", row)
                offset += len(line)
    except OSError as error:
        raise UserError(f"--contexts {path}: {error.strerror}") from None
    if not offset:
        raise UserError(f"--contexts {path}: holds no row, expected the output of data build")


def parse_context(line: bytes, where: str, row: type[_Row]) -> _Row:
    """One line of the file; raises UserError."""
    try:
        return row.model_validate_json(line)
    except ValidationError as error:
        problem = first_problem(error, "the whole line")
        raise UserError(f"{where}: {problem} (expected a row of data build)") from None


def by_question(path: Path) -> Iterator[list[ContextRow]]:
    """The rows of one question after the other; they stand together in the file."""
    for _, rows in groupby((row for _, _, row in read_contexts(path, ContextRow)), key=lambda row: row.question_id):
        yield list(rows)


def to_line(row: dict[str, Any]) -> str:
    """A row as a line of a file."""
    return json.dumps(row, ensure_ascii=False) + "\n"


_UNIFORM_AT_5_PERCENT = 1.358


def draw_depths(
    count: int, sample: int, samples: int, seed: int, stream: str, rng: np.random.Generator
) -> NDArray[np.float64]:
    """Depths [count] for the evidence of one of `samples` samples.

    Args:
        count: Pieces of evidence.
        sample: Number of the sample, below `samples`.
        samples: Size of the data set.
        seed: Of the data set; with `stream`, which tells data sets of one seed apart, it orders the strata.
        rng: Of the sample.
    """
    strata = [_strata(samples, seed, f"{stream}:{ordinal}")[sample] for ordinal in range(count)]
    return (np.array(strata, dtype=np.float64) + rng.random(count)) / samples


@lru_cache(maxsize=64)
def _strata(samples: int, seed: int, stream: str) -> NDArray[np.int64]:
    return generator(seed, f"strata:{stream}").permutation(samples)


def arrange(
    evidence: Sequence[int], others: Sequence[int], depths: NDArray[np.float64], tokens: NDArray[np.int32]
) -> list[int]:
    """All documents in order: the others as given, each piece of evidence in the gap nearest to its depth.

    Args:
        evidence: Documents, as indices into `tokens`.
        others: Documents, as indices into `tokens`.
        depths: [len(evidence)], one for each.
        tokens: Length of every document.
    """
    sizes = tokens[np.asarray(evidence, dtype=np.int64)]
    gaps = np.concatenate([[0], np.cumsum(tokens[np.asarray(others, dtype=np.int64)])])
    total = gaps[-1] + sizes.sum()
    arranged, start, placed = list[int](), 0, 0.0
    for index in np.argsort(depths, kind="stable"):
        # How much of the others comes before it, if its middle is to lie at its depth.
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

    The critical value is the asymptotic one, 1.358 / sqrt(n), for independent draws; stratified ones lie well below.
    """
    ordered = np.sort(np.asarray(depths, dtype=np.float64))
    steps = np.arange(len(ordered) + 1) / len(ordered)
    distance = max(float(np.max(steps[1:] - ordered)), float(np.max(ordered - steps[:-1])))
    return distance, _UNIFORM_AT_5_PERCENT / len(ordered) ** 0.5


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
