"""A directory is loaded by another process with nothing but its own files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_solopo.checkpoint.strict_load import TransformersError, load_strictly
from tests.conversions import QUERY, WEIGHTS, change
from tests.prepared import make_tokenizer
from tests.tiny_models import make_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_tokenizer(make_model(tmp_path / "hf", "llama2"))


def test_everything_of_a_directory_is_loaded(folder: Path) -> None:
    sequences = [torch.arange(9), torch.arange(4)]
    loaded, logits = load_strictly(folder, sequences)
    assert loaded.startswith("config, tokenizer, generation settings, weights: by transformers ")
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        expected = torch.cat([model(tokens.unsqueeze(0)).logits[0] for tokens in sequences])
    assert logits is not None and torch.equal(logits, expected)


def own_tokenizer(folder: Path) -> None:
    own = {"tokenizer_class": "OwnTokenizer", "auto_map": {"AutoTokenizer": ["own.OwnTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(own))


DAMAGE: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a missing tensor, which transformers would make at random": (
        lambda folder: change(folder / WEIGHTS, lambda each: each.pop(QUERY)),
        ["missing keys", QUERY],
    ),
    "a tokenizer with its own code": (own_tokenizer, ["contains custom code"]),
}


@pytest.mark.parametrize("situation", DAMAGE)
def test_what_transformers_only_warns_of_is_an_error(situation: str, folder: Path) -> None:
    damage, words = DAMAGE[situation]
    damage(folder)
    with pytest.raises(TransformersError) as error:
        load_strictly(folder, [torch.arange(4)])
    message = str(error.value)
    assert message.startswith(f"{folder}: transformers cannot load it: ") and "\n" not in message
    assert all(word in message for word in words), message
