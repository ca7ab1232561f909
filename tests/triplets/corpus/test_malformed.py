"""Broken corpora: every mistake is named with its line, and no row disappears."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_solopo.errors import UserError
from megatron_solopo.triplets.corpus.formats import Question
from megatron_solopo.triplets.corpus.read import BadRow, read_questions

GOOD = {
    "id": "q",
    "question": "Where?",
    "answers": ["Paris"],
    "documents": [
        {"title": "A", "text": "Paris.", "supporting": True},
        {"title": "B", "text": "Rome.", "supporting": False},
    ],
}
MUSIQUE = {
    "id": "q",
    "question": "Where?",
    "answer": "Paris",
    "answer_aliases": [],
    "paragraphs": [{"idx": 0, "title": "A", "paragraph_text": "Paris.", "is_supporting": True}],
    "question_decomposition": [{"question": "Where?", "answer": "Paris", "paragraph_support_idx": 0}],
}
HOTPOT = {"_id": "q", "question": "?", "answer": "a", "context": [["A", ["x"]]], "supporting_facts": [["A", 0]]}


def read(path: Path, format: str = "generic") -> list[tuple[int, Question | BadRow]]:
    return list(read_questions(path, format))


@pytest.mark.parametrize(
    ("format", "line", "field"),
    [
        ("generic", b"{", ""),
        ("generic", b"[]", ""),
        ("generic", b"null", ""),
        ("generic", b'{"id": "caf\xe9"}', ""),
        ("generic", json.dumps(GOOD | {"id": 7}), "id"),
        ("generic", json.dumps(GOOD | {"answers": []}), "answers"),
        ("generic", json.dumps(GOOD | {"answers": [" "]}), "answers.0"),
        ("generic", json.dumps(GOOD | {"question": ""}), "question"),
        ("generic", json.dumps(GOOD | {"documents": [{"text": "no flag"}]}), "documents.0.supporting"),
        ("generic", json.dumps(GOOD | {"documents": [{"text": "x", "supporting": "yes"}]}), "documents.0.supporting"),
        ("generic", json.dumps(GOOD | {"question": "\ud800"}), "question"),
        ("musique", json.dumps(MUSIQUE | {"answer": ""}), "answer"),
        ("musique", json.dumps(MUSIQUE | {"paragraphs": []}), "paragraphs"),
        ("musique", json.dumps(MUSIQUE | {"answer_aliases": [" "]}), "answer_aliases.0"),
        ("hotpotqa", json.dumps(HOTPOT | {"supporting_facts": [["B", 0]]}), ""),
        ("hotpotqa", json.dumps(HOTPOT | {"context": [["A", [" "]]]}), ""),
        ("hotpotqa", json.dumps(HOTPOT | {"context": {"title": ["A"], "sentences": []}}), "context"),
        ("hotpotqa", json.dumps(HOTPOT | {"context": [["A"]]}), "context.0.1"),
        ("squad", json.dumps({"id": "q", "context": "c", "question": "?", "answers": []}), "answers"),
    ],
)
def test_a_bad_line_is_named_with_its_field(format, line, field, tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    good = {"generic": GOOD, "musique": MUSIQUE, "hotpotqa": HOTPOT}.get(
        format, {"id": "q", "context": "c", "question": "?", "answers": {"text": ["a"]}}
    )
    path.write_bytes(json.dumps(good).encode() + b"\n\n" + (line if isinstance(line, bytes) else line.encode()) + b"\n")
    (first, question), (number, bad), *_ = read(path, format)
    assert first == 1 and isinstance(question, Question)
    assert number == 3 and isinstance(bad, BadRow) and bad.field == field
    assert str(bad).startswith(f"{path}:3: ") and "\n" not in str(bad) and f"expected a {format} row" in str(bad)


def test_a_second_row_of_one_id_is_named_with_the_first(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{json.dumps(GOOD | {'id': 'r'})}\n{json.dumps(GOOD)}\n")
    *_, (line, bad) = read(path)
    assert (line, str(bad)) == (3, f"{path}:3: id: 'q' is already the id of the question of line 1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[{}, {]", ":1: not valid JSON"),
        ('[\n{"a": 1}\n{"b": 2}]', ":3: not valid JSON: expected ',' or ']'"),
        ("[\n{}", "not valid JSON"),
        ("[{}] x", "text behind the array"),
        (b'[\n"\xff"]', ":2: not UTF-8: byte 0xff"),
    ],
)
def test_a_broken_array_is_refused_with_its_line(text, message, tmp_path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}:") and message in str(error.value)


def test_items_of_an_array_are_numbered(tmp_path) -> None:
    path = tmp_path / "rows.json"
    rows = [GOOD, GOOD | {"id": "r"}, 7, GOOD | {"id": "s"}]
    path.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n")
    assert [(line, isinstance(found, Question)) for line, found in read(path)] == [(1, 1), (2, 1), (3, 0), (4, 1)]


@pytest.mark.parametrize(
    ("value", "place"),
    [
        ({"data": [{"title": "T", "paragraphs": [{"context": "", "qas": []}]}]}, "data.0.paragraphs.0.context: "),
        (
            {"data": [{"title": "T", "paragraphs": [{"context": "c", "qas": [{"id": "q"}]}]}]},
            "data.0.paragraphs.0.qas.0",
        ),
    ],
)
def test_a_bad_place_in_a_squad_file_is_named(value, place, tmp_path) -> None:
    path = tmp_path / "train.json"
    path.write_text(json.dumps(value))
    line, bad = read(path, "squad")[0]
    assert line == 1 and str(bad).startswith(f"{path}: row 1: {place}")


def test_a_broken_squad_file_and_a_missing_one_are_refused(tmp_path) -> None:
    path = tmp_path / "train.json"
    path.write_text('{"data": [\n}')
    with pytest.raises(UserError, match=r"train\.json:2: not valid JSON"):
        read(path, "squad")
    path.write_text('{"data": [], "data": [{}]}')
    with pytest.raises(UserError, match=r"train\.json: not valid JSON: the key 'data' is there twice in one object"):
        read(path, "squad")
    path.write_text('{"version": 1}')
    with pytest.raises(UserError, match=r"train\.json: data: expected a list of articles"):
        read(path, "squad")
    with pytest.raises(UserError, match=r"absent\.json: no such file"):
        read(tmp_path / "absent.json", "squad")


_JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["q", " ", "\u0000"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from([*GOOD, "text", "supporting"]), inner),
    max_leaves=8,
)


def _mutated(draw: st.DrawFn) -> bytes:
    """A good row with one thing broken: a field missing or of another type, or bytes changed, cut or put in."""
    row = json.loads(json.dumps(GOOD)) | {"id": f"q{draw(st.integers(0, 3))}"}
    for name in draw(st.lists(st.sampled_from([*GOOD, "documents.0", "text", "supporting"]), max_size=2)):
        target = row if name in GOOD else row.get("documents", [{}])
        target = target[0] if isinstance(target, list) and target else target
        target = target if isinstance(target, dict) else {}
        if draw(st.booleans()):
            target.pop(name, None)
        else:
            target[name] = draw(_JSON)
    line = bytearray(json.dumps(row, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass"))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.integers(0, max(0, len(line) - 1)))
        line[place : place + draw(st.integers(0, 2))] = draw(st.binary(max_size=3))
    # A line break would make two rows of one.
    return bytes(line).replace(b"\n", b" ").replace(b"\r", b" ")


@settings(max_examples=400, suppress_health_check=list(HealthCheck))
@given(st.lists(st.composite(_mutated)(), min_size=1, max_size=12))
@example([b"{}", b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), b"\x00", b"NaN", b"9" * 5000, b'"\\ud83d"'])
@example([b"[" * 100_000])
def test_no_row_is_lost_whatever_is_broken(tmp_path_factory, lines) -> None:
    """Thousands of broken rows: each line is a question or a named mistake, and nothing else is raised."""
    path = tmp_path_factory.mktemp("broken") / "rows.jsonl"
    # An array's bracket in front, or a zero byte among the first 16, would make another kind of file.
    lines = [b'{"the first row": 1}', *lines]
    path.write_bytes(b"\n".join(lines))
    found = read(path)
    rows = {number for number, line in enumerate(lines, start=1) if line.strip()}
    assert {number for number, _ in found} == rows
    ids = [each.id for _, each in found if isinstance(each, Question)]
    assert len(set(ids)) == len(ids)
    for number, each in found:
        if isinstance(each, BadRow):
            assert each.number == number and each.reason and "\n" not in str(each)
        else:
            assert json.loads(lines[number - 1]).keys() >= GOOD.keys() and each.answers and each.documents


def test_whole_lines_of_noise(tmp_path) -> None:
    """Bytes without any structure."""
    rng = random.Random(0)
    lines = [
        bytes(rng.choices([*range(1, 10), *range(11, 13), *range(14, 256)], k=rng.randrange(1, 40)))
        for _ in range(3000)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"{}\n" + b"\n".join(lines))
    found = read(path)
    assert all(isinstance(each, BadRow) for _, each in found)
    assert {number for number, _ in found} == {1} | {n for n, line in enumerate(lines, start=2) if line.strip()}
