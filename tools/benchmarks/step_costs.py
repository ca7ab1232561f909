"""What one step costs on a CPU in memory and in time; the measurements behind `cpu_benchmark.py`.

Models have one layer and random weights, and compute on one thread. Reference log-probs are zeros: a cached reference
costs a step nothing.
"""
# ruff: noqa: E402  (megatron's warnings of what is not installed must be off before it is imported)

import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore", module=r"megatron\.core")

import torch
from torch import Tensor
from transformers import LlamaConfig

from megatron_solopo.architecture.huggingface_config import Architecture, read_architecture
from megatron_solopo.config import LogprobConfig, ModelConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from megatron_solopo.data.packing import build_pack
from megatron_solopo.model.build import build_model
from megatron_solopo.model.head import PackedResponses, ResponseModel
from megatron_solopo.model.microbatch import Microbatch, shard_pack
from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.parallel import topology
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train.metrics import training_flops
from megatron_solopo.train.policy import Policy, build_optimizer, build_scheduler, wrap_data_parallel
from megatron_solopo.train.step import ReferenceLogprobs, objective_loss, run_schedule
from tools.benchmarks.cpu_counts import TensorPeak
from tools.benchmarks.random_triplets import random_triplet

RESPONSE_ONLY, FULL_LOGITS = HEADS = ("response-only", "full logits")
SOLOPO, LONG_PO = OBJECTIVES = (ObjectiveConfig(name="solopo"), ObjectiveConfig(name="long_po"))
_HEAD_DIM = 64
_MEMORY_HIDDEN_SIZE, _TIME_HIDDEN_SIZE = 128, 512
_MEMORY_SHORT_TOKENS = 1024
_TIME_VOCAB_SIZE = 4096


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
    """Steps of both objectives: medians in seconds by objective; every ratio is solopo / long_po."""

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
    resolved = resolve_model(ModelConfig(path=Path("random")), ParallelConfig(), architecture=architecture)
    (model,) = build_model(resolved, chunk_tokens=LogprobConfig().chunk_tokens, device=groups.device)
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def use_full_logits(model: ResponseModel) -> None:
    """Give the model the usual head: Megatron's loss over all positions, of which the response rows are kept."""
    postprocess = model._postprocess

    def full_logits(hidden_states: Tensor, *args: Any, packed_seq_params: Any | None = None, **kwargs: Any) -> Tensor:
        assert isinstance(packed_seq_params, PackedResponses) and packed_seq_params.response_rows is not None
        next_tokens_1T = kwargs["input_ids"].roll(-1, dims=1)
        losses_1T = postprocess(hidden_states, *args, **kwargs | {"labels": next_tokens_1T, "packed_seq_params": None})
        return -losses_1T.squeeze(0).index_select(0, packed_seq_params.response_rows)

    model._postprocess = full_logits  # type: ignore[method-assign]


def zero_references(objective: ObjectiveConfig, rows: int) -> ReferenceLogprobs:
    roles = objective.roles.all
    return ReferenceLogprobs(roles, torch.zeros(rows, len(roles)))


def peak_tensor_bytes(function: Callable[[], None]) -> int:
    """The most that torch's allocator had handed out at any moment of a call, beyond what it had before. Exact."""
    with TensorPeak() as peak:
        function()
    return peak.bytes


def head_tensor_bytes(model: ResponseModel, microbatch: Microbatch) -> int:
    """Peak of the head's forward and backward alone, the gradient of its input included."""
    hidden_T1H = torch.randn(microbatch.tokens_1t.shape[1], 1, model.config.hidden_size, requires_grad=True)
    model.zero_grad(set_to_none=True)
    unused = ("position_ids", "labels", "rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin")
    inputs = {"input_ids": microbatch.tokens_1t, "packed_seq_params": microbatch.packing} | dict.fromkeys(unused)
    return peak_tensor_bytes(lambda: torch.autograd.backward(model._postprocess(hidden_T1H, **inputs).sum()))


def measure_memory(head: str, prompt_tokens: int, response_tokens: int, vocab_size: int) -> Memory:
    """One step. Needs a fresh process: memory that was freed before can be used again without a trace."""
    with one_process() as groups:
        model = make_model(make_architecture(_MEMORY_HIDDEN_SIZE, vocab_size), groups)
        if head == FULL_LOGITS:
            use_full_logits(model)
        short = min(_MEMORY_SHORT_TOKENS, prompt_tokens) + response_tokens
        triplet = random_triplet(short, prompt_tokens + response_tokens, response_tokens, vocab_size, index=0)
        pack = build_pack(
            [triplet], SOLOPO.roles.all, groups.sequence_multiple, groups.pack_multiple(), share_prompts=False
        )
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
    flops: dict[str, list[float]] = {objective.name: [] for objective in OBJECTIVES}
    with one_process() as groups:
        config = OptimizerConfig()
        chunks = wrap_data_parallel([make_model(architecture, groups)], config, ParallelConfig())
        optimizer = build_optimizer(chunks, config)
        policy = Policy(chunks, optimizer, build_scheduler(optimizer, config, max_steps=2 * (repeats + 1)))
        for index in range(repeats + 1):
            triplet = random_triplet(short, long, response_tokens, _TIME_VOCAB_SIZE, index)
            for objective in OBJECTIVES:
                packs = [
                    build_pack(
                        [triplet],
                        objective.roles.all,
                        groups.sequence_multiple,
                        groups.pack_multiple(),
                        share_prompts=False,
                    )
                ]
                loss_function = objective_loss(objective, zero_references(objective, repeats + 1), groups)
                wall_start, cpu_start = time.perf_counter(), time.process_time()
                policy.step(packs, loss_function, groups)
                wall[objective.name].append(time.perf_counter() - wall_start)
                cpu[objective.name].append(time.process_time() - cpu_start)
                flops[objective.name].append(training_flops(architecture, packs))
    medians = [{name: statistics.median(each[1:]) for name, each in values.items()} for values in (wall, cpu, flops)]
    wall_ratio, cpu_ratio, flops_ratio = (each[SOLOPO.name] / each[LONG_PO.name] for each in medians)
    return Times(
        short_tokens=short,
        long_tokens=long,
        wall_seconds=medians[0],
        cpu_seconds=medians[1],
        wall_ratio=wall_ratio,
        cpu_ratio=cpu_ratio,
        tokens_ratio=(long + 2 * short) / (2 * long),
        flops_ratio=flops_ratio,
    )
