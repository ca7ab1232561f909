"""One function over many items, on one process or several, with the results in order."""

import functools
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

from megatron_solopo.errors import UserError

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Finished results wait here for an earlier one. This bounds their number.
_WAITING_PER_PROCESS = 4


class ProcessPool:
    """Processes with the same set-up. With one process, everything runs in the caller. Use as a context manager.

    Args:
        num_proc: Processes.
        initialise: Called once in each process, with `arguments`, before its first item.
        arguments: Must be picklable.
    """

    def __init__(self, num_proc: int, initialise: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        self._executor: ProcessPoolExecutor | None = None
        self._max_waiting = num_proc * _WAITING_PER_PROCESS
        if num_proc == 1:
            initialise(*arguments)
        else:
            # A forked process would inherit the threads of torch and the tokenizer in an unknown state.
            context = multiprocessing.get_context("spawn")
            self._executor = ProcessPoolExecutor(num_proc, context, _begin, (initialise, arguments))

    def __enter__(self) -> "ProcessPool":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)

    def map(self, function: Callable[[_Item], _Result], items: Iterable[_Item]) -> Iterator[_Result]:
        """`function` of every item, in order. Items are taken as results are, a few ahead.

        An error in another process is raised here with its type; its cause is the other process's traceback.
        Raises UserError if a process was killed.
        """
        if self._executor is None:
            yield from map(function, items)
            return
        waiting: deque[Future[_Result]] = deque()
        try:
            for item in items:
                waiting.append(self._executor.submit(_call, function, item))
                if len(waiting) >= self._max_waiting:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError("a worker process was killed, most likely for want of memory; lower --num-proc") from None


_initialise: Callable[[], None] | None = None


def _begin(initialise: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """Prepare a process. Ctrl-C reaches all of them, but the caller alone ends the work and reports it."""
    global _initialise
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_caller, daemon=True).start()
    _initialise = functools.partial(initialise, *arguments)


def _call(function: Callable[[_Item], _Result], item: _Item) -> _Result:
    """Work on one item. The set-up runs here, because the executor hides what its initializer raises."""
    global _initialise
    if _initialise is not None:
        _initialise()
        _initialise = None
    return function(item)


def _end_with_caller() -> None:
    """End this process when the caller ends. A caller that is killed cannot say so, and this process would wait."""
    caller = multiprocessing.parent_process()
    assert caller is not None
    caller.join()
    os._exit(1)
