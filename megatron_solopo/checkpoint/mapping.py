"""How Hugging Face tensors become Megatron parameters, and back: one table, both directions.

A rule names one Megatron parameter, the Hugging Face tensors that it is made of, with their
shapes, how they are fused, and along which dimension tensor parallelism cuts the result:

    copy     one tensor, as it is
    vocab    one tensor, padded with zero rows to the padded vocabulary
    qkv      per key-value group: its query heads, its key head, its value head (GQA)
    gate_up  [gate; up]; each tensor-parallel rank holds its share of both

Families differ in three rules: Qwen2 adds biases, Qwen3 norms of queries and keys, and models with
untied embeddings an output layer. The fused parameter has as many rows as its parts together, so
every direction (a rank's share, a piece of a checkpoint, a Hugging Face tensor) is a range of rows.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_solopo.architecture.huggingface_config import Architecture

Fusion = Literal["copy", "vocab", "qkv", "gate_up"]
Index = tuple[slice, ...]
ReadTensor = Callable[[str, Index], Tensor]
"""Hugging Face name, and which part of the tensor."""
ReadRows = Callable[[int, int], Tensor]
"""First row and end of a range of a Megatron parameter."""
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
HF_EMBEDDING, HF_OUTPUT = "model.embed_tokens.weight", "lm_head.weight"

# Small enough for the allocator to use the same memory again: fresh pages for every block double the time.
_BLOCK_BYTES = 1 << 24
# Transformer Engine fuses each norm into the linear layer behind it and renames its weight. Megatron's
# checkpoints use this name whichever implementation wrote them.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter. `{}` in a name stands for the layer number, from 0."""

    megatron: str
    huggingface: tuple[str, ...]
    shapes: tuple[str, ...]
    """Of each Hugging Face tensor, by the names in `_sizes`."""
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


_D, _HF = "decoder.layers.{}.", "model.layers.{}."
_QUERY, _KEY, _VALUE = (f"{_HF}self_attn.{name}_proj." for name in "qkv")
_GATE, _UP, _DOWN = (f"{_HF}mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
# fmt: off
_OUTER = (
    Rule(EMBEDDING, (HF_EMBEDDING,), ("vocab hidden",), "vocab", 0),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",), ("hidden",)),
)
_LAYER = (
    Rule(_D + "input_layernorm.weight", (_HF + "input_layernorm.weight",), ("hidden",)),
    Rule(_D + "self_attention.linear_qkv.weight", (_QUERY + "weight", _KEY + "weight", _VALUE + "weight"),
         ("queries hidden", "keys hidden", "keys hidden"), "qkv", 0),
    Rule(_D + "self_attention.linear_proj.weight", (_HF + "self_attn.o_proj.weight",), ("hidden queries",),
         shard_dim=1),
    Rule(_D + "pre_mlp_layernorm.weight", (_HF + "post_attention_layernorm.weight",), ("hidden",)),
    Rule(_D + "mlp.linear_fc1.weight", (_GATE, _UP), ("ffn hidden", "ffn hidden"), "gate_up", 0),
    Rule(_D + "mlp.linear_fc2.weight", (_DOWN,), ("hidden ffn",), shard_dim=1),
)
_UNTIED = (Rule(OUTPUT, (HF_OUTPUT,), ("vocab hidden",), "vocab", 0),)
_QKV_BIAS = (
    Rule(_D + "self_attention.linear_qkv.bias", (_QUERY + "bias", _KEY + "bias", _VALUE + "bias"),
         ("queries", "keys", "keys"), "qkv", 0),
)
_QK_NORM = (
    Rule(_D + "self_attention.q_layernorm.weight", (_HF + "self_attn.q_norm.weight",), ("head",)),
    Rule(_D + "self_attention.k_layernorm.weight", (_HF + "self_attn.k_norm.weight",), ("head",)),
)
# fmt: on


def rules(architecture: Architecture) -> dict[str, Rule]:
    """Every parameter of the model by its Megatron name, layers counted over the whole model."""
    per_layer = _LAYER + (_QKV_BIAS if architecture.add_qkv_bias else ())
    per_layer += _QK_NORM if architecture.qk_layernorm else ()
    table = _OUTER + (() if architecture.tied_embeddings else _UNTIED)
    table += tuple(rule.in_layer(layer) for layer in range(architecture.num_layers) for rule in per_layer)
    return {rule.megatron: rule for rule in table}


def canonical_name(name: str) -> str:
    """A parameter's name in the table, whichever layer implementation holds it."""
    for fused, plain in _FUSED_NORMS.items():
        if name.endswith(fused):
            return name.removesuffix(fused) + plain
    return name


def huggingface_shapes(rule: Rule, architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Shape of each of the rule's Hugging Face tensors, by name, in the rule's order."""
    sizes = _sizes(architecture)
    shapes = (tuple(sizes[name] for name in shape.split()) for shape in rule.shapes)
    return dict(zip(rule.huggingface, shapes, strict=True))


def megatron_shape(rule: Rule, architecture: Architecture) -> tuple[int, ...]:
    """Shape of the whole parameter, without vocabulary padding."""
    shapes = list(huggingface_shapes(rule, architecture).values())
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def _sizes(architecture: Architecture) -> dict[str, int]:
    return {
        "vocab": architecture.vocab_size,
        "hidden": architecture.hidden_size,
        "ffn": architecture.ffn_hidden_size,
        "head": architecture.head_dim,
        "queries": architecture.num_attention_heads * architecture.head_dim,
        "keys": architecture.num_query_groups * architecture.head_dim,
    }


def megatron_rows(rule: Rule, architecture: Architecture, read: ReadTensor, rows: slice, *others: slice) -> Tensor:
    """Rows of the whole Megatron parameter, of which `read` is asked for no more than these rows take.

    Args:
        others: which part of the other dimension, where there is one; all of it by default.
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
    architecture: Architecture, shapes: dict[str, tuple[int, ...]], read: ReadTensor, rows: slice, *others: slice
) -> Tensor:
    """Fuses the groups that the rows touch: q [heads * d], k, v [groups * d] -> [groups * (heads / groups + 2) * d]."""
    counts = {name: shape[0] // architecture.num_query_groups for name, shape in shapes.items()}
    per_group = sum(counts.values())
    first, end = rows.start // per_group, -(-rows.stop // per_group)
    parts = [read(name, (slice(first * n, end * n), *others)).unflatten(0, (-1, n)) for name, n in counts.items()]
    fused = torch.cat(parts, dim=1).flatten(0, 1)
    return fused[rows.start - first * per_group : rows.stop - first * per_group]


def row_blocks(rule: Rule, architecture: Architecture, itemsize: int) -> Iterator[slice]:
    """Ranges of rows of the whole parameter, about 16 MiB each, that are read and written at once.

    Those of fused queries, keys and values end between groups where a group fits.

    Args:
        itemsize: bytes of one number.
    """
    shape = megatron_shape(rule, architecture)
    step = max(1, _BLOCK_BYTES // (itemsize * math.prod(shape[1:])))
    group = shape[0] // architecture.num_query_groups if rule.fusion == "qkv" else 1
    step = max(group, step // group * group)
    return (slice(start, min(start + step, shape[0])) for start in range(0, shape[0], step))


def huggingface_blocks(
    rule: Rule, architecture: Architecture, read: ReadRows, itemsize: int
) -> Iterator[tuple[str, int, Tensor]]:
    """The rule's Hugging Face tensors in blocks of rows: name, first row, rows. Each tensor's come in order.

    Args:
        read: reads rows of the whole Megatron parameter; `row_blocks` says how many at once.
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
    architecture: Architecture, shapes: dict[str, tuple[int, ...]], read: ReadRows, rows: slice
) -> Iterator[tuple[str, int, Tensor]]:
    """Undoes `_qkv_rows` for whole groups."""
    counts = {name: shape[0] // architecture.num_query_groups for name, shape in shapes.items()}
    first_group = rows.start // sum(counts.values())
    groups = read(rows.start, rows.stop).unflatten(0, (-1, sum(counts.values())))
    for (name, count), part in zip(counts.items(), groups.split(list(counts.values()), dim=1), strict=True):
        yield name, first_group * count, part.flatten(0, 1)


def to_megatron(
    rule: Rule, architecture: Architecture, read: ReadTensor, *, rank: int, size: int, padded_vocab: int
) -> Tensor:
    """The share of tensor-parallel rank `rank` of `size`, reading nothing of the others' but what is fused with it."""
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


def to_huggingface(rule: Rule, architecture: Architecture, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Join the shards of all tensor-parallel ranks and split them into Hugging Face tensors."""
    if rule.fusion == "gate_up":
        halves = [shard.chunk(2, dim=0) for shard in shards]
        full = torch.cat([half[part] for part in range(2) for half in halves])
    else:
        full = shards[0] if rule.shard_dim is None else torch.cat(list(shards), dim=rule.shard_dim)
    blocks: dict[str, list[Tensor]] = {name: [] for name in rule.huggingface}
    for name, _, block in huggingface_blocks(rule, architecture, lambda start, end: full[start:end], full.itemsize):
        blocks[name].append(block)
    return tuple(torch.cat(parts) for parts in blocks.values())


def _share(count: int, rank: int, size: int) -> slice:
    assert count % size == 0, f"{count} does not divide among {size} ranks"
    return slice(rank * count // size, (rank + 1) * count // size)
