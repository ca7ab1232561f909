"""The benchmark of `data build` measures what it says."""

import json
from pathlib import Path

from click.testing import CliRunner

from tools.benchmarks import prepare_benchmark
from tools.benchmarks.data_benchmark import main

ROOT = Path(__file__).resolve().parents[2]


def test_a_small_run_prints_and_writes_its_figures(tmp_path, monkeypatch) -> None:
    figures = tmp_path / "figures.json"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    arguments = ["--contexts", "150", "--long-tokens", "2600", "--num-proc", "1", "--json", str(figures)]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    (run,) = json.loads(figures.read_text())["runs"]
    assert run["num_proc"] == 1 and 140 < run["contexts"] <= 150
    assert 0.99 * 2600 - 1 < run["tokens"] / run["contexts"] <= 2600
    assert run["seconds"] > 0 and 50 * 2**20 < run["peak_bytes"] < 4 * 2**30
    assert "| processes | contexts |" in result.output and f"| 1 | {run['contexts']} |" in result.output


def test_illegal_numbers_are_refused() -> None:
    result = CliRunner().invoke(main, ["--contexts", "0"])
    assert result.exit_code == 2 and "must be at least 1" in result.output


def test_a_small_preparation_prints_and_writes_its_figures(tmp_path, monkeypatch) -> None:
    figures = tmp_path / "figures.json"
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    arguments = ["--rows", "20", "--long-tokens", "2600", "--num-proc", "1", "--json", str(figures)]
    result = CliRunner().invoke(prepare_benchmark.main, arguments)
    assert result.exit_code == 0, result.output
    (run,) = json.loads(figures.read_text())["runs"]
    assert run["rows"] == 20 and 20 * 2600 < run["tokens"] < 40 * 12000
    usage = run["usage"]
    assert 50 * 2**20 < usage["peak_anonymous_bytes"] < usage["peak_bytes"] < 4 * 2**30
    assert f"| 20 | 1 | {run['file_bytes'] / 2**20:,.0f} | {run['tokens']:,} |" in result.output
