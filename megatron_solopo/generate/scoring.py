"""How right a response is. Every score is in [0, 1] and has its own name: they are not interchangeable.

    exact_match        SQuAD's: the SQuAD-normalised response is a SQuAD-normalised gold; best gold counts
    sub_em             SQuAD-normalised gold is a substring of the SQuAD-normalised response; best gold counts
    string_match_part  RULER's QA score: any gold is a substring, ignoring case
    string_match_all   RULER's other score: the fraction of golds that are substrings, ignoring case
    token_f1           LongBench's QA score: F1 of the SQuAD-normalised words; best gold counts

Sources: SQuAD 1.1's evaluate-v1.1.py; RULER's scripts/eval/synthetic/constants.py; LongBench's metrics.py.
`string_match_all` counts aliases of one answer as if all were asked for: it is for lists of things to find.
"""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Literal

Score = Literal["exact_match", "sub_em", "string_match_part", "string_match_all", "token_f1"]

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_normalise(text: str) -> str:
    """Lower case, without ASCII punctuation, articles and surplus white space, in this order."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(response: str, answers: Sequence[str]) -> float:
    """1 if the response is one of the answers, both normalised."""
    said = squad_normalise(response)
    return float(any(squad_normalise(answer) == said for answer in answers))


def sub_em(response: str, answers: Sequence[str]) -> float:
    """1 if any answer is in the response, both normalised.

    An answer of nothing but articles and punctuation ("A", "...") would be in everything: it must be the response.
    """
    said = squad_normalise(response)

    def found(answer: str) -> bool:
        gold = squad_normalise(answer)
        return gold in said if gold else answer.strip().lower() == response.strip().lower()

    return float(any(map(found, answers)))


def string_match_part(response: str, answers: Sequence[str]) -> float:
    """1 if any answer is in the response, ignoring case."""
    return float(any(answer.lower() in response.lower() for answer in answers))


def string_match_all(response: str, answers: Sequence[str]) -> float:
    """Fraction of the answers that are in the response, ignoring case."""
    return sum(answer.lower() in response.lower() for answer in answers) / len(answers)


def token_f1(response: str, answers: Sequence[str]) -> float:
    """Harmonic mean of precision and recall of the normalised words, as multisets."""
    said = squad_normalise(response).split()
    return max(_f1(said, squad_normalise(answer).split()) for answer in answers)


def _f1(said: list[str], gold: list[str]) -> float:
    common = (Counter(said) & Counter(gold)).total()
    return 2 * common / (len(said) + len(gold)) if common else 0.0


def final_answer(response: str, marker: str) -> tuple[str, bool]:
    """What stands behind the last marker, ignoring its case, and whether there is one; else all of the response."""
    found = list(re.finditer(re.escape(marker), response, re.IGNORECASE))
    return (response[found[-1].end() :].strip(), True) if found else (response, False)


SCORERS: dict[Score, Callable[[str, Sequence[str]], float]] = {
    "exact_match": exact_match,
    "sub_em": sub_em,
    "string_match_part": string_match_part,
    "string_match_all": string_match_all,
    "token_f1": token_f1,
}
