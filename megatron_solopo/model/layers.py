"""The modules of a transformer layer: Transformer Engine's, or plain PyTorch with our own attention and norm."""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset

from megatron_solopo.model.attention import PackedAttention
from megatron_solopo.model.head_norms import AllHeadsNormAttention
from megatron_solopo.parallel.megatron_internals import allow_router_without_transformer_engine


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight gradient is summed over the tensor-parallel ranks under sequence parallelism.

    Megatron-Core's local norm refuses sequence parallelism; `finalize_model_grads` does the sum
    for every parameter that bears the `sequence_parallel` mark.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def layer_spec(
    config: TransformerConfig, *, transformer_engine: bool, vp_stage: int | None, norms_all_heads: bool = False
) -> ModuleSpec | Any:
    """Return the decoder's spec, as GPTModel takes it.

    Args:
        vp_stage: number of the virtual pipeline stage, or None where a rank has one chunk.
        norms_all_heads: whether one norm takes the queries of all heads, and one the keys.
    """
    spec = _layer_spec(config, transformer_engine, vp_stage)
    if norms_all_heads:
        for layer in spec.layer_specs:
            layer.submodules.self_attention.module = AllHeadsNormAttention
    return spec


def _layer_spec(config: TransformerConfig, transformer_engine: bool, vp_stage: int | None) -> ModuleSpec | Any:
    if transformer_engine:
        if config.num_moe_experts is not None:
            return get_gpt_decoder_block_spec(config, use_transformer_engine=True, vp_stage=vp_stage)
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    first = get_transformer_layer_offset(config, vp_stage=vp_stage)
    count = get_num_layers_to_build(config, vp_stage=vp_stage)
    kinds = {has_experts: _plain_layer(config, has_experts) for has_experts in set(layers_with_experts(config))}
    layers = [kinds[each] for each in layers_with_experts(config)[first : first + count]]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=SequenceParallelRMSNorm)


def layers_with_experts(config: TransformerConfig) -> list[bool]:
    """For each layer of the whole model, whether it has experts."""
    if config.num_moe_experts is None:
        return [False] * config.num_layers
    pattern = config.moe_layer_freq
    if isinstance(pattern, int):
        return [layer % pattern == 0 for layer in range(config.num_layers)]
    return [bool(each) for each in pattern]


def layers_and_routers(chunk: torch.nn.Module) -> list[tuple[TransformerLayer, TopKRouter]]:
    """The layers of a model chunk that have experts, each with its router."""
    layers = (module for module in chunk.modules() if isinstance(module, TransformerLayer))
    return [(layer, layer.mlp.router) for layer in layers if isinstance(layer.mlp, MoELayer)]


def _plain_layer(config: TransformerConfig, has_experts: bool) -> ModuleSpec:
    """A layer of plain PyTorch."""
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts if has_experts else None,
        moe_grouped_gemm=False,
        normalization="RMSNorm",
        qk_layernorm=config.qk_layernorm,
    )
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = SequenceParallelRMSNorm
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = SequenceParallelRMSNorm
    if has_experts:
        allow_router_without_transformer_engine()
        # Here Transformer Engine fuses the norm into nothing, so checkpoints store it under its own name.
        names = layer.submodules.sharded_state_dict_keys_map
        layer.submodules.sharded_state_dict_keys_map = {
            name: stored for name, stored in names.items() if name != "pre_mlp_layernorm."
        }
    return layer
