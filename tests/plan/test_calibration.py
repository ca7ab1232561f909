"""A benchmark's measurements replace the assumptions, and stand beside the estimates."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from megatron_solopo.architecture.gpus import GPUS, Efficiency
from megatron_solopo.errors import UserError
from megatron_solopo.plan.calibration import calibrate_efficiency, read_measurements
from tests.plan.models import PLANS, ROOT, load_example

DEVICE = "NVIDIA H100 80GB HBM3, 580.1, 81559 MiB"


def benchmark(path: Path, lengths: tuple[int, ...], truth: Efficiency, device: str = DEVICE) -> Path:
    """A file as tools/benchmarks/benchmark.py writes it, on a GPU that is exactly as `truth` says."""
    config, _ = load_example("llama-3.1-8b", "optimizer.use_distributed_optimizer=false")
    rows: list[dict[str, Any]] = [
        {"system": system, "long_tokens": length, "variant": "", "status": "ok", "median_seconds": 1.0}
        | {"allocated_bytes": 10**9}
        for length in lengths
        for system in ("solopo", "long_po")
    ]
    rows.append({"system": "trl", "long_tokens": 8192, "variant": "", "status": "ok", "median_seconds": 1.0})
    rows.append({"system": "solopo", "long_tokens": 999_424, "variant": "", "status": "out of memory"})
    content = {
        "device": device,
        "architecture": json.loads((ROOT / config.model.path / "config.json").read_text()),
        "configs": {"as given": config.model_dump(mode="json")},
        "sizes": {"short_tokens": 1024, "response_tokens": 512, "triplets": 2},
        "measurements": rows,
    }
    path.write_text(json.dumps(content))
    for row, each in zip(rows, read_measurements(path, GPUS["h100"], truth), strict=False):
        row["median_seconds"] = each.estimate.time.seconds
    path.write_text(json.dumps(content))
    return path


def test_efficiencies_are_recovered_from_times(tmp_path: Path) -> None:
    truth = Efficiency(gemm=0.65 / 1.3, head=0.4 / 1.3, memory=0.75 / 1.3, attention=0.5 / 1.6)
    path = benchmark(tmp_path / "b.json", (8192, 32768, 131072), truth)
    found = calibrate_efficiency(path, GPUS["h100"])
    assert found.gemm == pytest.approx(truth.gemm, rel=0.02)
    assert found.attention == pytest.approx(truth.attention, rel=0.02)
    assert "b.json" in found.source and "H100" in found.source
    rows = read_measurements(path, efficiency=found)
    assert len(rows) == 6 and all(abs(row.error) < 0.02 for row in rows)
    assert {row.system for row in rows} == {"solopo", "long_po"}


def test_one_length_gives_one_factor(tmp_path: Path) -> None:
    truth = Efficiency(gemm=0.325, head=0.2, memory=0.375, attention=0.25)
    found = calibrate_efficiency(benchmark(tmp_path / "b.json", (32768,), truth), GPUS["h100"])
    assert found.gemm == pytest.approx(0.325, rel=0.01) and found.attention == pytest.approx(0.25, rel=0.01)


@pytest.mark.parametrize("text", ["{}", "[", '{"device": "x", "measurements": []}'])
def test_another_file_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "b.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"not a result of tools\.benchmarks\.benchmark") as error:
        calibrate_efficiency(path, GPUS["h100"])
    assert "\n" not in str(error.value)


def test_a_cpus_figures_calibrate_nothing(tmp_path: Path) -> None:
    path = benchmark(tmp_path / "b.json", (8192,), Efficiency(), device="cpu")
    with pytest.raises(UserError, match="no measurement of solopo or long_po on a GPU"):
        calibrate_efficiency(path, GPUS["h100"])
    with pytest.raises(UserError, match="no such file"):
        calibrate_efficiency(tmp_path / "none.json", GPUS["h100"])


def test_another_types_figures_and_impossible_ones_are_refused(tmp_path: Path) -> None:
    path = benchmark(tmp_path / "b.json", (8192,), Efficiency())
    with pytest.raises(UserError, match=r"b\.json: measured on NVIDIA H100 .*, which is no B200"):
        calibrate_efficiency(path, GPUS["b200"])
    content = json.loads(path.read_text())
    for row in content["measurements"]:
        row["median_seconds"] = row.get("median_seconds", 1.0) / 3
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"computes 1\.95 times as fast as H100's data sheet allows"):
        calibrate_efficiency(path, GPUS["h100"])


def test_the_documents_show_every_measured_figure_beside_its_estimate() -> None:
    """Rows of the table in examples/plans/README.md: file, system, length, measured s, estimated s, error."""
    text = (PLANS / "README.md").read_text(encoding="utf-8")
    shown = {tuple(re.split(r"\s*\|\s*", line.strip("| "))[:3]) for line in text.splitlines() if ".json |" in line}
    expected = set()
    for path in sorted([*ROOT.glob("tools/**/*benchmark*.json"), *ROOT.glob("examples/**/*benchmark*.json")]):
        for row in read_measurements(path):
            expected.add((path.name, row.system, f"{row.long_tokens:,}"))
            cells = f"| {path.name} | {row.system} | {row.long_tokens:,} | {row.seconds:.3f} | "
            cells += f"{row.estimate.time.seconds:.3f} | {row.error:+.0%} |"
            print(cells)
            assert cells in text
    assert shown == expected
    assert expected or "No figure of a GPU has been measured yet" in text
