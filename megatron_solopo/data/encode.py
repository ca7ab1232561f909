"""From preference rows to token columns, by the chat template or as plain text.

Prompt and response are encoded separately. So no token crosses their boundary, and a response has the same tokens
behind the short and the long prompt.
"""

import json
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value

from megatron_solopo.data.prepared import PROMPT_COLUMNS
from megatron_solopo.data.rows import DEPTHS_FIELD, PROMPT_FIELDS, RESPONSE_FIELDS, Content, Kind, Message, read_rows
from megatron_solopo.data.settings import Template
from megatron_solopo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_solopo.errors import UserError

# Rows of 128K tokens are 1.5 MB, so the writer holds few of them.
_WRITER_BATCH_ROWS = 64


def tokenize_rows(
    path: Path,
    kind: Kind,
    tokenizer_path: str,
    tokenizer_fingerprint: str,
    template: Template,
    *,
    num_proc: int,
    work: Path,
) -> Dataset:
    """Tokenize a valid file into Arrow files under `work`, row by row in the file's order.

    Columns: id, line, problem, evidence_depths and the token columns. If a row cannot be tokenized, `problem` says why
    and the token columns are empty. For all other rows `problem` is "".
    """
    carried = {"id": Value("string"), "line": Value("int64"), DEPTHS_FIELD: List(Value("float32"))}
    rows = Dataset.from_generator(
        _generate_rows,
        features=Features({**carried, "contents": Value("large_string")}),
        gen_kwargs={"path": path},
        cache_dir=str(work),
        writer_batch_size=_WRITER_BATCH_ROWS,
    )
    tokens = {name: List(Value("int32")) for name in (*PROMPT_COLUMNS[kind], *RESPONSE_FIELDS)}
    return rows.map(
        _tokenize_record,
        fn_kwargs={
            "kind": kind,
            "tokenizer_path": tokenizer_path,
            "tokenizer_fingerprint": tokenizer_fingerprint,
            "template": template,
        },
        features=Features({**carried, "problem": Value("string"), **tokens}),
        remove_columns=["contents"],
        num_proc=num_proc if num_proc > 1 else None,
        cache_file_name=str(work / "tokens.arrow"),
        load_from_cache_file=False,
        writer_batch_size=_WRITER_BATCH_ROWS,
        desc="Tokenizing",
    )


def tokenize_row(
    prompts: dict[str, Content], responses: dict[str, Content], tokenizer: Tokenizer, template: Template
) -> dict[str, list[int]]:
    """Token ids of one row's prompts and responses, by name.

    Raises UserError if the template refuses the messages, if a text has no tokens, or if the responses are equal.
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
            raise UserError(f"{name}: tokenizes to nothing")
    if ids["chosen"] == ids["rejected"]:
        raise UserError("rejected: has the same tokens as chosen")
    return {name: tokens + ends if name in responses else tokens for name, tokens in ids.items()}


def _generate_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows in one Arrow schema for strings and messages: the contents are JSON."""
    for row in read_rows(path):
        assert not row.errors and row.id is not None
        carried = {"id": row.id, "line": row.line, DEPTHS_FIELD: row.evidence_depths}
        yield {**carried, "contents": json.dumps(row.contents)}


def _tokenize_record(
    record: dict[str, Any], kind: Kind, tokenizer_path: str, tokenizer_fingerprint: str, template: Template
) -> dict[str, Any]:
    contents: dict[str, Content] = json.loads(record["contents"])
    prompts = {column: contents[name] for column, name in zip(PROMPT_COLUMNS[kind], PROMPT_FIELDS[kind], strict=True)}
    responses = {name: contents[name] for name in RESPONSE_FIELDS}
    tokenizer = _process_tokenizer(tokenizer_path, tokenizer_fingerprint)
    problem = ""
    try:
        ids = tokenize_row(prompts, responses, tokenizer, template)
    except UserError as error:
        ids = {name: [] for name in (*prompts, *responses)}
        problem = str(error)
    return {"problem": problem} | {name: np.asarray(tokens, np.int32) for name, tokens in ids.items()}


@lru_cache(maxsize=1)
def _process_tokenizer(path: str, fingerprint: str) -> Tokenizer:
    """One tokenizer per worker process. The fingerprint tells a replaced directory from the old one."""
    return load_tokenizer(path)


def _render(prompts: dict[str, Content], responses: dict[str, Content], tokenizer: Tokenizer) -> dict[str, str]:
    """Texts by the chat template: prompts up to the start of the answer, responses from there on."""
    texts: dict[str, str] = {}
    for prompt_name, prompt in prompts.items():
        texts[prompt_name] = render_prompt(prompt, tokenizer)
        for name, response in responses.items():
            text = render_response(prompt, response, tokenizer, names=(prompt_name, name))
            if texts.setdefault(name, text) != text:
                raise UserError(f"{name}: the chat template writes it differently behind {prompt_name}")
    return texts


def render_prompt(prompt: Content, tokenizer: Tokenizer) -> str:
    """A prompt by the chat template, up to the start of the answer. The tokenizer must have a template."""
    text = tokenizer.render_chat(_as_messages(prompt, "user"), add_generation_prompt=True)
    assert text is not None
    return text


def template_of(prompt: Content) -> Template:
    """The template that `--template auto` chooses for a prompt."""
    return "plain" if isinstance(prompt, str) else "chat"


def encode_prompt(prompt: Content, tokenizer: Tokenizer, template: Template) -> list[int]:
    """Token ids of a prompt up to the start of the answer."""
    if template == "plain":
        return tokenizer.encode(str(prompt), add_special_tokens=True)
    return tokenizer.encode(render_prompt(prompt, tokenizer), add_special_tokens=False)


def render_response(
    prompt: Content, response: Content, tokenizer: Tokenizer, *, names: tuple[str, str] = ("the prompt", "response")
) -> str:
    """A response by the chat template, from the end of `render_prompt(prompt)` on.

    Args:
        names: Names of the prompt and the response in an error.

    Raises UserError if the template writes the prompt differently once an answer follows.
    """
    prompt_text = render_prompt(prompt, tokenizer)
    messages = _as_messages(prompt, "user") + _as_messages(response, "assistant")
    whole = tokenizer.render_chat(messages, add_generation_prompt=False)
    assert whole is not None
    if not whole.startswith(prompt_text):
        raise UserError(f"{names[1]}: the chat template does not write {names[0]} with an answer as it does without")
    return whole[len(prompt_text) :]


def check_template(template: Template, tokenizer: Tokenizer, tokenizer_path: str) -> None:
    """Raise UserError if the tokenizer lacks what the template needs."""
    if template == "chat" and tokenizer.chat_template is None:
        raise UserError(
            f"{tokenizer_path}: has no chat template; use another tokenizer, or strings and --template plain"
        )
    if template == "plain" and tokenizer.eos_token_id is None:
        raise UserError(f"{tokenizer_path}: has no end-of-sequence token, which --template plain puts after a response")


def _as_messages(content: Content, role: str) -> list[Message]:
    return [{"role": role, "content": content}] if isinstance(content, str) else content
