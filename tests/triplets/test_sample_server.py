"""`data sample` against a real HTTP server: nothing lost, nothing asked twice, whatever fails."""

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from megatron_solopo.errors import UserError
from megatron_solopo.generate.journal import StoredResponse, read_offsets
from megatron_solopo.triplets.sample import SampleReport, sample
from megatron_solopo.triplets.select import select
from megatron_solopo.triplets.settings import SampleSettings, SelectSettings
from tests.generate.completion_server import CompletionServer, choices_of, completion_server
from tests.triplets.context_files import context, write_lines

QUESTIONS, SAMPLES, AT_ONCE = 6, 10, 4
REQUESTS = QUESTIONS * 3  # 4, 4 and 2 samples


@pytest.fixture
def contexts(tmp_path: Path) -> Path:
    return write_lines(tmp_path / "contexts.jsonl", [context(number) for number in range(QUESTIONS)])


def settings(source: Path, url: str, **changes) -> SampleSettings:
    values = {
        "contexts": source,
        "output": source.with_name("responses.jsonl"),
        "model": "tiny",
        "server": url,
        "num_samples": SAMPLES,
        "samples_per_request": AT_ONCE,
        "concurrency": 4,
        "timeout": 20.0,
        "backoff": 0.02,
    }
    return SampleSettings(**values | changes)


def received(path: Path) -> list[StoredResponse]:
    return [response for _, response in read_offsets(path)]


def check_complete(path: Path, server: CompletionServer, samples: int = SAMPLES) -> None:
    """Every sample once, each a text that was served, and no answered request sent again."""
    responses = received(path)
    assert Counter((each.question_id, each.index) for each in responses) == Counter(
        {(f"q{number}", index): 1 for number in range(QUESTIONS) for index in range(samples)}
    )
    texts = [each.text for each in responses]
    served = [
        (choice.get("text") or choice["message"]["content"])
        for each in server.answered()
        for choice in choices_of(each)
    ]
    assert len(set(served)) == len(served), "the same answer was asked for twice"
    assert sorted(texts) == sorted(served), "an answer was lost"
    for each in responses:
        assert each.text.startswith(f"short {each.question_id[1:]} {each.seed} ")


def test_every_sample_comes_once_with_its_settings(contexts) -> None:
    with completion_server() as server:
        report = sample(settings(contexts, server.url, temperature=0.7, top_p=0.9))
        check_complete(contexts.with_name("responses.jsonl"), server)
    assert (report.questions, report.responses, report.received_now, report.retried) == (6, 60, 60, {})
    assert len(server.log) == REQUESTS
    for each in server.log:
        asked = {name: each.body[name] for name in ("model", "temperature", "top_p", "max_tokens")}
        assert asked == {"model": "tiny", "temperature": 0.7, "top_p": 0.9, "max_tokens": 92}
        assert each.path == "/v1/completions" and "authorization" not in each.headers
    assert len({each.body["seed"] for each in server.log}) == REQUESTS


def test_chat_prompts_go_to_the_chat_endpoint_with_the_key(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret-1")
    contexts = write_lines(tmp_path / "contexts.jsonl", [context(number, chat=True) for number in range(QUESTIONS)])
    with completion_server() as server:
        sample(settings(contexts, server.url, api_key_env="MY_KEY"))
        check_complete(tmp_path / "responses.jsonl", server)
    for each in server.log:
        assert each.path == "/v1/chat/completions" and each.headers["authorization"] == "Bearer secret-1"
    assert b"secret-1" not in b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())


def test_rows_of_one_question_share_their_responses(tmp_path) -> None:
    rows = [context(number, suffix=f"@{length}") for number in range(QUESTIONS) for length in (1, 2)]
    contexts = write_lines(tmp_path / "contexts.jsonl", rows)
    with completion_server() as server:
        sample(settings(contexts, server.url))
        check_complete(tmp_path / "responses.jsonl", server)


def test_long_contexts_are_answered_row_by_row_and_become_the_triplets_of_their_row(tmp_path, tokenizer_path) -> None:
    rows = [context(number, suffix=f"@{length}") for number in range(2) for length in (1, 2)]
    contexts = write_lines(tmp_path / "contexts.jsonl", rows)
    with completion_server() as server:
        asked = settings(contexts, server.url, side="long", num_samples=2)
        report = sample(asked)
        with pytest.raises(UserError, match="was begun with side long, not short"):
            sample(settings(contexts, server.url))
    assert (report.questions, report.responses, report.side) == (4, 8, "long")
    assert sorted(each.prompt for each in server.log) == sorted(row["prompt_long"] for row in rows)
    output = tmp_path / "triplets.jsonl"
    selected = select(
        SelectSettings(contexts=contexts, responses=asked.output, output=output, tokenizer=tokenizer_path)
    )
    triplets = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["id"] for row in triplets] == [row["id"] for row in rows]
    # The server's answers begin with the prompt.
    assert all(row[name].startswith(row["prompt_long"]) for row in triplets for name in ("chosen", "rejected"))
    assert (selected.questions, selected.triplets_written, selected.responses_to_other_questions) == (4, 4, 0)
    assert "long contexts: 4, 4 of them with pairs" in str(selected)


def test_a_journal_of_an_older_version_without_a_side_is_of_short_contexts(contexts) -> None:
    output = contexts.with_name("responses.jsonl")
    with completion_server() as server:
        sample(settings(contexts, server.url, num_samples=1))
        header, *responses = output.read_text().splitlines(keepends=True)
        values = json.loads(header)
        del values["journal"]["side"]
        output.write_text("".join([json.dumps(values) + "\n", *responses]))
        assert sample(settings(contexts, server.url, num_samples=1)).received_now == 0
        with pytest.raises(UserError, match="was begun with side short, not long"):
            sample(settings(contexts, server.url, num_samples=1, side="long"))


def test_two_rows_of_one_id_are_refused_where_every_row_is_asked(tmp_path) -> None:
    contexts = write_lines(tmp_path / "contexts.jsonl", [context(0), context(0)])
    with pytest.raises(UserError, match=r"contexts.jsonl:2: id: 'q0' is already the id of another row"):
        sample(settings(contexts, "http://127.0.0.1:9/v1", side="long"))


FAULTS = {
    0: "429",
    1: "500",
    2: "hang",
    3: "disconnect",
    4: "half",
    5: "garbage",
    6: "no choices",
    9: "fewer",
    11: "429",
}


def test_faults_are_tried_again_and_nothing_is_lost_or_asked_twice(contexts) -> None:
    started = time.monotonic()
    with completion_server(FAULTS) as server:
        report = sample(settings(contexts, server.url, timeout=1.0))
        check_complete(contexts.with_name("responses.jsonl"), server)
    assert time.monotonic() - started > 1.0  # the one that hung
    assert report.retried["HTTP 429"] == 2 and report.retried["HTTP 500"] == 1
    assert report.retried["no answer within 1 s"] >= 1
    assert report.retried["an answer that is no completion"] == report.retried["an answer without choices"] == 1
    broken = {reason: count for reason, count in report.retried.items() if reason.endswith(("Error", "Disconnected"))}
    assert sum(broken.values()) == 2, report.retried
    # The request that got one choice of its four or two is completed by a second one.
    assert len(server.answered()) == REQUESTS + 1


def test_a_killed_client_continues_without_asking_again(contexts) -> None:
    output = contexts.with_name("responses.jsonl")
    command = [sys.executable, "-m", "megatron_solopo", "data", "sample", "--contexts", str(contexts), "--output"]
    command += [str(output), "--model", "tiny", "--num-samples", str(SAMPLES), "--samples-per-request", str(AT_ONCE)]
    command += ["--concurrency", "4", "--backoff", "0.02", "--server"]
    with completion_server(answers_before_hanging=7) as server:
        client = subprocess.Popen([*command, server.url], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            # Killed while four requests are under way and seven have been answered and kept.
            wait_for(lambda: len(server.log) == 11 and output.read_bytes().count(b"\n") == 1 + kept(server, 7))
        finally:
            client.kill()
            client.communicate()
        before = output.read_bytes()
        with output.open("ab") as stream:
            stream.write(b'{"question_id":"q5","index":9,"te')  # what a kill in the middle of a write leaves
        asked_before = len(server.log)
        for unanswered in server.log[7:]:
            unanswered.outcome = "killed"
        server.answers_before_hanging = None
        server.release.set()
        again = subprocess.run([*command, server.url], capture_output=True, text=True, timeout=120)
        assert again.returncode == 0, again.stderr
        assert output.read_bytes().startswith(before)
        check_complete(output, server)
        assert f"{60 - kept(server, 7)} of them now" in again.stdout
        assert len(server.log) - asked_before == REQUESTS - 7
        third = subprocess.run([*command, server.url], capture_output=True, text=True, timeout=120)
        assert third.returncode == 0 and len(server.log) - asked_before == REQUESTS - 7


def kept(server: CompletionServer, requests: int) -> int:
    return sum(each.body["n"] for each in server.log[:requests])


def wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            if condition():
                return
        except FileNotFoundError:
            pass
        assert time.monotonic() < deadline, "the client did not get that far"
        time.sleep(0.02)


def test_more_samples_are_asked_for_alone(contexts) -> None:
    with completion_server() as server:
        sample(settings(contexts, server.url, num_samples=4))
        assert len(server.log) == QUESTIONS
        report = sample(settings(contexts, server.url))
        check_complete(contexts.with_name("responses.jsonl"), server)
    assert (report.responses, report.received_now) == (60, 36)


def test_a_request_given_up_is_named_and_the_rest_is_kept(contexts) -> None:
    with completion_server({0: "500", 5: "500"}) as server:
        with pytest.raises(
            UserError, match=r"2 requests got no answer: q\d: HTTP 500 \(.+\), after 0 retries"
        ) as error:
            sample(settings(contexts, server.url, retries=0))
        assert "the same command asks for the rest" in str(error.value) and "\n" not in str(error.value)
        assert 60 - 8 <= len(received(contexts.with_name("responses.jsonl"))) <= 60 - 4
        sample(settings(contexts, server.url))
        check_complete(contexts.with_name("responses.jsonl"), server)


def test_a_server_that_refuses_ends_the_run_at_once(contexts) -> None:
    with completion_server(dict.fromkeys(range(99), "400")) as server:
        with pytest.raises(UserError, match=r"refuses every request so far: q\d: HTTP 400: made up error 400") as error:
            sample(settings(contexts, server.url))
        assert len(server.log) <= 8 and "\n" not in str(error.value)
    assert received(contexts.with_name("responses.jsonl")) == []


def test_an_answer_that_the_server_aborted_is_asked_for_again(contexts) -> None:
    with completion_server({1: "abort"}) as server:
        report = sample(settings(contexts, server.url))
        check_complete(contexts.with_name("responses.jsonl"), server)
    assert report.retried == {"an aborted answer": 1}


def test_an_answer_cut_before_its_room_is_used_ends_the_run(contexts) -> None:
    with completion_server({2: "cut"}) as server:
        with pytest.raises(
            UserError, match=r"ended an answer before the 92 tokens asked for: .* --max-model-len"
        ) as error:
            sample(settings(contexts, server.url))
        assert "\n" not in str(error.value)
        report = sample(settings(contexts, server.url))
        texts = {each.text for each in received(contexts.with_name("responses.jsonl"))}
    assert report.responses == len(texts) == QUESTIONS * SAMPLES
    assert {each.finish_reason for each in received(contexts.with_name("responses.jsonl"))} == {"stop"}


def test_a_server_that_is_gone_is_not_waited_for_by_every_request(contexts) -> None:
    with completion_server() as server:
        url = server.url
    with pytest.raises(UserError, match=r"\d requests got no answer: .*ConnectError, after 1 retries") as error:
        sample(settings(contexts, url, retries=1, concurrency=2))
    assert int(str(error.value).split()[0]) <= 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 0.5}, "was begun with temperature 0.85, not 0.5"),
        ({"model": "other"}, "was begun with model tiny, not other"),
        ({"seed": 1}, "was begun with seed 0, not 1"),
        ({"max_tokens": 50}, "was begun with max_tokens 92, not 50"),
    ],
)
def test_a_journal_of_other_settings_is_not_continued(changes, message, contexts) -> None:
    with completion_server() as server:
        sample(settings(contexts, server.url, num_samples=1))
        before = contexts.with_name("responses.jsonl").read_bytes()
        with pytest.raises(UserError, match=message):
            sample(settings(contexts, server.url, **changes))
    assert contexts.with_name("responses.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_samples": 0}, "--num-samples 0: must be at least 1"),
        ({"temperature": 0.0}, "--temperature 0.0: must be above 0"),
        ({"top_p": 1.5}, "--top-p 1.5"),
        ({"retries": -1}, "--retries -1: must be at least 0"),
        ({"server": "localhost:8000"}, "must begin with http"),
        ({"max_tokens": 101}, "the contexts leave room for 100 tokens"),
        ({"api_key_env": "NO_SUCH_VARIABLE_HERE"}, "not set"),
        ({"output": Path("responses.txt")}, "must end in .jsonl"),
        ({"contexts": Path("absent.jsonl")}, "absent.jsonl: no such file"),
    ],
)
def test_a_mistake_is_one_line(changes, message, contexts) -> None:
    with pytest.raises(UserError) as error:
        sample(settings(contexts, "http://127.0.0.1:9/v1", **changes))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_report_counts_what_came(contexts) -> None:
    with completion_server({0: "500"}) as server:
        report = sample(settings(contexts, server.url))
    written = json.loads(contexts.with_name("responses.report").joinpath("report.json").read_text())
    assert written["finish_reasons"] == {"stop": 60} and written["retried"] == {"HTTP 500": 1}
    assert written["provenance"]["inputs"].keys() == {str(contexts)}
    assert isinstance(report, SampleReport) and "60 of them now" in str(report)


def test_a_server_decides_its_dtype_itself(contexts) -> None:
    with pytest.raises(UserError, match="--dtype float32: has no effect with --server; leave it out"):
        settings(contexts, "http://localhost:1/v1", dtype="float32")


def test_a_server_that_is_no_url_is_told(contexts) -> None:
    for url in ("http://[:::1", "http://"):
        with pytest.raises(UserError, match="is no URL"):
            sample(settings(contexts, url))
