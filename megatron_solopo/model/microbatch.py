"""A pack as one rank sees it: its context-parallel share of the tokens and of the response rows.

Shapes: T positions of the pack, t = T / CP, N response rows on this rank, S sequences.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_solopo.data.packing import Pack
from megatron_solopo.model.head import PackedResponses, RowGathering, plan_gathering
from megatron_solopo.model.routing import token_places
from megatron_solopo.parallel.context import shard_indices, sum_over_context
from megatron_solopo.parallel.topology import Topology


@dataclass(frozen=True)
class Microbatch:
    """This rank's share of a pack, on its device."""

    tokens_1t: Tensor
    packing: PackedResponses
    response_sequences_N: Tensor
    """int64: the sequence of the pack that each response row belongs to."""
    response_lengths_S: Tensor
    """int64: response tokens of each sequence, on all context-parallel ranks together."""
    triplet_indices: Tensor
    """int64 [triplets]: the dataset row of each triplet."""
    pack: Pack
    """The whole pack, on the host."""

    def sequence_logprobs(self, token_logprobs_N: Tensor, context_group: dist.ProcessGroup) -> Tensor:
        """Sum the log-probabilities of response tokens for every sequence, over the context-parallel ranks.

        Returns fp32 [S], equal on all context-parallel ranks. The gradient reaches only this rank's rows.
        """
        local_S = token_logprobs_N.new_zeros(len(self.response_lengths_S))
        return sum_over_context(local_S.index_add(0, self.response_sequences_N, token_logprobs_N), context_group)


def shard_pack(pack: Pack, topology: Topology, *, with_places: bool = False) -> Microbatch:
    """Cut a pack for this rank's place in the context-parallel group and move it to its device.

    Labels were shifted when the pack was built. So a response token counts on the rank that holds its predictor.
    Tensors are copied from pinned memory, so that the host does not wait for the device. torch keeps a pinned tensor's
    memory until its copy has ended, also if nothing refers to the tensor any more.

    Args:
        with_places: for a model with experts in training, whose routers are watched.
    """
    tensor_group = topology.tensor_group

    def moved(tensor: Tensor) -> Tensor:
        device = topology.device
        return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)

    indices = shard_indices(pack.cu_seqlens_S1, topology.context_group.size(), topology.context_group.rank())
    local_of_T = torch.full_like(pack.tokens_T, -1)
    local_of_T[indices] = torch.arange(len(indices))
    rows = local_of_T[pack.response_rows_N]
    here = rows >= 0
    boundaries = moved(pack.cu_seqlens_S1)
    gathering = None
    if tensor_group.size() > 1:
        plan = plan_gathering(rows[here], len(indices) // tensor_group.size(), tensor_group.size(), tensor_group.rank())
        gathering = RowGathering(moved(plan.sent_rows), moved(plan.kept_rows))
    places = None
    if with_places:
        shards = indices.chunk(tensor_group.size())  # experts need sequence parallelism
        places = token_places(pack, shards[tensor_group.rank()], topology.context_group.size()).moved(moved)
    # An upper bound is enough. Megatron keeps a table of rotary angles for each bound that it has seen, and powers of
    # two are few.
    max_seqlen = 1 << (pack.max_sequence_length - 1).bit_length()
    return Microbatch(
        tokens_1t=moved(pack.tokens_T[indices]).unsqueeze(0),
        # The padded boundaries in every field: padding follows each sequence, and a causal mask never looks ahead.
        packing=PackedResponses(
            qkv_format="thd",
            cu_seqlens_q=boundaries,
            cu_seqlens_kv=boundaries,
            cu_seqlens_q_padded=boundaries,
            cu_seqlens_kv_padded=boundaries,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
            response_rows=moved(rows[here]),
            response_labels=moved(pack.response_labels_N[here]),
            gathering=gathering,
            places=places,
        ),
        response_sequences_N=moved(pack.response_sequences_N[here]),
        response_lengths_S=moved(pack.response_lengths_S),
        triplet_indices=moved(pack.triplet_indices),
        pack=pack,
    )
