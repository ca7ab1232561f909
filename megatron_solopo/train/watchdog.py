"""Ends a run that hangs: stacks of every rank, the name of who did not arrive, a code that makes a launcher restart.

The main thread says where it is; a thread beside it counts the time since. Beyond the limit of `watchdog.*` it writes
the Python stacks of all threads to `<run_dir>/hangs/rank-NNNN.txt` and to standard error, asks `RollCall` who is
missing, and ends the process with code 86. It needs neither the main thread nor a collective. Should a library hold the
interpreter's lock, so that no thread runs, faulthandler's own timer writes the stacks a minute later and exits with 1.

    limit                            for
    watchdog.start_timeout_minutes   the first of each kind: loading, first step, first evaluation (compiles, connects)
    watchdog.timeout_minutes         afterwards: one micro-batch, one batch of an evaluation or a reference pass
    watchdog.save_timeout_minutes    a save

The process groups' own timeout (`parallel.distributed_timeout_minutes`) is the net below: it ends a collective with a
traceback (gloo) or an abort (NCCL), and names nobody.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_solopo import exits
from megatron_solopo.config import WatchdogConfig
from megatron_solopo.train.roll_call import RollCall

SAVE = "save"
_LARGEST_PULSE_SECONDS = 5.0
_LOCK_HELD_SECONDS = 60.0
_FILE_SECONDS = 10.0


class Watchdog:
    """Watches this rank from `with watching(...) as watchdog:` to the block's end."""

    def __init__(self, config: WatchdogConfig, run_dir: Path, rank: int, roll_call: RollCall | None) -> None:
        self._config, self._rank, self._roll_call = config, rank, roll_call
        self._path = run_dir / "hangs" / f"rank-{rank:04d}.txt"
        self._seen: set[str] = set()
        self._count, self._step, self._phase = 0, 0, "starting"
        self._limit = 60 * config.start_timeout_minutes
        self._since = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Watch until `end`."""
        self._thread.start()

    def arrive(self, phase: str, step: int) -> None:
        """The main thread has come to a place that every rank comes to, in the same order."""
        minutes = self._config.timeout_minutes if phase in self._seen else self._config.start_timeout_minutes
        self._seen.add(self._phase)
        self._limit = 60 * (self._config.save_timeout_minutes if phase == SAVE else minutes)
        self._count, self._step, self._phase = self._count + 1, step, phase
        if self._roll_call is not None:
            self._roll_call.at(self._count, step, phase)
        self.progress()

    def progress(self) -> None:
        """The main thread is getting on, in its own way: the time counts anew."""
        self._since = time.monotonic()

    def wait_for_own_save(self) -> None:
        """The main thread waits for this rank's files alone, which other ranks do not: it has as long as for a save."""
        self._limit = 60 * self._config.save_timeout_minutes
        self.progress()

    def _watch(self) -> None:
        """The thread: look now and then."""
        armed = 0.0
        while not self._ended.wait(min(1.0, self._limit / 10)):
            waited = time.monotonic() - self._since
            if waited > self._limit:
                self._give_up(waited)
            if time.monotonic() - armed > _LOCK_HELD_SECONDS / 4:
                armed = time.monotonic()
                faulthandler.dump_traceback_later(
                    self._limit + _LOCK_HELD_SECONDS, exit=True, file=sys.__stderr__ or sys.stderr
                )

    def end(self) -> None:
        """Stop watching, and wait until the thread has ended. If it is giving up already, it ends the process."""
        self._ended.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        if self._roll_call is not None:
            self._roll_call.leave()

    def _give_up(self, waited: float) -> None:
        where = f"step {self._step}, {self._phase}"
        self._tell(f"rank {self._rank}: no progress for {waited:.0f} s in {where} (limit {self._limit:.0f} s)")
        faulthandler.dump_traceback(sys.__stderr__ or sys.stderr)
        self._keep(f"{datetime.now().isoformat(timespec='seconds')} {where}\n", stacks=True)
        if self._roll_call is not None:
            missing = self._roll_call.missing()
            self._tell(f"rank {self._rank}: {missing}")
            self._keep(f"{missing}\n\n", stacks=False)
            self._roll_call.leave()
            if self._rank == 0:
                # Without torchrun the store lives in this process: the others may still want to read.
                time.sleep(min(10.0, self._limit))
        os._exit(exits.HUNG)

    def _keep(self, text: str, *, stacks: bool) -> None:
        """Write into the file, if that is done soon: a file system that does not answer may be why the run hangs."""

        def write() -> None:
            with suppress(OSError):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                with self._path.open("a", encoding="utf-8") as stream:
                    stream.write(text)
                    stream.flush()
                    if stacks:
                        faulthandler.dump_traceback(stream)

        thread = threading.Thread(target=write, name="watchdog's file", daemon=True)
        thread.start()
        thread.join(_FILE_SECONDS)

    def _tell(self, line: str) -> None:
        sys.stderr.write(f"hung: {line}\n")
        sys.stderr.flush()


@contextmanager
def watching(config: WatchdogConfig, run_dir: Path) -> Iterator[Watchdog]:
    """A watchdog over this rank; begun by all ranks together, once they have met."""
    roll_call = _roll_call(config) if dist.get_world_size() > 1 else None
    watchdog = Watchdog(config, run_dir, dist.get_rank(), roll_call)
    watchdog.start()
    try:
        yield watchdog
    finally:
        watchdog.end()


def _roll_call(config: WatchdogConfig) -> RollCall:
    hosts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hosts, socket.gethostname())
    store = dist.PrefixStore("roll_call", dist.distributed_c10d._get_default_store()).clone()
    pulse = min(_LARGEST_PULSE_SECONDS, 60 * config.timeout_minutes / 10)
    call = RollCall(store, dist.get_rank(), hosts, pulse)
    call.start()
    return call
