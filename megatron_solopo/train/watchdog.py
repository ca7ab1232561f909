"""Ends a run that hangs: writes the stacks of every rank, names the ranks that did not arrive, exits with code 86.

The main thread reports each phase that it enters, and a second thread measures the time since then. Beyond the limit,
this thread writes the Python stacks of all threads to `<run_dir>/hangs/rank-NNNN.txt` and to standard error. It then
asks `RollCall` which ranks are missing, and ends the process. It needs neither the main thread nor a collective. If a
library holds the interpreter's lock, no thread runs. Then faulthandler's own timer writes the stacks a minute later and
exits with code 1.

    limit                            for
    watchdog.start_timeout_minutes   the first phase of each kind: loading, first step, first evaluation
    watchdog.timeout_minutes         later phases: one micro-batch of a step, an evaluation or a reference pass
    watchdog.save_timeout_minutes    a save

`parallel.distributed_timeout_minutes` is a longer timeout, that of the process groups. It ends a collective with a
traceback (gloo) or an abort (NCCL), and names no rank.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import groupby
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from megatron_solopo import exits
from megatron_solopo.config import WatchdogConfig

SAVE = "save"
"""The phase in which a run is saved."""
_PULSES_BETWEEN_READINGS = 2.5
_PATIENCE_PULSES = 6
_LARGEST_PULSE_SECONDS = 5.0
_LOCK_HELD_SECONDS = 60.0
_FILE_SECONDS = 10.0


@dataclass(frozen=True)
class Place:
    """Where a rank is: the last phase that it entered."""

    count: int
    """Phases entered so far; all ranks enter the same phases in the same order."""
    step: int
    phase: str
    host: str = ""
    pulse: int = 0
    left: bool = False
    """The rank ended by itself, so its silence means nothing."""


class RollCall:
    """Finds out which ranks are missing when a run hangs, through the store that the ranks met in.

    Each rank posts its place and a pulse from a thread of its own, also while its main thread waits in a collective. It
    uses no collective, so it works when none does. The first rank that gives up reads all places twice, more than two
    pulses apart, and publishes what it found. The other ranks read that.

        silent     its pulse has stopped: the process is dead or stopped, or its host is down or cut off
        behind     its pulse goes on, but it has entered fewer phases than others
        all alike  a collective does not end although all ranks have entered it: the network, or a GPU

    No rank keeps a list of the others, which would be read by every rank and grow with their number.

    Args:
        store: the store of the process group, as a clone that no other thread uses.
        ranks: number of ranks.
        neighbours: the ranks of this host, if they are known.
        pulse_seconds: the time between two posts.
    """

    def __init__(
        self, store: Any, rank: int, ranks: int, pulse_seconds: float, *, host: str, neighbours: Sequence[int]
    ) -> None:
        self._store, self._rank, self._ranks, self._pulse_seconds = store, rank, ranks, pulse_seconds
        self._neighbours = neighbours
        self.place = Place(0, 0, "starting", host)
        self._left = False
        self._moved = threading.Event()
        self._lock = threading.Lock()  # a store serves one thread at a time
        self._poster: threading.Thread | None = None

    def start(self) -> None:
        """Post now, and until `leave`."""
        self._moved.set()
        self._poster = threading.Thread(target=self._post_forever, name="roll call", daemon=True)
        self._poster.start()

    def at(self, count: int, step: int, phase: str) -> None:
        """This rank has entered a phase."""
        self.place = replace(self.place, count=count, step=step, phase=phase)
        self._moved.set()

    def leave(self) -> None:
        """Post for the last time, and wait until the posting thread has ended.

        If the store does not answer, the thread does not end either. It is waited for a few pulses and no longer.
        """
        until = time.monotonic() + self._patience_seconds
        self._left = True
        self._moved.set()
        self._try_for_a_while(self._post)
        if self._poster is not None:
            self._poster.join(max(0.0, until - time.monotonic()))

    def missing(self) -> str:
        """One line that names the missing ranks. It takes a few pulses, whatever the network does."""
        found: str | None = self._try_for_a_while(self._common_verdict)
        if found is not None:
            return found
        elsewhere = [rank for rank in range(self._ranks) if rank not in self._neighbours]
        others = f"; ranks on other hosts: {_listed(elsewhere)}" if elsewhere else ""
        return (
            f"the store that the ranks met in does not answer: {self.place.host} is cut off from it, or it is gone"
            f"{others}"
        )

    def _try_for_a_while(self, action: Any) -> Any:
        """The result of `action()`, or None if it fails or takes too long, as a store behind a cut link does."""
        result: list[Any] = []

        def attempt() -> None:
            try:
                with self._lock:
                    result.append(action())
            except RuntimeError:
                pass  # torch's error for a store that is gone or does not answer

        thread = threading.Thread(target=attempt, name="roll call", daemon=True)
        thread.start()
        thread.join(self._patience_seconds)
        return result[0] if result else None

    @property
    def _patience_seconds(self) -> float:
        return _PATIENCE_PULSES * self._pulse_seconds

    def _post_forever(self) -> None:
        while True:
            self._moved.wait(self._pulse_seconds)
            self._moved.clear()
            if self._left:
                return
            try:
                with self._lock:
                    self._post()
            except RuntimeError:
                return

    def _post(self) -> None:
        self.place = replace(self.place, pulse=self.place.pulse + 1, left=self._left)
        self._store.set(f"place/{self._rank}", json.dumps(asdict(self.place)))

    def _common_verdict(self) -> str:
        self._post()
        if self._store.add("verdict/asked", 1) == 1:
            before = self._places()
            time.sleep(_PULSES_BETWEEN_READINGS * self._pulse_seconds)
            self._post()
            self._store.set("verdict", self._verdict(before, self._places()))
        else:
            # This thread holds the lock, so it must post for the posting thread, or this rank would look silent.
            while not self._store.check(["verdict"]):
                self._post()
                time.sleep(self._pulse_seconds / 2)
        return str(self._store.get("verdict").decode())

    def _places(self) -> list[Place | None]:
        """The place of every rank, None if it has not posted yet."""
        keys = [f"place/{rank}" for rank in range(self._ranks)]
        return [Place(**json.loads(self._store.get(key))) if self._store.check([key]) else None for key in keys]

    def _verdict(self, before: Sequence[Place | None], after: Sequence[Place | None]) -> str:
        furthest = max(place.count for place in after if place)
        silent, behind = [], []
        for rank, (first, last) in enumerate(zip(before, after, strict=True)):
            if last is None or (first is not None and first.pulse == last.pulse and not last.left):
                silent.append(rank)
            elif last.count < furthest:
                behind.append(rank)
        told = [f"silent (dead, stopped or cut off): {self._where(silent, after)}"] if silent else []
        told += [f"alive but behind: {self._where(behind, after)}"] if behind else []
        return "; ".join(told) or (
            "all ranks are alive and at the same place, in a collective that does not end: look at the network and the "
            "GPUs (NCCL_DEBUG=INFO)"
        )

    def _where(self, ranks: Iterable[int], places: Sequence[Place | None]) -> str:
        return ", ".join(f"{_listed([rank])} {_described(places[rank])}" for rank in ranks)


def _listed(ranks: Sequence[int]) -> str:
    """As in "ranks 4-7, rank 9"."""
    return ", ".join(f"{'rank' if span.isdigit() else 'ranks'} {span}" for span in _spans(ranks))


def _described(place: Place | None) -> str:
    return "never began" if place is None else f"({place.host}) last at step {place.step}, {place.phase}"


def _spans(ranks: Sequence[int]) -> list[str]:
    """As in ["4-7", "9"]."""
    runs = [list(run) for _, run in groupby(enumerate(ranks), key=lambda each: each[1] - each[0])]
    return [str(run[0][1]) if len(run) == 1 else f"{run[0][1]}-{run[-1][1]}" for run in runs]


class Watchdog:
    """Watches this rank until the end of the block `with watching(...) as watchdog:`."""

    def __init__(self, config: WatchdogConfig, run_dir: Path, rank: int, roll_call: RollCall | None) -> None:
        self._config, self._rank, self._roll_call = config, rank, roll_call
        self._path = run_dir / "hangs" / f"rank-{rank:04d}.txt"
        self._seen: set[str] = set()
        self._count, self._step, self._phase = 0, 0, "starting"
        self._limit = 60 * config.start_timeout_minutes
        self._since = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def arrive(self, phase: str, step: int) -> None:
        """The main thread has entered a phase. All ranks enter the same phases in the same order."""
        minutes = self._config.timeout_minutes if phase in self._seen else self._config.start_timeout_minutes
        self._seen.add(self._phase)
        self._limit = 60 * (self._config.save_timeout_minutes if phase == SAVE else minutes)
        self._count, self._step, self._phase = self._count + 1, step, phase
        if self._roll_call is not None:
            self._roll_call.at(self._count, step, phase)
        self.progress()

    def progress(self) -> None:
        """The main thread makes progress within its phase: measure the time from now on."""
        self._since = time.monotonic()

    def wait_for_own_save(self) -> None:
        """The main thread waits for this rank's own files; it has as long as for a save."""
        self._limit = 60 * self._config.save_timeout_minutes
        self.progress()

    def _watch(self) -> None:
        """The thread."""
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
        """Stop watching, and wait until the thread has ended. If it is already giving up, it ends the process."""
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
                # Without torchrun the store lives in this process, and other ranks may still read from it.
                time.sleep(min(10.0, self._limit))
        os._exit(exits.HUNG)

    def _keep(self, text: str, *, stacks: bool) -> None:
        """Append to the file, but wait only a few seconds: a dead file system may be why the run hangs."""

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
    """A watchdog for this rank. All ranks start it together, once the process groups exist."""
    roll_call = _roll_call(config) if dist.get_world_size() > 1 else None
    watchdog = Watchdog(config, run_dir, dist.get_rank(), roll_call)
    try:
        yield watchdog
    finally:
        watchdog.end()


def _roll_call(config: WatchdogConfig) -> RollCall:
    torch_store: Any = dist.distributed_c10d._get_default_store()  # its types lack `clone`
    store = PrefixStore("roll_call", torch_store).clone()  # type: ignore[attr-defined]
    pulse = min(_LARGEST_PULSE_SECONDS, 60 * config.timeout_minutes / 10)
    rank, of_host = dist.get_rank(), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    first = rank - int(os.environ.get("LOCAL_RANK", "0")) if of_host > 1 else rank
    call = RollCall(
        store, rank, dist.get_world_size(), pulse, host=socket.gethostname(), neighbours=range(first, first + of_host)
    )
    call.start()
    return call
