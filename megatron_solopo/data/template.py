"""One row's prompts and responses as tokens, by the chat template or as plain text.

Prompt and response are encoded separately, so that no token spans their boundary, and the same response has
the same tokens behind the short and the long prompt.
"""

from typing import Literal

from megatron_solopo.data.row import Content, Message
from megatron_solopo.data.tokenizer import Tokenizer

Template = Literal["chat", "plain"]


def tokenize_row(
    prompts: dict[str, Content], responses: dict[str, Content], tokenizer: Tokenizer, template: Template
) -> dict[str, list[int]]:
    """Token ids of one row's prompts and responses, by name.

    Raises ValueError where the template refuses the messages or a text has no tokens.
    """
    if template == "chat":
        texts = _render(prompts, responses, tokenizer)
        ids = {name: tokenizer.encode(texts[name], add_special_tokens=False) for name in prompts}
        ids |= {name: tokenizer.encode_continuation(texts[name]) for name in responses}
        ends: list[int] = []
    else:
        assert tokenizer.eos_token_id is not None
        ids = {name: tokenizer.encode(str(text), add_special_tokens=True) for name, text in prompts.items()}
        ids |= {name: tokenizer.encode_continuation(str(text)) for name, text in responses.items()}
        ends = [tokenizer.eos_token_id]
    for name, tokens in ids.items():
        if not tokens:
            raise ValueError(f"{name}: tokenizes to nothing")
    if ids["chosen"] == ids["rejected"]:
        raise ValueError("rejected: has the same tokens as chosen")
    return {name: tokens + ends if name in responses else tokens for name, tokens in ids.items()}


def _render(prompts: dict[str, Content], responses: dict[str, Content], tokenizer: Tokenizer) -> dict[str, str]:
    """Texts by the chat template: a prompt up to where the answer starts, a response from there on."""
    texts: dict[str, str] = {}
    for prompt_name, prompt in prompts.items():
        messages = _as_messages(prompt, "user")
        prompt_text = tokenizer.render_chat(messages, add_generation_prompt=True)
        assert prompt_text is not None
        texts[prompt_name] = prompt_text
        for name, response in responses.items():
            whole = tokenizer.render_chat(messages + _as_messages(response, "assistant"), add_generation_prompt=False)
            assert whole is not None
            if not whole.startswith(prompt_text):
                raise ValueError(
                    f"{name}: the chat template does not write {prompt_name} with an answer as it does without"
                )
            if texts.setdefault(name, whole[len(prompt_text) :]) != whole[len(prompt_text) :]:
                raise ValueError(f"{name}: the chat template writes it differently behind {prompt_name}")
    return texts


def _as_messages(content: Content, role: str) -> list[Message]:
    return [{"role": role, "content": content}] if isinstance(content, str) else content
