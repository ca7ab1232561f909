"""The table that maps Hugging Face tensors to Megatron parameters. Both directions of a conversion read it.

A `Rule` describes one Megatron parameter: its name, the Hugging Face tensors that it is made of, their shapes, how
they are fused, and the dimension that tensor parallelism cuts.

    fusion    the Megatron parameter
    copy      one tensor, unchanged
    vocab     one tensor, padded with zero rows to the padded vocabulary
    qkv       for each key-value group: its query heads, its key head, its value head
    gate_up   [gate; up]; each tensor-parallel rank holds its share of both

A fused parameter has as many rows as its parts together. Every reader (a rank's share, a piece of a checkpoint, a
Hugging Face tensor) therefore asks for a range of rows.

To add a model family:

1. Name it in `architecture.huggingface_config`, and state there how its config differs.
2. If it has other tensors, add a tuple of rules below, and select it in `rules`. Families differ in three places
   today: Qwen2 adds biases, Qwen3 adds norms of queries and keys, and untied embeddings add an output layer.
3. If a tensor has a new size, name the size in `_sizes`. If tensors are fused in a new way, add a `Fusion`.
4. Add a tiny model to the tests: every family is converted there and back, and compared with transformers.
"""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

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
# Transformer Engine fuses each norm into the linear layer behind it and renames its weight. Megatron's checkpoints
# always use the fused name.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter. In the table, `{}` in a name stands for the layer number, counted from 0."""

    megatron: str
    huggingface: tuple[str, ...]
    shapes: tuple[str, ...]
    """The shape of each Hugging Face tensor, in the names of `_sizes`."""
    fusion: Fusion = "copy"
    shard_dim: int | None = None

    def in_layer(self, layer: int) -> "Rule":
        """The rule with the layer number filled in."""
        names = tuple(name.format(layer) for name in self.huggingface)
        return Rule(self.megatron.format(layer), names, self.shapes, self.fusion, self.shard_dim)

    @property
    def stored_at(self) -> tuple[str, int | None]:
        """Key in a Megatron checkpoint, and the layer where the layers are stacked there in one tensor."""
        name = self.megatron
        for fused, plain in _FUSED_NORMS.items():
            if name.endswith(f".{plain}"):
                name = name.removesuffix(plain) + fused
        found = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        return (name, None) if found is None else (f"decoder.layers.{found[2]}", int(found[1]))


# The prefixes of a layer's parameters.
_MEGATRON, _HF = "decoder.layers.{}.", "model.layers.{}."
_QUERY, _KEY, _VALUE = (f"{_HF}self_attn.{name}_proj." for name in "qkv")
_GATE, _UP, _DOWN = (f"{_HF}mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
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
    Rule(_MEGATRON + "mlp.linear_fc1.weight", (_GATE, _UP), ("ffn hidden", "ffn hidden"), "gate_up", 0),
    Rule(_MEGATRON + "mlp.linear_fc2.weight", (_DOWN,), ("hidden ffn",), shard_dim=1),
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
# fmt: on


def rules(architecture: ModelShape) -> dict[str, Rule]:
    """Every parameter of the model by its Megatron name. Layers are counted over the whole model."""
    per_layer = _LAYER + (_QKV_BIAS if architecture.add_qkv_bias else ())
    per_layer += _QK_NORM if architecture.qk_layernorm else ()
    table = _OUTER + (() if architecture.tied_embeddings else _OUTPUT_LAYER)
    table += tuple(rule.in_layer(layer) for layer in range(architecture.num_layers) for rule in per_layer)
    return {rule.megatron: rule for rule in table}


def canonical_name(name: str) -> str:
    """Return a parameter's name in the table, for the name that any layer implementation gives it."""
    for fused, plain in _FUSED_NORMS.items():
        if name.endswith(fused):
            return name.removesuffix(fused) + plain
    return name


def huggingface_shapes(rule: Rule, architecture: ModelShape) -> dict[str, tuple[int, ...]]:
    """The shapes of the rule's Hugging Face tensors by name, in the rule's order."""
    sizes = _sizes(architecture)
    shapes = (tuple(sizes[name] for name in shape.split()) for shape in rule.shapes)
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


def _sizes(architecture: ModelShape) -> dict[str, int]:
    return {
        "vocab": architecture.vocab_size,
        "hidden": architecture.hidden_size,
        "ffn": architecture.ffn_hidden_size,
        "head": architecture.head_dim,
        "queries": architecture.num_attention_heads * architecture.head_dim,
        "keys": architecture.num_query_groups * architecture.head_dim,
    }


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
