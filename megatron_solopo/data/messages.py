"""Chat messages of rows: their legal forms, and the texts that they hold.

    system, user   {"role", "content"}
    assistant      {"role", "content"}, and perhaps "tool_calls" and a thought: "reasoning_content", "reasoning" or
                   "thinking"
    tool           {"role", "content"}, and perhaps "name" and "tool_call_id"

A tool call is {"type": "function", "id", "function": {"name", "arguments"}}, where type and id may be missing. Its
arguments are an object, or the JSON text of one. A message with tool calls needs no content. A content may also be a
list of one part {"type": "text", "text"}. Keys that are null count as missing: tables give every message all keys.
"""

from collections.abc import Iterator
from typing import Any

from megatron_solopo.files import parse_json

Message = dict[str, Any]
Content = str | list[Message]

TOOL_CALLS = "tool_calls"
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
"""Keys of an assistant message that hold its thought. transformers gives each template the one that it reads."""

_KEYS: dict[str, tuple[str, ...]] = {
    "system": ("role", "content"),
    "user": ("role", "content"),
    "assistant": ("role", "content", TOOL_CALLS, *THOUGHTS),
    "tool": ("role", "content", "name", "tool_call_id"),
}
# An empty system message is how a user turns a chat template's default one off. A tool may return nothing.
_MAY_BE_EMPTY = ("system", "tool")


class IllegalValue(Exception):
    """Why a value is not legal in its field."""


def parse_prompt(value: list[Any]) -> list[Message]:
    """The messages of a prompt, which end with a user or tool message. Raises IllegalValue."""
    messages = [_parse_message(message, index) for index, message in enumerate(value)]
    roles = [message["role"] for message in messages]
    if roles[-1:] not in (["user"], ["tool"]):
        raise IllegalValue(f"expected messages that end with a user or a tool message, got roles {roles}")
    return messages


def parse_response(value: list[Any]) -> list[Message]:
    """The messages of a response: from an assistant message to an assistant message. Raises IllegalValue."""
    messages = [_parse_message(message, index) for index, message in enumerate(value)]
    roles = [message["role"] for message in messages]
    if not roles or {roles[0], roles[-1]} != {"assistant"} or "system" in roles:
        raise IllegalValue(
            f"expected one assistant message, or several with tool and user messages between them, got roles {roles}"
        )
    return messages


def as_messages(content: Content, role: str) -> list[Message]:
    """The messages of a content. A string is one message."""
    return [{"role": role, "content": content}] if isinstance(content, str) else content


def message_text(message: Message) -> str:
    """The content; "" for tool calls without one."""
    return message["content"] or ""


def tool_texts(message: Message) -> Iterator[str]:
    """Names and text arguments of a message's tool calls."""
    for call in message.get(TOOL_CALLS, ()):
        yield call["function"]["name"]
        yield from _texts_in(call_arguments(call))


def check_text(text: str) -> str:
    """The same text. Raises IllegalValue if it is blank or no Unicode text."""
    if not text.strip():
        raise IllegalValue("is blank" if text else "is empty")
    return check_unicode(text)


def check_unicode(text: str) -> str:
    """The same text. Raises IllegalValue if it is no Unicode text, which no tokenizer takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        reason = f"holds a lone surrogate at character {error.start + 1}, which is not Unicode text"
        raise IllegalValue(reason) from None
    return text


def type_name(value: Any) -> str:
    """What a JSON value is, in words."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), f"a {'number' if isinstance(value, int | float) else type(value).__name__}")


def _parse_message(value: Any, index: int) -> Message:
    try:
        return _checked_message(value)
    except IllegalValue as error:
        raise IllegalValue(f"message {index}: {error}") from None


def _checked_message(value: Any) -> Message:
    if not isinstance(value, dict):
        raise IllegalValue(f"expected an object with role and content, got {type_name(value)}")
    message = {key: entry for key, entry in value.items() if entry is not None}
    role, calls = message.get("role"), message.pop(TOOL_CALLS, [])
    if isinstance(message.get("content"), list):
        message["content"] = _text_of_parts(message["content"])
    if not isinstance(role, str) or role not in _KEYS:
        raise IllegalValue(f"role {role!r}; legal: {', '.join(_KEYS)}")
    given = [*message, *([TOOL_CALLS] if calls else [])]
    if unknown := sorted(set(given) - set(_KEYS[role])):
        raise IllegalValue(f"unknown key {unknown[0]!r}; legal: {', '.join(_KEYS[role])}")
    for key, entry in message.items():
        if not isinstance(entry, str):
            raise IllegalValue(f"{key}: expected a string, got {type_name(entry)}")
        _check_unicode_of(key, entry)
    content = message.get("content")
    if calls:
        return message | {"content": content, TOOL_CALLS: _checked_calls(calls)}
    if content is None:
        raise IllegalValue("content: expected a string, got null")
    if content or role not in _MAY_BE_EMPTY:
        try:
            check_text(content)
        except IllegalValue as error:
            raise IllegalValue(f"content {error}") from None
    return message


def _text_of_parts(parts: list[Any]) -> str:
    """The text of a content of one part. How several are joined, each template decides for itself."""
    are_objects = all(isinstance(part, dict) for part in parts)
    given = [{key: entry for key, entry in part.items() if entry is not None} for part in parts] if are_objects else []
    if len(given) != 1 or given[0].keys() != {"type", "text"} or given[0]["type"] != "text":
        raise IllegalValue('content: expected a string, or a list of one part {"type": "text", "text": ...}')
    text: str = given[0]["text"]
    return text


def _checked_calls(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise IllegalValue(f"{TOOL_CALLS}: expected a list, got {type_name(value)}")
    try:
        return [_checked_call(call) for call in value]
    except IllegalValue as error:
        raise IllegalValue(f"{TOOL_CALLS}: {error}") from None


def _checked_call(value: Any) -> dict[str, Any]:
    function = value.get("function") if isinstance(value, dict) else None
    if not isinstance(function, dict):
        raise IllegalValue('expected objects such as {"type": "function", "function": {"name": ..., "arguments": ...}}')
    call = {key: entry for key, entry in value.items() if entry is not None}
    unknown = sorted((call.keys() - {"id", "type", "function"}) | (function.keys() - {"name", "arguments"}))
    if unknown:
        raise IllegalValue(f"unknown key {unknown[0]!r}; legal: id, type, function: name, arguments")
    if call.setdefault("type", "function") != "function":
        raise IllegalValue(f"type {call['type']!r}; legal: function")
    if not isinstance(call.get("id", ""), str) or not isinstance(function.get("name"), str):
        raise IllegalValue("id and name must be strings, and a name is needed")
    check_text(function["name"])
    try:
        arguments = call_arguments(call)
    except (ValueError, RecursionError) as error:
        raise IllegalValue(f"arguments are text that is not valid JSON: {error}") from None
    if not isinstance(arguments, dict):
        raise IllegalValue(f"arguments: expected an object, or the JSON text of one, got {type_name(arguments)}")
    for text in _texts_in(arguments):
        _check_unicode_of("arguments: a text", text)
    return call


def _check_unicode_of(what: str, text: str) -> None:
    try:
        check_unicode(text)
    except IllegalValue as error:
        raise IllegalValue(f"{what} {error}") from None


def call_arguments(call: dict[str, Any]) -> Any:
    """The arguments of a tool call, as an object. Raises ValueError for text that is not JSON."""
    arguments = call["function"].get("arguments")
    return parse_json(arguments) if isinstance(arguments, str) else arguments


def _texts_in(value: Any) -> Iterator[str]:
    """The strings in a JSON value, keys aside."""
    if isinstance(value, str):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts_in(each)
