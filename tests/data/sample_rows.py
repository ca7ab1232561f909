"""Preference rows whose prompts and responses tell by themselves which row they are of."""

import json

from megatron_solopo.data import tokenize
from megatron_solopo.data.prepared import PreparedManifest
from megatron_solopo.data.settings import PrepareSettings


def triplet(index, long_words=20):
    return {
        "id": f"row-{index}",
        "prompt_short": f"Where was author {index} born? Answer:",
        "prompt_long": "The river Po. " * long_words + f"Where was author {index} born? Answer:",
        "chosen": f" In Turin, {index}.",
        "rejected": " It cannot be told.",
    }


def as_messages(row):
    return {
        name: text
        if name == "id"
        else [{"role": "user" if name.startswith("prompt") else "assistant", "content": text.strip()}]
        for name, text in row.items()
    }


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def prepare(input, output, tokenizer, **options) -> PreparedManifest:
    return tokenize.prepare(PrepareSettings(input=input, output=output, tokenizer=tokenizer, **options))
