"""The benchmark of experts at toy sizes: as much work for each token, and memory that `plan` knows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HIDDEN, LAYERS, EXPERTS, TOPK, COLUMNS = 128, 2, 8, 2, 64
SIZES = {"hidden-size": HIDDEN, "layers": LAYERS, "experts": EXPERTS, "topk": TOPK, "expert-columns": COLUMNS}


def test_experts_compute_as_much_as_the_dense_model_and_hold_what_plan_says(tmp_path: Path) -> None:
    arguments = [f"--{name}={size}" for name, size in SIZES.items()]
    arguments += ["--pair", "64", "256", "--response-tokens=16", "--repeats=2", "--json", str(tmp_path / "found.json")]
    command = [sys.executable, "-m", "tools.benchmarks.experts_benchmark", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "solopo / long_po" in done.stdout and "plan / measured" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    times, memory = found["times"], found["memory"]

    active, routers = times["active_parameters"], LAYERS * EXPERTS * HIDDEN
    assert active["experts"] == active["dense"] + routers
    idle = LAYERS * (EXPERTS - TOPK) * 3 * HIDDEN * COLUMNS
    assert times["parameters"]["experts"] == active["experts"] + idle
    assert times["load_max_over_mean"] > 1
    for objective in ("solopo", "long_po"):
        assert 1 < times["flops"]["experts"][objective] / times["flops"]["dense"][objective] < 1.02
        median, least, most = times["experts_over_dense"][objective]
        assert 0 < least <= median <= most
    # One long and two short sequences, against two long ones.
    assert all(0.5 < ratio < 1 for ratio in times["flops_solopo_over_long_po"].values())

    for part in ("parameters", "gradients", "optimizer"):
        assert memory["planned"][part] == memory["measured"][part] > 1e6
    kept = "kept for backward"
    assert memory["planned"][kept] == pytest.approx(memory["measured"][kept], rel=0.1)
