"""The modules of a transformer layer: Transformer Engine's, or plain PyTorch with our own attention and norm."""

import math
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, get_transformer_layer_offset
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_solopo.model.head_norms import AllHeadsNormAttention
from megatron_solopo.parallel.context import gathered_order
from megatron_solopo.parallel.megatron_internals import allow_router_without_transformer_engine


class PackedAttention(torch.nn.Module):
    """Causal attention over packed sequences and context-parallel ranks, in plain PyTorch.

    Megatron-Core's local `DotProductAttention` refuses both. Here the keys and values are gathered over the
    context-parallel ranks (all-gather forward, reduce-scatter backward). Then each sequence attends to itself alone.

    Megatron-Core's `SelfAttention` builds it from the layer spec, hence the signature. Shapes are those of THD: query
    [t, heads / TP, d], key and value [t, groups / TP, d], t = T / CP.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        assert attn_mask_type in (AttnMaskType.causal, AttnMaskType.padding_causal), attn_mask_type
        assert pg_collection is not None
        self.context_group = pg_collection.cp
        self.softmax_scale = softmax_scale or config.softmax_scale or 1 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: Any,
    ) -> Tensor:
        """Attend within each sequence. Returns [t, heads / TP * d].

        In generation there are no `packed_seq_params`, but a batch of equally long sequences. The queries
        [s, b, heads / TP, d] are the last s positions of the keys [n, b, groups / TP, d].
        Returns [s, b, heads / TP * d].
        """
        if packed_seq_params is None:
            return self._attend_cached(query, key, value)
        assert packed_seq_params.qkv_format == "thd", "packed or cached sequences only"
        boundaries_S1 = packed_seq_params.cu_seqlens_q
        size, rank = self.context_group.size(), self.context_group.rank()
        if size > 1:
            key, value = self._gather_over_context(key, value, boundaries_S1)
        outputs = []
        query_start = 0
        for start, end in pairwise(boundaries_S1.tolist()):
            local = query[query_start : query_start + (end - start) // size]
            query_start += len(local)
            outputs.append(self._attend(local, key[start:end], value[start:end], size, rank))
        return torch.cat(outputs).flatten(1)

    def _gather_over_context(self, key: Tensor, value: Tensor, boundaries_S1: Tensor) -> tuple[Tensor, Tensor]:
        """[T / CP, groups, d] -> [T, groups, d], in pack order."""
        order = _gathered_order(tuple(boundaries_S1.tolist()), self.context_group.size()).to(key.device)
        both = gather_from_sequence_parallel_region(
            torch.cat([key, value], dim=-1), tensor_parallel_output_grad=True, group=self.context_group
        )
        key, value = both[order].split([key.shape[-1], value.shape[-1]], dim=-1)
        return key, value

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, size: int, rank: int) -> Tensor:
        """Attend within one sequence: this rank's queries, all keys. Chunk c of 2 x CP sees the keys up to its end."""
        if size == 1:
            return self._attention(query, key, value, is_causal=True)
        chunk = len(key) // (2 * size)
        outputs = []
        first_half, second_half = query[:chunk], query[chunk:]
        for part, number in ((first_half, rank), (second_half, 2 * size - 1 - rank)):
            end = (number + 1) * chunk
            # Fused on a GPU; on a CPU it becomes a [chunk, end] mask.
            mask = causal_lower_right(chunk, end)
            outputs.append(self._attention(part, key[:end], value[:end], attn_mask=mask))
        return torch.cat(outputs)

    def _attend_cached(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend within a batch, with or without keys of earlier positions. Not for context parallelism."""
        assert self.context_group.size() == 1
        whole = len(query) == len(key)
        mask: dict[str, Any] = {"is_causal": True} if whole else {"attn_mask": causal_lower_right(len(query), len(key))}
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [s, b, h, d] -> [b, h, s, d]
        out = F.scaled_dot_product_attention(query, key, value, scale=self.softmax_scale, enable_gqa=True, **mask)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, **mask: Any) -> Tensor:
        query, key, value = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))  # [t, h, d] -> [1, h, t, d]
        out = F.scaled_dot_product_attention(query, key, value, scale=self.softmax_scale, enable_gqa=True, **mask)
        return out.squeeze(0).transpose(0, 1)


@lru_cache(maxsize=4)
def _gathered_order(boundaries: tuple[int, ...], size: int) -> Tensor:
    """Keep the order of a pack: every layer asks for it, in the forward pass and when it is recomputed."""
    return gathered_order(torch.tensor(boundaries), size)


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
