"""Small random-weight Hugging Face models of every supported family."""

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.config import LoRAConfig

ROUTER = "mlp.gate.weight"
IDLE_EXPERT = 1
"""Its logits are 0 in every layer, so that other experts have larger ones for almost every token."""
VOCAB_SIZE = 131  # prime: divisible by no tensor-parallel size
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_YARN_ROPE = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
_EXPERTS: dict[str, Any] = {"num_experts": 16, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama2": LlamaConfig(**_SHAPE | {"num_key_value_heads": 4}),
    "llama3": LlamaConfig(**_SHAPE, rope_parameters=_LLAMA3_ROPE),
    "llama3_tied": LlamaConfig(**_SHAPE | {"tie_word_embeddings": True}, rope_parameters=_LLAMA3_ROPE),
    "llama_linear": LlamaConfig(
        **_SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    ),
    "mistral": MistralConfig(**_SHAPE, head_dim=16, sliding_window=None),
    "qwen2": Qwen2Config(**_SHAPE),
    "qwen2_tied": Qwen2Config(**_SHAPE | {"tie_word_embeddings": True}),
    "qwen2_yarn": Qwen2Config(**_SHAPE | {"max_position_embeddings": 256}, rope_parameters=_YARN_ROPE),
    "qwen3": Qwen3Config(**_SHAPE, head_dim=16),
    "qwen3_moe": Qwen3MoeConfig(**_SHAPE, **_EXPERTS, head_dim=16, norm_topk_prob=True),
    # Layers 0 and 3 are dense.
    "qwen2_moe": Qwen2MoeConfig(
        **_SHAPE, **_EXPERTS, shared_expert_intermediate_size=16, norm_topk_prob=False, mlp_only_layers=[0, 3]
    ),
    "olmoe": OlmoeConfig(
        **_SHAPE | {"intermediate_size": 24, "num_key_value_heads": 4},
        num_experts=16,
        num_experts_per_tok=2,
        norm_topk_prob=False,
        pad_token_id=None,  # 1 is a token like any other here
        eos_token_id=None,
    ),
    "mixtral": MixtralConfig(**_SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None),
}

TINY = ModelShape(
    model_type="llama",
    num_layers=4,
    hidden_size=32,
    ffn_hidden_size=48,
    num_attention_heads=4,
    num_query_groups=4,
    head_dim=8,
    vocab_size=VOCAB_SIZE,
    max_sequence_length=512,
    add_qkv_bias=False,
    qk_layernorm=False,
    tied_embeddings=False,
)
"""The shape of `llama2`, for tests that need no weights."""


def make_model(path: Path, family: str, seed: int = 0, **changes: Any) -> Path:
    """Save a model with weights large enough that no gradient is lost in rounding. Returns `path`.

    Args:
        changes: fields of the family's config that differ.
    """
    torch.manual_seed(seed)
    config = FAMILIES[family]
    model = AutoModelForCausalLM.from_config(type(config)(**config.to_dict() | changes), dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.15)
            if name.endswith(ROUTER):
                parameter[IDLE_EXPERT] = 0.0
    model.save_pretrained(path)
    return path


def adapter_folder(model: Path, lora: LoRAConfig) -> Path:
    """Where `make_adapter` puts adapters of these settings."""
    return model / f"adapter-{lora.rank}"


def make_adapter(model: Path, lora: LoRAConfig) -> Path:
    """Let PEFT save random adapters of a model, whose A and B are not zero; returns their folder."""
    from peft import LoraConfig, get_peft_model  # slow to import

    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        use_rslora=lora.use_rslora,
        target_modules=lora.target_modules,
        init_lora_weights=False,
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(2)
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    get_peft_model(base, settings).save_pretrained(adapter_folder(model, lora))
    return adapter_folder(model, lora)
