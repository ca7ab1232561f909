"""The one form that every corpus is read into, and when a text gives an answer away."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

LeakRule = Literal["substring", "word", "allow"]
"""What excludes a distractor: the answer anywhere in it, the answer as whole words, or nothing."""

# Nearly every document holds these words: as answers they are verdicts, not entities that a document could reveal.
_VERDICTS = frozenset({"yes", "no", "noanswer"})


class Document(NamedTuple):
    """A passage of a corpus; the title may be empty."""

    title: str
    text: str


class Hop(NamedTuple):
    """One step of a decomposed question; `#1` in `question` stands for the first hop's answer."""

    question: str
    answer: str
    title: str
    """Of the document it rests on; empty where the corpus names none."""


@dataclass(frozen=True)
class Question:
    """One question with its documents."""

    id: str
    question: str
    answers: tuple[str, ...]
    """The gold answer, then other accepted forms of it; empty only where it is not answerable."""
    documents: tuple[Document, ...]
    supporting: tuple[int, ...]
    """Indices of the evidence in `documents`."""
    hops: tuple[Hop, ...] = ()
    answerable: bool = True


def normalise(text: str) -> str:
    """Comparison form: Unicode-compatible characters, case and runs of white space made equal."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def golds(answers: Sequence[str]) -> list[str]:
    """Answers in comparison form, without those that are only white space in it."""
    return [gold for gold in map(normalise, answers) if gold]


def entity_golds(answers: Sequence[str]) -> list[str]:
    """`golds` that a document can give away: yes and no are not among them."""
    return [gold for gold in golds(answers) if gold not in _VERDICTS]


def mentions(text: str, golds: Sequence[str]) -> bool:
    """Whether any gold answer is a substring of `text`, all in comparison form.

    A substring, as in RULER's `string_match_part`, so that what would be scored as the answer is
    never found outside the evidence; a short answer ("us") therefore also excludes longer words.
    """
    return any(gold in text for gold in golds)


def leaks(text: str, golds: Sequence[str], rule: LeakRule) -> bool:
    """Whether a distractor with this text (comparison form) is excluded for the golds (comparison form)."""
    if rule == "allow" or not mentions(text, golds):
        return False
    return rule == "substring" or any(re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", text) for gold in golds)
