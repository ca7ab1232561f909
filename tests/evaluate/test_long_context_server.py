"""Evaluations of a server's model: what it refuses, cuts or only thinks is told and never a silent 0 %."""

import json
from pathlib import Path

import pytest

from megatron_solopo.errors import UserError
from megatron_solopo.evaluate.long_context import evaluate_long_context
from megatron_solopo.evaluate.scores import render
from megatron_solopo.evaluation_settings import LongContextSettings
from megatron_solopo.results.long_context import LongContextResults
from tests.evaluate.evaluation_models import make_model
from tests.generate.completion_server import completion_server
from tests.triplets.musique_example import write


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("served") / "model")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Three questions in long contexts of different lengths. The longest is the last of the file."""
    made = [
        {
            "id": f"q{number}",
            "prompt_long": f"number {number} " + "word " * length,
            "answers": ["Rome"],
            "response_tokens": 16,
        }
        for number, length in enumerate((20, 60, 200))
    ]
    return write(tmp_path / "rows.jsonl", [json.dumps(row) for row in made])


def evaluated(url: str, rows: Path, tokenizer: Path, **changes) -> LongContextResults:
    values = {"model": "tiny", "tokenizer": str(tokenizer), "contexts": (rows,), "side": "long", "concurrency": 1}
    values |= {"server": url, "output": rows.with_name("s.json"), "backoff": 0.02}
    results = evaluate_long_context(LongContextSettings(**values | changes))
    assert results is not None
    return results


def test_a_cut_prompt_ends_the_evaluation_with_the_longest_prompt_first(rows, tokenizer) -> None:
    with completion_server(prompt_tokens=128) as server:
        with pytest.raises(UserError, match=r"read 128 of the \d\d\d tokens of a prompt \(rows\.long:q2\)"):
            evaluated(server.url, rows, tokenizer)
        assert [each.prompt.startswith("number 2") for each in server.log] == [True]
    assert not rows.with_name("s.json").exists()


def test_a_refused_sample_is_counted_and_in_no_mean(rows, tokenizer) -> None:
    with completion_server(filtered="number 1") as server:
        results = evaluated(server.url, rows, tokenizer)
        again = evaluated(server.url, rows, tokenizer)
        assert len(server.log) == 3
    for each in (results, again):
        assert each.samples == 2 and each.cell("rows.long", "sub_em").score == 1
        (skipped,) = each.skipped
        assert (skipped.task, skipped.n, skipped.reason) == ("rows.long", 1, "refused by the server: content_filter")
    assert "skipped: 1 of rows.long at" in render(results) and "content_filter" in render(results)


def test_too_many_refused_samples_end_the_evaluation(rows, tokenizer) -> None:
    told = r"refuses 2 of 3 answers for ever, and --max-refused 0\.01 allows 1, which are the answers to 1 prompt"
    with completion_server(filtered="number") as server, pytest.raises(UserError, match=told):
        evaluated(server.url, rows, tokenizer)


def test_thoughts_are_told_apart_and_a_blank_answer_counts_as_wrong(tmp_path, tokenizer) -> None:
    chat = [
        {"id": f"q{number}", "prompt_long": [{"role": "user", "content": "Where?"}], "answers": ["Rome"]}
        for number in range(2)
    ]
    rows = write(tmp_path / "chat.jsonl", [json.dumps(row) for row in chat])
    with completion_server({0: "thought", 1: "thought cut"}, prompt_tokens=99) as server:
        results = evaluated(server.url, rows, tokenizer)
    assert results.cell("chat.long", "sub_em").score == 0.5
    assert results.notes == [
        "2 answers came with a thought of their own; the text behind it is scored",
        "1 answers are blank, as the thought used all of --max-new-tokens; they count as wrong",
    ]
    lines = rows.with_name("s.predictions.jsonl").read_text().splitlines()
    assert all(json.loads(line)["reasoning"].startswith("I think of Where?") for line in lines)


def test_thoughts_alone_end_the_evaluation(tmp_path, tokenizer) -> None:
    row = {"id": "q", "prompt_long": [{"role": "user", "content": "Where?"}], "answers": ["Rome"]}
    rows = write(tmp_path / "chat.jsonl", [json.dumps(row)])
    told = r"q: the reply holds a thought .* without a reasoning parser"
    with completion_server({0: "thought alone"}) as server, pytest.raises(UserError, match=told):
        evaluated(server.url, rows, tokenizer)


def test_what_a_server_does_not_tell_is_noted(rows, tokenizer) -> None:
    with completion_server({0: "529"}) as server:
        results = evaluated(server.url, rows, tokenizer)
    assert results.notes[0].startswith("the server did not say how much of the prompt it read for 3 of 3 answers")
    assert results.notes[1].startswith("requests sent again: HTTP 529 1, after 0.")
    assert f"note: {results.notes[0]}" in render(results)
