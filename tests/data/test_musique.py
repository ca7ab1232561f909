"""Reading MuSiQue files, and telling a user which line is not one."""

import json

import pytest

from megatron_solopo.data.musique import mentions, normalise, read_questions
from tests.data.musique_example import QUESTIONS, first_lines


def changed(**fields: object) -> bytes:
    return json.dumps(json.loads(first_lines(1)[0]) | fields).encode()


def test_shipped_questions_are_complete() -> None:
    questions = read_questions(QUESTIONS)
    assert len({question.id for question in questions}) == len(questions) == 140
    for question in questions:
        supports = {hop.paragraph_support_idx for hop in question.question_decomposition}
        assert supports == {paragraph.idx for paragraph in question.evidence}
        text = " ".join(normalise(paragraph.passage) for paragraph in question.evidence)
        assert mentions(text, question.golds)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "whole line"),
        (b"[]", "whole line"),
        (changed(answer=""), "answer"),
        (changed(answer_aliases=[" "]), "answer_aliases.0"),
        (changed(paragraphs=[{"idx": 0, "title": "a", "paragraph_text": "b"}]), "paragraphs.0.is_supporting"),
        (changed(question_decomposition=[]), "question_decomposition"),
        (b'{"id": "caf\xe9"}', "whole line"),
    ],
)
def test_a_bad_line_is_named_with_its_field(line, message, tmp_path) -> None:
    path = tmp_path / "in.jsonl"
    path.write_bytes(first_lines(1)[0].encode() + b"\n\n" + line + b"\n")
    with pytest.raises(ValueError, match=f"in.jsonl:3: .*{message}") as error:
        read_questions(path)
    assert "\n" not in str(error.value)


def test_a_file_without_rows_is_refused(tmp_path) -> None:
    (tmp_path / "in.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no question"):
        read_questions(tmp_path / "in.jsonl")


def test_comparison_form_ignores_case_width_and_spacing() -> None:
    assert normalise(" St.\u00a0 STRASSE \uff21\n") == "st. strasse a"
    assert mentions(normalise("born in 18th-century Paris"), ["18th"])
    assert not mentions("born in paris", ["18th"])
