"""Lists the files of a checkpoint with sizes and checksums, in the checkpoint itself, and finds damaged files.

manifest.json   {"algorithm": "xxh3_128", "files": {name: {"bytes": ..., "checksum": ...}}, "checksum": that of `files`}

xxh3 finds every damage that disks, networks and interruptions cause, and is several times as fast as SHA-256. It does
not protect against somebody who forges files. People may edit the model's small files in `huggingface/` (a chat
template, rope scaling): such a change is reported, but is no damage.
"""

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import xxhash
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_solopo.architecture.model_directory import HUGGINGFACE_FOLDER
from megatron_solopo.errors import UserError
from megatron_solopo.files import counted
from megatron_solopo.parallel.agreement import least_loaded

MANIFEST = "manifest.json"
_ALGORITHM: Literal["xxh3_128"] = "xxh3_128"
_BLOCK_BYTES = 1 << 22
_THREADS = 4
_SHOWN = 3


@dataclass(frozen=True)
class FileEntry:
    """A file at the time when the checkpoint was complete."""

    bytes: int
    checksum: str
    """XXH3 of 128 bits, in hex."""


class _Content(BaseModel):
    """manifest.json."""

    model_config = ConfigDict(strict=True, extra="forbid")

    algorithm: Literal["xxh3_128"]
    files: dict[str, FileEntry]
    checksum: str


def sealed_files(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """Flush files of a folder to the disk, several at a time; returns sizes and checksums as read back."""

    def seal(name: str) -> FileEntry:
        sync_file(folder / name)
        return _entry(folder / name)

    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(seal, names), strict=True))


def write_manifest(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Write the manifest into `folder`, after all other files, and flush the folders to the disk."""
    content = _Content(algorithm=_ALGORITHM, files=dict(sorted(files.items())), checksum=_checksum_of(files))
    file = folder / MANIFEST
    file.write_text(json.dumps(content.model_dump(), indent=1) + "\n", encoding="utf-8")
    sync_file(file)
    for each in {folder, *((folder / name).parent for name in files)}:
        sync_directory(each)


def read_manifest(folder: Path) -> dict[str, FileEntry]:
    """Return the files by their names in `folder`; raises UserError if the manifest is missing or damaged."""
    file = folder / MANIFEST
    try:
        content = _Content.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{file}: is missing; it is the last file that a save writes") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except ValidationError:
        raise UserError(f"{file}: is damaged") from None
    if content.checksum != _checksum_of(content.files):
        raise UserError(f"{file}: is damaged")
    return content.files


def file_shares(files: Mapping[str, FileEntry], ranks: int) -> list[dict[str, FileEntry]]:
    """Return the files that each of several ranks checks, with about as many bytes for each."""
    shares: list[dict[str, FileEntry]] = [{} for _ in range(ranks)]
    by_name = sorted(files)
    for name, rank in zip(by_name, least_loaded([files[name].bytes for name in by_name], ranks), strict=True):
        shares[rank][name] = files[name]
    return shares


def damages(folder: Path, files: Mapping[str, FileEntry], *, checksums: bool) -> list[str]:
    """Return one line for every damaged file: its path, and what is wrong. Files that people may edit are left out.

    Args:
        checksums: True reads every file whole; False compares sizes only.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        listed = [(name, entry) for name, entry in files.items() if not _is_to_edit(name)]
        found = pool.map(lambda item: _damage(folder / item[0], item[1], checksums), listed)
        return [damage for damage in found if damage]


def edited(folder: Path, files: Mapping[str, FileEntry]) -> list[str]:
    """Return the names of the model's small files that somebody has changed or removed."""
    listed = {name: entry for name, entry in files.items() if _is_to_edit(name)}
    return [name for name, entry in listed.items() if _damage(folder / name, entry, checksums=True)]


def check_listed(folder: Path, *, checksums: bool) -> str:
    """Compare a checkpoint with its manifest; returns the finding for a report. A checkpoint without one passes.

    Raises UserError naming the damaged files, or the manifest if that is damaged.
    """
    if not (folder / MANIFEST).exists():
        return "none in this checkpoint"
    files = read_manifest(folder)
    if problem := shown(damages(folder, files, checksums=checksums)):
        raise UserError(f"{problem}; the checkpoint is damaged")
    changed = ", ".join(edited(folder, files))
    return f"{counted(len(files), 'file')} as written" + (f", but changed by hand: {changed}" if changed else "")


def shown(found: list[str]) -> str:
    """Return the damages in one line, the first few by name, or an empty string."""
    more = f" and {counted(len(found) - _SHOWN, 'more file')}" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


def sync_file(path: Path) -> None:
    """Flush the content of a file to the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Flush new and changed names of a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _damage(file: Path, expected: FileEntry, checksums: bool) -> str | None:
    try:
        size = file.stat().st_size
        if size != expected.bytes:
            return f"{file}: has {size:,} bytes instead of {expected.bytes:,}"
        if checksums and _entry(file) != expected:
            return f"{file}: has another checksum than when it was written"
    except FileNotFoundError:
        return f"{file}: is missing"
    except OSError as error:
        return f"{file}: cannot be read: {error.strerror}"
    return None


def _is_to_edit(name: str) -> bool:
    return name.startswith(f"{HUGGINGFACE_FOLDER}/")


def _entry(file: Path) -> FileEntry:
    digest, size = xxhash.xxh3_128(), 0
    buffer = memoryview(bytearray(_BLOCK_BYTES))
    with file.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return FileEntry(size, digest.hexdigest())


def _checksum_of(files: Mapping[str, FileEntry]) -> str:
    listed = {name: asdict(entry) for name, entry in files.items()}
    return xxhash.xxh3_128(json.dumps(listed, sort_keys=True).encode()).hexdigest()
