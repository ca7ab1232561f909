"""What a server's reply means: answers, a fault that may pass, or a refusal.

The classes of the openai package describe a reply, but the package does not check a reply against them. The classes
here are checked. They hold the fields that we use, and those that other servers add.
"""

import re
from typing import Any

from pydantic import BaseModel, ValidationError

from megatron_solopo.generate.model import Answer, RequestRefused

_SHOWN_CHARACTERS = 200
_SHOWN_BYTES = 100
_ABORTED = "abort"
"""vLLM and SGLang say so of an answer that was stopped from outside (paused, put to sleep). It is incomplete."""
_LENGTH = "length"
_FILTERED = "content_filter"
_PASSING_STATUS = frozenset({408, 409, 425, 429})
"""Beside these, every fault of a server (500 and above) may pass, also those of the proxies before it (520 to 529)."""
_LASTING_STATUS = frozenset({501, 505, 511})
_FILTER_CODES = frozenset(
    {
        _FILTERED,
        "content_policy_violation",
        "responsibleaipolicyviolation",
        "data_inspection_failed",
        "datainspectionfailed",
        "invalid_prompt",
    }
)
_TOO_LONG = re.compile(r"context[ _]length|context window|context size|maximum.{0,20}length|too long", re.IGNORECASE)


class TryAgain(Exception):
    """A fault that may pass by itself.

    Args:
        reason: The kind of fault, by which the report counts the retries.
        wait: Seconds that the server asks to wait.
        said: What the server said, for the error after the last retry.
    """

    def __init__(self, reason: str, wait: float | None = None, said: str = "") -> None:
        super().__init__(reason)
        self.wait, self.said = wait, said


class ServerRefuses(Exception):
    """The server refuses every request of this kind, such as for a wrong key or an unknown model."""


class _Message(BaseModel):
    content: str | None = None
    reasoning_content: Any = None
    """The thought of a model that thinks, as DeepSeek, SGLang and older vLLM name it."""
    reasoning: Any = None
    """The same, as newer vLLM and OpenRouter name it."""
    refusal: str | None = None


class _Choice(BaseModel):
    text: str | None = None
    message: _Message | None = None
    finish_reason: str | None = None
    error: Any = None
    """OpenRouter's: the model behind it failed."""


class _Usage(BaseModel):
    completion_tokens: int | None = None
    prompt_tokens: int | None = None


class Completion(BaseModel):
    """A reply with answers."""

    choices: list[_Choice]
    model: str | None = None
    usage: _Usage | None = None

    @property
    def prompt_tokens(self) -> int | None:
        """Tokens of the prompt that the server read; None where it does not say. Some say 0."""
        return (self.usage and self.usage.prompt_tokens) or None

    def has_cut_answer(self, max_tokens: int) -> bool:
        """Whether an answer ended for lack of room before it had `max_tokens` tokens.

        vLLM takes a request whose prompt leaves less room than it asks for, and lowers `max_tokens` without a word.
        """
        cut = sum(choice.finish_reason == _LENGTH for choice in self.choices)
        tokens = self.usage.completion_tokens if self.usage else None
        return tokens is not None and tokens < cut * max_tokens

    def answers(self) -> list[Answer | RequestRefused]:
        """One entry for each choice: the answer, or why there is none."""
        # The server counts the tokens of all choices together.
        tokens = self.usage.completion_tokens if self.usage and len(self.choices) == 1 else None
        return [_answer(choice, tokens, self.prompt_tokens) for choice in self.choices]


class _Failure(BaseModel):
    error: Any


def read_completion(content: bytes, asked: int) -> Completion:
    """A reply with status 200: at least one choice, at most as many as asked for.

    Raises:
        TryAgain: It is no completion, it has no choice, or one choice was aborted.
        RequestRefused, ServerRefuses: It holds an error, as OpenRouter sends one with status 200.
    """
    try:
        completion = Completion.model_validate_json(content)
    except ValidationError:
        _raise_error_in(content)
        start = " ".join(content[:_SHOWN_BYTES].decode("utf-8", errors="replace").split())
        raise TryAgain("an answer that is no completion", said=repr(start)) from None
    completion.choices = completion.choices[:asked]
    if not completion.choices:
        _raise_error_in(content)
        raise TryAgain("an answer without choices")
    for choice in completion.choices:
        if choice.error is not None:
            raise failure(_status_of(choice.error), choice.error)
        if choice.finish_reason == _ABORTED:
            raise TryAgain("an aborted answer")
    return completion


def failure(status: int, error: Any, wait: float | None = None) -> Exception:
    """The exception for an error that a server reports.

    Args:
        status: HTTP status of the reply, or the code that takes its place in a reply with status 200.
        error: The object or the text that describes the error.
        wait: Seconds that the server asks to wait.
    """
    codes, message = _codes(error), _message(error)
    named = next((code for code in codes if code.lower() in _FILTER_CODES), None)
    shown = f"HTTP {status}: {message}"
    if named or "flagged_input" in str(error):
        return RequestRefused(named or _FILTERED, shown, certain=True)
    if status == 429 and "insufficient_quota" in codes:
        return ServerRefuses(shown)
    if status in _PASSING_STATUS or (status >= 500 and status not in _LASTING_STATUS):
        return TryAgain(f"HTTP {status}", wait, message)
    if status == 413 or (status in (400, 422) and _TOO_LONG.search(f"{codes} {message}")):
        return RequestRefused("prompt too long for the server", shown, certain=True)
    if status in (400, 422):
        return RequestRefused(f"HTTP {status}", shown, certain=False)
    return ServerRefuses(shown)


def _raise_error_in(content: bytes) -> None:
    try:
        error = _Failure.model_validate_json(content).error
    except ValidationError:
        return
    if error is not None:
        raise failure(_status_of(error), error)


def _status_of(error: Any) -> int:
    """The status that an error in a reply with status 200 names. One that names none may pass."""
    code = str(error.get("code")) if isinstance(error, dict) else ""
    return int(code) if code.isdecimal() and 400 <= int(code) < 600 else 500


def _codes(error: Any) -> list[str]:
    """Every code of an error: Azure puts a closer one inside."""
    found = []
    while isinstance(error, dict):
        found += [str(error[name]) for name in ("code", "type") if error.get(name) is not None]
        error = error.get("innererror", error.get("inner_error", error.get("error")))
    return found


def _message(error: Any) -> str:
    while isinstance(error, dict) and error.keys() & {"message", "error", "detail"}:
        error = next(error[name] for name in ("message", "error", "detail") if name in error)
    return " ".join(str(error).split())[:_SHOWN_CHARACTERS]


def _answer(choice: _Choice, tokens: int | None, prompt_tokens: int | None) -> Answer | RequestRefused:
    message = choice.message
    text = (message.content if message else choice.text) or ""
    thoughts = (message.reasoning_content, message.reasoning) if message else ()
    reasoning = next((thought for thought in thoughts if isinstance(thought, str) and thought), None)
    if choice.finish_reason == _FILTERED:
        return RequestRefused(_FILTERED, "the answer ended with finish_reason content_filter", certain=True)
    if message and message.refusal:
        return RequestRefused("refusal", f"refusal: {_message(message.refusal)}", certain=True)
    if choice.finish_reason != _LENGTH and not text.strip() and (reasoning or (message and message.content is None)):
        return _no_content(choice.finish_reason, reasoning)
    return Answer(text, choice.finish_reason, tokens, reasoning, prompt_tokens)


def _no_content(finish_reason: str | None, reasoning: str | None) -> RequestRefused:
    """A message without content is no answer, unless its thought used up all of its tokens."""
    if reasoning is None:
        return RequestRefused("no content", f"content is null, finish_reason {finish_reason}", certain=False)
    detail = (
        f"the reply holds a thought ({len(reasoning)} characters) and no content, finish_reason {finish_reason}; "
        "if the model does not think, start the server without a reasoning parser"
    )
    return RequestRefused("a thought without an answer", detail, certain=False)
