"""Lengths in tokens of prompts and responses, exactly as `data prepare` will make them."""

from collections.abc import Callable, Sequence

from megatron_solopo.data.corpus.question import Document
from megatron_solopo.data.encode import Template, render_prompt, render_response
from megatron_solopo.data.prompt import PromptTemplate
from megatron_solopo.data.row import Content
from megatron_solopo.data.tokenizer import Tokenizer


class Measure:
    """Counts tokens, special ones and the chat template's included.

    Args:
        tokenizer: The model's own.
        template: plain or chat, see `data.tokenize.prepare`.
    """

    def __init__(self, tokenizer: Tokenizer, template: Template) -> None:
        self._tokenizer = tokenizer
        self._template = template

    def prompt(self, prompt: Content) -> int:
        """Tokens of a prompt, up to where the response starts."""
        if self._template == "plain":
            return self._tokenizer.count(str(prompt), add_special_tokens=True)
        return self._tokenizer.count(render_prompt(prompt, self._tokenizer), add_special_tokens=False)

    def response(self, prompt: Content, response: str) -> int:
        """Tokens of a response to a prompt, its end token or the template's end of a message included."""
        if self._template == "plain":
            return len(self._tokenizer.encode_continuation(response)) + 1
        rendered = render_response(prompt, response, self._tokenizer)
        return len(self._tokenizer.encode_continuation(rendered))

    def document_counter(self, prompt: PromptTemplate) -> Callable[[Sequence[Document]], list[int]]:
        """A function that tells what each of some documents adds to a prompt, each tokenized once."""
        frame = self._tokenizer.count(prompt.framed([]), add_special_tokens=False)

        def count(documents: Sequence[Document]) -> list[int]:
            framed = (prompt.framed([document]) for document in documents)
            return [self._tokenizer.count(text, add_special_tokens=False) - frame for text in framed]

        return count
