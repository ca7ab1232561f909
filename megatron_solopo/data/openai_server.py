"""Responses from a server that speaks OpenAI's API: vLLM, SGLang, TGI and others.

Prompts that are text go to /completions, chat messages to /chat/completions. Whatever may pass by itself (no
connection, a timeout, overload, an error of the server's) is tried again after a growing wait; a request that the
server calls wrong ends the run.
"""

import asyncio
import os
import random
from collections import Counter
from typing import Any, Protocol

import httpx2
from pydantic import BaseModel, ValidationError

from megatron_solopo.data.sample_model import Answer, Request, RequestFailed

_PASSES = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_LONGEST_WAIT = 60.0
_SHOWN_CHARACTERS = 200


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


class _Completion(BaseModel):
    choices: list[_Choice]


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
            raise ValueError(f"--server {self._url}: is no URL: {error}") from None
        if response.status_code in _PASSES:
            raise _TryAgain(f"HTTP {response.status_code}", _asked_wait(response))
        if response.status_code != 200:
            detail = " ".join(response.text.split())[:_SHOWN_CHARACTERS]
            raise ValueError(f"--server {self._url}: refuses with HTTP {response.status_code}: {detail}")
        return _answers(response, len(request.indices))

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


def _authorization(variable: str | None) -> dict[str, str]:
    if variable is None:
        return {}
    key = os.environ.get(variable)
    if not key:
        raise ValueError(f"--api-key-env {variable}: this environment variable is not set")
    return {"Authorization": f"Bearer {key}"}


def _asked_wait(response: httpx2.Response) -> float | None:
    """Seconds of a Retry-After header; the form with a date is not in use among these servers."""
    try:
        return float(response.headers.get("retry-after", ""))
    except ValueError:
        return None


def _answers(response: httpx2.Response, asked: int) -> list[Answer]:
    try:
        choices = _Completion.model_validate_json(response.content).choices[:asked]
    except ValidationError:
        raise _TryAgain("an answer that is no completion") from None
    if not choices:
        raise _TryAgain("an answer without choices")
    texts = [choice.message.content if choice.message else choice.text for choice in choices]
    return [Answer(text or "", choice.finish_reason) for text, choice in zip(texts, choices, strict=True)]
