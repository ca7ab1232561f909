"""Read a corpus row by row. A bad row gives its line, its field and the reason.

A file is JSON lines, a JSON array, or SQuAD's one object. Its first character shows which.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_solopo.errors import UserError
from megatron_solopo.triplets.corpus.formats import (
    DistractorRecord,
    Document,
    Format,
    GenericRecord,
    HotpotRecord,
    MusiqueRecord,
    Question,
    SquadRecord,
    read_articles,
)

_RECORDS: dict[str, TypeAdapter[Any]] = {
    "musique": TypeAdapter(MusiqueRecord),
    "hotpotqa": TypeAdapter(HotpotRecord),
    "2wikimultihopqa": TypeAdapter(HotpotRecord),
    "squad": TypeAdapter(SquadRecord),
    "generic": TypeAdapter(GenericRecord),
    "distractor": TypeAdapter(DistractorRecord),
}
_WHITE_SPACE = " \t\r\n"


@dataclass(frozen=True)
class BadRow:
    """One reason why a row is not of the format: `path:line: field: reason`."""

    path: str
    line: int
    field: str
    reason: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (f"{self.path}:{self.line}", self.field, self.reason)))


def read_questions(path: Path, format: Format) -> Iterator[tuple[int, Question | BadRow]]:
    """Every row with its line, in the order of the file. A bad row yields one `BadRow` for each mistake.

    A row with the id of an earlier good row is bad.

    Raises UserError if the file is missing or broken as a whole.
    """
    first_line: dict[str, int] = {}
    for line, found in _read(path, format):
        if isinstance(found, Question):
            if found.id in first_line:
                reason = f"{found.id!r} is already the id of the question of line {first_line[found.id]}"
                found = BadRow(str(path), line, "id", reason)
            else:
                first_line[found.id] = line
        yield line, found


def read_distractors(path: Path) -> Iterator[tuple[int, Document | BadRow]]:
    """Every document of a pool file with its line. Raises like `read_questions`."""
    for line, raw in _rows(path):
        for found in _parse(path, line, raw, "distractor"):
            yield line, found.to_document() if isinstance(found, DistractorRecord) else found


def _read(path: Path, format: Format) -> Iterator[tuple[int, Question | BadRow]]:
    if format == "squad" and path.suffix != ".jsonl" and _first_character(path) == b"{":
        yield from _read_squad(path)
        return
    for line, raw in _rows(path):
        for found in _parse(path, line, raw, format):
            yield line, found if isinstance(found, BadRow) else found.to_question()


def _parse(path: Path, line: int, raw: bytes | str, format: str) -> Iterator[Any]:
    try:
        yield _RECORDS[format].validate_json(raw)
    except ValidationError as error:
        yield from _bad_rows(path, line, "", error, format)


def _bad_rows(path: Path, line: int, place: str, error: ValidationError, format: str) -> Iterator[BadRow]:
    for detail in error.errors(include_input=False, include_url=False):
        field = ".".join(filter(None, (place, *map(str, detail["loc"]))))
        yield BadRow(str(path), line, field, f"{' '.join(detail['msg'].split())} (expected a {format} row)")


def _first_character(path: Path) -> bytes:
    try:
        with path.open("rb") as stream:
            while (character := stream.read(1)) and character.isspace():
                pass
            return character
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None


def _rows(path: Path) -> Iterator[tuple[int, bytes | str]]:
    """Line and JSON text of each row. Blank lines are no rows."""
    if _first_character(path) == b"[":
        yield from _array_items(path)
        return
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.isspace():
                yield number, line


def _array_items(path: Path) -> Iterator[tuple[int, str]]:
    """The items of a JSON array, one at a time. The whole text is in memory, the objects are not."""
    text = _decode(path)
    decoder = json.JSONDecoder()
    position, line, counted = text.index("[") + 1, 1, 0
    separator = ","
    while True:
        position = _skip(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            break
        if separator != ",":
            raise UserError(f"{path}:{line}: not valid JSON: expected ',' or ']' behind an item of the array")
        try:
            _, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{line}: not valid JSON: {error}") from None
        yield line, text[position:end]
        position = _skip(text, end)
        separator = text[position : position + 1]
        position += separator == ","
    if _skip(text, position + 1) != len(text):
        raise UserError(f"{path}:{line}: not valid JSON: text behind the array")


def _skip(text: str, position: int) -> int:
    while text[position : position + 1] and text[position] in _WHITE_SPACE:
        position += 1
    return position


def _decode(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8: byte 0x{error.object[error.start]:02x}") from None


def _read_squad(path: Path) -> Iterator[tuple[int, Question | BadRow]]:
    """Read the released file: one object, nearly always on one line. So the field of a bad row says where it is."""
    text = _decode(path)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value.get("data"), list):
        yield 1, BadRow(str(path), 1, "data", "expected a list of articles (expected a squad file)")
        return
    for found in read_articles(value["data"]):
        if isinstance(found, Question):
            yield 1, found
        else:
            place, mistake = found
            for bad in _bad_rows(path, 1, place, mistake, "squad"):
                yield 1, bad
