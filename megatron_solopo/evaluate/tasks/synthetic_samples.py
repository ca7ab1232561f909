"""Samples of the tasks that need no corpus.

Needles: access codes hidden in a text, some of which are asked for. Variable tracking: a chain of assignments through a
text. Common words: the words that a long list holds most often.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from megatron_solopo.data.row_files import read_text_file
from megatron_solopo.errors import UserError
from megatron_solopo.evaluate.tasks.prompt_length import UnsizedSample

_SUBJECTS = (
    "A farmer", "An old sailor", "The baker", "My neighbour", "The young painter", "A tall stranger", "The teacher",
    "Her cousin", "A quiet student", "The gardener", "His aunt", "The postman", "A musician", "The miller", "Our guide",
    "The librarian", "A carpenter", "The doctor", "Their friend", "The shepherd",
)  # fmt: skip
_VERBS = (
    "carried", "found", "repaired", "painted", "lost", "admired", "sold", "borrowed", "cleaned", "described", "drew",
    "forgot", "hid", "kept", "noticed", "bought", "remembered", "returned", "showed", "wrapped",
)  # fmt: skip
_OBJECTS = (
    "a wooden chair", "two baskets", "an empty box", "the blue umbrella", "a broken clock", "some bread", "a letter",
    "the heavy door", "a pair of boots", "an apple", "the map", "a silver spoon", "the kettle", "a red scarf",
    "a bundle of straw", "the fishing net", "an old coin", "a glass bottle", "the ladder", "a woollen coat",
)  # fmt: skip
_PLACES = (
    "near the bridge", "behind the mill", "at the market", "on the way home", "beside the lake", "in the cellar",
    "before sunrise", "after the rain", "under the oak", "by the river", "in the afternoon", "at the station",
    "during the storm", "on the hill", "outside the village", "in the kitchen", "last winter", "at the harbour",
    "along the coast", "without a word",
)  # fmt: skip
_PARTS = (_SUBJECTS, _VERBS, _OBJECTS, _PLACES)
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_SENTENCES_PER_CHUNK = 1024


class Haystack:
    """Sentences without end, about which nothing is asked.

    Args:
        source: Sentences that are taken in their order, again and again, from a random one on. None makes sentences up.
    """

    def __init__(self, rng: np.random.Generator, source: Sequence[str] | None) -> None:
        self._rng = rng
        self._source = source
        self._start = int(rng.integers(len(source))) if source else 0
        self._made: list[str] = []

    def take(self, count: int) -> list[str]:
        """The first sentences."""
        if self._source:
            return [self._source[(self._start + place) % len(self._source)] for place in range(count)]
        while len(self._made) < count:
            draws = self._rng.integers([len(part) for part in _PARTS], size=(_SENTENCES_PER_CHUNK, len(_PARTS)))
            for draw in draws:
                words = (part[place] for part, place in zip(_PARTS, draw, strict=True))
                self._made.append(" ".join(words) + ".")
        return self._made[:count]

    def hide(self, hidden: Sequence[tuple[float, str]], count: int, padding: str) -> str:
        """The first `count` sentences as one text, with the hidden ones among them.

        Args:
            hidden: Each with its depth; 0 is the text's start, 1 its end.
            padding: Stands at depth 0.5.
        """
        sentences = self.take(count)
        inserted = sorted([*hidden, *([(0.5, padding)] if padding else [])], key=lambda each: each[0])
        text: list[str] = []
        start = 0
        for depth, sentence in inserted:
            gap = round(depth * count)
            text += [*sentences[start:gap], sentence]
            start = gap
        return " ".join([*text, *sentences[start:]])


def read_sentences(path: Path) -> list[str]:
    """The sentences of a text file. Raises UserError where there are none."""
    text = read_text_file(path, "--haystack")
    if not (sentences := [" ".join(each.split()) for each in _SENTENCE_END.split(text) if each.strip()]):
        raise UserError(f"--haystack {path}: holds no text")
    return sentences


_ADJECTIVES = (
    "amber", "brave", "crimson", "distant", "early", "frozen", "gentle", "hollow", "ivory", "jolly", "keen", "lunar",
    "mellow", "narrow", "olive", "patient", "quiet", "rapid", "silent", "tender", "upper", "velvet", "windy", "young",
)  # fmt: skip
_NOUNS = (
    "anchor", "beacon", "castle", "dragon", "engine", "forest", "garden", "harbor", "island", "jungle", "kitten",
    "lantern", "meadow", "needle", "orchard", "palace", "quarry", "rocket", "saddle", "temple", "valley", "window",
)  # fmt: skip
_LEAST_CODE, _CODES = 1_000_000, 9_000_000


@dataclass(frozen=True)
class Needles:
    """How many codes are hidden: `keys` names with `values` codes each. The question asks for `asked` of the names."""

    keys: int
    values: int
    asked: int


NEEDLES = {
    "needle_single": Needles(keys=1, values=1, asked=1),
    "needle_multi_key": Needles(keys=4, values=1, asked=1),
    "needle_multi_value": Needles(keys=1, values=4, asked=1),
    "needle_multi_query": Needles(keys=4, values=1, asked=4),
}


def needle_sample(
    kind: Needles, depth: float | None, rng: np.random.Generator, source: Sequence[str] | None
) -> UnsizedSample:
    """Access codes in a text.

    Args:
        depth: Of the one code that is asked for; None puts every code at a random depth.
        source: See `Haystack`.
    """
    names = _needle_names(kind.keys, rng)
    codes = [str(_LEAST_CODE + code) for code in rng.choice(_CODES, kind.keys * kind.values, replace=False)]
    depths = rng.random(len(codes))
    if depth is not None:
        assert kind.values == kind.asked == 1
        depths[0] = depth
    owners = [name for name in names for _ in range(kind.values)]
    sentences = [f"The access code for the {owner} is {code}." for owner, code in zip(owners, codes, strict=True)]
    hidden = list(zip(depths.tolist(), sentences, strict=True))
    haystack = Haystack(rng, source)
    asked = _listed([f"the {name}" for name in names[: kind.asked]])
    answers = tuple(code for owner, code in zip(owners, codes, strict=True) if owner in names[: kind.asked])
    code, verb = ("codes", "are") if len(answers) > 1 else ("code", "is")

    def build(units: int, padding: str) -> str:
        return (
            f"Access codes are given somewhere in the text below. Read it, then answer the question.\n\n"
            f"{haystack.hide(hidden, units, padding)}\n\n"
            f"Question: Which access {code} does the text give for {asked}?"
        )

    return UnsizedSample(build, f"Answer: The access {code} for {asked} {verb}", answers)


def _needle_names(count: int, rng: np.random.Generator) -> list[str]:
    """Different names that share no word."""
    firsts, seconds = (rng.choice(words, count, replace=False).tolist() for words in (_ADJECTIVES, _NOUNS))
    return [f"{first} {second}" for first, second in zip(firsts, seconds, strict=True)]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


HOPS = 4
_NAME_LETTERS = 5
_LEAST_VALUE, _VALUES = 10_000, 90_000


def variable_tracking_sample(rng: np.random.Generator, source: Sequence[str] | None) -> UnsizedSample:
    """A value, the variable it is assigned to, and `HOPS` more variables, each assigned from the one before."""
    names = _variable_names(HOPS + 1, rng)
    value = _LEAST_VALUE + int(rng.integers(_VALUES))
    statements = [f"VAR {names[0]} = {value}.", *(f"VAR {new} = VAR {old}." for old, new in pairwise(names))]
    hidden = list(zip(np.sort(rng.random(len(statements))).tolist(), statements, strict=True))
    haystack = Haystack(rng, source)

    def build(units: int, padding: str) -> str:
        return (
            "Variables get their values somewhere in the text below. Follow them, then answer the question.\n\n"
            f"{haystack.hide(hidden, units, padding)}\n\n"
            f"Question: Which {len(names)} variables have the value {value}, directly or by way of other variables?"
        )

    return UnsizedSample(build, f"Answer: The {len(names)} variables with the value {value} are", tuple(names))


def _variable_names(count: int, rng: np.random.Generator) -> list[str]:
    names: list[str] = []
    while len(names) < count:
        name = "".join(chr(ord("A") + letter) for letter in rng.integers(26, size=_NAME_LETTERS))
        if name not in names:
            names.append(name)
    return names


COMMON = 10
_SYLLABLES = [f"{consonant}{vowel}" for consonant in "bdfgklmnprstv" for vowel in "aeiou"]
_WORD_SYLLABLES = 3
_LONG = 4096
_WORDS_PER_CHUNK = 1024


def common_words_sample(length: int, rng: np.random.Generator) -> UnsizedSample:
    """A numbered list in random order: `COMMON` words come 30 times each, all others 3 times.

    Below 4,096 tokens the common words would be half of the list: there they come 10 times, the others once. The words
    are made up and equally long, so that no word is part of another.
    """
    often, seldom = (30, 3) if length >= _LONG else (10, 1)
    order_seed = int(rng.integers(1 << 62))
    words = _Words(rng)

    def build(units: int, padding: str) -> str:
        chosen = words.take(COMMON + units)
        entries = np.repeat(chosen, [often] * COMMON + [seldom] * units)
        # The same number of units gives the same list, whatever was tried before.
        shuffled = np.random.default_rng((order_seed, units)).permutation(entries)
        listed = " ".join(f"{number}. {word}" for number, word in enumerate(shuffled, start=1))
        # A heading would cost all its tokens at once, and the lengths between could not be met.
        before = f"{padding} " if padding else ""
        return (
            f"{before}Below is a numbered list of words. Some words come more often than others.\n\n{listed}\n\n"
            f"Question: Which {COMMON} words come most often in the list?"
        )

    return UnsizedSample(
        build, f"Answer: The {COMMON} words that come most often in the list are", tuple(words.take(COMMON))
    )


class _Words:
    """Different made-up words without end."""

    def __init__(self, rng: np.random.Generator) -> None:
        self._rng = rng
        self._made: dict[str, None] = {}

    def take(self, count: int) -> list[str]:
        """The first words."""
        while len(self._made) < count:
            # Always the same number: a word must not depend on how many were asked for at once.
            draws = self._rng.integers(len(_SYLLABLES), size=(_WORDS_PER_CHUNK, _WORD_SYLLABLES))
            self._made |= dict.fromkeys("".join(_SYLLABLES[place] for place in draw) for draw in draws)
        return list(self._made)[:count]
