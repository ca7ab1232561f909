"""Ranks of a real run die in every phase of a step, and the result is the same."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_solopo.files import read_jsonl
from tests.slurm.runs import write_config
from tools.checks import chaos

pytestmark = pytest.mark.timeout(600)  # under a minute on an idle machine
PHASES = {"reference", "data", "forward", "backward", "optimizer", "save", "latest"}


def test_every_phase_is_drawn_as_often_as_the_others() -> None:
    moments = chaos.draw_moments(50, 2, seed=3)
    counts = Counter(moment.phase for moment in moments)
    assert set(counts) == PHASES and max(counts.values()) - min(counts.values()) <= 1
    passes = moments[: counts["reference"]]
    assert {moment.phase for moment in passes} == {"reference"}
    # Each life continues the pass: so many kills must find something left of it.
    assert [moment.occurrence for moment in passes] == [1] * (len(passes) - 1) + [2]
    assert sum(moment.fraction for moment in passes) < 1
    assert {moment.rank for moment in moments if moment.phase == "latest"} == {0}
    assert {moment.rank for moment in moments if moment.phase != "latest"} == {0, 1}
    assert chaos.draw_moments(50, 2, seed=3) == moments != chaos.draw_moments(50, 2, seed=4)


def test_a_bit_of_difference_is_seen_and_times_are_not(tmp_path: Path) -> None:
    steps = [{"step": 1, "loss": 0.5, "step_time": 1.0}, {"step": 2, "loss": 0.25, "step_time": 1.0}]
    for name in ("undisturbed", "killed"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        steps[1] |= {"step_time": 2.0}
    assert chaos.differences(tmp_path) == []
    steps[1]["loss"] = 0.25000000000000006
    (tmp_path / "killed" / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert chaos.differences(tmp_path) == ["step 2: loss 0.25 undisturbed, 0.25000000000000006 killed"]
    (tmp_path / "killed" / "metrics.jsonl").write_text(json.dumps(steps[0]) + "\n")
    assert chaos.differences(tmp_path) == ["2 steps undisturbed, 1 killed"]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """One kill in each phase."""
    folder = tmp_path_factory.mktemp("chaos")
    config = write_config(folder, max_steps=18, save_steps=2)
    command = [sys.executable, "-m", "tools.checks.chaos", "--config", config, "--folder", folder / "runs"]
    command += [f"--kills={len(PHASES)}", "--json", folder / "result.json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every metric is the same to the last bit" in done.stdout
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found | {"metrics": read_jsonl(folder / "runs" / "killed" / "metrics.jsonl")}


@pytest.mark.long  # in short: kills in a save and in an evaluation (tests/train/test_saving.py)
def test_a_run_that_dies_in_every_phase_ends_as_one_that_never_died(result: dict[str, Any]) -> None:
    assert result["differences"] == [] and result["per_phase"] == dict.fromkeys(result["per_phase"], 1)
    assert {kill["phase"] for kill in result["killed"]} == PHASES
    assert [kill["life"] for kill in result["killed"]] == list(range(len(PHASES)))
    assert [step["step"] for step in result["metrics"]] == list(range(1, 19))
