"""Text that nothing is asked about, and what is hidden in it."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

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
_CHUNK = 1024


class Haystack:
    """Sentences without end.

    Args:
        rng: Decides which.
        source: Sentences to take in their order, from a random one on and around; None: made-up ones.
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
            draws = self._rng.integers([len(part) for part in _PARTS], size=(_CHUNK, len(_PARTS)))
            for draw in draws:
                words = (part[place] for part, place in zip(_PARTS, draw, strict=True))
                self._made.append(" ".join(words) + ".")
        return self._made[:count]

    def hide(self, hidden: Sequence[tuple[float, str]], count: int, padding: str) -> str:
        """The first sentences as one text, with each hidden one at its depth among them and the padding in the middle.

        Args:
            hidden: (depth, sentence); 0 is the text's start, 1 its end.
            count: Sentences beside the hidden ones.
            padding: Put at depth 0.5, where it is not empty.
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
    """The sentences of a text file. Raises ValueError where there are none."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--haystack {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ValueError(f"--haystack {path}: is not UTF-8 text") from None
    if not (sentences := [" ".join(each.split()) for each in _SENTENCE_END.split(text) if each.strip()]):
        raise ValueError(f"--haystack {path}: holds no text")
    return sentences
