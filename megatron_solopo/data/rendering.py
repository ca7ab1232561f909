"""Prompts and responses as text and tokens, by the chat template or as they are.

A prompt is what a server renders for the same messages: the template's text up to the start of the answer. A response
is what the model must generate behind that text. Usually the template writes the prompt with an answer as it does
without, and the response is the rest. Two other forms are known:

    system text only in the last turn   The system message moves once an answer follows. The response is what the
                                        template writes behind the last message alone.
    a thought is opened in the prompt   The prompt ends with a tag such as <think>. The response is the answer without
                                        this beginning, and the template's end of a turn.
"""

import re

from megatron_solopo.data.rows import Content, Message
from megatron_solopo.data.settings import Template
from megatron_solopo.data.template_arguments import NO_ARGUMENTS, TemplateArguments
from megatron_solopo.data.tokenizer import Tokenizer
from megatron_solopo.errors import UserError

THOUGHT_TAG = re.compile(r"\s*(</?(?:seed:)?think(?:ing)?>|\[/?THINK\])\s*")
_OPENED = re.compile(r"(<(?:seed:)?think(?:ing)?>|\[THINK\])\s*\Z")
_CLOSED = re.compile(r"(</(?:seed:)?think(?:ing)?>|\[/THINK\])\s*\Z")
# Two answers that no template changes. What stands around both is the template's.
_PROBES = ("Qxqz vrrk", "Zwlm jpty")


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
    if found is None and _CLOSED.search(start) and THOUGHT_TAG.search(answer["content"]):
        raise UserError(
            f"{names[1]}: has a thought, but the chat template ends {names[0]} with a closed one, as thinking is off; "
            "take the thought out, or turn thinking on for this row"
        )
    if found is None:
        place = _first_difference(start, whole)
        raise UserError(
            f"{names[1]}: the chat template does not write {names[0]} with an answer as it does without: "
            f"{whole[place : place + 40]!r} instead of {start[place : place + 40]!r}; use a template that only adds to "
            "the prompt, or write the rows as text for --template plain"
        )
    return found


def as_messages(content: Content, role: str) -> list[Message]:
    """The messages of a content. A string is one message."""
    return [{"role": role, "content": content}] if isinstance(content, str) else content


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
        question = last[0]["content"].strip()
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
        added, content = start[len(header) :], answer["content"]
        if _CLOSED.search(added) and not THOUGHT_TAG.search(content):
            return self._as_written(content, content, end, whole)
        opened = _OPENED.search(added)
        if opened is None:
            return None
        closing = opened[1].replace("<", "</").replace("[", "[/")
        if content.startswith(added):
            content = content[len(added) :]
        if closing not in content or opened[1] in content:
            raise UserError(self._no_thought(names[1], added, closing))
        return self._as_written(content, content.rpartition(closing)[2], end, whole)

    @staticmethod
    def _as_written(content: str, last: str, end: str, whole: str) -> str | None:
        """An answer with the template's end, if the template keeps its last part, white space at the ends aside."""
        if whole.endswith(last.lstrip() + end):
            return content + end
        return content.rstrip() + end if whole.endswith(last.strip() + end) else None

    def _no_thought(self, name: str, added: str, closing: str) -> str:
        switch = not unread_arguments(self._tokenizer, TemplateArguments({"enable_thinking": False}))
        option = """, or pass --chat-template-kwargs '{"enable_thinking": false}'""" if switch else ""
        return (
            f"{name}: the chat template begins every answer with {added!r}, so that the model thinks before it "
            f"answers, and this answer has no thought in that form; begin the answer with {added!r}, its thought "
            f"(which may be empty), {closing!r} and an empty line{option}"
        )


def _first_difference(one: str, other: str) -> int:
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
