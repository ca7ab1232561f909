"""Metrics: where they are written, also after a restart, and the FLOPs and peak rates among them."""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from megatron_solopo.architecture.huggingface_config import Architecture, read_architecture
from megatron_solopo.config import LoggingConfig, ObjectiveConfig
from megatron_solopo.data.packing import Pack, TokenizedTriplet, build_pack
from megatron_solopo.errors import UserError
from megatron_solopo.files import read_jsonl
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train import metrics as metrics_module
from megatron_solopo.train.alarms import AlarmWarnings
from megatron_solopo.train.callbacks import Callback
from megatron_solopo.train.metrics import (
    MetricsWriter,
    console_line,
    peak_flops,
    peak_memory_bytes,
    reduce_over_ranks,
    reduce_sums,
    training_flops,
)
from megatron_solopo.train.state import Metrics, SkippedSteps, TrainState
from tests.ranks import layout
from tests.tiny_models import FAMILIES, VOCAB_SIZE


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[Topology]:
    with layout() as found:
        yield found


QUIET = LoggingConfig(tensorboard=False)


def step_metrics(step: int, **changes: Any) -> Metrics:
    """What a step of the plain objective reports."""
    return {
        "step": step,
        "loss": 0.5 / step,
        "rewards/chosen": 0.25,
        "rewards/rejected": -1.5,
        "rewards/accuracies": 0.75,
        "grad_norm": 2.0,
        "learning_rate": 1e-6,
        "num_tokens": 3940,
        "num_sequence_tokens": 3940,
        "tokens_per_second": 12345.6,
        "mfu": None,
        **changes,
    }


def write(run_dir: Path, steps: list[Metrics], first_step: int = 1, logging: LoggingConfig = QUIET) -> None:
    writer = MetricsWriter(run_dir, logging, {"seed": 1}, total_steps=10)
    callbacks: list[Callback] = [writer, AlarmWarnings(writer.path)]
    for callback in callbacks:
        callback.on_start(TrainState(first_step - 1, {}, SkippedSteps()))
    for metrics in steps:
        for callback in callbacks:
            callback.on_step_end(metrics)


def test_each_step_is_one_line_as_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [step_metrics(1), step_metrics(2, eval_loss=0.125, **{"eval_rewards/accuracies": 0.5})]
    write(tmp_path, steps)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == steps
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in printed] == [f"starting {tmp_path} at step 1", "step 1/10", "step 2/10"]


def test_every_nth_step_has_a_console_line_and_so_have_skipped_evaluated_and_last_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    special = {
        2: {"skipped": 1, "skipped_steps": 1},
        5: {"eval_loss": 0.125, "eval_rewards/accuracies": 0.5},
    }
    steps = [step_metrics(step, **special.get(step, {})) for step in range(1, 11)]
    write(tmp_path, steps, logging=LoggingConfig(tensorboard=False, console_steps=4))
    shown = [line.split("/")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert shown == ["step 2", "step 4", "step 5", "step 8", "step 10"]
    assert len(read_jsonl(tmp_path / "metrics.jsonl")) == 10


def test_what_the_alarms_see_is_told_below_the_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steady = [step_metrics(step, loss=0.5 + step % 3 / 100) for step in range(1, 31)]
    write(tmp_path, steady)
    write(tmp_path, [step_metrics(31, loss=9.0)], first_step=31)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1 and warnings[0].startswith("warning: step 31: loss 9.0000")


@pytest.mark.parametrize(
    ("first_step", "expected"),
    [
        (1, "starting {} at step 1"),
        (4, "continuing {} at step 4"),
        (10, "continuing {} at step 10"),
        (11, "{}: all 10 steps are done"),
    ],
)
def test_a_run_says_where_it_begins(tmp_path, capsys, first_step, expected) -> None:
    write(tmp_path, [], first_step=first_step)
    assert capsys.readouterr().out == expected.format(tmp_path) + "\n"


@pytest.mark.parametrize("first_step", [1, 3, 4, 9])
def test_a_resumed_run_drops_the_lines_it_will_write_again(tmp_path: Path, first_step: int) -> None:
    write(tmp_path, [step_metrics(step) for step in range(1, 6)])
    write(tmp_path, [step_metrics(first_step, loss=9.0)], first_step=first_step)
    steps = read_jsonl(tmp_path / "metrics.jsonl")
    assert steps == [step_metrics(step) for step in range(1, min(first_step, 6))] + [step_metrics(first_step, loss=9.0)]


@pytest.mark.parametrize("odd", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_never_written(tmp_path: Path, odd: float) -> None:
    """JSON has no NaN: every line stays readable by any program."""
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(tmp_path, [step_metrics(1), step_metrics(2, loss=odd)])
    assert read_jsonl(tmp_path / "metrics.jsonl") == [step_metrics(1)]


def test_a_line_cut_short_by_a_kill_is_written_again(tmp_path: Path) -> None:
    write(tmp_path, [step_metrics(1)])
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2, "lo')
    write(tmp_path, [step_metrics(2), step_metrics(3)], first_step=2)
    assert read_jsonl(tmp_path / "metrics.jsonl") == [step_metrics(step) for step in (1, 2, 3)]


def test_the_console_shows_signs_losses_and_time_to_go() -> None:
    line = console_line(step_metrics(3), total_steps=12, remaining_seconds=3723.4)
    assert line == (
        "step 3/12 | loss 0.1667 | rewards +0.2500 -1.5000 accuracy 0.75 | grad 2.000 lr 1.00e-06 "
        "| 12,346 tokens/s | ETA 1:02:03"
    )


def test_the_console_shows_how_many_tokens_shared_prompts_leave() -> None:
    line = console_line(step_metrics(3, num_tokens=2340), total_steps=12, remaining_seconds=0)
    assert " | 2,340 of 3,940 tokens computed | 12,346 tokens/s | " in line


def test_the_console_shows_alignment_and_evaluation_where_there_are_any() -> None:
    more = {"po_loss": 0.7, "solo_ra/gap_abs": 0.1, "eval_loss": 0.6, "eval_rewards/accuracies": 0.5}
    line = console_line(step_metrics(3, **more), total_steps=12, remaining_seconds=0)
    assert "| po 0.7000 gap 0.1000 |" in line and "| eval loss 0.6000 accuracy 0.50 |" in line
    line = console_line(step_metrics(3, **more, **{"token_alignment/kl": 0.02}), total_steps=12, remaining_seconds=0)
    assert "| po 0.7000 gap 0.1000 kl 0.0200 |" in line


def test_time_to_go_counts_the_steps_of_this_run(tmp_path, capsys, monkeypatch) -> None:
    clock = iter([100.0, 110.0])  # ten seconds for the first step after a resume
    monkeypatch.setattr("megatron_solopo.train.metrics.time", SimpleNamespace(monotonic=lambda: next(clock)))
    write(tmp_path, [step_metrics(4)], first_step=4)
    assert capsys.readouterr().out.endswith("ETA 0:01:00\n")


def test_tensorboard_holds_every_number_once_per_step(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logging = LoggingConfig(tensorboard=True)
    write(tmp_path, [step_metrics(1), step_metrics(2), step_metrics(3)], logging=logging)
    write(tmp_path, [step_metrics(2, loss=0.125)], first_step=2, logging=logging)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(step_metrics(1)) - {"step", "mfu"}
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 0.5), (2, 0.125)]


def test_wandb_gets_the_config_and_every_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: dict[str, Any] = {}
    logged: list[tuple[int, dict[str, Any]]] = []

    def start(**options: Any) -> Any:
        started.update(options)
        return SimpleNamespace(log=lambda values, step: logged.append((step, values)))

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=start))
    write(tmp_path, [step_metrics(1)], logging=LoggingConfig(tensorboard=False, wandb_project="solopo"))
    run_id = started.pop("id")
    assert started == {"project": "solopo", "dir": str(tmp_path), "config": {"seed": 1}, "resume": "allow"}
    assert logged == [(1, {name: v for name, v in step_metrics(1).items() if name not in ("step", "mfu")})]
    write(tmp_path, [step_metrics(2)], first_step=2, logging=LoggingConfig(tensorboard=False, wandb_project="solopo"))
    assert started["id"] == run_id, "continued, it is the same run there"


def test_wandb_that_is_missing_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # makes its import fail
    with pytest.raises(UserError) as error:
        write(tmp_path, [], logging=LoggingConfig(tensorboard=False, wandb_project="solopo"))
    message = str(error.value)
    assert "logging.wandb_project=solopo" in message and "pip install" in message and "\n" not in message


def test_sums_over_packs_and_ranks(groups: Topology) -> None:
    reports = [torch.tensor([1.0, 2.0]), torch.tensor([0.1, -4.0])]
    assert reduce_sums(reports, 2, groups) == pytest.approx([1.1, -2.0])
    assert reduce_sums([], 3, groups) == [0.0, 0.0, 0.0], "a rank without the last stage"
    assert reduce_over_ranks([3.0, -1.0], dist.ReduceOp.MAX, groups) == [3.0, -1.0]


ROLES = ObjectiveConfig().roles.all
PROMPTS = {"short": 5, "long": 23}
RESPONSES = {"chosen": 4, "rejected": 7}
# (prompt, response) of the three sequences of a triplet.
SEQUENCES = ((5, 4), (5, 7), (23, 4))


def make_pack(triplets: int, multiple: int = 2) -> Pack:
    rows = [
        TokenizedTriplet(
            id=str(number),
            index=number,
            prompts={name: np.arange(length) for name, length in PROMPTS.items()},
            responses={name: np.arange(length) for name, length in RESPONSES.items()},
        )
        for number in range(triplets)
    ]
    return build_pack(rows, ROLES, multiple, share_prompts=False)


def read(path: Path, family: str) -> Architecture:
    FAMILIES[family].save_pretrained(path)
    return read_architecture(path)


def counted(family: str, prompt: int, response: int) -> float:
    """Forward and backward of one sequence by torch's counter, the output layer on the response's rows alone.

    transformers multiplies whole squares of queries and keys, of which a causal mask needs half, so
    attention's batched products count half.
    """
    model = AutoModelForCausalLM.from_config(FAMILIES[family], attn_implementation="eager")
    tokens = torch.randint(VOCAB_SIZE, (1, prompt + response))
    counter = FlopCounterMode(display=False)
    with counter:
        model(tokens, logits_to_keep=response).logits.sum().backward()
    by_operation = counter.get_flop_counts()["Global"]
    attention = by_operation.pop(torch.ops.aten.bmm)
    return sum(by_operation.values()) + attention / 2


@pytest.mark.parametrize("family", ["llama2", "llama3", "qwen2_tied", "qwen3"])
def test_flops_are_those_that_torch_counts(family: str, tmp_path: Path) -> None:
    expected = sum(counted(family, *lengths) for lengths in SEQUENCES)
    assert training_flops(read(tmp_path, family), [make_pack(1)]) == pytest.approx(expected, rel=1e-12)


def test_flops_add_up_over_triplets_and_packs_and_ignore_padding(tmp_path: Path) -> None:
    architecture = read(tmp_path, "llama3")
    one = training_flops(architecture, [make_pack(1)])
    assert training_flops(architecture, [make_pack(3)]) == pytest.approx(3 * one)
    assert training_flops(architecture, [make_pack(1), make_pack(2, multiple=64)]) == pytest.approx(3 * one)
    assert training_flops(architecture, []) == 0
    with_adapters = training_flops(architecture, [make_pack(1)], base_learns=False)
    assert 2 / 3 * one < with_adapters < one, "no gradients of weights, but those of attention"


@pytest.mark.parametrize(
    ("device", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GeForce RTX 4090", None),
        ("NVIDIA H20", None),
    ],
)
def test_the_peak_rate_goes_by_the_devices_name(monkeypatch, device: str, expected: float | None) -> None:
    monkeypatch.setattr(metrics_module, "is_cpu", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: device)
    assert peak_flops() == expected


def test_a_cpu_has_no_peak_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "is_cpu", lambda: True)
    assert peak_flops() is None


def test_peak_memory_of_a_cpu_is_resident_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics_module, "is_cpu", lambda: True)
    status = Path("/proc/self/status").read_text()
    (peak,) = (int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM:"))
    assert peak_memory_bytes() == pytest.approx(peak, rel=0.05)
