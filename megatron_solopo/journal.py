"""Files of JSON lines that grow while a program works, and that a killed program continues.

The first line is {"journal": ...} and holds everything that decides what the other lines may be. A line counts once it
has been appended and synced to the disk. A last line without a line break was being written when the program died.
"""

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

_KEY = "journal"


def header_line(header: dict[str, Any]) -> str:
    """The first line of a journal, without its line break."""
    return json.dumps({_KEY: header}, ensure_ascii=False)


def parse_header(line: bytes) -> dict[str, Any] | None:
    """The header in the first line of a journal; None if it holds none."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, an integer of too many digits, too many brackets
        return None
    header = value.get(_KEY) if isinstance(value, dict) else None
    return header if isinstance(header, dict) else None


def complete_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Every line that ends with a line break, with its byte offset."""
    offset = 0
    with path.open("rb") as stream:
        for line in stream:
            if line.endswith(b"\n"):
                yield offset, line
            offset += len(line)


def append_lines(stream: BinaryIO, lines: Sequence[str]) -> None:
    """Append lines, given without line breaks. They are on the disk when this returns."""
    stream.write("".join(f"{line}\n" for line in lines).encode("utf-8"))
    stream.flush()
    os.fsync(stream.fileno())
