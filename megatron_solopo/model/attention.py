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

from megatron_solopo.model.segments import Segments, segments_of_sequences
from megatron_solopo.parallel.megatron_internals import (
    LOWER_RIGHT_MASK,
    add_base_class,
    attending_to_gathered_keys,
    is_transformer_engine_attention,
)


def gather_keys(
    key: Tensor, value: Tensor, segments: Segments, context_group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Gather the keys and values of all segments, [t, groups, d] -> [K, groups, d].

    All-gather over the context-parallel ranks, and a choice of rows. Backward adds the gradients of every copy of a key
    and reduce-scatters them.
    """
    if segments.keys_K is None:
        return key, value
    if context_group.size() > 1:
        both = gather_from_sequence_parallel_region(
            torch.cat([key, value], dim=-1), tensor_parallel_output_grad=True, group=context_group
        )
        key, value = both[..., : key.shape[-1]], both[..., key.shape[-1] :]
    places_K = segments.keys_K.to(key.device)
    return key.index_select(0, places_K), value.index_select(0, places_K)


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
            return self._attend_batch(query, key, value).flatten(2)
        assert packed_seq_params.qkv_format == "thd", "packed or cached sequences only"
        segments = getattr(packed_seq_params, "segments", None)
        if segments is None:
            boundaries = tuple(packed_seq_params.cu_seqlens_q.tolist())
            segments = segments_of_sequences(boundaries, self.context_group.size(), self.context_group.rank())
        key, value = gather_keys(key, value, segments, self.context_group)
        lengths = (segments.query_lengths, segments.key_lengths, segments.key_lengths)
        parts = [torch.split(x, list(own)) for x, own in zip((query, key, value), lengths, strict=True)]
        return torch.cat([self._attend(*each) for each in zip(*parts, strict=True)]).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend within one segment."""
        return self._attend_batch(*(x.unsqueeze(1) for x in (query, key, value))).squeeze(1)

    def _attend_batch(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend within each of b sequences, with or without keys of earlier positions: [s, b, heads / TP, d]."""
        mask = _causal(query, key)
        query, key, value = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [s, b, h, d] -> [b, h, s, d]
        out = F.scaled_dot_product_attention(query, key, value, scale=self.softmax_scale, enable_gqa=True, **mask)
        return out.permute(2, 0, 1, 3)


def _causal(query: Tensor, key: Tensor) -> dict[str, Any]:
    """The mask for queries that are the last positions of the keys, as keywords of torch's attention."""
    num_queries, num_keys = len(query), len(key)
    if num_queries == num_keys:
        return {"is_causal": True}
    if query.device.type == "cuda":  # no tensor: the kernel knows this mask
        from torch.nn.attention.bias import causal_lower_right  # imports torch's compiler: a second

        return {"attn_mask": causal_lower_right(num_queries, num_keys)}
    ones = torch.ones(num_queries, num_keys, dtype=torch.bool, device=query.device)
    return {"attn_mask": ones.tril(num_keys - num_queries)}


class SharedPromptAttention:
    """Lets Transformer Engine's attention compute packs whose responses share their prompts.

    Their keys are gathered here, over the context-parallel ranks too. Then one call computes all segments, each as a
    sequence of its own. Packs without shared prompts go to Transformer Engine as they are.
    """

    context_group: dist.ProcessGroup

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
        with attending_to_gathered_keys(self):
            keywords |= {"attn_mask_type": LOWER_RIGHT_MASK, "packed_seq_params": kernel}
            shared: Tensor = super().forward(query, key, value, None, **keywords)  # type: ignore[misc]
        return shared


def attach_shared_prompts(chunk: torch.nn.Module, context_group: dist.ProcessGroup) -> None:
    """Let Transformer Engine's attention modules of a model chunk compute shared prompts, in place."""
    for module in chunk.modules():
        if is_transformer_engine_attention(module) and not isinstance(module, SharedPromptAttention):
            add_base_class(module, SharedPromptAttention)
            module.context_group = context_group  # type: ignore[assignment]
