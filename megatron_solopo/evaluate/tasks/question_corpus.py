"""Questions over a corpus: their evidence stands among documents that do not give the answer away."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_solopo.errors import UserError
from megatron_solopo.evaluate.tasks.prompt_length import UnsizedSample
from megatron_solopo.triplets.corpus.formats import Document, Format, Question, entity_golds, leaks, normalise
from megatron_solopo.triplets.corpus.read import BadRow, read_questions
from megatron_solopo.triplets.prompt import PromptTemplate
from megatron_solopo.triplets.seeds import generator


class QuestionCorpus:
    """The questions of a file, and all its documents as distractors. Everything is held in memory.

    Raises UserError for a file that is not of its format or holds no question with an answer and evidence.
    """

    def __init__(self, path: Path, format: Format, prompt: PromptTemplate, seed: int) -> None:
        self._prompt = prompt
        found = []
        for _, question in read_questions(path, format):
            if isinstance(question, BadRow):
                raise UserError(str(question))
            found.append(question)
        self._questions = [each for each in found if each.answerable and each.answers and each.supporting]
        if not self._questions:
            raise UserError(f"--corpus {path}: holds no question with an answer and evidence")
        self._documents = list(dict.fromkeys(document for each in found for document in each.documents))
        self._order = generator(seed, "questions").permutation(len(self._questions))

    def __len__(self) -> int:
        return len(self._questions)

    @cached_property
    def has_one_piece_of_evidence(self) -> bool:
        """Whether every question has a single document of evidence, so that its depth can be chosen."""
        return all(len(each.supporting) == 1 for each in self._questions)

    @cached_property
    def _normalised(self) -> list[str]:
        return [normalise(f"{document.title}\n{document.text}") for document in self._documents]

    def sample(self, number: int, depth: float | None, rng: np.random.Generator) -> UnsizedSample:
        """A sample of one question; the same number is the same question at every length.

        Args:
            depth: Of the evidence among the documents; None puts every piece of it at a random depth.
        """
        question = self._questions[self._order[number]]
        evidence = list(dict.fromkeys(question.documents[place] for place in question.supporting))
        depths = rng.random(len(evidence)) if depth is None else np.full(len(evidence), depth)
        order = np.argsort(depths, kind="stable")
        distractors = self._distractors(question, evidence, rng)
        places = rng.random(len(distractors)).tolist()

        def build(units: int, padding: str) -> str:
            documents = [document for _, document in sorted(zip(places, distractors[:units], strict=False))]
            if padding:
                documents = [*documents[: units // 2], Document("", padding), *documents[units // 2 :]]
            arranged, start = list[Document](), 0
            for place in order:
                gap = round(float(depths[place]) * len(documents))
                arranged += [*documents[start:gap], evidence[place]]
                start = gap
            return self._prompt.text([*arranged, *documents[start:]], question.question)

        return UnsizedSample(build, "", question.answers, len(distractors))

    def _distractors(
        self, question: Question, evidence: Sequence[Document], rng: np.random.Generator
    ) -> list[Document]:
        """All usable documents in random order, but the question's own ones first, as they mislead more."""
        golds = entity_golds(question.answers)
        own = set(question.documents)
        usable = [
            document
            for document, text in zip(self._documents, self._normalised, strict=True)
            if document not in evidence and not leaks(text, golds, "substring")
        ]
        shuffled = [usable[place] for place in rng.permutation(len(usable))]
        return sorted(shuffled, key=lambda document: document not in own)
