"""Responses from a server that speaks OpenAI's API: vLLM, SGLang, TGI and others.

Prompts that are text go to /completions, chat messages to /chat/completions. Whatever may pass by itself (no
connection, a timeout, overload, an error of the server's) is tried again after a growing wait; a request that the
server calls wrong ends the run, and so does an answer cut before it had the tokens asked for.
"""

import asyncio
import os
import random
from collections import Counter
from typing import Any, Protocol

import httpx2
from pydantic import BaseModel, ValidationError

from megatron_solopo.errors import UserError
from megatron_solopo.generate.model import Answer, Request, RequestFailed

_PASSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_LONGEST_WAIT = 60.0
_SHOWN_CHARACTERS = 200
_ABORTED = "abort"
"""Why an answer of vLLM or SGLang ended that was stopped from outside (paused, put to sleep): it is part of one."""
_LENGTH = "length"
_MODELS_SECONDS = 10.0


class ServerSettings(Protocol):
    """What is asked of a server and how; `sample_settings.SampleSettings` says what each means."""

    @property
    def server(self) -> str | None: ...
    @property
    def model(self) -> str: ...
    @property
    def temperature(self) -> float: ...
    @property
    def top_p(self) -> float: ...
    @property
    def concurrency(self) -> int: ...
    @property
    def timeout(self) -> float: ...
    @property
    def retries(self) -> int: ...
    @property
    def backoff(self) -> float: ...
    @property
    def api_key_env(self) -> str | None: ...
    @property
    def seed(self) -> int: ...


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    text: str | None = None
    message: _Message | None = None
    finish_reason: str | None = None


class _Usage(BaseModel):
    completion_tokens: int | None = None


class _Completion(BaseModel):
    choices: list[_Choice]
    usage: _Usage | None = None


class _ServedModel(BaseModel):
    id: str
    max_model_len: int | None = None


class _ServedModels(BaseModel):
    data: list[_ServedModel]


class _TryAgain(Exception):
    """What may pass by itself; `wait` is what the server asks for, in seconds."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class OpenAIServer:
    """A client of `settings.server`; see `data.sample_model.Model`."""

    def __init__(self, settings: ServerSettings) -> None:
        assert settings.server is not None
        self.concurrency = settings.concurrency
        self.retried: Counter[str] = Counter()
        self._settings = settings
        self._url = settings.server.rstrip("/")
        self._headers = _authorization(settings.api_key_env)
        self._client: httpx2.AsyncClient | None = None
        # Only spreads retries in time: nothing of the data depends on it.
        self._jitter = random.Random(settings.seed)

    async def ask(self, request: Request) -> list[Answer]:
        """Answers to a request, tried as often as the settings say."""
        for attempt in range(self._settings.retries + 1):
            try:
                return await self._ask_once(request)
            except _TryAgain as error:
                reason, wait = str(error), error.wait
            if attempt < self._settings.retries:
                self.retried[reason] += 1
                growing = self._settings.backoff * 2**attempt * self._jitter.uniform(0.5, 1.0)
                await asyncio.sleep(min(_LONGEST_WAIT, max(growing, wait or 0.0)))
        raise RequestFailed(f"{reason}, after {self._settings.retries} retries")

    async def aclose(self) -> None:
        """Close the connections."""
        if self._client is not None:
            await self._client.aclose()

    async def _ask_once(self, request: Request) -> list[Answer]:
        if self._client is None:
            limits = httpx2.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency)
            # The time limit is on the whole request, below: a server that trickles is as slow as one that hangs.
            self._client = httpx2.AsyncClient(timeout=None, limits=limits, headers=self._headers)
        path, body = self._body(request)
        try:
            async with asyncio.timeout(self._settings.timeout):
                response = await self._client.post(f"{self._url}{path}", json=body)
        except TimeoutError:
            raise _TryAgain(f"no answer within {self._settings.timeout:g} s") from None
        except httpx2.RequestError as error:
            raise _TryAgain(type(error).__name__) from None
        except httpx2.InvalidURL as error:
            raise UserError(f"--server {self._url}: is no URL: {error}") from None
        if response.status_code in _PASSES:
            raise _TryAgain(f"HTTP {response.status_code}", _asked_wait(response))
        if response.status_code != 200:
            detail = " ".join(response.text.split())[:_SHOWN_CHARACTERS]
            raise UserError(f"--server {self._url}: refuses with HTTP {response.status_code}: {detail}")
        completion = _completion(response, len(request.indices))
        self._refuse_cut(completion, request.max_tokens)
        return _answers(completion)

    def _body(self, request: Request) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {
            "model": self._settings.model,
            "n": len(request.indices),
            "temperature": self._settings.temperature,
            "top_p": self._settings.top_p,
            "max_tokens": request.max_tokens,
            "seed": request.seed,
        }
        if isinstance(request.prompt, str):
            return "/completions", body | {"prompt": request.prompt}
        return "/chat/completions", body | {"messages": request.prompt}

    def _refuse_cut(self, completion: _Completion, max_tokens: int) -> None:
        """vLLM takes a request whose prompt leaves less room than it asks for, and lowers `max_tokens` unsaid."""
        cut = sum(choice.finish_reason == _LENGTH for choice in completion.choices)
        tokens = completion.usage.completion_tokens if completion.usage else None
        if tokens is not None and tokens < cut * max_tokens:
            raise UserError(
                f"--server {self._url}: ended an answer before the {max_tokens} tokens asked for: its context has no "
                "room for prompt and answer; give it a longer one (vLLM: --max-model-len) or ask for fewer tokens"
            )


def served_positions(settings: ServerSettings) -> int | None:
    """Longest sequence of the server's model, as vLLM and SGLang tell; None where it does not answer or say."""
    assert settings.server is not None
    url = f"{settings.server.rstrip('/')}/models"
    try:
        response = httpx2.get(url, headers=_authorization(settings.api_key_env), timeout=_MODELS_SECONDS)
        models = _ServedModels.model_validate_json(response.content).data
    except (httpx2.RequestError, httpx2.InvalidURL, ValidationError):
        return None
    return next((model.max_model_len for model in models if model.id == settings.model), None)


def _authorization(variable: str | None) -> dict[str, str]:
    if variable is None:
        return {}
    key = os.environ.get(variable)
    if not key:
        raise UserError(f"--api-key-env {variable}: this environment variable is not set")
    return {"Authorization": f"Bearer {key}"}


def _asked_wait(response: httpx2.Response) -> float | None:
    """Seconds of a Retry-After header; the form with a date is not in use among these servers."""
    try:
        return float(response.headers.get("retry-after", ""))
    except ValueError:
        return None


def _completion(response: httpx2.Response, asked: int) -> _Completion:
    """At most as many choices as were asked for."""
    try:
        completion = _Completion.model_validate_json(response.content)
    except ValidationError:
        raise _TryAgain("an answer that is no completion") from None
    completion.choices = completion.choices[:asked]
    if not completion.choices:
        raise _TryAgain("an answer without choices")
    if any(choice.finish_reason == _ABORTED for choice in completion.choices):
        raise _TryAgain("an aborted answer")
    return completion


def _answers(completion: _Completion) -> list[Answer]:
    choices = completion.choices
    texts = [choice.message.content if choice.message else choice.text for choice in choices]
    # The server counts the tokens of all choices together.
    tokens = completion.usage.completion_tokens if completion.usage and len(choices) == 1 else None
    return [Answer(text or "", choice.finish_reason, tokens) for text, choice in zip(texts, choices, strict=True)]
