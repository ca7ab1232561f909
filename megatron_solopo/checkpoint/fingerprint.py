"""Tells models apart by their bytes: the exact fingerprint, and a quick sample of it."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

from megatron_solopo.architecture.model_directory import CONFIG, huggingface_directory, is_megatron_checkpoint
from megatron_solopo.checkpoint.huggingface_weights import SafetensorsDirectory
from megatron_solopo.checkpoint.megatron_reader import MegatronDirectory, Piece
from megatron_solopo.checksums import KnownFile, LargeFile, file_checksums, unread_files
from megatron_solopo.files import sha256_file, sha256_json

_SAMPLE_BYTES = 4096


def weights_fingerprint(path: Path, read: Mapping[str, KnownFile] | None = None) -> str:
    """Return a hash of config.json and of all bytes of the weights.

    Args:
        path: a Hugging Face directory or a Megatron checkpoint. In a checkpoint the model's tensors count, and the
            optimizer's state does not.
        read: what was read of the files of `unread_weights`.

    The same weights have different fingerprints as a Hugging Face directory and as a checkpoint, and under different
    layouts. The first call reads all weights. Later calls read only files whose size or times have changed. Of
    several ranks, only one should call it: see `train.identity.model_fingerprint`.

    Raises UserError if the weights are missing or damaged.
    """
    checksums = file_checksums(path, _weights_files(path), read)
    return sha256_json({"config": sha256_file(huggingface_directory(path) / CONFIG), "weights": checksums})


def unread_weights(path: Path) -> dict[str, LargeFile]:
    """The files of a model's weights whose checksums are not known, by name."""
    return unread_files(path, _weights_files(path))


def _weights_files(path: Path) -> dict[str, LargeFile]:
    """The files that hold weights, by name."""
    if is_megatron_checkpoint(path):
        pieces: dict[Path, list[Piece]] = {}
        for piece in MegatronDirectory(path).pieces():
            pieces.setdefault(piece.file, []).append(piece)
        return {file.name: LargeFile(file, _places(each)) for file, each in pieces.items()}
    names = sorted({entry.file for entry in SafetensorsDirectory(path).entries.values()})
    return {name: LargeFile.whole(path / name) for name in names}


def _places(pieces: list[Piece]) -> tuple[tuple[str, int, int], ...]:
    return tuple(sorted((f"{piece.key} {piece.offsets}", piece.start, piece.length) for piece in pieces))


def sample_weights(path: Path) -> str:
    """Return a hash of the config and of 4 KiB from the middle of each tensor, in a moment and for any size.

    In a checkpoint it takes the middle of each stored piece. It finds another model, but not an edit of a few numbers.
    So it only compares what several hosts read at the same time.
    """
    samples: object
    if is_megatron_checkpoint(path):
        samples = sorted(_sample_pieces(path))
    else:
        files = sorted({entry.file for entry in SafetensorsDirectory(path).entries.values()})
        samples = {file: _sample_tensors(path / file) for file in files}
    return sha256_json({"config": sha256_file(huggingface_directory(path) / CONFIG), "weights": samples})


def _sample_tensors(file: Path) -> str:
    """Hex SHA-256 of the header of a safetensors file and of the middle of each tensor."""
    with file.open("rb") as stream:
        header = stream.read(int.from_bytes(stream.read(8), "little"))
        digest = hashlib.sha256(header)
        start_of_data = stream.tell()
        for name, entry in sorted(json.loads(header).items()):
            if name != "__metadata__":
                start, end = entry["data_offsets"]
                digest.update(_middle(stream, start_of_data + start, end - start))
    return digest.hexdigest()


def _sample_pieces(path: Path) -> Iterator[tuple[str, list[int], str]]:
    """The key, the place, and the hex SHA-256 of the middle of every stored piece of a model tensor."""
    for piece in MegatronDirectory(path).pieces():
        with piece.file.open("rb") as stream:
            digest = hashlib.sha256(_middle(stream, piece.start, piece.length)).hexdigest()
        yield piece.key, list(piece.offsets), digest


def _middle(stream: BinaryIO, start: int, length: int) -> bytes:
    stream.seek(start + max(0, (length - _SAMPLE_BYTES) // 2))
    return stream.read(min(_SAMPLE_BYTES, length))
