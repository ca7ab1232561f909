"""The same function over many items, on one process or several, results in order."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Finished results that wait for an earlier one are held; this bounds them.
_WAITING_PER_PROCESS = 4


class Workers:
    """Processes that share a set-up; with one, everything runs in the caller. Use as a context manager.

    Args:
        num_proc: Processes.
        initialise: Called once in each, with `arguments`, before any work.
        arguments: Picklable.
    """

    def __init__(self, num_proc: int, initialise: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self._executor: ProcessPoolExecutor | None = None
        self._waiting = num_proc * _WAITING_PER_PROCESS
        if num_proc == 1:
            initialise(*arguments)
        else:
            # A forked process would inherit the threads of torch and the tokenizer in an unknown state.
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(num_proc, context, _begin, (initialise, arguments))

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
        """`function` of every item, in order. A process that was killed is a ValueError."""
        if self._executor is None:
            yield from map(function, items)
            return
        waiting: deque[Future[_Result]] = deque()
        try:
            for item in items:
                waiting.append(self._executor.submit(function, item))
                if len(waiting) >= self._waiting:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except ValueError as error:
            # Raised here again: what another process raised has lost the place that it came from.
            raise ValueError(str(error)) from None
        except BrokenProcessPool:
            raise ValueError("a worker process was killed, most likely for want of memory; lower --num-proc") from None


def _begin(initialise: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Set a process up. Ctrl-C goes to all of them: the caller alone ends the work and tells it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_caller, daemon=True).start()
    initialise(*arguments)


def _end_with_caller() -> None:
    """A caller that was killed tells nobody: without this its processes would wait for work for ever."""
    caller = multiprocessing.parent_process()
    assert caller is not None
    caller.join()
    os._exit(1)
