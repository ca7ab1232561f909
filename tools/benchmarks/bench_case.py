"""What the systems under `benchmark.py` have in common: the plan, the model and its random weights, the measurement.

Megatron is not imported here: on a machine without a GPU that adapts `torch.cuda`, which a trainer of another kind in
the same process would stumble over.
"""

import gc
import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen2Config

from megatron_solopo.data.packing import TokenizedTriplet
from megatron_solopo.errors import UserError
from tools.benchmarks.cpu_counts import TensorPeak, held_bytes
from tools.benchmarks.random_triplets import random_triplet

SOLOPO, LONG_PO, SHORT_PO, TRL = SYSTEMS = ("solopo", "long_po", "short_po", "trl")
OURS = (SOLOPO, LONG_PO, SHORT_PO)
OK, OUT_OF_MEMORY, NOT_TRIED, FAILED = "ok", "out of memory", "not tried", "failed"
_INIT_STD = 0.02
Emit = Callable[..., None]
"""`emit(kind, **values)`: one message to the process that started this one."""


def _shape(hidden: int, ffn: int, layers: int, heads: int, kv_heads: int, vocab: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
    }


SHAPES = {
    "tiny": _shape(64, 160, 2, 4, 2, 512, True),
    "small": _shape(512, 1408, 4, 8, 4, 8192, True),
    "qwen2.5-0.5b": _shape(896, 4864, 24, 14, 2, 151936, True),
    "qwen2.5-1.5b": _shape(1536, 8960, 28, 12, 2, 151936, True),
    "qwen2.5-3b": _shape(2048, 11008, 36, 16, 2, 151936, True),
    "qwen2.5-7b": _shape(3584, 18944, 28, 28, 4, 152064, False),
    "qwen2.5-14b": _shape(5120, 13824, 48, 40, 8, 152064, False),
}


def model_config(shape: str, layers: int | None, longest: int) -> Qwen2Config:
    """The published shape, with other layers where asked for and room for the longest sequence."""
    values = SHAPES[shape] | ({"num_hidden_layers": layers} if layers else {})
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return Qwen2Config(**values, rope_parameters=rope, rms_norm_eps=1e-6, max_position_embeddings=max(longest, 131072))


@dataclass(frozen=True)
class Plan:
    """What each process of a benchmark is to measure."""

    model_path: str
    """Directory that holds config.json alone."""
    vocab_size: int
    configs: dict[str, dict[str, Any]]
    """By name: the training configuration of our systems and, in order, what to fall back to where memory runs out."""
    systems: list[str]
    long_tokens: list[int]
    short_tokens: int
    response_tokens: int
    triplets: int
    """Per step."""
    warmup: int
    steps: int
    trl_variants: list[str]
    """Those to try; none: all that this machine can run."""
    every_variant: bool
    profile: str | None
    """Directory for traces."""

    @property
    def config(self) -> dict[str, Any]:
        """The first configuration; TRL takes precision, beta and the optimizer's numbers from it."""
        return next(iter(self.configs.values()))

    def write(self, path: Path) -> Path:
        path.write_text(json.dumps(vars(self)), encoding="utf-8")
        return path

    def batch(self, long_tokens: int) -> list[TokenizedTriplet]:
        """The triplets of every step at this length."""
        sizes = (self.short_tokens, long_tokens, self.response_tokens, self.vocab_size)
        return [random_triplet(*sizes, index) for index in range(self.triplets)]

    def trace_path(self, system: str, long_tokens: int) -> Path | None:
        return Path(self.profile) / f"{system}-{long_tokens}.json.gz" if self.profile else None


@dataclass
class Measurement:
    """Steps of one system at one length."""

    system: str
    long_tokens: int
    status: str = OK
    detail: str = ""
    variant: str = ""
    """How it was run, where there is a choice."""
    seconds: list[float] = field(default_factory=list)
    """Of the steps that count."""
    cpu_seconds: list[float] = field(default_factory=list)
    """Of the same steps: the processor time of all threads of the process, which waits for nothing else."""
    losses: list[float] = field(default_factory=list)
    """Of all steps, warm-up included."""
    grad_norms: list[float] = field(default_factory=list)
    allocated_bytes: int | None = None
    """Peak of tensors in any step but the first ones. On a CPU: in the last step of the warm-up, None if that is the
    first step."""
    held_bytes: int | None = None
    """Of these, what stays from step to step: the model, its optimizer, and gradients in buffers. On a CPU alone."""
    forward_flops: int | None = None
    """Of the matrix products of a forward pass, as torch counts them: without attention. On a CPU alone; TRL: None."""
    step_flops: int | None = None
    """The same of the first whole step."""
    reserved_bytes: int | None = None
    """Peak of what the allocator took from the device in the last step of the warm-up, which starts with an empty
    cache: later, systems that share a process share a cache."""
    profile: dict[str, Any] | None = None


class StepMeter:
    """Takes time and memory of the steps of one measurement, the warm-up's memory (but not its time) included."""

    def __init__(self, measurement: Measurement, warmup: int) -> None:
        self.measurement, self.warmup = measurement, warmup
        self.started_steps = 0
        self._start = self._cpu_start = 0.0
        self._flops, self._peak, self._counting = FlopCounterMode(display=False), TensorPeak(), ExitStack()

    def begin(self, held: Callable[[], Iterable[Tensor]]) -> None:
        """Start a step; `held` returns the tensors that stay from step to step."""
        self.started_steps += 1
        if not torch.cuda.is_available():
            self._begin_counts(held)
        if torch.cuda.is_available() and self.started_steps >= self.warmup:
            if self.started_steps == self.warmup:
                torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        self._start, self._cpu_start = time.perf_counter(), time.process_time()

    def _begin_counts(self, held: Callable[[], Iterable[Tensor]]) -> None:
        if self.started_steps == 1:
            self._counting.enter_context(self._flops)
        elif self.started_steps == self.warmup:
            self.measurement.held_bytes = held_bytes(held())
            self._counting.enter_context(self._peak)

    def _end_counts(self) -> None:
        self._counting.close()
        if self.started_steps == 1:
            self.measurement.step_flops = self._flops.get_total_flops()
        elif self.started_steps == self.warmup:
            self.measurement.allocated_bytes = (self.measurement.held_bytes or 0) + self._peak.bytes

    def abandon(self) -> None:
        """End a step that failed: its counts would go on in the next one."""
        self._counting.close()

    def end(self) -> None:
        synchronize()
        seconds, cpu_seconds = time.perf_counter() - self._start, time.process_time() - self._cpu_start
        result = self.measurement
        if not torch.cuda.is_available():
            self._end_counts()
        if self.started_steps > self.warmup:
            result.seconds.append(seconds)
            result.cpu_seconds.append(cpu_seconds)
        if torch.cuda.is_available() and self.started_steps >= self.warmup:
            result.allocated_bytes = max(result.allocated_bytes or 0, torch.cuda.max_memory_allocated())
            if self.started_steps == self.warmup:
                result.reserved_bytes = torch.cuda.max_memory_reserved()

    @contextmanager
    def step(self, held: Callable[[], Iterable[Tensor]]) -> Iterator[None]:
        self.begin(held)
        try:
            yield
        except BaseException:
            self.abandon()
            raise
        self.end()


def synchronize() -> None:
    """Wait for the device, so that a clock sees its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def free_memory() -> None:
    """Hand back to the device whatever nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: BaseException) -> bool:
    """Libraries beside torch (cuBLAS, cuDNN) report it as a RuntimeError of their own wording."""
    words = ("out of memory", "ALLOC_FAILED", "can't allocate memory")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(word in str(error) for word in words)
    )


def first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]


def random_tensor(name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The weight of this name: the same in every process on the same kind of device. Norms are 1, adapters' B is 0."""
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=dtype, device=device)
    if ".lora_B." in name:
        return torch.zeros(shape, dtype=dtype, device=device)
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
    generator = torch.Generator(device).manual_seed(seed)
    return torch.empty(shape, device=device).normal_(std=_INIT_STD, generator=generator).to(dtype)


def random_model(plan: Plan, attention: str) -> PreTrainedModel:
    """transformers' own model with the weights that our systems have."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, plan.config["model"]["dtype"])
    config = AutoConfig.from_pretrained(plan.model_path)
    with device:
        model = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
            config, dtype=dtype, attn_implementation=attention
        )
    model.to(device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(random_tensor(name, parameter.shape, dtype, device))
    assert isinstance(model, PreTrainedModel)
    return model


def worker_main(run: Callable[[Plan, Emit], None]) -> None:
    """Entry of a process that measures: its arguments are the plan's file and the descriptor to report to."""
    plan = Plan(**json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))
    with os.fdopen(int(sys.argv[2]), "w", buffering=1) as stream:

        def emit(kind: str, **values: Any) -> None:
            stream.write(json.dumps({"kind": kind, **values}) + "\n")

        try:
            run(plan, emit)
        except UserError as error:  # what does not fit, in one line
            emit("error", text=str(error))
