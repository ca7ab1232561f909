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

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_solopo.model.architecture import Architecture

Fusion = Literal["copy", "vocab", "qkv", "gate_up"]
Index = tuple[slice, ...]
ReadTensor = Callable[[str, Index], Tensor]
"""Hugging Face name, and which part of the tensor."""
ReadRows = Callable[[int, int], Tensor]
"""First row and end of a range of a Megatron parameter."""
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
HF_EMBEDDING, HF_OUTPUT = "model.embed_tokens.weight", "lm_head.weight"

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


def huggingface_tensors(rule: Rule, architecture: Architecture, read: ReadRows) -> Iterator[tuple[str, Tensor]]:
    """Each of the rule's Hugging Face tensors by name, from rows of the whole Megatron parameter."""
    shapes = huggingface_shapes(rule, architecture)
    if rule.fusion == "qkv":
        full = read(0, sum(shape[0] for shape in shapes.values()))
        sizes = [shape[0] // architecture.num_query_groups for shape in shapes.values()]
        parts = full.unflatten(0, (architecture.num_query_groups, -1)).split(sizes, dim=1)
        yield from zip(shapes, (part.flatten(0, 1) for part in parts), strict=True)
        return
    start = 0
    for name, shape in shapes.items():
        yield name, read(start, start + shape[0])
        start += shape[0]


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
    return tuple(tensor for _, tensor in huggingface_tensors(rule, architecture, lambda start, end: full[start:end]))


def _share(count: int, rank: int, size: int) -> slice:
    assert count % size == 0, f"{count} does not divide among {size} ranks"
    return slice(rank * count // size, (rank + 1) * count // size)
