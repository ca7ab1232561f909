"""How long the long contexts are to be: a list, a weighted choice, or a range to draw from.

8192                        every question once, at this length
4096,8192,131072            every question once at each length
8192:0.7,131072:0.3         every question once, at a length drawn with these weights
uniform:4096-131072         every question once, at a length drawn from the range
loguniform:4096-131072      the same, every doubling of the length as likely as the next
"""

import re
from dataclasses import dataclass

import numpy as np

_LEGAL = "8192 | 4096,8192 | 8192:0.7,131072:0.3 | uniform:4096-131072 | loguniform:4096-131072"
_RANGE = re.compile(r"(uniform|loguniform):(\d+)-(\d+)")


@dataclass(frozen=True)
class LengthPlan:
    """Lengths in tokens. Either all of `each`, or one that is drawn."""

    each: tuple[int, ...] = ()
    weights: tuple[float, ...] = ()
    """Of `each`, to draw one of them; empty to take all."""
    span: tuple[int, int] | None = None
    logarithmic: bool = False

    @property
    def rows(self) -> int:
        """Rows that one question makes."""
        return len(self.each) if self.each and not self.weights else 1

    @property
    def largest(self) -> int:
        """The longest context that can occur."""
        return self.span[1] if self.span else max(self.each)

    def draw(self, rng: np.random.Generator) -> tuple[int, ...]:
        """The lengths of one question's rows."""
        if self.weights:
            return (int(rng.choice(self.each, p=np.array(self.weights) / sum(self.weights))),)
        if self.span is None:
            return self.each
        low, high = self.span
        if self.logarithmic:
            return (round(float(np.exp(rng.uniform(np.log(low), np.log(high))))),)
        return (int(rng.integers(low, high + 1)),)


def parse_lengths(text: str) -> LengthPlan:
    """Read `--long-tokens`, see the module. Raises ValueError with the legal forms."""
    try:
        return _parse(text.replace("_", "").replace(" ", ""))
    except ValueError as error:
        raise ValueError(f"--long-tokens {text}: {error}; legal: {_LEGAL}") from None


def _parse(text: str) -> LengthPlan:
    if found := _RANGE.fullmatch(text):
        span = int(found[2]), int(found[3])
        if not 0 < span[0] < span[1]:
            raise ValueError("a range begins at 1 or later and ends behind its beginning")
        return LengthPlan(span=span, logarithmic=found[1] == "loguniform")
    parts = [part.split(":") for part in text.split(",")]
    if not all(part[0].isdecimal() and int(part[0]) > 0 for part in parts):
        raise ValueError("a length is a whole number of tokens, at least 1")
    each = tuple(int(part[0]) for part in parts)
    if len(set(each)) != len(each):
        raise ValueError("a length is given twice")
    if {len(part) for part in parts} == {1}:
        return LengthPlan(each)
    if {len(part) for part in parts} != {2}:
        raise ValueError("either every length has a weight or none")
    try:
        weights = tuple(float(part[1]) for part in parts)
    except ValueError:
        raise ValueError("a weight is a number") from None
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError("a weight is a finite number above 0")
    return LengthPlan(each, weights)
