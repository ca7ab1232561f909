"""Tells models apart, in moments and however large they are."""

import hashlib
import json
from pathlib import Path
from typing import BinaryIO

from megatron_solopo.checkpoint.huggingface import SafetensorsDirectory
from megatron_solopo.checkpoint.megatron import MegatronDirectory
from megatron_solopo.files import sha256_file, sha256_json
from megatron_solopo.model_directory import huggingface_directory, is_megatron_checkpoint

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
