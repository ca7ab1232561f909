"""Bytes that forward keeps for backward, by what keeps them.

There are two tables, one for each implementation of the layers:

- `local`: plain PyTorch, which a CPU runs. Tests hold this table against the tensors that autograd saves.
- `transformer_engine`: the input of each matrix product, queries, keys and values before and after rotation, and the
  attention output, as Transformer Engine's modules save them. This table is not measured.

Layers with experts have more: what the router and the exchange of tokens keep, and what the experts keep of the tokens
that reach them. In the first table each expert is a module of its own (SequentialMLP). In the second, one kernel
computes all experts of a rank (grouped matrix products).

Beside adapters, the base is frozen. A frozen linear layer keeps no input, and a frozen norm no normalised form. An
adapter keeps its linear layer's input and its own output of a few columns. With dropout, each of PEFT's modules keeps a
copy of the input and a mask instead.

In comments, "token" means a token of a pack on one rank: a context-parallel rank holds 1 / CP of a pack.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from megatron_solopo.architecture.adapters import adapted_linears
from megatron_solopo.architecture.experts import ExpertShape
from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.architecture.layout import padded_vocab_size
from megatron_solopo.config import Config
from megatron_solopo.plan.parameters import ModelChunk
from megatron_solopo.plan.workload import PackShape

_FP32 = 4
_INT64 = 8


@dataclass(frozen=True)
class PackBytes:
    """Bytes that grow with a pack: for each token of a rank, and for each key that its attention gathers."""

    token: float = 0.0
    key: float = 0.0
    gathering_token: float = 0.0
    """Besides `token`, for each token of a pack whose keys attention gathers."""

    def __add__(self, other: "PackBytes") -> "PackBytes":
        return PackBytes(self.token + other.token, self.key + other.key, self.gathering_token + other.gathering_token)

    def __sub__(self, other: "PackBytes") -> "PackBytes":
        return PackBytes(self.token - other.token, self.key - other.key, self.gathering_token - other.gathering_token)

    def of(self, pack: PackShape, context_parallel_size: int, *, local: bool) -> float:
        """Bytes of one pack."""
        tokens = pack.padded_tokens / context_parallel_size
        keys = gathered_keys(pack, context_parallel_size, local=local)
        return self.token * tokens + (self.gathering_token * tokens + self.key * keys if keys else 0.0)


@dataclass(frozen=True)
class LayerBytes:
    """Bytes per token that one layer keeps, unless noted."""

    boundary: float
    """The layer's input. Full recomputation keeps only this."""
    norms: float
    attention: float
    core_attention: float
    """What `recompute_modules: [core_attn]` computes again."""
    gathered: PackBytes
    """Keys and values that core attention gathers of some packs, see `gathered_keys`, less those that it then need not
    keep. It gathers them again."""
    mlp: float
    """What `recompute_modules: [mlp]` computes again."""
    experts: float = 0.0
    """What stands in the place of `mlp` in a layer with experts. Only full recomputation computes it again."""

    @property
    def total(self) -> PackBytes:
        """All bytes without recomputation; `boundary` is part of `norms`."""
        return self.gathered + PackBytes(self.norms + self.attention + self.core_attention + self.mlp + self.experts)

    def computed_again(self, config: Config) -> list[PackBytes]:
        """What selective recomputation computes again of these bytes, one after the other."""
        parts = {"core_attn": self.gathered + PackBytes(self.core_attention), "mlp": PackBytes(self.mlp)}
        return [parts[name] for name in config.parallel.recompute_modules]


def uses_local_layers(config: Config) -> bool:
    """Whether a GPU would run plain PyTorch layers (see `model.implementation`)."""
    return config.model.implementation == "local" or config.model.dtype == "float32"


def element_bytes(config: Config) -> int:
    """Bytes of one element of an activation or a weight outside FP8."""
    return _FP32 if config.model.dtype == "float32" else 2


class _Inputs(NamedTuple):
    """Bytes that are kept of each element of the linear layers' inputs; 0: it is not kept for them."""

    qkv: int
    proj: int
    fc1: int
    """Of the feed-forward, or of the router."""
    fc2: int
    experts: int
    fc1_copies: int = 0
    """Beside `fc1`: dropped copies that are made again with the feed-forward."""


def _kept_inputs(config: Config, *, local: bool, has_experts: bool) -> _Inputs:
    e = element_bytes(config)
    # Transformer Engine keeps the inputs of its products in FP8.
    product_input = 1 if config.model.fp8 is not None and not local else e
    if config.lora is None:
        return _Inputs(*[product_input] * 5)
    modules = {linear.megatron.rpartition(".")[2]: len(linear.targets) for linear in adapted_linears(config.lora)}
    # On a CPU a mask has the input's precision, and on a GPU one byte.
    dropped = e + (e if local else 1) if config.lora.dropout else 0
    qkv, proj, fc1, fc2 = (
        dropped * modules[name] or e if name in modules else 0
        for name in ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
    )
    parallel = config.parallel
    if parallel.recompute_granularity == "selective" and "mlp" in parallel.recompute_modules:
        return _Inputs(qkv, proj, e, fc2, experts=0, fc1_copies=fc1 if dropped else 0)
    # The router keeps its input, frozen or not.
    return _Inputs(qkv, proj, e if has_experts else fc1, fc2, experts=0)


def _adapter_bytes(config: Config, block: str) -> float:
    """Bytes per token of what the adapters of a layer's block return from their first matrix."""
    if config.lora is None:
        return 0.0
    # All ranks get that of a column-parallel layer, and each its share of tokens of that of a row-parallel one.
    columns = sum(
        len(linear.targets) if linear.is_column_parallel else 1 / sequence_shards(config)
        for linear in adapted_linears(config.lora)
        if linear.megatron.startswith(block)
    )
    return element_bytes(config) * config.lora.rank * columns


def gathered_keys(pack: PackShape, context_parallel_size: int, *, local: bool) -> int:
    """Keys of a pack that attention gathers and keeps, 0 if it gathers none.

    Transformer Engine's own exchange under context parallelism keeps what the rank had before.
    """
    return pack.attended_keys if pack.shares_prompts or (local and context_parallel_size > 1) else 0


def layer_bytes(architecture: ModelShape, config: Config, *, local: bool, has_experts: bool = False) -> LayerBytes:
    """What one layer of this rank keeps."""
    inputs = _kept_inputs(config, local=local, has_experts=has_experts)
    attention, mlp = (_adapter_bytes(config, block) for block in ("self_attention", "mlp"))
    found = _base_bytes(architecture, config, inputs, local=local)
    if has_experts:
        experts = _expert_bytes(architecture, config, inputs, local=local)
        return replace(found, attention=found.attention + attention, mlp=0.0, experts=experts)
    return replace(found, attention=found.attention + attention, mlp=found.mlp + mlp)


def _base_bytes(architecture: ModelShape, config: Config, inputs: _Inputs, *, local: bool) -> LayerBytes:
    """What a dense layer keeps without its adapters' own outputs."""
    a, e, tp = architecture, element_bytes(config), config.parallel.tensor_model_parallel_size
    learns = config.lora is None
    queries, keys = a.num_attention_heads * a.head_dim / tp, max(a.num_query_groups / tp, 1) * a.head_dim
    heads, ffn = a.num_attention_heads / tp, a.ffn_hidden_size / tp
    share = 1 / sequence_shards(config)
    hidden = a.hidden_size * share
    lse = _FP32 * heads  # attention's log-sum-exp, one number per token and head
    # With more ranks than key-value heads, Megatron gathers queries, keys and values of all ranks and takes its part.
    whole_heads = a.num_attention_heads + 2 * a.num_query_groups
    mixed = queries + 2 * keys if tp <= a.num_query_groups else whole_heads * a.head_dim
    # A norm keeps its input in fp32 and, where its weight learns, its normalised form.
    norm_copies = 2 if learns else 1
    # One norm over all heads has its input anyway in fp32, and normalises it in the model's precision.
    all_heads_norm = (e * learns + (0 if e == _FP32 else _FP32)) * (queries + keys) if a.norms_all_heads else 0
    # The tensor of mixed queries, keys and values lives as long as its last view, the values of core attention.
    before = mixed + keys
    # Where core attention gathers keys and values, it keeps those instead. But a norm of heads in fp32 keeps its input,
    # which is a view of the mixed tensor.
    held = mixed - queries - keys if local and a.qk_layernorm and e == _FP32 else 0.0
    gathered = PackBytes(key=2 * e * keys, gathering_token=e * (held - before))
    if local:
        norms = (2 * norm_copies * _FP32 + inputs.qkv + inputs.fc1) * hidden + 2 * _FP32 * share  # and the outputs
        head_norms = norm_copies * _FP32 * (queries + keys) + 2 * _FP32 * heads if a.qk_layernorm else all_heads_norm
        return LayerBytes(
            boundary=e * hidden,
            norms=norms,
            attention=e * (before + queries) + inputs.proj * queries + 4 * e * a.head_dim + head_norms,
            core_attention=e * queries + lse,
            gathered=gathered,
            # Both halves, the activated gate, the other half shifted, their product.
            mlp=(4 * e + inputs.fc2) * ffn + inputs.fc1_copies * hidden,
        )
    head_norms = e * (queries + keys) if a.qk_layernorm else all_heads_norm
    # The output projection's input is the attention output, of which it keeps a copy in FP8.
    copied = queries if learns and config.model.fp8 is not None else 0
    if config.lora is not None and config.lora.dropout:
        copied = inputs.proj * queries
    return LayerBytes(
        boundary=e * hidden,
        norms=(2 * e + inputs.qkv + inputs.fc1) * hidden + 2 * _FP32 * share,
        attention=e * (before + queries) + head_norms + copied,
        core_attention=e * queries + lse,
        gathered=gathered,
        mlp=(2 * e + inputs.fc2) * ffn + inputs.fc1_copies * hidden,
    )


def routed_tokens(experts: ExpertShape, config: Config) -> float:
    """Tokens that the experts of the fullest rank compute, for each token of the rank.

    Sequence parallelism divides the tokens before the router sends them. The ranks that share an expert gather them.
    """
    parallel = config.parallel
    load = experts.rank_load(parallel.expert_model_parallel_size)
    return load * experts.topk * parallel.expert_tensor_size / sequence_shards(config)


def _expert_bytes(architecture: ModelShape, config: Config, inputs: _Inputs, *, local: bool) -> float:
    """Bytes per token of a layer's router, of the exchange of tokens and of the experts."""
    a, experts, e, parallel = architecture, architecture.experts, element_bytes(config), config.parallel
    assert experts is not None
    share = 1 / sequence_shards(config)
    count, topk = experts.num_experts, experts.topk
    # The softmax; the choice; which token each copy is of; the mask and the probabilities, transposed for the exchange.
    router = _FP32 * (topk if experts.renormalizes else count) + 2 * _INT64 * topk + (1 + _FP32) * count
    ffn = experts.ffn_hidden_size / parallel.expert_tensor_size
    # As in a dense layer; and locally the product of both halves, which is multiplied by the router's probability.
    columns = ((5 if local else 2) * e + inputs.experts) * ffn
    routed = routed_tokens(experts, config) * (inputs.experts * a.hidden_size + columns + _FP32)
    shared = 0.0
    if experts.shared_ffn_hidden_size:
        width = experts.shared_ffn_hidden_size / parallel.tensor_model_parallel_size
        mlp = ((4 if local else 2) * e + inputs.experts) * width
        shared = mlp + e * (a.hidden_size + 1) * share  # and the output and its gate
    return router * share + routed + shared


@dataclass(frozen=True)
class ActivationRate:
    """What one model chunk keeps of a pack between forward and backward.

    Bytes are per token, but those of `row` and `logits` are per response row.
    """

    layers: PackBytes
    norm: float
    """The final norm, on the last stage."""
    other: float
    """Token ids, and the tensor received from the stage before."""
    row: float
    """A response row's hidden state."""
    logits: float
    """A response row's logits. They are kept only if one chunk of `logprob.chunk_tokens` holds all rows."""
    chunk_rows: int
    context_parallel_size: int
    local: bool
    aligns_tokens: bool
    """Whether kept logits come with the gradient of a divergence for each student, see `student_rows`."""

    def head(self, pack: PackShape) -> float:
        """Bytes that the head keeps of a pack."""
        kept = self.norm * pack.padded_tokens / self.context_parallel_size + self.row * pack.response_rows
        if pack.response_rows > self.chunk_rows:
            return kept
        return kept + self.logits * (pack.response_rows + student_rows(pack) * self.aligns_tokens)

    def total(self, pack: PackShape) -> float:
        """Bytes that the chunk keeps of a pack."""
        layers = (self.layers + PackBytes(self.other)).of(pack, self.context_parallel_size, local=self.local)
        return layers + self.head(pack)


def activation_rate(architecture: ModelShape, config: Config, chunk: ModelChunk, *, local: bool) -> ActivationRate:
    """The rates of one model chunk.

    Args:
        local: whether its layers are plain PyTorch.
    """
    layers = chunk_layers(architecture, config, chunk, local=local)
    parallel = config.parallel
    kept = _total(layers)
    received = layers[0].boundary if local and not chunk.has_embedding and layers else 0.0
    if parallel.recompute_granularity == "selective":
        # The output projection keeps the attention output itself; only plain layers keep a second one.
        if "core_attn" in parallel.recompute_modules:
            for layer in layers:
                kept -= layer.gathered + PackBytes(layer.core_attention if local else 0.0)
        if "mlp" in parallel.recompute_modules:
            kept -= PackBytes(sum(layer.mlp for layer in layers))
    elif parallel.recompute_granularity == "full":
        kept, received = _kept_by_full_recomputation(config, layers), 0.0
    else:
        kept -= _total(layers[: parallel.cpu_offloading_num_layers])
    tp, e = parallel.tensor_model_parallel_size, element_bytes(config)
    hidden, final_copies = architecture.hidden_size, 2 if config.lora is None else 1
    return ActivationRate(
        layers=kept,
        norm=(final_copies * _FP32 if local else e) * hidden / sequence_shards(config) if chunk.has_head else 0.0,
        other=received + (_INT64 if chunk.has_embedding and config.lora is None else 0),
        row=e * hidden if chunk.has_head else 0.0,
        logits=_FP32 * padded_vocab_size(architecture.vocab_size, tp) / tp if chunk.has_head else 0.0,
        chunk_rows=config.logprob.chunk_tokens,
        context_parallel_size=parallel.context_parallel_size,
        local=local,
        aligns_tokens=config.objective.aligns_tokens,
    )


def sequence_shards(config: Config) -> int:
    """Number of ranks that share the positions outside attention."""
    return config.parallel.tensor_model_parallel_size if config.parallel.uses_sequence_parallel else 1


def _total(layers: Sequence[LayerBytes]) -> PackBytes:
    return sum((layer.total for layer in layers), PackBytes())


def chunk_layers(architecture: ModelShape, config: Config, chunk: ModelChunk, *, local: bool) -> list[LayerBytes]:
    """What each layer of a chunk keeps."""
    experts, end = architecture.experts, chunk.first_layer + chunk.num_layers
    layers = (False,) * chunk.num_layers if experts is None else experts.layers[chunk.first_layer : end]
    kinds = {kind: layer_bytes(architecture, config, local=local, has_experts=kind) for kind in set(layers)}
    found = [kinds[kind] for kind in layers]
    if config.lora is not None and chunk.has_embedding and config.parallel.recompute_granularity is None:
        found[0] = _without_gradient(found[0], architecture, config, local=local)
    return found


def _without_gradient(layer: LayerBytes, architecture: ModelShape, config: Config, *, local: bool) -> LayerBytes:
    """The first layer beside frozen embeddings: it keeps nothing before its first adapter but that adapter's input."""
    inputs = _kept_inputs(config, local=local, has_experts=layer.experts > 0)
    hidden = architecture.hidden_size / sequence_shards(config)
    norm = (layer.norms - (inputs.qkv + inputs.fc1) * hidden) / 2
    if inputs.qkv:
        return replace(layer, norms=layer.norms - norm)
    if inputs.proj:
        width = architecture.num_attention_heads * architecture.head_dim
        of_input = inputs.proj * width / config.parallel.tensor_model_parallel_size
        return replace(
            layer,
            norms=layer.norms - norm,
            attention=_adapter_bytes(config, "self_attention") + of_input,
            core_attention=0.0,
            gathered=PackBytes(),
        )
    alone = replace(layer, norms=inputs.fc1 * hidden, attention=0.0, core_attention=0.0, gathered=PackBytes())
    if inputs.fc1:
        return alone
    ffn = architecture.ffn_hidden_size / config.parallel.tensor_model_parallel_size
    return replace(alone, mlp=_adapter_bytes(config, "mlp") + inputs.fc2 * ffn)


def _kept_by_full_recomputation(config: Config, layers: Sequence[LayerBytes]) -> PackBytes:
    count = config.parallel.recompute_num_layers
    if config.parallel.recompute_method == "uniform":
        return PackBytes(sum(layer.boundary for layer in layers[::count]))
    return PackBytes(sum(layer.boundary for layer in layers[:count])) + _total(layers[count:])


def rotary_bytes(architecture: ModelShape, longest: int) -> int:
    """Bytes of the rotary angles: fp32, one row for each position up to the next power of two."""
    return _FP32 * architecture.head_dim * (1 << (longest - 1).bit_length())


def recomputed_parts(
    architecture: ModelShape, config: Config, chunks: Sequence[ModelChunk], *, local: bool
) -> set[PackBytes]:
    """What backward computes again and keeps for a moment, beyond what it has freed by then: one part at a time.

    `recompute_method: block` computes the first layers again. The layers behind them have been freed by then.
    """
    parallel, count = config.parallel, config.parallel.recompute_num_layers
    each = [chunk_layers(architecture, config, chunk, local=local) for chunk in chunks]
    if parallel.recompute_granularity == "selective":
        return {part for layers in each for layer in layers for part in layer.computed_again(config)}
    if parallel.recompute_granularity is None:
        return set()
    if parallel.recompute_method == "uniform":
        return {_total(layers[first : first + count]) for layers in each for first in range(0, len(layers), count)}
    return {layer.total for layers in each if len(layers) <= count for layer in layers}


def recomputed_bytes(parts: Iterable[PackBytes], config: Config, pack: PackShape, *, local: bool) -> float:
    """Bytes of the greatest of `recomputed_parts`."""
    return max((part.of(pack, config.parallel.context_parallel_size, local=local) for part in parts), default=0.0)


def student_rows(pack: PackShape) -> int:
    """Most tokens of chosen answers behind the long context on any one context-parallel rank, or somewhat more."""
    return min(pack.response_rows, sum(triplet["chosen"] for triplet in pack.triplets))


def logits_bytes(architecture: ModelShape, config: Config, pack: PackShape) -> float:
    """Bytes of the fp32 logits of one chunk of response rows. No more of them exist at a time."""
    tp = config.parallel.tensor_model_parallel_size
    rows = min(pack.response_rows, config.logprob.chunk_tokens)
    return rows * _FP32 * padded_vocab_size(architecture.vocab_size, tp) / tp


def _gathering_bytes(architecture: ModelShape, config: Config, pack: PackShape, *, local: bool) -> float:
    """Bytes of the gradients of gathered keys and values in a layer, and of their sums, which are in fp32 first."""
    gathered = gathered_keys(pack, config.parallel.context_parallel_size, local=local)
    if not gathered:
        return 0.0
    a, e = architecture, element_bytes(config)
    keys = max(a.num_query_groups / config.parallel.tensor_model_parallel_size, 1) * a.head_dim
    return 2 * keys * (e * gathered + max(e, _FP32) * pack.padded_tokens)


def working_bytes(
    architecture: ModelShape, config: Config, chunks: Sequence[ModelChunk], packs: Iterable[PackShape], *, local: bool
) -> float:
    """Most bytes that backward of any of the packs needs for a moment besides what forward kept.

    This is the greater of two: the backward of a layer and that of the head. A layer needs what it computes again, and
    the greater of two again: the gradients around its widest product with, under sequence parallelism, gathered inputs;
    and the gradients of gathered keys and values. Experts need the gradients of the tokens that reach them. The head
    needs the logits of one chunk of rows and their gradient in the model's precision.
    """
    a, e, parallel = architecture, element_bytes(config), config.parallel
    boundary = layer_bytes(a, config, local=local).boundary
    # Under sequence parallelism: the gradient of a product's input, and the input itself where the weight learns.
    gathered = (2 if config.lora is None else 1) * e * a.hidden_size if parallel.uses_sequence_parallel else 0
    widest = 0.0 if a.experts and a.experts.in_all_layers else a.ffn_hidden_size / parallel.tensor_model_parallel_size
    gradients = 3 * e * widest + gathered
    if a.experts is not None:
        # The gradients of what the experts return and of what they are given: an exchange turns one into the other.
        columns = 3 * a.experts.ffn_hidden_size / parallel.expert_tensor_size
        gradients = max(gradients, e * routed_tokens(a.experts, config) * (columns + 2 * a.hidden_size))
    again = recomputed_parts(a, config, chunks, local=local)
    has_head = any(chunk.has_head for chunk in chunks)

    def of(pack: PackShape) -> float:
        tokens = pack.padded_tokens / parallel.context_parallel_size
        layer = recomputed_bytes(again, config, pack, local=local)
        layer += tokens * 2 * boundary + max(tokens * gradients, _gathering_bytes(a, config, pack, local=local))
        return max(layer, _head_working_bytes(a, config, pack) + 2 * tokens * boundary) if has_head else layer

    return max(map(of, packs))


def _head_working_bytes(architecture: ModelShape, config: Config, pack: PackShape) -> float:
    e, logits = element_bytes(config), logits_bytes(architecture, config, pack)
    backward = logits * (1 if e == _FP32 else (_FP32 + e) / _FP32)
    # The forward of WPO's weights has another copy in fp32. A divergence has the students, their teachers and a copy.
    rows = min(pack.response_rows, config.logprob.chunk_tokens)
    students = min(student_rows(pack), rows) / max(rows, 1) if config.objective.aligns_tokens else 0.0
    return max(backward, logits * (1 + max(float(config.objective.use_weighting), 3 * students)))
