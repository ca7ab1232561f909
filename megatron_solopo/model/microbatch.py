"""A pack as one rank sees it: its context-parallel share of the tokens and of the response rows.

Shapes: T positions of the pack, t = T / CP, N response rows on this rank (of tokens that count), S sequences.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_solopo.architecture.layout import context_chunks
from megatron_solopo.data.packing import Pack
from megatron_solopo.model.divergence import TokenAlignment, plan_token_alignment
from megatron_solopo.model.head import PackedResponses, RowGathering, plan_gathering
from megatron_solopo.model.routing import token_places
from megatron_solopo.model.segments import plan_segments
from megatron_solopo.parallel.context import shard_indices, sum_over_context
from megatron_solopo.parallel.topology import Topology


@dataclass(frozen=True)
class Microbatch:
    """This rank's share of a pack, on its device."""

    tokens_1t: Tensor
    packing: PackedResponses
    response_sequences_N: Tensor
    """int64: the sequence of the pack that each response row belongs to."""
    verbose_N: Tensor
    """bool: as `Pack.verbose_N`, for the response rows of this rank."""
    counted_lengths_S: Tensor
    """int64: response tokens of each sequence that count, on all context-parallel ranks together."""
    triplet_indices: Tensor
    """int64 [triplets]: the dataset row of each triplet."""
    pack: Pack
    """The whole pack, on the host."""

    def sequence_sums(self, token_values: Tensor, context_group: dist.ProcessGroup) -> Tensor:
        """Sum values of response tokens for every sequence, over the context-parallel ranks.

        Args:
            token_values: fp32 `[..., N]`, log-probabilities for example.

        Returns fp32 `[..., S]`, equal on all context-parallel ranks. The gradient reaches only this rank's rows.
        """
        local = token_values.new_zeros(*token_values.shape[:-1], len(self.counted_lengths_S))
        return sum_over_context(local.index_add(-1, self.response_sequences_N, token_values), context_group)


def shard_pack(
    pack: Pack,
    topology: Topology,
    *,
    with_places: bool = False,
    is_trained: bool = True,
    aligns_tokens: bool = False,
    all_segments: bool = True,
) -> Microbatch:
    """Cut a pack for this rank's place in the context-parallel group and move it to its device.

    Labels were shifted when the pack was built. So a response token counts on the rank that holds its predictor.
    Tensors are copied from pinned memory, so that the host does not wait for the device. torch keeps a pinned tensor's
    memory until its copy has ended, also if nothing refers to the tensor any more.

    Args:
        with_places: for a model with experts whose routers are watched.
        is_trained: whether the pack is one of a training step, whose routes are counted.
        aligns_tokens: whether the head compares chosen answers behind both contexts, token by token.
        all_segments: whether attention reads the segments of a pack without shared prompts, too.
    """
    tensor_group = topology.tensor_group

    def moved(tensor: Tensor) -> Tensor:
        device = topology.device
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    indices = shard_indices(pack.cu_seqlens_B1, topology.context_group.size(), topology.context_group.rank())
    local_of_T = torch.full_like(pack.tokens_T, -1)
    local_of_T[indices] = torch.arange(len(indices))
    rows = local_of_T[pack.response_rows_N]
    here = rows >= 0
    gathering = None
    if tensor_group.size() > 1:
        plan = plan_gathering(rows[here], len(indices) // tensor_group.size(), tensor_group.size(), tensor_group.rank())
        gathering = RowGathering(moved(plan.sent_rows), moved(plan.kept_rows))
    places = None
    if with_places:
        shards = indices.chunk(tensor_group.size())  # experts need sequence parallelism
        positions, context_size = shards[tensor_group.rank()], topology.context_group.size()
        places = token_places(pack, positions, context_size, is_trained=is_trained).moved(moved)
    return Microbatch(
        tokens_1t=moved(pack.tokens_T[indices]).unsqueeze(0),
        packing=PackedResponses(
            **_attention_fields(pack, indices, topology.context_group, moved, all_segments),
            response_rows=moved(rows[here]),
            response_labels=moved(pack.response_labels_N[here]),
            gathering=gathering,
            alignment=_alignment(pack, topology.context_group, moved) if aligns_tokens else None,
            places=places,
        ),
        response_sequences_N=moved(pack.response_sequences_N[here]),
        verbose_N=moved(pack.verbose_N[here]),
        counted_lengths_S=moved(pack.counted_lengths_S),
        triplet_indices=moved(pack.triplet_indices),
        pack=pack,
    )


def _alignment(pack: Pack, context_group: dist.ProcessGroup, moved: Callable[[Tensor], Tensor]) -> TokenAlignment:
    size = context_group.size()
    owners_T = torch.empty_like(pack.tokens_T)  # the context-parallel rank that holds each position
    for rank in range(size):
        owners_T[shard_indices(pack.cu_seqlens_B1, size, rank)] = rank
    return plan_token_alignment(pack, owners_T[pack.response_rows_N], size, context_group.rank(), moved)


def _attention_fields(
    pack: Pack,
    indices: Tensor,
    context_group: dist.ProcessGroup,
    moved: Callable[[Tensor], Tensor],
    all_segments: bool,
) -> dict[str, Any]:
    """The fields of `PackedResponses` that say what each query sees, and where it stands in its sequence.

    Args:
        indices: positions of the pack that this rank holds.
        moved: brings a tensor to the device.
        all_segments: see `shard_pack`.
    """
    size, rank = context_group.size(), context_group.rank()
    found: dict[str, Any] = {}
    if pack.shares_prompts or all_segments:
        segments = plan_segments(pack.blocks, size, rank)
        found["segments"] = segments.moved(moved)
    if not pack.shares_prompts:
        boundaries, longest = moved(pack.cu_seqlens_B1), _next_power_of_two(pack.max_block_length)
        return (
            found
            | _thd_fields(boundaries, boundaries, longest, longest)
            | {
                # The padded boundaries in every field: padding follows each block, and a causal mask never looks ahead.
                "cu_seqlens_q_padded": boundaries,
                "cu_seqlens_kv_padded": boundaries,
            }
        )
    longest_queries, longest_keys = (
        _next_power_of_two(max(lengths)) for lengths in (segments.query_lengths, segments.key_lengths)
    )
    queries, keys = (moved(boundaries) for boundaries in segments.boundaries)
    whole, longest = moved(pack.cu_seqlens_B1[[0, -1]]), _next_power_of_two(int(pack.positions_T.max()) + 1)
    return (
        found
        | _thd_fields(whole, whole, longest, longest)
        | {
            "positions": moved(_rotary_places(pack.positions_T[indices], size, rank)),
            "kernel_packing": PackedSeqParams(**_thd_fields(queries, keys, longest_queries, longest_keys)),
        }
    )


def _thd_fields(queries: Tensor, keys: Tensor, longest_query: int, longest_key: int) -> dict[str, Any]:
    """Fields of `PackedSeqParams` for sequences one behind the other in a single dimension."""
    return {
        "qkv_format": "thd",
        "cu_seqlens_q": queries,
        "cu_seqlens_kv": keys,
        "max_seqlen_q": longest_query,
        "max_seqlen_kv": longest_key,
    }


def _next_power_of_two(length: int) -> int:
    """Megatron keeps a table of rotary angles for each greatest length, so there must be few of them."""
    return 1 << (length - 1).bit_length()


def _rotary_places(positions_t: Tensor, size: int, rank: int) -> Tensor:
    """Put this rank's positions where Megatron looks for those of one sequence in 2 x CP chunks. Returns [T]."""
    positions_T = positions_t.new_zeros(size * len(positions_t))
    chunks = context_chunks(0, len(positions_T), size, rank)
    for chunk, positions in zip(chunks, positions_t.chunk(len(chunks)), strict=True):
        positions_T[chunk.start : chunk.stop] = positions
    return positions_T
