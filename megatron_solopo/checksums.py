"""Checksums of large files, kept beside them so that each file is read once.

`file_checksums` keeps the checksum of every file in `CHECKSUMS_FILE`, in the files' folder, with the file's size and
times. If that folder cannot be written, it keeps them in the user's cache (XDG_CACHE_HOME, or `~/.cache`). While size
and times stay, nothing is read again. A file that was written in the last seconds is not kept, because a second change
of it may leave its times as they are.
"""

import os
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
from megatron_solopo.files import sha256_file, sha256_json, sha256_text, write_json
from megatron_solopo.progress import bar_style

CHECKSUMS_FILE = ".weight_checksums.json"
"""Name of the file that keeps checksums in a model's directory. It is no part of the model."""
_ALGORITHM: Literal["xxh3_128"] = "xxh3_128"
_BLOCK_BYTES = 1 << 22
FILES_AT_ONCE = 4
"""Files that one process reads at the same time."""
# The coarsest times of a file system (FAT) are this far apart.
_SETTLED_NS = 2 * 10**9
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
# Results that others write into a model's directory do not count.
_SMALL_FILES = (
    *("config.json", "generation_config.json", "*.safetensors.index.json", "tokenizer*.json", "vocab.*", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template*", "additional_chat_templates/*.jinja", "*.model"),
)


class KnownFile(BaseModel):
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
    files: dict[str, KnownFile]


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

    def known_as(self, checksum: str) -> KnownFile:
        status = self.path.stat()
        return KnownFile(
            bytes=status.st_size,
            modified_ns=status.st_mtime_ns,
            changed_ns=status.st_ctime_ns,
            pieces=sha256_json(self.places),
            checksum=checksum,
        )


# Of this process, for what cannot be kept anywhere.
_known_here: dict[Path, KnownFile] = {}
_said: set[Path] = set()


def file_checksums(
    folder: Path, files: Mapping[str, LargeFile], read: Mapping[str, KnownFile] | None = None
) -> dict[str, str]:
    """Return the XXH3 checksums of files in `folder`, by name. Reads only files whose size or times have changed.

    Args:
        read: what `read_checksums` has found of some files, in this process or in another.

    Raises UserError if a file becomes shorter while it is read.
    """
    kept = _read_kept(folder)
    new = dict(read or {})
    found = {name: known for name, file in files.items() if (known := _recall(file, kept.get(name))) is not None}
    if unread := {name: file for name, file in files.items() if name not in found.keys() | new.keys()}:
        new |= read_checksums(unread, folder)
    if new:
        found |= new
        _keep(folder, files, kept, found)
    return {name: found[name].checksum for name in files}


def unread_files(folder: Path, files: Mapping[str, LargeFile]) -> dict[str, LargeFile]:
    """The files that `file_checksums` would have to read."""
    kept = _read_kept(folder)
    return {name: file for name, file in files.items() if _recall(file, kept.get(name)) is None}


def directory_fingerprint(folder: Path) -> str:
    """Return a hash of the files of a Hugging Face directory that decide its answers: weights, settings, tokenizer."""
    weights = {file.name: LargeFile.whole(file) for pattern in _WEIGHTS for file in folder.glob(pattern)}
    others = [file for pattern in _SMALL_FILES for file in folder.glob(pattern) if file.name != CHECKSUMS_FILE]
    small = {str(file.relative_to(folder)): sha256_file(file) for file in others}
    return sha256_json({"weights": file_checksums(folder, weights), "files": small})


def _recall(file: LargeFile, kept: KnownFile | None) -> KnownFile | None:
    """The checksum from an earlier reading, if the file has not changed since."""
    for known in (kept, _known_here.get(file.path.absolute())):
        if known is not None and file.known_as(known.checksum) == known:
            return known
    return None


def read_checksums(
    files: Mapping[str, LargeFile], path: Path, progress: Callable[[], None] | None = None, *, show_bar: bool = True
) -> dict[str, KnownFile]:
    """Read files whole, several at a time.

    Args:
        path: what they belong to, for the progress bar.
        progress: called after every few MiB, from several threads.
    """
    total = sum(file.bytes_to_read for file in files.values())
    label = f"checksums of {path}"
    with (
        tqdm(
            desc=label, total=total, unit="B", unit_scale=True, disable=not show_bar or not files, **bar_style("bytes")
        ) as bar,
        ThreadPoolExecutor(FILES_AT_ONCE) as pool,
    ):

        def advance(count: int) -> None:
            bar.update(count)
            if progress is not None:
                progress()

        return dict(zip(files, pool.map(lambda file: _read_file(file, advance), files.values()), strict=True))


def _read_file(file: LargeFile, progress: Callable[[int], Any]) -> KnownFile:
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


def _read_kept(folder: Path) -> dict[str, KnownFile]:
    """What was kept of a folder's files; nothing if it is missing or damaged, for then the files are read."""
    return _read_checksums(_in_users_cache(folder)) | _read_checksums(folder / CHECKSUMS_FILE)


def _read_checksums(file: Path) -> dict[str, KnownFile]:
    try:
        return _Checksums.model_validate_json(file.read_bytes()).files
    except (OSError, ValidationError):
        return {}


def _in_users_cache(folder: Path) -> Path:
    """The file for checksums of a folder that cannot be written."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    return caches / "megatron-solopo" / "checksums" / f"{sha256_text(str(folder.resolve()))[:32]}.json"


def _keep(
    folder: Path, files: Mapping[str, LargeFile], kept: dict[str, KnownFile], found: dict[str, KnownFile]
) -> None:
    now = time.time_ns()
    settled = {
        name: known for name, known in found.items() if now - max(known.modified_ns, known.changed_ns) > _SETTLED_NS
    }
    _known_here.update({files[name].path.absolute(): known for name, known in settled.items()})
    if not settled:
        return
    content = _Checksums(algorithm=_ALGORITHM, files=kept | settled).model_dump()
    try:
        write_json(folder / CHECKSUMS_FILE, content)
        return
    except OSError as error:
        reason = describe_os_error(error)
    other = _in_users_cache(folder)
    try:
        write_json(other, content)
        note = f"are kept in {other} ({reason})"
    except OSError as error:
        note = f"are not kept ({reason}; {describe_os_error(error)}), so each start reads the weights"
    if folder.absolute() not in _said:
        _said.add(folder.absolute())
        sys.stderr.write(f"note: checksums of {folder} {note}\n")
