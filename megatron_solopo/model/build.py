"""Builds this rank's model chunks from an architecture and the parallel layout."""

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig

from megatron_solopo.architecture.huggingface_config import Architecture
from megatron_solopo.architecture.layout import check_layout, padded_vocab_size
from megatron_solopo.config import ModelConfig, ParallelConfig
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.model.layer_spec import layer_spec, uses_transformer_engine
from megatron_solopo.model.precision import precision_settings
from megatron_solopo.parallel.megatron_internals import (
    has_fused_weight_gradients,
    pipeline_settings,
    set_rotary_frequencies,
)


def transformer_config(architecture: Architecture, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """Megatron-Core's configuration of this model under this layout.

    `calculate_per_token_loss` makes the gradient the exact mean over the triplets of the global
    batch: our loss function reports triplets where Megatron counts tokens.
    """
    check_layout(architecture, parallel)
    dtype = getattr(torch, model.dtype)
    on_gpu_kernels = uses_transformer_engine(model)
    return TransformerConfig(
        num_layers=architecture.num_layers,
        hidden_size=architecture.hidden_size,
        ffn_hidden_size=architecture.ffn_hidden_size,
        num_attention_heads=architecture.num_attention_heads,
        num_query_groups=architecture.num_query_groups,
        kv_channels=architecture.head_dim,
        softmax_scale=architecture.softmax_scale,
        layernorm_epsilon=architecture.layernorm_epsilon,
        add_qkv_bias=architecture.add_qkv_bias,
        qk_layernorm=architecture.qk_layernorm,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        # Weights are loaded afterwards, so zeros do. Initialization must not be skipped: it marks the
        # tensor-parallel parameters, and without the marks the gradient norm misses their shards.
        init_method=torch.nn.init.zeros_,
        output_layer_init_method=torch.nn.init.zeros_,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=has_fused_weight_gradients(),
        # Megatron's fusions compile at run time; plain kernels where there is no GPU to gain from them.
        bias_activation_fusion=on_gpu_kernels,
        bias_dropout_fusion=on_gpu_kernels,
        apply_rope_fusion=on_gpu_kernels,
        masked_softmax_fusion=False,
        **precision_settings(model),
        **_layout_settings(parallel),
        **_memory_settings(parallel),
    )


def _layout_settings(parallel: ParallelConfig) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "context_parallel_size": parallel.context_parallel_size,
        "sequence_parallel": parallel.uses_sequence_parallel,
        "cp_comm_type": parallel.cp_comm_type,
        "deallocate_pipeline_outputs": True,
        **pipeline_settings(interleaved=parallel.virtual_pipeline_model_parallel_size is not None),
    }


def _memory_settings(parallel: ParallelConfig) -> dict[str, Any]:
    full_recompute = parallel.recompute_granularity == "full"
    return {
        "recompute_granularity": parallel.recompute_granularity,
        "recompute_method": parallel.recompute_method if full_recompute else None,
        "recompute_num_layers": parallel.recompute_num_layers if full_recompute else None,
        "recompute_modules": list(parallel.recompute_modules),
        "cpu_offloading": parallel.cpu_offloading_num_layers > 0,
        "cpu_offloading_num_layers": parallel.cpu_offloading_num_layers,
    }


def build_model(
    architecture: Architecture, model: ModelConfig, parallel: ParallelConfig, *, chunk_tokens: int, device: torch.device
) -> list[ResponseModel]:
    """This rank's model chunks (one, or one per virtual pipeline stage), weights not yet loaded.

    Raises UserError for a layout that does not fit the model.
    """
    config = transformer_config(architecture, model, parallel)
    chunks = parallel.virtual_pipeline_model_parallel_size
    stages: list[int | None] = list(range(chunks)) if chunks else [None]
    return [build_chunk(architecture, config, model, chunk_tokens, stage).to(device) for stage in stages]


def build_chunk(
    architecture: Architecture,
    config: TransformerConfig,
    model: ModelConfig,
    chunk_tokens: int,
    vp_stage: int | None,
) -> ResponseModel:
    """One model chunk of this rank under a TransformerConfig, whoever made it; weights not yet loaded.

    Args:
        vp_stage: number of the virtual pipeline stage, or None where there is one chunk per rank.
    """
    stage = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    chunk = ResponseModel(
        config,
        layer_spec(config, model, vp_stage),
        vocab_size=padded_vocab_size(architecture.vocab_size, config.tensor_model_parallel_size),
        max_sequence_length=architecture.max_sequence_length,
        pre_process=parallel_state.is_pipeline_first_stage(**stage),
        post_process=parallel_state.is_pipeline_last_stage(**stage),
        parallel_output=True,
        share_embeddings_and_output_weights=architecture.tied_embeddings,
        position_embedding_type="rope",
        vp_stage=vp_stage,
        real_vocab_size=architecture.vocab_size,
        chunk_tokens=chunk_tokens,
    )
    set_rotary_frequencies(chunk, architecture.inv_freq.clone())
    return chunk
