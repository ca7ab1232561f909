"""The parts of the conversion benchmark, on a model of a few kilobytes."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from transformers import AutoModelForCausalLM

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 131,
}


@pytest.fixture(scope="module")
def benchmark() -> Any:
    return importlib.import_module("tools.benchmarks.convert_benchmark")


def test_the_model_is_one_that_transformers_loads(benchmark: Any, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(benchmark, "CONFIG", benchmark.CONFIG | SMALL)
    nbytes, largest = benchmark.make_model(tmp_path / "source")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype="auto")
    assert nbytes == sum(each.nbytes for each in model.parameters()) and largest == 131 * 32 * 2
    copied = tmp_path / "copied"
    seconds, _ = benchmark.run([sys.executable, "-c", benchmark.COPY, str(tmp_path / "source"), str(copied)])
    assert seconds > 0
    for file in (tmp_path / "source").iterdir():
        assert (copied / file.name).read_bytes() == file.read_bytes()


def test_the_peak_is_the_processs_own(benchmark: Any) -> None:
    """Not its parent's, which has imported torch."""
    command = [sys.executable, "-c", "import time; a = b'1' * (200 << 20); del a; time.sleep(0.3)"]
    _, peak = benchmark.run(command)
    assert 200 << 20 < peak < 260 << 20
    assert benchmark.high_water(os.getpid()) > 0


def test_a_command_that_fails_ends_the_benchmark(benchmark: Any) -> None:
    with pytest.raises(click.ClickException, match="failed"):
        benchmark.run([sys.executable, "-c", "raise SystemExit(3)"])


def test_times_are_medians_of_pairs_and_memory_the_worst(benchmark: Any) -> None:
    pairs = [benchmark.Pair(5.0, 2.0, 9), benchmark.Pair(4.0, 1.0, 30), benchmark.Pair(3.0, 2.7, 10)]
    (work,) = benchmark.rows({"import": pairs}, 8 * 10**9)
    assert (work["seconds"], work["gb_per_second"], work["of_copy"], work["peak_bytes"]) == (4.0, 2.0, 0.4, 30)


def test_every_conversion_has_a_copy_in_turn_before_and_after(benchmark: Any, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "source").mkdir()
    ran = []

    def run(command: list[str]) -> tuple[float, int]:
        output = {"-c": "copied", "import": "megatron", "export": "exported"}[
            next(each for each in command if each in ("-c", "import", "export"))
        ]
        assert (tmp_path / "megatron").exists() or output != "exported"
        (tmp_path / output).mkdir()
        ran.append(output)
        return (2.0 if output == "copied" else 4.0), len(ran)

    monkeypatch.setattr(benchmark, "run", run)
    found = benchmark.measure(tmp_path, 2)
    after = ["megatron", "copied", "exported", "copied"]
    before = ["copied", "megatron", "copied", "exported"]
    assert ran == after * 2 + before * 2
    assert [len(pairs) for pairs in found.values()] == [2] * 4
    assert {(pair.seconds, pair.copy_seconds) for pairs in found.values() for pair in pairs} == {(4.0, 2.0)}
