"""Which modules a transformer layer is made of."""

from typing import Any

import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build

from megatron_solopo.config import ModelConfig
from megatron_solopo.errors import UserError
from megatron_solopo.model.attention import PackedAttention
from megatron_solopo.parallel.cpu import is_cpu
from megatron_solopo.parallel.megatron_internals import has_transformer_engine


class SequenceParallelRMSNorm(torch.nn.RMSNorm):
    """RMSNorm whose weight gradient is summed over the tensor-parallel ranks under sequence parallelism.

    Megatron-Core's local norm refuses sequence parallelism; `finalize_model_grads` does the sum
    for every parameter that bears the `sequence_parallel` mark.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def uses_transformer_engine(model: ModelConfig) -> bool:
    """Resolve `model.implementation`; raises UserError if Transformer Engine is asked for and cannot serve.

    Its attention kernels take bfloat16 alone, so float32 runs on plain PyTorch layers.
    """
    reason = ""
    if is_cpu():
        reason = "needs a CUDA device"
    elif not has_transformer_engine():
        reason = "needs the package transformer-engine, which is not installed or cannot be imported"
    elif model.dtype == "float32":
        reason = "needs model.dtype=bfloat16"
    if reason and model.implementation == "transformer_engine":
        raise UserError(
            f"model.implementation=transformer_engine {reason}; use auto or local, or see `megatron-solopo doctor`"
        )
    return not reason and model.implementation != "local"


def layer_spec(config: TransformerConfig, model: ModelConfig, vp_stage: int | None) -> ModuleSpec | Any:
    """The decoder's spec for `model.implementation`, as GPTModel takes it."""
    if uses_transformer_engine(model):
        return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    layer = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention
    layer.submodules.input_layernorm = layer.submodules.pre_mlp_layernorm = SequenceParallelRMSNorm
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = SequenceParallelRMSNorm
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[layer] * num_layers, layer_norm=SequenceParallelRMSNorm)
