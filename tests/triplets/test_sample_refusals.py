"""`data sample` with servers that refuse, cut prompts, or send a thought: recorded, counted, told, and never blank."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_solopo.errors import UserError
from megatron_solopo.generate.journal import StoredResponse, read_offsets, read_refusals
from megatron_solopo.triplets.sample import sample
from megatron_solopo.triplets.select import select
from megatron_solopo.triplets.settings import SampleSettings, SelectSettings
from tests.data.tiny_tokenizers import write_hugging_face
from tests.generate.completion_server import completion_server
from tests.triplets.context_files import context, write_lines

QUESTIONS, SAMPLES = 6, 4


@pytest.fixture
def contexts(tmp_path: Path) -> Path:
    """Chat prompts of 300 tokens each, long ones of 900, by the count of `data build`."""
    counted = {"short_tokens": 300 + 400, "long_tokens": 900 + 400, "response_tokens": 400}
    rows = [context(number, chat=True, **counted) for number in range(QUESTIONS)]
    return write_lines(tmp_path / "contexts.jsonl", rows)


def settings(source: Path, url: str, **changes) -> SampleSettings:
    values = {
        "contexts": source,
        "output": source.with_name("responses.jsonl"),
        "model": "tiny",
        "server": url,
        "num_samples": SAMPLES,
        "samples_per_request": 2,
        "concurrency": 2,
        "timeout": 20.0,
        "backoff": 0.02,
    }
    return SampleSettings(**values | changes)


def received(source: Path) -> list[StoredResponse]:
    return [response for _, response in read_offsets(source.with_name("responses.jsonl"))]


def test_a_refused_prompt_is_recorded_once_and_the_rest_is_answered(contexts) -> None:
    output = contexts.with_name("responses.jsonl")
    with completion_server(filtered="short 2") as server:
        report = sample(settings(contexts, server.url))
        assert (report.responses, report.refused) == (20, {"content_filter": 4})
        assert "responses that the server refuses: content_filter 4" in str(report)
        assert {each.question_id for each in read_refusals(output)} == {"q2"}
        asked = len(server.log)
        again = sample(settings(contexts, server.url))
        assert len(server.log) == asked and (again.received_now, again.refused) == (0, {"content_filter": 4})
        server.filtered = None
        assert sample(settings(contexts, server.url, retry_refused=True)).refused == {}
    assert len(received(contexts)) == QUESTIONS * SAMPLES


def test_more_refusals_than_allowed_end_the_run_with_the_first_reasons(contexts) -> None:
    with completion_server(filtered="short") as server:
        with pytest.raises(UserError) as error:
            sample(settings(contexts, server.url))
        assert "allows 4, which are the answers to 1 prompt: q0: HTTP 400: The prompt triggered" in str(error.value)
        asked = len(server.log)
        assert "\n" not in str(error.value) and asked <= 5
        with pytest.raises(UserError, match=r"refuses \d of 24 answers for ever"):
            sample(settings(contexts, server.url))
        assert len(server.log) == asked, "a run that is over the limit must not ask"
        report = sample(settings(contexts, server.url, max_refused=1.0))
    assert (report.responses, report.refused) == (0, {"content_filter": 24})


def test_the_command_ends_with_one_line_and_exit_code_2(contexts) -> None:
    output = contexts.with_name("responses.jsonl")
    command = [
        sys.executable,
        "-m",
        "megatron_solopo",
        "data",
        "sample",
        "--contexts",
        str(contexts),
        "--model",
        "tiny",
    ]
    with completion_server(prompt_tokens=128) as server:
        command += ["--output", str(output), "--server", server.url]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
    errors = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert ended.returncode == 2 and len(errors) == 1 and "Traceback" not in ended.stderr
    assert "read 128 of the 300 tokens of a prompt" in errors[0]


def test_no_refusal_is_allowed_with_a_limit_of_0(contexts) -> None:
    told = r"refuses \d of 24 answers for ever, and --max-refused 0 allows 0"
    with completion_server(filtered="short 5") as server, pytest.raises(UserError, match=told):
        sample(settings(contexts, server.url, max_refused=0.0))


def test_a_refusal_without_a_known_reason_is_recorded_only_behind_an_answer(contexts) -> None:
    """HTTP 400 may mean a wrong setting. Once the server has answered, the settings are right."""
    with completion_server({0: "400"}) as server:
        report = sample(settings(contexts, server.url, concurrency=1))
    assert (report.responses, report.refused) == (22, {"HTTP 400": 2})


@pytest.mark.parametrize(("side", "tokens"), [("short", 300), ("long", 900)])
def test_a_server_that_cuts_prompts_is_refused_before_a_response_is_kept(side, tokens, contexts) -> None:
    with completion_server(prompt_tokens=64) as server:
        with pytest.raises(UserError, match=rf"read 64 of the {tokens} tokens of a prompt \(q0\), .* num_ctx"):
            sample(settings(contexts, server.url, side=side))
        assert len(server.log) <= 3
    assert received(contexts) == []


def test_a_smaller_cut_names_the_answers_that_were_kept_before_it_was_found(contexts) -> None:
    with completion_server(prompt_tokens=128) as server, pytest.raises(UserError) as error:
        sample(settings(contexts, server.url, concurrency=1))
    kept = {each.question_id for each in received(contexts)}
    assert 0 < len(kept) < 5
    assert f"delete the answers to {', '.join(sorted(kept))}, whose prompts were cut alike" in str(error.value)


def test_whether_the_prompts_were_read_whole_is_told(contexts) -> None:
    with completion_server() as server:
        report = sample(settings(contexts, server.url))
    assert report.prompts_not_counted == 24
    assert "did not say how much of the prompt it read: 24; whether it cut them could not be checked" in str(report)
    contexts.with_name("responses.jsonl").unlink()
    with completion_server(prompt_tokens=301) as server:
        assert "could not be checked" not in str(sample(settings(contexts, server.url)))
    assert {each.prompt_tokens for each in received(contexts)} == {301}


def test_thoughts_alone_end_the_run_and_no_blank_response_is_kept(contexts) -> None:
    with (
        completion_server(dict.fromkeys(range(99), "thought alone")) as server,
        pytest.raises(UserError, match=r"refuses every request so far: q0: the reply holds a thought .* reasoning"),
    ):
        sample(settings(contexts, server.url))
    assert received(contexts) == []


def test_thoughts_that_use_all_tokens_are_counted(contexts) -> None:
    with completion_server({3: "thought cut"}) as server:
        report = sample(settings(contexts, server.url))
    assert (report.with_thought, report.without_text, report.finish_reasons) == (2, 2, {"stop": 22, "length": 2})
    assert "responses without text, as the thought used all of --max-tokens: 2" in str(report)


def test_a_thought_is_trained_with_its_response_and_not_scored(contexts, tmp_path) -> None:
    with completion_server(dict.fromkeys(range(99), "thought")) as server:
        report = sample(settings(contexts, server.url))
    assert report.with_thought == 24 and all(each.reasoning for each in received(contexts))
    tokenizer, output = write_hugging_face(tmp_path / "tokenizer"), tmp_path / "triplets.jsonl"
    select(
        SelectSettings(
            contexts=contexts, responses=tmp_path / "responses.jsonl", output=output, tokenizer=str(tokenizer)
        )
    )
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    texts = {(each.question_id, each.index): each for each in received(contexts)}
    assert len(rows) == QUESTIONS
    for row in rows:
        for name, index in zip(("chosen", "rejected"), row["samples"], strict=True):
            response = texts[row["question_id"], index]
            trained = f"<think>\n{response.reasoning}\n</think>\n\n{response.text}"
            assert row[name] == [{"role": "assistant", "content": trained}]
        assert row["scores"] == [1, 0]


def test_the_same_response_again_is_counted(contexts, monkeypatch) -> None:
    """A server that ignores the seed may answer the same each time."""
    monkeypatch.setattr("tests.generate.completion_server.text_of", lambda prompt, seed, choice: prompt)
    with completion_server() as server:
        report = sample(settings(contexts, server.url))
    assert report.repeated == QUESTIONS * (SAMPLES - 1)
    assert "responses with the same text as another to their prompt: 18" in str(report)
