"""A model's small files, which travel with its weights.

huggingface/config.json, generation_config.json, tokenizer, chat template, licence   copied unchanged
huggingface/megatron_solopo.json      the precision that each tensor had in the Hugging Face directory
"""

import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from pydantic import BaseModel, ValidationError

from megatron_solopo.architecture.model_directory import (
    ADAPTER_BASE,
    ADAPTER_CONFIG,
    huggingface_directory,
    is_megatron_checkpoint,
)
from megatron_solopo.checkpoint.huggingface_weights import DTYPES, SafetensorsDirectory
from megatron_solopo.checksums import CHECKSUMS_FILE
from megatron_solopo.errors import UserError

MODEL_FILES_MANIFEST = "megatron_solopo.json"
# Weights, their indices and code do not travel. The model card does not either, for it describes the untrained model.
_CARRIED = ("*.json", "*.jinja", "*.model", "*.model.v*", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*", "USE_POLICY*")
_FOLDERS = ("additional_chat_templates",)
_NOT_CARRIED = (
    "*.index.json",
    CHECKSUMS_FILE,
    # These describe what does not travel: an adapter, Mistral's own form of the weights, quantized weights, another
    # training, folders of sentence-transformers.
    ADAPTER_CONFIG,
    ADAPTER_BASE,
    "params.json",
    "quantize_config.json",
    "trainer_state.json",
    "*_results.json",
    "modules.json",
)


class _SourceDtypes(BaseModel):
    """Content of `MODEL_FILES_MANIFEST`."""

    dtypes: dict[str, str]


def read_model_files(path: Path) -> dict[str, bytes]:
    """Read the small files of the model in `path` (a Hugging Face directory or a Megatron checkpoint).

    Returns their contents by relative name, with `MODEL_FILES_MANIFEST`. Raises UserError if a header of the weights is
    damaged.
    """
    folder = huggingface_directory(path)
    candidates = [folder, *(folder / name for name in _FOLDERS)]
    files = [file for each in candidates if each.is_dir() for file in sorted(each.iterdir()) if file.is_file()]
    found = {str(file.relative_to(folder)): file.read_bytes() for file in files if _is_carried(file.name)}
    if not is_megatron_checkpoint(path):
        dtypes = {name: entry.dtype for name, entry in SafetensorsDirectory(path).entries.items()}
        found[MODEL_FILES_MANIFEST] = (json.dumps({"dtypes": dtypes}, indent=2) + "\n").encode()
    return found


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write the files of `read_model_files` into a new folder."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def source_dtypes(checkpoint: Path) -> dict[str, str]:
    """The precision that each tensor had in the Hugging Face directory, in safetensors' names.

    Raises UserError if the checkpoint does not state it.
    """
    file = huggingface_directory(checkpoint) / MODEL_FILES_MANIFEST
    remedy = "it states the precision of the original weights; choose one instead, with --dtype"
    try:
        dtypes = _SourceDtypes.model_validate_json(file.read_bytes()).dtypes
    except FileNotFoundError:
        raise UserError(f"{file}: is missing; {remedy}") from None
    except ValidationError:
        raise UserError(f"{file}: is damaged; {remedy}") from None
    return {name: dtype for name, dtype in dtypes.items() if dtype in DTYPES}


def _is_carried(name: str) -> bool:
    return any(fnmatch(name, each) for each in _CARRIED) and not any(fnmatch(name, each) for each in _NOT_CARRIED)
