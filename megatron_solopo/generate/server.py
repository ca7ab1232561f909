"""Answers from a server that speaks OpenAI's API: vLLM, SGLang, TGI and others.

Prompts that are text go to /completions, chat messages go to /chat/completions. A request that meets no connection, a
timeout, an overload or a fault of the server is sent again after a growing wait. A request that the server calls wrong
ends the run, and so does an answer that was cut before it had the tokens asked for.
"""

import asyncio
import os
import random
from collections import Counter
from collections.abc import Sequence
from itertools import chain
from typing import Any

import httpx2
from pydantic import BaseModel, ValidationError

from megatron_solopo.errors import UserError
from megatron_solopo.generate.model import Answer, Build, Item, Keep, Request, RequestFailed, RequestPool

_RETRIED_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_LONGEST_WAIT = 60.0
_SHOWN_CHARACTERS = 200
_ABORTED = "abort"
"""vLLM and SGLang say so of an answer that was stopped from outside (paused, put to sleep). It is incomplete."""
_LENGTH = "length"
_MODELS_SECONDS = 10.0


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
    """A fault that may pass by itself; `wait` is the number of seconds that the server asks for."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


class OpenAIServer:
    """A model on a server, see `generate.model.Model`. Sends every request of a batch by itself.

    Args:
        url: Base URL, such as http://localhost:8000/v1.
        model: Name that the server knows the model by.
        concurrency: How many requests are under way at once.
        timeout: Seconds that a request may take.
        retries: How often a request that fails is sent again.
        backoff: Seconds before the first retry; doubled for each further one, up to a minute.
        api_key_env: Environment variable that holds the server's key; None sends none.
        temperature: 0 asks for the most likely tokens.
        top_p: Sample from the most likely tokens that together have this probability.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        concurrency: int,
        timeout: float,
        retries: int,
        backoff: float = 1.0,
        api_key_env: str | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> None:
        self.retried: Counter[str] = Counter()
        self._url = url.rstrip("/")
        self._concurrency = concurrency
        self._timeout = timeout
        self._retries = retries
        self._backoff = backoff
        self._asked = {"model": model, "temperature": temperature, "top_p": top_p}
        limits = httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
        # The time limit is on the whole request, below: a server that trickles is as slow as one that hangs.
        self._client = httpx2.AsyncClient(timeout=None, limits=limits, headers=_authorization(api_key_env))

    def answer(self, batches: Sequence[Sequence[Item]], build: Build[Item], keep: Keep) -> None:
        """See `Model`. Can be called once."""
        asyncio.run(self._answer(RequestPool(self._ask, self._concurrency, build, keep), batches))

    async def _answer(self, pool: RequestPool[Item], batches: Sequence[Sequence[Item]]) -> None:
        async with self._client:
            await pool.finish(chain.from_iterable(batches))

    async def _ask(self, request: Request) -> list[Answer]:
        """Answers to a request, which is sent again as often as the settings say."""
        for attempt in range(self._retries + 1):
            try:
                return await self._ask_once(request)
            except _TryAgain as error:
                reason, wait = str(error), error.wait
            if attempt < self._retries:
                self.retried[reason] += 1
                growing = self._backoff * 2**attempt * random.uniform(0.5, 1.0)
                await asyncio.sleep(min(_LONGEST_WAIT, max(growing, wait or 0.0)))
        raise RequestFailed(f"{reason}, after {self._retries} retries")

    async def _ask_once(self, request: Request) -> list[Answer]:
        path, body = self._body(request)
        try:
            async with asyncio.timeout(self._timeout):
                response = await self._client.post(f"{self._url}{path}", json=body)
        except TimeoutError:
            raise _TryAgain(f"no answer within {self._timeout:g} s") from None
        except httpx2.RequestError as error:
            raise _TryAgain(type(error).__name__) from None
        except httpx2.InvalidURL as error:
            raise UserError(f"--server {self._url}: is no URL: {error}") from None
        if response.status_code in _RETRIED_STATUS:
            raise _TryAgain(f"HTTP {response.status_code}", _retry_after(response))
        if response.status_code != 200:
            detail = " ".join(response.text.split())[:_SHOWN_CHARACTERS]
            raise UserError(f"--server {self._url}: refuses with HTTP {response.status_code}: {detail}")
        completion = _completion(response, len(request.indices))
        self._refuse_cut(completion, request.max_tokens)
        return _answers(completion)

    def _body(self, request: Request) -> tuple[str, dict[str, Any]]:
        body: dict[str, Any] = {
            **self._asked,
            "n": len(request.indices),
            "max_tokens": request.max_tokens,
            "seed": request.seed,
        }
        if isinstance(request.prompt, str):
            return "/completions", body | {"prompt": request.prompt}
        return "/chat/completions", body | {"messages": request.prompt}

    def _refuse_cut(self, completion: _Completion, max_tokens: int) -> None:
        """Raise UserError for an answer with fewer tokens than asked for.

        vLLM takes a request whose prompt leaves less room than it asks for, and lowers `max_tokens` without a word.
        """
        cut = sum(choice.finish_reason == _LENGTH for choice in completion.choices)
        tokens = completion.usage.completion_tokens if completion.usage else None
        if tokens is not None and tokens < cut * max_tokens:
            raise UserError(
                f"--server {self._url}: ended an answer before the {max_tokens} tokens asked for: its context has no "
                "room for prompt and answer; give it a longer one (vLLM: --max-model-len) or ask for fewer tokens"
            )


def served_positions(url: str, model: str, api_key_env: str | None) -> int | None:
    """Longest sequence of the server's model, as vLLM and SGLang tell it.

    None where the server does not answer or does not say.
    """
    try:
        response = httpx2.get(f"{url.rstrip('/')}/models", headers=_authorization(api_key_env), timeout=_MODELS_SECONDS)
        models = _ServedModels.model_validate_json(response.content).data
    except (httpx2.RequestError, httpx2.InvalidURL, ValidationError):
        return None
    return next((each.max_model_len for each in models if each.id == model), None)


def _authorization(variable: str | None) -> dict[str, str]:
    if variable is None:
        return {}
    key = os.environ.get(variable)
    if not key:
        raise UserError(f"--api-key-env {variable}: this environment variable is not set")
    return {"Authorization": f"Bearer {key}"}


def _retry_after(response: httpx2.Response) -> float | None:
    """Seconds of a Retry-After header. These servers do not use its other form, which is a date."""
    try:
        return float(response.headers.get("retry-after", ""))
    except ValueError:
        return None


def _completion(response: httpx2.Response, asked: int) -> _Completion:
    """At least one choice, at most as many as asked for. Raises _TryAgain for any other answer."""
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
