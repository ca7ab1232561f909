"""The pool of requests: what is asked, in which order answers are kept, what is retried, how a run ends."""

import asyncio
import os
import signal
import threading
import time
import weakref
from collections.abc import Callable

import pytest

from megatron_solopo.errors import UserError
from megatron_solopo.generate.model import Answer, Answered, Request, RequestFailed, RequestPool, RequestRefused


def request(number: int, samples: int = 1) -> Request:
    return Request(str(number), "", tuple(range(samples)), max_tokens=1, seed=10 * number)


def run(ask: Callable, items: range, build: Callable = request, concurrency: int = 8) -> list[Answered]:
    kept: list[Answered] = []
    pool = RequestPool(ask, concurrency, build, lambda *answered: kept.append(answered), never_refused)
    asyncio.run(pool.finish(items))
    return kept


def never_refused(*given: object) -> None:
    raise AssertionError(given)


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


def test_an_answer_is_kept_while_the_next_prompt_is_built() -> None:
    """The second prompt is not ready before the first answer is kept, so a builder that blocks replies would hang."""
    first_kept = threading.Event()
    kept: list[str] = []

    def build(number: int) -> Request:
        assert number == 0 or first_kept.wait(30), "no answer was read while a prompt was built"
        return request(number)

    def keep(asked: Request, answers: object, seconds: float) -> None:
        kept.append(asked.question_id)
        first_kept.set()

    asyncio.run(RequestPool(at_once, 4, build, keep, never_refused).finish(range(6)))
    assert kept[0] == "0" and sorted(kept) == [str(number) for number in range(6)]


def test_few_built_prompts_exist_at_once() -> None:
    """As many as requests are under way, however many items wait."""
    alive = most = 0

    def free() -> None:
        nonlocal alive
        alive -= 1

    def build(number: int) -> Request:
        nonlocal alive, most
        made = request(number)
        weakref.finalize(made, free)
        alive += 1
        most = max(most, alive)
        return made

    async def ask(asked: Request) -> list[Answer]:
        await asyncio.sleep(0.01)
        return await at_once(asked)

    asyncio.run(RequestPool(ask, 4, build, lambda *answered: None, never_refused).finish(range(40)))
    assert 4 <= most <= 5


def test_an_answer_that_never_comes_is_handed_back_by_its_index() -> None:
    async def ask(asked: Request) -> list[Answer | RequestRefused]:
        return [Answer("", "stop"), RequestRefused("filter", "why", certain=True), Answer("", "stop")]

    kept: list[Request] = []
    refused: list[Request] = []
    pool = RequestPool(
        ask,
        1,
        lambda number: request(number, samples=3),
        lambda asked, *_: kept.append(asked),
        lambda asked, _: refused.append(asked),
    )
    asyncio.run(pool.finish(range(1)))
    assert [each.indices for each in kept] == [(0, 2)] and [each.indices for each in refused] == [(1,)]


def test_an_item_without_a_request_is_skipped() -> None:
    kept = run(at_once, range(6), lambda number: request(number) if number % 2 else None)
    assert sorted(each.question_id for each, _, _ in kept) == ["1", "3", "5"]


def test_a_failed_request_does_not_end_the_others() -> None:
    async def ask(asked: Request) -> list[Answer]:
        if asked.question_id == "3":
            raise RequestFailed("HTTP 500")
        return await at_once(asked)

    kept: list[Answered] = []
    pool = RequestPool(ask, 2, request, lambda *answered: kept.append(answered), never_refused)
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
    pool = RequestPool(functions["ask"], 2, functions["build"], functions["keep"], never_refused)
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
