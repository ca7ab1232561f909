"""The script of GPU checks, at the toy size it takes where there is no GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "tools" / "checks" / "gpu_checks.sh"


def run(output: Path, *parts: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": python, "MEGATRON_SOLOPO_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([SCRIPT, output, *parts], env=environment, capture_output=True, text=True, timeout=280)


def test_a_part_leaves_its_measurements_and_a_picture(tmp_path: Path) -> None:
    done = run(tmp_path, "mfu")
    assert done.returncode == 0 and "mfu: " in done.stdout, done.stdout + done.stderr
    result = json.loads((tmp_path / "mfu.json").read_text())
    assert {row["system"] for row in result["measurements"]} == {"solopo", "long_po"}
    assert all(row["status"] == "ok" and len(row["seconds"]) == 3 for row in result["measurements"])
    assert (tmp_path / "mfu.png").stat().st_size > 10_000
    assert list((tmp_path / "profile").glob("*.summary.json"))


def test_a_part_that_fails_does_not_stop_the_next_and_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, "128k", "mfu", python="/bin/false")
    assert done.returncode == 1
    assert [line.split()[1] for line in done.stderr.splitlines()] == ["128k", "mfu"], done.stderr


def test_an_unknown_part_is_refused_with_the_legal_ones(tmp_path: Path) -> None:
    done = run(tmp_path, "speed")
    assert done.returncode == 2 and "unknown part speed: tests acceptance trl mfu fp8 128k" in done.stderr
