"""Tool calls as a reader takes them.

Rows give the arguments of a call as an object or as JSON text. Most chat templates write an object as JSON. Some join
text instead, and so do servers with OpenAI's API.
"""

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from megatron_solopo.data.messages import TOOL_CALLS, Message, call_arguments

_NAME, _VALUE = "qxqz", "vrrk"
_WRITTEN = re.compile(rf'"{_NAME}":\s*"{_VALUE}"')
# Some templates take no other ids than those of nine letters.
_ID = "qxqzvrrkz"


def arguments_as_objects(messages: Sequence[Message]) -> list[Message]:
    """The same messages, with the arguments of every tool call as an object."""
    return _with_arguments(messages, call_arguments)


def arguments_as_text(messages: Sequence[Message]) -> list[Message]:
    """The same messages, with the arguments of every tool call as JSON text. Text stays as it is."""

    def text(call: dict[str, Any]) -> str:
        arguments = call["function"]["arguments"]
        return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)

    return _with_arguments(messages, text)


def takes_text(render: Callable[[list[Message]], str]) -> bool:
    """Whether a chat template can write the arguments of a tool call as text alone, found by trial.

    Args:
        render: what the template writes for some messages; "" if it refuses them.
    """

    def is_written(arguments: Any) -> bool:
        call = {"id": _ID, "type": "function", "function": {"name": _NAME, "arguments": arguments}}
        calling = {"role": "assistant", "content": None, TOOL_CALLS: [call]}
        return _WRITTEN.search(render([{"role": "user", "content": _VALUE}, calling])) is not None

    arguments = {_NAME: _VALUE}
    return not is_written(arguments) and is_written(json.dumps(arguments))


def _with_arguments(messages: Sequence[Message], form: Callable[[dict[str, Any]], Any]) -> list[Message]:
    found = []
    for message in messages:
        calls = message.get(TOOL_CALLS, [])
        formed = [call | {"function": call["function"] | {"arguments": form(call)}} for call in calls]
        found.append(message | ({TOOL_CALLS: formed} if formed else {}))
    return found
