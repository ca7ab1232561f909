"""What a model is asked: one prompt, its answers, and where it belongs in the table."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_solopo.data.row import Content
from megatron_solopo.data.scoring import Score

QA_METRICS: tuple[Score, ...] = ("sub_em", "exact_match", "token_f1", "string_match_part")
"""Of one answer and its other forms; the first is the main one."""


@dataclass(frozen=True)
class Spec:
    """A sample before its prompt is made.

    Attributes:
        id: Unlike any other's, and the same in every run with the same settings.
        task: Name of the task or file.
        length: Tokens of the prompt as asked for, or the upper bound of its bucket.
        depth: Of the evidence, from 0 to 1; None where it has no single one.
        prompt_tokens: True number of tokens.
        max_new_tokens: Tokens that may be generated.
        key: What its source makes it from.
    """

    id: str
    task: str
    length: int
    depth: float | None
    prompt_tokens: int
    max_new_tokens: int
    key: int


@dataclass(frozen=True)
class Sample:
    """A sample with its prompt."""

    spec: Spec
    prompt: Content
    answers: tuple[str, ...]


class Unfit(ValueError):
    """No prompt of a sample's length can be made.

    Attributes:
        reason: In words that other samples share, by which they are counted; the message has this one's numbers.
    """

    def __init__(self, spec: Spec, reason: str, message: str) -> None:
        super().__init__(f"--lengths {spec.length}: {spec.task}: {message}")
        self.reason = reason


class Source(Protocol):
    """Tasks, or files of questions."""

    metrics: dict[str, tuple[Score, ...]]
    """Of each task, the main one first."""

    def plan(self) -> list[Spec]:
        """Every sample, cheap to list."""

    def build(self, spec: Spec) -> Sample:
        """One sample, the same whenever it is built. Raises Unfit, likewise, where none of its length can be made."""


def check_names(sources: Sequence[Source]) -> None:
    """Raise ValueError where two sources have a task of one name."""
    names = [name for source in sources for name in source.metrics]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"--contexts: two files have the name {min(twice)}; rename one")
