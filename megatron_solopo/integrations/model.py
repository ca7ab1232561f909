"""Makes a GPTModel that someone else has built ready for packs: checks it, and gives it the response-only head."""

import math
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer import TransformerConfig

from megatron_solopo.architecture.huggingface import Architecture
from megatron_solopo.model.head import attach_response_head


def prepare_model(model: Any, architecture: Architecture, chunk_tokens: int) -> None:
    """Check a model chunk and its configuration, and change in place what packs need.

    Raises ValueError naming each setting that differs from `architecture`, or that packs do not go with.
    """
    if not isinstance(model, GPTModel):
        raise ValueError(
            f"the model is a {type(model).__name__}; expected a GPTModel (of any subclass), not yet wrapped"
        )
    _check_architecture(model, architecture)
    check_transformer_config(model.config)
    # Packs differ in length, so shapes travel with each pipeline message. Megatron-LM's arguments forbid it.
    model.config.variable_seq_lengths = True
    # transformers' own frequencies, whatever the rope type.
    model.rotary_pos_emb.inv_freq = architecture.inv_freq.clone()
    attach_response_head(model, real_vocab_size=architecture.vocab_size, chunk_tokens=chunk_tokens)


def check_transformer_config(config: TransformerConfig) -> None:
    """Raise ValueError naming the settings that give wrong gradients, or none at all, with packs of triplets."""
    interleaved = config.virtual_pipeline_model_parallel_size is not None
    wrong = {
        "calculate_per_token_loss": (config.calculate_per_token_loss, True),
        "hidden_dropout": (config.hidden_dropout, 0.0),
        "attention_dropout": (config.attention_dropout, 0.0),
        "fp16": (config.fp16, False),
        "num_moe_experts": (config.num_moe_experts, None),
        "mtp_num_layers": (config.mtp_num_layers, None),
        "defer_embedding_wgrad_compute": (config.defer_embedding_wgrad_compute, False),
        "tp_comm_overlap": (config.tp_comm_overlap, False),
        "cuda_graph_impl": (config.cuda_graph_impl, "none"),
        # The other combination swaps forward and backward tensors in the interleaved schedule.
        "overlap_p2p_comm": (config.overlap_p2p_comm or not interleaved, True),
        "batch_p2p_comm": (config.batch_p2p_comm and interleaved, False),
    }
    _refuse(wrong, "the model's TransformerConfig does not go with packs of triplets")


def _check_architecture(model: GPTModel, architecture: Architecture) -> None:
    config, a = model.config, architecture
    scale = config.softmax_scale or 1 / math.sqrt(config.kv_channels)
    settings: dict[str, tuple[Any, Any]] = {
        "num_layers": (config.num_layers, a.num_layers),
        "hidden_size": (config.hidden_size, a.hidden_size),
        "ffn_hidden_size": (config.ffn_hidden_size, a.ffn_hidden_size),
        "num_attention_heads": (config.num_attention_heads, a.num_attention_heads),
        "num_query_groups": (config.num_query_groups or config.num_attention_heads, a.num_query_groups),
        "kv_channels": (config.kv_channels, a.head_dim),
        "layernorm_epsilon": (config.layernorm_epsilon, a.layernorm_epsilon),
        "softmax_scale": (a.softmax_scale if math.isclose(scale, a.softmax_scale) else scale, a.softmax_scale),
        "add_qkv_bias": (config.add_qkv_bias, a.add_qkv_bias),
        "qk_layernorm": (config.qk_layernorm, a.qk_layernorm),
        "normalization": (config.normalization, "RMSNorm"),
        "gated_linear_unit": (config.gated_linear_unit, True),
        "add_bias_linear": (config.add_bias_linear, False),
        "rotary_interleaved": (config.rotary_interleaved, False),
        "position_embedding_type": (model.position_embedding_type, "rope"),
        "share_embeddings_and_output_weights": (model.share_embeddings_and_output_weights, a.tied_embeddings),
        "vocab_size": (min(model.vocab_size, a.vocab_size), a.vocab_size),
    }
    _refuse(settings, "the model is not that of config.json")


def _refuse(settings: dict[str, tuple[Any, Any]], problem: str) -> None:
    differing = [
        f"{name} is {found!r}, expected {expected!r}"
        for name, (found, expected) in settings.items()
        if found != expected
    ]
    if differing:
        raise ValueError(f"{problem}: {'; '.join(differing)}")
