"""What a task makes before its length is fitted."""

from collections.abc import Callable
from dataclasses import dataclass


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
