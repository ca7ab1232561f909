"""Builds this rank's model chunks."""

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig

from megatron_solopo.architecture.layout import padded_vocab_size
from megatron_solopo.config import ModelConfig, ParallelConfig
from megatron_solopo.model.attention import attach_shared_prompts
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.model.layers import layer_spec
from megatron_solopo.model.resolve import ResolvedModel
from megatron_solopo.parallel.megatron_internals import (
    dispatcher_settings,
    has_fused_weight_gradients,
    pipeline_settings,
    set_rotary_frequencies,
)


def transformer_config(model: ResolvedModel) -> TransformerConfig:
    """Return Megatron-Core's configuration of a model under its layout.

    `calculate_per_token_loss` makes the gradient the exact mean over the triplets of the global batch: our loss
    function reports triplets where Megatron counts tokens.
    """
    architecture = model.architecture
    dtype = getattr(torch, model.settings.dtype)
    fuses = model.uses_transformer_engine
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
        # Weights are loaded afterwards, so zeros do. Initialization must not be skipped, because it marks the
        # tensor-parallel parameters: without the marks the gradient norm would miss their shards.
        init_method=torch.nn.init.zeros_,
        output_layer_init_method=torch.nn.init.zeros_,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=has_fused_weight_gradients(),
        # These fusions compile at run time, which pays only beside the kernels of a GPU.
        bias_activation_fusion=fuses,
        bias_dropout_fusion=fuses,
        apply_rope_fusion=fuses,
        masked_softmax_fusion=False,
        **_expert_settings(model),
        **precision_settings(model.settings),
        **_layout_settings(model.parallel),
        **_memory_settings(model.parallel),
    )


def _expert_settings(model: ResolvedModel) -> dict[str, Any]:
    """The fields of Megatron-Core's TransformerConfig for a mixture of experts. No token is ever dropped."""
    experts = model.architecture.experts
    if experts is None:
        return {}
    return {
        "num_moe_experts": experts.num_experts,
        "moe_router_topk": experts.topk,
        "moe_ffn_hidden_size": experts.ffn_hidden_size,
        "moe_layer_freq": 1 if experts.in_all_layers else [int(has_experts) for has_experts in experts.layers],
        "moe_shared_expert_intermediate_size": experts.shared_ffn_hidden_size or None,
        "moe_shared_expert_gate": experts.shared_ffn_hidden_size > 0,
        # A softmax over the chosen experts alone is that over all of them, divided by the sum of the chosen.
        "moe_router_pre_softmax": not experts.renormalizes,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_grouped_gemm": model.uses_transformer_engine,
    }


def _layout_settings(parallel: ParallelConfig) -> dict[str, Any]:
    return {
        "tensor_model_parallel_size": parallel.tensor_model_parallel_size,
        "pipeline_model_parallel_size": parallel.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline_model_parallel_size,
        "pipeline_model_parallel_layout": parallel.pipeline_model_parallel_layout,
        "context_parallel_size": parallel.context_parallel_size,
        "expert_model_parallel_size": parallel.expert_model_parallel_size,
        "expert_tensor_parallel_size": parallel.expert_tensor_size,
        "sequence_parallel": parallel.uses_sequence_parallel,
        "cp_comm_type": parallel.cp_comm_type,
        "hierarchical_context_parallel_sizes": parallel.hierarchical_context_parallel_sizes,
        "deallocate_pipeline_outputs": True,
        **pipeline_settings(interleaved=parallel.virtual_pipeline_model_parallel_size is not None),
        **dispatcher_settings(parallel.moe_token_dispatcher_type),
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


def precision_settings(settings: ModelConfig) -> dict[str, Any]:
    """Return the fields of Megatron-Core's TransformerConfig for FP8."""
    if settings.fp8 is None:
        return {}
    return {
        "fp8": settings.fp8,
        "fp8_recipe": settings.fp8_recipe,
        "fp8_param": settings.fp8_param,
        # The usual history in Megatron-LM and Transformer Engine. The default of Megatron-Core (1) has none.
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": settings.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": settings.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": settings.num_layers_at_end_in_bf16,
    }


def precision_defaults() -> dict[str, Any]:
    """What a field of `precision_settings` is where it is not set: Megatron-Core's own default."""
    return {field.name: field.default for field in dataclasses.fields(TransformerConfig)}


def build_model(model: ResolvedModel, *, chunk_tokens: int, device: torch.device) -> list[ResponseModel]:
    """Build this rank's model chunks: one, or one per virtual pipeline stage. Their weights are not loaded yet."""
    config = transformer_config(model)
    chunks = model.parallel.virtual_pipeline_model_parallel_size
    stages: list[int | None] = list(range(chunks)) if chunks else [None]
    return [build_chunk(model, config, chunk_tokens=chunk_tokens, vp_stage=stage).to(device) for stage in stages]


def build_chunk(
    model: ResolvedModel, config: TransformerConfig, *, chunk_tokens: int, vp_stage: int | None
) -> ResponseModel:
    """Build one model chunk of this rank under a TransformerConfig, whoever made it. Its weights are not loaded yet.

    Args:
        vp_stage: number of the virtual pipeline stage, or None where a rank has one chunk.
    """
    architecture = model.architecture
    stage = {"ignore_virtual": vp_stage is None, "vp_stage": vp_stage}
    chunk = ResponseModel(
        config,
        layer_spec(
            config,
            transformer_engine=model.uses_transformer_engine,
            vp_stage=vp_stage,
            norms_all_heads=model.architecture.norms_all_heads,
        ),
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
    attach_shared_prompts(chunk, parallel_state.get_context_parallel_group())
    return chunk
