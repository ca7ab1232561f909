"""Every promise of `data build`, on every row that the shipped questions make."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from megatron_solopo.data.rows import validate_file
from megatron_solopo.triplets.build import BuildReport
from megatron_solopo.triplets.constructed_answers import GIVE_UP
from megatron_solopo.triplets.contexts import uniform_distance
from megatron_solopo.triplets.corpus.formats import entity_golds, mentions, normalise
from tests.triplets.musique_example import (
    QUESTIONS,
    Row,
    construct,
    evidence,
    first_lines,
    lengths,
    passage,
    passages,
    read,
    write,
)

LONG_TOKENS = 2048
SHORT_DISTRACTORS = 3


@pytest.fixture(scope="module")
def built(tokenizer_path, tmp_path_factory) -> tuple[list[Row], BuildReport, Path]:
    output = tmp_path_factory.mktemp("built") / "triplets.jsonl"
    report = construct(QUESTIONS, output, tokenizer_path, short_distractors=SHORT_DISTRACTORS)
    return read(output), report, output


@pytest.fixture(scope="module")
def rows(built) -> list[Row]:
    return built[0]


def test_at_least_a_hundred_questions_become_valid_triplets(built) -> None:
    rows, report, output = built
    validation = validate_file(output)
    assert validation.errors == [] and validation.kind == "triplet" and validation.forms == ("text",)
    assert report.rows_read == 140 and report.rows_written == len(rows) >= 100
    assert len(rows) + sum(report.dropped.values()) == report.rows_read


def test_long_contexts_end_within_a_hundredth_below_the_limit(rows, tokenizer) -> None:
    for row in rows:
        exact = lengths(row, tokenizer)
        assert 0.99 * LONG_TOKENS - 1 < exact["prompt_long"] <= LONG_TOKENS, row["id"]
        assert (row["short_tokens"], row["long_tokens"]) == (exact["prompt_short"], exact["prompt_long"])


def test_report_gives_the_lengths_that_training_sees(built, tokenizer) -> None:
    rows, report, _ = built
    measured = [lengths(row, tokenizer) for row in rows]
    for stats, name in ((report.short_tokens, "prompt_short"), (report.long_tokens, "prompt_long")):
        values = [each[name] for each in measured]
        assert (stats.minimum, stats.maximum) == (min(values), max(values))
        assert (stats.mean, stats.median) == (round(float(np.mean(values)), 1), np.median(values))


def test_both_contexts_hold_the_same_evidence_word_for_word(rows, questions) -> None:
    for row in rows:
        supporting = evidence(questions[row["id"]])
        short, long = passages(row["prompt_short"]), passages(row["prompt_long"])
        assert supporting <= set(short) <= set(long), row["id"]
        assert len(short) == len(supporting) + SHORT_DISTRACTORS


def test_only_the_evidence_gives_the_answer_away(rows, questions) -> None:
    for row in rows:
        question = questions[row["id"]]
        for prompt in (row["prompt_short"], row["prompt_long"]):
            distractors = [each for each in passages(prompt) if each not in evidence(question)]
            golds = entity_golds(question.answers)
            assert distractors and golds and not any(mentions(normalise(each), golds) for each in distractors)


def test_no_paragraph_comes_twice(rows) -> None:
    for row in rows:
        for prompt in (row["prompt_short"], row["prompt_long"]):
            texts = [normalise(each.split("\n", 1)[1]) for each in passages(prompt)]
            assert len(set(texts)) == len(texts), row["id"]


def test_long_distractors_come_from_other_questions_too(rows, questions) -> None:
    for row in rows:
        own = {passage(document) for document in questions[row["id"]].documents}
        short = set(passages(row["prompt_short"]))
        added = set(passages(row["prompt_long"])) - short
        assert not added or added - own, row["id"]


def test_evidence_lies_at_every_depth_and_moves_between_samples(built, questions) -> None:
    rows, report, _ = built
    depths = [tuple(row["evidence_depths"]) for row in rows]
    together = np.concatenate(depths)
    assert np.histogram(together, bins=10, range=(0, 1))[0].tolist() == report.depth.tenths
    assert sum(report.depth.tenths) == sum(len(questions[row["id"]].supporting) for row in rows)
    distance, critical = uniform_distance(together)
    assert distance < 0.05 < critical
    assert (report.depth.distance, report.depth.critical) == (round(distance, 4), round(critical, 4))
    assert len(set(depths)) == len(depths)


def test_depths_are_where_the_text_has_the_evidence(rows, questions, tokenizer) -> None:
    for row in rows:
        long = passages(row["prompt_long"])
        tokens = [len(tokenizer.encode(f"{each}\n\n", add_special_tokens=False)) for each in long]
        ends = np.cumsum(tokens)
        found = [
            (end - own / 2) / ends[-1]
            for each, own, end in zip(long, tokens, ends, strict=True)
            if each in evidence(questions[row["id"]])
        ]
        np.testing.assert_allclose(row["evidence_depths"], found, atol=2e-3)


@pytest.mark.parametrize("prompt", ["prompt_short", "prompt_long"])
def test_samples_of_one_size_do_not_share_their_order(rows, questions, prompt) -> None:
    patterns = Counter()
    for row in rows:
        places = [each in evidence(questions[row["id"]]) for each in passages(row[prompt])]
        if sum(places) == 2 and len(places) >= 5:
            patterns[tuple(places)] += 1
    assert patterns.total() > 50 and max(patterns.values()) < 0.25 * patterns.total()


def test_the_answers_end_in_the_gold_answer_and_in_none(rows, questions) -> None:
    for row in rows:
        answer = questions[row["id"]].answers[0]
        assert row["chosen"].rstrip(".").endswith(f"So the answer is: {answer.rstrip('.')}"), row["id"]
        assert not mentions(normalise(row["rejected"]), list(map(normalise, row["answers"]))), row["id"]


def test_chosen_answers_name_every_hop_in_order(rows, questions) -> None:
    for row in rows:
        position = 0
        for hop in questions[row["id"]].hops:
            position = row["chosen"].index(hop.answer, position) + 1


def test_rejected_answers_are_wrong_entities_of_the_context_or_give_up(built) -> None:
    rows, report, _ = built
    give_up = [row for row in rows if row["rejected"] == GIVE_UP]
    for row in rows:
        if row["rejected"] != GIVE_UP:
            entity = row["rejected"].rpartition("So the answer is: ")[2].rstrip(".")
            assert entity and entity in row["prompt_short"] and entity in row["prompt_long"], row["id"]
    assert report.rejected == {"wrong_entity": len(rows) - len(give_up), "give_up": len(give_up)}
    assert 0.1 < len(give_up) / len(rows) < 0.35


def test_same_seed_same_bytes_on_any_number_of_processes(built, tokenizer_path, tmp_path) -> None:
    construct(QUESTIONS, tmp_path / "again.jsonl", tokenizer_path, num_proc=2)
    assert (tmp_path / "again.jsonl").read_bytes() == built[2].read_bytes()


def test_another_seed_moves_everything(rows, tokenizer_path, tmp_path) -> None:
    construct(QUESTIONS, tmp_path / "other.jsonl", tokenizer_path, seed=1)
    others = {row["id"]: row for row in read(tmp_path / "other.jsonl")}
    both = [(row, others[row["id"]]) for row in rows if row["id"] in others]
    for name in ("prompt_short", "prompt_long", "evidence_depths"):
        assert sum(a[name] != b[name] for a, b in both) > 0.95 * len(both), name
    assert sum(a["rejected"] != b["rejected"] for a, b in both) > 0.5 * len(both)
    assert all(a["chosen"] == b["chosen"] for a, b in both)


def test_short_side_depends_on_the_question_alone(rows, tokenizer_path, tmp_path) -> None:
    few = write(tmp_path / "few.jsonl", first_lines(12)[::-1])
    construct(few, tmp_path / "out.jsonl", tokenizer_path, long_tokens="3000")
    expected = {row["id"]: row for row in rows}
    compared = [row for row in read(tmp_path / "out.jsonl") if row["id"] in expected]
    for row in compared:
        for name in ("prompt_short", "chosen", "rejected"):
            assert row[name] == expected[row["id"]][name]
    assert len(compared) >= 10


def test_report_is_json_and_text(built) -> None:
    report = built[1]
    assert json.loads(json.dumps(report.to_json()))["long_tokens"]["maximum"] == report.long_tokens.maximum
    text = str(report)
    assert f"140 questions read, {report.rows_written} rows written" in text
    assert all(f"dropped, {reason}: {count}" in text for reason, count in report.dropped.items())
