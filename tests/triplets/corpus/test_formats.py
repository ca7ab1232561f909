"""The same question in every format that corpora come in."""

import json

import pytest

from megatron_solopo.triplets.corpus.formats import Document, Hop, Question, golds, leaks, mentions, normalise
from megatron_solopo.triplets.corpus.read import read_distractors, read_questions
from tests.triplets.musique_example import QUESTIONS, evidence, passage

TITLES = ("Peel family", "Walcha")
TEXTS = ("He was a son. His father was Sir Robert.", "A town. In Australia.")


def questions(path, format) -> list[Question]:
    found = [question for _, question in read_questions(path, format)]
    assert all(isinstance(question, Question) for question in found), found
    return found


def check(question: Question, answers: tuple[str, ...] = ("Sir Robert",)) -> None:
    assert (question.id, question.question, question.answers) == ("q1", "Who was his father?", answers)
    assert question.documents == tuple(Document(*pair) for pair in zip(TITLES, TEXTS, strict=True))
    assert question.supporting == (0,) and question.answerable


def test_generic(tmp_path) -> None:
    documents = [
        {"title": title, "text": f" {text}\n", "supporting": title == TITLES[0]}
        for title, text in zip(TITLES, TEXTS, strict=True)
    ]
    row = {"id": "q1", "question": "Who was his father?", "answers": ["Sir Robert", "Peel"], "documents": documents}
    (tmp_path / "rows.jsonl").write_text("\n" + json.dumps(row) + "\n\n")
    check(questions(tmp_path / "rows.jsonl", "generic")[0], ("Sir Robert", "Peel"))
    del documents[1]["title"]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    assert questions(tmp_path / "rows.jsonl", "generic")[0].documents[1] == Document("", TEXTS[1])


HOTPOT_SENTENCES = (["He was a son.", " His father was Sir Robert."], ["A town.", " In Australia."])
TWO_WIKI_SENTENCES = (["He was a son.", "His father was Sir Robert."], ["A town.", "In Australia."])


@pytest.mark.parametrize("sentences", [HOTPOT_SENTENCES, TWO_WIKI_SENTENCES], ids=["hotpotqa", "2wiki"])
@pytest.mark.parametrize("writing", ["released", "hub"])
def test_hotpotqa_and_2wikimultihopqa(sentences, writing, tmp_path) -> None:
    row = {"question": "Who was his father?", "answer": "Sir Robert", "type": "bridge", "level": "hard"}
    if writing == "released":
        row |= {"_id": "q1", "context": list(zip(TITLES, sentences, strict=True))}
        row |= {"supporting_facts": [[TITLES[0], 0], [TITLES[0], 1]]}
        text = json.dumps([row, row | {"_id": "q2"}], indent=1)
    else:
        row |= {"id": "q1", "context": {"title": TITLES, "sentences": sentences}}
        row |= {"supporting_facts": {"title": [TITLES[0]], "sent_id": [1]}}
        text = json.dumps(row) + "\n" + json.dumps(row | {"id": "q2"})
    (tmp_path / "rows.json").write_text(text)
    for format in ("hotpotqa", "2wikimultihopqa"):
        first, second = questions(tmp_path / "rows.json", format)
        check(first)
        assert second.id == "q2"


def test_squad_as_released(tmp_path) -> None:
    ask = {"id": "q1", "question": "Who was his father?", "answers": [{"text": "Sir Robert", "answer_start": 9}] * 2}
    impossible = {"id": "q2", "question": "Why?", "answers": [], "is_impossible": True}
    paragraphs = [{"context": TEXTS[0], "qas": [ask, impossible]}, {"context": TEXTS[1], "qas": []}]
    data = {"version": "v2.0", "data": [{"title": "Peel_family", "paragraphs": paragraphs}]}
    (tmp_path / "train.json").write_text(json.dumps(data))
    first, second = questions(tmp_path / "train.json", "squad")
    assert first.documents == (Document(TITLES[0], TEXTS[0]), Document(TITLES[0], TEXTS[1]))
    assert (first.id, first.answers, first.supporting, first.answerable) == ("q1", ("Sir Robert",), (0,), True)
    assert (second.id, second.answers, second.answerable) == ("q2", (), False)


def test_squad_from_the_hub(tmp_path) -> None:
    row = {"id": "q1", "title": "Peel", "context": TEXTS[0], "question": "Who?", "answers": {"text": ["a", "b", "a"]}}
    lines = [row, row | {"id": "q2", "answers": {"text": [], "answer_start": []}}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in lines))
    first, second = questions(tmp_path / "rows.jsonl", "squad")
    assert first.answers == ("a", "b") and first.supporting == (0,) and first.documents == (Document("Peel", TEXTS[0]),)
    assert first.answerable and not second.answerable


def test_the_shipped_questions_are_complete() -> None:
    found = questions(QUESTIONS, "musique")
    assert len({question.id for question in found}) == len(found) == 140
    for question in found:
        assert {hop.title for hop in question.hops} == {question.documents[i].title for i in question.supporting}
        assert mentions(" ".join(map(normalise, evidence(question))), golds(question.answers))
        assert len(question.documents) == 20 and passage(question.documents[0]).startswith("Title: ")


def test_a_hop_without_a_paragraph_has_no_title(tmp_path) -> None:
    row = json.loads(QUESTIONS.read_text().splitlines()[0])
    row["question_decomposition"][0]["paragraph_support_idx"] = None
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    first = questions(tmp_path / "rows.jsonl", "musique")[0].hops[0]
    assert isinstance(first, Hop) and first.title == ""


def test_a_pool_file(tmp_path) -> None:
    (tmp_path / "pool.jsonl").write_text('{"text": " a "}\n{"title": "T", "text": "b"}\n{"title": "T"}\n')
    *good, (line, bad) = read_distractors(tmp_path / "pool.jsonl")
    assert good == [(1, Document("", "a")), (2, Document("T", "b"))]
    assert line == 3 and str(bad).startswith(f"{tmp_path}/pool.jsonl:3: text: Field required")


def test_comparison_form_ignores_case_width_and_spacing() -> None:
    assert normalise(" St.\u00a0 STRASSE \uff21\n") == "st. strasse a"


@pytest.mark.parametrize(
    ("text", "rule", "excluded"),
    [
        ("born in 18th-century paris", "substring", True),
        ("born in 18th-century paris", "word", True),
        ("the 118th", "substring", True),
        ("the 118th", "word", False),
        ("18th", "allow", False),
        ("nothing", "substring", False),
    ],
)
def test_leak_rules(text, rule, excluded) -> None:
    assert leaks(text, ["18th"], rule) == excluded
