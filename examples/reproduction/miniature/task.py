"""The task: look a key up among the facts of a context.

A context is a row of words: facts (`k07=v21`), each of its own key, between fillers (`f13`). A question (`ask k07`)
follows, and the answer is one word (`v21`). A fact is one token, so that one attention hop answers: with facts of two
tokens a model stays on a plateau for thousands of steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

PAD, UNKNOWN, END, ASK = "<pad>", "<unk>", "</s>", "ask"
NUM_KEYS, NUM_VALUES, NUM_FILLERS = 32, 32, 64
SHORT_FACTS, LONG_FACTS = 4, 16
LONG_FROM = 64
"""Contexts of as many words hold `LONG_FACTS` facts, shorter ones `SHORT_FACTS`."""

WORDS = (
    [PAD, UNKNOWN, END, ASK]
    + [f"k{key:02}" for key in range(NUM_KEYS)]
    + [f"v{value:02}" for value in range(NUM_VALUES)]
    + [f"k{key:02}=v{value:02}" for key in range(NUM_KEYS) for value in range(NUM_VALUES)]
    + [f"f{filler:02}" for filler in range(NUM_FILLERS)]
)
"""The vocabulary; a word's place is its token id."""
END_ID, ASK_ID = WORDS.index(END), WORDS.index(ASK)
KEY_0, VALUE_0, FACT_0, FILLER_0 = (WORDS.index(word) for word in ("k00", "v00", "k00=v00", "f00"))

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Contexts:
    """B contexts of T words over the same number F of facts."""

    words_BT: Ids
    keys_BF: Ids
    values_BF: Ids
    places_BF: Ids
    """Where each fact stands."""


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word; texts are words between blanks."""
    words = Tokenizer(models.WordLevel({word: place for place, word in enumerate(WORDS)}, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=END, pad_token=PAD, unk_token=UNKNOWN)


def num_facts(length: int) -> int:
    """Facts of a context of `length` words."""
    return LONG_FACTS if length >= LONG_FROM else SHORT_FACTS


def draw_facts(rng: np.random.Generator, batch: int, count: int) -> tuple[Ids, Ids]:
    """Keys, distinct within a context, and their values, both [batch, count]."""
    keys = rng.random((batch, NUM_KEYS)).argsort(axis=1)[:, :count]
    return keys, rng.integers(NUM_VALUES, size=(batch, count))


def place_facts(rng: np.random.Generator, keys_BF: Ids, values_BF: Ids, length: int) -> Contexts:
    """Contexts of `length` words with these facts at random places, fillers elsewhere."""
    batch, count = keys_BF.shape
    words = FILLER_0 + rng.integers(NUM_FILLERS, size=(batch, length))
    places = rng.random((batch, length)).argsort(axis=1)[:, :count]
    np.put_along_axis(words, places, FACT_0 + keys_BF * NUM_VALUES + values_BF, axis=1)
    return Contexts(words, keys_BF, values_BF, places)


def questions(contexts: Contexts, asked_B: Ids) -> tuple[Ids, Ids]:
    """Prompts [B, T + 2] that ask for the fact number `asked_B` of each context, and the answers' token ids [B]."""
    rows = np.arange(len(asked_B))
    keys, values = contexts.keys_BF[rows, asked_B], contexts.values_BF[rows, asked_B]
    asks = np.stack([np.full_like(keys, ASK_ID), KEY_0 + keys], axis=1)
    return np.concatenate([contexts.words_BT, asks], axis=1), VALUE_0 + values


def text(ids: Sequence[int] | Ids) -> str:
    """Token ids as the words that the tokenizer reads."""
    return " ".join(WORDS[token] for token in ids)
