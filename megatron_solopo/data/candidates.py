"""From the responses to one question to pairs of a chosen and a rejected one."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_solopo.data.context_rows import ContextRow
from megatron_solopo.data.journal import Response
from megatron_solopo.data.measure import Measure
from megatron_solopo.data.scoring import SCORERS, final_answer, token_f1
from megatron_solopo.data.select_settings import SelectSettings

_CUT = "length"


@dataclass(frozen=True)
class Candidate:
    """A response that may be trained on."""

    index: int
    text: str
    tokens: int
    """With the end token, as in training."""
    score: float
    f1: float
    """`token_f1` of the same text, which policies compare by."""
    marked: bool
    """Whether the answer marker was found, where it was looked for."""


@dataclass(frozen=True)
class Pair:
    """What becomes the answers of a triplet."""

    chosen: Candidate
    rejected: Candidate


class Judge:
    """Scores and pairs responses as the settings say."""

    def __init__(self, settings: SelectSettings) -> None:
        self._settings = settings

    def candidates(
        self, responses: Sequence[Response], row: ContextRow, measure: Measure
    ) -> tuple[list[Candidate], Counter[str]]:
        """The responses that may be trained on, and the others by the reason why not."""
        excluded: Counter[str] = Counter()
        seen: set[str] = set()
        found = []
        for response in sorted(responses, key=lambda each: each.index):
            text = response.text.strip()
            if reason := self._unfit(response, text, seen):
                excluded[reason] += 1
                continue
            seen.add(text)
            tokens = measure.response(row.prompt_short, text)
            if tokens > row.response_tokens:
                excluded["longer than the room that the contexts leave"] += 1
                continue
            scored, marked = self._scored_text(text)
            score = SCORERS[self._settings.score](scored, row.answers)
            found.append(Candidate(response.index, text, tokens, score, token_f1(scored, row.answers), marked))
        return found, excluded

    def split(self, candidates: Sequence[Candidate]) -> tuple[list[Candidate], list[Candidate]]:
        """(right, wrong)."""
        right = [each for each in candidates if each.score >= self._settings.threshold]
        return right, [each for each in candidates if each.score < self._settings.threshold]

    def pairs(self, right: Sequence[Candidate], wrong: Sequence[Candidate], rng: np.random.Generator) -> Iterator[Pair]:
        """Pairs, best first; no response is in two of them."""
        waiting = _shuffled(wrong, rng)
        made = 0
        for chosen in sorted(_shuffled(right, rng), key=self._chosen_key()):
            allowed = [each for each in waiting if self._allowed(chosen, each)]
            if allowed and made < self._settings.max_pairs_per_question:
                rejected = min(allowed, key=self._rejected_key(chosen))
                waiting.remove(rejected)
                made += 1
                yield Pair(chosen, rejected)

    def is_tied(self, right: Sequence[Candidate]) -> bool:
        """Whether chance decides which right response comes first, though the policy was to."""
        if self._settings.chosen == "random" or len(right) < 2:
            return False
        first, second = sorted(map(self._chosen_key(), right))[:2]
        return first == second

    def _unfit(self, response: Response, text: str, seen: set[str]) -> str:
        if not text:
            return "empty"
        if response.finish_reason == _CUT:
            return "cut at --max-tokens"
        return "the same as another" if text in seen else ""

    def _scored_text(self, text: str) -> tuple[str, bool]:
        """What is scored, and whether the marker was found or not asked for."""
        if self._settings.scored_text == "whole":
            return text, True
        return final_answer(text, self._settings.answer_marker)

    def _chosen_key(self) -> Callable[[Candidate], float]:
        keys: dict[str, Callable[[Candidate], float]] = {
            "shortest": lambda each: each.tokens,
            "random": lambda each: 0,
            "highest_f1": lambda each: -each.f1,
        }
        return keys[self._settings.chosen]

    def _rejected_key(self, chosen: Candidate) -> Callable[[Candidate], float]:
        keys: dict[str, Callable[[Candidate], float]] = {
            "random": lambda each: 0,
            "highest_f1": lambda each: -each.f1,
            "nearest_length": lambda each: abs(np.log(each.tokens / chosen.tokens)),
        }
        return keys[self._settings.rejected]

    def _allowed(self, chosen: Candidate, rejected: Candidate) -> bool:
        ratio = chosen.tokens / rejected.tokens
        low, high = self._settings.min_length_ratio, self._settings.max_length_ratio
        return (low is None or ratio >= low) and (high is None or ratio <= high)


def _shuffled(candidates: Sequence[Candidate], rng: np.random.Generator) -> list[Candidate]:
    return [candidates[place] for place in rng.permutation(len(candidates))]
