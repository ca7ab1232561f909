"""Read a corpus row by row. A bad row gives its place, its field and the reason.

A file is of a kind that `data.row_files` reads, or SQuAD's one object.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_solopo.data.row_files import FileRow, Unit, first_bytes, read_file_rows, read_whole_text, unit_of
from megatron_solopo.errors import UserError
from megatron_solopo.files import parse_json
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
_SQUAD_BEGIN = re.compile(rb'\s*\{\s*"(data|version)"\s*:')
_ID_NAMES = ("_id", "id")


@dataclass(frozen=True)
class BadRow:
    """One reason why a row is not of the format."""

    path: str
    number: int
    unit: Unit
    """What `number` counts."""
    id: str
    """Of the row; "" if it has none."""
    field: str
    reason: str

    @property
    def place(self) -> str:
        """`path:3`, or `path: row 3 (id 'q3')` for a row that has no line of its own."""
        if self.unit == "line":
            return f"{self.path}:{self.number}"
        return f"{self.path}: row {self.number}" + (f" (id {self.id!r})" if self.id else "")

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.place, self.field, self.reason)))


def read_questions(path: Path, format: Format) -> Iterator[tuple[int, Question | BadRow]]:
    """Every row with its number, in the order of the file. A bad row yields one `BadRow` for each mistake.

    A row with the id of an earlier good row is bad. Rows of JSON lines have the number of their line.

    Raises UserError if the file is missing or broken as a whole.
    """
    first: dict[str, int] = {}
    is_squad_file = format == "squad" and _is_one_object(path)
    unit: Unit = "row" if is_squad_file else unit_of(path)
    for number, found in _read_squad(path) if is_squad_file else _read(path, format):
        if isinstance(found, Question):
            if found.id in first:
                reason = f"{found.id!r} is already the id of the question of {unit} {first[found.id]}"
                found = BadRow(str(path), number, unit, found.id, "id", reason)
            else:
                first[found.id] = number
        yield number, found


def read_distractors(path: Path) -> Iterator[tuple[int, Document | BadRow]]:
    """Every document of a pool file with its number. Raises like `read_questions`."""
    for row in read_file_rows(path):
        for found in _parse(path, row, "distractor"):
            yield row.number, found.to_document() if isinstance(found, DistractorRecord) else found


def _read(path: Path, format: Format) -> Iterator[tuple[int, Question | BadRow]]:
    for row in read_file_rows(path):
        for found in _parse(path, row, format):
            yield row.number, found if isinstance(found, BadRow) else found.to_question()


def _parse(path: Path, row: FileRow, format: str) -> Iterator[Any]:
    expected = f"(expected a {format} row)"
    ids = [row.value[name] for name in _ID_NAMES if name in row.value] if isinstance(row.value, dict) else []
    row_id = str(ids[0]) if ids else ""
    if row.problem:
        yield BadRow(str(path), row.number, row.unit, row_id, "", f"{row.problem} {expected}")
        return
    try:
        yield _RECORDS[format].validate_python(row.value)
    except ValidationError as error:
        for field, reason in _mistakes(error):
            yield BadRow(str(path), row.number, row.unit, row_id, field, f"{reason} {expected}")


def _mistakes(error: ValidationError) -> Iterator[tuple[str, str]]:
    """Field and reason of each mistake."""
    for detail in error.errors(include_input=False, include_url=False):
        yield ".".join(map(str, detail["loc"])), " ".join(detail["msg"].split())


def _is_one_object(path: Path) -> bool:
    """Whether a file is SQuAD's one object, which begins with its version or its data."""
    return _SQUAD_BEGIN.match(first_bytes(path)) is not None


def _read_squad(path: Path) -> Iterator[tuple[int, Question | BadRow]]:
    """Read the released file: one object. Its questions are numbered. The number of a bad row is its article's."""
    text = read_whole_text(path)
    try:
        value = parse_json(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not valid JSON: {error.msg} at column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON: {error}") from None
    if not isinstance(value.get("data"), list):
        raise UserError(f"{path}: data: expected a list of articles (expected a squad file)")
    number = 0
    for found in read_articles(value["data"]):
        if isinstance(found, Question):
            number += 1
            yield number, found
            continue
        article, mistake = found
        for field, reason in _mistakes(mistake):
            place = ".".join(filter(None, (f"data.{article}", field)))
            yield article + 1, BadRow(str(path), article + 1, "row", "", place, f"{reason} (expected a squad row)")
