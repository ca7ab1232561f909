"""Answers from a server that speaks OpenAI's API: vLLM, SGLang, llama.cpp, Ollama, OpenRouter and others.

Prompts that are text go to /completions, chat messages go to /chat/completions. A request that meets no connection, a
timeout, an overload or a fault of the server is sent again after a growing wait. A prompt that the server will never
answer is handed back as refused. The run ends if the server refuses every request, reads less than the whole prompt,
or cuts an answer before it has the tokens asked for.

The openai package's client sends the requests. Its own retries are off: they wait at most 8 seconds, cannot be counted
by their reason, and know no time limit on a whole request.
"""

import asyncio
import os
import random
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from itertools import chain
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import openai
from pydantic import BaseModel, ValidationError
from tqdm import tqdm

from megatron_solopo.data.template_arguments import KWARGS_FIELD
from megatron_solopo.data.tool_calls import arguments_as_text
from megatron_solopo.errors import UserError
from megatron_solopo.generate.model import (
    Answer,
    Build,
    Item,
    Keep,
    Refuse,
    Request,
    RequestFailed,
    RequestPool,
    RequestRefused,
    Traffic,
)
from megatron_solopo.generate.prompt_check import PromptCheck
from megatron_solopo.generate.replies import Completion, ServerRefuses, TryAgain, failure, read_completion
from megatron_solopo.generate.settings import ServerSettings

_LONGEST_WAIT = 60.0
_LONGEST_ASKED_WAIT = 600.0
"""The longest that a server may ask us to wait."""
_MODELS_SECONDS = 10.0
_NO_KEY = "none"
"""The client wants a key. It is not sent."""


class ServedModel(BaseModel):
    """A model as a server lists it."""

    id: str
    max_model_len: int | None = None
    """Longest sequence, where a server tells it."""


class _ServedModels(BaseModel):
    data: list[ServedModel]


class OpenAIServer:
    """A model on a server, see `generate.model.Model`. Sends every request of a batch by itself.

    Args:
        settings: Must name a server.
        model: Name that the server knows the model by.
        own_tokenizer: Whether `Request.prompt_tokens` comes from the tokenizer of the server's model.
        temperature: 0 asks for the most likely tokens.
        top_p: Sample from the most likely tokens that together have this probability.
    """

    def __init__(
        self,
        settings: ServerSettings,
        model: str,
        *,
        own_tokenizer: bool,
        temperature: float = 0.0,
        top_p: float = 1.0,
    ) -> None:
        assert settings.server is not None
        self.traffic = Traffic()
        self._settings = settings
        self._asked = {"model": model, "temperature": temperature, "top_p": top_p}
        self._limit = "max_tokens"
        self._proxy = _named_proxy(settings.server)
        self._prompt_check = PromptCheck(settings.server, own_tokenizer)
        self._key = key = _api_key(settings.api_key_env)
        self._headers = _headers(key)
        # The time limit is on the whole request, below: a server that trickles is as slow as one that hangs.
        self._client = openai.AsyncOpenAI(base_url=settings.server, api_key=key or _NO_KEY, max_retries=0, timeout=None)

    def answer(self, batches: Sequence[Sequence[Item]], build: Build[Item], keep: Keep, refuse: Refuse) -> None:
        """See `Model`. Can be called once."""
        pool = RequestPool(self._ask, self._settings.concurrency, build, keep, refuse)
        asyncio.run(self._answer(pool, batches))

    async def _answer(self, pool: RequestPool[Item], batches: Sequence[Sequence[Item]]) -> None:
        async with self._client:
            await pool.finish(chain.from_iterable(batches))

    async def _ask(self, request: Request) -> list[Answer | RequestRefused]:
        """Answers to a request, which is sent again as often as the settings say."""
        waited = 0.0
        for attempt in range(self._settings.retries + 1):
            try:
                return await self._ask_once(request)
            except TryAgain as error:
                reason, said, asked_wait = str(error), error.said, error.wait or 0.0
            except ServerRefuses as error:
                raise UserError(f"--server {self._settings.server}: refuses with {error}{self._proxy}") from None
            if attempt < self._settings.retries:
                growing = min(_LONGEST_WAIT, self._settings.backoff * 2**attempt * random.uniform(0.5, 1.0))
                wait = max(growing, min(asked_wait, _LONGEST_ASKED_WAIT))
                if reason not in self.traffic.retried:
                    self._warn_of_waiting(reason)
                self.traffic.retried[reason] += 1
                self.traffic.waited += wait
                waited += wait
                await asyncio.sleep(wait)
        fault = f"{reason} ({said})" if said else reason
        raise RequestFailed(
            f"{fault}, after {self._settings.retries} retries and {waited:.0f} s of waiting for "
            f"{self._settings.server}{self._proxy}"
        )

    def _warn_of_waiting(self, reason: str) -> None:
        """At the first such fault: all retries together may take minutes, in which nothing else is shown."""
        tqdm.write(
            f"warning: --server {self._settings.server}: {reason}{self._proxy}; a request is sent again up to "
            f"{self._settings.retries} times, after growing waits",
            file=sys.stderr,
        )

    async def _ask_once(self, request: Request) -> list[Answer | RequestRefused]:
        limit = self._limit
        try:
            async with asyncio.timeout(self._settings.timeout):
                content = await self._send(request, limit)
        except TimeoutError:
            raise TryAgain(f"no answer within {self._settings.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise TryAgain(type(error.__cause__ or error).__name__) from None
        except openai.APIStatusError as error:
            if limit == "max_tokens" and not isinstance(request.prompt, str) and _wants_other_limit(error):
                self._limit = "max_completion_tokens"
                return await self._ask_once(request)
            told = self._without_key(error.body or error.response.text)
            raise failure(error.status_code, told, _retry_after(error)) from None
        completion = read_completion(content, len(request.indices))
        if completion.model not in (None, self._asked["model"]):
            self.traffic.other_models[str(completion.model)] += 1
        self._refuse_cut(completion, request)
        return completion.answers()

    async def _send(self, request: Request, limit: str) -> bytes:
        """The content of the reply."""
        body: dict[str, Any] = {
            **self._asked,
            "n": len(request.indices),
            limit: request.max_tokens,
            "seed": request.seed,
            "extra_headers": self._headers,
        }
        create: Any
        if isinstance(request.prompt, str):
            create = self._client.completions.with_raw_response.create
            body["prompt"] = request.prompt
        else:
            create = self._client.chat.completions.with_raw_response.create
            body["messages"] = arguments_as_text(request.prompt)
            # vLLM and SGLang take the template's arguments, which are not OpenAI's.
            body |= {"tools": request.arguments.tools} if request.arguments.tools else {}
            if request.arguments.kwargs:
                body["extra_body"] = {KWARGS_FIELD: request.arguments.kwargs}
        content: bytes = (await create(**body)).content
        return content

    def _without_key(self, told: Any) -> Any:
        """Some servers repeat a wrong key in their reply, which is shown and recorded."""
        if isinstance(told, dict):
            return {name: self._without_key(value) for name, value in told.items()}
        if isinstance(told, list):
            return [self._without_key(value) for value in told]
        return told.replace(self._key, "***") if isinstance(told, str) and self._key else told

    def _refuse_cut(self, completion: Completion, request: Request) -> None:
        """Raise UserError for a prompt or an answer that the server cut."""
        self._prompt_check.check(request, completion.prompt_tokens)
        if completion.has_cut_answer(request.max_tokens):
            raise UserError(
                f"--server {self._settings.server}: ended an answer before the {request.max_tokens} tokens asked for: "
                "its context has no room for prompt and answer; give it a longer one (vLLM: --max-model-len) or ask "
                "for fewer tokens"
            )


def served_models(url: str, api_key_env: str | None) -> list[ServedModel]:
    """The models that a server has.

    Raises:
        openai.OpenAIError: It does not answer, or answers with an error.
        ValidationError: Its answer is no list of models.
    """
    key = _api_key(api_key_env)
    with openai.OpenAI(base_url=url, api_key=key or _NO_KEY, max_retries=0, timeout=_MODELS_SECONDS) as client:
        reply = client.models.with_raw_response.list(extra_headers=_headers(key))
        return _ServedModels.model_validate_json(reply.content).data


def served_positions(url: str, model: str, api_key_env: str | None) -> int | None:
    """Longest sequence of the server's model, as vLLM and SGLang tell it.

    None where the server does not answer or does not say.
    """
    try:
        models = served_models(url, api_key_env)
    except (openai.OpenAIError, ValidationError):
        return None
    return next((each.max_model_len for each in models if each.id == model), None)


def _headers(key: str | None) -> dict[str, Any]:
    """Keep back what the client would take from variables such as OPENAI_API_KEY, which may be for another server."""
    headers = ["OpenAI-Organization", "OpenAI-Project"] + ["Authorization"] * (key is None)
    return {name: openai.Omit() for name in headers}


def _named_proxy(url: str) -> str:
    """For messages: the proxy between us and the server, which may be what fails; empty where there is none."""
    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy is None or proxy_bypass(parts.hostname or ""):
        return ""
    # It may hold a password.
    return f" (through the proxy {urlsplit(proxy).hostname}; name the server in NO_PROXY to go around it)"


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable)
    if not key:
        raise UserError(f"--api-key-env {variable}: this environment variable is not set")
    return key


def _wants_other_limit(error: openai.APIStatusError) -> bool:
    """Whether the server knows the limit on tokens by its newer name only. Other errors name the limit too."""
    unsupported = error.code == "unsupported_parameter" or "not supported" in error.message
    return error.status_code == 400 and unsupported and "max_completion_tokens" in error.message


def _retry_after(error: openai.APIStatusError) -> float | None:
    """Seconds of a Retry-After header, which holds seconds or a date."""
    value = error.response.headers.get("retry-after", "")
    try:
        return float(value)
    except ValueError:
        pass
    try:
        return (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    except (TypeError, ValueError):
        return None
