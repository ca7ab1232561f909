"""Files that are complete or absent, and fingerprints of what they hold."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_BLOCK_BYTES = 1 << 16
_SAMPLED_BLOCKS = 64


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`, renamed to `path` only if the body succeeds.

    The body creates a file or a directory there. On any exception, Ctrl-C included, what was
    written is removed and an existing `path` stays as it was. An existing file is replaced;
    an existing directory is replaced only after the new one is complete.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.incomplete")
    remove(temporary)
    try:
        yield temporary
    except BaseException:
        remove(temporary)
        raise
    if path.is_dir() and not path.is_symlink():
        remove(path)
    temporary.replace(path)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole directory; nothing happens if it is absent."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, complete or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def sha256_text(text: str) -> str:
    """Hex SHA-256 of a string."""
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of a JSON value, independent of key order."""
    return sha256_text(json.dumps(value, sort_keys=True, ensure_ascii=False))


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a whole file."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sampled_sha256(path: Path) -> str:
    """Hex SHA-256 of a file's size and of 64 blocks of 64 KiB spread evenly over it.

    For weight files of many gigabytes: training changes every tensor, so a sample tells two
    checkpoints apart in milliseconds. Files up to 4 MiB are read whole.
    """
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        if size <= _BLOCK_BYTES * _SAMPLED_BLOCKS:
            digest.update(stream.read())
        else:
            for block in range(_SAMPLED_BLOCKS):
                stream.seek(block * (size - _BLOCK_BYTES) // (_SAMPLED_BLOCKS - 1))
                digest.update(stream.read(_BLOCK_BYTES))
    return digest.hexdigest()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """All objects of a JSON-lines file that this program wrote."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
