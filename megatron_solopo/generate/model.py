"""Requests and answers, and the pool that sends many requests at once.

A caller has items, which are cheap, and a function that builds the request of an item. Prompts may have 128K tokens:
a request exists only from just before it is asked until its answers are kept.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Generic, Protocol, TypeVar

from megatron_solopo.data.messages import Content
from megatron_solopo.data.template_arguments import NO_ARGUMENTS, TemplateArguments
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
        prompt_tokens: Tokens of the prompt by our own count; None where nobody counted.
        arguments: What the chat template gets beside the messages.
    """

    question_id: str
    prompt: Content
    indices: tuple[int, ...]
    max_tokens: int
    seed: int = 0
    right_answers: tuple[str, ...] = ()
    prompt_tokens: int | None = None
    arguments: TemplateArguments = NO_ARGUMENTS

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
    reasoning: str | None = None
    """The thought before the text, where a server tells it apart."""
    prompt_tokens: int | None = None
    """Tokens of the prompt by the server's count; None where it does not say."""


@dataclass
class Traffic:
    """What happened between this program and a server. Stays empty for a model in this process."""

    retried: Counter[str] = field(default_factory=Counter)
    """How often a request was sent again, by reason."""
    waited: float = 0.0
    """Seconds that requests waited before they were sent again, summed over the requests."""
    other_models: Counter[str] = field(default_factory=Counter)
    """Replies that name another model than the one asked for, by this name. It may be an alias."""


class RequestFailed(Exception):
    """No answer came after all retries; the message says why."""


class RequestRefused(Exception):
    """There will never be an answer to this request, or to some indices of it; the message says why.

    Attributes:
        kind: In words that are the same for other requests, to count them by.
        certain: Whether the cause is this prompt. If not, the server may refuse every request for the same reason.
    """

    def __init__(self, kind: str, message: str, *, certain: bool) -> None:
        super().__init__(message)
        self.kind = kind
        self.certain = certain


Answered = tuple[Request, list[Answer], float]
"""A request, its answers, and their share of the wall time in seconds."""
Item = TypeVar("Item")
Build = Callable[[Item], Request | None]
"""Makes the request of an item; None where it cannot be made, and then the item is skipped."""
Keep = Callable[[Request, Sequence[Answer], float], None]
"""Called as answers come, one for each index of the request; the number is their share of the wall time in seconds."""
Refuse = Callable[[Request, RequestRefused], None]
"""Called for requests that will never be answered; may raise UserError to end the run."""


class Model(Protocol):
    """Answers requests: a model in this process, on this group of ranks, or on a server."""

    traffic: Traffic

    def answer(self, batches: Sequence[Sequence[Item]], build: Build[Item], keep: Keep, refuse: Refuse) -> None:
        """Answer every item for which `build` makes a request.

        Args:
            batches: The prompts of a batch are equally long and have the same `max_tokens`.
            keep: Called in this thread, on one process alone.
            refuse: The same. Only a server refuses.

        Raises:
            UserError: A server refuses the requests, or some got no answer.
        """


class RequestPool(Generic[Item]):
    """Has several requests under way at once.

    Args:
        ask: Returns at least one answer and at most one per index, or the reason why there is none. Raises
            RequestFailed where this request gets no answer now, and RequestRefused where it never will; any other
            exception ends the run.
        concurrency: How many requests are under way.
        build: See `Build`. Runs in a thread of its own, for one item at a time.
        keep: See `Keep`. The seconds are those since the previous answer, so that they add up to the wall time.
        refuse: See `Refuse`.
    """

    def __init__(
        self,
        ask: Callable[[Request], Awaitable[Sequence[Answer | RequestRefused]]],
        concurrency: int,
        build: Build[Item],
        keep: Keep,
        refuse: Refuse,
    ) -> None:
        self._ask = ask
        self._concurrency = concurrency
        self._build = build
        self._keep = keep
        self._refuse = refuse
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
        for item in waiting:
            if self._failed_in_a_row >= self._concurrency:
                return
            await self._work_on(item, builder)

    async def _work_on(self, item: Item, builder: ThreadPoolExecutor) -> None:
        """A function of its own, so that the request is freed before the next one is built."""
        request = await asyncio.get_running_loop().run_in_executor(builder, self._build, item)
        if request is None:
            return
        try:
            await self._complete(request)
            self._failed_in_a_row = 0
        except RequestFailed as error:
            self._failed.append(f"{request.question_id}: {error}")
            self._failed_in_a_row += 1

    async def _complete(self, request: Request) -> None:
        """Get every answer to one request: a server may give fewer at once than it was asked for."""
        while request.indices:
            try:
                answers = await self._ask(request)
            except RequestRefused as refusal:
                self._refuse(request, refusal)
                return
            now = time.perf_counter()
            self._deliver(request, answers, now - self._last_answer)
            self._last_answer = now
            request = request.without_first(len(answers))

    def _deliver(self, request: Request, answers: Sequence[Answer | RequestRefused], seconds: float) -> None:
        found = [(index, each) for index, each in zip(request.indices, answers, strict=False)]
        kept = [(index, each) for index, each in found if isinstance(each, Answer)]
        if kept:
            indices = tuple(index for index, _ in kept)
            self._keep(replace(request, indices=indices), [answer for _, answer in kept], seconds)
        for index, each in found:
            if isinstance(each, RequestRefused):
                self._refuse(replace(request, indices=(index,)), each)
