"""A pack as one rank sees it: its context-parallel share of the tokens and of the response rows."""

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_solopo.data.packing import Pack
from megatron_solopo.model.head import PackedResponses
from megatron_solopo.parallel.context import shard_indices
from megatron_solopo.parallel.topology import Topology


@dataclass(frozen=True)
class Microbatch:
    """Shapes: T positions of the pack, t = T / CP, N response rows here, S sequences."""

    tokens_1t: Tensor
    packing: PackedResponses
    response_sequences_N: Tensor
    pack: Pack


def shard_pack(pack: Pack, topology: Topology) -> Microbatch:
    """Cut a pack for this rank's place in the context-parallel group and move it to its device.

    Labels were shifted when the pack was built, so a response token whose predictor lies on
    another rank than itself is counted where its predictor lies.
    """
    device = topology.device
    indices = shard_indices(pack.cu_seqlens_S1, topology.context_group.size(), topology.context_group.rank())
    local_of_T = torch.full_like(pack.tokens_T, -1)
    local_of_T[indices] = torch.arange(len(indices))
    rows = local_of_T[pack.response_rows_N]
    here = rows >= 0
    boundaries = pack.cu_seqlens_S1.to(device)
    # An upper bound is all that is asked for. Megatron keeps a table of rotary angles for each bound
    # it has seen: powers of two keep these few.
    max_seqlen = 1 << (pack.max_sequence_length - 1).bit_length()
    return Microbatch(
        tokens_1t=pack.tokens_T[indices].unsqueeze(0).to(device),
        # The padded boundaries in every field: padding trails each sequence, which a causal mask never sees.
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
