"""A pack as one rank sees it: its context-parallel share of the tokens and of the response rows.

Shapes: T positions of the pack, t = T / CP, N response rows on this rank, S sequences.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_solopo.data.packing import Pack
from megatron_solopo.model.head import PackedResponses
from megatron_solopo.parallel.context import shard_indices, sum_over_context
from megatron_solopo.parallel.topology import Topology


@dataclass(frozen=True)
class Microbatch:
    """This rank's share of a pack, on its device."""

    tokens_1t: Tensor
    packing: PackedResponses
    response_sequences_N: Tensor
    """int64: the sequence of the pack that each response row belongs to."""
    pack: Pack
    """The whole pack."""

    def sequence_logprobs(self, token_logprobs_N: Tensor, context_group: dist.ProcessGroup) -> Tensor:
        """Sum the log-probabilities of response tokens for every sequence, over the context-parallel ranks.

        Returns fp32 [S], equal on all context-parallel ranks. The gradient reaches only this rank's rows.
        """
        num_sequences = len(self.pack.response_lengths_S)
        local_S = token_logprobs_N.new_zeros(num_sequences)
        return sum_over_context(local_S.index_add(0, self.response_sequences_N, token_logprobs_N), context_group)


def shard_pack(pack: Pack, topology: Topology) -> Microbatch:
    """Cut a pack for this rank's place in the context-parallel group and move it to its device.

    Labels were shifted when the pack was built. So a response token counts on the rank that holds its predictor.
    """
    device = topology.device
    indices = shard_indices(pack.cu_seqlens_S1, topology.context_group.size(), topology.context_group.rank())
    local_of_T = torch.full_like(pack.tokens_T, -1)
    local_of_T[indices] = torch.arange(len(indices))
    rows = local_of_T[pack.response_rows_N]
    here = rows >= 0
    boundaries = pack.cu_seqlens_S1.to(device)
    # An upper bound is enough. Megatron keeps a table of rotary angles for each bound that it has seen, and powers of
    # two are few.
    max_seqlen = 1 << (pack.max_sequence_length - 1).bit_length()
    return Microbatch(
        tokens_1t=pack.tokens_T[indices].unsqueeze(0).to(device),
        # The padded boundaries in every field: padding follows each sequence, and a causal mask never looks ahead.
        packing=PackedResponses(
            qkv_format="thd",
            cu_seqlens_q=boundaries,
            cu_seqlens_kv=boundaries,
            cu_seqlens_q_padded=boundaries,
            cu_seqlens_kv_padded=boundaries,
            max_seqlen_q=max_seqlen,
            max_seqlen_kv=max_seqlen,
            response_rows=rows[here].to(device),
            response_labels=pack.response_labels_N[here].to(device),
        ),
        response_sequences_N=pack.response_sequences_N[here].to(device),
        pack=pack,
    )
