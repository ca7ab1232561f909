"""Prompts of documents and a question, and the lengths in tokens of prompts and responses.

Lengths are exactly those that `data prepare` will make.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from jinja2 import StrictUndefined
from jinja2.sandbox import ImmutableSandboxedEnvironment

from megatron_solopo.data.messages import Content
from megatron_solopo.data.rendering import render_prompt, render_response
from megatron_solopo.data.row_files import read_text_file
from megatron_solopo.data.settings import Template
from megatron_solopo.data.template_arguments import NO_ARGUMENTS, TemplateArguments
from megatron_solopo.data.tokenizer import Tokenizer, raised_in_template
from megatron_solopo.errors import UserError
from megatron_solopo.triplets.corpus.formats import Document

DEFAULT_TEMPLATE = """\
Answer the question from the passages below. Reason step by step, name the passage that each step rests on, \
and end with "So the answer is:" and the answer.
{% for document in documents %}
{% if document.title %}Title: {{ document.title }}
{% endif %}{{ document.text }}
{% endfor %}
Question: {{ question }}

Answer:
"""
# Text of no corpus. It shows where the template begins and ends a document.
_PROBE = Document("Qxqz", "Qxqz vrrk.")


class PromptTemplate:
    """A Jinja template over `documents` (each with `title` and `text`) and `question`.

    Args:
        text: The template. It must write every document and the question once.
        titles: Whether documents show their titles.
        template: plain: prompts are strings. chat: a prompt is one user message.

    Raises UserError if the text is no template, or if it leaves a document or the question out.
    """

    def __init__(self, text: str, *, titles: bool, template: Template) -> None:
        # The template may come from somebody else. In the sandbox it can compute text and nothing else.
        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False
        )
        self._titles = titles
        self._template = template
        try:
            self._jinja = environment.from_string(text)
            probed = self.text([_PROBE, Document("Other", "Another.")], "Who was it?")
        except Exception as error:
            if not raised_in_template(error):
                raise
            reason = " ".join(str(error).split())
            raise UserError(f"--prompt-template: not a usable Jinja template: {reason}") from error
        for name, value in (("documents", _PROBE.text), ("documents", "Another."), ("question", "Who was it?")):
            if probed.count(value) != 1:
                raise UserError(
                    f"--prompt-template: must write each of `{name}` once, as {{{{ {name} }}}} or in a loop"
                )

    def text(self, documents: Sequence[Document], question: str) -> str:
        """The prompt as text."""
        shown = documents if self._titles else [Document("", document.text) for document in documents]
        return self._jinja.render(documents=shown, question=question)

    def prompt(self, documents: Sequence[Document], question: str) -> Content:
        """The prompt as a row of a triplet file has it."""
        text = self.text(documents, question)
        return text if self._template == "plain" else [{"role": "user", "content": text}]

    def framed(self, documents: Sequence[Document]) -> str:
        """The text of documents between two others, from the text of the first to the text of the second.

        A document adds the same number of tokens to `framed([])` as to a prompt, unless the tokenizer merges across
        documents.
        """
        text = self.text([_PROBE, *documents, _PROBE], "?")
        return text[text.index(_PROBE.text) : text.rindex(_PROBE.text) + len(_PROBE.text)]


def read_template(path: Path | None) -> str:
    """The user's template, or the default one. Raises UserError if the file cannot be read."""
    if path is None:
        return DEFAULT_TEMPLATE
    return read_text_file(path, "--prompt-template")


class Measure:
    """Counts tokens. Special tokens and those of the chat template are included."""

    def __init__(self, tokenizer: Tokenizer, template: Template, arguments: TemplateArguments = NO_ARGUMENTS) -> None:
        self._tokenizer = tokenizer
        self._template = template
        self._arguments = arguments

    def prompt(self, prompt: Content) -> int:
        """Tokens of a prompt, up to the start of the response."""
        if self._template == "plain":
            return self._tokenizer.count(str(prompt), add_special_tokens=True)
        return self._tokenizer.count(render_prompt(prompt, self._tokenizer, self._arguments), add_special_tokens=False)

    def response(self, prompt: Content, response: str) -> int:
        """Tokens of a response to a prompt, with its end token or the template's end of a message."""
        if self._template == "plain":
            return len(self._tokenizer.encode_continuation(response)) + 1
        rendered = render_response(prompt, response, self._tokenizer, self._arguments)
        return len(self._tokenizer.encode_continuation(rendered))

    def document_counter(self, prompt: PromptTemplate) -> Callable[[Sequence[Document]], list[int]]:
        """A function that gives the tokens that each document adds to a prompt. It tokenizes each document once."""
        frame = self._tokenizer.count(prompt.framed([]), add_special_tokens=False)

        def count(documents: Sequence[Document]) -> list[int]:
            framed = (prompt.framed([document]) for document in documents)
            return [self._tokenizer.count(text, add_special_tokens=False) - frame for text in framed]

        return count
