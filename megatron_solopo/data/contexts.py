"""Short and long contexts around the same evidence, drawn from a pool of passages."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from megatron_solopo.data.musique import Paragraph, Question, mentions, normalise

_HEAD = (
    "Answer the question from the passages below. Reason step by step, name the passage that each step rests on, "
    'and end with "So the answer is:" and the answer.'
)


@dataclass(frozen=True)
class Document:
    """A paragraph of the pool with what the builder asks of it again and again."""

    paragraph: Paragraph
    search_text: str
    """Title and text in comparison form, where gold answers are looked for."""
    key: str
    """Text in comparison form; two documents of one key never share a context."""
    tokens: int
    """Length of the passage in a prompt, its separator included."""


class Pool:
    """Every paragraph of every question, each tokenized once.

    Args:
        questions: The whole input.
        count_tokens: Length in tokens of a piece of a prompt, without special tokens.
    """

    def __init__(self, questions: Sequence[Question], count_tokens: Callable[[str], int]) -> None:
        by_passage = {p.passage: p for question in questions for p in question.paragraphs}
        progress = tqdm(by_passage.items(), desc="Tokenizing paragraphs", unit=" paragraphs", disable=None)
        self._documents = {
            passage: _document(paragraph, count_tokens(f"{passage}\n\n")) for passage, paragraph in progress
        }
        unique = {document.key: document for document in reversed(self._documents.values())}
        self.distractors = list(reversed(unique.values()))
        """The documents, each text once, in the order of the input."""

    def find(self, paragraphs: Iterable[Paragraph]) -> list[Document]:
        """The documents of these paragraphs, each text once."""
        documents = (self._documents[paragraph.passage] for paragraph in paragraphs)
        return list({document.key: document for document in documents}.values())


def _document(paragraph: Paragraph, tokens: int) -> Document:
    return Document(paragraph, normalise(paragraph.passage), normalise(paragraph.paragraph_text), tokens)


def prompt(documents: Sequence[Document], question: Question) -> str:
    """The text a model is asked to continue: instruction, passages in this order, question."""
    passages = [document.paragraph.passage for document in documents]
    return "\n\n".join([_HEAD, *passages, f"Question: {question.question}", "Answer:\n"])


def short_documents(question: Question, pool: Pool, distractors: int, rng: np.random.Generator) -> list[Document]:
    """The evidence and up to `distractors` of the question's own other paragraphs, in random order.

    A paragraph that mentions an answer is not used; fewer come back where the question has fewer.
    """
    evidence = pool.find(question.evidence)
    used = {document.key for document in evidence}
    others = (document for document in pool.find(question.paragraphs) if document.key not in used)
    own = [document for document in others if not mentions(document.search_text, question.golds)]
    return _shuffled(evidence + _shuffled(own, rng)[:distractors], rng)


def long_documents(
    question: Question,
    short: Sequence[Document],
    pool: Pool,
    count: Callable[[Sequence[Document]], int],
    max_tokens: int,
    rng: np.random.Generator,
) -> tuple[list[Document], int, bool]:
    """The short context's documents scattered among as many of the pool's as fit.

    Args:
        question: Documents that mention one of its answers are not used.
        short: Kept as they are; must fit.
        pool: Where the distractors come from.
        count: Exact length in tokens of a sample with these documents.
        max_tokens: Never exceeded; what is left is shorter than any unused document.
        rng: Draws the distractors and the order of all documents.

    Returns:
        The documents in order, their exact length, and whether the pool was used up before it was reached.
    """
    used = {document.key for document in short}
    waiting = [document for document in _shuffled(pool.distractors, rng) if document.key not in used]
    documents, taken, removed = list(short), list[Document](), False
    while True:
        length = count(documents)
        if length > max_tokens:  # joined passages can tokenize into more tokens than the passages alone
            taken.pop()
            removed = True
        else:
            more, waiting = _fill(max_tokens - length, waiting, question)
            if not more:
                exhausted = not removed and all(mentions(d.search_text, question.golds) for d in waiting)
                return documents, length, exhausted
            taken += more
        documents = _shuffled([*short, *taken], rng) if taken else list(short)


def _fill(slack: int, waiting: Sequence[Document], question: Question) -> tuple[list[Document], list[Document]]:
    """Take, in order, every document that still fits; also return those that did not."""
    taken, left = [], []
    for document in waiting:
        if document.tokens > slack:
            left.append(document)
        elif not mentions(document.search_text, question.golds):
            taken.append(document)
            slack -= document.tokens
    return taken, left


def evidence_depths(documents: Sequence[Document], question: Question) -> list[float]:
    """Middle of each evidence passage as a fraction of all passages' tokens, in order; 0 is the start."""
    keys = {normalise(paragraph.paragraph_text) for paragraph in question.evidence}
    tokens = np.array([document.tokens for document in documents])
    middles = (tokens.cumsum() - tokens / 2) / tokens.sum()
    return [round(float(m), 4) for m, document in zip(middles, documents, strict=True) if document.key in keys]


def _shuffled(documents: Sequence[Document], rng: np.random.Generator) -> list[Document]:
    return [documents[index] for index in rng.permutation(len(documents))]
