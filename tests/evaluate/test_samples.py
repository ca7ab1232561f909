"""Rows of the triplet build as questions: either side, true lengths, buckets, depths."""

import json

import pytest

from megatron_solopo.data.rendering import encode_prompt
from megatron_solopo.data.tokenizer import load_tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.evaluate.samples import DEFAULT_MAX_NEW_TOKENS, QuestionFile
from tests.data.chat_templates import user, write_tokenizer
from tests.data.tiny_tokenizers import write_hugging_face
from tests.triplets.musique_example import construct, first_lines, read, write


def rows_file(tmp_path, rows):
    return write(tmp_path / "rows.jsonl", [json.dumps(row) for row in rows])


def row(number, **fields):
    prompts = {"prompt_short": f"short {number}?", "prompt_long": f"long {number} " + "word " * number}
    return {"id": str(number), "answers": ["x"]} | prompts | fields


def test_rows_of_data_build_are_read(tokenizers, tmp_path) -> None:
    source = write(tmp_path / "corpus.jsonl", first_lines(6))
    tokenizer = str(write_hugging_face(tmp_path / "tokenizer"))
    construct(source, tmp_path / "built.jsonl", tokenizer, long_tokens="6000,9000")
    built = read(tmp_path / "built.jsonl")
    found = QuestionFile(tmp_path / "built.jsonl", ("short", "long"), tokenizers["byte_level"], [6000], [0.0, 0.5, 1.0])
    specs = found.specs()
    longs = [spec for spec in specs if spec.task == "built.long"]
    assert len(longs) == len(built) and len(specs) - len(longs) == len({each["question_id"] for each in built})
    assert {spec.length for spec in longs} == {6000, 16384}
    by_id = {each["id"]: each for each in built}
    for spec in specs:
        sample = found.build(spec)
        assert len(encode_prompt(sample.prompt, tokenizers["byte_level"], "plain")) == spec.prompt_tokens
        if spec.task == "built.long":
            of_row = by_id[spec.id.removeprefix("built.long:")]
            assert sample.prompt == of_row["prompt_long"] and list(sample.answers) == of_row["answers"]
            assert spec.prompt_tokens + of_row["response_tokens"] == of_row["long_tokens"]
            assert spec.depth in (0.0, 0.5, 1.0) and spec.max_new_tokens == of_row["response_tokens"]
        else:
            assert spec.depth is None and sample.prompt in {each["prompt_short"] for each in built}


def test_lengths_are_bucketed_and_depths_brought_to_the_nearest(tokenizers, tmp_path) -> None:
    rows = [row(number, evidence_depths=[depth]) for number, depth in ((5, 0.1), (40, 0.4), (300, 0.8))]
    found = QuestionFile(rows_file(tmp_path, rows), ["long"], tokenizers["byte_level"], [64, 128], [0.0, 0.5, 1.0])
    specs = found.specs()
    tokens = [spec.prompt_tokens for spec in specs]
    assert tokens == sorted(tokens) and tokens[0] <= 64 < tokens[1] and tokens[2] > 128
    power = 1 << (tokens[2] - 1).bit_length()
    bounds = [64, 128 if tokens[1] <= 128 else 1 << (tokens[1] - 1).bit_length(), power]
    assert [spec.length for spec in specs] == bounds and [spec.depth for spec in specs] == [0.0, 0.5, 1.0]
    assert {spec.max_new_tokens for spec in specs} == {DEFAULT_MAX_NEW_TOKENS}


def test_a_question_is_asked_once_in_its_short_context(tokenizers, tmp_path) -> None:
    rows = [row(1), row(2, question_id="1"), row(3, question_id="q")]
    path = rows_file(tmp_path, rows)
    short = QuestionFile(path, ["short"], tokenizers["byte_level"], [], [], max_new_tokens=7)
    assert [spec.id for spec in short.specs()] == ["rows.short:1", "rows.short:q"]
    assert {spec.max_new_tokens for spec in short.specs()} == {7}
    long = QuestionFile(path, ["long"], tokenizers["byte_level"], [], [], limit=2)
    assert [spec.id for spec in long.specs()] == ["rows.long:1", "rows.long:2"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row(1), row(2, answers=[])], r"rows\.jsonl:2: answers=\[\]: List should have at least 1 item"),
        ([row(1, answers=["x", " "])], r"rows\.jsonl:1: answers\.1: is blank, and"),
        ([row(1, prompt_long=None)], r"rows\.jsonl:1: prompt_long: is missing; see --side"),
        ([row(1), row(1)], r"rows\.jsonl:2: id: '1' is already the id of an earlier row"),
        ([], r"rows\.jsonl: is an empty file; expected JSON lines"),
    ],
)
def test_other_files_are_refused(tokenizers, tmp_path, rows, message) -> None:
    with pytest.raises(UserError, match=message):
        QuestionFile(rows_file(tmp_path, rows), ["long"], tokenizers["byte_level"], [], [])


def test_a_rows_arguments_reach_the_template_and_decide_its_length(tmp_path) -> None:
    tokenizer = load_tokenizer(write_tokenizer(tmp_path / "tokenizer", "think_argument"))
    off, on = {"enable_thinking": False}, {"enable_thinking": True}
    rows = [row(number, prompt_long=[user("Q?")]) for number in (1, 2)]
    rows[1]["chat_template_kwargs"] = on
    path = rows_file(tmp_path, rows)
    found = QuestionFile(path, ["long"], tokenizer, [], [], kwargs=off)
    samples = [found.build(spec) for spec in found.specs()]
    assert [each.arguments.kwargs for each in samples] == [on, off]
    for each in samples:
        assert len(encode_prompt(each.prompt, tokenizer, "chat", each.arguments)) == each.spec.prompt_tokens
    with pytest.raises(UserError, match=r"rows.jsonl:1: the chat template does not read tone"):
        QuestionFile(path, ["long"], tokenizer, [], [], kwargs={"tone": "kind"})
