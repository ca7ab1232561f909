"""Signals that ask a run to stop, and the one decision that all ranks take about them.

SIGTERM, SIGUSR1 or SIGINT on any rank is a request. At boundaries all ranks learn of it in one all-reduce of a
single number, so that all of them stop at the same place: `StopSignals.check` raises `Stopped` on every rank.

    boundary                   where                                     lost by stopping there
    micro-batch                training, without pipeline stages         the gradients of the step that had begun
    step                       training with pipeline stages, where      nothing
                               micro-batches are in flight on all stages
    batch                      evaluation, reference pass                what the pass has computed

What the ranks begin to agree on at one micro-batch, they act on at the next (`check_meanwhile`): none waits there, but
for those that have not come to the one before.
The wait is thus at most two micro-batches (one step with PP > 1) and the save. A second signal, 2 seconds or more after
the first, exits at once with 128 + its number; a save that was being written stays under its temporary name.

Launchers deliver one request twice (to the group, then to each rank), hence the 2 seconds. Handlers of Python run
between two bytecodes of the main thread, which may sit in a collective for long: a thread therefore reads the
signal's number too, from the pipe that the interpreter writes it to in the very moment.

The thread holds the numbers alone, and the block's end joins it. The main thread alone holds the group and the
all-reduce: another thread that frees them while the interpreter ends would abort the process.

Cost: one all-reduce of 8 bytes between hosts (gloo) per boundary, no synchronization with the GPU, and within a step
none of the hosts but to within a micro-batch of each other.
"""

import ctypes
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any, Self

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_solopo import exits

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
_SAME_REQUEST_SECONDS = 2.0


class Stopped(Exception):
    """Raised on all ranks together, at a boundary, with one line of why."""


class StopSignals:
    """Listens for requests to stop, from `with StopSignals() as signals:` to the block's end; in the main thread only.

    Until `join`, that is before there are other ranks to agree with, a signal ends the process at once with code 85.
    """

    def __init__(self) -> None:
        self._requests = _Requests()
        self._group: Any = None
        self._agreeing: tuple[torch.Tensor, dist.Work] | None = None

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
        """Let the ranks of the world agree from here on; called by all of them together."""
        backend = dist.get_backend()
        # Between hosts: the decision must not make one wait for its GPU.
        self._group = dist.group.WORLD if backend == "gloo" else dist.new_group(backend="gloo")
        self._requests.ranks_have_met = True

    def check(self) -> None:
        """A boundary: raises Stopped on every rank if any rank was asked to stop. Called by all ranks together."""
        self.check_meanwhile()
        self._conclude()

    def check_meanwhile(self) -> None:
        """`check` for requests up to the last boundary alone; the ranks agree on later ones while they work."""
        assert self._group is not None, "join comes first"
        self._conclude()
        # The greatest request wins: who, and which signal.
        received = self._requests.received
        mine = 0 if received is None else (dist.get_rank() + 1) * 256 + received
        request = torch.tensor(mine, dtype=torch.int64, device="cpu")
        self._agreeing = request, dist.all_reduce(request, dist.ReduceOp.MAX, group=self._group, async_op=True)

    def _conclude(self) -> None:
        if self._agreeing is None:
            return
        (request, work), self._agreeing = self._agreeing, None
        work.wait()
        if request > 0:
            rank, number = divmod(int(request), 256)
            raise Stopped(f"{signal.Signals(number).name} on rank {rank - 1}")

    def conclude(self) -> None:
        """The work is done: wait for the last agreement, and ignore what it asks. Called by all ranks together."""
        with suppress(Stopped):
            self._conclude()

    def leave(self) -> None:
        """Let go of the group, before it is destroyed; called by each rank alone.

        After a failure another rank may never join the last agreement. torch waits for it before it frees the group,
        in the worst case until the group's timeout. The group then stays until the process has ended.
        """
        if self._agreeing is not None and not self._agreeing[1].is_completed():
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._group))
        self._agreeing = self._group = None

    def finish(self, stopped: Stopped) -> None:
        """All is saved: say so, and let signals change nothing from here on. Called by all ranks together.

        A launcher signals the other ranks as soon as one has exited.
        """
        self._requests.finished = True
        if dist.get_rank() == 0:
            tqdm.write(f"stopped by {stopped}; the same command continues from what is saved")
        dist.barrier(group=self._group)


class _Requests:
    """What this process was asked; all that the thread holds."""

    def __init__(self) -> None:
        self.received: int | None = None
        self.ranks_have_met = False
        self.finished = False
        self._received_at = 0.0

    def handle(self, number: int, frame: object) -> None:
        """May run long after the thread has seen the same signal: it can be the first request, never the second."""
        if self.received is None:
            self._note(number)

    def listen(self, pipe: socket.socket) -> None:
        """The thread: read numbers until the pipe's other end closes."""
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
