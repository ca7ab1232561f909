"""Constructed answers to MuSiQue questions: a right chain of hops, and a wrong one.

A rule writes them from the annotations of the data set. No model is involved.
"""

import re
from collections.abc import Sequence

import numpy as np

from megatron_solopo.triplets.corpus.formats import Document, Question, golds, mentions, normalise

GIVE_UP = "The passages do not say."
GIVE_UP_SHARE = 0.2
"""Probability that a rejected answer gives up instead of naming a wrong entity."""

_NOUN_PHRASE = "the {relation} of {subject} is {answer}"
_REFERENCE = re.compile(r"#(\d+)")
_RELATION = re.compile(r"(?P<subject>.+?)\s*>>\s*(?P<relation>.+)")
_PREDICATE = re.compile(r".*\b(by|at|in|on|to|of|from|after)$")
_PHRASES = {
    "contains administrative territorial entity": "{subject} contains {answer}",
    "located in the administrative territorial entity": "{subject} is located in {answer}",
    "located on terrain feature": "{subject} is located on {answer}",
    "member of": "{subject} is a member of {answer}",
    "member of political party": "{subject} is a member of the political party {answer}",
    "member of sports team": "{subject} is a member of the sports team {answer}",
    "position held": "the position held by {subject} is {answer}",
    "shares border with": "{subject} shares a border with {answer}",
}


def chosen_response(question: Question) -> str:
    """One sentence for each hop with the title of its passage, then the gold answer."""
    sentences = [_hop_sentence(question, index) for index in range(len(question.hops))]
    return " ".join([*sentences, _conclusion(question.answers[0])])


def rejected_response(question: Question, context: Sequence[Document], rng: np.random.Generator) -> str:
    """The right hops with a wrong last one, or `GIVE_UP`. The gold answer does not occur in it.

    The wrong entity occurs in `context`. If the answer is a number, it is a number with as many digits. Otherwise it is
    the title of a passage or the answer of another hop. The response gives up with probability `GIVE_UP_SHARE`, and
    also if every wrong chain contains some form of the gold answer.
    """
    gives_up = rng.random() < GIVE_UP_SHARE
    wrong = [] if gives_up else [text for text in _wrong_chains(question, context) if not _is_right(text, question)]
    return wrong[rng.integers(len(wrong))] if wrong else GIVE_UP


def _is_right(text: str, question: Question) -> bool:
    return mentions(normalise(text), golds(question.answers))


def _wrong_chains(question: Question, context: Sequence[Document]) -> list[str]:
    last = len(question.hops) - 1
    reasoning = [_hop_sentence(question, index) for index in range(last)]
    asked = normalise(_resolve(question, last))
    return [
        " ".join([*reasoning, _sentence(title, _statement(question, last, entity)), _conclusion(entity)])
        for entity, title in _entities(question, context)
        if normalise(entity) not in asked and not any(normalise(entity) in gold for gold in golds(question.answers))
    ]


def _entities(question: Question, context: Sequence[Document]) -> list[tuple[str, str]]:
    """Each entity once, with the title of a passage that mentions it."""
    found = _numbers(question.answers[0], context)
    if not found:
        titles = {re.sub(r"\s*\(.*\)$", "", document.title): document.title for document in context}
        found = {entity: title for entity, title in titles.items() if entity}
        found |= _other_answers(question, context)
    return list(found.items())


def _numbers(answer: str, context: Sequence[Document]) -> dict[str, str]:
    """Numbers of the context with as many digits as the longest of the answer. None if the answer is mostly letters."""
    runs = re.findall(r"\d+", answer)
    if 2 * sum(map(len, runs)) < max(1, sum(map(str.isalnum, answer))):
        return {}
    pattern = re.compile(rf"(?<![\w.,])\d{{{max(map(len, runs))}}}(?!\w|[.,]\d)")
    return {number: document.title for document in context for number in pattern.findall(document.text)}


def _other_answers(question: Question, context: Sequence[Document]) -> dict[str, str]:
    passages = {document.title: normalise(f"{document.title} {document.text}") for document in context}
    sources = {hop.answer: hop.title for hop in question.hops[:-1]}
    return {answer: title for answer, title in sources.items() if normalise(answer) in passages.get(title, "")}


def _hop_sentence(question: Question, index: int) -> str:
    hop = question.hops[index]
    return _sentence(hop.title, _statement(question, index, hop.answer))


def _sentence(title: str, statement: str) -> str:
    return _stop(f'According to "{title}", {statement}' if title else statement[0].upper() + statement[1:])


def _conclusion(answer: str) -> str:
    return _stop(f"So the answer is: {answer}")


def _stop(text: str) -> str:
    return text if text.endswith(".") else f"{text}."


def _statement(question: Question, index: int, answer: str) -> str:
    asked = _resolve(question, index)
    if found := _RELATION.fullmatch(asked):
        return _phrase(found["relation"]).format(**found.groupdict(), answer=answer)
    asked = asked.rstrip("? ")
    return f'the answer to "{asked[0].upper()}{asked[1:]}{"" if asked.endswith(".") else "?"}" is {answer}'


def _phrase(relation: str) -> str:
    if relation in _PHRASES:
        return _PHRASES[relation]
    return "{subject} is {relation} {answer}" if _PREDICATE.fullmatch(relation) else _NOUN_PHRASE


def _resolve(question: Question, index: int) -> str:
    """The hop's question with earlier answers in place of `#1`. Other numbers stay."""
    hops = question.hops

    def answer_of(reference: re.Match[str]) -> str:
        hop = int(reference[1]) - 1
        return hops[hop].answer if 0 <= hop < index else reference[0]

    asked = _REFERENCE.sub(answer_of, hops[index].question)
    return re.sub(r"\s+(?=['\u2019]s\b|[?.,](?:\s|$))", "", " ".join(asked.split()))
