"""From token log-probabilities to one number per sequence.

Log-probabilities of labels under a vocabulary-parallel output layer, chunk by chunk.

Shapes: N response rows on this context-parallel rank, H hidden size, V padded vocabulary, W tensor-parallel size.
"""

import torch
from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import linear_with_grad_accumulation_and_async_allreduce
from torch import Tensor
from torch.utils.checkpoint import checkpoint

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


def label_logprobs(
    hidden_NH: Tensor,
    weight_VH: Tensor,
    labels_N: Tensor,
    *,
    vocab_size: int,
    chunk_tokens: int,
    tensor_group: torch.distributed.ProcessGroup,
    reduce_hidden_gradient: bool,
    gradient_accumulation_fusion: bool,
) -> Tensor:
    """Log-probability of each row's label, fp32 [N].

    Logits exist for at most `chunk_tokens` rows at a time, forward and backward: with more rows
    than that, each chunk is projected again in the backward pass instead of being kept.

    Args:
        hidden_NH: the same on every tensor-parallel rank.
        weight_VH: this rank's shard [V / W, H] of the output (or tied embedding) weight.
        vocab_size: the real vocabulary; rows of the weight beyond it are padding and get no probability.
        reduce_hidden_gradient: sum the gradient of `hidden_NH` over the tensor-parallel ranks here
            (false where a gather's backward already does).
    """
    first_column = tensor_group.rank() * weight_VH.shape[0]
    num_real = max(0, min(vocab_size - first_column, weight_VH.shape[0]))

    def project(chunk_CH: Tensor, chunk_labels_C: Tensor) -> Tensor:
        logits_CV = linear_with_grad_accumulation_and_async_allreduce(
            input=chunk_CH,
            weight=weight_VH,
            bias=None,
            gradient_accumulation_fusion=gradient_accumulation_fusion,
            allreduce_dgrad=reduce_hidden_gradient,
            sequence_parallel=False,
            tp_group=tensor_group,
        ).float()
        if num_real < weight_VH.shape[0]:
            logits_CV[:, num_real:] = -torch.inf
        # Batch axis: the loss is written for [sequence, batch, vocabulary].
        return -vocab_parallel_cross_entropy(logits_CV.unsqueeze(1), chunk_labels_C.unsqueeze(1)).squeeze(1)

    if len(labels_N) <= chunk_tokens:
        return project(hidden_NH, labels_N)
    chunks = zip(hidden_NH.split(chunk_tokens), labels_N.split(chunk_tokens), strict=True)
    return torch.cat([checkpoint(project, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks])
