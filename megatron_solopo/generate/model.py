"""What answers requests for samples: the interface of a model, here or on a server."""

from collections import Counter
from dataclasses import dataclass
from typing import Protocol

from megatron_solopo.data.rows import Content


@dataclass(frozen=True)
class Request:
    """Some samples of one question."""

    question_id: str
    prompt: Content
    indices: tuple[int, ...]
    max_tokens: int
    seed: int


@dataclass(frozen=True)
class Answer:
    """One response as a model gives it."""

    text: str
    finish_reason: str | None
    tokens: int | None = None
    """With the end token; None where the model does not say."""


class RequestFailed(Exception):
    """A request that was given up after all retries; the message says why."""


class Model(Protocol):
    """What answers requests."""

    concurrency: int
    """Requests that may be under way at once."""
    retried: Counter[str]
    """Retries by reason."""

    async def ask(self, request: Request) -> list[Answer]:
        """One answer or more, at most as many as asked for.

        Raises RequestFailed where this request cannot be answered, ValueError where none can.
        """

    async def aclose(self) -> None:
        """Give connections back."""
