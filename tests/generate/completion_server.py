"""A real HTTP server with OpenAI's completion API, which fails as it is told to."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Fault = Literal["429", "500", "hang", "disconnect", "half", "garbage", "no choices", "fewer", "400", "abort", "cut"]


@dataclass
class Served:
    """One request and what became of it: "ok" or the fault."""

    path: str
    body: dict[str, Any]
    headers: dict[str, str]
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
    model: str = "tiny"
    log: list[Served] = field(default_factory=list)
    release: threading.Event = field(default_factory=threading.Event)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    def begin(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Served:
        with self.lock:
            served = Served(path, body, headers, self.faults.get(len(self.log), "ok"))
            self.log.append(served)
            limit = self.answers_before_hanging
            waits = limit is not None and len(self.log) > limit
        if waits:
            self.release.wait(60)
        return served

    def answered(self) -> list[Served]:
        return [each for each in self.log if each.outcome in ("ok", "fewer")]


def text_of(prompt: str, seed: int, choice: int) -> str:
    return f"{prompt} {seed} {choice}. So the answer is: {'Paris' if choice % 2 else 'Rome'}."


def choices_of(served: Served) -> list[dict[str, Any]]:
    count = 1 if served.outcome == "fewer" else served.body["n"]
    texts = [text_of(served.prompt, served.body["seed"], number) for number in range(count)]
    if served.path.endswith("/chat/completions"):
        return [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop"} for text in texts]
    return [{"text": text, "finish_reason": "stop"} for text in texts]


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
        served = state.begin(self.path, body, dict(self.headers.items()))
        fault = served.outcome
        if fault == "hang":
            state.release.wait(60)
        if fault in ("hang", "disconnect"):
            self.close_connection = True
            return
        status = int(fault) if fault.isdigit() else 200
        answer: dict[str, Any] = {"choices": [] if fault == "no choices" else choices_of(served)}
        if state.tokens is not None:
            answer["usage"] = {"completion_tokens": state.tokens * len(answer["choices"])}
        content = json.dumps(answer).encode()
        if fault in ("abort", "cut"):
            content = json.dumps(cut_short(served, served.body["n"] * served.body["max_tokens"] - 1)).encode()
        if fault == "garbage":
            content = b"<html>proxy</html>"
        elif status != 200:
            content = json.dumps({"error": {"message": f"made up\nerror {status}"}}).encode()
        self.send_response(status)
        if status == 429:
            self.send_header("retry-after", "0.2")
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
) -> Iterator[CompletionServer]:
    """Serve on a free port of this machine until the block ends."""
    server = _Server(("127.0.0.1", 0), _Handler)
    state = CompletionServer(faults or {}, answers_before_hanging, positions, tokens)
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
