"""How Hugging Face tensors become Megatron parameters, and back: one table, both directions.

A rule names one Megatron parameter, the Hugging Face tensors that it is made of, how they are
fused, and along which dimension tensor parallelism cuts the result:

    copy     one tensor, as it is
    vocab    one tensor, padded with zero rows to the padded vocabulary
    qkv      per key-value group: its query heads, its key head, its value head (GQA)
    gate_up  [gate; up]; each tensor-parallel rank holds its share of both
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_solopo.architecture.huggingface import Architecture

Fusion = Literal["copy", "vocab", "qkv", "gate_up"]
EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"

# Transformer Engine fuses each norm into the linear layer behind it and renames its weight.
_FUSED_NORMS = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


@dataclass(frozen=True)
class Rule:
    """One Megatron parameter. `{}` in a name stands for the layer number, from 0."""

    megatron: str
    huggingface: tuple[str, ...]
    fusion: Fusion = "copy"
    shard_dim: int | None = None

    def in_layer(self, layer: int) -> "Rule":
        """The rule with the layer number filled in."""
        names = tuple(name.format(layer) for name in self.huggingface)
        return Rule(self.megatron.format(layer), names, self.fusion, self.shard_dim)


def _qkv(kind: str) -> tuple[str, ...]:
    return tuple(f"model.layers.{{}}.self_attn.{name}_proj.{kind}" for name in "qkv")


_ATTENTION, _MLP = "decoder.layers.{}.self_attention.", "decoder.layers.{}.mlp."
_HF_LAYER = "model.layers.{}."
_OUTER = (
    Rule(EMBEDDING, ("model.embed_tokens.weight",), "vocab", 0),
    Rule("decoder.final_layernorm.weight", ("model.norm.weight",)),
)
_LAYER = (
    Rule("decoder.layers.{}.input_layernorm.weight", (_HF_LAYER + "input_layernorm.weight",)),
    Rule(_ATTENTION + "linear_qkv.weight", _qkv("weight"), "qkv", 0),
    Rule(_ATTENTION + "linear_proj.weight", (_HF_LAYER + "self_attn.o_proj.weight",), shard_dim=1),
    Rule("decoder.layers.{}.pre_mlp_layernorm.weight", (_HF_LAYER + "post_attention_layernorm.weight",)),
    Rule(
        _MLP + "linear_fc1.weight",
        (_HF_LAYER + "mlp.gate_proj.weight", _HF_LAYER + "mlp.up_proj.weight"),
        "gate_up",
        0,
    ),
    Rule(_MLP + "linear_fc2.weight", (_HF_LAYER + "mlp.down_proj.weight",), shard_dim=1),
)
_UNTIED = (Rule(OUTPUT, ("lm_head.weight",), "vocab", 0),)
_QKV_BIAS = (Rule(_ATTENTION + "linear_qkv.bias", _qkv("bias"), "qkv", 0),)
_QK_NORM = tuple(
    Rule(f"{_ATTENTION}{name}_layernorm.weight", (f"{_HF_LAYER}self_attn.{name}_norm.weight",)) for name in "qk"
)


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


def to_megatron(
    rule: Rule, architecture: Architecture, tensors: Sequence[Tensor], *, rank: int, size: int, padded_vocab: int
) -> Tensor:
    """Fuse Hugging Face tensors and cut the share of tensor-parallel rank `rank` of `size`."""
    match rule.fusion:
        case "gate_up":
            return torch.cat([tensor.chunk(size, dim=0)[rank] for tensor in tensors])
        case "qkv":
            full = _fuse_qkv(architecture, tensors)
        case "vocab":
            full = F.pad(tensors[0], (0, 0, 0, padded_vocab - len(tensors[0])))
        case "copy":
            full = tensors[0]
    return full if rule.shard_dim is None else full.chunk(size, dim=rule.shard_dim)[rank]


def to_huggingface(rule: Rule, architecture: Architecture, shards: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Join the shards of all tensor-parallel ranks and split them into Hugging Face tensors."""
    if rule.fusion == "gate_up":
        halves = [shard.chunk(2, dim=0) for shard in shards]
        return tuple(torch.cat([half[part] for half in halves]) for part in range(2))
    full = shards[0] if rule.shard_dim is None else torch.cat(list(shards), dim=rule.shard_dim)
    match rule.fusion:
        case "qkv":
            return _split_qkv(architecture, full)
        case "vocab":
            return (full[: architecture.vocab_size],)
        case _:
            return (full,)


def _fuse_qkv(architecture: Architecture, tensors: Sequence[Tensor]) -> Tensor:
    """q [heads * d, ...], k and v [groups * d, ...] -> [groups * (heads / groups + 2) * d, ...]."""
    grouped = [tensor.unflatten(0, (architecture.num_query_groups, -1)) for tensor in tensors]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def _split_qkv(architecture: Architecture, full: Tensor) -> tuple[Tensor, ...]:
    queries = architecture.num_attention_heads // architecture.num_query_groups * architecture.head_dim
    sizes = [queries, architecture.head_dim, architecture.head_dim]
    parts = full.unflatten(0, (architecture.num_query_groups, -1)).split(sizes, dim=1)
    return tuple(part.flatten(0, 1) for part in parts)
