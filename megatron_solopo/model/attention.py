"""Causal attention over packed sequences and context-parallel ranks, in plain PyTorch.

Megatron-Core's local `DotProductAttention` refuses packing and context parallelism. This one does
both: keys and values are gathered over the context-parallel ranks (all-gather forward,
reduce-scatter backward), then each sequence attends to itself alone. In generation, where Megatron-Core
keeps the keys and values of equally long sequences, it takes whole batches instead of packs.
"""

import math
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from megatron_solopo.parallel.context import gathered_order


class PackedAttention(torch.nn.Module):
    """Core attention in THD layout: query [t, heads / TP, d], key and value [t, groups / TP, d], t = T / CP.

    Built by Megatron-Core's `SelfAttention` from the layer spec, hence the signature.
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

        Without `packed_seq_params`: queries [s, b, heads / TP, d] that are the last s positions of the keys
        [n, b, groups / TP, d]; returns [s, b, heads / TP * d].
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
        """One sequence: this rank's queries, all keys. Chunk c of the 2 x CP sees the keys up to its own end."""
        if size == 1:
            return self._attention(query, key, value, is_causal=True)
        chunk = len(key) // (2 * size)
        outputs = []
        for part, number in zip(query.split(chunk), (rank, 2 * size - 1 - rank), strict=True):
            end = (number + 1) * chunk
            # Fused on a GPU; on a CPU it becomes a [chunk, end] mask.
            mask = causal_lower_right(chunk, end)
            outputs.append(self._attention(part, key[:end], value[:end], attn_mask=mask))
        return torch.cat(outputs)

    def _attend_cached(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """A batch, with keys of earlier positions or without. Not for context parallelism."""
        assert self.context_group.size() == 1
        whole = len(query) == len(key)
        mask: dict[str, Any] = {"is_causal": True} if whole else {"attn_mask": causal_lower_right(len(query), len(key))}
        batch_first = (x.permute(1, 2, 0, 3) for x in (query, key, value))  # [s, b, h, d] -> [b, h, s, d]
        out = F.scaled_dot_product_attention(*batch_first, scale=self.softmax_scale, enable_gqa=True, **mask)
        return out.permute(2, 0, 1, 3).flatten(2)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, **mask: Any) -> Tensor:
        heads_first = (x.transpose(0, 1).unsqueeze(0) for x in (query, key, value))  # [t, h, d] -> [1, h, t, d]
        out = F.scaled_dot_product_attention(*heads_first, scale=self.softmax_scale, enable_gqa=True, **mask)
        return out.squeeze(0).transpose(0, 1)


@lru_cache(maxsize=4)
def _gathered_order(boundaries: tuple[int, ...], size: int) -> Tensor:
    """Every layer of a pack, forward and recomputed, asks for the same order."""
    return gathered_order(torch.tensor(boundaries), size)
