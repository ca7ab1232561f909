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
_OTHER_TOKENIZER = 0.5
"""With another tokenizer, a text never has less than this share of the tokens."""
_SPREAD = 1.25
"""If prompts whose lengths differ by this factor have one length on the server, the server cuts them."""


class PromptCheck:
    """Compares the tokens that a server read with our own count, for every reply.

    Args:
        server: Its URL, for the message.
        own_tokenizer: Whether our counts come from the tokenizer of the server's model. If not, only a cut to less
            than half is told at once. A smaller cut is told once two prompts of different lengths were cut alike.
    """

    def __init__(self, server: str, own_tokenizer: bool) -> None:
        self._server = server
        self._own_tokenizer = own_tokenizer
        self._shortened: dict[int, tuple[int, int]] = {}

    def check(self, request: Request, read: int | None) -> None:
        """Raise UserError if the server read fewer tokens than the prompt has.

        Args:
            read: Tokens of the prompt by the server's count; None where it does not say.
        """
        sent = request.prompt_tokens
        if read is None or sent is None:
            return
        allowed = _SPECIAL_TOKENS if isinstance(request.prompt, str) else _TEMPLATE_TOKENS
        if read >= sent - allowed:
            return
        if self._own_tokenizer or read < _OTHER_TOKENIZER * sent or self._cut_alike(read, sent):
            unless = "" if self._own_tokenizer else "; or name the tokenizer of its model in data build"
            raise UserError(
                f"--server {self._server}: read {read} of the {sent} tokens of a prompt ({request.question_id}), so it "
                "cuts prompts; give it a longer context (Ollama: num_ctx, llama.cpp: --ctx-size, vLLM: "
                f"--max-model-len and no truncation){unless}"
            )

    def _cut_alike(self, read: int, sent: int) -> bool:
        least, most = self._shortened.get(read, (sent, sent))
        self._shortened[read] = min(least, sent), max(most, sent)
        return max(most, sent) > _SPREAD * min(least, sent)
