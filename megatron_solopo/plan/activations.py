"""Bytes that forward keeps for backward, by what keeps them.

Two tables, one per implementation of the layers. `local` (plain PyTorch, what a CPU runs) was read off the tensors that
autograd saves, and tests hold it against them. `transformer_engine` follows Transformer Engine's modules: the input of
each matrix product, queries, keys and values before and after rotation, the attention output. It is not measured.

Shapes: t tokens of a pack on this rank (T / CP); H hidden, F feed-forward, q and k query and key widths.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.architecture.layout import padded_vocab_size
from megatron_solopo.config import Config
from megatron_solopo.plan.parameters import Chunk
from megatron_solopo.plan.workload import PackShape

_FP32 = 4
_INT64 = 8


@dataclass(frozen=True)
class LayerBytes:
    """Bytes per token of one layer, by what saves them."""

    boundary: float
    """The layer's input, all that full recomputation keeps."""
    norms: float
    attention: float
    core_attention: float
    """What `recompute_modules: [core_attn]` computes again."""
    mlp: float
    """What `recompute_modules: [mlp]` computes again."""


def uses_local_layers(config: Config) -> bool:
    """Whether a GPU would run plain PyTorch layers (see `model.implementation`)."""
    return config.model.implementation == "local" or config.model.dtype == "float32"


def element_bytes(config: Config) -> int:
    """Of an activation."""
    return _FP32 if config.model.dtype == "float32" else 2


def layer_bytes(architecture: ModelShape, config: Config, *, local: bool) -> LayerBytes:
    """Per token of this rank."""
    a, e, tp = architecture, element_bytes(config), config.parallel.tensor_model_parallel_size
    queries, keys = a.num_attention_heads * a.head_dim / tp, max(a.num_query_groups / tp, 1) * a.head_dim
    heads, ffn = a.num_attention_heads / tp, a.ffn_hidden_size / tp
    share = 1 / _sequence_shards(config)
    hidden = a.hidden_size * share
    lse = _FP32 * heads
    # With more ranks than key-value heads, Megatron gathers queries, keys and values of all ranks and takes its part.
    whole_heads = a.num_attention_heads + 2 * a.num_query_groups
    mixed = queries + 2 * keys if tp <= a.num_query_groups else whole_heads * a.head_dim
    if local:
        cp = config.parallel.context_parallel_size
        # Mixed queries, keys and values live as long as their last view, the values: core attention's input.
        before = mixed + keys
        # Under context parallelism it gathers keys and values, and keeps those instead.
        gathered = 2 * keys * cp - before if cp > 1 else 0.0
        norm = (2 * _FP32 + e) * hidden + _FP32 * share  # the input and its normalised form in fp32, the output
        head_norms = (2 * _FP32 * (queries + keys) + 2 * _FP32 * heads) if a.qk_layernorm else 0
        return LayerBytes(
            boundary=e * hidden,
            norms=2 * norm,
            attention=e * (before + queries + queries) + 4 * e * a.head_dim + head_norms,
            core_attention=e * (queries + gathered) + lse,
            mlp=5 * e * ffn,  # both halves, the activated gate, the other half shifted, their product
        )
    fp8 = config.model.fp8 is not None
    product_input = 1 if fp8 else e  # Transformer Engine keeps the inputs of its products in FP8
    head_norms = e * (queries + keys) if a.qk_layernorm else 0
    return LayerBytes(
        boundary=e * hidden,
        norms=2 * (e + product_input) * hidden + 2 * _FP32 * share,
        attention=e * (mixed + queries + keys) + head_norms + (queries if fp8 else 0),
        core_attention=e * queries + lse,
        mlp=2 * e * ffn + product_input * ffn,
    )


@dataclass(frozen=True)
class SavedRate:
    """What one chunk keeps of a pack between forward and backward: bytes per token and per response row."""

    layers: float
    norm: float
    """The final norm, on the last stage."""
    other: float
    """Token ids, and the tensor received from the stage before."""
    row: float
    """A response row's hidden state."""
    logits: float
    """A response row's logits, kept where all rows make one chunk of `logprob.chunk_tokens`."""
    chunk_rows: int
    context_parallel_size: int

    def head(self, pack: PackShape) -> float:
        """Bytes of the head for a pack."""
        row = self.row + (self.logits if pack.response_rows <= self.chunk_rows else 0)
        return self.norm * pack.padded_tokens / self.context_parallel_size + row * pack.response_rows

    def total(self, pack: PackShape) -> float:
        """Bytes for a pack."""
        return (self.layers + self.other) * pack.padded_tokens / self.context_parallel_size + self.head(pack)


def saved_rate(architecture: ModelShape, config: Config, chunk: Chunk, *, local: bool) -> SavedRate:
    """The rates of one chunk; `local`: of plain PyTorch layers."""
    each = layer_bytes(architecture, config, local=local)
    whole = each.norms + each.attention + each.core_attention + each.mlp
    parallel = config.parallel
    layers = chunk.num_layers * whole
    received = 0.0 if chunk.has_embedding or not local else each.boundary
    if parallel.recompute_granularity == "selective":
        again = {"core_attn": _freed_by_core_attention(each, local), "mlp": each.mlp}
        layers -= chunk.num_layers * sum(again[name] for name in parallel.recompute_modules)
    elif parallel.recompute_granularity == "full":
        layers, received = _fully_recomputed(config, chunk, each.boundary, whole), 0.0
    elif parallel.cpu_offloading_num_layers:
        layers -= parallel.cpu_offloading_num_layers * whole
    tp, e = parallel.tensor_model_parallel_size, element_bytes(config)
    hidden = architecture.hidden_size
    return SavedRate(
        layers=layers,
        norm=(2 * _FP32 if local else e) * hidden / _sequence_shards(config) if chunk.has_head else 0.0,
        other=received + (_INT64 if chunk.has_embedding else 0),
        row=e * hidden if chunk.has_head else 0.0,
        logits=_FP32 * padded_vocab_size(architecture.vocab_size, tp) / tp if chunk.has_head else 0.0,
        chunk_rows=config.logprob.chunk_tokens,
        context_parallel_size=parallel.context_parallel_size,
    )


def _sequence_shards(config: Config) -> int:
    """Ranks that share the positions outside attention."""
    return config.parallel.tensor_model_parallel_size if config.parallel.uses_sequence_parallel else 1


def _freed_by_core_attention(each: LayerBytes, local: bool) -> float:
    """The output projection keeps the attention output itself; only plain layers keep a second one."""
    return each.core_attention if local else 0.0


def _fully_recomputed(config: Config, chunk: Chunk, boundary: float, whole: float) -> float:
    count = config.parallel.recompute_num_layers
    if config.parallel.recompute_method == "uniform":
        return -(-chunk.num_layers // count) * boundary
    again = min(count, chunk.num_layers)
    return again * boundary + (chunk.num_layers - again) * whole


def rotary_bytes(architecture: ModelShape, longest: int) -> int:
    """The table of angles, fp32, one row per position up to the power of two that holds the longest sequence."""
    return _FP32 * architecture.head_dim * (1 << (longest - 1).bit_length())


def recomputed_bytes(
    architecture: ModelShape, config: Config, chunks: Sequence[Chunk], pack: PackShape, *, local: bool
) -> float:
    """What backward makes again and keeps for a moment, beyond what it has freed by then: a layer, or parts of it.

    `recompute_method: block` computes the first layers again, when those behind them have been freed.
    """
    parallel = config.parallel
    each = layer_bytes(architecture, config, local=local)
    again = 0.0
    if parallel.recompute_granularity == "full":
        count = parallel.recompute_num_layers
        whole = each.norms + each.attention + each.core_attention + each.mlp
        if parallel.recompute_method == "uniform":
            again = count * whole
        elif count >= chunks[0].num_layers:
            again = whole
    elif parallel.recompute_granularity == "selective":
        again = max({"core_attn": each.core_attention, "mlp": each.mlp}[name] for name in parallel.recompute_modules)
    return again * pack.padded_tokens / parallel.context_parallel_size


def logits_bytes(architecture: ModelShape, config: Config, pack: PackShape) -> float:
    """fp32 logits of one chunk of response rows, which is the most that exists at a time."""
    tp = config.parallel.tensor_model_parallel_size
    rows = min(pack.response_rows, config.logprob.chunk_tokens)
    return rows * _FP32 * padded_vocab_size(architecture.vocab_size, tp) / tp


def working_bytes(
    architecture: ModelShape, config: Config, chunks: Sequence[Chunk], pack: PackShape, *, local: bool
) -> float:
    """What backward needs for a moment beside what was saved: what is recomputed, gradients, a chunk of logits.

    The greater of a layer's backward (with the gradients around its widest product and, under sequence parallelism,
    gathered inputs) and the head's (logits of one chunk of rows and their gradient in the model's precision).
    """
    a, e, parallel = architecture, element_bytes(config), config.parallel
    tokens = pack.padded_tokens / parallel.context_parallel_size
    boundary = layer_bytes(a, config, local=local).boundary
    gathered = 2 * e * a.hidden_size if parallel.uses_sequence_parallel else 0
    gradients = 3 * e * a.ffn_hidden_size / parallel.tensor_model_parallel_size + 2 * boundary + gathered
    layer = recomputed_bytes(a, config, chunks, pack, local=local) + tokens * gradients
    if not any(chunk.has_head for chunk in chunks):
        return layer
    logits = logits_bytes(a, config, pack) * (1 if e == _FP32 else (_FP32 + e) / _FP32)
    return max(layer, logits + 2 * tokens * boundary)
