"""What a checkpoint must hold: each of its files by size and checksum, in the checkpoint itself.

manifest.json   {"algorithm": "xxh3_128", "files": {name: {"bytes": ..., "checksum": ...}}, "checksum": that of `files`}

xxh3 finds every damage that disks, networks and interruptions do, several times as fast as SHA-256. It is no
protection against somebody who writes files to deceive. The model's small files in `huggingface/` are for people to
edit (a chat template, rope scaling): a change there is told and is no damage.
"""

import json
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from megatron_solopo.architecture.model_directory import HUGGINGFACE_FOLDER
from megatron_solopo.errors import UserError
from megatron_solopo.files import counted

MANIFEST = "manifest.json"
_ALGORITHM = "xxh3_128"
_BLOCK_BYTES = 1 << 22
_THREADS = 4
_SHOWN = 3


@dataclass(frozen=True)
class FileEntry:
    """A file as it was when the checkpoint was complete."""

    bytes: int
    checksum: str
    """Hex XXH3, 128 bits."""


def sealed(file: Path) -> FileEntry:
    """Bring a file to the disk; returns its size and its checksum as read back."""
    sync_file(file)
    return _entry(file)


def sealed_files(folder: Path, names: Iterable[str]) -> dict[str, FileEntry]:
    """`sealed` for files of a folder, several at a time."""
    names = list(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: sealed(folder / name), names), strict=True))


def write_manifest(folder: Path, files: Mapping[str, FileEntry]) -> None:
    """Write it into `folder`, last of all files, and bring the folder itself to the disk."""
    listed = {name: asdict(files[name]) for name in sorted(files)}
    content = {"algorithm": _ALGORITHM, "files": listed, "checksum": _checksum_of(listed)}
    file = folder / MANIFEST
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    sync_file(file)
    for each in {folder, *((folder / name).parent for name in files)}:
        sync_directory(each)


def read_manifest(folder: Path) -> dict[str, FileEntry]:
    """Files by their name in `folder`; raises UserError, naming the manifest, if it is missing or damaged."""
    file = folder / MANIFEST
    try:
        content = json.loads(file.read_bytes())
        listed = content["files"]
        if content["algorithm"] != _ALGORITHM or content["checksum"] != _checksum_of(listed):
            raise UserError
        return {name: FileEntry(**entry) for name, entry in listed.items()}
    except FileNotFoundError:
        raise UserError(f"{file}: is missing; it is the last file that a save writes") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{file}: is damaged") from None


def share(files: Mapping[str, FileEntry], rank: int, ranks: int) -> dict[str, FileEntry]:
    """The files that one of several ranks looks at: about as many bytes each, every file once."""
    loads = [0] * ranks
    mine = {}
    for name, entry in sorted(files.items(), key=lambda item: (-item[1].bytes, item[0])):
        least = loads.index(min(loads))
        loads[least] += entry.bytes
        if least == rank:
            mine[name] = entry
    return mine


def damages(folder: Path, files: Mapping[str, FileEntry], *, checksums: bool) -> list[str]:
    """One line for every file, but those to edit, that is not as it was: its path, and what is wrong.

    Args:
        checksums: read every file whole; False: compare sizes alone.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        listed = [(name, entry) for name, entry in files.items() if not _is_to_edit(name)]
        found = pool.map(lambda item: _damage(folder / item[0], item[1], checksums), listed)
        return [damage for damage in found if damage]


def edited(folder: Path, files: Mapping[str, FileEntry]) -> list[str]:
    """Names of the model's small files that somebody has changed or removed since."""
    listed = {name: entry for name, entry in files.items() if _is_to_edit(name)}
    return [name for name, entry in listed.items() if _damage(folder / name, entry, checksums=True)]


def check_listed(folder: Path, *, checksums: bool) -> str:
    """Hold a checkpoint against its manifest; returns what was found, for a report.

    Raises UserError naming the files that are damaged, or the manifest if it is. A checkpoint without one passes.
    """
    if not (folder / MANIFEST).exists():
        return "none in this checkpoint"
    files = read_manifest(folder)
    if problem := shown(damages(folder, files, checksums=checksums)):
        raise UserError(f"{problem}; the checkpoint is damaged")
    changed = ", ".join(edited(folder, files))
    return f"{counted(len(files), 'file')} as written" + (f", but changed by hand: {changed}" if changed else "")


def shown(found: list[str]) -> str:
    """Damages in one line, the first few by name; empty where there are none."""
    more = f" and {counted(len(found) - _SHOWN, 'more file')}" if len(found) > _SHOWN else ""
    return "; ".join(found[:_SHOWN]) + more


def sync_file(path: Path) -> None:
    """Bring what was written to a file to the disk."""
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def sync_directory(path: Path) -> None:
    """Bring names that were made or changed in a directory to the disk."""
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


def _checksum_of(listed: Mapping[str, object]) -> str:
    return xxhash.xxh3_128(json.dumps(listed, sort_keys=True).encode()).hexdigest()
