"""Tool calls as a reader takes them.

Rows give the arguments of a call as an object or as JSON text. Most chat templates write an object as JSON. Some join
text instead, and so do servers with OpenAI's API.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

from megatron_solopo.data.messages import TOOL_CALLS, Message, call_arguments

# A call for the trial. Nothing else in it has the texts of its argument.
_ARGUMENT = {"qxqz": "vrrk"}
_CALLED = "jpty"
# Some templates take no other ids than those of nine letters.
_ID = "zwlmzwlmz"

Render = Callable[[list[Message]], str]
"""What a template writes for some messages; "" if it refuses them."""


def arguments_as_objects(messages: Sequence[Message]) -> list[Message]:
    """The same messages, with the arguments of every tool call as an object."""
    return _with_arguments(messages, call_arguments)


def arguments_as_text(messages: Sequence[Message]) -> list[Message]:
    """The same messages, with the arguments of every tool call as JSON text. Text stays as it is."""

    def text(call: dict[str, Any]) -> str:
        arguments = call["function"]["arguments"]
        return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)

    return _with_arguments(messages, text)


def takes_text(render: Render) -> bool:
    """Whether a chat template can write the arguments of a tool call as text alone, found by trial.

    A template that writes an object in a form of its own, such as Gemma's `{place: ...}`, takes objects.
    """
    contents = (None, "")  # some templates write calls beside one of them only
    return not any(_writes_object(render, content) for content in contents) and any(
        _writes_text(render, content) for content in contents
    )


def needs_content(render: Render) -> bool:
    """Whether a chat template writes a tool call beside an empty content and not without a content, found by trial."""
    without, empty = (_writes_object(render, content) or _writes_text(render, content) for content in (None, ""))
    return empty and not without


def _writes_object(render: Render, content: str | None) -> bool:
    ((name, value),) = _ARGUMENT.items()
    written = _trial(render, content, _ARGUMENT)
    # Joined text makes of an object what Python prints, which is no form of any model.
    return name in written and value in written and repr(_ARGUMENT) not in written


def _writes_text(render: Render, content: str | None) -> bool:
    text = json.dumps(_ARGUMENT)
    return text in _trial(render, content, text)


def _trial(render: Render, content: str | None, arguments: Any) -> str:
    call = {"id": _ID, "type": "function", "function": {"name": _CALLED, "arguments": arguments}}
    return render([{"role": "user", "content": _CALLED}, {"role": "assistant", "content": content, TOOL_CALLS: [call]}])


def _with_arguments(messages: Sequence[Message], form: Callable[[dict[str, Any]], Any]) -> list[Message]:
    found = []
    for message in messages:
        calls = message.get(TOOL_CALLS, [])
        formed = [call | {"function": call["function"] | {"arguments": form(call)}} for call in calls]
        found.append(message | ({TOOL_CALLS: formed} if formed else {}))
    return found
