"""The small files of a model: what travels with its weights from Hugging Face to Megatron and back.

huggingface/config.json, generation_config.json, tokenizer and chat template, licence   as they are
huggingface/megatron_solopo.json      the precision that each tensor had in the Hugging Face directory
"""

import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path

from megatron_solopo.checkpoint.huggingface import DTYPES, SafetensorsDirectory
from megatron_solopo.model_directory import huggingface_directory, is_megatron_checkpoint

MANIFEST = "megatron_solopo.json"
# Neither weights and their indices, nor code, nor the model card, which describes another model than the trained one.
_CARRIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*", "USE_POLICY*")
_FOLDERS = ("additional_chat_templates",)
_LEFT = ("*.index.json",)


def read_model_files(path: Path) -> dict[str, bytes]:
    """Content by relative name, manifest included, of the model in a Hugging Face directory or a Megatron checkpoint.

    Raises ValueError if the weights' headers are damaged.
    """
    folder = huggingface_directory(path)
    candidates = [folder, *(folder / name for name in _FOLDERS)]
    files = [file for each in candidates if each.is_dir() for file in sorted(each.iterdir()) if file.is_file()]
    found = {str(file.relative_to(folder)): file.read_bytes() for file in files if _is_carried(file.name)}
    if not is_megatron_checkpoint(path):
        dtypes = {name: entry.dtype for name, entry in SafetensorsDirectory(path).entries.items()}
        found[MANIFEST] = (json.dumps({"dtypes": dtypes}, indent=2) + "\n").encode()
    return found


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write them into a new folder."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def source_dtypes(checkpoint: Path) -> dict[str, str]:
    """The precision of each Hugging Face tensor before it became part of a Megatron checkpoint, in safetensors' names.

    Raises ValueError if the checkpoint does not say so.
    """
    file = huggingface_directory(checkpoint) / MANIFEST
    try:
        dtypes = json.loads(file.read_bytes())["dtypes"]
        return {str(name): dtype for name, dtype in dtypes.items() if dtype in DTYPES}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f"{file}: missing or damaged; it says which precision the weights came in. Choose one instead, with --dtype"
        ) from None


def _is_carried(name: str) -> bool:
    return any(fnmatch(name, each) for each in _CARRIED) and not any(fnmatch(name, each) for each in _LEFT)
