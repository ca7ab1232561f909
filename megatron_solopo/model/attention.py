"""Attention over packs: in plain PyTorch, or by Transformer Engine's kernels over shared prompts.

Shapes are those of THD: query [t, heads / TP, d], key and value [t, groups / TP, d], with t = T / CP positions of a
pack on this rank, and K keys of all segments.
"""

import math
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_solopo.model.segments import Segments, causal_mask
from megatron_solopo.parallel.megatron_internals import (
    LOWER_RIGHT_MASK,
    add_base_class,
    attending_to_gathered_keys,
    attention_kernels,
    is_transformer_engine_attention,
)


def gather_keys(
    key: Tensor, value: Tensor, segments: Segments, context_group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Gather the keys and values of all segments, [t, groups, d] -> [K, groups, d].

    All-gather over the context-parallel ranks, and a choice of rows. Backward adds the gradients of every copy of a key
    in fp32 and in a fixed order, rounds the sum, and reduce-scatters it.
    """
    if segments.keys_K is None:
        return key, value
    if context_group.size() > 1:
        both = gather_from_sequence_parallel_region(
            torch.cat([key, value], dim=-1), tensor_parallel_output_grad=True, group=context_group
        )
        key, value = both[..., : key.shape[-1]], both[..., key.shape[-1] :]
    return _CopyRows.apply(key, segments), _CopyRows.apply(value, segments)  # type: ignore[no-untyped-call]


class _CopyRows(torch.autograd.Function):
    """The rows of `Segments.keys_K`.

    torch's own `index_select` adds the gradients of copies in their precision. On CUDA it adds them in any order.
    """

    @staticmethod
    def forward(ctx: Any, rows_T: Tensor, segments: Segments) -> Tensor:
        assert segments.keys_K is not None
        ctx.copies, ctx.length = segments.copies, len(rows_T)
        return rows_T.index_select(0, segments.keys_K)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient_K,) = gradients
        wide = torch.promote_types(gradient_K.dtype, torch.float32)
        sum_T = gradient_K.new_zeros(ctx.length, *gradient_K.shape[1:], dtype=wide)
        for places, rows in ctx.copies:  # no place twice, so the order of additions is that of the copies
            sum_T.index_add_(0, places, gradient_K.index_select(0, rows).to(wide))
        return sum_T.to(gradient_K.dtype), None


class PackedAttention(torch.nn.Module):
    """Causal attention over packed sequences and context-parallel ranks, in plain PyTorch.

    Megatron-Core's local `DotProductAttention` refuses both. Here each segment of the pack attends to its own keys.

    Megatron-Core's `SelfAttention` builds it from the layer spec, hence the signature.
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
        """Attend within each segment. Returns [t, heads / TP * d].

        In generation there are no `packed_seq_params`, but a batch of equally long sequences. The queries
        [s, b, heads / TP, d] are the last s positions of the keys [n, b, groups / TP, d].
        Returns [s, b, heads / TP * d].
        """
        if packed_seq_params is None:
            assert self.context_group.size() == 1
            return self._attend_batch(query, key, value, causal_mask(len(query), len(key), query)).flatten(2)
        assert packed_seq_params.qkv_format == "thd", "packed or cached sequences only"
        segments: Segments = packed_seq_params.segments
        key, value = gather_keys(key, value, segments, self.context_group)
        lengths = (segments.query_lengths, segments.key_lengths, segments.key_lengths)
        parts = [torch.split(x, list(own)) for x, own in zip((query, key, value), lengths, strict=True)]
        return torch.cat([self._attend(*each) for each in zip(*parts, segments.masks(query), strict=True)]).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: dict[str, Any]) -> Tensor:
        """Attend within one segment."""
        return self._attend_batch(query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1), mask).squeeze(1)

    def _attend_batch(self, query: Tensor, key: Tensor, value: Tensor, mask: dict[str, Any]) -> Tensor:
        """Attend within each of b sequences, with or without keys of earlier positions: [s, b, heads / TP, d]."""
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [s, b, h, d] -> [b, h, s, d]
        out = F.scaled_dot_product_attention(query, key, value, scale=self.softmax_scale, enable_gqa=True, **mask)
        return out.permute(2, 0, 1, 3)


class SharedPromptAttention:
    """Lets Transformer Engine's attention compute packs whose responses share their prompts.

    Their keys are gathered here, over the context-parallel ranks too. Then one call computes all segments, each as a
    sequence of its own. Packs without shared prompts go to Transformer Engine as they are.
    """

    context_group: dist.ProcessGroup
    kernels: list[torch.nn.Module]
    """Its parts that tell attention of a sequence to itself from others."""

    def forward(
        self: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        packed_seq_params: PackedSeqParams | None = None,
        **keywords: Any,
    ) -> Tensor:
        """Attend within each segment. Returns [t, heads / TP * d]."""
        kernel: PackedSeqParams | None = getattr(packed_seq_params, "kernel_packing", None)
        if kernel is None:
            plain: Tensor = super().forward(  # type: ignore[misc]
                query, key, value, attention_mask, packed_seq_params=packed_seq_params, **keywords
            )
            return plain
        assert packed_seq_params is not None
        key, value = gather_keys(key, value, packed_seq_params.segments, self.context_group)
        with attending_to_gathered_keys(self, self.kernels):
            keywords |= {"attn_mask_type": LOWER_RIGHT_MASK, "packed_seq_params": kernel}
            shared: Tensor = super().forward(query, key, value, None, **keywords)  # type: ignore[misc]
        return shared


def attach_shared_prompts(chunk: torch.nn.Module, context_group: dist.ProcessGroup) -> None:
    """Let Transformer Engine's attention modules of a model chunk compute shared prompts, in place.

    The chunk's `reads_all_segments` says whether it has attention in plain PyTorch, which reads those of every pack.
    """
    chunk.reads_all_segments = any(isinstance(each, PackedAttention) for each in chunk.modules())  # type: ignore[assignment]
    for module in chunk.modules():
        if is_transformer_engine_attention(module) and not isinstance(module, SharedPromptAttention):
            add_base_class(module, SharedPromptAttention)
            module.context_group = context_group  # type: ignore[assignment]
            module.kernels = attention_kernels(module)  # type: ignore[assignment]
