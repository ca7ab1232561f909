"""A real HTTP server with OpenAI's completion API, which fails as it is told to."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Status = Literal["400", "401", "408", "413", "429", "500", "501", "520", "524", "529"]
Connection = Literal["hang", "disconnect", "half"]
Reply = Literal[
    "garbage", "no choices", "fewer", "abort", "cut", "filtered answer", "error in 200", "error in choice", "null", ""
]
Thought = Literal["thought", "thought alone", "thought cut"]
Fault = Status | Connection | Reply | Thought


@dataclass
class Served:
    """One request and what became of it: "ok" or the fault."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]
    """By name in lower case."""
    outcome: str

    @property
    def prompt(self) -> str:
        return self.body["prompt"] if "prompt" in self.body else self.body["messages"][-1]["content"]


@dataclass
class CompletionServer:
    """Answers with texts that tell prompt, seed and choice, so that every text is given once."""

    faults: Mapping[int, Fault]
    """By number of the request, from 0."""
    answers_before_hanging: int | None = None
    """Requests that are answered; later ones wait for `release`."""
    positions: int | None = None
    """Longest sequence of the model."""
    tokens: int | None = None
    """Told of every answer, where it is told."""
    prompt_tokens: int | None = None
    """Told of every prompt, where it is told."""
    filtered: str | None = None
    """A prompt that holds this text is refused for ever, as Azure's content filter does."""
    limit: str = "max_tokens"
    """The name by which the server knows the limit on tokens."""
    message: str | None = None
    """Of every error that is a status."""
    retry_after: str = "0.2"
    """Sent with the status 429."""
    model: str = "tiny"
    log: list[Served] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Served:
        with self.lock:
            served = Served(path, body, headers, self.faults.get(len(self.log), "ok"))
            if self.filtered is not None and self.filtered in served.prompt:
                served.outcome = "filter"
            if self.limit not in body:
                served.outcome = "other limit"
            self.log.append(served)
            limit = self.answers_before_hanging
            waits = limit is not None and len(self.log) > limit
        if waits:
            self.release.wait(60)
        return served

    def answered(self) -> list[Served]:
        return [each for each in self.log if each.outcome in ("ok", "fewer", "thought")]


def text_of(prompt: str, seed: int, choice: int) -> str:
    return f"{prompt} {seed} {choice}. So the answer is: {'Paris' if choice % 2 else 'Rome'}."


def choices_of(served: Served) -> list[dict[str, Any]]:
    count = 1 if served.outcome == "fewer" else served.body["n"]
    texts = [text_of(served.prompt, served.body["seed"], number) for number in range(count)]
    if served.path.endswith("/chat/completions"):
        return [_chat_choice(served.outcome, text) for text in texts]
    reason = "content_filter" if served.outcome == "filtered answer" else "stop"
    return [{"text": text, "finish_reason": reason} for text in texts]


def _chat_choice(outcome: str, text: str) -> dict[str, Any]:
    content = None if outcome in ("null", "thought alone", "thought cut") else text
    message: dict[str, Any] = {"role": "assistant", "content": content}
    if outcome.startswith("thought"):
        message["reasoning_content"] = f"I think of {text}"
    reasons = {"thought cut": "length", "filtered answer": "content_filter"}
    return {"message": message, "finish_reason": reasons.get(outcome, "stop")}


def error_of(served: Served, message: str | None) -> tuple[int, dict[str, Any]] | None:
    """Status and body of a reply that is an error."""
    outcome = served.outcome
    if outcome == "filter":
        error = {"message": "The prompt triggered the content management policy", "code": "content_filter"}
        return 400, {"error": error}
    if outcome == "other limit":
        message = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        return 400, {"error": {"message": message, "param": "max_tokens", "code": "unsupported_parameter"}}
    if outcome == "error in 200":
        return 200, {"error": {"message": "Provider returned error", "code": 502}}
    if outcome == "error in choice":
        failed = {"code": 502, "message": "Provider disconnected"}
        return 200, {"choices": [{"message": {"content": ""}, "finish_reason": "error", "error": failed}]}
    if outcome.isdigit():
        return int(outcome), {"error": {"message": message or f"made up\nerror {outcome}"}}
    return None


def cut_short(served: Served, tokens: int) -> dict[str, Any]:
    """What vLLM 0.32 answers where a sequence ends before its time: it says "length", and how many tokens came."""
    reason = {"abort": "abort", "cut": "length"}[served.outcome]
    choices = [each | {"finish_reason": reason} for each in choices_of(served)]
    usage = {"prompt_tokens": 4, "total_tokens": 4 + tokens, "completion_tokens": tokens}
    return {"object": "text_completion", "choices": choices, "usage": usage}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def do_POST(self) -> None:
        state: CompletionServer = self.server.state
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        served = state.begin(self.path, body, {name.lower(): value for name, value in self.headers.items()})
        fault = served.outcome
        if fault == "hang":
            state.release.wait(60)
        if fault in ("hang", "disconnect"):
            self.close_connection = True
            return
        good = {"choices": [] if fault == "no choices" else choices_of(served)}
        status, answer = error_of(served, state.message) or (200, good)
        answer["model"] = state.model
        usage = {}
        if state.tokens is not None:
            usage["completion_tokens"] = state.tokens * len(answer.get("choices", ()))
        if state.prompt_tokens is not None:
            usage["prompt_tokens"] = state.prompt_tokens
        if usage:
            answer["usage"] = usage
        content = json.dumps(answer).encode()
        if fault in ("abort", "cut"):
            content = json.dumps(cut_short(served, served.body["n"] * served.body["max_tokens"] - 1)).encode()
        if fault == "garbage":
            content = b"<html>proxy</html>"
        self.send_response(status)
        if status == 429:
            self.send_header("retry-after", state.retry_after)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        if fault == "half":
            content = content[: len(content) // 2]
            self.close_connection = True
        self.wfile.write(content)

    def do_GET(self) -> None:
        state: CompletionServer = self.server.state
        models = [{"id": state.model, "object": "model", "max_model_len": state.positions}]
        content = json.dumps({"object": "list", "data": models}).encode()
        self.send_response(200 if self.path == "/v1/models" else 404)
        self.send_header("content-length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: Any) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A killed client's broken connection is part of the tests."""


@contextmanager
def completion_server(
    faults: Mapping[int, Fault] | None = None,
    answers_before_hanging: int | None = None,
    positions: int | None = None,
    tokens: int | None = None,
    **replies: Any,
) -> Iterator[CompletionServer]:
    """Serve on a free port of this machine until the block ends. `replies` are other fields of CompletionServer."""
    server = _Server(("127.0.0.1", 0), _Handler)
    state = CompletionServer(faults or {}, answers_before_hanging, positions, tokens, **replies)
    state.url = f"http://127.0.0.1:{server.server_port}/v1"
    server.state = state  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.release.set()
        server.shutdown()
        server.server_close()
        thread.join()
