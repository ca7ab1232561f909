"""What the benchmark does when memory runs out, which variants it tries, its weights, its tables and its meter."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_solopo.errors import UserError
from tests.distributed import run_distributed

SHORT, RESPONSE, STEPS, WARMUP = 32, 8, 2, 2
FALLBACK = "parallel.recompute_granularity=full"


def make_plan(folder: Path, *long_tokens: int, fallbacks: tuple[str, ...] = (), overrides: tuple[str, ...] = ()) -> Any:
    from tools.benchmarks import benchmark

    sizes: dict[str, Any] = {"short_tokens": SHORT, "response_tokens": RESPONSE, "long_tokens": list(long_tokens)}
    sizes |= {"systems": ["solopo", "long_po"], "triplets": 1, "warmup": WARMUP, "steps": STEPS}
    sizes |= {"trl_variants": [], "every_variant": False, "profile": None}
    return benchmark.make_plan(folder, "tiny", None, (*overrides, "data.share_prompts=false"), fallbacks, **sizes)


def measure_with_little_memory(folder: Path, limit: int, fallbacks: tuple[str, ...]) -> list[dict]:
    """On a rank: all that the process reports where a step without recomputation over more tokens does not fit."""
    from tools.benchmarks import bench_ours

    plain_step = bench_ours.Policy.step

    def step(self: Any, packs: list, *arguments: Any) -> Any:
        recomputes = self.chunks[0].module.config.recompute_granularity == "full"
        if not recomputes and sum(pack.padded_tokens for pack in packs) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0 has ...")
        return plain_step(self, packs, *arguments)

    bench_ours.Policy.step = step
    messages: list[dict] = []
    bench_ours.run(
        make_plan(folder, 64, 128, 256, fallbacks=fallbacks),
        lambda kind, **values: messages.append({"kind": kind, **values}),
    )
    return messages


def measure_adapters(folder: Path) -> list[dict]:
    """On a rank: what the process reports of the whole model and of adapters."""
    from tools.benchmarks import bench_ours

    found: list[dict] = []
    for overrides in ((), ("lora.rank=4",)):
        messages: list[dict] = []
        bench_ours.run(
            make_plan(folder, 128, overrides=overrides),
            lambda kind, messages=messages, **values: messages.append({"kind": kind, **values}),
        )
        found.append(rows_of(messages, "measurement")["long_po", 128])
    return found


def rows_of(messages: list[dict], kind: str) -> dict[tuple[str, int], dict]:
    return {(each["system"], each["long_tokens"]): each for each in messages if each["kind"] == kind}


def test_running_out_of_memory_is_a_result(tmp_path) -> None:
    (messages,) = run_distributed(measure_with_little_memory, 1, tmp_path, 128 + 2 * SHORT, ())
    rows = rows_of(messages, "measurement")
    statuses = {key: row["status"] for key, row in rows.items()}
    assert statuses == {
        ("solopo", 64): "ok",
        ("long_po", 64): "ok",
        ("solopo", 128): "ok",
        ("long_po", 128): "out of memory",
        ("solopo", 256): "out of memory",
        ("long_po", 256): "not tried",
    }
    assert rows["long_po", 128]["detail"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB."
    assert rows["long_po", 128]["seconds"] == []
    survivor = rows["solopo", 128]  # its process lost the policy, and built another
    assert len(survivor["seconds"]) == STEPS
    assert survivor["losses"] == pytest.approx([math.log(2)] * (STEPS + WARMUP), abs=1e-5)
    assert rows_of(messages, "variant") == {}


def test_adapters_leave_out_the_base_s_gradients_and_optimizer(tmp_path) -> None:
    ((whole, adapters),) = run_distributed(measure_adapters, 1, tmp_path)
    assert adapters["losses"] == pytest.approx([math.log(2)] * (STEPS + WARMUP), abs=1e-5)
    assert 0 < adapters["grad_norms"][0] != whole["grad_norms"][0]
    parameters = whole["held_bytes"] / 4  # and gradients and two moments, all in float32
    learn = (adapters["held_bytes"] - parameters) / 4
    # Rank x (rows + columns) of q, k, v, o, gate, up and down in two layers. Megatron pads its buffers a little.
    assert learn == pytest.approx(4 * 2 * 4 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 160)), abs=64)
    assert adapters["held_bytes"] < adapters["allocated_bytes"] < whole["allocated_bytes"]
    assert whole["forward_flops"] < adapters["forward_flops"] < 1.2 * whole["forward_flops"]
    backward = [row["step_flops"] - row["forward_flops"] for row in (adapters, whole)]
    assert 0.4 < backward[0] / backward[1] < 0.75


def test_a_table_sets_adapters_beside_the_whole_model() -> None:
    from tools.benchmarks import lora_benchmark

    counts = {"held_bytes": 4 * 2**20, "allocated_bytes": 8 * 2**20, "forward_flops": None, "step_flops": 3e9}
    rows = {
        (system, trained): row(system, 64, losses=[math.log(2)], **counts) | {"seconds": [seconds]}
        for system, trained, seconds in (
            ("long_po", "whole model", 2.0),
            ("trl", "whole model", 3.0),
            ("long_po", "rank 4", 1.0),
            ("trl", "rank 4", 2.0),
        )
    }
    lines = lora_benchmark.ratios_table(rows).splitlines()
    assert "| long_po: rank 4 / whole model | 0.500 | 1.000 | 1.000 | 1.000 |" in lines
    assert "| whole model: trl / long_po | 1.500 | 1.000 | 1.000 | 1.000 |" in lines
    assert "| trl | rank 4 | 2.00 | 4.0 | 8.0 | - | - | 3.0 | 1 |" in lora_benchmark.cases_table(rows)
    assert list(lora_benchmark.disagreements(rows)) == []
    rows["trl", "rank 4"]["grad_norms"] = [1.01]
    assert list(lora_benchmark.disagreements(rows)) == ["rank 4: the norm of the gradient is 1 here and 1.01 in trl"]


def test_a_table_sets_shared_prompts_beside_separate_ones_and_trl(tmp_path) -> None:
    from tools.benchmarks import benchmark, sharing_benchmark

    sizes = {"short_tokens": SHORT, "response_tokens": RESPONSE, "long_tokens": [128], "triplets": 1, "warmup": 1}
    sizes |= {"steps": 1, "trl_variants": [], "every_variant": False, "profile": None}
    rows = {}
    for label, share, system, overrides in sharing_benchmark.cases(with_trl=True):
        plan = benchmark.make_plan(tmp_path, "tiny", None, overrides, (), systems=[system], **sizes)
        tokens, flops = benchmark.step_size(plan, system, 128)
        counts = {"tokens_per_step": tokens, "flops_per_step": flops, "allocated_bytes": 2**20 * tokens}
        rows[SHORT, label, share] = row(system, 128) | counts | {"seconds": [2.0 - share], "cpu_seconds": [1.0]}
    tokens = {key[1:]: each["tokens_per_step"] for key, each in rows.items()}
    pair, long_pair = SHORT + RESPONSE, 128 + RESPONSE
    assert tokens == {
        ("solopo", False): 2 * SHORT + 128,
        ("solopo", True): pair + 128,
        ("solopo, align: both", False): 2 * SHORT + 2 * 128,
        ("solopo, align: both", True): pair + long_pair,
        ("long_po", False): 2 * 128,
        ("long_po", True): long_pair,
        ("short_po", False): 2 * SHORT,
        ("short_po", True): pair,
        ("trl", False): 2 * 128,
    }
    lines = sharing_benchmark.ratios_table(rows).splitlines()
    (line,) = [line for line in lines if line.startswith("| 32 | long_po | 1.000 | 0.500 | 0.531 |")]
    assert line.endswith("| 0.531 |")
    assert any(line.startswith("| 32 | short_po / trl | 1.000 | 0.500 | 0.156 |") for line in lines)
    assert "| 32 | trl | no | 1.00 | 2.00 | 256 | 256.0 | 1 |" in sharing_benchmark.cases_table(rows)
    assert list(sharing_benchmark.disagreements(rows)) == []
    rows[SHORT, "short_po", True]["grad_norms"] = [1.01]
    (wrong,) = sharing_benchmark.disagreements(rows)
    assert wrong == "short_po, S 32: the norm of the gradient is 1.01, unshared 1"
    slow = list(sharing_benchmark.over_target(rows))
    assert [line.partition(",")[0] for line in slow] == ["solopo", "solopo", "long_po"]
    assert slow[2] == "long_po, S 32: takes 1.000 of the unshared time, target 0.580"
    for label in sharing_benchmark.OBJECTIVES:
        rows[SHORT, label, True]["cpu_seconds"] = [0.57]
    assert list(sharing_benchmark.over_target(rows)) == []


def test_a_fallback_serves_all_systems_from_that_length_on(tmp_path) -> None:
    (messages,) = run_distributed(measure_with_little_memory, 1, tmp_path, 128 + 2 * SHORT, (FALLBACK,))
    rows, tried = rows_of(messages, "measurement"), rows_of(messages, "variant")
    assert {row["status"] for row in rows.values()} == {"ok"}
    assert {key: row["variant"] for key, row in rows.items()} == {
        (system, length): "as given" if length == 64 else FALLBACK
        for length in (64, 128, 256)
        for system in ("solopo", "long_po")
    }
    assert {key: row["status"] for key, row in tried.items()} == {
        ("solopo", 128): "ok",
        ("long_po", 128): "out of memory",
    }


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("whatever"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, expected) -> None:
    from tools.benchmarks.bench_case import is_out_of_memory

    assert is_out_of_memory(error) is expected


def logprobs_of_both(folder: Path) -> tuple[list[float], list[float]]:
    """On a rank: our log-probs of a long pair and those of transformers' model."""
    from megatron_solopo.config import parse_config
    from tests.ranks import layout
    from tools.benchmarks import bench_ours
    from tools.benchmarks.bench_case import random_model

    plan = make_plan(folder, 64)
    config = parse_config(plan.config, "test")
    model = bench_ours.resolve_model(config.model, config.parallel)
    with layout() as groups:
        policy = bench_ours.build_random_policy(config, model, groups, max_steps=1)
        series = bench_ours.Series("long_po", config, plan, 64, groups)
        with torch.no_grad():
            report = bench_ours.logprob_report(groups)
            (ours,) = bench_ours.run_schedule(policy.chunks, series.packs, report, groups, forward_only=True)
    (triplet,) = plan.batch(64)
    model, theirs = random_model(plan, "sdpa"), []
    for response in ("chosen", "rejected"):
        labels = torch.from_numpy(triplet.responses[response])
        tokens = torch.cat([torch.from_numpy(triplet.prompts["long"]), labels])
        with torch.no_grad():
            logits = model(tokens.unsqueeze(0)).logits[0, -RESPONSE - 1 : -1]
        theirs.append(float(logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).sum()))
    return ours.flatten().tolist(), theirs


def test_both_sides_have_the_same_weights(tmp_path) -> None:
    ((ours, theirs),) = run_distributed(logprobs_of_both, 1, tmp_path)
    assert ours == pytest.approx(theirs, rel=1e-5)
    assert abs(ours[0] - ours[1]) > 1e-3  # two answers, not one


def search(times: dict[str, dict[int, float]]) -> Any:
    """A search over `variant: {longest length that fits: seconds}`, without TRL."""
    from tools.benchmarks.bench_case import OUT_OF_MEMORY, Measurement
    from tools.benchmarks.bench_variants import Search, Variant

    asked: list[tuple[str, int]] = []

    def measure(variant: Variant, length: int, fastest: float) -> Measurement:
        asked.append((str(variant), length))
        ((longest, seconds),) = times[str(variant)].items()
        if length > longest:
            return Measurement("trl", length, OUT_OF_MEMORY, variant=str(variant))
        return Measurement("trl", length, variant=str(variant), seconds=[seconds])

    candidates = [Variant("sdpa", liger, checkpointing) for liger in (False, True) for checkpointing in (False, True)]
    return Search(candidates, measure), asked


def test_later_lengths_try_the_fastest_variants_first_and_what_cannot_fit_never() -> None:
    trial, asked = search(
        {
            "sdpa": {8: 1.0},
            "sdpa+checkpointing": {32: 1.4},
            "sdpa+liger": {8: 0.8},
            "sdpa+liger+checkpointing": {64: 1.2},
        }
    )
    assert trial.measure(8, every_variant=True).variant == "sdpa+liger"
    assert len(asked) == 4
    asked.clear()
    # sdpa alone needs no less than sdpa+liger, which ran out of memory: it is skipped.
    assert trial.measure(16, every_variant=False).variant == "sdpa+liger+checkpointing"
    assert [name for name, _ in asked] == ["sdpa+liger", "sdpa+liger+checkpointing"]
    asked.clear()
    last = trial.measure(128, every_variant=False)
    assert last.status == "out of memory"
    assert [name for name, _ in asked] == ["sdpa+liger+checkpointing"]
    assert trial.measure(256, every_variant=False).status == "not tried"
    assert len(asked) == 1


def test_an_unknown_variant_is_refused_by_name() -> None:
    from tools.benchmarks.bench_variants import possible_variants

    assert [str(each) for each in possible_variants(["sdpa+checkpointing"])] == ["sdpa+checkpointing"]
    with pytest.raises(UserError, match=r"--trl-variant flash: .* sdpa, sdpa\+checkpointing"):
        possible_variants(["flash"])


def row(system: str, length: int, **values: Any) -> dict[str, Any]:
    from tools.benchmarks.bench_case import Measurement
    from tools.benchmarks.bench_report import complete

    numbers = {"seconds": [2.0, 1.0, 4.0], "losses": [0.7], "grad_norms": [1.0], "allocated_bytes": 2**30}
    measured = Measurement(system, length, **(numbers | values))
    return complete(vars(measured), tokens=length, flops=4e12, peak=1e13)


def test_tables_and_plot_hold_what_ran_out_of_memory(tmp_path) -> None:
    from tools.benchmarks import bench_report

    out = {"status": "out of memory", "seconds": [], "losses": [], "grad_norms": [], "allocated_bytes": None}
    rows = [row("long_po", 1024), row("trl", 1024, grad_norms=[1.25]), row("long_po", 2048), row("trl", 2048, **out)]
    assert rows[0]["median_seconds"] == 2.0 and rows[0]["mfu"] == pytest.approx(0.2)
    assert rows[3]["median_seconds"] is rows[3]["mfu"] is None
    short, long = bench_report.ratios(rows)
    assert short["trl_long_po_time"] == short["long_po_trl_memory"] == 1.0
    assert long == {"long_tokens": 2048}
    assert bench_report.agreement(rows)[0]["grad_norm_difference"] == pytest.approx(0.2)
    text = bench_report.markdown(rows, rows)
    assert "| 2,048 | trl | - | - | - | - | - | - | out of memory |" in text
    assert "| 1,024 | trl | 2.000 | 512 | 2.00 | 20.0% | 1.0 | - |  |" in text
    bench_report.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_process_that_dies_is_reported(tmp_path, monkeypatch) -> None:
    from tools.benchmarks import bench_results

    (tmp_path / "worker.py").write_text(
        'import os, sys\nos.write(int(sys.argv[2]), b\'{"kind": "facts"}\\n\')\nos.kill(os.getpid(), 9)\n'
    )
    monkeypatch.setattr(bench_results, "ROOT", tmp_path)
    facts, died = bench_results.run_worker("worker", tmp_path / "plan.json")
    assert facts == {"kind": "facts"}
    assert died["kind"] == "died" and "-9" in died["text"]


def test_memory_is_taken_from_the_last_step_of_the_warm_up_on(monkeypatch) -> None:
    from tools.benchmarks import bench_case

    peaks = iter([30, 10, 20])  # of the steps after the first, which is not asked
    calls: list[str] = []
    fake = SimpleNamespace(
        is_available=lambda: True,
        synchronize=lambda: None,
        empty_cache=lambda: calls.append("empty"),
        reset_peak_memory_stats=lambda: calls.append("reset"),
        max_memory_allocated=lambda: next(peaks),
        max_memory_reserved=lambda: 40,
    )
    monkeypatch.setattr(bench_case.torch, "cuda", fake)
    result = bench_case.Measurement("solopo", 1)
    meter = bench_case.StepMeter(result, warmup=2)
    for _ in range(4):
        with meter.step(list):
            calls.append("step")
    assert calls == ["step", "empty", "reset", "step", "reset", "step", "reset", "step"]
    assert (result.allocated_bytes, result.reserved_bytes, len(result.seconds)) == (30, 40, 2)


def test_trl_is_compared_in_its_own_loss_alone(tmp_path) -> None:
    import click

    from tools.benchmarks import benchmark

    sizes = {"systems": ["long_po", "trl"], "long_tokens": [64], "short_tokens": SHORT, "triplets": 1}
    with pytest.raises(click.UsageError, match=r"objective\.loss_type=simpo"):
        benchmark.make_plan(tmp_path, "tiny", None, ("objective.loss_type=simpo",), (), **sizes)
