"""One step under torch's profiler: a Chrome trace, and what it says of the GPU."""

import gzip
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_solopo.files import write_json
from tools.benchmarks.bench_case import synchronize

_STEP = "benchmark step"
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
_TOP = 15


class StepProfiler:
    """Profiles what runs between `start` and `stop`."""

    def __init__(self, path: Path) -> None:
        self.path = path
        activities = [torch.profiler.ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(torch.profiler.ProfilerActivity.CUDA)
        self._profiler = torch.profiler.profile(activities=activities)
        self._region = torch.profiler.record_function(_STEP)

    def start(self) -> None:
        synchronize()
        self._profiler.start()
        self._region.__enter__()  # type: ignore[no-untyped-call]

    def stop(self) -> dict[str, Any]:
        """Write the trace and, beside it, its summary, which is returned."""
        synchronize()
        self._region.__exit__(None, None, None)
        self._profiler.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._profiler.export_chrome_trace(str(self.path))
        with gzip.open(self.path, "rt", encoding="utf-8") as stream:
            summary = {"trace": self.path.name} | summarize(json.load(stream)["traceEvents"])
        write_json(self.path.with_name(self.path.name.removesuffix(".json.gz") + ".summary.json"), summary)
        return summary


def summarize(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The GPU's busy and idle share of the step, and the kernels that took most of it.

    Busy is the union of kernels, copies and fills: what overlaps counts once. Shares of single kernels are of the
    step's wall time too, and may add up to more than the busy share where streams overlap. Without a GPU's
    events the shares are None.
    """
    step = next(event for event in events if event.get("name") == _STEP and event.get("cat") == "user_annotation")
    start, wall = step["ts"], step["dur"]
    intervals: list[tuple[float, float]] = []
    times: defaultdict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") in _ON_GPU:
            begin = max(event["ts"], start)
            end = min(event["ts"] + event["dur"], start + wall)
            if end > begin:
                intervals.append((begin, end))
                times[event["name"]].append(end - begin)
    ranked = sorted(times.items(), key=lambda item: -sum(item[1]))
    busy = union_length(intervals) / wall if intervals else None
    return {
        "wall_ms": wall / 1e3,
        "gpu_busy": busy,
        "gpu_idle": None if busy is None else 1 - busy,
        "kernel_launches": len(intervals),
        "top_kernels": [
            {"name": name, "count": len(each), "ms": sum(each) / 1e3, "share_of_step": sum(each) / wall}
            for name, each in ranked[:_TOP]
        ],
    }


def union_length(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of what is covered by at least one interval."""
    total, covered_to = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, covered_to))
        covered_to = max(covered_to, end)
    return total
