"""Prompts of exactly so many tokens, whatever the tokenizer.

Only whole prompts are measured, since a tokenizer may merge text across any seam. A prompt takes as many units
(sentences, documents or words of a list) as fit. Then neutral sentences and single words pad it. Short endings meet the
last tokens; where none does, the search goes on with fewer words or units.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from megatron_solopo.data.messages import Content


@dataclass(frozen=True)
class UnsizedSample:
    """A sample of a task before its prompt has the wanted length.

    Attributes:
        build: Makes the text from a number of units and a padding; more of either make it longer.
        lead: How an answer begins; a plain prompt ends with it, a chat message leaves it out.
        answers: The right answers.
        most_units: How many units there are; None: no bound.
    """

    build: Callable[[int, str], str]
    lead: str
    answers: tuple[str, ...]
    most_units: int | None = None


PromptBuilder = Callable[[int, str], Content]
"""Makes the prompt from a number of units and a padding; more of either make it longer."""

_SENTENCES = (
    "The morning was calm and nobody was in a hurry.",
    "A light wind moved the leaves.",
    "The road went on along the water.",
    "It was quiet again after a while.",
)
_WORDS = ("and", "then", "so", "on", "it", "went", "as", "it", "was", "in", "the", "old", "time", "of", "day")
_ENDINGS = ("", ".", " a", " on", " on.", " x", " I I", " a.", "!", " -", " it is", "..", " q z", " a b c", " a b c d")
_BACKWARDS = 6


def fit_length(build: PromptBuilder, excess: Callable[[Content], int], most_units: int | None = None) -> Content | None:
    """A prompt of the wanted length, the same for the same arguments; None where none was found.

    Args:
        excess: Number of tokens that a prompt has beyond the wanted length; negative for a shorter one.
        most_units: How many units there are; None: no bound. Padding does not replace missing units.
    """
    units = _most(lambda n: excess(build(n, "")), most_units)
    if units is None:
        return None
    if units == most_units:
        whole = build(units, "")
        return None if excess(whole) else whole
    prompts = (_pad(build, excess, units - fewer) for fewer in range(min(_BACKWARDS, units + 1)))
    return next((prompt for prompt in prompts if prompt is not None), None)


def _pad(build: PromptBuilder, excess: Callable[[Content], int], units: int) -> Content | None:
    """A prompt of so many units with the wanted length; None where no padding gives one."""

    def padded(padding: str) -> int:
        return excess(build(units, padding))

    bulk = _first(_SENTENCES, _most(lambda n: padded(_first(_SENTENCES, n))) or 0)
    words = _most(lambda n: padded(_joined(bulk, n))) or 0
    for fewer in range(min(_BACKWARDS, words + 1)):
        for ending in _ENDINGS:
            prompt = build(units, (_joined(bulk, words - fewer) + ending).strip())
            if not excess(prompt):
                return prompt
    return None


def _joined(bulk: str, words: int) -> str:
    return f"{bulk} {_first(_WORDS, words)}".strip()


def _first(stock: Sequence[str], count: int) -> str:
    return " ".join(islice(cycle(stock), count))


def _most(excess: Callable[[int], int], bound: int | None = None) -> int | None:
    """The largest number of items whose excess is not above 0; None if even no item is too much.

    The excess grows about evenly, so the growth of the last step tells how wide the next one must be. Few calls are
    needed.
    """
    low, low_excess = 0, excess(0)
    if low_excess > 0:
        return None
    high = None if bound is None else bound + 1
    step = 1
    while high is None or high - low > 1:
        tried = low + max(1, step) if high is None else min(low + max(1, step), high - 1)
        found = excess(tried)
        growth = (found - low_excess) / (tried - low)
        if found <= 0:
            low, low_excess = tried, found
        else:
            high = tried
        step = int(-low_excess / growth) if growth > 0 else 2 * max(1, step)
    return low
