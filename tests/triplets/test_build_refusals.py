"""What `data build` leaves out, counts or refuses."""

import json
from pathlib import Path

import pytest

from megatron_solopo.errors import UserError
from megatron_solopo.triplets.corpus.formats import entity_golds, mentions, normalise
from tests.triplets.musique_example import (
    EXAMPLE,
    QUESTIONS,
    construct,
    evidence,
    first_lines,
    lengths,
    passage,
    passages,
    read,
    write,
)


def left_out(output: Path) -> list[dict]:
    return json.loads((output.with_suffix(".report") / "report.json").read_text())["left_out"]


def test_too_long_questions_are_dropped_named_and_never_cut(tokenizer_path, tokenizer, tmp_path) -> None:
    construct(QUESTIONS, tmp_path / "all.jsonl", tokenizer_path, long_tokens="3000")
    rows = read(tmp_path / "all.jsonl")
    assert len(rows) == 140
    report = construct(QUESTIONS, tmp_path / "out.jsonl", tokenizer_path, long_tokens="1024")
    fits = {row["id"] for row in rows if lengths(row, tokenizer)["prompt_short"] <= 1024}
    too_long = "the short context and the response exceed --long-tokens"
    assert report.dropped[too_long] == 140 - len(fits) > 0
    # Where the short context all but fills the long one, no document is as small as what is left.
    written = {row["id"] for row in read(tmp_path / "out.jsonl")}
    assert written < fits and len(written) == 140 - sum(report.dropped.values()) > 10
    lines = [json.loads(line)["id"] for line in QUESTIONS.read_text().splitlines()]
    named = {(each["id"], each["line"]) for each in left_out(tmp_path / "out.jsonl") if each["reason"] == too_long}
    assert named == {(row["id"], lines.index(row["id"]) + 1) for row in rows if row["id"] not in fits}


def test_a_pool_that_does_not_suffice_is_reported(questions, tokenizer_path, tmp_path) -> None:
    few = write(tmp_path / "few.jsonl", first_lines(3))
    with pytest.raises(UserError, match=r"no choice from the pool comes within 1 % below --long-tokens \(3\)"):
        construct(few, tmp_path / "out.jsonl", tokenizer_path, long_tokens="50000")
    report = construct(few, tmp_path / "out.jsonl", tokenizer_path, long_tokens="50000", underfull="keep")
    assert report.rows_underfull == report.rows_written == 3
    rows = read(tmp_path / "out.jsonl")
    pool = {passage(document) for row in rows for document in questions[row["id"]].documents}
    for row in rows:
        question = questions[row["id"]]
        golds = entity_golds(question.answers)
        usable = {p for p in pool if p in evidence(question) or not mentions(normalise(p), golds)}
        assert set(passages(row["prompt_long"])) == usable


def test_short_distractors_are_taken_from_other_questions_where_the_own_do_not_suffice(
    questions, tokenizer_path, tmp_path
) -> None:
    few = write(tmp_path / "few.jsonl", first_lines(5))
    options = {"short_distractors": 25, "long_tokens": "8000"}
    report = construct(few, tmp_path / "out.jsonl", tokenizer_path, **options)
    assert report.rows_with_distractors_of_others == report.rows_written == 5
    for row in read(tmp_path / "out.jsonl"):
        assert len(passages(row["prompt_short"])) == 25 + len(evidence(questions[row["id"]]))
    one = write(tmp_path / "one.jsonl", first_lines(1))
    with pytest.raises(UserError, match="too few documents for --short-distractors"):
        construct(one, tmp_path / "out2.jsonl", tokenizer_path, **options)


def test_bare_evidence_is_a_legal_short_context(questions, tokenizer_path, tmp_path) -> None:
    few = write(tmp_path / "few.jsonl", first_lines(5))
    construct(few, tmp_path / "out.jsonl", tokenizer_path, short_distractors=0)
    for row in read(tmp_path / "out.jsonl"):
        assert set(passages(row["prompt_short"])) == evidence(questions[row["id"]])


def test_rows_that_cannot_serve_are_named_by_line_and_reason(tokenizer_path, tmp_path) -> None:
    good, *others = (json.loads(line) for line in first_lines(4))
    unanswerable = others[0] | {"answerable": False}
    unsupported = others[1] | {"paragraphs": [p | {"is_supporting": False} for p in others[1]["paragraphs"]]}
    whole = others[2] | {"question_decomposition": []}
    lines = [json.dumps(row) for row in (good, unanswerable, unsupported, whole)]
    output = tmp_path / "out.jsonl"
    report = construct(write(tmp_path / "in.jsonl", lines), output, tokenizer_path)
    reasons = ["not answerable", "no supporting document", "no decomposition to construct answers from"]
    assert report.dropped == dict.fromkeys(reasons, 1)
    assert [(each["line"], each["reason"]) for each in left_out(output)] == list(enumerate(reasons, start=2))
    assert [row["id"] for row in read(output)] == [good["id"]]


def test_bad_rows_are_refused_or_left_out_and_listed(tokenizer_path, tmp_path) -> None:
    good, other, third = first_lines(3)
    bad = third.replace('"is_supporting"', '"supports"')
    source = write(tmp_path / "in.jsonl", [good, "{", other, bad, good])
    output = tmp_path / "out.jsonl"
    with pytest.raises(UserError) as error:
        construct(source, output, tokenizer_path)
    lines = str(error.value).splitlines()
    question = json.loads(bad)["id"]
    assert lines[0].startswith(f"{source}:2: ")
    assert lines[1].startswith(f"{source}: 20 times, in line 4 (id {question!r}): ")
    assert ": paragraphs.0.is_supporting: Field required (expected a musique row)" in lines[1]
    assert lines[-1].startswith(f"{source}:5: id: ") and len(lines) == 3
    assert lines[-1].endswith(
        "; name another --format, or let --bad-rows drop leave such rows out and list every one in the report"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
    report = construct(source, output, tokenizer_path, bad_rows="drop")
    assert report.rows_read == 5 and report.dropped == {"not of the format": 3}
    assert {each["line"] for each in left_out(output)} == {2, 4, 5}
    assert [row["question_id"] for row in read(output)] == [json.loads(line)["id"] for line in (good, other)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"short_distractors": -1}, "--short-distractors -1"),
        ({"long_tokens": "0"}, "--long-tokens 0"),
        ({"long_tokens": "4096,4096"}, "a length is given twice; legal: 8192 |"),
        ({"seed": -1}, "--seed -1"),
        ({"num_proc": 0}, "--num-proc 0"),
        ({"responses": "sampled", "response_tokens": 0}, "--response-tokens 0"),
        ({"response_tokens": 9}, "is measured, not reserved"),
        ({"short_tokens": 900}, "not with --responses constructed"),
        ({"responses": "sampled", "short_tokens": 2048}, "must be below --long-tokens 2048"),
        ({"responses": "sampled", "short_tokens": 9, "short_distractors": 1}, "give one of them"),
        ({"format": "squad"}, "needs the hops of --format musique, not squad"),
        ({"long_tokens": "40"}, "no question could be built: the short context and the response exceed"),
        ({"output": Path("triplets.txt")}, "must end in .jsonl"),
        ({"output": QUESTIONS}, "is the input file"),
        ({"source": EXAMPLE / "absent.jsonl"}, "absent.jsonl: no such file"),
        ({"pool": EXAMPLE / "absent.jsonl"}, "absent.jsonl: no such file"),
        ({"tokenizer": "absent"}, "no such file or directory"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_no_file(arguments, message, tokenizer_path, tmp_path) -> None:
    output = write(tmp_path / "out.jsonl", ["what was there before"])
    legal = {"source": QUESTIONS, "output": output, "tokenizer": tokenizer_path, "overwrite": True}
    with pytest.raises(UserError) as error:
        construct(**legal | arguments)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]
    assert output.read_text() == "what was there before\n"


def test_all_mistakes_in_the_settings_are_told_at_once(tokenizer_path, tmp_path) -> None:
    with pytest.raises(UserError) as error:
        construct(QUESTIONS, tmp_path / "out.jsonl", tokenizer_path, seed=-1, num_proc=0, long_tokens="x")
    assert [line.split()[0] for line in str(error.value).splitlines()] == ["--long-tokens", "--seed", "--num-proc"]


def test_an_existing_file_is_kept_unless_told_otherwise(tokenizer_path, tmp_path):
    output = tmp_path / "mine.jsonl"
    output.write_text("written by hand\n")
    few = write(tmp_path / "few.jsonl", first_lines(4))
    with pytest.raises(UserError, match=r"mine\.jsonl: already exists.*--overwrite"):
        construct(few, output, tokenizer_path)
    assert output.read_text() == "written by hand\n"
    construct(few, output, tokenizer_path, overwrite=True)
    assert output.read_text().startswith('{"id"')


def test_a_folder_of_the_users_in_the_place_of_the_report_is_kept(tokenizer_path, tmp_path):
    (tmp_path / "mine.report").mkdir()
    (tmp_path / "mine.report" / "thesis.tex").write_text("precious")
    few = write(tmp_path / "few.jsonl", first_lines(4))
    with pytest.raises(UserError, match=r"holds thesis\.tex"):
        construct(few, tmp_path / "mine.jsonl", tokenizer_path, overwrite=True)
    assert (tmp_path / "mine.report" / "thesis.tex").read_text() == "precious"
