"""Two files of one tokenizer directory that contradict each other are refused with both statements."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sentencepiece import SentencePieceTrainer
from tokenizers import Tokenizer, models
from transformers import AutoTokenizer

from megatron_solopo.data.tokenizer import load_tokenizer
from megatron_solopo.data.tokenizer_contradictions import check_tokenizer_files
from megatron_solopo.errors import UserError
from tests.prepared import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def folder(tokenizer: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tokenizer, tmp_path / "tokenizer"))


def add_settings(folder: Path, **settings: Any) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


def write_templates(folder: Path, jinja: str, setting: Any) -> None:
    (folder / "chat_template.jinja").write_text(jinja)
    add_settings(folder, chat_template=setting)


def write_json(folder: Path, name: str, content: Any) -> None:
    (folder / name).write_text(json.dumps(content))


def added(number: int, content: str) -> dict[str, Any]:
    return {"added_tokens_decoder": {str(number): {"content": content, "special": True}}}


def two_named_templates(folder: Path) -> None:
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    add_settings(folder, chat_template=[{"name": "tool_use", "template": "{{ 1 }}"}])


def write_sentencepiece(folder: Path, *, shift: int) -> None:
    """A SentencePiece model, and a tokenizer.json with its pieces at ids that are higher by `shift`."""
    text = folder.parent / "text"
    text.write_text("the hall in velmora has two doors\nit is old\n")
    SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder.parent / "m"), vocab_size=40, hard_vocab_limit=False, minloglevel=2
    )
    shutil.move(folder.parent / "m.model", folder / "tokenizer.model")
    pieces = [line.split("\t")[0] for line in (folder.parent / "m.vocab").read_text().splitlines()]
    vocabulary = {piece: number + shift * (number > 5) for number, piece in enumerate(pieces)}
    Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>")).save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").unlink()


def processor_template(folder: Path) -> None:
    write_templates(folder, "A", "A")
    write_json(folder, "chat_template.json", {"chat_template": "C"})


DIFFERENT: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "two templates": (
        lambda folder: write_templates(folder, "{{ messages }}A", "{{ messages }}B"),
        ["chat_template.jinja has 'A'", "tokenizer_config.json has 'B'", "from character 14"],
    ),
    "a processor's template": (
        processor_template,
        ["chat_template.jinja has 'A'", "chat_template.json has 'C'"],
    ),
    "two named templates": (two_named_templates, ["'tool_use'", "additional_chat_templates/tool_use.jinja"]),
    "two end tokens": (
        lambda folder: write_json(folder, "special_tokens_map.json", {"eos_token": {"content": "w3"}}),
        ["eos_token='</s>' in tokenizer_config.json", "eos_token='w3' in special_tokens_map.json"],
    ),
    "vocab.json with another id": (
        lambda folder: write_json(folder, "vocab.json", {"w2": 3, "w3": 2}),
        ["'w2' has id 3 in vocab.json and id 2 in tokenizer.json"],
    ),
    "vocab.json with another token": (
        lambda folder: write_json(folder, "vocab.json", {"w2": 2, "new": 131}),
        ["'new' is in vocab.json and not in tokenizer.json"],
    ),
    "added_tokens.json": (lambda folder: write_json(folder, "added_tokens.json", {"</s>": 7}), ["id 7", "id 0"]),
    "added_tokens_decoder": (lambda folder: add_settings(folder, **added(9, "w3")), ["'w3' has id 9", "id 3"]),
    "tokenizer.model": (lambda folder: write_sentencepiece(folder, shift=1), ["tokenizer.model", "tokenizer.json"]),
}


@pytest.mark.parametrize("situation", DIFFERENT)
def test_both_statements_are_named(situation: str, folder: Path) -> None:
    damage, words = DIFFERENT[situation]
    damage(folder)
    with pytest.raises(UserError) as error:
        load_tokenizer(folder)
    message = str(error.value)
    assert message.startswith(f"{folder}: ") and "\n" not in message
    assert all(word in message for word in words), message


SAME: dict[str, Callable[[Path], object]] = {
    "a template with and without its last line end": lambda folder: write_templates(folder, "{{ 1 }}\n", "{{ 1 }}"),
    "the same end token": lambda folder: write_json(folder, "special_tokens_map.json", {"eos_token": "</s>"}),
    "another padding token": lambda folder: write_json(folder, "special_tokens_map.json", {"pad_token": "w3"}),
    "a vocabulary twice": lambda folder: write_json(folder, "vocab.json", {"w2": 2, "w3": 3}),
    "a new added token": lambda folder: write_json(folder, "added_tokens.json", {"<new>": 131}),
    "a SentencePiece model twice": lambda folder: write_sentencepiece(folder, shift=0),
}


@pytest.mark.parametrize("situation", SAME)
def test_the_same_statement_twice_is_no_contradiction(situation: str, folder: Path) -> None:
    SAME[situation](folder)
    check_tokenizer_files(folder)


def test_transformers_takes_the_file_of_special_tokens(folder: Path) -> None:
    """The reason for the refusal: llama.cpp takes the other one."""
    write_json(folder, "special_tokens_map.json", {"eos_token": "w3"})
    assert AutoTokenizer.from_pretrained(folder).eos_token == "w3"
