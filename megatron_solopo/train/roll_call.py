"""Where every rank stands, told through the store that the ranks met in: who is missing when a run hangs.

Each rank posts its place and a pulse from a thread of its own, also while its main thread sits in a collective. No
collective is used, so it works when none does. The first rank that gives up reads all places twice, more than two
pulses apart, and publishes what it found; the others read that.

    silent    its pulse has stopped: the process is dead or stopped, or its host is down or cut off
    behind    its pulse goes on, but it has passed fewer places than others: its phase says what keeps it
    all alike a collective does not end although all have come: the network, or a GPU
"""

import json
import socket
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

_PULSES_BETWEEN_READINGS = 2.5
_PATIENCE_PULSES = 6


@dataclass(frozen=True)
class Place:
    """The last place of the program that a rank has come to."""

    count: int
    """Places so far; all ranks come to the same places in the same order."""
    step: int
    phase: str
    host: str = ""
    pulse: int = 0
    left: bool = False
    """Gave up and ended by itself; its silence is no news."""


class RollCall:
    """This rank's part of it.

    Args:
        store: the store of the process group, not used by another thread (`Store.clone`).
        hosts: of every rank.
        pulse_seconds: between two posts.
    """

    def __init__(self, store: Any, rank: int, hosts: Sequence[str], pulse_seconds: float) -> None:
        self._store, self._rank, self._hosts, self._pulse_seconds = store, rank, hosts, pulse_seconds
        self.place = Place(0, 0, "starting", socket.gethostname())
        self._left = False
        self._moved = threading.Event()
        self._lock = threading.Lock()  # a store serves one thread at a time
        self._poster: threading.Thread | None = None

    def start(self) -> None:
        """Post until `leave`."""
        self._poster = threading.Thread(target=self._post_forever, name="roll call", daemon=True)
        self._poster.start()

    def at(self, count: int, step: int, phase: str) -> None:
        """This rank has come to a place."""
        self.place = replace(self.place, count=count, step=step, phase=phase)
        self._moved.set()

    def leave(self) -> None:
        """The last post; from here on this rank's silence means nothing. Waits until the posting thread has ended.

        A store that does not answer keeps its threads: they are waited for within a few pulses, no longer.
        """
        until = time.monotonic() + self._patience_seconds
        self._left = True
        self._moved.set()
        self._within(self._post)
        if self._poster is not None:
            self._poster.join(max(0.0, until - time.monotonic()))

    def missing(self) -> str:
        """One line of who did not arrive, within a few pulses whatever the network does."""
        found: str | None = self._within(self._common_verdict)
        if found is not None:
            return found
        mine = self._hosts[self._rank]
        elsewhere = [rank for rank, host in enumerate(self._hosts) if host != mine]
        others = f"; ranks on other hosts: {self._named(elsewhere)}" if elsewhere else ""
        return f"the store that the ranks met in does not answer: {mine} is cut off from it, or it is gone{others}"

    def _within(self, action: Any) -> Any:
        """The result of `action()`, or None if it fails or takes too long: a store behind a cut link never answers."""
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
            # It holds the lock meanwhile, so that it must post itself: who waits here is not silent.
            while not self._store.check(["verdict"]):
                self._post()
                time.sleep(self._pulse_seconds / 2)
        return str(self._store.get("verdict").decode())

    def _places(self) -> list[Place | None]:
        """Of every rank, None where it has not posted yet."""
        keys = [f"place/{rank}" for rank in range(len(self._hosts))]
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
        return ", ".join(f"{self._named([rank])} {_described(places[rank])}" for rank in ranks)

    def _named(self, ranks: Sequence[int]) -> str:
        """ "ranks 4-7 (node2), rank 9 (node3)"."""
        named = []
        for host, of_host in groupby(ranks, key=lambda rank: self._hosts[rank]):
            for span in _spans(list(of_host)):
                named.append(f"{'rank' if span.isdigit() else 'ranks'} {span} ({host})")
        return ", ".join(named)


def _described(place: Place | None) -> str:
    return "never began" if place is None else f"last at step {place.step}, {place.phase}"


def _spans(ranks: Sequence[int]) -> list[str]:
    """ "4-7", "9"."""
    runs = [list(run) for _, run in groupby(enumerate(ranks), key=lambda each: each[1] - each[0])]
    return [str(run[0][1]) if len(run) == 1 else f"{run[0][1]}-{run[-1][1]}" for run in runs]
