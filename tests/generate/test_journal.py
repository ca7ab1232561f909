"""The file of responses: complete lines count, and a cut one does not."""

import subprocess
import sys

import pytest

from megatron_solopo.errors import UserError
from megatron_solopo.generate.journal import Journal, StoredResponse, read_header, read_offsets
from tests.triplets.context_files import response, write_lines

HEADER = {"model": "m", "seed": 0}


def test_every_cut_of_the_file_continues_to_the_same_responses(tmp_path) -> None:
    responses = [
        StoredResponse(**response(number, index, f"text \u00e9 {index}\n")) for number in (1, 2) for index in range(2)
    ]
    whole = tmp_path / "whole.jsonl"
    with Journal(whole, HEADER) as journal:
        journal.append(responses)
    content = whole.read_bytes()
    for size in range(len(content) + 1):
        path = tmp_path / "cut.jsonl"
        path.write_bytes(content[:size])
        with Journal(path, HEADER) as journal:
            missing = [each for each in responses if each.index not in journal.received[each.question_id]]
            assert len(missing) == 4 - max(0, content[:size].count(b"\n") - 1)
            journal.append(missing)
        assert path.read_bytes() == content and [each for _, each in read_offsets(path)] == responses


def test_a_last_response_without_a_line_break_is_read(tmp_path) -> None:
    path = write_lines(tmp_path / "r.jsonl", [response(1, 0, "a"), response(1, 1, "b")])
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert [found.text for _, found in read_offsets(path)] == ["a", "b"]


def test_a_cut_last_response_is_refused_by_those_who_only_read(tmp_path) -> None:
    path = write_lines(tmp_path / "r.jsonl", [response(1, 0, "a"), response(1, 1, "b")])
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match=r"r\.jsonl:2: .*this last line was cut: .* or remove the line"):
        list(read_offsets(path))


def test_a_journal_of_another_model_at_the_same_place_is_refused(tmp_path, capsys) -> None:
    path, header = tmp_path / "r.jsonl", {"model": "m", "files": {"a": "1", "b": "1"}}
    Journal(path, header | {"weights": "0" * 64}).__exit__(None, None, None)
    with pytest.raises(UserError, match=r"was begun with other files \(b\), other weights; name another output"):
        Journal(path, {"model": "m", "files": {"a": "1", "b": "2"}, "weights": "1" * 64})
    Journal(tmp_path / "old.jsonl", header).__exit__(None, None, None)
    Journal(tmp_path / "old.jsonl", header | {"weights": "0" * 64}).__exit__(None, None, None)
    assert "an older version began it and did not keep weights" in capsys.readouterr().err


def test_offsets_lead_to_their_lines(tmp_path) -> None:
    path = write_lines(tmp_path / "r.jsonl", [response(1, 0, "a\u00e9"), response(1, 1, "b")])
    assert read_header(path) is None
    for offset, found in read_offsets(path):
        assert StoredResponse.model_validate_json(path.read_bytes()[offset:].split(b"\n")[0]) == found


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"id": 1}\n', "is not the output of data sample"),
        ("not json\n", "is not the output of data sample"),
        ("a note without a line break", "is not the output of data sample"),
        (f'{{"id": {"9" * 5000}}}\n', "is not the output of data sample"),
        ("[" * 100_000 + "\n", "is not the output of data sample"),
        ('{"journal": {"model": "m", "seed": 0}}\n{"index": 1}\n', r"r\.jsonl:2: question_id is required"),
        ('{"journal": {"model": "m", "seed": 0}}\n{"ind\n{"index": 1}\n', r"r\.jsonl:2: the whole line"),
        ('{"journal": {"model": "m"}}\n', "was begun with no seed, not 0"),
    ],
    ids=range(8),
)
def test_another_file_is_not_written_to(content, message, tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        Journal(path, HEADER)
    assert path.read_text() == content


def test_two_processes_do_not_write_one_file(tmp_path) -> None:
    path = tmp_path / "r.jsonl"
    program = "from pathlib import Path; from megatron_solopo.generate.journal import Journal;"
    program += f"Journal(Path({str(path)!r}), {HEADER})"
    with Journal(path, HEADER):
        other = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert other.returncode == 1 and "another process is writing it" in other.stderr
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0
