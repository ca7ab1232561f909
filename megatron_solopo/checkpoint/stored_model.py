"""A whole model on the disk, read in blocks of rows by Hugging Face names, whatever directory holds it.

Hugging Face directory    its tensors
Megatron checkpoint       its parameters, taken apart
checkpoint of adapters    those of the base with the adapters merged: W + scaling * B A, in float32
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from megatron_solopo.architecture.huggingface_config import Architecture
from megatron_solopo.architecture.model_directory import is_megatron_checkpoint
from megatron_solopo.checkpoint.adapter_checkpoint import AdapterCheckpoint, is_adapter_checkpoint
from megatron_solopo.checkpoint.adapter_mapping import peft_names
from megatron_solopo.checkpoint.huggingface_weights import DTYPES, SafetensorsDirectory
from megatron_solopo.checkpoint.mapping import Rule, huggingface_blocks, huggingface_shapes, place, row_blocks
from megatron_solopo.checkpoint.megatron_reader import MegatronDirectory

Block = tuple[str, int, Tensor]
"""The Hugging Face name of a tensor, the number of the first row, and rows."""


class StoredModel:
    """A model in a directory, which has passed its check.

    Raises UserError if tensors are missing, unexpected, misshapen or of a precision that is not supported.
    """

    def __init__(self, path: Path, architecture: Architecture) -> None:
        self.path, self._architecture = path, architecture

    def blocks(self, rule: Rule) -> Iterator[Block]:
        """The Hugging Face tensors of a rule. The blocks of a tensor come in order."""
        raise NotImplementedError

    def dtype(self, rule: Rule) -> torch.dtype:
        """The precision that they are stored in."""
        raise NotImplementedError


class _Megatron(StoredModel):
    def __init__(self, path: Path, architecture: Architecture) -> None:
        super().__init__(path, architecture)
        self._stored = MegatronDirectory(path)
        self._stored.check(architecture)

    def blocks(self, rule: Rule) -> Iterator[Block]:
        read = self._stored.rows_of(place(rule, self._architecture))
        return huggingface_blocks(rule, self._architecture, read, self.dtype(rule).itemsize)

    def dtype(self, rule: Rule) -> torch.dtype:
        return self._stored.dtype(place(rule, self._architecture))


class _HuggingFace(StoredModel):
    def __init__(self, path: Path, architecture: Architecture) -> None:
        super().__init__(path, architecture)
        self._stored = SafetensorsDirectory(path)
        self._stored.check(architecture)

    def blocks(self, rule: Rule) -> Iterator[Block]:
        for name, shape in huggingface_shapes(rule, self._architecture).items():
            one = Rule(rule.megatron, (name,), (" ".join(map(str, shape)),))
            for rows in row_blocks(one, self._architecture, self.dtype(rule).itemsize):
                yield name, rows.start, self._stored.read(name, (rows,))

    def dtype(self, rule: Rule) -> torch.dtype:
        return DTYPES[self._stored.entries[rule.huggingface[0]].dtype]


class _Merged(StoredModel):
    def __init__(self, path: Path, architecture: Architecture) -> None:
        super().__init__(path, architecture)
        self._adapters = AdapterCheckpoint(path, architecture)
        self._adapters.check_base()
        self._base = stored_model(self._adapters.base, architecture)
        self._adapted = set(self._adapters.tensors)

    def blocks(self, rule: Rule) -> Iterator[Block]:
        for name, row, block in self._base.blocks(rule):
            lora_A, lora_B = peft_names(name)
            if lora_A in self._adapted:
                rows = self._adapters.read(lora_B, (slice(row, row + len(block)),)).float()
                added = self._adapters.lora.scaling * (rows @ self._adapters.read(lora_A).float())
                block = block.float() + added
            yield name, row, block

    def dtype(self, rule: Rule) -> torch.dtype:
        is_adapted = any(peft_names(name)[0] in self._adapted for name in rule.huggingface)
        return torch.float32 if is_adapted else self._base.dtype(rule)


def stored_model(path: Path, architecture: Architecture) -> StoredModel:
    """The model in `path`, a directory of any of the three kinds."""
    if is_adapter_checkpoint(path):
        return _Merged(path, architecture)
    return (_Megatron if is_megatron_checkpoint(path) else _HuggingFace)(path, architecture)
