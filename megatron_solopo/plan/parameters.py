"""Parameters of every pipeline stage, and the buffers that Megatron lays them out in. The sizes are exact.

The layout follows megatron/core/distributed/param_and_grad_buffer.py. Parameters come in reverse order. Under the
distributed optimizer, each is aligned to 64 elements, and each bucket is padded to a multiple of lcm(ranks, 128). The
first chunk of the first stage has several buckets if their reduction overlaps with backward; another chunk has one.
Embeddings that are shared with the last stage have a bucket of their own.

Experts that expert parallelism divides have buffers of their own, because other ranks share their gradients. Without
expert parallelism they lie among the other parameters. What does not learn is in no buffer: frozen routers, and beside
adapters the whole base.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from megatron_solopo.architecture.adapters import adapter_sizes
from megatron_solopo.architecture.experts import ExpertShape
from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.architecture.layout import padded_vocab_size
from megatron_solopo.architecture.pipeline_layout import stage_layers
from megatron_solopo.config import Config, ModelConfig, ParallelConfig
from megatron_solopo.data.batch_plan import IntArray

_PARAMETER_ALIGNMENT = 64
_BUCKET_ALIGNMENT = 128


@dataclass(frozen=True)
class ModelChunk:
    """One model chunk of a pipeline rank: consecutive layers, and perhaps the embedding or the head."""

    first_layer: int
    num_layers: int
    has_embedding: bool
    has_head: bool


class ParameterShard(NamedTuple):
    """One rank's shard of a parameter."""

    name: str
    """Megatron's, in a layer without the layer's number."""
    numel: int
    is_shared_embedding: bool = False
    is_fp8: bool = False
    is_expert: bool = False
    """Whether expert parallelism divides it. With `expert_model_parallel_size` of 1, experts count as dense."""
    is_router: bool = False
    is_adapter: bool = False


@dataclass(frozen=True, eq=False)
class ParameterBuffer:
    """Where Megatron puts the parameters of one precision."""

    spans_P2: IntArray
    """[start, end) of each of P parameters, in elements."""
    buckets_B2: IntArray
    """[start, end) of each of B buckets, in elements."""
    is_fp8: bool

    @property
    def numel(self) -> int:
        """Elements with padding."""
        return int(self.buckets_B2[-1, 1])

    def owned(self, size: int) -> IntArray:
        """Elements without padding whose optimizer state belongs to each of `size` ranks: int64 [size]."""
        starts, ends = self.spans_P2.T
        before = np.concatenate([[0], (ends - starts).cumsum()])  # elements of the spans in front of each one
        starts = np.append(starts, np.iinfo(np.int64).max)
        first, last = self.buckets_B2.T[:, :, None]
        bounds = first + np.arange(size + 1) * ((last - first) // size)  # [B, size + 1]
        span = ends.searchsorted(bounds, side="right")  # the first one that ends behind a bound
        until = before[span] + np.maximum(bounds - starts[span], 0)
        total: IntArray = (until[:, 1:] - until[:, :-1]).sum(axis=0)
        return total


def model_chunks(architecture: ModelShape, parallel: ParallelConfig, pipeline_rank: int) -> list[ModelChunk]:
    """The chunks of a pipeline rank: chunk v of rank p is virtual stage v x PP + p."""
    size, count = parallel.pipeline_model_parallel_size, parallel.virtual_pipeline_model_parallel_size or 1
    layers = stage_layers(architecture.num_layers, parallel)
    stages = [chunk * size + pipeline_rank for chunk in range(count)]
    return [ModelChunk(sum(layers[:each]), layers[each], each == 0, each == size * count - 1) for each in stages]


class ShardSizes(NamedTuple):
    """What divides the parameters of a chunk."""

    tp: int
    ep: int
    etp: int
    is_pipelined: bool

    @classmethod
    def of(cls, parallel: ParallelConfig) -> "ShardSizes":
        """Those of a layout."""
        return cls(
            parallel.tensor_model_parallel_size,
            parallel.expert_model_parallel_size,
            parallel.expert_tensor_size,
            parallel.pipeline_model_parallel_size > 1,
        )


def sharing_ranks(parallel: ParallelConfig, data_parallel_size: int, *, is_expert: bool) -> int:
    """Ranks of a pipeline stage that hold the same numbers of a parameter, and share its gradient.

    They are DP x CP ranks, or TP x CP x DP / (EP x expert TP) of an expert that expert parallelism divides.
    """
    ranks = parallel.tensor_model_parallel_size * parallel.context_parallel_size * data_parallel_size
    return ranks // ranks_of_a_copy(parallel, is_expert=is_expert)


def ranks_of_a_copy(parallel: ParallelConfig, *, is_expert: bool) -> int:
    """Consecutive ranks of a pipeline stage that hold one copy of its dense parameters, or of its experts, together."""
    return (
        parallel.expert_model_parallel_size * parallel.expert_tensor_size
        if is_expert
        else parallel.tensor_model_parallel_size
    )


def layer_adapters(architecture: ModelShape, config: Config) -> tuple[ParameterShard, ...]:
    """One rank's parameters of a layer's adapters; none without the section `lora`."""
    if config.lora is None:
        return ()
    found = adapter_sizes(architecture, config.lora, config.parallel.tensor_model_parallel_size)
    return tuple(ParameterShard(name, size, is_adapter=True) for name, size in found)


def chunk_parameters(
    architecture: ModelShape,
    model: ModelConfig,
    sizes: ShardSizes,
    chunk: ModelChunk,
    adapters: Sequence[ParameterShard] = (),
) -> list[ParameterShard]:
    """One rank's parameters of a chunk, in the order of `named_parameters` of plain PyTorch layers.

    Adapters come last in their layer. Nothing else learns beside them, so their order among themselves is what counts.

    Args:
        adapters: those of a layer.
    """
    a, tp = architecture, sizes.tp
    embedding = padded_vocab_size(a.vocab_size, tp) // tp * a.hidden_size
    shared = a.tied_embeddings and sizes.is_pipelined
    found = [ParameterShard("embedding.word_embeddings.weight", embedding, shared)] if chunk.has_embedding else []
    layers = range(chunk.first_layer, chunk.first_layer + chunk.num_layers)
    kinds = {kind: [*_layer(a, sizes, has_experts=kind), *adapters] for kind in set(map(a.has_experts, layers))}
    plain = {kind: [each._replace(is_fp8=False) for each in found] for kind, found in kinds.items()}
    for layer in layers:
        fp8 = model.fp8_param and not _in_bfloat16(architecture, model, layer)
        found += (kinds if fp8 else plain)[a.has_experts(layer)]
    if chunk.has_head:
        found.append(ParameterShard("decoder.final_layernorm.weight", a.hidden_size))
        if shared or not a.tied_embeddings:
            found.append(ParameterShard("output_layer.weight", embedding, shared))
    return found


def _layer(a: ModelShape, sizes: ShardSizes, *, has_experts: bool) -> Iterator[ParameterShard]:
    hidden, tp = a.hidden_size, sizes.tp
    queries = a.num_attention_heads * a.head_dim
    mixed = (queries + 2 * a.num_query_groups * a.head_dim) // tp
    yield ParameterShard("input_layernorm.weight", hidden)
    yield ParameterShard("self_attention.linear_proj.weight", hidden * queries // tp, is_fp8=True)
    yield ParameterShard("self_attention.linear_qkv.weight", mixed * hidden, is_fp8=True)
    if a.add_qkv_bias:
        yield ParameterShard("self_attention.linear_qkv.bias", mixed)
    if a.qk_layernorm:
        yield ParameterShard("self_attention.q_layernorm.weight", a.head_dim)
        yield ParameterShard("self_attention.k_layernorm.weight", a.head_dim)
    if a.norms_all_heads:
        yield ParameterShard("self_attention.query_norm.weight", queries // tp)
        yield ParameterShard("self_attention.key_norm.weight", a.num_query_groups * a.head_dim // tp)
    yield ParameterShard("pre_mlp_layernorm.weight", hidden)
    if a.experts is not None and has_experts:
        yield from _experts(a.experts, hidden, sizes)
    else:
        yield from _feed_forward("mlp.", a.ffn_hidden_size // tp, hidden)


def _experts(experts: ExpertShape, hidden: int, sizes: ShardSizes) -> Iterator[ParameterShard]:
    yield ParameterShard("mlp.router.weight", experts.num_experts * hidden, is_router=True)
    columns = experts.ffn_hidden_size // sizes.etp
    for expert in range(experts.num_experts // sizes.ep):
        for each in _feed_forward(f"mlp.experts.local_experts.{expert}.", columns, hidden):
            yield each._replace(is_expert=sizes.ep > 1)
    if experts.shared_ffn_hidden_size:
        yield ParameterShard("mlp.shared_experts.gate_weight", hidden)
        columns = experts.shared_ffn_hidden_size // sizes.tp
        yield from _feed_forward("mlp.shared_experts.", columns, hidden)


def _feed_forward(prefix: str, columns: int, hidden: int) -> Iterator[ParameterShard]:
    yield ParameterShard(f"{prefix}linear_fc1.weight", 2 * columns * hidden, is_fp8=True)
    yield ParameterShard(f"{prefix}linear_fc2.weight", columns * hidden, is_fp8=True)


def _in_bfloat16(architecture: ModelShape, model: ModelConfig, layer: int) -> bool:
    """Whether a layer stays in bfloat16 while others are in FP8."""
    first, last = model.num_layers_at_start_in_bf16, architecture.num_layers - model.num_layers_at_end_in_bf16
    return model.first_last_layers_bf16 and not first <= layer < last


def overlap_bucket_size(data_parallel_size: int) -> int:
    """Parameters after which Megatron ends a bucket whose reduction overlaps with backward."""
    return max(40_000_000, 1_000_000 * data_parallel_size)


def parameter_buffers(
    parameters: Sequence[ParameterShard], ranks: int, distributed: bool, bucket_size: int | None = None
) -> list[ParameterBuffer]:
    """The buffers of some parameters of a model chunk, one for each precision.

    Args:
        parameters: those whose gradients the same ranks share.
        ranks: the number of ranks that share the optimizer's state.
        distributed: whether the distributed optimizer is in use.
        bucket_size: elements after which a bucket ends. None: a buffer is one bucket.
    """
    groups = [[p for p in parameters if p.is_fp8 is fp8] for fp8 in (False, True)]
    return [_buffer(group, ranks, distributed, bucket_size) for group in groups if group]


def _buffer(
    parameters: Sequence[ParameterShard], ranks: int, distributed: bool, bucket_size: int | None
) -> ParameterBuffer:
    alignment = _PARAMETER_ALIGNMENT if distributed else 1
    bucket_alignment = math.lcm(ranks, _BUCKET_ALIGNMENT) if distributed else 1
    sizes_P = np.array([parameter.numel for parameter in reversed(parameters)], np.int64)
    alone = [place for place, each in enumerate(reversed(parameters)) if each.is_shared_embedding and distributed]
    aligned_P = -(-sizes_P // alignment) * alignment
    starts_P = aligned_P.cumsum() - aligned_P  # as if there were one bucket
    ends_P = starts_P + sizes_P
    placed_P = np.empty_like(starts_P)
    buckets: list[tuple[int, int]] = []
    first = start = 0
    while first < len(sizes_P):
        last = len(sizes_P) - 1
        if bucket_size is not None:
            last = min(last, int(ends_P.searchsorted(starts_P[first] + bucket_size)))
        for place in alone:
            if place >= first:
                last = min(last, first if place == first else place - 1)
        placed_P[first : last + 1] = start + starts_P[first : last + 1] - starts_P[first]
        end = _round_up(int(placed_P[last] + sizes_P[last]), bucket_alignment)
        buckets.append((start, end))
        first, start = last + 1, end
    return ParameterBuffer(np.stack([placed_P, placed_P + sizes_P], axis=1), np.array(buckets), parameters[0].is_fp8)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple
