"""Replies of a real HTTP server: which are answers, which are asked for again, which are refused for ever."""

import time
from email.utils import formatdate
from typing import Any

import pytest

from megatron_solopo.errors import UserError
from megatron_solopo.generate.model import Answer, Request, RequestRefused, Traffic
from megatron_solopo.generate.server import OpenAIServer, served_positions
from megatron_solopo.generate.settings import ServerSettings
from tests.generate.completion_server import CompletionServer, Fault, completion_server

TEXT = "The sky is blue."
CHAT = [{"role": "user", "content": TEXT}]


class Asked:
    """What came of some requests."""

    def __init__(self, server: CompletionServer, *prompts: Any, samples: int = 1, **changes: Any) -> None:
        self.kept: list[tuple[Request, Answer]] = []
        self.refused: list[tuple[Request, RequestRefused]] = []
        values = {"server": server.url, "concurrency": 1, "timeout": 10.0, "retries": 3, "backoff": 0.01} | changes
        requests = [
            Request(f"q{number}", prompt, tuple(range(samples)), 50, seed=10 * number)
            for number, prompt in enumerate(prompts)
        ]
        model = OpenAIServer(ServerSettings(**values), "tiny", own_tokenizer=True)
        model.answer([requests], lambda request: request, self._keep, lambda *refused: self.refused.append(refused))
        self.traffic: Traffic = model.traffic

    def _keep(self, request: Request, answers: Any, seconds: float) -> None:
        self.kept += [(request, answer) for answer in answers]


@pytest.mark.parametrize("status", ["408", "429", "500", "520", "524", "529"])
def test_an_error_that_may_pass_is_waited_for_and_the_wait_is_counted(status) -> None:
    with completion_server({0: status, 1: status}, retry_after="0.05") as server:
        asked = Asked(server, TEXT)
    assert len(asked.kept) == 1 and asked.refused == []
    assert asked.traffic.retried == {f"HTTP {status}": 2}
    assert asked.traffic.waited >= (0.1 if status == "429" else 0.005)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("garbage", "an answer that is no completion"),
        ("no choices", "an answer without choices"),
        ("half", "RemoteProtocolError"),
        ("error in 200", "HTTP 502"),
        ("error in choice", "HTTP 502"),
    ],
)
def test_a_reply_that_is_no_answer_is_asked_for_again(fault, reason) -> None:
    with completion_server({0: fault}) as server:
        asked = Asked(server, CHAT)
    assert len(asked.kept) == 1 and asked.traffic.retried == {reason: 1}


def test_a_reply_that_never_becomes_an_answer_is_shown() -> None:
    told = r"an answer that is no completion \('.+'\), after 3 retries"
    with completion_server(dict.fromkeys(range(9), "garbage")) as server, pytest.raises(UserError, match=told):
        Asked(server, CHAT)


def test_a_wait_that_the_server_asks_for_may_be_a_date() -> None:
    with completion_server({0: "429"}, retry_after=formatdate(time.time() + 2, usegmt=True)) as server:
        asked = Asked(server, TEXT)
    assert 0.5 < asked.traffic.waited <= 2


def test_a_request_that_fails_to_the_end_tells_how_long_it_waited_for_what(capfd) -> None:
    with completion_server(dict.fromkeys(range(9), "529")) as server:
        told = rf"q0: HTTP 529( \(.*\))?, after 3 retries and 0 s of waiting for {server.url};"
        with pytest.raises(UserError, match=told):
            Asked(server, TEXT)
        assert len(server.log) == 4
    warned = f"warning: --server {server.url}: HTTP 529; a request is sent again up to 3 times, after growing waits"
    assert capfd.readouterr().err.splitlines() == [warned], "once, at the first fault"


@pytest.mark.parametrize("fault", ["401", "501"])
def test_what_no_retry_can_mend_ends_the_run_at_once(fault: Fault) -> None:
    with completion_server(dict.fromkeys(range(9), fault)) as server:
        with pytest.raises(UserError, match=f"--server .*: refuses with HTTP {fault}: made up error {fault}"):
            Asked(server, TEXT)
        assert len(server.log) == 1


@pytest.mark.parametrize(
    ("fault", "kind", "certain"),
    [
        ("413", "prompt too long for the server", True),
        ("400", "HTTP 400", False),
        ("filtered answer", "content_filter", True),
        ("null", "no content", False),
        ("thought alone", "a thought without an answer", False),
    ],
)
def test_what_will_never_be_answered_is_handed_back_with_its_reason(fault, kind, certain) -> None:
    with completion_server({0: fault}) as server:
        asked = Asked(server, CHAT, CHAT, samples=2)
        assert len(server.log) == 2
    assert [request.question_id for request, _ in asked.kept] == ["q1", "q1"]
    assert {(request.question_id, refusal.kind, refusal.certain) for request, refusal in asked.refused} == {
        ("q0", kind, certain)
    }
    assert sorted(index for request, _ in asked.refused for index in request.indices) == [0, 1]
    assert asked.traffic.retried == {}


def test_a_prompt_that_the_content_filter_refuses_is_handed_back() -> None:
    with completion_server(filtered="blue") as server:
        asked = Asked(server, TEXT, "green")
    (request, refusal) = asked.refused[0]
    assert (request.question_id, refusal.kind, len(asked.kept)) == ("q0", "content_filter", 1)
    assert str(refusal) == "HTTP 400: The prompt triggered the content management policy"


def test_the_thought_of_an_answer_is_kept_apart_from_its_text() -> None:
    with completion_server({0: "thought", 1: "thought cut"}) as server:
        asked = Asked(server, CHAT, CHAT)
    (_, whole), (_, cut) = asked.kept
    assert whole.text.startswith(TEXT) and whole.reasoning == f"I think of {whole.text}"
    assert (cut.text, cut.finish_reason) == ("", "length") and cut.reasoning is not None


def test_a_server_that_ignores_n_is_asked_for_the_rest_with_other_seeds() -> None:
    with completion_server(dict.fromkeys(range(9), "fewer")) as server:
        asked = Asked(server, TEXT, samples=4)
        assert [each.body["n"] for each in server.log] == [4, 3, 2, 1]
        assert [each.body["seed"] for each in server.log] == [0, 1, 2, 3]
    assert [request.indices for request, _ in asked.kept] == [(0,), (1,), (2,), (3,)]


def test_a_server_that_knows_the_limit_by_its_newer_name_gets_that_name() -> None:
    with completion_server(limit="max_completion_tokens") as server:
        asked = Asked(server, CHAT, CHAT)
        limits = [("max_tokens" in each.body, each.body.get("max_completion_tokens")) for each in server.log]
    assert len(asked.kept) == 2 and asked.traffic.retried == {}
    assert limits == [(True, None), (False, 50), (False, 50)]


def test_another_error_that_names_the_limit_does_not_change_its_name() -> None:
    """vLLM names both. Its /completions would ignore the newer name and answer with 16 tokens."""
    told = "'max_tokens' or 'max_completion_tokens' is too large: 92. This model's maximum context length is 128 tokens"
    for prompt in (TEXT, CHAT):
        with completion_server({0: "400"}, message=told) as server:
            asked = Asked(server, prompt, prompt)
            assert all("max_tokens" in each.body for each in server.log)
        assert [refusal.kind for _, refusal in asked.refused] == ["prompt too long for the server"]


def test_a_key_that_the_server_repeats_is_not_shown(monkeypatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret-3")
    for fault in ("401", "400"):
        with completion_server({0: fault}, message="Incorrect key: secret-3") as server:
            try:
                shown = str(Asked(server, TEXT, api_key_env="MY_KEY").refused)
            except UserError as error:
                shown = str(error)
        assert "Incorrect key: ***" in shown and "secret-3" not in shown


def test_a_proxy_that_stands_before_the_server_is_named(monkeypatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://user:secret-4@127.0.0.1:9")
    told = r"ConnectError, .* \(through the proxy 127\.0\.0\.1; name the server in NO_PROXY to go around it\)"
    with completion_server() as server:
        monkeypatch.delenv("NO_PROXY", raising=False)
        monkeypatch.delenv("no_proxy", raising=False)
        with pytest.raises(UserError, match=told):
            Asked(server, TEXT)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert len(Asked(server, TEXT).kept) == 1


def test_keys_of_other_servers_are_not_sent(monkeypatch) -> None:
    for name in ("OPENAI_API_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID", "OPENAI_BASE_URL"):
        monkeypatch.setenv(name, "secret-2")
    with completion_server(positions=4096) as server:
        Asked(server, TEXT)
        assert served_positions(server.url, "tiny", None) == 4096
        assert all("secret-2" not in value for each in server.log for value in each.headers.values())


def test_a_reply_that_names_another_model_is_counted() -> None:
    with completion_server(model="other") as server:
        assert Asked(server, TEXT, TEXT).traffic.other_models == {"other": 2}
    with completion_server() as server:
        assert Asked(server, TEXT).traffic.other_models == {}
