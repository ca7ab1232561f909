"""Whether a server read the whole prompt.

Some servers cut a prompt that is longer than their context, and answer with status 200 (Ollama: `num_ctx`). Only
`usage.prompt_tokens` tells.
"""

from megatron_solopo.errors import UserError
from megatron_solopo.generate.model import Request

_SPECIAL_TOKENS = 2
"""Special tokens at the start and the end, which a server may leave out."""
_TEMPLATE_TOKENS = 64
"""Tokens of a chat template that a server's own may leave out, such as a default system message."""
_OTHER_TOKENIZER = 0.25
"""Another tokenizer may need fewer tokens for a text, but not fewer than this share."""
_SHOWN = 10
_ALIKE = 3
_SPREAD = 1.25
"""A server cuts if this many prompts have the greatest length that it ever read, and theirs differ by this factor."""
_MANY_ALIKE = 5
"""It cuts, too, if this many prompts have that length and they are most of all prompts, however long they are."""


class PromptCheck:
    """Compares the tokens that a server read with our own count, for every reply.

    Args:
        server: Its URL, for the message.
        own_tokenizer: Whether our counts come from the tokenizer of the server's model. If not, only a cut to less
            than a quarter is told at once. A smaller cut is told once several prompts were cut alike.
    """

    def __init__(self, server: str, own_tokenizer: bool) -> None:
        self._server = server
        self._own_tokenizer = own_tokenizer
        self._longest_read = 0
        self._sent_for_longest: dict[str, int] = {}
        self._seen: set[str] = set()

    def check(self, request: Request, read: int | None) -> None:
        """Raise UserError if the server read fewer tokens than the prompt has.

        Args:
            read: Tokens of the prompt by the server's count; None where it does not say.
        """
        sent = request.prompt_tokens
        if read is None or sent is None:
            return
        if read > self._longest_read:
            self._longest_read, self._sent_for_longest = read, {}
        self._seen.add(request.question_id)
        allowed = _SPECIAL_TOKENS if isinstance(request.prompt, str) else _TEMPLATE_TOKENS
        if read >= sent - allowed:
            return
        if self._own_tokenizer or read < _OTHER_TOKENIZER * sent or self._cut_alike(request, read, sent):
            unless = "" if self._own_tokenizer else "; or name the tokenizer of its model in data build"
            if before := sorted(self._sent_for_longest.keys() - {request.question_id}):
                unless += f"; delete the answers to {', '.join(before[:_SHOWN])}, whose prompts were cut alike"
            raise UserError(
                f"--server {self._server}: read {read} of the {sent} tokens of a prompt ({request.question_id}), so it "
                "cuts prompts; give it a longer context (Ollama: num_ctx, llama.cpp: --ctx-size, vLLM: "
                f"--max-model-len and no truncation){unless}"
            )

    def _cut_alike(self, request: Request, read: int, sent: int) -> bool:
        """Whether the greatest length that the server ever read is that of several prompts."""
        if read < self._longest_read:
            return False
        self._sent_for_longest[request.question_id] = sent
        known = self._sent_for_longest.values()
        differ = len(known) >= _ALIKE and max(known) > _SPREAD * min(known)
        return differ or (len(known) >= _MANY_ALIKE and 2 * len(known) > len(self._seen))
