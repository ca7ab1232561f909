"""Retrieval: access codes hidden in a text, of which some are asked for."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_solopo.evaluate.tasks.draft import Draft
from megatron_solopo.evaluate.tasks.haystack import Haystack

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
    """How many codes are hidden and asked for: `keys` names with `values` codes each, of which `asked` names."""

    keys: int
    values: int
    asked: int


NEEDLES = {
    "needle_single": Needles(keys=1, values=1, asked=1),
    "needle_multi_key": Needles(keys=4, values=1, asked=1),
    "needle_multi_value": Needles(keys=1, values=4, asked=1),
    "needle_multi_query": Needles(keys=4, values=1, asked=4),
}


def needle_draft(kind: Needles, depth: float | None, rng: np.random.Generator, source: Sequence[str] | None) -> Draft:
    """A sample.

    Args:
        depth: Of the one code that is asked for; None: every code at a random depth.
        rng: Of the sample.
        source: See `Haystack`.
    """
    names = _names(kind.keys, rng)
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

    return Draft(build, f"Answer: The access {code} for {asked} {verb}", answers)


def _names(count: int, rng: np.random.Generator) -> list[str]:
    """Different names; no word is in two of them."""
    firsts, seconds = (rng.choice(words, count, replace=False).tolist() for words in (_ADJECTIVES, _NOUNS))
    return [f"{first} {second}" for first, second in zip(firsts, seconds, strict=True)]


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
