"""The benchmark of `data build` measures what it says."""

import importlib.util
import json
from pathlib import Path

from click.testing import CliRunner

TOOL = Path(__file__).resolve().parents[2] / "tools" / "data_benchmark.py"


def load():
    spec = importlib.util.spec_from_file_location("data_benchmark", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_small_run_prints_and_writes_its_figures(tmp_path, monkeypatch) -> None:
    figures = tmp_path / "figures.json"
    monkeypatch.setenv("PYTHONPATH", str(TOOL.parents[1]))
    arguments = ["--contexts", "150", "--long-tokens", "2600", "--num-proc", "1", "--json", str(figures)]
    result = CliRunner().invoke(load().main, arguments)
    assert result.exit_code == 0, result.output
    (run,) = json.loads(figures.read_text())["runs"]
    assert run["num_proc"] == 1 and 140 < run["contexts"] <= 150
    assert 0.99 * 2600 - 1 < run["tokens"] / run["contexts"] <= 2600
    assert run["seconds"] > 0 and 50 * 2**20 < run["peak_bytes"] < 4 * 2**30
    assert "| processes | contexts |" in result.output and f"| 1 | {run['contexts']} |" in result.output


def test_illegal_numbers_are_refused() -> None:
    result = CliRunner().invoke(load().main, ["--contexts", "0"])
    assert result.exit_code == 2 and "must be at least 1" in result.output
