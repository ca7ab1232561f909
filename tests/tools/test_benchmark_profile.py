"""What the benchmark reads from a trace."""

import gzip
import json
from typing import Any

import pytest
import torch


def event(category: str, name: str, start: float, duration: float) -> dict[str, Any]:
    return {"cat": category, "name": name, "ts": start, "dur": duration, "ph": "X"}


TRACE = [
    {"ph": "M", "name": "process_name"},
    event("kernel", "before the step", 0, 100),
    event("user_annotation", "benchmark step", 1000, 1000),
    event("cpu_op", "aten::mm", 1000, 900),
    event("kernel", "gemm", 1100, 200),
    event("kernel", "gemm", 1250, 150),  # overlaps the first by 50
    event("gpu_memcpy", "copy", 1500, 100),
    event("kernel", "attention", 1950, 150),  # 50 of it within the step
    event("gpu_user_annotation", "benchmark step", 1100, 1000),
]


def test_busy_time_is_the_union_of_what_ran_within_the_step() -> None:
    from tools.benchmarks.bench_profile import summarize

    summary = summarize(TRACE)
    assert summary["wall_ms"] == 1.0
    assert summary["gpu_busy"] == pytest.approx(0.3 + 0.1 + 0.05)
    assert summary["gpu_idle"] == pytest.approx(0.55)
    assert summary["kernel_launches"] == 4
    top = [(each["name"], each["count"], each["ms"], each["share_of_step"]) for each in summary["top_kernels"]]
    assert top == [("gemm", 2, 0.35, 0.35), ("copy", 1, 0.1, 0.1), ("attention", 1, 0.05, 0.05)]


def test_a_trace_without_a_gpu_has_no_shares() -> None:
    from tools.benchmarks.bench_profile import summarize

    summary = summarize([each for each in TRACE if each.get("cat") in ("user_annotation", "cpu_op")])
    assert summary["gpu_busy"] is summary["gpu_idle"] is None
    assert summary["top_kernels"] == []


def test_a_profiled_step_is_found_in_its_own_trace(tmp_path) -> None:
    from tools.benchmarks.bench_profile import StepProfiler

    profiler = StepProfiler(tmp_path / "new" / "step.json.gz")
    profiler.start()
    torch.ones(64, 64) @ torch.ones(64, 64)
    summary = profiler.stop()
    with gzip.open(tmp_path / "new" / "step.json.gz", "rt") as stream:
        assert any(each.get("name") == "aten::mm" for each in json.load(stream)["traceEvents"])
    assert json.loads((tmp_path / "new" / "step.summary.json").read_text()) == summary
