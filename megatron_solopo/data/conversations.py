"""Pairs whose answers are whole conversations, which hold the prompt, too.

Many published preference data are of this form, such as TRL's without an explicit prompt, and UltraFeedback's binarized
rows, whose field `prompt` repeats the text of the question. In answers of text nothing tells where a prompt ends.
"""

from typing import Any

from megatron_solopo.data.messages import IllegalValue

_PROMPT_ENDS = ("user", "tool")


def split_conversations(row: dict[str, Any]) -> dict[str, Any]:
    """A row with prompt, chosen and rejected, if both answers begin with the prompt; else the same row.

    Without a prompt of messages, the prompt is what both conversations begin with, up to the last user or tool message
    in it.

    Raises IllegalValue if the conversations do not begin alike, or if the given prompt is not theirs.
    """
    prompt, chosen, rejected = row.get("prompt"), row.get("chosen"), row.get("rejected")
    if any(row.get(name) is not None for name in ("prompt_short", "prompt_long")):
        return row
    if not (isinstance(chosen, list) and isinstance(rejected, list)):
        return row
    if not (_begins_with_prompt(chosen) and _begins_with_prompt(rejected)):
        return row
    if isinstance(prompt, list):
        length = len(prompt)
        if chosen[:length] != prompt or rejected[:length] != prompt:
            raise IllegalValue("is not what chosen and rejected begin with, which are whole conversations")
    else:
        length = _common_length(chosen, rejected)
        if isinstance(prompt, str) and not any(message.get("content") == prompt for message in chosen[:length]):
            raise IllegalValue("is not the text of a message with which both chosen and rejected begin")
    return row | {"prompt": chosen[:length], "chosen": chosen[length:], "rejected": rejected[length:]}


def _begins_with_prompt(answer: list[Any]) -> bool:
    """Whether an answer is a conversation, which does not begin with the assistant."""
    are_messages = bool(answer) and all(isinstance(message, dict) for message in answer)
    return are_messages and answer[0].get("role") in ("system", *_PROMPT_ENDS)


def _common_length(chosen: list[Any], rejected: list[Any]) -> int:
    """Messages of the prompt with which two conversations begin."""
    pairs = zip(chosen, rejected, strict=False)
    alike = next((place for place, (one, other) in enumerate(pairs) if one != other), min(len(chosen), len(rejected)))
    ends = [place + 1 for place, message in enumerate(chosen[:alike]) if message.get("role") in _PROMPT_ENDS]
    if not ends:
        raise IllegalValue("is missing, and chosen and rejected do not begin with the same user or tool message")
    return ends[-1]
