#!/usr/bin/env python3
"""Measure on a CPU what the response-only head saves in memory and what short-to-long training saves in time.

    python tools/cpu_benchmark.py --json benchmark.json

Memory: forward and backward of one SoLo-DPO triplet, each in a fresh process, with the response-only head and with
Megatron's own output layer and cross-entropy over every position (full logits), which must give the same loss and
gradients. Time: a whole optimizer step of `solopo` against one of `long_po` on the same random triplets. Models are
small with random weights; reference log-probs are zeros, since a cached reference costs a step nothing.
"""

import os
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import LlamaConfig

from megatron_solopo.config import LogprobConfig, ModelConfig, ObjectiveConfig, ParallelConfig
from megatron_solopo.data.packing import Pack, TokenizedTriplet, build_pack
from megatron_solopo.objective import required_roles
from megatron_solopo.parallel.topology import Topology

# Megatron tells every process what it does without; nothing here needs it.
warnings.filterwarnings("ignore", module=r"megatron\.core")

from megatron_solopo.model.architecture import Architecture, read_architecture
from megatron_solopo.model.build import build_model
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.model.microbatch import shard_pack
from megatron_solopo.train.step import ReferenceLogprobs, objective_loss, run_schedule

Head = Literal["response-only", "full logits"]
HEADS: tuple[Head, Head] = ("response-only", "full logits")
OBJECTIVES = {name: ObjectiveConfig(name=name) for name in ("solopo", "long_po")}
AGREEMENT = 1e-4
_MEMORY_SHORT_TOKENS = 1024
_GIB, _MIB = 2**30, 2**20


@dataclass(frozen=True)
class Shape:
    """A one-layer Llama."""

    hidden_size: int
    num_heads: int
    vocab_size: int


@dataclass(frozen=True)
class Memory:
    """One step with one head. Bytes; `step` is the whole forward and backward, `head` is the head alone."""

    prompt_tokens: int
    head: Head
    positions: int
    """Tokens of the pack: all sequences of the triplet."""
    loss: float
    embedding_gradient_norm: float
    output_gradient_norm: float
    step_resident_bytes: int
    """Peak resident memory of the process during the step, less what was resident just before it."""
    step_tensor_bytes: int
    """Peak of what torch's allocator handed out during the same step."""
    head_tensor_bytes: int
    """The same of the head's forward and backward, given the last layer's output."""


@dataclass(frozen=True)
class Times:
    """Medians over the repeats, in seconds; ratios are solopo / long_po."""

    short_tokens: int
    long_tokens: int
    seconds: dict[str, float]
    cpu_seconds: dict[str, float]
    ratio: float
    cpu_ratio: float
    tokens_ratio: float
    """(L + 2S) / 2L."""
    flops_ratio: float


def make_architecture(shape: Shape) -> Architecture:
    """Read back from a Hugging Face config, as training does."""
    config = LlamaConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=4 * shape.hidden_size,
        num_hidden_layers=1,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=max(shape.num_heads // 2, 1),
        vocab_size=shape.vocab_size,
        tie_word_embeddings=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return read_architecture(Path(folder))


def make_model(architecture: Architecture, groups: Topology) -> ResponseModel:
    """Random weights, the same in every process."""
    (model,) = build_model(
        architecture,
        ModelConfig(path=Path("random weights")),
        ParallelConfig(),
        chunk_tokens=LogprobConfig().chunk_tokens,
        device=groups.device,
    )
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def use_full_logits(model: ResponseModel) -> None:
    """Give the model the usual head: Megatron's loss over all positions, of which the response rows are kept."""
    postprocess = model._postprocess

    def full_logits(
        hidden_states: Tensor, *, input_ids: Tensor, labels: None, packed_seq_params: Any, **rest: Any
    ) -> Tensor:
        next_tokens_1T = input_ids.roll(-1, dims=1)
        losses_1T = postprocess(
            hidden_states, input_ids=input_ids, labels=next_tokens_1T, packed_seq_params=None, **rest
        )
        return -losses_1T.squeeze(0).index_select(0, packed_seq_params.response_rows)

    model._postprocess = full_logits


def random_triplet(short_tokens: int, long_tokens: int, response_tokens: int, vocab_size: int, index: int) -> Any:
    """A triplet whose sequences, prompt and response, have exactly these lengths."""
    generator = np.random.default_rng(index)

    def tokens(length: int) -> Any:
        return generator.integers(vocab_size, size=length)

    return TokenizedTriplet(
        id=f"random-{index}",
        index=index,
        prompts={"short": tokens(short_tokens - response_tokens), "long": tokens(long_tokens - response_tokens)},
        responses={"chosen": tokens(response_tokens), "rejected": tokens(response_tokens)},
    )


def make_pack(triplet: TokenizedTriplet, objective: ObjectiveConfig, groups: Topology) -> Pack:
    """One triplet, the sequences that the objective reads."""
    return build_pack([triplet], required_roles(objective), groups.sequence_multiple)


def zero_references(objective: ObjectiveConfig, rows: int) -> ReferenceLogprobs:
    """What a cached reference costs: nothing."""
    roles = required_roles(objective)
    return ReferenceLogprobs(roles, torch.zeros(rows, len(roles)))


def peak_tensor_bytes(function: Callable[[], None]) -> int:
    """Most bytes that torch's allocator had handed out at any moment of a call, beyond those before it. Exact."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as trace:
        function()
    events = [event for event in trace.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes))


def head_tensor_bytes(model: ResponseModel, pack: Pack, groups: Topology) -> int:
    """Peak of the head's forward and backward alone, the gradient of its input included."""
    microbatch = shard_pack(pack, groups)
    hidden_T1H = torch.randn(pack.padded_tokens, 1, model.config.hidden_size, requires_grad=True)
    model.zero_grad(set_to_none=True)
    nothing = dict.fromkeys(("position_ids", "labels", "rotary_pos_emb", "rotary_pos_cos", "rotary_pos_sin"))

    def forward_backward() -> None:
        model._postprocess(
            hidden_T1H, input_ids=microbatch.tokens_1t, packed_seq_params=microbatch.packing, **nothing
        ).sum().backward()

    return peak_tensor_bytes(forward_backward)


def measure_memory(shape: Shape, prompt_tokens: int, response_tokens: int, head: Head) -> Memory:
    """Run in a process of its own: the peak of a process never falls."""
    torch.set_num_threads(1)
    objective = OBJECTIVES["solopo"]
    with single_process() as groups:
        model = make_model(make_architecture(shape), groups)
        if head == "full logits":
            use_full_logits(model)
        short_tokens = min(_MEMORY_SHORT_TOKENS, prompt_tokens) + response_tokens
        triplet = random_triplet(short_tokens, prompt_tokens + response_tokens, response_tokens, shape.vocab_size, 0)
        pack = make_pack(triplet, objective, groups)
        loss_function = objective_loss(objective, zero_references(objective, rows=1), groups)
        reports: list[Tensor] = []
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, which imports have raised
        resident_before = _resident_bytes("VmRSS")
        step_bytes = peak_tensor_bytes(
            lambda: reports.extend(run_schedule([model], [pack], loss_function, groups, forward_only=False))
        )
        return Memory(
            prompt_tokens=prompt_tokens,
            head=head,
            positions=pack.padded_tokens,
            loss=float(reports[0][0]),
            embedding_gradient_norm=float(model.embedding.word_embeddings.weight.grad.norm()),
            output_gradient_norm=float(model.output_layer.weight.grad.norm()),
            step_resident_bytes=_resident_bytes("VmHWM") - resident_before,
            step_tensor_bytes=step_bytes,
            head_tensor_bytes=head_tensor_bytes(model, pack, groups),
        )


def _resident_bytes(field: str) -> int:
    # Not getrusage: a child's ru_maxrss starts at its parent's.
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024
