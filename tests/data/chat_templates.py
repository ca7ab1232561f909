"""Tokenizers with the chat templates of tests/inputs: each behaves as a published template does."""

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from tests.data.tiny_tokenizers import write_hugging_face

INPUTS = Path(__file__).parents[1] / "inputs"
# Tokens that a template writes, beside those that every tokenizer here has.
_TOKENS = {
    "think_opened_and_dropped": ["<|User|>", "<|Assistant|>", "<think>", "</think>"],
    "think_dropped": ["<|User|>", "<|Assistant|>"],
    "system_in_last_turn": ["[INST]", "[/INST]"],
    "todays_date": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
}
NAMES = tuple(sorted(path.stem.removeprefix("chat_template_") for path in INPUTS.glob("chat_template_*.jinja")))


def read_template(name: str) -> str:
    return (INPUTS / f"chat_template_{name}.jinja").read_text()


def write_tokenizer(path: Path, name: str, eos_token: str | None = None, end_tokens: tuple[str, ...] = ()) -> str:
    """A tokenizer directory with a template of tests/inputs. Returns its path.

    eos_token: that of the tokenizer; if not given, the one that ends a turn.
    end_tokens: those of generation_config.json; if none, there is no such file.
    """
    write_hugging_face(path)
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    tokenizer.add_tokens(_TOKENS.get(name, ["<think>", "</think>"]), special_tokens=name == "todays_date")
    tokenizer.eos_token = eos_token or ("<|eot_id|>" if name == "todays_date" else "<|im_end|>")
    tokenizer.chat_template = read_template(name)
    tokenizer.save_pretrained(path)
    (path / "generation_config.json").unlink()
    if end_tokens:
        ids = tokenizer.convert_tokens_to_ids(list(end_tokens))
        (path / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return str(path)


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


_SHORT, _LONG = [user("What is 2+2?")], [user("Text. What is 2+2?")]


def row(chosen: str, rejected: str, short: Any = _SHORT, long: Any = _LONG, **fields: Any) -> dict[str, Any]:
    answers = {"chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    return {"id": "x", "prompt_short": short, "prompt_long": long, **answers, **fields}


ROWS = {
    "plain": row("It is 4.", "It is 5."),
    "system": row("It is 4.", "It is 5.", [system("Be brief."), *_SHORT], [system("Be brief."), *_LONG]),
    "thought": row("<think>\ntwo and two\n</think>\n\nIt is 4.", "<think>\nguess\n</think>\n\nIt is 5."),
    "only_thoughts_differ": row("<think>\ntwo and two\n</think>\n\nIt is 4.", "<think>\nguess\n</think>\n\nIt is 4."),
    "half_thought": row("two and two\n</think>\n\nIt is 4.", "guess\n</think>\n\nIt is 5."),
    "several_turns": row(
        "It is 4.",
        "It is 5.",
        [user("Hi"), assistant("<think>\nhm\n</think>\n\nHello"), *_SHORT],
        [user("Hi"), assistant("Hello"), *_LONG],
    ),
    "outer_white_space": row("  indented code\n    x = 1\n\n", "no", [user("Q")], [user("T Q")]),
}
"""A row for each kind of content."""
