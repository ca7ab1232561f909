"""From one question to its rows: the short context, constructed answers if asked for, and the long contexts."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_solopo.data.template_arguments import TemplateArguments
from megatron_solopo.triplets.constructed_answers import GIVE_UP, chosen_response, rejected_response
from megatron_solopo.triplets.contexts import Filled, Filler, Pool, arrange, draw_depths, evidence_depths
from megatron_solopo.triplets.corpus.formats import Document, Question, entity_golds, golds, leaks, mentions, normalise
from megatron_solopo.triplets.corpus.store import Corpus
from megatron_solopo.triplets.prompt import Measure, PromptTemplate
from megatron_solopo.triplets.seeds import generator
from megatron_solopo.triplets.settings import BuildSettings

RowFields = dict[str, Any]

_SHORT_EXCEEDS_LONG = "the short context and the response exceed --long-tokens"


@dataclass(frozen=True)
class Drop:
    """A row that was not written."""

    line: int
    """Line of the question in the corpus."""
    id: str
    reason: str


@dataclass(frozen=True)
class MeasuredContext:
    """What the report needs of a row. Lengths are in tokens and include the room for the response."""

    short_tokens: int
    long_tokens: int
    target_tokens: int
    depths: list[float]
    rejected: str | None
    """The kind of constructed rejected answer: wrong_entity or give_up."""
    filled_from_pool: bool
    """Whether the short context holds documents of other questions."""
    underfull: bool
    leak_checked: bool
    """False if the answer is yes or no, which documents cannot give away."""


@dataclass(frozen=True)
class Built:
    """A row to write, and what the report needs of it."""

    row: RowFields
    measured: MeasuredContext


class _Dropped(Exception):
    """The reason why a question or one of its rows is dropped."""


@dataclass(frozen=True)
class _Sample:
    """A question with everything that its contexts need."""

    number: int
    question: Question
    own: list[int]
    """Its documents, as indices of the corpus."""
    evidence: list[int]
    golds: list[str]
    rng: np.random.Generator


class RowBuilder:
    """Builds the rows of any question of a corpus. They depend on settings, corpus and question alone."""

    def __init__(self, corpus: Corpus, settings: BuildSettings, prompt: PromptTemplate, measure: Measure) -> None:
        self._corpus = corpus
        self._settings = settings
        self._prompt = prompt
        self._measure = measure
        self._plan = settings.length_plan
        self._pool = Pool(corpus.pool, corpus.load_tokens(), corpus.keys)

    def build(self, number: int) -> list[Built | Drop]:
        """The rows of the question with this number, one for each length, or the reasons why there are none."""
        line, question, own = self._corpus.question(number)
        rng = generator(self._settings.seed, question.id)
        evidence = self._distinct(own[index] for index in question.supporting)
        sample = _Sample(number, question, own, evidence, entity_golds(question.answers), rng)
        try:
            short, common = self._short_side(sample)
        except _Dropped as reason:
            return [Drop(line, question.id, str(reason))]
        lengths = self._plan.draw(generator(self._settings.seed, f"length:{question.id}"))
        built: list[Built | Drop] = []
        for slot, target in enumerate(lengths):
            row_id = question.id if len(lengths) == 1 else f"{question.id}@{target}"
            try:
                built.append(self._row(sample, short, common, row_id, slot, target))
            except _Dropped as reason:
                built.append(Drop(line, row_id, str(reason)))
        return built

    def _short_side(self, sample: _Sample) -> tuple[list[int], RowFields]:
        """The documents of the short context in order, and the fields that all rows of the question share."""
        if not sample.question.answerable:
            raise _Dropped("not answerable")
        if not sample.evidence:
            raise _Dropped("no supporting document")
        if not golds(sample.question.answers):
            raise _Dropped("no answer that is more than white space")
        by_length = self._settings.short_tokens is not None
        short = self._short_by_length(sample) if by_length else self._short_by_number(sample)
        text = self._prompt.prompt(self._documents(short), sample.question.question)
        common: RowFields = {"question_id": sample.question.id, "prompt_short": text}
        common |= {"question": sample.question.question, "answers": list(sample.question.answers)}
        common |= TemplateArguments(self._settings.chat_template_kwargs).fields()
        if self._settings.responses == "constructed":
            common |= self._constructed(sample, short)
            answers = (self._measure.response(text, common[name]) for name in ("chosen", "rejected"))
            common["response_tokens"] = max(answers)
        else:
            common["response_tokens"] = self._settings.reserved_tokens
        return short, common | {"short_tokens": self._measure.prompt(text) + common["response_tokens"]}

    def _constructed(self, sample: _Sample, short: Sequence[int]) -> RowFields:
        if not sample.question.hops:
            raise _Dropped("no decomposition to construct answers from")
        rejected = rejected_response(sample.question, self._documents(short), sample.rng)
        if mentions(normalise(rejected), golds(sample.question.answers)):
            raise _Dropped("every rejected answer would contain the gold answer")
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
            raise _Dropped("the pool holds too few documents for --short-distractors")
        return self._ordered([*sample.evidence, *chosen], sample.rng)

    def _short_by_length(self, sample: _Sample) -> list[int]:
        limit = self._settings.short_tokens
        assert limit is not None
        order = int(sample.rng.integers(1 << 32))

        def arranged(taken: Sequence[int]) -> list[int]:
            return self._ordered([*sample.evidence, *taken], np.random.default_rng(order))

        reserved = self._settings.reserved_tokens
        candidates = self._short_candidates(sample)
        filled = self._fill(sample, sample.evidence, candidates, arranged, reserved, limit, sample.rng)
        if filled.length > limit:
            raise _Dropped("the evidence alone exceeds --short-tokens")
        self._refuse_underfull(filled, "--short-tokens")
        return arranged(filled.documents)

    def _row(
        self, sample: _Sample, short: Sequence[int], common: RowFields, row_id: str, slot: int, target: int
    ) -> Built:
        reserved = common["response_tokens"]
        if common["short_tokens"] > target:
            raise _Dropped(_SHORT_EXCEEDS_LONG)
        rng = generator(self._settings.seed, f"long:{slot}:{sample.question.id}")
        samples = self._corpus.num_questions
        depths = draw_depths(len(sample.evidence), sample.number, samples, self._settings.seed, str(slot), rng)
        order = int(rng.integers(1 << 32))
        beside = [index for index in short if index not in sample.evidence]

        def arranged(taken: Sequence[int]) -> list[int]:
            return self._scattered(sample.evidence, [*beside, *taken], depths, np.random.default_rng(order))

        candidates = map(int, rng.permutation(self._pool.members))
        filled = self._fill(sample, short, candidates, arranged, reserved, target, rng)
        if filled.length > target:
            raise _Dropped(_SHORT_EXCEEDS_LONG)
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

    def _fill(
        self,
        sample: _Sample,
        given: Sequence[int],
        candidates: Iterable[int],
        arranged: Callable[[Sequence[int]], list[int]],
        reserved: int,
        limit: int,
        rng: np.random.Generator,
    ) -> Filled:
        """Fill a context. `arranged` puts chosen documents and the given ones in order.

        Args:
            reserved: Tokens that remain free for the response.
        """

        def length(taken: Sequence[int]) -> int:
            text = self._prompt.prompt(self._documents(arranged(taken)), sample.question.question)
            return self._measure.prompt(text) + reserved

        filler = Filler(self._pool, lambda index: self._usable(sample, index), length, limit, rng)
        return filler.fill(given, candidates)

    def _refuse_underfull(self, filled: Filled, option: str) -> None:
        if not filled.complete and self._settings.underfull == "drop":
            raise _Dropped(f"no choice from the pool comes within 1 % below {option}")

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
        """The question's own documents, then all others."""
        own = self._distinct(sample.own)
        yield from (own[place] for place in sample.rng.permutation(len(own)))
        yield from map(int, sample.rng.permutation(self._pool.members))

    def _usable(self, sample: _Sample, index: int) -> bool:
        document = self._corpus.document(index)
        text = normalise(f"{document.title}\n{document.text}")
        return not leaks(text, sample.golds, self._settings.leak_rule)

    def _distinct(self, indices: Iterable[int]) -> list[int]:
        """The documents without repeated texts. The first one of each text stays."""
        return list({int(self._pool.keys[index]): index for index in reversed(list(indices))}.values())[::-1]

    def _documents(self, indices: Iterable[int]) -> list[Document]:
        return [self._corpus.document(index) for index in indices]
