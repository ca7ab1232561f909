"""The pool of requests: what is asked, in which order answers are kept, what is retried, how a run ends."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable

import pytest

from megatron_solopo.errors import UserError
from megatron_solopo.generate.model import Answer, Answered, Request, RequestFailed, RequestPool


def request(number: int, samples: int = 1) -> Request:
    return Request(str(number), "", tuple(range(samples)), max_tokens=1, seed=10 * number)


def run(ask: Callable, items: range, build: Callable = request, concurrency: int = 8) -> list[Answered]:
    kept: list[Answered] = []
    pool = RequestPool(ask, concurrency, build, lambda *answered: kept.append(answered))
    asyncio.run(pool.finish(items))
    return kept


async def at_once(asked: Request) -> list[Answer]:
    return [Answer(f"{asked.seed}", "stop")]


def test_requests_side_by_side_share_the_wall_time() -> None:
    async def slow(asked: Request) -> list[Answer]:
        await asyncio.sleep(0.1)
        return [Answer("", "stop")]

    start = time.perf_counter()
    kept = run(slow, range(8))
    elapsed = time.perf_counter() - start
    assert len(kept) == 8 and 0.09 < sum(seconds for _, _, seconds in kept) <= elapsed


def test_missing_samples_of_a_request_are_asked_for_with_their_own_seed() -> None:
    kept = run(at_once, range(1, 2), lambda number: request(number, samples=3))
    assert [(each.indices[0], each.seed, answers[0].text) for each, answers, _ in kept] == [
        (0, 10, "10"),
        (1, 11, "11"),
        (2, 12, "12"),
    ]


def test_prompts_are_built_one_at_a_time_beside_the_event_loop() -> None:
    """While a long prompt is built, answers still come in."""
    building = 0

    def build(number: int) -> Request:
        nonlocal building
        assert threading.current_thread() is not threading.main_thread() and building == 0
        building += 1
        time.sleep(0.01)
        building -= 1
        return request(number)

    assert {each.question_id for each, _, _ in run(at_once, range(9), build)} == set(map(str, range(9)))


def test_an_item_without_a_request_is_skipped() -> None:
    kept = run(at_once, range(6), lambda number: request(number) if number % 2 else None)
    assert sorted(each.question_id for each, _, _ in kept) == ["1", "3", "5"]


def test_a_failed_request_does_not_end_the_others() -> None:
    async def ask(asked: Request) -> list[Answer]:
        if asked.question_id == "3":
            raise RequestFailed("HTTP 500")
        return await at_once(asked)

    kept: list[Answered] = []
    pool = RequestPool(ask, 2, request, lambda *answered: kept.append(answered))
    with pytest.raises(UserError, match="1 requests got no answer: 3: HTTP 500; the answers that came are kept"):
        asyncio.run(pool.finish(range(9)))
    assert len(kept) == 8


@pytest.mark.parametrize("where", ["ask", "build", "keep"])
def test_a_fault_of_this_program_keeps_its_type(where: str) -> None:
    def fail(*given: object) -> None:
        raise KeyError(where)

    async def failing_ask(asked: Request) -> list[Answer]:
        raise KeyError(where)

    functions = {"ask": at_once, "build": request, "keep": lambda *answered: None}
    functions[where] = failing_ask if where == "ask" else fail
    pool = RequestPool(functions["ask"], 2, functions["build"], functions["keep"])
    with pytest.raises(KeyError, match=where):
        asyncio.run(pool.finish(range(9)))


def test_ctrl_c_ends_the_run() -> None:
    async def ask(asked: Request) -> list[Answer]:
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(60)
        return []

    start = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        run(ask, range(9))
    assert time.perf_counter() - start < 30
