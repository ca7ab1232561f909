"""Signals that ask a run to stop, and how all ranks stop at the same place.

SIGTERM, SIGUSR1 or SIGINT on any rank is a request to stop. At certain points all ranks learn of it in one all-reduce
of a single number, and `StopSignals.check` raises `Stopped` on every rank.

    point                what stopping there loses
    each micro-batch     without pipeline stages: the gradients of the current step
    each step            training with pipeline stages, which have micro-batches in flight: nothing
    each part            evaluation and reference pass with pipeline stages, see `single_pass`

An evaluation that stops loses what it has computed. A reference pass loses nothing. With pipeline stages, the run is
saved before a long evaluation: whoever asks may kill the ranks before a part is done.

Within a step no rank waits for the all-reduce: the ranks begin it at one micro-batch, and act on it at the next
(`check_meanwhile`). So a run without pipeline stages stops within two micro-batches, and then it is saved. With
pipeline stages it first ends its step, or its part of at most 24 x PP packs. Beside NCCL, more than 32 ranks reduce in
stages, and each stage takes one more micro-batch (`stages_of`). A second signal, 2 seconds or more after the first,
ends the process at once with code 128 + its number. A save that is being written then stays under its temporary name.
Within 2 seconds a second signal counts as the same request, because launchers deliver one request twice: to the process
group, then to each rank.

Python runs signal handlers only between two bytecodes of the main thread, and this thread may wait in a collective for
long. So a second thread reads the numbers of signals from a pipe, into which the interpreter writes them at once. This
thread knows nothing but the numbers, and ends with the block. Only the main thread holds the group and the all-reduce,
because another thread that frees them while the interpreter ends would abort the process.

Each point costs one all-reduce of 8 bytes between hosts (gloo), without a synchronization with the GPU.
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Self

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_solopo import exits

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_SAME_REQUEST_SECONDS = 2.0
_LARGEST_GROUP = 32


class Stopped(Exception):
    """Raised on all ranks together; the message names the signal and the rank that got it."""


class StopSignals:
    """Listens for requests to stop, within `with StopSignals() as signals:` in the main thread.

    Before `join` there are no other ranks to agree with, and a signal ends the process at once with code 85.
    """

    def __init__(self) -> None:
        self._requests = _Requests()
        self._stages: list[Any] = []
        self._agreeing: _Agreement | None = None

    def __enter__(self) -> Self:
        pipe, write_end = socket.socketpair()
        write_end.setblocking(False)
        self._write_end = write_end
        self._handlers = {number: signal.signal(number, self._requests.handle) for number in SIGNALS}
        self._wakeup = signal.set_wakeup_fd(write_end.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._requests.listen, args=(pipe,), name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        self._write_end.close()  # ends the thread
        self._thread.join()
        for number, handler in self._handlers.items():
            signal.signal(number, signal.SIG_IGN if self._requests.finished else handler)

    def join(self) -> None:
        """Let the ranks of the world agree from now on. All ranks call it together."""
        # On gloo, so that no host waits for its GPU.
        self._stages = [dist.group.WORLD] if dist.get_backend() == "gloo" else _gloo_groups()
        self._requests.ranks_have_met = True

    def check(self) -> None:
        """Raise Stopped on every rank if any rank was asked to stop. All ranks call it together."""
        self._finish_agreement()
        self._begin_agreement()
        self._finish_agreement()

    def check_meanwhile(self) -> None:
        """As `check`, but without waiting: it knows only the requests that came before an earlier check."""
        if self._agreeing is None or self._complete_stage():
            self._begin_agreement()

    def _begin_agreement(self) -> None:
        assert self._stages, "join comes first"
        # The greatest request wins: who, and which signal.
        received = self._requests.received
        mine = 0 if received is None else (dist.get_rank() + 1) * 256 + received
        self._agreeing = _Agreement(torch.tensor(mine, dtype=torch.int64, device="cpu"), self._stages)

    def _complete_stage(self) -> bool:
        """Wait for the running stage and begin the next one; returns whether it was the last. Raises Stopped then."""
        assert self._agreeing is not None
        if not self._agreeing.complete_stage():
            return False
        request, self._agreeing = int(self._agreeing.request), None
        if request:
            rank, number = divmod(request, 256)
            raise Stopped(f"{signal.Signals(number).name} on rank {rank - 1}")
        return True

    def _finish_agreement(self) -> None:
        while self._agreeing is not None:
            self._complete_stage()

    def conclude(self) -> None:
        """At the end of the work, wait for the last agreement and ignore it. All ranks call it together."""
        with suppress(Stopped):
            self._finish_agreement()

    def leave(self) -> None:
        """Release the groups before they are destroyed. Each rank calls it by itself.

        After a failure another rank may never join the last agreement. To free the group, torch would wait for it, at
        worst until the group's timeout. So the group then stays until the process ends.
        """
        if self._agreeing is not None and not self._agreeing.work.is_completed():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._agreeing.group))
        self._agreeing, self._stages = None, []

    def finish(self, stopped: Stopped) -> None:
        """Say that all is saved, and ignore signals from now on. All ranks call it together.

        A launcher signals the other ranks as soon as one has exited.
        """
        self._requests.finished = True
        if dist.get_rank() == 0:
            with suppress(OSError):  # the other ranks wait for this one, also if its console takes no more lines
                tqdm.write(f"stopped by {stopped}; the same command continues from what is saved")
        for group in self._stages:  # in every stage, so that each rank waits for all
            dist.barrier(group=group)


class _Agreement:
    """The maximum of a number over all ranks, in stages. Each stage is an all-reduce in the background."""

    def __init__(self, request: torch.Tensor, stages: Sequence[Any]) -> None:
        self.request = request
        self._left = list(stages)
        self._begin_stage()

    def _begin_stage(self) -> None:
        self.group = self._left.pop(0)
        self.work = dist.all_reduce(self.request, dist.ReduceOp.MAX, group=self.group, async_op=True)

    def complete_stage(self) -> bool:
        """Wait for the running stage and begin the next one; returns whether it was the last."""
        self.work.wait()
        if not self._left:
            return True
        self._begin_stage()
        return False


def stages_of(ranks: int) -> list[list[list[int]]]:
    """Groups of ranks, in stages: what is reduced in one group of every stage is reduced over all ranks.

    The ranks form a grid with as few dimensions as keep a group at 32 ranks. A gloo group of n ranks takes n^2
    connections, and each of its ranks reads n addresses for n others: 8 MB at 1,024 ranks, 8 GB from one store in all.
    """
    sizes, left = list[int](), ranks
    while left > 1:
        sizes.append(max((size for size in range(2, _LARGEST_GROUP + 1) if left % size == 0), default=left))
        left //= sizes[-1]
    grid = torch.arange(ranks).reshape(sizes)
    return [grid.movedim(axis, -1).reshape(-1, size).tolist() for axis, size in enumerate(sizes)]


def _gloo_groups() -> list[Any]:
    """This rank's group of every stage."""
    return [
        next(group for members, group in made if dist.get_rank() in members)
        for made in (
            [(ranks, dist.new_group(ranks, backend="gloo")) for ranks in stage]
            for stage in stages_of(dist.get_world_size()) or [[[0]]]
        )
    ]


class _Requests:
    """The requests to this process."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.ranks_have_met = False
        self.finished = False
        self._received_at = 0.0

    def handle(self, number: int, frame: object) -> None:
        """The signal handler; it may run long after the thread has seen the same signal."""
        if self.received is None:
            self._note(number)

    def listen(self, pipe: socket.socket) -> None:
        """The thread: read signal numbers until the other end of the pipe closes."""
        while data := pipe.recv(1):
            if data[0] in SIGNALS:
                self._note(data[0])
        pipe.close()

    def _note(self, number: int) -> None:
        now = time.monotonic()
        if self.finished:
            return
        if self.received is None:
            self.received, self._received_at = number, now
            if not self.ranks_have_met:
                _exit(exits.STOPPED, f"{signal.Signals(number).name} before the ranks have met; nothing to save")
        elif now - self._received_at >= _SAME_REQUEST_SECONDS:
            name = signal.Signals(number).name
            _exit(exits.of_signal(number), f"{name}, the second signal: exiting at once; what is saved stays as it is")


def _exit(code: int, message: str) -> None:
    sys.stderr.write(f"[rank {os.environ.get('RANK', '0')}] {message}\n")
    sys.stderr.flush()
    os._exit(code)
