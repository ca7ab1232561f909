"""Checksums of large files, kept beside them so that each file is read once.

`file_checksums` keeps the checksum of every file in `CHECKSUMS_FILE`, in the files' folder, with the file's size and
times. While those stay, nothing is read again. A file that was written in the last seconds is not kept, because a
second change of it may leave its times as they are.
"""

import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError
from tqdm import tqdm

from megatron_solopo.errors import UserError, describe_os_error
from megatron_solopo.files import sha256_file, sha256_json, write_json
from megatron_solopo.progress import bar_style

CHECKSUMS_FILE = ".weight_checksums.json"
"""Name of the file that keeps checksums in a model's directory. It is no part of the model."""
_ALGORITHM: Literal["xxh3_128"] = "xxh3_128"
_BLOCK_BYTES = 1 << 22
_THREADS = 4
# The coarsest times of a file system (FAT) are this far apart.
_SETTLED_NS = 2 * 10**9
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# Results that others write into a model's directory do not count.
_SMALL_FILES = (
    *("config.json", "generation_config.json", "*.safetensors.index.json", "tokenizer*.json", "vocab.*", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates/*.jinja", "*.model"),
)


class _Known(BaseModel):
    """The checksum of a file, and how the file looked when it was read."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    bytes: int
    modified_ns: int
    changed_ns: int
    pieces: str
    """Hex SHA-256 of the list of places that were read."""
    checksum: str


class _Checksums(BaseModel):
    """Content of `CHECKSUMS_FILE`."""

    model_config = ConfigDict(strict=True, extra="forbid")

    algorithm: Literal["xxh3_128"]
    files: dict[str, _Known]


@dataclass(frozen=True)
class LargeFile:
    """A file, and the places in it that count: name, first byte, number of bytes."""

    path: Path
    places: tuple[tuple[str, int, int], ...]

    @classmethod
    def whole(cls, path: Path) -> "LargeFile":
        """All of a file counts."""
        return cls(path, (("", 0, path.stat().st_size),))

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


def file_checksums(folder: Path, files: Mapping[str, LargeFile]) -> dict[str, str]:
    """Return the XXH3 checksums of files in `folder`, by name. Reads only files whose size or times have changed.

    If the folder cannot be written, the checksums are kept in this process alone, and a line says so.

    Raises UserError if a file becomes shorter while it is read.
    """
    kept = _read_checksums(folder)
    found = {name: known for name, file in files.items() if (known := _recall(file, kept.get(name))) is not None}
    if unread := {name: file for name, file in files.items() if name not in found}:
        found |= _read_files(unread, folder)
        _keep(folder, files, kept, found)
    return {name: known.checksum for name, known in found.items()}


def directory_fingerprint(folder: Path) -> str:
    """Return a hash of the files of a Hugging Face directory that decide its answers: weights, settings, tokenizer."""
    weights = {file.name: LargeFile.whole(file) for pattern in _WEIGHTS for file in folder.glob(pattern)}
    others = [file for pattern in _SMALL_FILES for file in folder.glob(pattern) if file.name != CHECKSUMS_FILE]
    small = {str(file.relative_to(folder)): sha256_file(file) for file in others}
    return sha256_json({"weights": file_checksums(folder, weights), "files": small})


def _recall(file: LargeFile, kept: _Known | None) -> _Known | None:
    """The checksum from an earlier reading, if the file has not changed since."""
    for known in (kept, _known_here.get(file.path.absolute())):
        if known is not None and file.known_as(known.checksum) == known:
            return known
    return None


def _read_files(files: dict[str, LargeFile], path: Path) -> dict[str, _Known]:
    """Read files whole, several at a time."""
    total = sum(file.bytes_to_read for file in files.values())
    label = f"checksums of {path}"
    with (
        tqdm(desc=label, total=total, unit="B", unit_scale=True, **bar_style("bytes")) as bar,
        ThreadPoolExecutor(_THREADS) as pool,
    ):
        return dict(zip(files, pool.map(lambda file: _read_file(file, bar.update), files.values()), strict=True))


def _read_file(file: LargeFile, progress: Callable[[int], Any]) -> _Known:
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
    """What `CHECKSUMS_FILE` holds; nothing if it is missing or damaged, for then the weights are read."""
    try:
        return _Checksums.model_validate_json((path / CHECKSUMS_FILE).read_bytes()).files
    except (OSError, ValidationError):
        return {}


def _keep(path: Path, files: Mapping[str, LargeFile], kept: dict[str, _Known], found: dict[str, _Known]) -> None:
    now = time.time_ns()
    settled = {
        name: known for name, known in found.items() if now - max(known.modified_ns, known.changed_ns) > _SETTLED_NS
    }
    _known_here.update({files[name].path.absolute(): known for name, known in settled.items()})
    if not settled:
        return
    content = _Checksums(algorithm=_ALGORITHM, files=kept | settled)
    try:
        write_json(path / CHECKSUMS_FILE, content.model_dump())
    except OSError as error:
        if path.absolute() not in _said:
            _said.add(path.absolute())
            reason = describe_os_error(error)
            sys.stderr.write(f"note: checksums of {path} are not kept ({reason}), so each start reads the weights\n")
