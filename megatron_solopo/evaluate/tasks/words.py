"""Aggregation: the words that a long list holds most often."""

import numpy as np

from megatron_solopo.evaluate.tasks.draft import Draft

COMMON = 10
_SYLLABLES = [f"{consonant}{vowel}" for consonant in "bdfgklmnprstv" for vowel in "aeiou"]
_WORD_SYLLABLES = 3
_LONG = 4096
_CHUNK = 1024


def words_draft(length: int, rng: np.random.Generator) -> Draft:
    """A numbered list in random order: `COMMON` words come 30 times each and all others 3 times (below 4,096 tokens,
    where that would be half the list, 10 times and once). The words are made up and equally long, so that none is
    part of another."""
    often, seldom = (30, 3) if length >= _LONG else (10, 1)
    order_seed = int(rng.integers(1 << 62))
    words = _Words(rng)

    def build(units: int, padding: str) -> str:
        chosen = words.take(COMMON + units)
        entries = np.repeat(chosen, [often] * COMMON + [seldom] * units)
        # Of the units alone: the same units give the same list, whatever was tried before.
        shuffled = np.random.default_rng((order_seed, units)).permutation(entries)
        listed = " ".join(f"{number}. {word}" for number, word in enumerate(shuffled, start=1))
        # No heading: it would cost its tokens at once, and the lengths between could not be met.
        before = f"{padding} " if padding else ""
        return (
            f"{before}Below is a numbered list of words. Some words come more often than others.\n\n{listed}\n\n"
            f"Question: Which {COMMON} words come most often in the list?"
        )

    return Draft(build, f"Answer: The {COMMON} words that come most often in the list are", tuple(words.take(COMMON)))


class _Words:
    """Different made-up words without end."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._made: dict[str, None] = {}

    def take(self, count: int) -> list[str]:
        """The first words."""
        while len(self._made) < count:
            # Always as many: a word does not depend on how many were asked for at once.
            draws = self._rng.integers(len(_SYLLABLES), size=(_CHUNK, _WORD_SYLLABLES))
            self._made |= dict.fromkeys("".join(_SYLLABLES[place] for place in draw) for draw in draws)
        return list(self._made)[:count]
