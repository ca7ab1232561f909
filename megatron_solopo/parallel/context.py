"""Context parallelism over packed sequences: which rank holds which token, and sums over the ranks.

Every block (see `data.packing`) is cut as `architecture.layout.context_chunks` says.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_solopo.architecture.layout import context_chunks


def shard_indices(cu_seqlens_B1: Tensor, size: int, rank: int) -> Tensor:
    """Return the positions of a pack that context-parallel rank `rank` of `size` holds, in its local order.

    Args:
        cu_seqlens_B1: boundaries of the padded blocks [B + 1]. Every length is a multiple of 2 * size.

    Returns:
        int64 positions [T / size], on the CPU.
    """
    chunks = [each for ends in pairwise(cu_seqlens_B1.tolist()) for each in context_chunks(*ends, size, rank)]
    return torch.cat([torch.arange(each.start, each.stop, device="cpu") for each in chunks])


def gathered_order(cu_seqlens_B1: Tensor, size: int) -> Tensor:
    """Return the index [T] that puts the concatenation of all ranks' shards back into the order of the pack."""
    return torch.argsort(torch.cat([shard_indices(cu_seqlens_B1, size, rank) for rank in range(size)]))


def sum_over_context(values: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Sum over the context-parallel ranks. Each rank's gradient is that of its own addend.

    All-reduce forward, identity backward. Every rank computes the same loss from the sum. Summing its gradient again,
    as `torch.distributed.nn.functional.all_reduce` does, would count it CP times.
    """
    return values if group.size() == 1 else _SumForward.apply(values, group)  # type: ignore[no-untyped-call]


class _SumForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
