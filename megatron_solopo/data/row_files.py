"""Files of preference rows, and a validator that lists every bad row.

A file is JSONL or parquet and holds one kind of row: triplets or pairs, see `megatron_solopo.data.row`.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from megatron_solopo.data.row import FIELDS, Form, Kind, PreferenceRow, RowError, bad_row, parse_row

_PARQUET_BATCH_ROWS = 64


@dataclass(frozen=True)
class ValidationReport:
    """What a file holds, and everything wrong with it in file order."""

    path: Path
    rows: int
    kind: Kind | None
    forms: tuple[Form, ...]
    """The forms that occur, sorted."""
    errors: list[RowError]

    def __str__(self) -> str:
        """One line per error, `file:line: field: reason`, then one line of summary."""
        lines = [": ".join(filter(None, (self._place(error), error.field, error.reason))) for error in self.errors]
        bad_lines = len({error.line for error in self.errors if error.line})
        if self.errors:
            summary = f"{len(self.errors)} errors, {bad_lines} of {self.rows} rows are bad"
        else:
            summary = f"{self.rows} rows of kind {self.kind}, no errors"
        return "\n".join([*lines, f"{self.path}: {summary}"])

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON value."""
        return {
            "path": str(self.path),
            "rows": self.rows,
            "kind": self.kind,
            "forms": list(self.forms),
            "errors": [asdict(error) for error in self.errors],
        }

    def _place(self, error: RowError) -> str:
        return f"{self.path}:{error.line}" if error.line else str(self.path)


def validate_file(path: Path) -> ValidationReport:
    """Find every bad row of a JSONL or parquet file; raises nothing for bad content.

    The file is streamed: only its ids and the errors stay in memory.
    """
    rows = 0
    kind: Kind | None = None
    kind_line = 0
    forms: set[Form] = set()
    id_lines: dict[str, int] = {}
    errors: list[RowError] = []
    for row in tqdm(read_rows(path), desc=f"Validating {path.name}", unit=" rows", disable=None):
        rows += row.line > 0
        if row.kind is not None and kind is None:
            kind, kind_line = row.kind, row.line
        if row.kind not in (None, kind):
            row.reject("", f"is a {row.kind}, but line {kind_line} is a {kind}; one file holds one kind")
        if row.form is not None:
            forms.add(row.form)
        if row.id is not None and id_lines.setdefault(row.id, row.line) != row.line:
            row.reject("id", f"{row.id!r} is already the id of line {id_lines[row.id]}")
        errors += row.errors
    if not rows and not errors:
        errors.append(RowError(0, "", "has no rows"))
    return ValidationReport(path, rows, kind, tuple(sorted(forms)), errors)


def read_rows(path: Path) -> Iterator[PreferenceRow]:
    """Stream the rows of a JSONL or parquet file, good and bad; blank lines are no rows.

    Where the file itself cannot be read, the last row yielded has line 0 and the reason.
    """
    readers = {".jsonl": _read_jsonl, ".parquet": _read_parquet}
    if path.suffix not in readers:
        yield bad_row(0, f"unknown file ending {path.suffix!r}; legal: {', '.join(readers)}")
    elif not path.is_file():
        yield bad_row(0, "no such file")
    else:
        yield from readers[path.suffix](path)


def _read_jsonl(path: Path) -> Iterator[PreferenceRow]:
    with path.open("rb") as stream:
        for line, raw in enumerate(stream, start=1):
            if not raw.isspace():
                yield _parse_line(line, raw.rstrip(b"\r\n"))


def _parse_line(line: int, raw: bytes) -> PreferenceRow:
    try:
        return parse_row(line, json.loads(raw.decode("utf-8")))
    except UnicodeDecodeError as error:
        return bad_row(line, f"not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start + 1}")
    except json.JSONDecodeError as error:
        return bad_row(line, f"not valid JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return bad_row(line, f"not valid JSON: {error}")


def _read_parquet(path: Path) -> Iterator[PreferenceRow]:
    line = 0
    try:
        with pq.ParquetFile(path) as file:
            columns = [name for name in file.schema_arrow.names if name in FIELDS]
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=columns):
                for index in range(batch.num_rows):
                    line += 1
                    yield _parse_record(line, batch.slice(index, 1))
    except (pa.ArrowException, OSError) as error:
        place = f" after row {line}" if line else ""
        yield bad_row(0, f"cannot be read as parquet{place}: {' '.join(str(error).split())}")


def _parse_record(line: int, record: pa.RecordBatch) -> PreferenceRow:
    try:
        return parse_row(line, record.to_pylist()[0])
    except UnicodeDecodeError as error:
        return bad_row(line, f"not UTF-8: byte 0x{error.object[error.start]:02x}")
