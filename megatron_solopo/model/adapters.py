"""Adapters (LoRA, arXiv 2106.09685) beside Megatron-Core's linear layers, local or Transformer Engine's.

y = W x + scaling * B A x. An adapter adds its part to what the linear layer returns, in a hook. So the layer itself,
its kernels and its names in checkpoints stay as they are, and W is frozen.

Tensor parallelism, of size TP:

    linear layer     A                    B                    what is exchanged
    column-parallel  whole on each rank   rows divided         A x, of the rank's columns alone
    row-parallel     columns divided      whole on each rank   A x

Under sequence parallelism A x of a column-parallel layer is computed of the rank's own tokens and gathered, and that of
a row-parallel layer is reduced and scattered. So a matrix that is whole on each rank sees a part of the tokens, and
Megatron sums its gradient over the ranks (`sequence_parallel`).
"""

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker, model_parallel_cuda_manual_seed
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from megatron_solopo.architecture.adapters import ADAPTER
from megatron_solopo.errors import UserError

Segments = tuple[tuple[str, int], ...]
"""The rows of a linear layer, in their order: PEFT's module and the number of its rows."""


@dataclass(eq=False)
class InputDropout:
    """Dropout of the inputs of a model chunk's adapters, as PEFT's `lora_dropout`. Only training passes have it.

    The masks come from Megatron's generators, which it sets back where it computes activations again. Under sequence
    parallelism its layers run with the generator of the tensor-parallel rank, so parts of a sequence have other masks.
    Otherwise they run with one that is the same on all tensor-parallel ranks, as their input is.
    """

    probability: float
    is_active: bool = False

    def __call__(self, x: Tensor, *, own_generator: bool) -> Tensor:
        """Drop numbers of x, of any shape.

        Args:
            own_generator: change to the generator of the tensor-parallel rank.
        """
        with get_cuda_rng_tracker().fork() if own_generator else nullcontext():
            return F.dropout(x, self.probability)


def begin_dropout(seed: int, step: int) -> None:
    """Let the masks of a step depend on the run's seed, the step and the layout, so that a continued run has the same.

    Ranks with other tokens or other layers have other masks.
    """
    data_rank = parallel_state.get_data_parallel_rank(with_context_parallel=True)
    place = (seed, step, data_rank, parallel_state.get_pipeline_model_parallel_rank())
    digest = hashlib.sha256(" ".join(map(str, place)).encode()).digest()
    model_parallel_cuda_manual_seed(int.from_bytes(digest[:7], "big"))


@contextmanager
def dropout_in(chunks: Sequence[torch.nn.Module], *, is_training: bool) -> Iterator[None]:
    """Within, the adapters of these chunks (wrapped or not) have dropout if `is_training`."""
    set_dropout(chunks, is_training=is_training)
    try:
        yield
    finally:
        set_dropout(chunks, is_training=False)


def set_dropout(chunks: Iterable[Any], *, is_training: bool) -> None:
    """Say whether the passes that begin now train. Activations are computed again as the latest pass says."""
    for chunk in chunks:
        while not isinstance(chunk, GPTModel):
            chunk = chunk.module
        dropout: InputDropout | None = getattr(chunk, "adapter_dropout", None)
        if dropout is not None:
            dropout.is_active = is_training


class Adapter(torch.nn.Module):
    """What all adapters have in common: the two matrices, and how a checkpoint stores them."""

    def __init__(
        self,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        config: TransformerConfig,
        group: Any,
        dropout: InputDropout | None = None,
    ) -> None:
        """Take this rank's shares of the two matrices, in float32, cast to the model's precision."""
        super().__init__()
        self._dropout = dropout
        self.lora_A = torch.nn.Parameter(lora_A.to(config.params_dtype))
        self.lora_B = torch.nn.Parameter(lora_B.to(config.params_dtype))
        self.scaling, self.group, self.sequence_parallel = scaling, group, config.sequence_parallel

    def _hidden(self, x: Tensor, modules: int, *, own_generator: bool) -> Tensor:
        """[..., in] -> [..., modules * rank]: scaling * A x. Each module drops other numbers of x, as in PEFT."""
        if self._dropout is None or not (self._dropout.is_active and self.training):
            return F.linear(x, self.lora_A) * self.scaling
        parts = [F.linear(self._dropout(x, own_generator=own_generator), each) for each in self.lora_A.chunk(modules)]
        return torch.cat(parts, dim=-1) * self.scaling

    def _divide(self, divided: Tensor, dim: int, whole: Tensor) -> None:
        """Mark the parameters as Megatron does: for the gradient's norm, and for the sum over parts of the tokens."""
        set_tensor_model_parallel_attributes(divided, True, dim, 1)
        whole.sequence_parallel = self.sequence_parallel  # type: ignore[attr-defined]

    def _sharded(self, axes: dict[str, int], prefix: str, offsets: Any, metadata: dict[str, Any]) -> dict[str, Any]:
        state: dict[str, Any] = make_sharded_tensors_for_checkpoint(
            self.state_dict(keep_vars=True),
            prefix,
            axes,
            offsets,
            tp_group=self.group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        return state


class ColumnAdapter(Adapter):
    """The adapters of all modules that one column-parallel layer computes.

    lora_A [targets * rank, in], lora_B [rows of the targets / TP, rank].
    """

    def __init__(self, *matrices: Any, targets: Sequence[str], segments: Segments, repeats: int) -> None:
        """Build the adapter.

        Args:
            matrices: see `Adapter`.
            targets: the modules that have an adapter, in the order of their matrices.
            segments: this rank's rows of the linear layer: of one repetition.
            repeats: how often the segments repeat, as queries, keys and values do for each key-value head.
        """
        super().__init__(*matrices)
        self.targets, self.segments, self.repeats = tuple(targets), segments, repeats
        self._divide(self.lora_B, 0, self.lora_A)

    def forward(self, x: Tensor) -> Tensor:
        """[s / TP or s, b, in] -> [s, b, rows / TP]."""
        hidden = self._hidden(x, len(self.targets), own_generator=False)
        if self.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=self.group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=self.group)
        of_module = dict(zip(self.targets, hidden.chunk(len(self.targets), dim=-1), strict=True))
        own = [count for module, count in self.segments if module in of_module]
        rows = iter(torch.split(self.lora_B.view(self.repeats, sum(own), -1), own, dim=1))
        parts = [
            F.linear(of_module[module], next(rows).flatten(0, 1)).view(*hidden.shape[:-1], self.repeats, count)
            if module in of_module
            else hidden.new_zeros(*hidden.shape[:-1], self.repeats, count)
            for module, count in self.segments
        ]
        return torch.cat(parts, dim=-1).flatten(-2)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As Megatron's modules have it."""
        state = self._sharded({"lora_B": 0}, prefix, sharded_offsets, metadata or {})
        if self.targets == ("gate_proj", "up_proj"):  # each rank has rows of both
            state[prefix + "lora_B"] = apply_swiglu_sharded_factory(state[prefix + "lora_B"], sharded_offsets)
        return state


class RowAdapter(Adapter):
    """The adapter of a row-parallel layer: lora_A [rank, in / TP], lora_B [out, rank]."""

    def __init__(self, *matrices: Any) -> None:
        super().__init__(*matrices)
        self._divide(self.lora_A, 1, self.lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """[s, b, in / TP] -> [s / TP or s, b, out]."""
        # Its features are parts. Megatron has changed the generator under sequence parallelism.
        hidden = self._hidden(x, 1, own_generator=not self.sequence_parallel)
        if self.sequence_parallel:
            hidden = reduce_scatter_to_sequence_parallel_region(hidden, group=self.group)
        else:
            hidden = reduce_from_tensor_model_parallel_region(hidden, group=self.group)
        return F.linear(hidden, self.lora_B)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: Any = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """As Megatron's modules have it."""
        return self._sharded({"lora_A": 1}, prefix, sharded_offsets, metadata or {})


def attach(parent: torch.nn.Module, name: str, adapter: Adapter) -> None:
    """Let the linear layer `name` of `parent` add what its adapter returns. The adapter is `{name}_adapter`."""
    linear: Any = getattr(parent, name)
    setattr(parent, name + ADAPTER, adapter)
    if hasattr(linear, "return_layernorm_output"):  # Transformer Engine's layer has the norm within
        linear.return_layernorm_output = True

    def add(module: torch.nn.Module, arguments: tuple[Any, ...], output: tuple[Any, Any]) -> tuple[Any, Any]:
        result, bias = output
        normed = arguments[0]
        if isinstance(result, tuple):
            result, normed = result
        return result + adapter(normed), bias

    linear.register_forward_hook(add)


def freeze_base(chunk: GPTModel) -> None:
    """Let no parameter learn. Call it before adapters are attached.

    Where activations are computed again, a layer must have an input with a gradient, or its adapters get none. So the
    embeddings have one, which ends there.
    """
    chunk.requires_grad_(False)
    chunk.has_adapters = True
    if chunk.pre_process and chunk.config.recompute_granularity is not None:
        chunk.embedding.register_forward_hook(
            lambda module, arguments, output: output.requires_grad_(torch.is_grad_enabled())
        )


def has_adapters(chunk: torch.nn.Module) -> bool:
    """Whether a model chunk's base is frozen, and adapters alone are trained and saved."""
    return getattr(chunk, "has_adapters", False)


class StoresAdapters:
    """A base class of model chunks with adapters in other trainers: their checkpoints hold the adapters alone."""

    def sharded_state_dict(self, *arguments: Any, **keywords: Any) -> dict[str, Any]:
        """What a checkpoint stores."""
        state: dict[str, Any] = super().sharded_state_dict(*arguments, **keywords)  # type: ignore[misc]
        return {name: value for name, value in state.items() if ADAPTER in name}

    def load_state_dict(self, state: dict[str, Any], strict: bool = True) -> Any:
        """Load adapters. The base stays as it is.

        Args:
            state: all adapters of the chunk, and nothing else.
            strict: has no effect. Megatron-LM catches a strict error and loads once more without it.

        Raises UserError naming an adapter that the state lacks, or an entry that the chunk has no place for.
        """
        missing, unexpected = super().load_state_dict(state, strict=False)  # type: ignore[misc]
        missing = [name for name in missing if ADAPTER in name]
        for problem, names in (("lacks", missing), ("has entries of no adapter here:", list(unexpected))):
            if names:
                raise UserError(
                    f"--load: the checkpoint {problem} {', '.join(names[:3])} ({len(names)} in all); give a checkpoint "
                    "of this model with the same --solopo-lora-* flags"
                )
        return torch.nn.modules.module._IncompatibleKeys([], [])


def cut_segments(segments: Segments, start: int, stop: int) -> Iterator[tuple[str, int]]:
    """The rows [start, stop) of segments."""
    for module, count in segments:
        own = min(stop, count) - max(start, 0)
        if own > 0:
            yield module, own
        start, stop = start - count, stop - count


def kaiming_uniform(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """PEFT's start of a module's A, [rank, columns]."""
    return torch.empty(shape).uniform_(-1, 1, generator=generator) / math.sqrt(shape[1])
