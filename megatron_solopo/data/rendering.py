"""Prompts and responses as text and tokens, by the chat template or as they are.

A prompt is what a server renders for the same messages: the template's text up to the start of the answer. A response
is what the model must generate behind that text. Usually the template writes the prompt with an answer as it does
without, and the response is the rest. Two other forms are known:

    system text only in the last turn   The system message moves once an answer follows. The response is what the
                                        template writes behind the last message alone.
    a thought is opened in the prompt   The prompt ends with a tag such as <think>. The response is the answer without
                                        this beginning, and the template's end of a turn.

A response of several messages is what the template writes for the whole conversation behind the prompt. Its parts
alternate: what the model generated in one go, and what stands between, such as the results of tools. A part of the
model begins where the template would have it answer. So each is a text that a server would have got from the model.
"""

import re
from dataclasses import dataclass
from itertools import pairwise

from megatron_solopo.data.messages import Content, Message, as_messages, message_text
from megatron_solopo.data.settings import Template
from megatron_solopo.data.template_arguments import NO_ARGUMENTS, TemplateArguments
from megatron_solopo.data.tokenizer import Tokenizer
from megatron_solopo.errors import UserError

THOUGHT_TAG = re.compile(r"\s*(</?(?:seed:)?think(?:ing)?>|\[/?THINK\])\s*")
_OPENED = re.compile(r"(<(?:seed:)?think(?:ing)?>|\[THINK\])\s*\Z")
_CLOSED = re.compile(r"(</(?:seed:)?think(?:ing)?>|\[/THINK\])\s*\Z")
# Two answers that no template changes. What stands around both is the template's.
_PROBES = ("Qxqz vrrk", "Zwlm jpty")
_SHOWN, _SHOWN_BEFORE = 40, 10


@dataclass(frozen=True)
class ResponsePart:
    """A part of a response as text."""

    text: str
    counts: bool
    """Whether the model generated it. If not, it is context: the header of a turn, the result of a tool."""


def template_of(prompt: Content) -> Template:
    """The template that `--template auto` chooses for a prompt."""
    return "plain" if isinstance(prompt, str) else "chat"


def check_template(template: Template, tokenizer: Tokenizer, tokenizer_path: str) -> None:
    """Raise UserError if the tokenizer lacks what the template needs."""
    if template == "chat" and tokenizer.chat_template is None:
        raise UserError(
            f"{tokenizer_path}: has no chat template; use another tokenizer, or strings and --template plain"
        )
    if template == "plain" and tokenizer.eos_token_id is None:
        raise UserError(f"{tokenizer_path}: has no end-of-sequence token, which --template plain puts after a response")


def check_arguments(
    template: Template, tokenizer: Tokenizer, arguments: TemplateArguments, option: str = "--chat-template-kwargs"
) -> None:
    """Raise UserError if the template does not read an argument that was given for all rows."""
    if not arguments.names():
        return
    if template == "plain":
        raise UserError(f"{option}: needs a chat template, but the prompts are plain text; leave it out")
    if unread := unread_arguments(tokenizer, arguments):
        raise UserError(f"{option}: the chat template does not read {', '.join(unread)}; leave it out")


def unread_arguments(tokenizer: Tokenizer, arguments: TemplateArguments) -> list[str]:
    """Names of given arguments that the chat template does not mention."""
    text = tokenizer.template_for(arguments) or ""
    return [name for name in arguments.names() if not re.search(rf"\b{re.escape(name)}\b", text)]


def encode_prompt(
    prompt: Content, tokenizer: Tokenizer, template: Template, arguments: TemplateArguments = NO_ARGUMENTS
) -> list[int]:
    """Token ids of a prompt up to the start of the answer."""
    if template == "plain":
        return tokenizer.encode(str(prompt), add_special_tokens=True)
    return tokenizer.encode(render_prompt(prompt, tokenizer, arguments), add_special_tokens=False)


def render_prompt(prompt: Content, tokenizer: Tokenizer, arguments: TemplateArguments = NO_ARGUMENTS) -> str:
    """A prompt by the chat template, up to the start of the answer. The tokenizer must have a template."""
    return _Writer(tokenizer, arguments).text(as_messages(prompt, "user"), for_answer=True)


def render_response(
    prompt: Content,
    response: Content,
    tokenizer: Tokenizer,
    arguments: TemplateArguments = NO_ARGUMENTS,
    *,
    names: tuple[str, str] = ("the prompt", "response"),
) -> str:
    """A response by the chat template, from the end of `render_prompt(prompt)` on. See the module for its forms.

    Args:
        names: Names of the prompt and the response in an error.

    Raises UserError if the template writes the prompt differently once an answer follows, in a form that is not known.
    """
    write = _Writer(tokenizer, arguments)
    before, (answer,) = as_messages(prompt, "user"), as_messages(response, "assistant")
    start = write.text(before, for_answer=True)
    whole = write.text([*before, answer])
    if whole.startswith(start):
        return whole[len(start) :]
    found = write.behind_last_message(before, answer, start, whole)
    if found is None:
        found = write.behind_opened_thought(before, answer, start, whole, names)
    if found is None and _CLOSED.search(start) and THOUGHT_TAG.search(message_text(answer)):
        raise UserError(
            f"{names[1]}: has a thought, but the chat template ends {names[0]} with a closed one, as thinking is off; "
            "take the thought out, or turn thinking on for this row"
        )
    if found is None and (opened := _OPENED.search(start)) and not THOUGHT_TAG.search(message_text(answer)):
        raise UserError(write.no_thought(names[1], opened[0].lstrip(), _closing(opened[1])))
    if found is None:
        place = _first_difference(start, whole)
        raise UserError(
            f"{names[1]}: the chat template does not write {names[0]} with an answer as it does without: "
            f"{whole[place : place + _SHOWN]!r} instead of {start[place : place + _SHOWN]!r}; "
            "use a template that only adds to the prompt, or write the rows as text for --template plain"
        )
    return found


def render_parts(
    prompt: Content,
    response: Content,
    tokenizer: Tokenizer,
    arguments: TemplateArguments = NO_ARGUMENTS,
    *,
    names: tuple[str, str] = ("the prompt", "response"),
) -> list[ResponsePart]:
    """A response of any number of messages by the chat template, from the end of `render_prompt(prompt)` on.

    The first and the last part count. Joined behind the prompt, all parts are what the template writes for the whole
    conversation. Of a single message, `render_response` tells what it is.

    Raises UserError if the template writes a turn differently once later ones follow, so that the model is not trained
    on what it generated.
    """
    answers = as_messages(response, "assistant")
    if len(answers) == 1:
        return [ResponsePart(render_response(prompt, response, tokenizer, arguments, names=names), True)]
    write = _Writer(tokenizer, arguments)
    messages = [*as_messages(prompt, "user"), *answers]
    whole = write.text(messages)
    turns = [place for place, message in enumerate(messages) if message["role"] == "assistant"]
    turns = [place for place in turns if place >= len(messages) - len(answers)]
    starts = [write.text(messages[:turn], for_answer=True) for turn in turns]
    for turn, start in zip(turns, starts, strict=True):
        if not whole.startswith(start):
            raise _edited(f"{names[0]} and {names[1]} up to message {turn}", start, whole, names[1])
    parts = []
    for (start, following), turn in zip(pairwise(starts), turns, strict=False):
        alone = write.text(messages[: turn + 1])
        text = _generated(start, alone, following)
        if text is None:
            raise _edited(f"message {turn} (assistant)", alone, whole, names[1])
        parts += [ResponsePart(text, True), ResponsePart(following[len(start) + len(text) :], False)]
    return [*parts, ResponsePart(whole[len(starts[-1]) :], True)]


def _generated(start: str, alone: str, following: str) -> str | None:
    """What a turn that others follow is in the whole conversation; None if it is not what it was as the last turn.

    A template may write an empty thought before the last turn alone.

    Args:
        start: the conversation up to the turn.
        alone: the conversation up to the turn's end.
        following: the conversation up to the next turn, as it is in the whole one.
    """
    if following.startswith(alone):
        return alone[len(start) :] or None
    later = following[len(start) :]
    length = next((size for size in range(min(len(later), len(alone)), 0, -1) if alone.endswith(later[:size])), 0)
    left_out = alone[len(start) : len(alone) - length]
    is_empty_thought = alone.startswith(start) and not THOUGHT_TAG.sub("", left_out).strip()
    return later[:length] if length and is_empty_thought else None


def _edited(what: str, before: str, after: str, name: str) -> UserError:
    place = max(0, _first_difference(before, after) - _SHOWN_BEFORE)
    return UserError(
        f"{name}: the chat template edits earlier turns, so prompt and response do not concatenate; it writes {what} "
        f"as {after[place : place + _SHOWN]!r} once later turns follow, and {before[place : place + _SHOWN]!r} before "
        "that; take out what it drops there (such as thoughts), move the earlier turns into the prompt, or use another "
        "template"
    )


class _Writer:
    """Renders messages with the same arguments."""

    def __init__(self, tokenizer: Tokenizer, arguments: TemplateArguments) -> None:
        self._tokenizer = tokenizer
        self._arguments = arguments

    def text(self, messages: list[Message], for_answer: bool = False) -> str:
        text = self._tokenizer.render_chat(messages, for_answer, self._arguments)
        assert text is not None
        return text

    def behind_last_message(self, before: list[Message], answer: Message, start: str, whole: str) -> str | None:
        """The answer as the template writes it behind the last message alone, if that fits the whole prompt."""
        last = before[-1:]
        if len(before) == 1:
            return None
        alone, with_answer = self.text(last, for_answer=True), self.text([*last, answer])
        if not with_answer.startswith(alone):
            return None
        written = with_answer[len(alone) :]
        question = message_text(last[0]).strip()
        if not question:
            return None
        same_end = start.rpartition(question)[2] == alone.rpartition(question)[2]
        return written if question in start and same_end and whole.endswith(written) else None

    def behind_opened_thought(
        self, before: list[Message], answer: Message, start: str, whole: str, names: tuple[str, str]
    ) -> str | None:
        """The answer and the template's end of a turn, if the prompt only adds a thought's tag before the answer."""
        first, second = (self.text([*before, {"role": "assistant", "content": probe}]) for probe in _PROBES)
        header, found, end = first.rpartition(_PROBES[0])
        if not found or header + _PROBES[1] + end != second or not start.startswith(header):
            return None
        added, content = start[len(header) :], message_text(answer)
        if _CLOSED.search(added) and not THOUGHT_TAG.search(content):
            return self._as_written(content, content, end, whole)
        opened = _OPENED.search(added)
        if opened is None:
            return None
        closing = _closing(opened[1])
        if content.startswith(added):
            content = content[len(added) :]
        if closing not in content or opened[1] in content:
            raise UserError(self.no_thought(names[1], added, closing))
        return self._as_written(content, content.rpartition(closing)[2], end, whole)

    @staticmethod
    def _as_written(content: str, last: str, end: str, whole: str) -> str | None:
        """An answer with the template's end, if the template keeps its last part, white space at the ends aside."""
        if whole.endswith(last.lstrip() + end):
            return content + end
        return content.rstrip() + end if whole.endswith(last.strip() + end) else None

    def no_thought(self, name: str, added: str, closing: str) -> str:
        """What is wrong with an answer behind a prompt that ends with an opened thought."""
        switch = not unread_arguments(self._tokenizer, TemplateArguments({"enable_thinking": False}))
        option = """, or pass --chat-template-kwargs '{"enable_thinking": false}'""" if switch else ""
        return (
            f"{name}: the chat template begins every answer with {added!r}, so that the model thinks before it "
            f"answers, and this answer has no thought in that form; begin the answer with {added!r}, its thought "
            f"(which may be empty), {closing!r} and an empty line{option}"
        )


def _closing(tag: str) -> str:
    """The tag that ends what a tag begins."""
    return tag.replace("<", "</").replace("[", "[/")


def _first_difference(one: str, other: str) -> int:
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
