"""A prepared directory of random token ids, written by the real `data prepare`."""

import json
import random
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_solopo.data.settings import PrepareSettings
from megatron_solopo.data.tokenize import prepare
from tests.tiny_models import VOCAB_SIZE


def make_tokenizer(path: Path) -> Path:
    """A word-level tokenizer over w0, w1, ... with as many tokens as the tiny models have."""
    words = {"</s>": 0, "<unk>": 1} | {f"w{number}": number for number in range(2, VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>").save_pretrained(path)
    return path


def write_triplets(path: Path, rows: int, seed: int) -> Path:
    """Random triplets of 4..60 words as JSONL."""
    generator = random.Random(seed)

    def words(least: int, most: int) -> str:
        return " ".join(f"w{generator.randrange(2, VOCAB_SIZE)}" for _ in range(generator.randint(least, most)))

    lines = [
        {
            "id": f"row-{number}",
            "prompt_short": words(4, 12),
            "prompt_long": words(20, 60),
            "chosen": words(1, 9),
            "rejected": words(1, 9),
            "evidence_depths": [[], [number / rows], [number / rows, 1.0]][number % 3],
        }
        for number in range(rows)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


TURNS = (
    "{% for turn in messages %}{{ {'user': 'w2 ', 'assistant': 'w3 ', 'tool': 'w4 '}[turn.role] }}"
    "{{ turn.content }} </s> {% endfor %}{% if add_generation_prompt %}w3 {% endif %}"
)
"""A chat template of words that `make_tokenizer` knows."""


def make_conversations(path: Path, *, rows: int, eval_count: int, seed: int) -> Path:
    """Like `make_prepared`, but a tool speaks between two turns of each response, so that some tokens do not count."""
    source = write_triplets(path.with_suffix(".jsonl"), rows, seed)
    lines = [json.loads(line) for line in source.read_text().splitlines()]
    for line in lines:
        for name in ("prompt_short", "prompt_long"):
            line[name] = [{"role": "user", "content": line[name]}]
        for name in ("chosen", "rejected"):
            said = ("assistant", line[name]), ("tool", f"w11 {line[name]}"), ("assistant", "w12 w13")
            line[name] = [{"role": role, "content": content} for role, content in said]
    source.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = make_tokenizer(path.with_suffix(".tokenizer"))
    (tokenizer / "chat_template.jinja").write_text(TURNS)
    prepare(PrepareSettings(input=source, output=path, tokenizer=str(tokenizer), eval_count=eval_count, seed=seed))
    return path


_FIELDS = {
    "pair": {"prompt_long": "prompt", "chosen": "chosen", "rejected": "rejected"},
    "instruction": {"prompt_short": "prompt", "chosen": "completion"},
}
"""The fields of a triplet that rows of another kind keep, and their names there."""


def make_prepared(path: Path, *, rows: int, eval_count: int, seed: int, kind: str = "triplet") -> Path:
    """Write rows of a kind, tokenize them, and return the prepared directory."""
    source = write_triplets(path.with_suffix(".jsonl"), rows, seed)
    if kind != "triplet":
        lines = [json.loads(line) for line in source.read_text().splitlines()]
        kept = [{name: line[field] for field, name in _FIELDS[kind].items()} for line in lines]
        source.write_text("".join(json.dumps(line) + "\n" for line in kept))
    prepare(
        PrepareSettings(
            input=source,
            output=path,
            tokenizer=str(make_tokenizer(path.with_suffix(".tokenizer"))),
            eval_count=eval_count,
            seed=seed,
        )
    )
    return path
