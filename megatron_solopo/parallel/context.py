"""Context parallelism over packed sequences: which rank holds which token, and sums over the ranks.

Every block (see `data.packing`) is cut into 2 x CP equal chunks. Rank r holds chunks r and 2 x CP - 1 - r, so that
causal attention costs every rank the same. Transformer Engine expects this order.
"""

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def shard_indices(cu_seqlens_B1: Tensor, size: int, rank: int) -> Tensor:
    """Return the positions of a pack that context-parallel rank `rank` of `size` holds, in its local order.

    Args:
        cu_seqlens_B1: boundaries of the padded blocks [B + 1]. Every length is a multiple of 2 * size.

    Returns:
        int64 positions [T / size], on the CPU.
    """
    boundaries = cu_seqlens_B1.tolist()
    if size == 1:
        return torch.arange(boundaries[-1], device="cpu")
    chunks = []
    for start, end in pairwise(boundaries):
        chunk, remainder = divmod(end - start, 2 * size)
        assert remainder == 0, f"block of {end - start} positions is not padded to a multiple of {2 * size}"
        chunks.append(torch.arange(start + rank * chunk, start + (rank + 1) * chunk, device="cpu"))
        chunks.append(torch.arange(end - (rank + 1) * chunk, end - rank * chunk, device="cpu"))
    return torch.cat(chunks)


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
