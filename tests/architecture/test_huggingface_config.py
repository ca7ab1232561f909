"""What is read from a config.json is what transformers makes of it; what cannot be reproduced is refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.errors import UserError
from tests.tiny_models import FAMILIES, make_model

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 64}

REFUSED: list[tuple[str, dict[str, Any], list[str]]] = [
    ("llama2", {"model_type": "gpt2"}, ["model_type='gpt2'", "llama, mistral, qwen2, qwen3"]),
    ("llama2", {"model_type": "no_such_model"}, ["model_type='no_such_model'", "llama, mistral, qwen2, qwen3"]),
    ("llama2", {"model_type": None}, ["model_type=None", "llama, mistral, qwen2, qwen3"]),
    ("llama2", {"model_type": ["llama"]}, ["model_type=['llama']", "llama, mistral, qwen2, qwen3"]),
    (
        "llama2",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        ["rope_type='dynamic'", "default, linear, llama3, yarn"],
    ),
    ("llama2", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["rope_type='dynamic'", "default, linear"]),
    (
        "llama2",
        {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "factor": 2.0,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 64,
            }
        },
        ["rope_type='longrope'", "default, linear, llama3, yarn"],
    ),
    ("llama2", {"rope_parameters": LLAMA3}, ["llama3", "low_freq_factor", "high_freq_factor"]),
    ("llama2", {"rope_parameters": "yarn"}, ["rope_parameters", "yarn"]),
    ("mistral", {"sliding_window": 128}, ["sliding_window=128", "supported: null"]),
    ("qwen2", {"sliding_window": 128, "use_sliding_window": True}, ["sliding_window=128", "supported: null"]),
    (
        "qwen2",
        {"layer_types": ["full_attention", "sliding_attention"] * 2},
        ["layer_types=sliding_attention", "supported: full_attention"],
    ),
    ("llama2", {"hidden_act": "gelu"}, ["hidden_act='gelu'", "supported: 'silu'"]),
    ("llama2", {"attention_bias": True}, ["attention_bias=True", "supported: False"]),
    ("qwen3", {"attention_bias": True}, ["attention_bias=True", "supported: False"]),
    ("llama2", {"mlp_bias": True}, ["mlp_bias=True", "supported: False"]),
    (
        "llama2",
        {
            "rope_parameters": {
                "rope_type": "linear",
                "rope_theta": 1e4,
                "factor": 2.0,
                "partial_rotary_factor": 0.5,
            }
        },
        ["2 rotary frequencies", "head_dim=8", "supported: partial_rotary_factor 1.0"],
    ),
    (
        "llama2",
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        ["quantization_config with quant_method='gptq'", "supported: none"],
    ),
    ("llama2", {"hidden_size": "wide"}, ["hidden_size", "wide"]),
    ("llama2", {"rms_norm_eps": None}, ["rms_norm_eps"]),
    ("llama2", {"num_attention_heads": 3}, ["hidden size (32)", "attention heads (3)"]),
    ("llama2", {"num_attention_heads": 0}, ["transformers cannot read it"]),
    ("llama3", {"num_key_value_heads": 3}, ["num_key_value_heads=3", "num_attention_heads=4"]),
    ("llama3", {"num_hidden_layers": 0}, ["num_hidden_layers=0", "at least 1"]),
    ("llama3", {"vocab_size": -1}, ["vocab_size=-1", "at least 1"]),
]


def write(folder: Path, family: str, changes: dict[str, Any]) -> Path:
    """A config.json of `family` with some fields changed."""
    FAMILIES[family].save_pretrained(folder)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error:
        read_architecture(folder)
    message = str(error.value)
    assert message.startswith(f"{folder / 'config.json'}: ") and "\n" not in message and len(message) < 600
    return message.removeprefix(f"{folder / 'config.json'}: ")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_rotation_is_the_models_own(family: str, tmp_path: Path) -> None:
    found = read_architecture(write(tmp_path, family, {}))
    rotary = AutoModelForCausalLM.from_config(FAMILIES[family]).model.rotary_emb
    assert torch.equal(found.inv_freq, rotary.inv_freq) and found.inv_freq.dtype is torch.float32
    assert found.rotary_scale == rotary.attention_scaling
    assert (found.rotary_scale != 1.0) is (family == "qwen2_yarn")
    assert found.softmax_scale == pytest.approx(rotary.attention_scaling**2 / found.head_dim**0.5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_sizes_are_those_of_the_models_weights(family: str, tmp_path: Path) -> None:
    found = read_architecture(write(tmp_path, family, {}))
    model = AutoModelForCausalLM.from_config(FAMILIES[family])
    layer = model.model.layers[0]
    queries, keys = found.num_attention_heads * found.head_dim, found.num_query_groups * found.head_dim
    assert layer.self_attn.q_proj.weight.shape == (queries, found.hidden_size)
    assert layer.self_attn.k_proj.weight.shape == (keys, found.hidden_size)
    assert layer.mlp.gate_proj.weight.shape == (found.ffn_hidden_size, found.hidden_size)
    assert len(model.model.embed_tokens.weight) == found.vocab_size
    assert len(model.model.layers) == found.num_layers
    assert layer.input_layernorm.variance_epsilon == found.layernorm_epsilon
    assert (layer.self_attn.q_proj.bias is not None) is found.add_qkv_bias
    assert hasattr(layer.self_attn, "q_norm") is found.qk_layernorm
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is found.tied_embeddings


@pytest.mark.parametrize(
    ("family", "stated", "expected"),
    [
        ("llama2", 512, 512),
        ("llama3", 512, 512),
        ("llama_linear", 512, 512),
        # YaRN scales 64 positions to 256, whichever of the two the config states.
        ("qwen2_yarn", 64, 256),
        ("qwen2_yarn", 256, 256),
        ("qwen2_yarn", 300, 300),
    ],
)
def test_the_longest_sequence_includes_yarns_scaling(family, stated, expected, tmp_path) -> None:
    changes = {"max_position_embeddings": stated}
    assert read_architecture(write(tmp_path, family, changes)).max_sequence_length == expected


@pytest.mark.parametrize(
    ("family", "changes", "words"),
    REFUSED,
    ids=lambda value: "-".join(value) if isinstance(value, dict) else None,
)
def test_what_cannot_be_reproduced_is_refused_by_name(family, changes, words, tmp_path) -> None:
    message = refusal(write(tmp_path, family, changes))
    assert all(word in message for word in words), message


def test_a_sliding_window_that_is_off_is_accepted(tmp_path: Path) -> None:
    changes = {"sliding_window": 128, "use_sliding_window": False}
    assert read_architecture(write(tmp_path, "qwen2", changes)).model_type == "qwen2"


def test_a_missing_config_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path).startswith(
        "no such file; a model is a Hugging Face directory"
    ) and "model.path" in refusal(tmp_path)


@pytest.mark.parametrize("text", [b"{ nope", b"", b"\xff\xfe\x00\x81", b'{"model_type": "llama"'])
def test_broken_json_is_refused(text: bytes, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(text)
    assert refusal(tmp_path).startswith("not valid JSON: ")


@pytest.mark.parametrize("text", ["[1]", "null", '"llama"', "{}"])
def test_json_that_is_no_config_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert refusal(tmp_path).startswith("model_type=None is not supported; supported: ")


def test_a_models_own_code_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (tmp_path / "code.py").write_text(f"open({str(marker)!r}, 'w')\nclass Config: ...\n")
    message = refusal(write(tmp_path, "llama2", {"model_type": "own", "auto_map": {"AutoConfig": "code.Config"}}))
    assert "model_type='own'" in message and not marker.exists()


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_as_transformers_counts_them(family: str, tmp_path: Path) -> None:
    make_model(tmp_path, family)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert read_architecture(tmp_path).num_parameters == model.num_parameters()
