"""What a chat template gets beside the messages: a row's tools, and arguments such as `enable_thinking` or a date.

The names are those of OpenAI-compatible servers: `tools` and `chat_template_kwargs`.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

from pydantic import AfterValidator

from megatron_solopo.errors import UserError

KWARGS_FIELD, TOOLS_FIELD = "chat_template_kwargs", "tools"
ARGUMENT_FIELDS = (KWARGS_FIELD, TOOLS_FIELD)
# What this program or transformers' `apply_chat_template` decides, and what its templates are given by other ways.
_RESERVED = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "tokenize",
        "tokenizer_kwargs",
        TOOLS_FIELD,
        "truncation",
    }
)


@dataclass(frozen=True)
class TemplateArguments:
    """What the chat template gets beside the messages."""

    # Lists and dicts have no hash, but a request that holds them needs one.
    kwargs: dict[str, Any] = field(default_factory=dict, hash=False)
    tools: list[dict[str, Any]] | None = field(default=None, hash=False)
    """JSON schemas of the functions that the model may call."""

    def over(self, kwargs: dict[str, Any]) -> "TemplateArguments":
        """The same with arguments of all rows. A row's own win."""
        return TemplateArguments({**kwargs, **self.kwargs}, self.tools)

    def names(self) -> list[str]:
        """The names under which the template sees what is given."""
        return [*self.kwargs, *([TOOLS_FIELD] if self.tools else [])]

    def fields(self) -> dict[str, Any]:
        """The fields of a row or of a server's request that say the same; none for what is not given."""
        given = {KWARGS_FIELD: self.kwargs, TOOLS_FIELD: self.tools}
        return {name: value for name, value in given.items() if value}


NO_ARGUMENTS = TemplateArguments()


def is_free(name: str) -> bool:
    """Whether a name can be that of an argument."""
    return name not in _RESERVED


def check_kwargs(value: Any) -> dict[str, Any]:
    """A value of `chat_template_kwargs`. Raises UserError if it is not legal."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise UserError('expected an object of arguments, such as {"enable_thinking": false}')
    if reserved := sorted(_RESERVED & value.keys()):
        raise UserError(f"{reserved[0]!r} is no argument of a template; take it out")
    if illegal := [name for name in value if not name.isidentifier()]:
        raise UserError(f"{illegal[0]!r} cannot be the name of an argument; take it out")
    return value


def _check_option(value: dict[str, Any]) -> dict[str, Any]:
    try:
        return check_kwargs(value)
    except UserError as error:
        raise UserError(f"--chat-template-kwargs: {error}") from None


TemplateKwargs = Annotated[dict[str, Any], AfterValidator(_check_option)]
"""The value of the option --chat-template-kwargs."""


def check_tools(value: Any) -> list[dict[str, Any]] | None:
    """A value of `tools`. Raises UserError if it is not legal."""
    if not value:
        return None
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise UserError("expected a list of objects, the JSON schemas of the functions")
    return value
