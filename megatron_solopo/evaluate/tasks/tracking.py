"""Multi-hop tracing: a chain of assignments through a text."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from megatron_solopo.evaluate.tasks.draft import Draft
from megatron_solopo.evaluate.tasks.haystack import Haystack

HOPS = 4
_NAME_LETTERS = 5
_LEAST_VALUE, _VALUES = 10_000, 90_000


def tracking_draft(rng: np.random.Generator, source: Sequence[str] | None) -> Draft:
    """A value, the variable it is assigned to, and `HOPS` more that get it one from another, in the text's order."""
    names = _names(HOPS + 1, rng)
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

    return Draft(build, f"Answer: The {len(names)} variables with the value {value} are", tuple(names))


def _names(count: int, rng: np.random.Generator) -> list[str]:
    names: list[str] = []
    while len(names) < count:
        name = "".join(chr(ord("A") + letter) for letter in rng.integers(26, size=_NAME_LETTERS))
        if name not in names:
            names.append(name)
    return names
