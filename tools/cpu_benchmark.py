#!/usr/bin/env python3
"""Measure on a CPU what the response-only head saves in memory and what short-to-long training saves in time.

    python tools/cpu_benchmark.py --json benchmark.json

Memory: forward and backward of one SoLo-DPO triplet, each in a fresh process, with the response-only head and with
full logits (Megatron's own output layer and cross-entropy over every position), which must give the same loss and
gradients. Time: whole optimizer steps of `solopo` and of `long_po` on the same triplets. Data and weights are random;
reference log-probs are zeros, for a cached reference costs a step nothing. One thread. Linux only.
"""
# ruff: noqa: E402  (megatron's warnings of what is not installed must be off before it is imported)

import os
import platform
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import accumulate
from multiprocessing import get_context
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore", module=r"megatron\.core")

import click
import numpy as np
import psutil
import torch
from torch import Tensor
from transformers import LlamaConfig

from megatron_solopo.config import LogprobConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from megatron_solopo.data.packing import TokenizedTriplet, build_pack
from megatron_solopo.files import write_json
from megatron_solopo.model.architecture import Architecture, read_architecture
from megatron_solopo.model.build import build_model
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.model.microbatch import Microbatch, shard_pack
from megatron_solopo.objective import required_roles
from megatron_solopo.parallel import topology
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train.cost import training_flops
from megatron_solopo.train.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
from megatron_solopo.train.policy import Policy
from megatron_solopo.train.step import ReferenceLogprobs, objective_loss, run_schedule

RESPONSE_ONLY, FULL_LOGITS = HEADS = ("response-only", "full logits")
SOLOPO, LONG_PO = OBJECTIVES = (ObjectiveConfig(name="solopo"), ObjectiveConfig(name="long_po"))
AGREEMENT = 1e-4
"""Greatest relative difference of loss and gradient norms between the heads."""
_HEAD_DIM = 64
_MEMORY_HIDDEN_SIZE, _TIME_HIDDEN_SIZE = 128, 512
_MEMORY_SHORT_TOKENS = 1024
_TIME_VOCAB_SIZE = 4096
_MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """One step with one head."""

    prompt_tokens: int
    head: str
    positions: int
    """Tokens of the pack: all sequences of the triplet."""
    loss: float
    gradient_norms: dict[str, float]
    """By parameter."""
    step_resident_bytes: int
    """Peak resident memory of the process in forward and backward, less what was resident just before."""
    step_tensor_bytes: int
    """Peak of what torch's allocator handed out in the same step."""
    head_tensor_bytes: int
    """The same of the head's forward and backward alone, given the last layer's output."""


@dataclass(frozen=True)
class Times:
    """Medians over the repeats in seconds, by objective; every ratio is solopo / long_po."""

    short_tokens: int
    long_tokens: int
    wall_seconds: dict[str, float]
    cpu_seconds: dict[str, float]
    wall_ratio: float
    cpu_ratio: float
    tokens_ratio: float
    """(L + 2S) / 2L."""
    flops_ratio: float


def make_architecture(hidden_size: int, vocab_size: int) -> Architecture:
    """A one-layer Llama, read back from a Hugging Face config as training does."""
    config = LlamaConfig(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=1,
        num_attention_heads=hidden_size // _HEAD_DIM,
        num_key_value_heads=hidden_size // _HEAD_DIM // 2,
        vocab_size=vocab_size,
        tie_word_embeddings=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return read_architecture(Path(folder))


@contextmanager
def one_process() -> Iterator[Topology]:
    """Process groups of this process alone, which computes on one thread."""
    torch.set_num_threads(1)
    groups = topology.initialize(ParallelConfig(), seed=1)
    try:
        yield groups
    finally:
        topology.destroy(groups)


def make_model(architecture: Architecture, groups: Topology) -> ResponseModel:
    """Random weights, the same in every process."""
    settings = {"chunk_tokens": LogprobConfig().chunk_tokens, "device": groups.device}
    (model,) = build_model(architecture, ModelConfig(path=Path("random")), ParallelConfig(), **settings)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def use_full_logits(model: ResponseModel) -> None:
    """Give the model the usual head: Megatron's loss over all positions, of which the response rows are kept."""
    postprocess = model._postprocess

    def full_logits(hidden_T1H: Tensor, *, input_ids: Tensor, labels: None, packed_seq_params: Any, **rest: Any) -> Tensor:
        labels_1T = input_ids.roll(-1, dims=1)
        losses_1T = postprocess(hidden_T1H, input_ids=input_ids, labels=labels_1T, packed_seq_params=None, **rest)
        return -losses_1T.squeeze(0).index_select(0, packed_seq_params.response_rows)

    model._postprocess = lambda hidden_states, **rest: full_logits(hidden_states, **rest)


def random_triplet(short: int, long: int, response: int, vocab_size: int, index: int) -> TokenizedTriplet:
    """A triplet whose sequences, prompt and response together, have exactly these lengths in tokens."""
    generator = np.random.default_rng(index)
    lengths = {"short": short - response, "long": long - response, "chosen": response, "rejected": response}
    tokens = {name: generator.integers(vocab_size, size=length) for name, length in lengths.items()}
    contexts, answers = ("short", "long"), ("chosen", "rejected")
    return TokenizedTriplet(
        f"random-{index}", index, {name: tokens[name] for name in contexts}, {name: tokens[name] for name in answers}
    )


def zero_references(objective: ObjectiveConfig, rows: int) -> ReferenceLogprobs:
    roles = required_roles(objective)
    return ReferenceLogprobs(roles, torch.zeros(rows, len(roles)))


def peak_tensor_bytes(function: Callable[[], None]) -> int:
    """The most that torch's allocator had handed out at any moment of a call, beyond what it had before. Exact."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


def head_tensor_bytes(model: ResponseModel, microbatch: Microbatch) -> int:
    """Peak of the head's forward and backward alone, the gradient of its input included."""
    hidden_T1H = torch.randn(microbatch.tokens_1t.shape[1], 1, model.config.hidden_size, requires_grad=True)
    model.zero_grad(set_to_none=True)
    unused = ("position_ids", "labels", "rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin")
    inputs = {"input_ids": microbatch.tokens_1t, "packed_seq_params": microbatch.packing} | dict.fromkeys(unused)
    return peak_tensor_bytes(lambda: model._postprocess(hidden_T1H, **inputs).sum().backward())


def measure_memory(head: str, prompt_tokens: int, response_tokens: int, vocab_size: int) -> Memory:
    """One step in a process of its own, for what a process has once freed it may use again unseen."""
    with one_process() as groups:
        model = make_model(make_architecture(_MEMORY_HIDDEN_SIZE, vocab_size), groups)
        if head == FULL_LOGITS:
            use_full_logits(model)
        lengths = [min(_MEMORY_SHORT_TOKENS, prompt_tokens) + response_tokens, prompt_tokens + response_tokens]
        triplet = random_triplet(*lengths, response_tokens, vocab_size, index=0)
        pack = build_pack([triplet], required_roles(SOLOPO), groups.sequence_multiple)
        loss_function = objective_loss(SOLOPO, zero_references(SOLOPO, rows=1), groups)
        reports: list[Tensor] = []
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew: imports may have raised it
        resident_before = _resident_bytes("VmRSS")
        step_tensor_bytes = peak_tensor_bytes(
            lambda: reports.extend(run_schedule([model], [pack], loss_function, groups, forward_only=False))
        )
        return Memory(
            prompt_tokens=prompt_tokens,
            head=head,
            positions=pack.padded_tokens,
            loss=float(reports[0][0]),
            gradient_norms={name: float(parameter.grad.norm()) for name, parameter in model.named_parameters()},
            step_resident_bytes=_resident_bytes("VmHWM") - resident_before,
            step_tensor_bytes=step_tensor_bytes,
            head_tensor_bytes=head_tensor_bytes(model, shard_pack(pack, groups)),
        )


def _resident_bytes(field: str) -> int:
    # Not getrusage: a child's peak starts there at its parent's.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def disagreement(one: Memory, other: Memory) -> float:
    """Greatest relative difference of the loss and of every parameter's gradient norm."""
    pairs = [(one.loss, other.loss)]
    pairs += [(norm, other.gradient_norms[name]) for name, norm in one.gradient_norms.items()]
    return max(abs(a - b) / max(abs(a), abs(b)) for a, b in pairs)


def measure_times(short: int, long: int, response_tokens: int, repeats: int) -> Times:
    """Optimizer steps of both objectives in turn on the same triplets, after one of each that is not counted."""
    architecture = make_architecture(_TIME_HIDDEN_SIZE, _TIME_VOCAB_SIZE)
    wall: dict[str, list[float]] = {objective.name: [] for objective in OBJECTIVES}
    cpu: dict[str, list[float]] = {objective.name: [] for objective in OBJECTIVES}
    flops: dict[str, float] = {}
    with one_process() as groups:
        policy = make_policy(architecture, groups, max_steps=2 * (repeats + 1))
        for index in range(repeats + 1):
            triplet = random_triplet(short, long, response_tokens, _TIME_VOCAB_SIZE, index)
            for objective in OBJECTIVES:
                packs = [build_pack([triplet], required_roles(objective), groups.sequence_multiple)]
                loss_function = objective_loss(objective, zero_references(objective, repeats + 1), groups)
                started = time.perf_counter(), time.process_time()
                policy.step(packs, loss_function, groups)
                wall[objective.name].append(time.perf_counter() - started[0])
                cpu[objective.name].append(time.process_time() - started[1])
                flops[objective.name] = training_flops(architecture, packs)
    wall_medians = {name: statistics.median(seconds[1:]) for name, seconds in wall.items()}
    cpu_medians = {name: statistics.median(seconds[1:]) for name, seconds in cpu.items()}
    tokens_ratio = (long + 2 * short) / (2 * long)
    return Times(
        short, long, wall_medians, cpu_medians, _ratio(wall_medians), _ratio(cpu_medians), tokens_ratio, _ratio(flops)
    )


def _ratio(values: dict[str, float]) -> float:
    return values[SOLOPO.name] / values[LONG_PO.name]


def make_policy(architecture: Architecture, groups: Topology, max_steps: int) -> Policy:
    optimizer_config = OptimizerConfig()
    chunks = wrap_data_parallel([make_model(architecture, groups)], optimizer_config)
    optimizer = build_optimizer(chunks, optimizer_config)
    return Policy(chunks, optimizer, build_scheduler(optimizer, optimizer_config, max_steps))


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function of this file in a new interpreter and hand back its result."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise click.ClickException(
                f"the process of {function.__name__}{arguments} was killed, most likely for want of memory "
                f"({psutil.virtual_memory().available / _MIB:,.0f} MiB are available now); choose a smaller --vocab-size"
            ) from None


def environment() -> dict[str, Any]:
    """Where and when."""
    models = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").open() if line.startswith("model name")]
    return {
        "command": " ".join(["python", *sys.argv]),
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "cpu": f"{os.cpu_count()} x {models[0] if models else platform.machine()}",
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
        "torch": torch.__version__,
        "megatron-core": version("megatron-core"),
    }


def memory_table(rows: Sequence[Memory]) -> str:
    header = "| prompt tokens | head | positions | step, resident MiB | step, tensors MiB | head alone, tensors MiB | loss |"
    lines = [header, "|---:|---|---:|---:|---:|---:|---:|"]
    for row in rows:
        sizes = [row.step_resident_bytes, row.step_tensor_bytes, row.head_tensor_bytes]
        cells = [f"{row.prompt_tokens:,}", row.head, f"{row.positions:,}"]
        cells += [f"{size / _MIB:,.1f}" for size in sizes] + [f"{row.loss:.6f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def times_table(rows: Sequence[Times]) -> str:
    header = "| S | L | solopo s | long_po s | ratio, wall | ratio, CPU time | (L+2S)/2L | FLOPs ratio |"
    lines = [header, "|---:|---:|---:|---:|---:|---:|---:|---:|"]
    for row in rows:
        seconds = [row.wall_seconds[objective.name] for objective in OBJECTIVES]
        ratios = [row.wall_ratio, row.cpu_ratio, row.tokens_ratio, row.flops_ratio]
        cells = [f"{row.short_tokens:,}", f"{row.long_tokens:,}", *(f"{value:.2f}" for value in seconds)]
        lines.append(f"| {' | '.join(cells + [f'{value:.3f}' for value in ratios])} |")
    return "\n".join(lines)


@click.command(help=__doc__)
def main() -> None: ...
