"""Profiles a window of steps on some ranks, into `<run_dir>/profile/steps_10-12_rank_0000/`.

trace.json.gz   torch's profiler: operators with their shapes, kernels, collectives; for Perfetto or chrome://tracing
memory.pickle   on GPUs: what was allocated and freed, with stacks; for https://docs.pytorch.org/memory_viz
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from tqdm import tqdm

from megatron_solopo.config import ProfileConfig
from megatron_solopo.cpu_features import is_cpu
from megatron_solopo.errors import UserError
from megatron_solopo.files import atomic_path
from megatron_solopo.train.callbacks import Callback
from megatron_solopo.train.state import Metrics

TRACE, MEMORY = "trace.json.gz", "memory.pickle"


class StepProfiler(Callback):
    """Profiles the steps of `profile.steps` on this rank, if it is one of `profile.ranks`.

    A profiler that fails is a warning of its rank. It never ends the run.
    """

    def __init__(self, config: ProfileConfig, run_dir: Path, *, max_steps: int) -> None:
        """Raises UserError, on every rank, for steps or ranks that the run does not have."""
        self._steps = _window(config, max_steps)
        self._is_chosen = self._steps is not None and dist.get_rank() in config.ranks
        self._folder = run_dir / "profile"
        self._profiler: Any = None
        self._first = 0

    def on_step_begin(self, step: int) -> None:
        """Start before the first step of the window, or in it if the run continues there."""
        if self._is_chosen and self._profiler is None and step in self._steps:
            self._first = step
            self._try("cannot start", self._start)

    def on_step_end(self, metrics: Metrics) -> None:
        """Write the profile after the last step of the window."""
        if self._profiler is not None and metrics["step"] == self._steps[-1]:
            self._try("was not written", self._finish)

    def close(self) -> None:
        """Give an unfinished profile up."""
        if self._profiler is not None:
            self._warn(f"was not written: the run ended before step {self._steps[-1]} was complete")
            self._try("cannot stop", self._stop)
            _record_memory(on=False)

    def _start(self) -> None:
        activities = [torch.profiler.ProfilerActivity.CPU]
        if not is_cpu():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        _record_memory(on=True)
        self._profiler = torch.profiler.profile(activities=activities, record_shapes=True)
        self._profiler.start()

    def _stop(self) -> Any:
        profiler, self._profiler = self._profiler, None
        profiler.stop()
        return profiler

    def _finish(self) -> None:
        try:
            self._write()
        finally:
            _record_memory(on=False)

    def _write(self) -> None:
        profiler = self._stop()
        name = f"steps_{self._first}-{self._steps[-1]}_rank_{dist.get_rank():04d}"
        with atomic_path(self._folder / name) as folder:
            folder.mkdir()
            profiler.export_chrome_trace(str(folder / TRACE))
            if not is_cpu():
                torch.cuda.memory._dump_snapshot(str(folder / MEMORY))  # type: ignore[no-untyped-call]
        tqdm.write(f"[rank {dist.get_rank()}] profiled: {self._folder / name}")

    def _try(self, problem: str, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._profiler, self._is_chosen = None, False
            self._warn(f"{problem}: {type(error).__name__}: {' '.join(str(error).split())}")

    def _warn(self, problem: str) -> None:
        sys.stderr.write(f"[rank {dist.get_rank()}] warning: the profile of this rank {problem}\n")


def _record_memory(*, on: bool) -> None:
    """Begin or end the history of allocations that a snapshot shows; there is none on a CPU."""
    if not is_cpu():
        torch.cuda.memory._record_memory_history(enabled="all" if on else None)


def _window(config: ProfileConfig, max_steps: int) -> range:
    """The steps to profile, none by default."""
    if config.steps is None:
        return range(0)
    first, last = config.steps
    if last > max_steps:
        raise UserError(f"profile.steps=[{first}, {last}]: the run has {max_steps} steps; set earlier steps")
    if wrong := [rank for rank in config.ranks if rank >= dist.get_world_size()]:
        raise UserError(f"profile.ranks: there is no rank {wrong[0]} among {dist.get_world_size()}; set lower ranks")
    return range(first, last + 1)
