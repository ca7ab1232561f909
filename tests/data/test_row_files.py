"""Files of rows: what is read, and how a file that is not read is refused."""

import bz2
import gzip
import json
import lzma
import subprocess
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_solopo.cli.main import main
from megatron_solopo.data.row_files import check_plain_lines, open_as_lines, read_file_rows, read_text_file
from megatron_solopo.data.rows import read_rows, validate_file
from megatron_solopo.errors import UserError
from megatron_solopo.triplets.corpus.formats import Question
from megatron_solopo.triplets.corpus.read import read_questions

INPUTS = Path(__file__).parents[1] / "inputs"
ROWS = [{"id": "a", "prompt": "Q 1?", "chosen": "yes"}, {"id": "b", "prompt": "Q 2?", "chosen": "é\u2028"}]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def parquet(path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), path)


def arrow(path: Path, writer: Any) -> None:
    """Two record batches, and a column of nulls."""
    table = pa.Table.from_pylist([row | {"thought": None} for row in ROWS])
    with writer(str(path), table.schema) as sink:
        sink.write_table(table, max_chunksize=1)


READABLE = {
    "lines": lambda path: path.write_bytes(LINES),
    "byte_order_mark": lambda path: path.write_bytes(b"\xef\xbb\xbf" + LINES),
    "carriage_returns": lambda path: path.write_bytes(LINES.replace(b"\n", b"\r\n")),
    "array": lambda path: path.write_text(json.dumps(ROWS)),
    "array_over_lines": lambda path: path.write_bytes(b"\xef\xbb\xbf\n " + json.dumps(ROWS, indent=2).encode()),
    "gzip": lambda path: path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + LINES)),
    "gzip_in_parts": lambda path: path.write_bytes(b"".join(map(gzip.compress, LINES.splitlines(keepends=True)))),
    "bzip2": lambda path: path.write_bytes(bz2.compress(LINES)),
    "xz": lambda path: path.write_bytes(lzma.compress(LINES)),
    "zstd": lambda path: path.write_bytes(pa.compress(b"\xef\xbb\xbf" + LINES, "zstd", asbytes=True)),
    "zstd_in_parts": lambda path: path.write_bytes(
        b"".join(pa.compress(line, "zstd", asbytes=True) for line in LINES.splitlines(keepends=True))
    ),
    "parquet": parquet,
    "arrow_file": lambda path: arrow(path, pa.ipc.new_file),
    "arrow_stream": lambda path: arrow(path, pa.ipc.new_stream),
}


@pytest.mark.parametrize("kind", READABLE)
@pytest.mark.parametrize("ending", [".jsonl", ".data"])
def test_the_content_decides_how_a_file_is_read(kind: str, ending: str, tmp_path: Path) -> None:
    path = tmp_path / f"rows{ending}"
    READABLE[kind](path)
    assert [row.value for row in read_file_rows(path)] == ROWS
    with open_as_lines(path) as stream:
        stream.readline()
        place = stream.tell()
        assert json.loads(stream.readline()) == ROWS[1]
        stream.seek(place)
        assert json.loads(stream.readline()) == ROWS[1]


UNREADABLE = {
    "empty": (
        lambda path: path.write_bytes(b""),
        "is an empty file; expected JSON lines, a JSON array, ",
    ),
    "zip": (lambda path: path.write_bytes(b"PK\x03\x04\x00\x00"), "is a zip archive; unpack it: unzip "),
    "tar_in_gzip": (
        lambda path: path.write_bytes(gzip.compress(b"rows.jsonl".ljust(257, b"\0") + b"ustar\0")),
        "is a tar archive; unpack it: tar -xf ",
    ),
    "utf_16": (lambda path: path.write_text(LINES.decode(), encoding="utf-16"), "is UTF-16 text; convert it: iconv "),
    "utf_16_without_mark": (
        lambda path: path.write_text(LINES.decode(), encoding="utf-16-le"),
        "is UTF-16 text; convert it: iconv -f UTF-16LE -t UTF-8 ",
    ),
    "binary": (lambda path: path.write_bytes(b"\x00\x01\x02\x03" * 9), "is a binary file of an unknown kind; expected"),
    "yaml": (
        lambda path: path.write_text("run_dir: runs\nmodel:\n"),
        "is not JSON: it begins with 'run_dir: runs'; ex",
    ),
    "csv": (lambda path: path.write_text("id,prompt\n1,x\n"), "is not JSON: it begins with 'id,prompt'; expected JSON"),
    "one_object": (
        lambda path: path.write_text(json.dumps(ROWS[0], indent=1)),
        "is one JSON object over several lines",
    ),
    "cut_gzip": (lambda path: path.write_bytes(gzip.compress(LINES * 999)[:-30]), "is damaged or incomplete: "),
    "cut_zstd": (
        lambda path: path.write_bytes(pa.compress(LINES * 99999, "zstd", asbytes=True)[:-30]),
        "is damaged or incomplete: ",
    ),
    "parquet_in_gzip": (
        lambda path: path.write_bytes(gzip.compress(b"PAR1")),
        "is a compressed table of Arrow or parquet; decompress it",
    ),
    "half_parquet": (lambda path: path.write_bytes(b"PAR1 and no more"), "cannot be read as parquet: "),
    "half_arrow": (lambda path: path.write_bytes(b"ARROW1 and no more"), "cannot be read as Arrow: "),
    "half_stream": (lambda path: path.write_bytes(b"\xff\xff\xff\xff and no more"), "cannot be read as Arrow: "),
    "folder": (lambda path: path.mkdir(), "is a folder without files of rows; their endings are .jsonl, .json, "),
    "splits": (
        lambda path: datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(path),
        "is a Hugging Face dataset of several splits; name one: ",
    ),
}


@pytest.mark.parametrize("kind", UNREADABLE)
def test_a_file_of_another_kind_is_named_with_the_way_out(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write, message = UNREADABLE[kind]
    write(path)
    with pytest.raises(UserError) as caught:
        list(read_file_rows(path))
    assert str(caught.value).startswith(f"{path}: {message}") and "\n" not in str(caught.value)
    with pytest.raises(UserError):
        list(open_as_lines(path))


def test_a_dataset_on_disk_is_read_in_its_own_order(tmp_path: Path) -> None:
    rows = [ROWS[0] | {"id": str(number)} for number in range(12)]
    datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "saved", num_shards=12)
    found = list(read_file_rows(tmp_path / "saved"))
    assert [row.value for row in found] == rows and [row.number for row in found] == list(range(1, 13))


@pytest.mark.parametrize(
    ("kind", "ending"),
    [("lines", ".jsonl"), ("zstd", ".jsonl.zst"), ("parquet", ".parquet"), ("arrow_stream", ".arrow")],
)
def test_the_files_of_a_folder_follow_one_another(kind: str, ending: str, tmp_path: Path) -> None:
    for name in ("part-1", "part-0"):
        READABLE[kind](tmp_path / f"{name}{ending}")
    (tmp_path / "README.md").write_text("# About these rows")
    found = list(read_file_rows(tmp_path))
    assert [row.value for row in found] == [*ROWS, *ROWS]
    assert [(row.number, row.unit) for row in found] == [(number, "row") for number in (1, 2, 3, 4)]


def test_a_bad_row_of_a_folder_is_named_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl").write_bytes(LINES + b"\n{\n")
    (bad,) = [row for row in read_file_rows(tmp_path) if row.problem]
    assert bad.number == 5 and bad.problem.startswith("b.jsonl, line 4: not valid JSON")


def test_a_folder_of_two_kinds_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    parquet(tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"is a folder of \.jsonl and \.parquet files; one folder holds one kind"):
        list(read_file_rows(tmp_path))


def test_the_advice_for_utf_16_and_for_a_saved_dataset_works(tmp_path: Path) -> None:
    (tmp_path / "wide.jsonl").write_text(LINES.decode(), encoding="utf-16")
    command = f"iconv -f UTF-16 -t UTF-8 {tmp_path}/wide.jsonl > {tmp_path}/rows.jsonl"
    subprocess.run(command, shell=True, check=True)
    assert [row.value for row in read_file_rows(tmp_path / "rows.jsonl")] == ROWS
    datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(tmp_path / "saved")
    with pytest.raises(UserError, match=r"saved/train'\)\.to_parquet") as caught:
        list(open_as_lines(tmp_path / "saved"))
    advice = str(caught.value).rpartition("parquet: ")[2].replace("rows.parquet", f"{tmp_path}/rows.parquet")
    eval(advice)
    assert [row.value for row in read_file_rows(tmp_path / "rows.parquet")] == ROWS


def test_chat_rows_with_a_byte_order_mark_are_good() -> None:
    report = validate_file(INPUTS / "triplets_byte_order_mark.jsonl")
    assert (report.rows, report.kind, report.errors) == (2, "pair", [])
    assert next(read_rows(INPUTS / "triplets_byte_order_mark.jsonl")).id == "p1"


@pytest.mark.parametrize("name", ["hotpotqa.parquet", "hotpotqa.jsonl.gz", "hotpotqa_byte_order_mark.json"])
def test_every_form_of_a_corpus_is_read(name: str) -> None:
    found = [question for _, question in read_questions(INPUTS / name, "hotpotqa")]
    assert found and all(isinstance(question, Question) for question in found)
    assert all(question.documents and question.supporting for question in found)


def test_a_mistake_in_a_file_of_one_line_has_the_number_and_the_id_of_its_row() -> None:
    path = INPUTS / "hotpotqa_one_line.json"
    bad = [found for _, found in read_questions(path, "hotpotqa") if not isinstance(found, Question)]
    reason = "String should have at least 1 character (expected a hotpotqa row)"
    assert [str(each) for each in bad] == [f"{path}: row 4 (id 'h4'): answer: {reason}"]


def test_squad_is_one_object_or_rows_whatever_the_ending(tmp_path: Path) -> None:
    article = {"title": "T", "paragraphs": [{"context": "c", "qas": [{"id": "q", "question": "?", "answers": []}]}]}
    (tmp_path / "train.json.gz").write_bytes(gzip.compress(json.dumps({"version": "2.0", "data": [article]}).encode()))
    row = {"id": "q", "context": "c", "question": "?", "answers": {"text": ["a"]}}
    (tmp_path / "rows.json").write_text(f"{json.dumps(row)}\n")
    for name in ("train.json.gz", "rows.json"):
        ((number, question),) = read_questions(tmp_path / name, "squad")
        assert number == 1 and isinstance(question, Question) and question.id == "q"


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (None, 2, "rows.jsonl: no such file or directory"),
        (b"", 2, "rows.jsonl: is an empty file"),
        (b"\xff\xfe{\0", 2, "rows.jsonl: is UTF-16 text; convert it"),
        (b'{"id": "a"}\n', 1, "rows.jsonl:1: is no preference row: it has id; expected prompt_short"),
    ],
)
def test_validate_tells_an_unusable_file_from_bad_rows_by_its_exit_code(
    content: bytes | None, code: int, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "rows.jsonl").write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        main(["data", "validate", str(tmp_path / "rows.jsonl")])
    out, err = capsys.readouterr()
    assert ended.value.code == code
    assert message in (err if code == 2 else out)
    assert ("error: " in err) is (code == 2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(b"A text.", mtime=0), "is compressed; decompress it"),
        ("A text.".encode("utf-16"), "is UTF-16 text; convert it: iconv"),
        (b"A text.\ncaf\xe9", "is not UTF-8 text: byte 0xe9 in line 2"),
    ],
)
def test_a_text_file_of_another_kind_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "book.txt").write_bytes(content)
    with pytest.raises(UserError, match=f"^--haystack {tmp_path}/book.txt: {message}"):
        read_text_file(tmp_path / "book.txt", "--haystack")
    (tmp_path / "book.txt").write_bytes(b"\xef\xbb\xbfA text.")
    assert read_text_file(tmp_path / "book.txt", "--haystack") == "A text."


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (gzip.compress(LINES, mtime=0), "is compressed; decompress it"),
        (b"\xef\xbb\xbf" + LINES, "begins with a byte-order mark; remove it: sed -i "),
        (b"PAR1", "is parquet; write it as JSON lines: "),
    ],
)
def test_a_file_that_the_program_appends_to_is_plain(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "responses.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"^{path}: {message}") as caught:
        check_plain_lines(path)
    if "sed -i" in message:
        subprocess.run(str(caught.value).partition("remove it: ")[2], shell=True, check=True)
        assert path.read_bytes() == LINES
