"""A checkpoint of a run with adapters: it holds the adapters, and names the base model and what its bytes were.

huggingface/adapter_config.json   PEFT's description of the adapters; `base_model_name_or_path` is the base
huggingface/adapter_base.json     the fingerprint of the base's weights
"""

import json
from functools import cached_property, lru_cache
from pathlib import Path

import torch
from torch import Tensor

from megatron_solopo.architecture.adapters import adapter_config, read_lora
from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.architecture.model_directory import (
    ADAPTER_BASE,
    ADAPTER_CONFIG,
    huggingface_directory,
    is_megatron_checkpoint,
    parse_model_json,
)
from megatron_solopo.checkpoint.adapter_mapping import adapter_rules
from megatron_solopo.checkpoint.fingerprint import weights_fingerprint
from megatron_solopo.checkpoint.huggingface_weights import all_finite, not_finite
from megatron_solopo.checkpoint.mapping import Index, Rule, huggingface_blocks, place
from megatron_solopo.checkpoint.megatron_reader import MegatronDirectory
from megatron_solopo.config import LoRAConfig
from megatron_solopo.errors import UserError


def is_adapter_checkpoint(path: Path) -> bool:
    """Whether `path` is a checkpoint that holds adapters without their base."""
    return is_megatron_checkpoint(path) and (huggingface_directory(path) / ADAPTER_CONFIG).is_file()


def adapter_files(lora: LoRAConfig, base: Path, fingerprint: str) -> dict[str, bytes]:
    """The files beside those of the base model in the folder `huggingface/` of a checkpoint of adapters.

    Args:
        base: the model that they are trained on.
        fingerprint: `weights_fingerprint` of the base.
    """
    return {
        ADAPTER_CONFIG: adapter_config(lora, base.absolute()),
        ADAPTER_BASE: (json.dumps({"weights_fingerprint": fingerprint}) + "\n").encode(),
    }


class AdapterCheckpoint:
    """The adapters in a checkpoint.

    Attributes:
        path: of the checkpoint.
        base: the model that they were trained on.
        lora: their settings.
    """

    def __init__(self, path: Path, architecture: ModelShape) -> None:
        """Raises UserError if a file is damaged or the base is not where it was."""
        self.path, self._architecture = path, architecture
        file = huggingface_directory(path) / ADAPTER_CONFIG
        stored = parse_model_json(file.read_bytes(), file)
        self.lora = read_lora(stored, file)
        self.base = Path(stored["base_model_name_or_path"])
        if not self.base.exists():
            raise UserError(
                f"{file}: the adapters' base {self.base} does not exist; bring it back, or write its new place into "
                "base_model_name_or_path of that file"
            )
        rules = adapter_rules(architecture, self.lora).values()
        self._of_tensor = {name: rule for rule in rules for name in rule.huggingface}

    @cached_property
    def _stored(self) -> MegatronDirectory:
        return MegatronDirectory(self.path)

    def check_base(self) -> None:
        """Raise UserError if the base's weights are not those that the adapters were trained on. Reads them once."""
        file = huggingface_directory(self.path) / ADAPTER_BASE
        if not file.is_file():
            raise UserError(f"{file}: no such file; it says what the base's weights were: take another checkpoint")
        if weights_fingerprint(self.base) != parse_model_json(file.read_bytes(), file)["weights_fingerprint"]:
            raise UserError(
                f"{self.path}: its adapters were trained on other weights than {self.base} holds now; bring them back"
            )

    @property
    def tensors(self) -> list[str]:
        """PEFT's names of all tensors."""
        return list(self._of_tensor)

    def read(self, name: str, index: Index = (slice(None),)) -> Tensor:
        """A part of a tensor by PEFT's name, in the stored precision. Raises UserError if a number is not finite."""
        return self._read_rule(self._of_tensor[name])[name][index]

    @lru_cache(maxsize=4)  # noqa: B019  the object lives as long as the command
    def _read_rule(self, rule: Rule) -> dict[str, Tensor]:
        where = place(rule, self._architecture)
        read, itemsize = self._stored.rows_of(where), self._stored.dtype(where).itemsize
        blocks: dict[str, list[Tensor]] = {name: [] for name in rule.huggingface}
        for name, _, block in huggingface_blocks(rule, self._architecture, read, itemsize):
            if not all_finite(block):
                raise not_finite(self._stored.file_with_bad_numbers(where), name)
            blocks[name].append(block)
        return {name: torch.cat(parts) for name, parts in blocks.items()}
