"""Tells models apart by their bytes: the exact fingerprint, and a quick sample of it.

`weights_fingerprint` reads all bytes of the weights once. It keeps the checksum of every file in `WEIGHT_CHECKSUMS`,
beside the weights, with the file's size and times. While those stay, nothing is read again. A file that was written in
the last seconds is not kept, because a second change of it may leave its times as they are.
"""

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm import tqdm

from megatron_solopo.architecture.model_directory import CONFIG, huggingface_directory, is_megatron_checkpoint
from megatron_solopo.checkpoint.huggingface_weights import SafetensorsDirectory
from megatron_solopo.checkpoint.megatron_reader import MegatronDirectory, Piece
from megatron_solopo.errors import UserError, describe_os_error
from megatron_solopo.files import sha256_file, sha256_json, write_json
from megatron_solopo.progress import bar_style

WEIGHT_CHECKSUMS = ".weight_checksums.json"
"""Name of the file that keeps checksums in a model's directory. It is no part of the model."""
_ALGORITHM: Literal["xxh3_128"] = "xxh3_128"
_BLOCK_BYTES = 1 << 22
_THREADS = 4
_SAMPLE_BYTES = 4096
# The coarsest times of a file system (FAT) are this far apart.
_SETTLED_NS = 2 * 10**9


class _Known(BaseModel):
    """The checksum of a file of weights, and how the file looked when it was read."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    bytes: int
    modified_ns: int
    changed_ns: int
    pieces: str
    """Hex SHA-256 of the list of places that were read."""
    checksum: str


class _Checksums(BaseModel):
    """Content of `WEIGHT_CHECKSUMS`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    algorithm: Literal["xxh3_128"]
    files: dict[str, _Known]


@dataclass(frozen=True)
class _WeightsFile:
    """A file of weights, and the places in it that hold the model: name, first byte, number of bytes."""

    path: Path
    places: tuple[tuple[str, int, int], ...]

    @property
    def bytes_to_read(self) -> int:
        return sum(length for _, _, length in self.places)

    def known_as(self, checksum: str) -> _Known:
        status = self.path.stat()
        return _Known(
            bytes=status.st_size,
            modified_ns=status.st_mtime_ns,
            changed_ns=status.st_ctime_ns,
            pieces=sha256_json(self.places),
            checksum=checksum,
        )


# Of this process, for directories that cannot be written.
_known_here: dict[Path, _Known] = {}
_said: set[Path] = set()


def weights_fingerprint(path: Path) -> str:
    """Return a hash of config.json and of all bytes of the weights.

    Args:
        path: a Hugging Face directory or a Megatron checkpoint. In a checkpoint the model's tensors count, and the
            optimizer's state does not.

    The same weights have different fingerprints as a Hugging Face directory and as a checkpoint, and under different
    layouts. The first call reads all weights. Later calls read only files whose size or times have changed. If the
    directory cannot be written, the checksums are kept in this process alone, and a line says so.

    Raises UserError if the weights are missing or damaged. Of several ranks, only one should call it.
    """
    files = _weights_files(path)
    kept = _read_checksums(path)
    found = {name: known for name, file in files.items() if (known := _recall(file, kept.get(name))) is not None}
    if unread := {name: file for name, file in files.items() if name not in found}:
        found |= _read_files(unread, path)
        _keep(path, files, found)
    checksums = {name: known.checksum for name, known in found.items()}
    return sha256_json({"config": sha256_file(huggingface_directory(path) / CONFIG), "weights": checksums})


def _weights_files(path: Path) -> dict[str, _WeightsFile]:
    """The files that hold weights, by name."""
    if is_megatron_checkpoint(path):
        pieces: dict[Path, list[Piece]] = {}
        for piece in MegatronDirectory(path).pieces():
            pieces.setdefault(piece.file, []).append(piece)
        return {file.name: _WeightsFile(file, _places(each)) for file, each in pieces.items()}
    names = sorted({entry.file for entry in SafetensorsDirectory(path).entries.values()})
    return {name: _WeightsFile(path / name, (("", 0, (path / name).stat().st_size),)) for name in names}


def _places(pieces: list[Piece]) -> tuple[tuple[str, int, int], ...]:
    return tuple(sorted((f"{piece.key} {piece.offsets}", piece.start, piece.length) for piece in pieces))


def _recall(file: _WeightsFile, kept: _Known | None) -> _Known | None:
    """The checksum from an earlier reading, if the file has not changed since."""
    for known in (kept, _known_here.get(file.path.absolute())):
        if known is not None and file.known_as(known.checksum) == known:
            return known
    return None


def _read_files(files: dict[str, _WeightsFile], path: Path) -> dict[str, _Known]:
    """Read files whole, several at a time."""
    total = sum(file.bytes_to_read for file in files.values())
    label = f"checksums of {path}"
    with (
        tqdm(desc=label, total=total, unit="B", unit_scale=True, **bar_style("bytes")) as bar,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        return dict(zip(files, pool.map(lambda file: _read_file(file, bar.update), files.values()), strict=True))


def _read_file(file: _WeightsFile, progress: Callable[[int], Any]) -> _Known:
    before = file.known_as("")  # a change while it is read is a change since
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    with file.path.open("rb", buffering=0) as stream:
        for name, start, length in file.places:
            digest.update(f"{name} {length}\n".encode())
            stream.seek(start)
            while length and (count := stream.readinto(buffer[: min(length, _BLOCK_BYTES)])):
                digest.update(buffer[:count])
                length -= count
                progress(count)
            if length:
                raise UserError(f"{file.path}: was cut short while it was read; start again when it is complete")
    return before.model_copy(update={"checksum": digest.hexdigest()})


def _read_checksums(path: Path) -> dict[str, _Known]:
    """What `WEIGHT_CHECKSUMS` holds; nothing if it is missing or damaged, for then the weights are read."""
    try:
        return _Checksums.model_validate_json((path / WEIGHT_CHECKSUMS).read_bytes()).files
    except (OSError, ValidationError):
        return {}


def _keep(path: Path, files: dict[str, _WeightsFile], found: dict[str, _Known]) -> None:
    now = time.time_ns()
    settled = {
        name: known for name, known in found.items() if now - max(known.modified_ns, known.changed_ns) > _SETTLED_NS
    }
    _known_here.update({files[name].path.absolute(): known for name, known in settled.items()})
    if not settled:
        return
    content = _Checksums(algorithm=_ALGORITHM, files=settled)
    try:
        write_json(path / WEIGHT_CHECKSUMS, content.model_dump())
    except OSError as error:
        if path.absolute() not in _said:
            _said.add(path.absolute())
            reason = describe_os_error(error)
            sys.stderr.write(f"note: checksums of {path} are not kept ({reason}), so each start reads the weights\n")


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
