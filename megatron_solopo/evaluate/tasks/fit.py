"""What a task makes before its length is fitted.

Prompts of exactly so many tokens, whatever the tokenizer.

Only the whole prompt is ever measured, since tokenizers merge across every seam. As many units (sentences, documents,
words of a list) are taken as fit; neutral sentences and then single words go into the prompt's padding; the last token
or two are met by trying short endings, and with fewer words or units where no ending meets them.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice

from megatron_solopo.data.rows import Content


@dataclass(frozen=True)
class Draft:
    """One sample without its length.

    Attributes:
        build: (units, padding) -> text; more of either make it longer.
        lead: How an answer begins; a plain prompt ends with it, a chat message leaves it out.
        answers: What is scored against.
        most_units: How many units there are; None: no bound.
    """

    build: Callable[[int, str], str]
    lead: str
    answers: tuple[str, ...]
    most_units: int | None = None


PromptBuilder = Callable[[int, str], Content]
"""(units, padding) -> prompt; more of either make it longer."""

_SENTENCES = (
    "The morning was calm and nobody was in a hurry.",
    "A light wind moved the leaves.",
    "The road went on along the water.",
    "It was quiet again after a while.",
)
_WORDS = ("and", "then", "so", "on", "it", "went", "as", "it", "was", "in", "the", "old", "time", "of", "day")
_ENDINGS = ("", ".", " a", " on", " on.", " x", " I I", " a.", "!", " -", " it is", "..", " q z", " a b c", " a b c d")
_BACKWARDS = 6


def fit(build: PromptBuilder, excess: Callable[[Content], int], most_units: int | None = None) -> Content | None:
    """A prompt without excess, the same for the same arguments; None where none was found.

    Args:
        build: Makes prompts.
        excess: Tokens of a prompt beyond the length to be met; negative below it.
        most_units: How many units there are; padding does not stand in for what is missing. None: no bound.
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
    """A prompt of these units without excess, if some padding gives one."""

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
    """The most items whose excess is not above 0, None if there is none; excess grows about evenly.

    Steps as wide as the last growth asks for lead there in a few calls.
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
