"""The table that maps Hugging Face tensors to Megatron parameters. Both directions of a conversion read it.

A `Rule` describes one Megatron parameter: its name, the Hugging Face tensors that it is made of, their shapes, how
they are fused, and the dimension that tensor parallelism cuts.

    fusion    the Megatron parameter
    copy      one tensor, unchanged
    vocab     one tensor, padded with zero rows to the padded vocabulary
    qkv       for each key-value group: its query heads, its key head, its value head
    gate_up   [gate; up]; each tensor-parallel rank holds its share of both

Every expert has rules of its own, so whoever converts a model holds one expert at a time. The experts' tensor-parallel
group cuts them.

A fused parameter has as many rows as its parts together. Every reader (a rank's share, a piece of a checkpoint, a
Hugging Face tensor) therefore asks for a range of rows.

To add a model family:

1. Name it in `architecture.huggingface_config`, and state there how its config differs.
2. If it has other tensors, add a tuple of rules below, and select it in `rules`. Families differ in five places
   today: Qwen2 adds biases, Qwen3 adds norms of queries and keys, OLMoE norms those of all heads at once, untied
   embeddings add an output layer, and Mixtral has its own names of experts (`expert_names`).
3. If a tensor has a new size, name the size in `sizes`. If tensors are fused in a new way, add a `Fusion`.
4. Add a tiny model to the tests: every family is converted there and back, and compared with transformers.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_solopo.architecture.huggingface_config import ModelShape

Fusion = Literal["copy", "vocab", "qkv", "gate_up"]
Index = tuple[slice, ...]
ReadTensor = Callable[[str, Index], Tensor]
"""Reads the part at an index of the Hugging Face tensor with a name."""
ReadRows = Callable[[int, int], Tensor]
"""Reads the rows [start, end) of a Megatron parameter."""
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
HF_EMBEDDING, HF_OUTPUT = "model.embed_tokens.weight", "lm_head.weight"

# The allocator reuses the memory of blocks of this size. Fresh pages for every block double the time.
_BLOCK_BYTES = 1 << 24
# Transformer Engine fuses the norms of a dense layer into the linear layers behind them and renames their weights.
# Megatron's checkpoints always use the fused names.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
# Megatron's names of an expert's weight: in a checkpoint, and in a layer that computes all its experts in one kernel.
_STORED_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(.+)")
_GROUPED_EXPERT = re.compile(r"(.*mlp\.experts)\.(linear_fc[12])\.weight(\d+)")


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter. In the table, `{}` in a name stands for the layer number, counted from 0.

    The second `{}` in the names of experts stands for the expert's number, counted from 0 over all ranks.
    """

    megatron: str
    huggingface: tuple[str, ...]
    shapes: tuple[str, ...]
    """The shape of each Hugging Face tensor, in the names of `sizes` or in numbers."""
    fusion: Fusion = "copy"
    shard_dim: int | None = None

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to one of the experts that a router chooses."""
        return ".local_experts." in self.megatron

    def at(self, *numbers: int) -> "Rule":
        """The rule with the numbers of the layer and the expert filled in."""
        names = tuple(name.format(*numbers) for name in self.huggingface)
        return Rule(self.megatron.format(*numbers), names, self.shapes, self.fusion, self.shard_dim)


class Place(NamedTuple):
    """Where a Megatron checkpoint holds a parameter."""

    key: str
    position: tuple[int, ...] = ()
    """Its place on the leading axes of a tensor that stacks the parameter of all layers, of all experts, or of both."""
    stack: tuple[int, ...] = ()
    """The sizes of these axes."""


def place(rule: Rule, architecture: ModelShape) -> Place:
    """Where a Megatron checkpoint holds a parameter. Layers are stacked where all have the same parameters."""
    found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", rule.megatron)
    if found is None:
        return Place(rule.megatron)
    layer, name = int(found[1]), found[2]
    for fused, plain in _FUSED_NORMS.items():
        is_fused = plain.startswith("input") or not architecture.has_experts(layer)
        if name == plain and is_fused:
            name = fused
    experts = architecture.experts
    expert = _STORED_EXPERT.fullmatch(name)
    position: tuple[int, ...] = ()
    stack: tuple[int, ...] = ()
    if experts is None or experts.in_all_layers:
        prefix, position, stack = "decoder.layers.", (layer,), (architecture.num_layers,)
    else:
        prefix = f"decoder.layers.{layer}."
    if expert is not None:
        assert experts is not None
        name = f"mlp.experts.experts.{expert[2]}"
        position, stack = (*position, int(expert[1])), (*stack, experts.num_experts)
    return Place(prefix + name, position, stack)


# The prefixes of a layer's parameters.
_MEGATRON, _HF = "decoder.layers.{}.", "model.layers.{}."
_QUERY, _KEY, _VALUE = (f"{_HF}self_attn.{name}_proj." for name in "qkv")
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class ExpertNames(NamedTuple):
    """How the files of a published model name a layer's router and experts."""

    block: str
    """The part of a layer that holds them: `{block}.gate`, `{block}.experts.0.{projection}`."""
    projections: tuple[str, ...]
    """An expert's gate, up and down projection."""


def expert_names(model_type: str) -> ExpertNames:
    """The names of a family's experts."""
    if model_type == "mixtral":
        return ExpertNames("block_sparse_moe", ("w1", "w3", "w2"))
    return ExpertNames("mlp", _PROJECTIONS)


def _gated(megatron: str, huggingface: str, projections: tuple[str, ...], width: str) -> tuple[Rule, ...]:
    """The rules of a gated feed-forward with `width` columns."""
    gate, up, down = (f"{huggingface}{name}.weight" for name in projections)
    shape = f"{width} hidden"
    return (
        Rule(megatron + "linear_fc1.weight", (gate, up), (shape, shape), "gate_up", 0),
        Rule(megatron + "linear_fc2.weight", (down,), (f"hidden {width}",), shard_dim=1),
    )


# fmt: off
_OUTER = (
    Rule(EMBEDDING, (HF_EMBEDDING,), ("vocab hidden",), "vocab", 0),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), ("hidden",)),
)
_LAYER = (
    Rule(_MEGATRON + "input_layernorm.weight", (_HF + "input_layernorm.weight",), ("hidden",)),
    Rule(_MEGATRON + "self_attention.linear_qkv.weight", (_QUERY + "weight", _KEY + "weight", _VALUE + "weight"),
         ("queries hidden", "keys hidden", "keys hidden"), "qkv", 0),
    Rule(_MEGATRON + "self_attention.linear_proj.weight", (_HF + "self_attn.o_proj.weight",), ("hidden queries",),
         shard_dim=1),
    Rule(_MEGATRON + "pre_mlp_layernorm.weight", (_HF + "post_attention_layernorm.weight",), ("hidden",)),
)
_DENSE = _gated(_MEGATRON + "mlp.", _HF + "mlp.", _PROJECTIONS, "ffn")
_SHARED_EXPERT = (
    *_gated(_MEGATRON + "mlp.shared_experts.", _HF + "mlp.shared_expert.", _PROJECTIONS, "shared_ffn"),
    Rule(_MEGATRON + "mlp.shared_experts.gate_weight", (_HF + "mlp.shared_expert_gate.weight",), ("one hidden",)),
)
_OUTPUT_LAYER = (Rule(OUTPUT, (HF_OUTPUT,), ("vocab hidden",), "vocab", 0),)
_QKV_BIAS = (
    Rule(_MEGATRON + "self_attention.linear_qkv.bias", (_QUERY + "bias", _KEY + "bias", _VALUE + "bias"),
         ("queries", "keys", "keys"), "qkv", 0),
)
_QK_NORM = (
    Rule(_MEGATRON + "self_attention.q_layernorm.weight", (_HF + "self_attn.q_norm.weight",), ("head",)),
    Rule(_MEGATRON + "self_attention.k_layernorm.weight", (_HF + "self_attn.k_norm.weight",), ("head",)),
)
_ALL_HEADS_NORM = (
    Rule(_MEGATRON + "self_attention.query_norm.weight", (_HF + "self_attn.q_norm.weight",), ("queries",), shard_dim=0),
    Rule(_MEGATRON + "self_attention.key_norm.weight", (_HF + "self_attn.k_norm.weight",), ("keys",), shard_dim=0),
)
# fmt: on


@lru_cache(maxsize=4)
def rules(architecture: ModelShape) -> dict[str, Rule]:
    """Every parameter of the model by its Megatron name. Layers and experts are counted over the whole model."""
    every_layer = _LAYER + (_QKV_BIAS if architecture.add_qkv_bias else ())
    every_layer += _QK_NORM if architecture.qk_layernorm else ()
    every_layer += _ALL_HEADS_NORM if architecture.norms_all_heads else ()
    table = [*_OUTER, *(() if architecture.tied_embeddings else _OUTPUT_LAYER)]
    for layer in range(architecture.num_layers):
        table += (rule.at(layer) for rule in every_layer)
        table += _feed_forward(architecture, layer)
    return {rule.megatron: rule for rule in table}


def _feed_forward(architecture: ModelShape, layer: int) -> Iterator[Rule]:
    """The rules of a layer's feed-forward: dense, or a router with its experts."""
    experts = architecture.experts
    if experts is None or not architecture.has_experts(layer):
        yield from (rule.at(layer) for rule in _DENSE)
        return
    names = expert_names(architecture.model_type)
    block = f"{_HF}{names.block}."
    yield Rule(_MEGATRON + "mlp.router.weight", (block + "gate.weight",), ("experts hidden",)).at(layer)
    each = _gated(_MEGATRON + "mlp.experts.local_experts.{}.", block + "experts.{}.", names.projections, "expert_ffn")
    for expert in range(experts.num_experts):
        yield from (rule.at(layer, expert) for rule in each)
    if experts.shared_ffn_hidden_size:
        yield from (rule.at(layer) for rule in _SHARED_EXPERT)


def canonical_name(name: str, first_expert: int = 0) -> str:
    """Return a parameter's name in the table, for the name that any layer implementation gives it.

    Args:
        first_expert: the number of this rank's first expert. Layers count their own from 0.
    """
    if grouped := _GROUPED_EXPERT.fullmatch(name):
        name = f"{grouped[1]}.local_experts.{grouped[3]}.{grouped[2]}.weight"
    prefix, is_expert, rest = name.partition("local_experts.")
    if is_expert:
        local, _, rest = rest.partition(".")
        return f"{prefix}local_experts.{int(local) + first_expert}.{rest}"
    for fused, plain in _FUSED_NORMS.items():
        if name.endswith(fused):
            return name.removesuffix(fused) + plain
    return name


def huggingface_shapes(rule: Rule, architecture: ModelShape) -> dict[str, tuple[int, ...]]:
    """The shapes of the rule's Hugging Face tensors by name, in the rule's order."""
    known = architecture.sizes
    shapes = (tuple(known.get(name) or int(name) for name in shape.split()) for shape in rule.shapes)
    return dict(zip(rule.huggingface, shapes, strict=True))


def all_huggingface_shapes(architecture: ModelShape) -> dict[str, tuple[int, ...]]:
    """The shapes of all Hugging Face tensors of the model by name, in the table's order."""
    return {
        name: shape
        for rule in rules(architecture).values()
        for name, shape in huggingface_shapes(rule, architecture).items()
    }


def megatron_shape(rule: Rule, architecture: ModelShape) -> tuple[int, ...]:
    """The shape of the whole parameter, without vocabulary padding."""
    shapes = list(huggingface_shapes(rule, architecture).values())
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def megatron_rows(rule: Rule, architecture: ModelShape, read: ReadTensor, rows: slice, *others: slice) -> Tensor:
    """Return rows of the whole Megatron parameter. `read` is asked only for what these rows contain.

    Args:
        others: the part of the second dimension, if only a part is wanted.
    """
    shapes = huggingface_shapes(rule, architecture)
    if rule.fusion == "qkv":
        return _qkv_rows(architecture, shapes, read, rows, *others)
    parts, start, stop = [], rows.start, rows.stop
    for name, shape in shapes.items():
        first, end = max(start, 0), min(stop, shape[0])
        if first < end or len(shapes) == 1:
            parts.append(read(name, (slice(first, max(first, end)), *others)))
        start, stop = start - shape[0], stop - shape[0]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _qkv_rows(
    architecture: ModelShape, shapes: dict[str, tuple[int, ...]], read: ReadTensor, rows: slice, *others: slice
) -> Tensor:
    """Fuse the groups that the rows touch: q [heads * d], k, v [groups * d] -> [groups * (heads / groups + 2) * d]."""
    counts = _rows_per_group(architecture, shapes)
    per_group = sum(counts.values())
    first, end = rows.start // per_group, -(-rows.stop // per_group)
    parts = [_grouped(read(name, (slice(first * n, end * n), *others)), n) for name, n in counts.items()]
    fused = torch.cat(parts, dim=1).flatten(0, 1)
    return fused[rows.start - first * per_group : rows.stop - first * per_group]


def _rows_per_group(architecture: ModelShape, shapes: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """The rows that one key-value group has in each of the three tensors."""
    return {name: shape[0] // architecture.num_query_groups for name, shape in shapes.items()}


def _grouped(rows: Tensor, rows_per_group: int) -> Tensor:
    """[groups * rows_per_group, ...] -> [groups, rows_per_group, ...], without a copy."""
    return rows.view(-1, rows_per_group, *rows.shape[1:])


def row_blocks(rule: Rule, architecture: ModelShape, itemsize: int) -> Iterator[slice]:
    """Cut the whole parameter into ranges of rows of about 16 MiB, each of which is read and written at once.

    Fused queries, keys and values are cut only between key-value groups.

    Args:
        itemsize: bytes of one number.
    """
    shape = megatron_shape(rule, architecture)
    step = max(1, _BLOCK_BYTES // (itemsize * math.prod(shape[1:])))
    group = shape[0] // architecture.num_query_groups if rule.fusion == "qkv" else 1
    step = max(group, step // group * group)
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def huggingface_blocks(
    rule: Rule, architecture: ModelShape, read: ReadRows, itemsize: int
) -> Iterator[tuple[str, int, Tensor]]:
    """Yield the rule's Hugging Face tensors in blocks: name, first row, rows. The blocks of a tensor come in order.

    Args:
        read: reads rows of the whole Megatron parameter, as many at once as `row_blocks` says.
        itemsize: bytes of one number.
    """
    shapes = huggingface_shapes(rule, architecture)
    for rows in row_blocks(rule, architecture, itemsize):
        if rule.fusion == "qkv":
            yield from _qkv_blocks(architecture, shapes, read, rows)
            continue
        start = 0
        for name, shape in shapes.items():
            first, end = max(rows.start, start), min(rows.stop, start + shape[0])
            if first < end:
                yield name, first - start, read(first, end)
            start += shape[0]


def _qkv_blocks(
    architecture: ModelShape, shapes: dict[str, tuple[int, ...]], read: ReadRows, rows: slice
) -> Iterator[tuple[str, int, Tensor]]:
    """Undo `_qkv_rows` for whole groups."""
    counts = _rows_per_group(architecture, shapes)
    first_group = rows.start // sum(counts.values())
    groups = _grouped(read(rows.start, rows.stop), sum(counts.values()))
    for (name, count), part in zip(counts.items(), torch.split(groups, list(counts.values()), dim=1), strict=True):
        yield name, first_group * count, part.flatten(0, 1)


def to_megatron(
    rule: Rule, architecture: ModelShape, read: ReadTensor, *, rank: int, size: int, padded_vocab: int
) -> Tensor:
    """Return the share of tensor-parallel rank `rank` of `size`.

    Only this share is read. The exception is a key-value group that several ranks share: it is read whole.
    """
    rows = megatron_shape(rule, architecture)[0]
    if rule.shard_dim is None:
        return megatron_rows(rule, architecture, read, slice(0, rows))
    if rule.shard_dim == 1:
        (shape,) = huggingface_shapes(rule, architecture).values()
        return megatron_rows(rule, architecture, read, slice(0, rows), _share(shape[1], rank, size))
    if rule.fusion == "gate_up":
        own, half = _share(rows // 2, rank, size), rows // 2
        halves = (own, slice(own.start + half, own.stop + half))
        return torch.cat([megatron_rows(rule, architecture, read, each) for each in halves])
    if rule.fusion == "vocab":
        own = _share(padded_vocab, rank, size)
        found = megatron_rows(rule, architecture, read, slice(min(own.start, rows), min(own.stop, rows)))
        return F.pad(found, (0, 0, 0, own.stop - own.start - len(found)))
    return megatron_rows(rule, architecture, read, _share(rows, rank, size))


def _share(count: int, rank: int, size: int) -> slice:
    assert count % size == 0, f"{count} does not divide among {size} ranks"
    return slice(rank * count // size, (rank + 1) * count // size)
