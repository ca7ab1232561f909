"""Tokenizers with templates for tools and many turns, each as a published model documents it, and rows for them."""

import json
import re
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tests.data.chat_templates import INPUTS, assistant, system, user
from tests.data.tiny_tokenizers import write_hugging_face

# The tokens that end an answer: that of the tokenizer, then those of generation_config.json alone.
_END_TOKENS = {
    "llama_3": ["<|eot_id|>"],
    "qwen2_5": ["<|im_end|>"],
    "qwen3": ["<|im_end|>"],
    "mistral": ["</s>"],
    "smollm2": ["<|im_end|>"],
    "gpt_oss": ["<|return|>", "<|call|>"],
    "deepseek_v3": ["<\uff5cend\u2581of\u2581sentence\uff5c>"],
}
_SPECIAL = re.compile(r"<[|\uff5c][^'\"<>]+>|</?[a-z_]+[|]?>|\[/?[A-Z_]+\]")
TEMPLATES = tuple(_END_TOKENS)


def write_tokenizer(path: Path, name: str) -> str:
    """A tokenizer directory with a template of tests/inputs. Returns its path."""
    with_template(path, (INPUTS / f"conversation_template_{name}.jinja").read_text(), _END_TOKENS[name])
    return str(path)


def with_template(path: Path, template: str, ends: list[str] | None = None) -> Path:
    """A tokenizer directory with a template, whose special tokens it has. Returns its path.

    ends: the tokens that end an answer; None: those of the tokenizer without the template.
    """
    write_hugging_face(path, chat_template=template)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens([*(ends or []), *dict.fromkeys(_SPECIAL.findall(template))], special_tokens=True)
    if ends:
        tokenizer.eos_token = ends[0]
        ids = tokenizer.convert_tokens_to_ids(ends)
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    tokenizer.save_pretrained(path)
    return path


def call(place: str, **more: Any) -> dict[str, Any]:
    """A message that asks for the weather at a place."""
    function = {"name": "weather", "arguments": {"place": place}}
    calls = [{"id": "call00001", "type": "function", "function": function}]
    return {"role": "assistant", "content": None, "tool_calls": calls} | more


def result(text: str) -> dict[str, str]:
    return {"role": "tool", "content": text, "name": "weather", "tool_call_id": "call00001"}


PARAMETERS = {"type": "object", "properties": {"place": {"type": "string"}}}
TOOLS = [{"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": PARAMETERS}}]
QUESTION = user("Is it warm in Turin?")


def row(prompt: list[Any], chosen: list[Any], **fields: Any) -> dict[str, Any]:
    long = [*prompt[:-1], user("The river Po.")] if prompt[-1] != QUESTION else [*prompt[:-1], user("The river Po. ?")]
    return {
        "id": "x",
        "prompt_short": prompt,
        "prompt_long": long,
        "chosen": chosen,
        "rejected": [assistant("It cannot be told.")],
        **fields,
    }


ROWS = {
    "history": row(
        [system("Be brief."), user("Hi"), assistant("Hello."), QUESTION, call("Turin"), result("18"), assistant("Yes."),
         QUESTION],
        [assistant("It is 18.")],
        tools=TOOLS,
    ),
    "tools": row([QUESTION], [call("Turin"), result("18 degrees"), assistant("It is warm: 18.")], tools=TOOLS),
    "two_calls": row(
        [system("Be brief."), QUESTION],
        [call("Turin"), result('{"no": "data"}'), call("the river Po"), result("18"), assistant("Yes: 18.")],
        tools=TOOLS,
    ),
    "turns": row([QUESTION], [assistant("Where is it?"), user("By the Po."), assistant("Then it is.")]),
    "thoughts": row(
        [QUESTION],
        [
            call("Turin", reasoning_content="I must ask."),
            result("18"),
            assistant("It is.") | {"reasoning_content": "18 is warm."},
        ],
        tools=TOOLS,
    ),
    "last_thought": row(
        [QUESTION],
        [call("Turin"), result("18"), assistant("It is.") | {"thinking": "18 is warm."}],
        tools=TOOLS,
    ),
}  # fmt: skip
"""A row for each kind of conversation."""
