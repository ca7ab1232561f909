"""What `data build` leaves out, counts or refuses."""

import json
from pathlib import Path

import pytest

from megatron_solopo.data.build import build
from megatron_solopo.data.musique import mentions, normalise, read_questions
from tests.data.musique_example import (
    EXAMPLE,
    QUESTIONS,
    first_lines,
    is_evidence,
    lengths,
    passages,
    read,
    write,
)


def test_too_long_questions_are_dropped_and_counted_never_cut(tokenizer_path, tokenizer, tmp_path) -> None:
    build(QUESTIONS, tmp_path / "all.jsonl", tokenizer_path, long_tokens=3000)
    rows = read(tmp_path / "all.jsonl")
    assert len(rows) == 140
    report = build(QUESTIONS, tmp_path / "out.jsonl", tokenizer_path, long_tokens=1024)
    fits = {row["id"] for row in rows if lengths(row, tokenizer)["prompt_short"] <= 1024}
    assert {row["id"] for row in read(tmp_path / "out.jsonl")} == fits
    assert report.dropped == {"short context and answer exceed --long-tokens 1024": 140 - len(fits)}
    assert 0 < len(fits) < 140


def test_an_exhausted_pool_is_reported(questions, tokenizer_path, tmp_path) -> None:
    few = write(tmp_path / "few.jsonl", first_lines(3))
    report = build(few, tmp_path / "out.jsonl", tokenizer_path, long_tokens=50_000)
    assert report.rows_that_exhausted_the_pool == report.rows_written == 3
    pool = {paragraph.passage for question in read_questions(few) for paragraph in question.paragraphs}
    for row in read(tmp_path / "out.jsonl"):
        question = questions[row["id"]]
        usable = {p for p in pool if is_evidence(p, question) or not mentions(normalise(p), question.golds)}
        assert set(passages(row["prompt_long"])) == usable


def test_missing_short_distractors_are_reported(tokenizer_path, tmp_path) -> None:
    few = write(tmp_path / "few.jsonl", first_lines(5))
    report = build(few, tmp_path / "out.jsonl", tokenizer_path, short_distractors=25, long_tokens=8000)
    assert report.rows_with_fewer_short_distractors == report.rows_written == 5


def test_bare_evidence_is_a_legal_short_context(questions, tokenizer_path, tmp_path) -> None:
    few = write(tmp_path / "few.jsonl", first_lines(5))
    build(few, tmp_path / "out.jsonl", tokenizer_path, short_distractors=0)
    for row in read(tmp_path / "out.jsonl"):
        evidence = {paragraph.passage for paragraph in questions[row["id"]].evidence}
        assert set(passages(row["prompt_short"])) == evidence


def test_rows_that_cannot_serve_are_counted_by_reason(tokenizer_path, tmp_path) -> None:
    good, *others = (json.loads(line) for line in first_lines(3))
    unanswerable = others[0] | {"answerable": False}
    unsupported = others[1] | {"paragraphs": [p | {"is_supporting": False} for p in others[1]["paragraphs"]]}
    lines = [json.dumps(row) for row in (good, unanswerable, unsupported, good)]
    report = build(write(tmp_path / "in.jsonl", lines), tmp_path / "out.jsonl", tokenizer_path)
    assert report.dropped == {"not answerable": 1, "no supporting paragraph": 1, "id already seen": 1}
    assert [row["id"] for row in read(tmp_path / "out.jsonl")] == [good["id"]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"short_distractors": -1}, "--short-distractors -1"),
        ({"long_tokens": 0}, "--long-tokens 0"),
        ({"seed": -1}, "--seed -1"),
        ({"long_tokens": 40}, "no question could be built: short context and answer exceed"),
        ({"output": Path("triplets.txt")}, "must end in .jsonl"),
        ({"output": QUESTIONS}, "is the input file"),
        ({"input": EXAMPLE / "absent.jsonl"}, "No such file"),
        ({"tokenizer": "absent"}, "no such file or directory"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_file(arguments, message, tokenizer_path, tmp_path) -> None:
    output = write(tmp_path / "out.jsonl", ["what was there before"])
    legal = {"input": QUESTIONS, "output": output, "tokenizer": tokenizer_path, "overwrite": True}
    with pytest.raises(ValueError, match=message) as error:
        build(**legal | arguments)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    assert output.read_text() == "what was there before\n"


def test_an_existing_file_is_kept_unless_told_otherwise(tokenizer_path, tmp_path):
    output = tmp_path / "mine.jsonl"
    output.write_text("written by hand\n")
    few = write(tmp_path / "few.jsonl", QUESTIONS.read_text().splitlines()[:4])
    with pytest.raises(ValueError, match=r"mine\.jsonl: already exists.*--overwrite"):
        build(few, output, tokenizer_path)
    assert output.read_text() == "written by hand\n"
    build(few, output, tokenizer_path, overwrite=True)
    assert output.read_text().startswith('{"id"')
