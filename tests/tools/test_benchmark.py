"""The benchmark at toy sizes on a CPU, through its command line."""

import importlib
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest
from click.testing import CliRunner

SHORT, LONG, RESPONSE, STEPS, WARMUP = 64, (128, 256), 16, 3, 2
SIZES = ["--shape=tiny", f"--short-tokens={SHORT}", f"--response-tokens={RESPONSE}"]
SIZES += [f"--long-tokens={length}" for length in LONG]
OURS = "--systems=solopo,long_po"


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "tools.benchmarks.benchmark",
        *SIZES,
        f"--steps={STEPS}",
        f"--warmup={WARMUP}",
        *arguments,
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=250)


def by_system(rows: list[dict]) -> dict:
    return {(row["system"], row["long_tokens"]): row for row in rows}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("benchmark")


@pytest.fixture(scope="module")
def run(folder) -> subprocess.CompletedProcess[str]:
    files = [f"--json={folder}/b.json", f"--plot={folder}/b.png", f"--profile={folder}/traces", "--commit=abc123"]
    run = run_benchmark(OURS, *files)
    assert run.returncode == 0, run.stderr
    return run


@pytest.fixture(scope="module")
def result(run, folder) -> dict:
    return json.loads((folder / "b.json").read_text())


@pytest.fixture(scope="module")
def rows(result) -> dict:
    return by_system(result["measurements"])


def test_every_step_is_counted_once(rows) -> None:
    assert list(rows) == [(system, length) for length in LONG for system in ("solopo", "long_po")]
    for row in rows.values():
        assert row["status"] == "ok"
        assert len(row["seconds"]) == STEPS and min(row["seconds"]) > 0
        assert len(row["losses"]) == len(row["grad_norms"]) == STEPS + WARMUP
        assert 0 < row["held_bytes"] < row["allocated_bytes"]
        assert row["reserved_bytes"] is row["mfu"] is None  # of a GPU alone


def test_with_the_policy_as_its_own_reference_every_loss_is_ln_2(rows) -> None:
    for row in rows.values():
        assert row["losses"] == pytest.approx([math.log(2)] * (STEPS + WARMUP), abs=1e-5)


def test_weights_stand_still_so_that_every_step_computes_the_same(rows) -> None:
    for length in LONG:
        norms = rows["long_po", length]["grad_norms"]
        assert norms[0] > 0.1
        assert norms == pytest.approx([norms[0]] * len(norms), rel=1e-5)


def test_derived_numbers_follow_from_the_times(rows) -> None:
    for (system, length), row in rows.items():
        tokens = {"solopo": length + SHORT + RESPONSE, "long_po": length + RESPONSE}[system]
        assert row["tokens_per_step"] == tokens
        assert row["median_seconds"] == median(row["seconds"])
        assert row["tokens_per_second"] == pytest.approx(tokens / row["median_seconds"])
        assert row["flops_per_second"] == pytest.approx(row["flops_per_step"] / row["median_seconds"])


def test_flops_are_counted_by_true_lengths(rows) -> None:
    hidden, ffn, layers, heads, kv_heads, vocab = 64, 160, 2, 4, 2, 512
    weights = hidden * hidden * 2 + hidden * (hidden // heads * kv_heads) * 2 + 3 * hidden * ffn
    for length in LONG:
        # Two answers behind one prompt: what the second attends to is the square of its sequence, less the prompt's.
        pair_tokens = {n: n + RESPONSE for n in (SHORT, length)}
        pair_squares = {n: 2 * n**2 - (n - RESPONSE) ** 2 for n in (SHORT, length)}
        for system, tokens, squares, answers in (
            ("long_po", pair_tokens[length], pair_squares[length], 2),
            ("solopo", pair_tokens[SHORT] + length, pair_squares[SHORT] + length**2, 3),
        ):
            forward = layers * (2 * weights * tokens + 2 * hidden * squares) + 2 * hidden * vocab * answers * RESPONSE
            assert rows[system, length]["flops_per_step"] == pytest.approx(3 * forward)


def test_ratios_stand_beside_their_predictions(result, rows) -> None:
    assert [ratio["long_tokens"] for ratio in result["ratios"]] == list(LONG)
    for ratio in result["ratios"]:
        length = ratio["long_tokens"]
        solopo, long_po = rows["solopo", length], rows["long_po", length]
        assert ratio["solopo_long_po_time"] == solopo["median_seconds"] / long_po["median_seconds"]
        assert ratio["solopo_long_po_tokens"] == (length + SHORT + RESPONSE) / (length + RESPONSE)
        assert ratio["solopo_long_po_flops"] == solopo["flops_per_step"] / long_po["flops_per_step"]
        assert not any("trl" in key for key in ratio)


def test_the_record_says_where_how_and_of_what(run, result) -> None:
    assert result["commit"] == "abc123"
    assert result["device"] == "cpu"
    assert "--commit=abc123" in result["command"]
    assert result["torch"] and result["megatron-core"] and result["date"]
    assert result["sizes"]["long_tokens"] == list(LONG)
    assert result["configs"]["as given"]["model"]["dtype"] == "float32"
    assert result["failures"] == []
    assert "[4/4] long_po at 256" in run.stderr
    assert run.stdout.count("| long_po |") == 4  # measured and profiled at both lengths
    assert "Traceback" not in run.stderr


def test_plot_and_traces_are_written(rows, folder) -> None:
    assert (folder / "b.png").read_bytes().startswith(b"\x89PNG")
    for system, length in rows:
        assert (folder / "traces" / f"{system}-{length}.json.gz").is_file()
        summary = json.loads((folder / "traces" / f"{system}-{length}.summary.json").read_text())
        assert summary == rows[system, length]["profile"]
        assert summary["wall_ms"] > 0
        assert summary["gpu_busy"] is None and summary["kernel_launches"] == 0


def test_an_override_changes_what_is_computed(rows, tmp_path) -> None:
    path = tmp_path / "b.json"
    overrides = ["objective.beta=0.2", "parallel.recompute_granularity=full", "data.share_prompts=false"]
    run = run_benchmark("--systems=long_po", f"--json={path}", *overrides)
    assert run.returncode == 0, run.stderr
    result = json.loads(path.read_text())
    assert result["configs"]["as given"]["parallel"]["recompute_granularity"] == "full"
    for (system, length), row in by_system(result["measurements"]).items():
        assert row["tokens_per_step"] == 2 * length
        # At the reference, DPO's gradient is proportional to beta. Sharing changes none.
        assert row["grad_norms"][0] == pytest.approx(2 * rows[system, length]["grad_norms"][0], rel=1e-4)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--short-tokens=300"], "--long-tokens 128"),
        (["--response-tokens=64"], "--response-tokens (64)"),
        (["--systems=solopo,dpo"], "unknown dpo"),
        (["parallel.recompute=full"], "unknown key parallel.recompute"),
        (["--fallback", "model.dtype=int8"], "model.dtype='int8'"),
        (["--warmup=0"], "--warmup"),
    ],
)
def test_mistakes_are_one_line(arguments, complaint, monkeypatch) -> None:
    benchmark = importlib.import_module("tools.benchmarks.benchmark")
    run = CliRunner().invoke(benchmark.main, [*SIZES, OURS, *arguments])
    assert run.exit_code == 2
    (line,) = [line for line in run.stderr.splitlines() if line.startswith("Error")]
    assert complaint in line


def test_what_only_the_process_finds_out_is_one_line_too() -> None:
    run = run_benchmark(OURS, "parallel.tensor_model_parallel_size=2")
    assert run.returncode == 1
    assert "parallel.tensor_model_parallel_size=2" in run.stderr.splitlines()[-1]
    assert "Traceback" not in run.stderr
    assert run.stdout == ""


def test_a_missing_trl_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = importlib.import_module("tools.benchmarks.benchmark")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    run = CliRunner().invoke(benchmark.main, SIZES)
    assert run.exit_code == 2
    assert "megatron-solopo[bench]" in run.output


@pytest.mark.long
def test_trl_computes_the_same_loss_and_gradient(tmp_path) -> None:
    path = tmp_path / "b.json"
    run = run_benchmark(f"--json={path}", "--triplets=2", "data.share_prompts=false")
    assert run.returncode == 0, run.stderr
    result = json.loads(path.read_text())
    rows = by_system(result["measurements"])
    for length in LONG:
        trl, long_po = rows["trl", length], rows["long_po", length]
        assert trl["status"] == "ok" and len(trl["seconds"]) == STEPS
        assert trl["losses"] == pytest.approx([math.log(2)] * (STEPS + WARMUP), abs=1e-5)
        assert trl["grad_norms"] == pytest.approx(long_po["grad_norms"], rel=1e-5)
        assert trl["flops_per_step"] == long_po["flops_per_step"]
        assert trl["tokens_per_step"] == long_po["tokens_per_step"]
    tried = [(row["variant"], row["long_tokens"]) for row in result["variants"]]
    assert tried[:2] == [("sdpa", LONG[0]), ("sdpa+checkpointing", LONG[0])]  # all of them at the first length
    assert tried[2:] == [(rows["trl", LONG[0]]["variant"], LONG[1])]  # then the fastest alone
    assert all(entry["grad_norm_difference"] < 1e-5 for entry in result["first_step"])
    assert all(ratio["trl_solopo_time"] > 0 for ratio in result["ratios"])
