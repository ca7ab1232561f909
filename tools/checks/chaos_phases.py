"""The parts of a run as moments to die at: what `chaos.py` starts on every rank.

It runs the real `megatron_solopo train`; functions of it are watched, and on the rank and at the moment chosen a thread
sends SIGKILL to the process from within.
"""

import functools
import importlib
import json
import os
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# phase -> the functions that it consists of, as module:name.
PHASES = {
    "reference": ("megatron_solopo.train.reference:score_sequences",),
    "data": ("megatron_solopo.data.loader:GlobalBatchLoader.next_batch",),
    "forward": ("megatron_solopo.model.head:ResponseModel.forward",),
    "backward": ("megatron.core.pipeline_parallel.schedules:backward_step",),
    "optimizer": (
        "megatron.core.optimizer.optimizer:MixedPrecisionOptimizer.step",
        "megatron.core.optimizer.optimizer:FP32Optimizer.step",
        "megatron.core.optimizer.optimizer:ChainedOptimizer.step",
    ),
    "save": ("megatron_solopo.train.saving:Saver.save",),
    "latest": ("megatron_solopo.checkpoint.save:publish",),
}
PER_STEP = ("forward", "backward", "optimizer")
WRITTEN_BY_RANK_0 = "latest"
BEFORE_THE_STEPS = "reference"


@dataclass(frozen=True)
class Moment:
    """When which rank dies."""

    phase: str
    rank: int
    occurrence: int
    """The phase of this step since the start, this save, or the reference pass of this split: from 1."""
    fraction: float
    """Where in the phase, of its usual duration; in [0, 1)."""


class Watch:
    """Counts and times the phases of this process, and ends it at its moment."""

    def __init__(
        self, moment: Moment | None, usual_seconds: dict[str, float], record: Callable[[dict[str, Any]], None]
    ) -> None:
        self._moment, self._usual, self._record = moment, usual_seconds, record
        self._occurrence = dict.fromkeys(PHASES, 0)
        self._within: set[str] = set()
        self._seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}

    @contextmanager
    def inside(self, phase: str) -> Iterator[None]:
        """The body is `phase`; what it calls of the same phase is part of it."""
        if phase in self._within:
            yield
            return
        self._within.add(phase)
        started = time.monotonic()
        doomed = self._reaches(phase)
        try:
            yield
        finally:
            if doomed:
                threading.Event().wait()  # it was shorter this time: the moment is its end
            self._within.remove(phase)
            self._seconds[phase].append(time.monotonic() - started)

    def usual_seconds(self) -> dict[str, float]:
        """The median duration of each phase that this process has been through."""
        return {phase: statistics.median(each) for phase, each in self._seconds.items() if each}

    def _reaches(self, phase: str) -> bool:
        """Count the phase, and let the process die in it if this is the moment."""
        before = self._occurrence[phase]
        # One per step, however many packs it has; the passes before the first step (the reference's) are number 0.
        self._occurrence[phase] = self._occurrence["data"] if phase in PER_STEP else before + 1
        moment = self._moment
        if moment is None or phase != moment.phase or not before < self._occurrence[phase] == moment.occurrence:
            return False
        self._kill_after(moment.fraction * self._usual[phase], moment)
        return True

    def _kill_after(self, seconds: float, moment: Moment) -> None:
        def kill() -> None:
            time.sleep(seconds)
            self._record(asdict(moment) | {"seconds_into_it": seconds})
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=kill, daemon=True).start()


def run_rank(arguments: Sequence[str], moments: Sequence[Moment], usual: dict[str, float], folder: Path) -> None:
    """`megatron-solopo train` on this rank, which the elastic agent has started for the n-th time: moment n is its end.

    Appends to `folder/kills.jsonl` before it kills; writes `folder/phases-<rank>.json` where it came to the end.
    """
    from megatron_solopo.cli.main import main

    rank, life = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    chosen = moments[life] if life < len(moments) and moments[life].rank == rank else None

    def record(kill: dict[str, Any]) -> None:
        with (folder / "kills.jsonl").open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"life": life} | kill) + "\n")

    watch = Watch(chosen, usual, record)
    _install(watch)
    main(["train", *arguments])
    (folder / f"phases-{rank}.json").write_text(json.dumps(watch.usual_seconds()), encoding="utf-8")


def _install(watch: Watch) -> None:
    from megatron_solopo.train import scoring

    # A pass of these runs takes less time than a real one waits before it keeps numbers.
    scoring._SECONDS_BETWEEN_READINGS = 0.0
    for phase, names in PHASES.items():
        for name in names:
            module, _, attribute = name.partition(":")
            *owners, last = attribute.split(".")
            owner = functools.reduce(getattr, owners, importlib.import_module(module))
            setattr(owner, last, _watched(watch, phase, getattr(owner, last)))


def _watched(watch: Watch, phase: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        with watch.inside(phase):
            return function(*arguments, **options)

    return call
