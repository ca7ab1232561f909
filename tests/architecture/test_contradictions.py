"""Statements of one config.json that differ: refused with both values, because loaders read different ones."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from megatron_solopo.architecture.contradictions import CLASSES
from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.errors import UserError
from tests.tiny_models import FAMILIES

LINEAR = {"rope_type": "linear", "factor": 2.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def write(folder: Path, family: str, **changes: Any) -> Path:
    FAMILIES[family].save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"rope_theta": 5e5}, ["rope_theta=500000.0", "rope_parameters.rope_theta=10000.0"]),
        ({"rope_scaling": LLAMA3 | {"rope_theta": 2e4}}, ["rope_parameters.rope_theta=10000.0", "=20000.0"]),
        ({"rope_scaling": LINEAR}, ["'llama3'", "'linear'", "transformers 4 reads the second"]),
        ({"rope_scaling": LLAMA3 | {"factor": 4.0}}, ["'factor': 8.0", "'factor': 4.0"]),
        ({"rope_scaling": None}, ["'llama3'", "rope_scaling=None"]),
        ({"rope_scaling": LLAMA3 | {"type": "linear"}}, ["rope_type='llama3'", "type='linear'"]),
        ({"dtype": "float32", "torch_dtype": "bfloat16"}, ["dtype='float32'", "torch_dtype='bfloat16'"]),
        ({"text_config": {"num_hidden_layers": 2}}, ["text_config holds a second config"]),
        ({"architectures": ["Qwen2ForCausalLM"]}, ["'Qwen2ForCausalLM'", "model_type='llama'", "'LlamaForCausalLM'"]),
    ],
)
def test_both_values_are_named(changes: dict[str, Any], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_architecture(write(tmp_path, "llama3", **changes))
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'config.json'}: ") and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama3", {"rope_theta": 10000, "rope_scaling": LLAMA3}),
        ("llama3", {"rope_scaling": LLAMA3 | {"type": "llama3"}}),
        ("llama2", {"rope_theta": 1e4, "rope_scaling": None}),
        ("llama2", {"dtype": "bfloat16", "torch_dtype": "torch.bfloat16"}),
        ("llama2", {"architectures": ["OwnForCausalLM"], "auto_map": {"AutoModelForCausalLM": "own.OwnForCausalLM"}}),
        ("llama2", {"architectures": None}),
    ],
)
def test_two_statements_of_the_same_are_read(family: str, changes: dict[str, Any], tmp_path: Path) -> None:
    twice, once = (
        read_architecture(write(tmp_path / "2", family, **changes)),
        read_architecture(write(tmp_path, family)),
    )
    assert torch.equal(twice.inv_freq, once.inv_freq)
    assert replace(twice, rotary_fields={}) == replace(once, rotary_fields={})


def test_transformers_loses_theta_where_only_one_writing_has_it(tmp_path: Path) -> None:
    """The reason for the refusal: nothing that transformers prints says that theta is now the default."""
    parameters = {"rope_type": "default", "rope_theta": 5e5}
    theirs = AutoConfig.from_pretrained(write(tmp_path, "llama2", rope_parameters=parameters, rope_scaling=LINEAR))
    assert theirs.rope_parameters["rope_theta"] == 1e4
    with pytest.raises(UserError, match=r"rope_parameters.*500000"):
        read_architecture(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_classes_are_those_of_transformers(family: str) -> None:
    from transformers import AutoModelForCausalLM

    config = FAMILIES[family]
    assert type(AutoModelForCausalLM.from_config(config)).__name__ == CLASSES[config.model_type]
