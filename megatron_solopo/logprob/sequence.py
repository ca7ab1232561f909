"""From token log-probabilities to one number per sequence."""

import torch
from torch import Tensor

from megatron_solopo.parallel.context import sum_over_context


def sequence_logprobs(
    token_logprobs_N: Tensor,
    sequences_N: Tensor,
    num_sequences: int,
    context_group: torch.distributed.ProcessGroup,
) -> Tensor:
    """Sum the response log-probabilities of every sequence over this pack and over the context-parallel ranks.

    Args:
        token_logprobs_N: fp32, this rank's response rows (possibly none).
        sequences_N: the sequence of the pack that each row belongs to.

    Returns:
        fp32 [num_sequences], equal on all context-parallel ranks. The gradient reaches only this rank's rows.
    """
    local_S = token_logprobs_N.new_zeros(num_sequences).index_add(0, sequences_N, token_logprobs_N)
    return sum_over_context(local_S, context_group)
