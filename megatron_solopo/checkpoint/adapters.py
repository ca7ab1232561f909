"""Gives a model its adapters: fresh ones, or those of a PEFT directory."""

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from megatron_solopo.architecture.adapters import ADAPTER, AdaptedLinear, adapted_linears
from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.checkpoint.adapter_mapping import adapter_rules, adapter_shapes
from megatron_solopo.checkpoint.mapping import Index, ReadTensor, to_megatron
from megatron_solopo.config import LoRAConfig
from megatron_solopo.model.adapters import (
    Adapter,
    ColumnAdapter,
    InputDropout,
    RowAdapter,
    Segments,
    attach,
    cut_segments,
    freeze_base,
    kaiming_uniform,
)
from megatron_solopo.model.head import ResponseModel


def add_adapters(chunks: Sequence[ResponseModel], architecture: ModelShape, lora: LoRAConfig, read: ReadTensor) -> None:
    """Freeze this rank's model chunks and give them adapters.

    Args:
        read: reads PEFT's tensors, from `fresh_adapters` or from a PEFT directory.
    """
    table = adapter_rules(architecture, lora)
    dropout = InputDropout(lora.dropout) if lora.dropout else None
    for chunk in chunks:
        freeze_base(chunk)
        chunk.adapter_dropout = dropout
        tensor_group = chunk.pg_collection.tp
        share = {"rank": tensor_group.rank(), "size": tensor_group.size(), "padded_vocab": chunk.vocab_size}
        for layer in chunk.decoder.layers:
            for linear in adapted_linears(lora):
                prefix = f"decoder.layers.{layer.layer_number - 1}.{linear.megatron}{ADAPTER}."
                matrices = [
                    to_megatron(table[prefix + name], architecture, read, **share) for name in ("lora_A", "lora_B")
                ]
                parent, _, name = linear.megatron.rpartition(".")
                adapter = _build(linear, architecture, [*matrices, lora.scaling, chunk.config, tensor_group, dropout])
                attach(layer.get_submodule(parent), name, adapter.to(next(layer.parameters()).device))


def _build(linear: AdaptedLinear, architecture: ModelShape, parts: list[Any]) -> Adapter:
    if not linear.is_column_parallel:
        return RowAdapter(*parts)
    *_, group, _ = parts
    segments, repeats = _local_rows(linear, architecture, group.rank(), group.size())
    return ColumnAdapter(*parts, targets=linear.targets, segments=segments, repeats=repeats)


def _local_rows(linear: AdaptedLinear, architecture: ModelShape, rank: int, size: int) -> tuple[Segments, int]:
    """A rank's rows of a column-parallel layer, and how often they repeat."""
    rows = [architecture.sizes[name] for name in linear.outputs]
    # Each rank has a share of gate and up. Of queries, keys and values it has whole groups, or a part of one group.
    groups = architecture.num_query_groups if "q_proj" in linear.modules else size
    segments = tuple((module, count // groups) for module, count in zip(linear.modules, rows, strict=True))
    if groups >= size:
        return segments, groups // size
    own = sum(rows) // size
    start = rank * own % (sum(rows) // groups)
    return tuple(cut_segments(segments, start, start + own)), 1


def fresh_adapters(architecture: ModelShape, lora: LoRAConfig, seed: int) -> ReadTensor:
    """Reads PEFT's start of every adapter: B is zero, so the model computes what it computed before.

    A is drawn for each of PEFT's modules from a seed of its own. So no layout changes it.
    """
    shapes = adapter_shapes(architecture, lora)

    def read(name: str, index: Index) -> Tensor:
        if ".lora_B." in name:
            return torch.zeros(shapes[name])[index]
        digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return kaiming_uniform(shapes[name], generator)[index]

    return read
