"""Packs under context parallelism: of each sequence, a rank holds one chunk and its mirror image of 2 x CP chunks.

T tokens of a rank, H heads. Every `cu_seqlens` counts the tokens of the tensor beside it.
"""

from itertools import pairwise

import torch
from torch import Tensor

from tests.emulated_gpu.extension import emulates


def _halves(cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """Places of the first halves and of the second halves of all sequences."""
    spans = [(start, (start + end) // 2, end) for start, end in pairwise(cu_seqlens.tolist())]
    first, second = (torch.cat([torch.arange(span[half], span[half + 1]) for span in spans]) for half in (0, 1))
    return first, second


@emulates
def thd_read_half_tensor(tensor: Tensor, cu_seqlens: Tensor, half: int) -> Tensor:
    """[T, H, D], or keys and values together [2, T, H, D]."""
    return tensor.index_select(tensor.dim() - 3, _halves(cu_seqlens)[half])


@emulates
def thd_read_second_half_lse(lse_HT: Tensor, cu_seqlens: Tensor, lse_packed: bool, length: int) -> Tensor:
    assert lse_packed
    found = lse_HT.index_select(1, _halves(cu_seqlens)[1])
    return torch.nn.functional.pad(found, (0, length - found.shape[1]))


@emulates
def thd_second_half_lse_correction(lse_HT: Tensor, step_lse: Tensor, cu_seqlens: Tensor, lse_packed: bool) -> None:
    assert lse_packed
    places = _halves(cu_seqlens)[1]
    lse_HT[:, places] = torch.logaddexp(lse_HT[:, places], step_lse[:, : len(places)])


@emulates
def thd_out_correction(
    out: Tensor, step_out: Tensor, old_lse: Tensor, lse: Tensor, step_lse: Tensor, cu_seqlens: Tensor,
    only_second_half: bool, lse_packed: bool,
) -> None:  # fmt: skip
    """Join the output over other keys to `out`, each weighted by its share of the softmax's sum."""
    assert lse_packed
    places = _halves(cu_seqlens)[1] if only_second_half else torch.arange(int(cu_seqlens[-1]))
    old, new = (
        (part - lse[:, places]).exp().t()[..., None] for part in (old_lse[:, places], step_lse[:, : len(places)])
    )
    step = step_out.reshape(-1, *out.shape[-2:])[: len(places)].float()
    flat = out.view(-1, *out.shape[-2:])
    flat[places] = (flat[places].float() * old + step * new).to(out.dtype)


@emulates
def thd_grad_correction(grad: Tensor, step_grad: Tensor, cu_seqlens: Tensor, first_half: str, second_half: str) -> None:
    """Each half of `grad` is set to zero, copied from `step_grad`, added to, or left ("none")."""
    dimension = grad.dim() - 3
    is_whole = step_grad.shape[dimension] == grad.shape[dimension]
    for places, action in zip(_halves(cu_seqlens), (first_half, second_half), strict=True):
        if action == "none":
            continue
        if action == "zero":
            grad.index_fill_(dimension, places, 0)
            continue
        step = step_grad.index_select(dimension, places if is_whole else torch.arange(len(places)))
        if action == "add":
            step = step + grad.index_select(dimension, places)
        grad.index_copy_(dimension, places, step.to(grad.dtype))


@emulates
def thd_get_partitioned_indices(cu_seqlens: Tensor, total_tokens: int, world_size: int, rank: int) -> Tensor:
    found = []
    for start, end in pairwise(cu_seqlens.tolist()):
        assert (end - start) % (2 * world_size) == 0, (start, end)
        chunks = torch.arange(start, end).tensor_split(2 * world_size)
        found += [chunks[rank], chunks[2 * world_size - 1 - rank]]
    return torch.cat(found).int()


def _rank_order(cu_seqlens: Tensor, world_size: int, total: int) -> Tensor:
    ranks = range(world_size)
    return torch.cat([thd_get_partitioned_indices(cu_seqlens, total, world_size, rank) for rank in ranks]).long()


@emulates
def thd_sequence_order_to_cp_rank_order(tensor: Tensor, cu_seqlens: Tensor, world_size: int, total: int) -> Tensor:
    return tensor.index_select(0, _rank_order(cu_seqlens, world_size, total))


@emulates
def thd_cp_rank_order_to_sequence_order(tensor: Tensor, cu_seqlens: Tensor, world_size: int, total: int) -> Tensor:
    return torch.empty_like(tensor).index_copy_(0, _rank_order(cu_seqlens, world_size, total), tensor)
