"""The shipped questions at 2K, 8K, 32K and 131,072 tokens: every promise at every length."""

from pathlib import Path

import pytest

from megatron_solopo.data.rows import validate_file
from megatron_solopo.data.tokenize_row import tokenize_row
from megatron_solopo.triplets.build import BuildReport
from megatron_solopo.triplets.contexts import uniform_distance
from megatron_solopo.triplets.corpus.formats import entity_golds, mentions, normalise
from tests.triplets.musique_example import QUESTIONS, Row, construct, evidence, passages, read

# In short: 2,048 tokens in tests/triplets/test_build.py.
pytestmark = pytest.mark.long

LENGTHS = (2048, 8192, 32768, 131072)


@pytest.fixture(scope="module")
def built(tokenizer_path, tmp_path_factory) -> tuple[list[Row], BuildReport, Path]:
    output = tmp_path_factory.mktemp("long") / "triplets.jsonl"
    report = construct(QUESTIONS, output, tokenizer_path, long_tokens=",".join(map(str, LENGTHS)), num_proc=2)
    return read(output), report, output


def test_all_but_the_named_rows_are_written(built) -> None:
    rows, report, output = built
    assert len(rows) == report.rows_written >= 0.99 * 4 * 140 and report.pool_documents == 2363
    assert len(rows) + len(report.left_out) == 4 * 140
    assert report.dropped.keys() <= {"no choice from the pool comes within 1 % below --long-tokens"}
    validation = validate_file(output)
    assert validation.errors == [] and validation.kind == "triplet"
    assert {row["id"] for row in rows} | {each["id"] for each in report.left_out} == {
        f"{row['question_id']}@{length}" for row in rows for length in LENGTHS
    }


def test_no_context_is_over_or_more_than_a_hundredth_under(built, tokenizer) -> None:
    """By the tokens that `data prepare` makes. To save time, only every seventh of the longer rows is tokenized."""
    rows, report, _ = built
    encoded = [row for number, row in enumerate(rows) if row["target_tokens"] < 32768 or number % 7 == 0]
    for row in encoded:
        answers = {name: row[name] for name in ("chosen", "rejected")}
        prompts = {"long": row["prompt_long"], "short": row["prompt_short"]}
        ids = tokenize_row(prompts, answers, tokenizer, "plain", {tokenizer.eos_token_id}).ids
        response = max(len(ids["chosen"]), len(ids["rejected"]))
        assert len(ids["long"]) + response == row["long_tokens"], row["id"]
        assert len(ids["short"]) + response == row["short_tokens"], row["id"]
    assert {row["target_tokens"] for row in encoded} == set(LENGTHS)
    for row in rows:
        assert 0.99 * row["target_tokens"] - 1 < row["long_tokens"] <= row["target_tokens"], row["id"]
    assert report.least_fill >= 0.99 - 1 / 2048


def test_every_supporting_paragraph_is_there_once_and_no_other_gives_the_answer_away(built, questions) -> None:
    normal: dict[str, str] = {}
    for row in built[0]:
        question = questions[row["question_id"]]
        golds = entity_golds(question.answers)
        shown = passages(row["prompt_long"])
        assert len(set(shown)) == len(shown), row["id"]
        assert evidence(question) <= set(shown), row["id"]
        for passage in set(shown) - evidence(question):
            text = normal.setdefault(passage, normalise(passage))
            assert not mentions(text, golds), row["id"]


def test_no_text_comes_twice_under_another_title(built) -> None:
    for row in built[0]:
        texts = [normalise(passage.split("\n", 1)[1]) for passage in passages(row["prompt_long"])]
        assert len(set(texts)) == len(texts), row["id"]


def test_evidence_is_spread_evenly_at_every_length_and_not_alike(built) -> None:
    depths = {}
    for length in LENGTHS:
        of_length = [row for row in built[0] if row["target_tokens"] == length]
        depths[length] = {row["question_id"]: row["evidence_depths"] for row in of_length}
        distance, critical = uniform_distance([depth for row in of_length for depth in row["evidence_depths"]])
        assert distance < (0.6 if length > 2048 else 0.8) * critical, length
        assert len(set(map(tuple, depths[length].values()))) == len(of_length)
    both = depths[32768].keys() & depths[131072].keys()
    moved = [abs(depths[32768][each][0] - depths[131072][each][0]) > 0.02 for each in both]
    assert sum(moved) > 0.8 * len(both)


def test_one_question_has_one_short_side_at_all_lengths(built) -> None:
    short: dict[str, set[tuple[str, ...]]] = {}
    for row in built[0]:
        side = (row["prompt_short"], row["chosen"], row["rejected"])
        short.setdefault(row["question_id"], set()).add(side)
    assert len(short) == 140 and all(len(sides) == 1 for sides in short.values())
