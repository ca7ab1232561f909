"""What a template does to a row that its author may not expect, and what to do about it.

The response of a row must hold the answer's text, and must end with a token that ends generation. White space behind
that token, such as the line break of ChatML, is kept: it is what transformers renders, and it costs one token.
"""

import json
import os
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import product, zip_longest
from typing import Literal

from tqdm import tqdm

from megatron_solopo.data.messages import THOUGHTS, Content, Message, as_messages, message_text, tool_texts
from megatron_solopo.data.rendering import THOUGHT_TAG, ResponsePart
from megatron_solopo.data.settings import Template
from megatron_solopo.data.template_arguments import NO_ARGUMENTS, TemplateArguments, is_free
from megatron_solopo.data.template_clock import FUNCTION, OTHER_DAY, Clock, names_in
from megatron_solopo.data.tokenizer import Tokenizer
from megatron_solopo.errors import UserError

EffectKind = Literal[
    "answer_text", "prompt_text", "unread_arguments", "no_end_token", "end_token_inside", "unknown_in_answer",
    "unknown_in_prompt", "header_in_answer", "white_space", "clock"
]  # fmt: skip


@dataclass(frozen=True)
class Meaning:
    """What an effect is, and what to do about it."""

    words: str
    way_out: str
    is_loss: bool = True
    """Whether --on-lost-content decides. All other effects are only counted."""


MEANINGS: dict[EffectKind, Meaning] = {
    "answer_text": Meaning(
        "the template leaves out text of an answer",
        "take that text out of the answers, or use a template that keeps it",
    ),
    "prompt_text": Meaning(
        "the template leaves out text of a prompt",
        "take that text out of the prompts, or use a template that keeps it",
    ),
    "unread_arguments": Meaning(
        "the template does not read tools or arguments of a row",
        "take them out of the rows, or use a template that reads them",
    ),
    "no_end_token": Meaning(
        "an answer does not end with an end token, so that the model never learns to stop",
        "if the last token should end an answer, add its id to eos_token_id in the model's generation_config.json; "
        "if there is none, let the template write one behind an answer",
    ),
    "end_token_inside": Meaning(
        "an answer has an end token inside, where generation stops", "take that token out of the answers"
    ),
    "unknown_in_answer": Meaning(
        "the tokenizer has no token for text of an answer, which is trained as its unknown token or left out",
        "take that text out of the answers, or use a tokenizer that knows it",
    ),
    "unknown_in_prompt": Meaning("the tokenizer has no token for text of a prompt", "", is_loss=False),
    "header_in_answer": Meaning(
        "the template ignores add_generation_prompt, so that the model learns to write the header of its own answer",
        "",
        is_loss=False,
    ),
    "white_space": Meaning("the template trims white space around an answer or a thought", "", is_loss=False),
    "clock": Meaning("the template writes the date or the time into the prompt", "", is_loss=False),
}


@dataclass(frozen=True)
class Effect:
    """An effect on one row."""

    kind: EffectKind
    shown: str
    """Short, for a reader."""


_GENERATION_PROMPT = "add_generation_prompt"
_SHOWN = 60
_LAST_TOKENS = 8


def prompt_effects(name: str, prompt: Content, rendered: str) -> Iterator[Effect]:
    """Text of messages that the prompt lacks. Thoughts of earlier answers may be left out."""
    for message in as_messages(prompt, "user"):
        text = message_text(message)
        if message["role"] == "assistant":
            text = THOUGHT_TAG.split(text)[-1]
        yield from _lost_texts("prompt_text", name, message, [text], rendered)


def response_effects(name: str, response: Content, prompt: str, parts: Sequence[ResponsePart]) -> Iterator[Effect]:
    """Text of a response that what is written lacks. A thought may begin in the prompt."""
    answers, written = as_messages(response, "assistant"), "".join(part.text for part in parts)
    begin = _opened_at_the_end(prompt)
    for place, message in enumerate(answers):
        others: list[str] = [message[key] for key in THOUGHTS if key in message]
        content = message_text(message)
        if message["role"] != "assistant":
            others.append(content)
        elif content not in begin + written:
            is_trimmed = _has_parts(content, begin + written)
            which = name if len(answers) == 1 else f"{name}, message {place}"
            shown = f"{which}: {_short(content)} is trained as {_short(written)}"
            yield Effect("white_space" if is_trimmed else "answer_text", shown)
        yield from _lost_texts("answer_text", name, message, others, written)


def _lost_texts(kind: EffectKind, name: str, message: Message, texts: Sequence[str], written: str) -> Iterator[Effect]:
    """Texts of a message, those of its tool calls included, that are not written; JSON may write them."""
    for text in [*texts, *tool_texts(message)]:
        forms = (text.strip(), *(json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (False, True)))
        if not any(form in written for form in forms):
            yield Effect(kind, f"{name}: {message['role']} {_short(text)} is not in {_short(written)}")


def header_effects(name: str, response: Content, parts: Sequence[ResponsePart], template: str) -> Iterator[Effect]:
    """Whether the start of an answer's turn is trained, since the template does not write it behind a prompt."""
    first, written = as_messages(response, "assistant")[0], parts[0].text
    texts = [message_text(first), *(first[key] for key in THOUGHTS if key in first)]
    places = [written.find(text.strip()) for text in texts if text.strip()]
    header = written[: min((place for place in places if place >= 0), default=0)]
    if header.strip() and _GENERATION_PROMPT not in template:
        yield Effect("header_in_answer", f"{name} is trained from {_short(header)} on")


def token_effects(
    name: str,
    answers: Sequence[Message],
    generated: Sequence[Sequence[int]],
    ends: Collection[int],
    tokenizer: Tokenizer,
) -> Iterator[Effect]:
    """Whether what the model generates stops at its end, and nowhere else.

    Args:
        generated: tokens of each part that counts.
    """
    for ids in generated:
        yield from _end_effects(name, ids, ends, tokenizer)
    texts = {tokenizer.decode([end]).strip() for end in ends} - {""}
    for content in [message_text(message) for message in answers if message["role"] == "assistant"]:
        if inside := sorted(text for text in texts if text in content):
            place = content.index(inside[0])
            yield Effect("end_token_inside", f"{name}: {content[max(0, place - 20) : place + 20]!r}")


def _end_effects(name: str, ids: Sequence[int], ends: Collection[int], tokenizer: Tokenizer) -> Iterator[Effect]:
    tokens = list(ids)
    while tokens and tokens[-1] not in ends and not tokenizer.decode(tokens[-1:]).strip():
        tokens.pop()
    if not tokens or tokens[-1] not in ends:
        shown = f"{name} ends with {tokenizer.decode(list(ids)[-_LAST_TOKENS:])!r}"
        last = f", last token {tokenizer.pieces(tokens[-1:])[0]!r} with id {tokens[-1]}" if tokens else ""
        yield Effect("no_end_token", shown + last)


def unknown_effects(
    kind: EffectKind, name: str, content: Content, ids: Sequence[int], ends: Collection[int], tokenizer: Tokenizer
) -> Iterator[Effect]:
    """Text that became the unknown token, or no token at all.

    Some models use the unknown token as an end token too; then it says nothing.
    """
    texts = [message_text(message) for message in as_messages(content, "user")]
    characters = sorted({each for text in texts for each in text if each.isprintable() and not each.isspace()})
    if suspects := [each for each in characters if tokenizer.drops(each)]:
        text = tokenizer.decode(ids)
        if dropped := [each for each in suspects if each not in text]:
            yield Effect(kind, f"{name}: {_short(texts[-1])} has no tokens for {_short(''.join(dropped))}")
            return
    unknown = tokenizer.unk_token_id
    if unknown is None or unknown in ends or unknown not in ids:
        return
    if not any(tokenizer.pieces([unknown])[0] in text for text in texts):
        place = ids.index(unknown)
        around = tokenizer.decode(ids[max(0, place - _LAST_TOKENS) : place + _LAST_TOKENS])
        yield Effect(kind, f"{name}: {_short(texts[-1])} has the tokens {_short(around)}")


def clock_effect(tokenizer: Tokenizer, prompt: Content, arguments: TemplateArguments) -> Iterator[Effect]:
    """Whether a prompt depends on the time at which it is rendered."""
    if FUNCTION not in (tokenizer.template_for(arguments) or ""):
        return
    today, other = (_on(day, tokenizer, prompt, arguments) for day in (None, OTHER_DAY))
    if today != other:
        place = next(place for place, (a, b) in enumerate(zip_longest(today, other)) if a != b)
        yield Effect("clock", repr(today[max(0, place - _SHOWN // 2) : place + _SHOWN // 2]))


def clock_warning(tokenizer: Tokenizer, arguments: TemplateArguments = NO_ARGUMENTS) -> str:
    """What to do about a template that writes the date or the time; "" if it writes none.

    The name of an argument that fixes the date is found by trial: on another day the prompt must be the same.
    """
    prompt = "Question?"
    template = tokenizer.template_for(arguments) or ""
    if not any(clock_effect(tokenizer, prompt, arguments)):
        return ""
    clock = Clock()
    today = tokenizer.render_chat(as_messages(prompt, "user"), True, arguments, clock)
    begin = "the chat template writes the date or the time of rendering into prompts, so that two runs differ"
    for name, date in product(filter(is_free, names_in(template)), dict.fromkeys(clock.told)):
        try:
            fixed = _on(OTHER_DAY, tokenizer, prompt, arguments.over({name: date}))
        except (UserError, TypeError):  # this name is something else than a text
            continue
        if fixed == today:
            given = json.dumps({**arguments.kwargs, name: date})
            return f"{begin}; fix it with --chat-template-kwargs '{given}'"
    return f"{begin}; none of its arguments fixes it, so write a date into the template"


def warn_about_clock(template: Template, tokenizer: Tokenizer, arguments: TemplateArguments = NO_ARGUMENTS) -> None:
    """Print `clock_warning`, on one rank, if prompts are written by the chat template."""
    warning = clock_warning(tokenizer, arguments) if template == "chat" else ""
    if warning and os.environ.get("RANK", "0") == "0":
        tqdm.write(f"warning: {warning}", file=sys.stderr)


def _on(day: datetime | None, tokenizer: Tokenizer, prompt: Content, arguments: TemplateArguments) -> str:
    text = tokenizer.render_chat(as_messages(prompt, "user"), True, arguments, Clock(day))
    assert text is not None
    return text


def _opened_at_the_end(prompt: str) -> str:
    """The thought's tag at the end of a prompt, with the white space around it."""
    tags = list(THOUGHT_TAG.finditer(prompt, max(0, len(prompt) - _SHOWN)))
    return tags[-1][0].lstrip() if tags and tags[-1].end() == len(prompt) else ""


def _has_parts(content: str, text: str) -> bool:
    """Whether a text has all parts of an answer in their order: its thoughts, their tags and the rest."""
    place = 0
    for part in THOUGHT_TAG.split(content.strip()):
        place = text.find(part.strip(), place)
        if place < 0:
            return False
        place += len(part.strip())
    return True


def _short(text: str) -> str:
    return repr(text) if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]!r} ... {text[-_SHOWN // 2 :]!r}"
