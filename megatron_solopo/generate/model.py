"""Requests and answers, and the pool that sends many requests at once.

A caller has items, which are cheap, and a function that builds the request of an item. Prompts may have 128K tokens:
a request exists only from just before it is asked until its answers are kept.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar

from megatron_solopo.data.rows import Content
from megatron_solopo.errors import UserError

_SHOWN_FAILURES = 3


@dataclass(frozen=True)
class Request:
    """Some answers to one prompt.

    Attributes:
        question_id: Name of the question, under which its answers are kept.
        indices: Numbers of the wanted answers; as many are asked for.
        max_tokens: The most tokens of an answer, with the end token.
        seed: Of the random numbers, where answers are sampled.
        right_answers: Kept with an answer for its score. The model does not see them.
    """

    question_id: str
    prompt: Content
    indices: tuple[int, ...]
    max_tokens: int
    seed: int = 0
    right_answers: tuple[str, ...] = ()

    def without_first(self, count: int) -> "Request":
        """The request for the answers that are still missing after the first `count` have come."""
        return replace(self, indices=self.indices[count:], seed=self.seed + count)


@dataclass(frozen=True)
class Answer:
    """One answer as a model gives it."""

    text: str
    """Without the end token."""
    finish_reason: str | None
    """stop: the model ended the answer. length: the answer has `max_tokens` tokens. A server may name others."""
    tokens: int | None = None
    """Number of tokens with the end token; None where a server does not say."""


class RequestFailed(Exception):
    """No answer came after all retries; the message says why."""


Answered = tuple[Request, list[Answer], float]
"""A request, its answers, and their share of the wall time in seconds."""
Item = TypeVar("Item")
Build = Callable[[Item], Request | None]
"""Makes the request of an item; None where it cannot be made, and then the item is skipped."""
Keep = Callable[[Request, Sequence[Answer], float], None]
"""Called as answers come. The answers belong to the first indices of the request; the number is their share of the wall
time in seconds."""


class Model(Protocol):
    """Answers requests: a model in this process, on this group of ranks, or on a server."""

    retried: Counter[str]
    """How often a request was sent again, by reason."""

    def answer(self, batches: Sequence[Sequence[Item]], build: Build[Item], keep: Keep) -> None:
        """Answer every item for which `build` makes a request.

        Args:
            batches: The prompts of a batch are equally long and have the same `max_tokens`.
            keep: Called in this thread, on one process alone.

        Raises:
            UserError: A server refuses the requests, or some got no answer.
        """


class RequestPool(Generic[Item]):
    """Has several requests under way at once.

    Args:
        ask: Returns at least one answer and at most one per index. Raises RequestFailed where this request gets no
            answer; any other exception ends the run.
        concurrency: How many requests are under way.
        build: See `Build`. Runs in a thread of its own, for one item at a time.
        keep: See `Keep`. The seconds are those since the previous answer, so that they add up to the wall time.
    """

    def __init__(
        self, ask: Callable[[Request], Awaitable[list[Answer]]], concurrency: int, build: Build[Item], keep: Keep
    ) -> None:
        self._ask = ask
        self._concurrency = concurrency
        self._build = build
        self._keep = keep
        self._failed: list[str] = []
        self._failed_in_a_row = 0
        self._last_answer = 0.0

    async def finish(self, items: Iterable[Item]) -> None:
        """Answer every item. Raises UserError at the end for requests that got no answer."""
        waiting = iter(items)
        self._last_answer = time.perf_counter()
        builder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prompts")
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._concurrency):
                    group.create_task(self._work(waiting, builder))
        except BaseExceptionGroup as errors:
            # All tasks fail of one cause, such as a server that refuses or a full disk.
            raise errors.exceptions[0] from None
        finally:
            builder.shutdown(cancel_futures=True)
        if self._failed:
            shown = "; ".join(self._failed[:_SHOWN_FAILURES])
            more = "; ..." if len(self._failed) > _SHOWN_FAILURES else ""
            raise UserError(
                f"{len(self._failed)} requests got no answer: {shown}{more}; the answers that came are kept, the same "
                "command asks for the rest"
            )

    async def _work(self, waiting: Iterable[Item], builder: ThreadPoolExecutor) -> None:
        """Take the next item until there is none, or until so many failed in a row that the server must be gone."""
        loop = asyncio.get_running_loop()
        for item in waiting:
            if self._failed_in_a_row >= self._concurrency:
                return
            request = await loop.run_in_executor(builder, self._build, item)
            if request is None:
                continue
            try:
                await self._complete(request)
                self._failed_in_a_row = 0
            except RequestFailed as error:
                self._failed.append(f"{request.question_id}: {error}")
                self._failed_in_a_row += 1

    async def _complete(self, request: Request) -> None:
        """Get every answer to one request: a server may give fewer at once than it was asked for."""
        while request.indices:
            answers = await self._ask(request)
            now = time.perf_counter()
            self._keep(request, answers, now - self._last_answer)
            self._last_answer = now
            request = request.without_first(len(answers))
