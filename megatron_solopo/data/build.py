"""Triplets of real text: MuSiQue questions with a short and a long context around the same evidence.

1. Read the questions and tokenize every paragraph once into one pool.
2. Per question, from a seed of its own: the short context, the answers, the long context.
3. Measure the exact length, drop and count what cannot be built, write the rest as JSONL.

Method: SoLoPO (arXiv 2505.11166) over RULER's way of hiding evidence among distractors
(arXiv 2404.06654), but with a random stream per question, so that evidence moves between samples.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_solopo.data.contexts import (
    Document,
    Pool,
    evidence_depths,
    long_documents,
    prompt,
    short_documents,
)
from megatron_solopo.data.musique import Question, mentions, normalise, read_questions
from megatron_solopo.data.responses import GIVE_UP, chosen_response, rejected_response
from megatron_solopo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_solopo.files import atomic_path

_DEPTH_BINS = 10


class _Dropped(Exception):
    """A question that cannot become a row; the message is the reason that the report counts."""


@dataclass(frozen=True)
class LengthStats:
    """Tokens of prompt plus longer answer over the written rows."""

    minimum: int
    mean: float
    median: float
    maximum: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "LengthStats":
        """Summary of at least one length."""
        mean, median = round(float(np.mean(lengths)), 1), float(np.median(lengths))
        return cls(minimum=min(lengths), mean=mean, median=median, maximum=max(lengths))


@dataclass(frozen=True)
class BuildReport:
    """What a build read, wrote and left out."""

    rows_read: int
    rows_written: int
    dropped: dict[str, int]
    """Questions that were not written, by reason."""
    pool_paragraphs: int
    """Distinct paragraphs that distractors are drawn from."""
    rows_with_fewer_short_distractors: int
    """Written rows whose question has fewer usable distractors of its own than asked for."""
    rows_that_exhausted_the_pool: int
    """Written rows that hold every usable paragraph and are still shorter than asked for."""
    rejected: dict[str, int]
    """Written rows by kind of rejected answer: wrong_entity or give_up."""
    short_tokens: LengthStats
    long_tokens: LengthStats
    evidence_depth: list[int]
    """Evidence passages of the long contexts by tenth of the context, from start to end."""

    def to_json(self) -> dict[str, Any]:
        """The same as plain dictionaries, lists and numbers."""
        return asdict(self)

    def __str__(self) -> str:
        dropped = [f"  dropped, {reason}: {count}" for reason, count in sorted(self.dropped.items())]
        depth = " ".join(map(str, self.evidence_depth))
        return "\n".join(
            [
                f"rows: {self.rows_read} read, {self.rows_written} written",
                *dropped,
                f"pool: {self.pool_paragraphs} distinct paragraphs",
                f"  rows with fewer short distractors than asked for: {self.rows_with_fewer_short_distractors}",
                f"  rows that used up the pool before the long length: {self.rows_that_exhausted_the_pool}",
                f"rejected answers: {', '.join(f'{count} {kind}' for kind, count in self.rejected.items())}",
                f"short tokens: {_describe(self.short_tokens)}",
                f"long tokens: {_describe(self.long_tokens)}",
                f"evidence per tenth of the long context: {depth}",
            ]
        )


def _describe(stats: LengthStats) -> str:
    return f"min {stats.minimum}, mean {stats.mean:.1f}, median {stats.median:.1f}, max {stats.maximum}"


@dataclass(frozen=True)
class _Measured:
    """What the report needs to know of one row."""

    short_length: int
    long_length: int
    fewer_short_distractors: bool
    exhausted_pool: bool
    gives_up: bool
    depths: list[float]


def build(
    input: Path,
    output: Path,
    tokenizer: str,
    *,
    short_distractors: int = 3,
    long_tokens: int = 2048,
    seed: int = 0,
    overwrite: bool = False,
) -> BuildReport:
    """Write triplets from MuSiQue questions; no row is ever cut.

    The short context and both answers depend on `seed` and the question's id alone, so builds of
    several `long_tokens` differ only in `prompt_long` and `evidence_depths`.

    Args:
        input: MuSiQue-format JSONL.
        output: JSONL to write: id, prompt_short, prompt_long, chosen, rejected, and for analysis
            question, answer, evidence_depths (see `contexts.evidence_depths`).
        tokenizer: Directory or name of the tokenizer that lengths are measured with.
        short_distractors: Paragraphs without the answer added to the evidence in the short context.
        long_tokens: Length of prompt_long, special tokens included, plus the longer answer and its
            end token: never exceeded, and missed by less than a paragraph unless the pool runs out.
        seed: With the question's id, the only source of randomness.
        overwrite: Replace an existing output file.

    Raises:
        ValueError: An argument is illegal, the input is not MuSiQue JSONL, or no row could be built.
    """
    _check_arguments(input, output, short_distractors, long_tokens, seed)
    if output.exists() and not overwrite:
        raise ValueError(f"--output {output}: already exists; name another, or pass --overwrite to replace it")
    questions = read_questions(input)
    builder = _Builder(questions, load_tokenizer(tokenizer), short_distractors, long_tokens, seed)
    dropped: Counter[str] = Counter()
    measured = []
    with atomic_path(output) as temporary:
        with temporary.open("w", encoding="utf-8") as stream:
            for row, measures in builder.rows(questions, dropped):
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                measured.append(measures)
        if not measured:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in dropped.items())
            raise ValueError(f"--input {input}: no question could be built: {reasons}")
    return _report(measured, len(questions), dropped, len(builder.pool.distractors))


def _check_arguments(input: Path, output: Path, short_distractors: int, long_tokens: int, seed: int) -> None:
    minima = {"--short-distractors": (short_distractors, 0), "--long-tokens": (long_tokens, 1), "--seed": (seed, 0)}
    for flag, (value, minimum) in minima.items():
        if value < minimum:
            raise ValueError(f"{flag} {value}: must be at least {minimum}")
    if output.suffix != ".jsonl":
        raise ValueError(f"--output {output}: must end in .jsonl")
    if input.resolve() == output.resolve():
        raise ValueError(f"--output {output}: is the input file, name another")


class _Builder:
    def __init__(
        self,
        questions: Sequence[Question],
        tokenizer: Tokenizer,
        short_distractors: int,
        long_tokens: int,
        seed: int,
    ) -> None:
        self._tokenizer = tokenizer
        self._short_distractors = short_distractors
        self._long_tokens = long_tokens
        self._seed = seed
        self.pool = Pool(questions, self._count)

    def rows(self, questions: Sequence[Question], dropped: Counter[str]) -> Iterator[tuple[dict[str, Any], _Measured]]:
        """Every row that can be built, in the order of the input; the others are counted in `dropped`."""
        ids: set[str] = set()
        for question in tqdm(questions, desc="Building triplets", unit=" rows", disable=None):
            try:
                if not question.answerable:
                    raise _Dropped("not answerable")
                if question.id in ids:
                    raise _Dropped("id already seen")
                ids.add(question.id)
                yield self._row(question)
            except _Dropped as reason:
                dropped[str(reason)] += 1

    def _row(self, question: Question) -> tuple[dict[str, Any], _Measured]:
        if not question.evidence:
            raise _Dropped("no supporting paragraph")
        rng = _generator(self._seed, question.id)
        short = short_documents(question, self.pool, self._short_distractors, rng)
        chosen = chosen_response(question)
        rejected = rejected_response(question, [document.paragraph for document in short], rng)
        if mentions(normalise(rejected), question.golds):
            raise _Dropped("every rejected answer would contain the gold answer")

        answers = (self._tokenizer.encode_continuation(answer) for answer in (chosen, rejected))
        answer_tokens = max(map(len, answers)) + 1  # the end token

        def length(documents: Sequence[Document]) -> int:
            text = prompt(documents, question)
            return len(self._tokenizer.encode(text, add_special_tokens=True)) + answer_tokens

        short_length = length(short)
        if short_length > self._long_tokens:
            raise _Dropped(f"short context and answer exceed --long-tokens {self._long_tokens}")
        long, long_length, exhausted = long_documents(question, short, self.pool, length, self._long_tokens, rng)
        depths = evidence_depths(long, question)
        row = {
            "id": question.id,
            "prompt_short": prompt(short, question),
            "prompt_long": prompt(long, question),
            "chosen": chosen,
            "rejected": rejected,
            "question": question.question,
            "answer": question.answer,
            "evidence_depths": depths,
        }
        wanted = len(self.pool.find(question.evidence)) + self._short_distractors
        return row, _Measured(short_length, long_length, len(short) < wanted, exhausted, rejected == GIVE_UP, depths)

    def _count(self, text: str) -> int:
        return len(self._tokenizer.encode(text, add_special_tokens=False))


def _generator(seed: int, sample_id: str) -> np.random.Generator:
    """A random stream for one sample, so that its draws depend on no other sample."""
    digest = hashlib.sha256(f"{seed}:{sample_id}".encode()).digest()
    return np.random.default_rng(int.from_bytes(digest, "big"))


def _report(measured: Sequence[_Measured], rows_read: int, dropped: Counter[str], pool_paragraphs: int) -> BuildReport:
    give_up = sum(row.gives_up for row in measured)
    depths = [depth for row in measured for depth in row.depths]
    return BuildReport(
        rows_read=rows_read,
        rows_written=len(measured),
        dropped=dict(dropped),
        pool_paragraphs=pool_paragraphs,
        rows_with_fewer_short_distractors=sum(row.fewer_short_distractors for row in measured),
        rows_that_exhausted_the_pool=sum(row.exhausted_pool for row in measured),
        rejected={"wrong_entity": len(measured) - give_up, "give_up": give_up},
        short_tokens=LengthStats.of([row.short_length for row in measured]),
        long_tokens=LengthStats.of([row.long_length for row in measured]),
        evidence_depth=np.histogram(depths, bins=_DEPTH_BINS, range=(0, 1))[0].tolist(),
    )
