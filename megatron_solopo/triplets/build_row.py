"""From one question to its rows: the short context, the answers where they are constructed, the long contexts."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_solopo.triplets.constructed_answers import GIVE_UP, chosen_response, rejected_response
from megatron_solopo.triplets.contexts import Filled, Filler, Pool, arrange, draw_depths, evidence_depths
from megatron_solopo.triplets.corpus.formats import Document, Question, entity_golds, golds, leaks, mentions, normalise
from megatron_solopo.triplets.corpus.store import Corpus
from megatron_solopo.triplets.prompt import Measure, PromptTemplate
from megatron_solopo.triplets.seeds import generator
from megatron_solopo.triplets.settings import BuildSettings

RowFields = dict[str, Any]


@dataclass(frozen=True)
class Drop:
    """A row that was not written; `line` is its question's in the corpus."""

    line: int
    id: str
    reason: str


@dataclass(frozen=True)
class MeasuredContext:
    """What the report needs to know of a row; lengths in tokens, with the room for the response."""

    short_tokens: int
    long_tokens: int
    target_tokens: int
    depths: list[float]
    rejected: str | None
    """The kind of constructed rejected answer: wrong_entity or give_up."""
    filled_from_pool: bool
    """The question has fewer usable documents of its own than its short context holds."""
    underfull: bool
    leak_checked: bool
    """False where the answer is yes or no, which documents cannot give away."""


@dataclass(frozen=True)
class Built:
    """A row and what is to be told of it."""

    row: RowFields
    measured: MeasuredContext


class _Unfit(Exception):
    """Why a question or one of its rows is dropped."""


@dataclass(frozen=True)
class _Sample:
    """A question as its contexts are built from it."""

    number: int
    question: Question
    own: list[int]
    evidence: list[int]
    golds: list[str]
    rng: np.random.Generator


class RowBuilder:
    """Builds the rows of any question of a corpus; what comes out depends on settings, corpus and question alone."""

    def __init__(self, corpus: Corpus, settings: BuildSettings, prompt: PromptTemplate, measure: Measure) -> None:
        self._corpus = corpus
        self._settings = settings
        self._prompt = prompt
        self._measure = measure
        self._plan = settings.length_plan
        self._pool = Pool(corpus.pool, corpus.load_tokens(), corpus.keys)

    def build(self, number: int) -> list[Built | Drop]:
        """The rows of the question with this number, one per length, or why there are none."""
        line, question, own = self._corpus.question(number)
        rng = generator(self._settings.seed, question.id)
        evidence = self._distinct(own[index] for index in question.supporting)
        sample = _Sample(number, question, own, evidence, entity_golds(question.answers), rng)
        try:
            short, common = self._short_side(sample)
        except _Unfit as reason:
            return [Drop(line, question.id, str(reason))]
        lengths = self._plan.draw(generator(self._settings.seed, f"length:{question.id}"))
        built: list[Built | Drop] = []
        for slot, target in enumerate(lengths):
            row_id = question.id if len(lengths) == 1 else f"{question.id}@{target}"
            try:
                built.append(self._row(sample, short, common, row_id, slot, target))
            except _Unfit as reason:
                built.append(Drop(line, row_id, str(reason)))
        return built

    def _short_side(self, sample: _Sample) -> tuple[list[int], RowFields]:
        """The short context's documents in order, and all that the rows of the question share."""
        if not sample.question.answerable:
            raise _Unfit("not answerable")
        if not sample.evidence:
            raise _Unfit("no supporting document")
        if not golds(sample.question.answers):
            raise _Unfit("no answer that is more than white space")
        by_length = self._settings.short_tokens is not None
        short = self._short_by_length(sample) if by_length else self._short_by_number(sample)
        text = self._prompt.prompt(self._documents(short), sample.question.question)
        common: RowFields = {"question_id": sample.question.id, "prompt_short": text}
        common |= {"question": sample.question.question, "answers": list(sample.question.answers)}
        if self._settings.responses == "constructed":
            common |= self._constructed(sample, short)
            answers = (self._measure.response(text, common[name]) for name in ("chosen", "rejected"))
            common["response_tokens"] = max(answers)
        else:
            common["response_tokens"] = self._settings.response_room
        return short, common | {"short_tokens": self._measure.prompt(text) + common["response_tokens"]}

    def _constructed(self, sample: _Sample, short: Sequence[int]) -> RowFields:
        if not sample.question.hops:
            raise _Unfit("no decomposition to construct answers from")
        rejected = rejected_response(sample.question, self._documents(short), sample.rng)
        if mentions(normalise(rejected), golds(sample.question.answers)):
            raise _Unfit("every rejected answer would contain the gold answer")
        return {"chosen": chosen_response(sample.question), "rejected": rejected}

    def _short_by_number(self, sample: _Sample) -> list[int]:
        wanted = self._settings.num_short_distractors
        chosen = list[int]()
        used = {int(self._pool.keys[index]) for index in sample.evidence}
        for index in self._short_candidates(sample):
            if len(chosen) == wanted:
                break
            if self._pool.keys[index] not in used and self._usable(sample, index):
                used.add(int(self._pool.keys[index]))
                chosen.append(index)
        if len(chosen) < wanted:
            raise _Unfit("the pool holds too few documents for --short-distractors")
        return self._ordered([*sample.evidence, *chosen], sample.rng)

    def _short_by_length(self, sample: _Sample) -> list[int]:
        limit = self._settings.short_tokens
        assert limit is not None
        order = int(sample.rng.integers(1 << 32))

        def arranged(taken: Sequence[int]) -> list[int]:
            return self._ordered([*sample.evidence, *taken], np.random.default_rng(order))

        alone = self._length(sample, arranged([]), self._settings.response_room)
        if alone > limit:
            raise _Unfit("the evidence alone exceeds --short-tokens")
        filler = Filler(
            self._pool,
            lambda index: self._usable(sample, index),
            lambda taken: self._length(sample, arranged(taken), self._settings.response_room),
            limit,
            sample.rng,
        )
        filled = filler.fill(sample.evidence, self._short_candidates(sample), alone)
        self._refuse_underfull(filled, "--short-tokens")
        return arranged(filled.documents)

    def _row(
        self, sample: _Sample, short: Sequence[int], common: RowFields, row_id: str, slot: int, target: int
    ) -> Built:
        room = common["response_tokens"]
        if common["short_tokens"] > target:
            raise _Unfit("the short context and the response exceed --long-tokens")
        rng = generator(self._settings.seed, f"long:{slot}:{sample.question.id}")
        samples = self._corpus.num_questions
        depths = draw_depths(len(sample.evidence), sample.number, samples, self._settings.seed, str(slot), rng)
        order = int(rng.integers(1 << 32))
        beside = [index for index in short if index not in sample.evidence]

        def arranged(taken: Sequence[int]) -> list[int]:
            return self._scattered(sample.evidence, [*beside, *taken], depths, np.random.default_rng(order))

        filler = Filler(
            self._pool,
            lambda index: self._usable(sample, index),
            lambda taken: self._length(sample, arranged(taken), room),
            target,
            rng,
        )
        candidates = map(int, rng.permutation(self._pool.members))
        filled = filler.fill(short, candidates, self._length(sample, arranged([]), room))
        self._refuse_underfull(filled, "--long-tokens")
        documents = arranged(filled.documents)
        row = {"id": row_id, **common, "long_tokens": filled.length, "target_tokens": target}
        row["prompt_long"] = self._prompt.prompt(self._documents(documents), sample.question.question)
        row["evidence_depths"] = evidence_depths(documents, set(sample.evidence), self._pool.tokens)
        measured = MeasuredContext(
            short_tokens=row["short_tokens"],
            long_tokens=row["long_tokens"],
            target_tokens=target,
            depths=row["evidence_depths"],
            rejected=("give_up" if row["rejected"] == GIVE_UP else "wrong_entity") if "rejected" in row else None,
            filled_from_pool=not set(beside) <= set(sample.own),
            underfull=not filled.complete,
            leak_checked=bool(sample.golds),
        )
        return Built(row, measured)

    def _refuse_underfull(self, filled: Filled, option: str) -> None:
        if not filled.complete and self._settings.underfull == "drop":
            raise _Unfit(f"no choice from the pool comes within 1 % below {option}")

    def _scattered(
        self, evidence: Sequence[int], others: Sequence[int], depths: NDArray[np.float64], rng: np.random.Generator
    ) -> list[int]:
        if self._settings.document_order == "corpus":
            return arrange(sorted(evidence), sorted(others), np.sort(depths), self._pool.tokens)
        return arrange(evidence, [others[place] for place in rng.permutation(len(others))], depths, self._pool.tokens)

    def _ordered(self, documents: Sequence[int], rng: np.random.Generator) -> list[int]:
        if self._settings.document_order == "corpus":
            return sorted(documents)
        return [documents[place] for place in rng.permutation(len(documents))]

    def _short_candidates(self, sample: _Sample) -> Iterable[int]:
        """The question's own documents first, then any."""
        own = self._distinct(sample.own)
        yield from (own[place] for place in sample.rng.permutation(len(own)))
        yield from map(int, sample.rng.permutation(self._pool.members))

    def _usable(self, sample: _Sample, index: int) -> bool:
        document = self._corpus.document(index)
        text = normalise(f"{document.title}\n{document.text}")
        return not leaks(text, sample.golds, self._settings.leak_rule)

    def _distinct(self, indices: Iterable[int]) -> list[int]:
        """Documents, the first of each text."""
        return list({int(self._pool.keys[index]): index for index in reversed(list(indices))}.values())[::-1]

    def _documents(self, indices: Iterable[int]) -> list[Document]:
        return [self._corpus.document(index) for index in indices]

    def _length(self, sample: _Sample, documents: Sequence[int], room: int) -> int:
        text = self._prompt.prompt(self._documents(documents), sample.question.question)
        return self._measure.prompt(text) + room
