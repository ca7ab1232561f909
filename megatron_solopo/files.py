"""Write files that are complete or absent, and compute fingerprints of their content."""

import glob
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from megatron_solopo.errors import UserError


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`, renamed to `path` only if the body succeeds.

    The body creates a file or a directory there. If it raises any exception, also Ctrl-C, the temporary is removed and
    an existing `path` stays. Each writer of `path` has its own temporary name. If `path` may be a directory, call
    `check_replaceable` first.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(path)
    temporary = path.with_name(f".{path.name}.incomplete-{_writer()}")
    remove(temporary)
    try:
        yield temporary
    except BaseException:
        remove(temporary)
        raise
    replace(temporary, path)


def replace(complete: Path, path: Path) -> None:
    """Rename `complete` to `path`. An existing directory is renamed first and removed last."""
    if not path.is_dir() or path.is_symlink():
        complete.replace(path)
        return
    old = path.with_name(f".{path.name}.replaced-{_writer()}")
    path.rename(old)
    complete.rename(path)
    remove(old)


def check_replaceable(path: Path, own_names: Collection[str], key: str) -> None:
    """Raise UserError if `path` holds anything but `own_names`.

    The error names the directory, a foreign file and the `key` to change.
    """
    if not path.exists():
        return
    foreign = (
        [path.name] if path.is_file() else sorted(each.name for each in path.iterdir() if each.name not in own_names)
    )
    if foreign:
        raise UserError(f"{path}: holds {foreign[0]}, which would be lost; set {key} to another directory")


def check_writable(path: Path, key: str) -> None:
    """Raise UserError, naming `key`, if `path` cannot be created. Call it before hours of work on its content."""
    existing = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise UserError(
            f"{key}={path}: cannot be written: {existing} is not a directory, or this user may not write to it"
        )


def _writer() -> str:
    return f"{socket.gethostname()}-{os.getpid()}"


def _clear_leftovers(path: Path) -> None:
    """Remove the temporaries that killed processes of this machine left."""
    prefix = f".{path.name}.incomplete-{socket.gethostname()}-"
    for leftover in path.parent.glob(glob.escape(prefix) + "*"):
        # A process may write further files, with an ending behind the name of its temporary.
        process = leftover.name.removeprefix(prefix).split(".")[0]
        if process.isdigit() and not psutil.pid_exists(int(process)):
            remove(leftover)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole directory, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def append_synced(path: Path, text: str) -> None:
    """Append a text to a file, all of it or nothing, and wait until the disk has it. Raises OSError."""
    size = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
    except OSError:
        with suppress(OSError):
            os.truncate(path, size)
        raise


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, complete or not at all.

    Raises ValueError for NaN and infinity, which JSON does not have.
    """
    with atomic_path(path) as temporary:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
        temporary.write_text(text + "\n", encoding="utf-8")


def described_bytes(count: int) -> str:
    """A size in a readable unit: "1.50 GiB", "3.0 MiB", "812 bytes"."""
    if count >= 1 << 30:
        return f"{count / (1 << 30):.2f} GiB"
    return f"{count / (1 << 20):.1f} MiB" if count >= 1 << 20 else f"{count:,} bytes"


def counted(count: int, thing: str) -> str:
    """ "1 tensor", "2 tensors"."""
    return f"{count} {thing}{'' if count == 1 else 's'}"


def first_few(items: Sequence[object], most: int = 5) -> str:
    """The first items in one line, and "..." if there are more than `most`."""
    return ", ".join(map(str, items[:most])) + (", ..." if len(items) > most else "")


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


def parse_json(text: str) -> Any:
    """The JSON value of text that a user wrote.

    Raises ValueError for text that is no JSON: json.JSONDecodeError with the place, where it is known. Also raises it
    for what Python reads and JSON does not have: NaN, infinity, and a key that is there twice in one object.
    """
    return json.loads(text, object_pairs_hook=json_object, parse_constant=json_constant)


def json_constant(name: str) -> None:
    """Refuse NaN and Infinity: a `parse_constant` of json's decoders."""
    raise ValueError(f"{name} is no JSON value")


def json_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object: an `object_pairs_hook`. Raises ValueError for equal keys: Python takes the last in silence."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} is there twice in one object")
    return found


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return all objects of a JSON-lines file that this program appends to.

    A last line without a line end comes from a killed process. It is incomplete and skipped.
    """
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]
