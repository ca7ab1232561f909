"""The figures of published models, as their config.json states them, give the shapes of transformers and Megatron.

Models are made on the meta device: shapes alone, no memory.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_solopo.architecture.huggingface_config import Architecture, read_architecture
from megatron_solopo.checkpoint import megatron_writer
from megatron_solopo.checkpoint.huggingface_weights import StoredTensor
from megatron_solopo.checkpoint.mapping import all_huggingface_shapes, megatron_shape, place, rules
from megatron_solopo.config import ModelConfig, ParallelConfig
from megatron_solopo.model.build import build_model
from megatron_solopo.model.resolve import resolve_model
from tests.parity.plain import published
from tests.ranks import layout

pytestmark = pytest.mark.parity

_LLAMA = {"model_type": "llama", "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "max_position_embeddings": 131072}
_LLAMA31 = _LLAMA | {
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    }
}
_QWEN25 = {
    "model_type": "qwen2",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "max_position_embeddings": 32768,
    "use_sliding_window": False,
    "sliding_window": 131072,
}


def figures(
    hidden: int, ffn: int, layers: int, heads: int, groups: int, vocab: int, tied: bool = False
) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab,
        "tie_word_embeddings": tied,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }


# Config and published number of parameters.
MODELS: dict[str, tuple[dict[str, Any], int]] = {
    "Llama-2-7B": (
        _LLAMA | {"rope_theta": 10000.0, "max_position_embeddings": 4096} | figures(4096, 11008, 32, 32, 32, 32000),
        6_738_415_616,
    ),
    "Llama-3.1-8B": (_LLAMA31 | figures(4096, 14336, 32, 32, 8, 128256), 8_030_261_248),
    "Llama-3.1-70B": (_LLAMA31 | figures(8192, 28672, 80, 64, 8, 128256), 70_553_706_496),
    "Llama-3.2-1B": (_LLAMA31 | figures(2048, 8192, 16, 32, 8, 128256, tied=True) | {"head_dim": 64}, 1_235_814_400),
    "Qwen2.5-0.5B": (_QWEN25 | figures(896, 4864, 24, 14, 2, 151936, tied=True), 494_032_768),
    "Qwen2.5-7B": (_QWEN25 | figures(3584, 18944, 28, 28, 4, 152064), 7_615_616_512),
    "Qwen2.5-72B": (_QWEN25 | figures(8192, 29568, 80, 64, 8, 152064), 72_706_203_648),
    "Qwen3-32B": (
        _QWEN25
        | figures(5120, 25600, 64, 64, 8, 151936)
        | {"model_type": "qwen3", "head_dim": 128, "max_position_embeddings": 40960, "attention_bias": False}
        | {"sliding_window": None},
        32_762_123_264,
    ),
    "Mixtral-8x7B": (
        figures(4096, 14336, 32, 32, 8, 32000)
        | {"model_type": "mixtral", "num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5}
        | {"rope_theta": 1000000.0, "max_position_embeddings": 32768, "sliding_window": None},
        46_702_792_704,
    ),
    "OLMoE-1B-7B": (
        figures(2048, 1024, 16, 16, 16, 50304)
        | {"model_type": "olmoe", "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False}
        | {"rms_norm_eps": 1e-5, "rope_theta": 10000.0, "max_position_embeddings": 4096, "clip_qkv": None},
        6_919_161_856,
    ),
    "Qwen1.5-MoE-A2.7B": (
        _QWEN25
        | figures(2048, 5632, 24, 16, 16, 151936)
        | {"model_type": "qwen2_moe", "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408}
        | {"shared_expert_intermediate_size": 5632, "norm_topk_prob": False, "decoder_sparse_step": 1},
        14_315_784_192,
    ),
    "Mistral-7B-v0.3": (
        figures(4096, 14336, 32, 32, 8, 32768)
        | {"model_type": "mistral", "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "max_position_embeddings": 32768}
        | {"sliding_window": None},
        7_248_023_552,
    ),
}


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Architecture, int]:
    config, parameters = MODELS[request.param]
    (tmp_path / "config.json").write_text(json.dumps(config))
    return tmp_path, read_architecture(tmp_path), parameters


def test_the_table_has_the_shapes_of_transformers(model) -> None:
    path, architecture, parameters = model
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
    named = published(dict(theirs.named_parameters()), theirs.config.model_type)
    assert all_huggingface_shapes(architecture) == {name: tuple(each.shape) for name, each in named.items()}
    assert architecture.num_parameters == theirs.num_parameters() == parameters


def test_the_checkpoint_has_the_keys_and_shapes_that_megatron_asks_for(model, monkeypatch) -> None:
    path, architecture, _ = model
    with layout():
        # Megatron names the device of its parameters itself, instead of taking torch's default.
        monkeypatch.setattr(torch.cuda, "current_device", lambda: torch.device("meta"))
        config = ModelConfig(path=path, dtype="bfloat16", implementation="local")
        with torch.device("meta"):
            model = resolve_model(config, ParallelConfig(), architecture=architecture)
            (chunk,) = build_model(model, chunk_tokens=8, device=torch.device("meta"))
            asked = [
                part
                for each in chunk.sharded_state_dict().values()
                for part in (each.build() if isinstance(each, ShardedTensorFactory) else [each])
                for part in (part if isinstance(part, list) else [part])
            ]
    tensors = {each.key: tuple(each.global_shape) for each in asked if isinstance(each, ShardedTensor)}
    objects = {each.unique_key for each in asked if isinstance(each, ShardedObject)}
    expected = {}
    for rule in rules(architecture).values():
        where = place(rule, architecture)
        expected[where.key] = (*where.stack, *megatron_shape(rule, architecture))
    padded = {key: (-(-shape[0] // 128) * 128, *shape[1:]) for key, shape in expected.items() if "decoder" not in key}
    assert tensors == expected | padded
    assert set(megatron_writer._extra_states(architecture)) == objects


def test_pieces_of_a_checkpoint_are_small_and_cover_it(model) -> None:
    _, architecture, parameters = model
    names = all_huggingface_shapes(architecture)

    class Source:
        path = "source"
        entries = {name: StoredTensor("model.safetensors", (), "BF16") for name in names}  # noqa: RUF012

    pieces = list(megatron_writer._pieces(Source(), architecture))  # type: ignore[arg-type]
    assert sum(piece.nbytes for piece in pieces) == 2 * parameters
    # A group of queries with its key and value heads is not cut, and is the largest piece.
    group = 2 * architecture.hidden_size * (megatron_group(architecture) * architecture.head_dim)
    assert max(piece.nbytes for piece in pieces) <= max(1 << 24, group)
    assert len({(piece.item.index.fqn, tuple(piece.item.index.offset)) for piece in pieces}) == len(pieces)


def megatron_group(architecture: Architecture) -> int:
    """Heads of a key-value group: queries, key, value."""
    return architecture.num_attention_heads // architecture.num_query_groups + 2
