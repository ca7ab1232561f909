"""One row's prompts and responses as tokens.

A prompt and its response are encoded separately, by the chat template or as plain text. So no token crosses their
boundary, and a response has the same tokens behind the short and the long prompt.
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from megatron_solopo.data.messages import Content, as_messages
from megatron_solopo.data.rendering import ResponsePart, render_parts, render_prompt, unread_arguments
from megatron_solopo.data.settings import Template
from megatron_solopo.data.template_arguments import NO_ARGUMENTS, TemplateArguments
from megatron_solopo.data.template_effects import (
    MEANINGS,
    Effect,
    clock_effect,
    header_effects,
    prompt_effects,
    response_effects,
    token_effects,
    unknown_effects,
)
from megatron_solopo.data.tokenizer import Tokenizer
from megatron_solopo.errors import UserError


@dataclass
class TokenizedRow:
    """Token ids by column, which of them count, and what the template did to the row."""

    ids: dict[str, list[int]] = field(default_factory=dict)
    masks: dict[str, list[bool]] = field(default_factory=dict)
    """By response: whether each token counts."""
    effects: list[Effect] = field(default_factory=list)


def tokenize_row(
    prompts: dict[str, Content],
    responses: dict[str, Content],
    tokenizer: Tokenizer,
    template: Template,
    end_tokens: Collection[int],
    arguments: TemplateArguments = NO_ARGUMENTS,
) -> TokenizedRow:
    """Render and encode one row.

    Args:
        prompts: by column; `responses` has "chosen", and "rejected" where there is one.
        end_tokens: the ids that end generation.
        arguments: the row's, with those of all rows.

    Raises UserError if the template refuses the messages, if a text has no tokens, or if the responses are equal.
    """
    row = TokenizedRow()
    if template == "chat":
        texts, parts = _render(row, prompts, responses, tokenizer, arguments)
        row.ids = {name: tokenizer.encode(text, add_special_tokens=False) for name, text in texts.items()}
        ends: list[int] = []
    else:
        assert tokenizer.eos_token_id is not None
        row.ids = {name: tokenizer.encode(str(text), add_special_tokens=True) for name, text in prompts.items()}
        parts = {name: [ResponsePart(str(text), True)] for name, text in responses.items()}
        ends = [tokenizer.eos_token_id]
    encoded = {
        name: [(tokenizer.encode_continuation(part.text), part.counts) for part in each] for name, each in parts.items()
    }
    for name, each in encoded.items():
        row.ids[name] = [token for tokens, _ in each for token in tokens]
        row.masks[name] = [counts for tokens, counts in each for _ in tokens]
    for name in row.ids:
        if not all(tokens for tokens, counts in encoded.get(name, [(row.ids[name], True)]) if counts):
            raise UserError(f"{name}: tokenizes to nothing")
    for name, response in responses.items():
        row.effects += unknown_effects("unknown_in_answer", name, response, row.ids[name], end_tokens, tokenizer)
    if row.ids["chosen"] == row.ids.get("rejected"):
        raise UserError(_described_equality(row.effects))
    for name, response in responses.items():
        row.ids[name] += ends
        row.masks[name] += [True] * len(ends)
        generated = [[*tokens, *ends] for tokens, counts in encoded[name] if counts]
        row.effects += token_effects(name, as_messages(response, "assistant"), generated, end_tokens, tokenizer)
    for name, prompt in prompts.items():
        row.effects += unknown_effects("unknown_in_prompt", name, prompt, row.ids[name], end_tokens, tokenizer)
    if unread := arguments.names() if template == "plain" else unread_arguments(tokenizer, arguments):
        row.effects.append(Effect("unread_arguments", ", ".join(unread)))
    return row


def _described_equality(effects: list[Effect]) -> str:
    """Why both responses have the same tokens. The cause stands before the semicolon, and is the same in every row."""
    same = "rejected: has the same tokens as chosen"
    cause = next((effect for effect in effects if effect.kind in ("answer_text", "unknown_in_answer")), None)
    if cause is None:
        return same
    meaning = MEANINGS[cause.kind]
    return f"{same}: {meaning.words}; {cause.shown}; {meaning.way_out}"


def _render(
    row: TokenizedRow,
    prompts: dict[str, Content],
    responses: dict[str, Content],
    tokenizer: Tokenizer,
    arguments: TemplateArguments,
) -> tuple[dict[str, str], dict[str, list[ResponsePart]]]:
    """Texts by the chat template: prompts up to the start of the answer, responses from there on in parts."""
    texts: dict[str, str] = {}
    parts: dict[str, list[ResponsePart]] = {}
    for prompt_name, prompt in prompts.items():
        texts[prompt_name] = render_prompt(prompt, tokenizer, arguments)
        row.effects += prompt_effects(prompt_name, prompt, texts[prompt_name])
        for name, response in responses.items():
            found = render_parts(prompt, response, tokenizer, arguments, names=(prompt_name, name))
            if name not in parts:
                parts[name] = found
                row.effects += response_effects(name, response, texts[prompt_name], found)
                row.effects += header_effects(name, response, found, tokenizer.template_for(arguments) or "")
            elif parts[name] != found:
                raise UserError(f"{name}: the chat template writes it differently behind {prompt_name}")
    row.effects += clock_effect(tokenizer, next(iter(prompts.values())), arguments)
    return texts, parts
