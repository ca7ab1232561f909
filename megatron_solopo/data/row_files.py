"""Files of rows: JSON lines, a JSON array, parquet or Arrow, also compressed. The content shows which, not the ending.

A folder of such files, or a Hugging Face dataset on disk, is read as one file. A byte-order mark of UTF-8 is skipped.
A file that is none of these is refused as a whole: the error says what the file is and how to convert it.
"""

import bz2
import gzip
import io
import json
import lzma
import tempfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_solopo.errors import UserError, describe_os_error
from megatron_solopo.files import json_constant, json_object, parse_json

Unit = Literal["line", "row"]
EXPECTED = "expected JSON lines, a JSON array, parquet or Arrow"

_MARK = b"\xef\xbb\xbf"
_PARQUET, _ARROW_FILE, _ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
_TABLES = {_PARQUET: "parquet", _ARROW_FILE: "Arrow", _ARROW_STREAM: "Arrow"}
_COMPRESSED: dict[bytes, Any] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ\x00": lzma.open,
    b"\x28\xb5\x2f\xfd": lambda path: io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), "zstd")),
}
# In a folder, files with one of these endings hold rows, perhaps with an ending of their compression behind it.
_ENDINGS = (".jsonl", ".json", ".parquet", ".arrow")
_COMPRESSED_ENDINGS = (".gz", ".bz2", ".xz", ".zst")
_TO_PARQUET = "write it as parquet: datasets.load_from_disk({path!r}).to_parquet('rows.parquet')"
# The first bytes of files that are not read, what these are, and what to do. The longer beginning stands first.
_FOREIGN = (
    (b"PK\x03\x04", "is a zip archive", "unpack it: unzip {path}"),
    (b"7z\xbc\xaf", "is a 7-Zip archive", "unpack it: 7z x {path}"),
    (b"\xff\xfe\x00\x00", "is UTF-32 text", "convert it: iconv -f UTF-32 -t UTF-8 {path} > rows.jsonl"),
    (b"\xff\xfe", "is UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 {path} > rows.jsonl"),
    (b"\xfe\xff", "is UTF-16 text", "convert it: iconv -f UTF-16 -t UTF-8 {path} > rows.jsonl"),
)
_BEGIN_BYTES = 4096
# Text has no zero byte here. A row further on may have one; the error then names its line.
_LOOKED_AT_BYTES = 16
_TAR_PLACE, _TAR = 257, b"ustar"
_PARQUET_BATCH_ROWS = 64
_LINES_LOOKED_AT = 5
_SHOWN_CHARACTERS = 40
_WHITE_SPACE = " \t\r\n"
_DAMAGED = (EOFError, zlib.error, lzma.LZMAError, pa.ArrowException, OSError)


@dataclass(frozen=True)
class FileRow:
    """A row as its file has it."""

    number: int
    """Of the line or the row, from 1."""
    unit: Unit
    """What `number` counts: lines of a file of JSON lines, rows of everything else."""
    value: Any
    """The JSON value; None if there is a problem."""
    problem: str = ""
    """Why the row cannot be read."""
    left_out: tuple[str, ...] = ()
    """Columns of a table that were not asked for."""


def read_file_rows(path: Path, columns: Collection[str] | None = None) -> Iterator[FileRow]:
    """Stream the rows of a file, or of all files of a folder. Blank lines are no rows.

    Only a JSON array is held in memory, as text. The rows of a folder are numbered over all its files.

    Args:
        columns: Those of parquet and Arrow to read; None: all.

    Raises UserError if the file is missing, is of another kind, or is damaged as a whole.
    """
    if not path.is_dir():
        yield from _rows_of_file(path, columns)
        return
    number = 0
    for file in files_of(path):
        for row in _rows_of_file(file, columns):
            number += 1
            problem = f"{file.name}, {row.unit} {row.number}: {row.problem}" if row.problem else ""
            yield replace(row, number=number, unit="row", problem=problem)


def _rows_of_file(path: Path, columns: Collection[str] | None) -> Iterator[FileRow]:
    begin = first_bytes(path)
    if _is_table(begin):
        yield from _table_rows(path, begin, columns)
    elif begin.lstrip().startswith(b"["):
        yield from _array_rows(path)
    else:
        _check_is_json(path, begin)
        yield from _line_rows(path)


def files_of(path: Path) -> list[Path]:
    """The files that hold the rows: the file itself, or those of a folder in the order of their names.

    A Hugging Face dataset on disk names its files itself. Raises UserError if a folder holds no rows, several splits,
    or files of several kinds.
    """
    if not path.is_dir():
        return [path]
    if (path / "state.json").is_file():
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return [path / each["filename"] for each in state["_data_files"]]
    if (path / "dataset_dict.json").is_file():
        splits = " or ".join(str(each.parent) for each in sorted(path.glob("*/state.json")))
        raise UserError(f"{path}: is a Hugging Face dataset of several splits; name one: {splits}")
    if _is_prepared(path):
        raise UserError(f"{path}: {_described_directory(path)}")
    kinds: dict[str, list[Path]] = {}
    for file in sorted(path.iterdir()):
        name = file.with_suffix("") if file.suffix in _COMPRESSED_ENDINGS else file
        if file.is_file() and not file.name.startswith(".") and name.suffix in _ENDINGS:
            kinds.setdefault(name.suffix, []).append(file)
    if not kinds:
        raise UserError(f"{path}: is a folder without files of rows; their endings are {', '.join(_ENDINGS)}")
    if len(kinds) > 1:
        raise UserError(f"{path}: is a folder of {' and '.join(kinds)} files; one folder holds one kind")
    (files,) = kinds.values()
    return files


def unit_of(path: Path) -> Unit:
    """What the numbers of a file's rows count. Raises UserError like `read_file_rows`."""
    if path.is_dir():
        return "row"
    begin = first_bytes(path)
    return "row" if _is_table(begin) or begin.lstrip().startswith(b"[") else "line"


def _is_table(begin: bytes) -> bool:
    return begin.startswith(tuple(_TABLES))


def first_bytes(path: Path) -> bytes:
    """The beginning of a file, decompressed and without a byte-order mark. Raises UserError if rows cannot be there."""
    if path.is_dir():
        raise UserError(f"{path}: {_described_directory(path)}")
    try:
        with path.open("rb") as stream:
            raw = stream.read(_BEGIN_BYTES)
    except OSError as error:
        raise UserError(f"{path}: {(error.strerror or str(error)).lower()}") from None
    if not raw:
        raise UserError(f"{path}: is an empty file; {EXPECTED}")
    if is_compressed := any(map(raw.startswith, _COMPRESSED)):
        try:
            with _open(path) as stream:
                raw = stream.read(_BEGIN_BYTES)
        except _DAMAGED as error:
            raise UserError(_described_damage(path, error)) from None
    if problem := _foreign(raw, path):
        raise UserError(f"{path}: {problem}")
    if is_compressed and _is_table(raw):
        raise UserError(f"{path}: is a compressed table of Arrow or parquet; decompress it")
    return raw.removeprefix(_MARK)


def read_whole_text(path: Path) -> str:
    """The decompressed text of a file. Raises UserError, naming the line, if it is not UTF-8."""
    try:
        with _open(path) as stream:
            return stream.read().removeprefix(_MARK).decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8: byte 0x{error.object[error.start]:02x}") from None
    except _DAMAGED as error:
        raise UserError(_described_damage(path, error)) from None


def open_as_lines(path: Path) -> BinaryIO:
    """Open a file of rows as plain JSON lines, at its first row. Every line can be found again by its offset.

    JSON lines without compression are opened in place. Everything else is written to a temporary file first.

    Raises UserError like `read_file_rows`, and for a row that cannot be read.
    """
    begin = first_bytes(path)
    with path.open("rb") as stream:
        raw = stream.read(_BEGIN_BYTES)
    plain = raw.removeprefix(_MARK) == begin and not _is_table(begin) and not begin.lstrip().startswith(b"[")
    if plain:
        _check_is_json(path, begin)
        lines = path.open("rb")
        lines.seek(len(_MARK) if raw.startswith(_MARK) else 0)
        return lines
    temporary = cast(BinaryIO, tempfile.TemporaryFile())  # noqa: SIM115  (the caller closes it)
    for row in read_file_rows(path):
        if row.problem:
            raise UserError(f"{path}: {row.unit} {row.number}: {row.problem}")
        temporary.write(json.dumps(row.value, ensure_ascii=False).encode("utf-8") + b"\n")
    temporary.seek(0)
    return temporary


def check_plain_lines(path: Path) -> None:
    """Raise UserError if a file exists and is not plain JSON lines, which only a program of ours appends to."""
    if path.is_dir():
        raise UserError(f"{path}: is a directory; expected a file of JSON lines")
    if not path.is_file():
        return
    with path.open("rb") as stream:
        begin = stream.read(_BEGIN_BYTES)
    if begin.startswith(_MARK):
        raise UserError(f"{path}: begins with a byte-order mark; remove it: sed -i '1s/^\\xef\\xbb\\xbf//' {path}")
    if begin.startswith(_PARQUET):
        raise UserError(
            f"{path}: is parquet; write it as JSON lines: datasets.Dataset.from_parquet({str(path)!r}).to_json"
        )
    if _is_table(begin):
        raise UserError(
            f"{path}: is an Arrow file; write it as JSON lines: datasets.Dataset.from_file({str(path)!r}).to_json"
        )
    if (problem := _not_text(begin, path)) is not None:
        raise UserError(f"{path}: {problem}")


def read_text_file(path: Path, option: str) -> str:
    """The text of a UTF-8 file, without a byte-order mark. Raises UserError with the option and what the file is."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}") from None
    try:
        if (problem := _not_text(content[:_BEGIN_BYTES], path)) is not None:
            raise UserError(f"{option} {path}: {problem}")
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{option} {path}: is not UTF-8 text: byte 0x{content[error.start]:02x} in line {line}"
        ) from None


def _not_text(begin: bytes, path: Path) -> str | None:
    """What a file is that is no text, and how to convert it."""
    if any(map(begin.startswith, _COMPRESSED)):
        return "is compressed; decompress it"
    if _is_table(begin):
        return "is a table of Arrow or parquet"
    return _foreign(begin, path) or None


def _open(path: Path) -> BinaryIO:
    with path.open("rb") as stream:
        begin = stream.read(_BEGIN_BYTES)
    opener = next((each for magic, each in _COMPRESSED.items() if begin.startswith(magic)), None)
    return path.open("rb") if opener is None else cast(BinaryIO, opener(path))


def _foreign(begin: bytes, path: Path) -> str:
    """What a file is, if it is none of those that are read, and how to convert it."""
    for magic, what, way_out in _FOREIGN:
        if begin.startswith(magic):
            return f"{what}; {way_out.format(path=str(path))}"
    if begin[_TAR_PLACE:].startswith(_TAR):
        return f"is a tar archive; unpack it: tar -xf {path}"
    if b"\0" not in begin[:_LOOKED_AT_BYTES] or _is_table(begin):
        return ""
    if begin[:2].strip(b"\0") in (b"{", b"["):
        order = "LE" if begin[1:2] == b"\0" else "BE"
        return f"is UTF-16 text; convert it: iconv -f UTF-16{order} -t UTF-8 {path} > rows.jsonl"
    return f"is a binary file of an unknown kind; {EXPECTED}"


def _is_prepared(path: Path) -> bool:
    return (path / "manifest.json").is_file() and (path / "train").is_dir()


def _described_directory(path: Path) -> str:
    """Why a directory is not read where one file is needed."""
    if _is_prepared(path):
        return "is a directory of data prepare, which data.path takes; expected the file of rows that it was made from"
    if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
        saved = path if (path / "state.json").is_file() else next(iter(sorted(path.glob("*/state.json"))), path).parent
        return f"is a saved Hugging Face dataset; {_TO_PARQUET.format(path=str(saved))}"
    files = sorted(each.name for each in path.rglob("*") if each.suffix in (".parquet", ".jsonl", ".json", ".gz"))
    return f"is a directory; name one file{f', such as {files[0]}' if files else ''}; {EXPECTED}"


def _described_damage(path: Path, error: BaseException) -> str:
    reason = describe_os_error(error) if isinstance(error, OSError) else " ".join(str(error).split())
    return f"{path}: is damaged or incomplete: {reason}; copy or download it again"


def _check_is_json(path: Path, begin: bytes) -> None:
    """Refuse text in which none of the first lines can be an object, and an object over several lines."""
    lines = [line.strip() for line in begin.split(b"\n") if line.strip()][:_LINES_LOOKED_AT]
    if lines and lines[0] == b"{":
        raise UserError(f"{path}: is one JSON object over several lines; write each row as one line of JSON")
    if lines and not any(line.startswith(b"{") for line in lines):
        shown = lines[0].decode("utf-8", errors="replace")[:_SHOWN_CHARACTERS]
        raise UserError(f"{path}: is not JSON: it begins with {shown!r}; {EXPECTED}")


def _line_rows(path: Path) -> Iterator[FileRow]:
    number = 0
    try:
        with _open(path) as stream:
            for number, raw in enumerate(stream, start=1):
                line = raw.removeprefix(_MARK) if number == 1 else raw
                if line.strip():
                    yield _parse_line(number, line.rstrip(b"\r\n"))
    except _DAMAGED as error:
        raise UserError(f"{_described_damage(path, error)} (after line {number})") from None


def _parse_line(number: int, raw: bytes) -> FileRow:
    try:
        return FileRow(number, "line", parse_json(raw.decode("utf-8")))
    except UnicodeDecodeError as error:
        problem = f"not UTF-8: byte 0x{raw[error.start]:02x} at position {error.start + 1}"
    except json.JSONDecodeError as error:
        problem = f"not valid JSON: {error.msg} at column {error.colno}"
    except (ValueError, RecursionError) as error:  # an integer of too many digits, too many brackets
        problem = f"not valid JSON: {error}"
    return FileRow(number, "line", None, problem)


def _array_rows(path: Path) -> Iterator[FileRow]:
    """The items of a JSON array, one at a time. The whole text is in memory, the objects are not."""
    text = read_whole_text(path)
    decoder = json.JSONDecoder(object_pairs_hook=json_object, parse_constant=json_constant)
    position, line, counted, number = text.index("[") + 1, 1, 0, 0
    separator = ","
    while True:
        position = _skip(text, position)
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]" and (separator != "," or number == 0):
            break
        if separator != ",":
            raise UserError(f"{path}:{line}: not valid JSON: expected ',' or ']' behind item {number} of the array")
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{line}: not valid JSON in item {number + 1} of the array: {error}") from None
        number += 1
        yield FileRow(number, "row", value)
        position = _skip(text, end)
        separator = text[position : position + 1]
        position += separator == ","
    if _skip(text, position + 1) != len(text):
        raise UserError(f"{path}:{line}: not valid JSON: text behind the array")


def _skip(text: str, position: int) -> int:
    while text[position : position + 1] and text[position] in _WHITE_SPACE:
        position += 1
    return position


def _table_rows(path: Path, begin: bytes, columns: Collection[str] | None) -> Iterator[FileRow]:
    """The rows of parquet and Arrow, a few in memory at a time."""
    number = 0
    try:
        with ExitStack() as stack:
            schema, batches = _open_table(path, begin, columns, stack)
            left_out = tuple(name for name in schema.names if columns is not None and name not in columns)
            for batch in batches:
                for index in range(batch.num_rows):
                    number += 1
                    yield _parse_record(number, batch.slice(index, 1), left_out)
    except (pa.ArrowException, OSError) as error:
        place = f" after row {number}" if number else ""
        kind = next(name for magic, name in _TABLES.items() if begin.startswith(magic))
        raise UserError(f"{path}: cannot be read as {kind}{place}: {' '.join(str(error).split())}") from None


def _open_table(
    path: Path, begin: bytes, columns: Collection[str] | None, stack: ExitStack
) -> tuple[pa.Schema, Iterator[pa.RecordBatch]]:
    """The schema of the whole table, and its batches with the columns that are asked for."""

    def names(schema: pa.Schema) -> list[str]:
        return [name for name in schema.names if columns is None or name in columns]

    if begin.startswith(_PARQUET):
        file = stack.enter_context(pq.ParquetFile(path))
        schema = file.schema_arrow
        return schema, file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=names(schema))
    source = stack.enter_context(pa.memory_map(str(path)))
    if begin.startswith(_ARROW_FILE):
        reader = stack.enter_context(pa.ipc.open_file(source))
        batches = map(reader.get_batch, range(reader.num_record_batches))
    else:
        reader = stack.enter_context(pa.ipc.open_stream(source))
        batches = iter(reader)
    return reader.schema, (batch.select(names(reader.schema)) for batch in batches)


def _parse_record(number: int, record: pa.RecordBatch, left_out: tuple[str, ...]) -> FileRow:
    try:
        value = record.to_pylist()[0]
    except UnicodeDecodeError as error:
        return FileRow(number, "row", None, f"not UTF-8: byte 0x{error.object[error.start]:02x}")
    return FileRow(number, "row", _without_nulls(value), left_out=left_out)


def _without_nulls(value: Any) -> Any:
    """A value without the keys that are null: a table gives every row and every object all keys."""
    if isinstance(value, dict):
        return {key: _without_nulls(each) for key, each in value.items() if each is not None}
    return [_without_nulls(each) for each in value] if isinstance(value, list) else value
