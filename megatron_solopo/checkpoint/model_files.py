"""The small files of a model: what travels with its weights from Hugging Face to Megatron and back.

huggingface/config.json, generation_config.json, tokenizer and chat template, licence   as they are
huggingface/megatron_solopo.json      the precision that each tensor had in the Hugging Face directory

Tells models apart, in moments and however large they are.
"""

import hashlib
import json
from collections.abc import Mapping
from fnmatch import fnmatch
from pathlib import Path
from typing import BinaryIO

from megatron_solopo.architecture.model_directory import huggingface_directory, is_megatron_checkpoint
from megatron_solopo.checkpoint.huggingface_weights import DTYPES, SafetensorsDirectory
from megatron_solopo.checkpoint.megatron_reader import MegatronDirectory
from megatron_solopo.errors import UserError
from megatron_solopo.files import sha256_file, sha256_json

MODEL_FILES_MANIFEST = "megatron_solopo.json"
# Neither weights and their indices, nor code, nor the model card, which describes another model than the trained one.
_CARRIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*", "NOTICE*", "USE_POLICY*")
_FOLDERS = ("additional_chat_templates",)
_LEFT = ("*.index.json",)


def read_model_files(path: Path) -> dict[str, bytes]:
    """Content by relative name, manifest included, of the model in a Hugging Face directory or a Megatron checkpoint.

    Raises UserError if the weights' headers are damaged.
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
    """Write them into a new folder."""
    for name, content in files.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


def source_dtypes(checkpoint: Path) -> dict[str, str]:
    """The precision of each Hugging Face tensor before it became part of a Megatron checkpoint, in safetensors' names.

    Raises UserError if the checkpoint does not say so.
    """
    file = huggingface_directory(checkpoint) / MODEL_FILES_MANIFEST
    try:
        dtypes = json.loads(file.read_bytes())["dtypes"]
        return {str(name): dtype for name, dtype in dtypes.items() if dtype in DTYPES}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(
            f"{file}: missing or damaged; it says which precision the weights came in. Choose one instead, with --dtype"
        ) from None


def _is_carried(name: str) -> bool:
    return any(fnmatch(name, each) for each in _CARRIED) and not any(fnmatch(name, each) for each in _LEFT)


_SAMPLE_BYTES = 4096


def weights_fingerprint(path: Path) -> str:
    """Identifies the model in a Hugging Face directory or a Megatron checkpoint: its config, a sample of every tensor.

    4 KiB from the middle of each tensor (of each stored piece, in a checkpoint) tell two models apart in a
    moment, however large: training or merging changes a tensor everywhere. An edit of a few single numbers
    can go unnoticed. The same weights have one fingerprint as a Hugging Face directory and another as a checkpoint.
    """
    samples: object
    if is_megatron_checkpoint(path):
        samples = _sample_checkpoint(path)
    else:
        files = sorted({entry.file for entry in SafetensorsDirectory(path).entries.values()})
        samples = {file: _sample_tensors(path / file) for file in files}
    return sha256_json({"config": sha256_file(huggingface_directory(path) / "config.json"), "weights": samples})


def _sample_tensors(file: Path) -> str:
    """Hex SHA-256 of a safetensors file's header and of the middle of each of its tensors."""
    with file.open("rb") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
        digest = hashlib.sha256(header)
        start_of_data = stream.tell()
        for name, entry in sorted(json.loads(header).items()):
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                digest.update(_middle(stream, start_of_data + start, end - start))
    return digest.hexdigest()


def _sample_checkpoint(path: Path) -> list[tuple[str, list[int], str]]:
    """Of every stored piece of a model tensor: its key, its place, and the hex SHA-256 of its middle."""
    samples = []
    for piece in MegatronDirectory(path).pieces():
        with piece.file.open("rb") as stream:
            digest = hashlib.sha256(_middle(stream, piece.start, piece.length)).hexdigest()
        samples.append((piece.key, list(piece.offsets), digest))
    return sorted(samples)


def _middle(stream: BinaryIO, start: int, length: int) -> bytes:
    stream.seek(start + max(0, (length - _SAMPLE_BYTES) // 2))
    return stream.read(min(_SAMPLE_BYTES, length))
