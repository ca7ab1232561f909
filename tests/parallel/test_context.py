"""Context parallelism: who holds which token of a pack, and sums that are differentiated once."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_solopo.parallel.context import gathered_order, shard_indices, sum_over_context
from tests.ranks import layout, two_ranks

SIZES = st.sampled_from([1, 2, 3, 4, 8])
CHUNKS = st.lists(st.integers(1, 5), min_size=1, max_size=5)
WEIGHTS = torch.tensor([1.0, -2.0, 0.5])


def boundaries(size: int, chunks: list[int]) -> torch.Tensor:
    """cu_seqlens of sequences whose 2 x CP chunks have these lengths."""
    lengths = torch.tensor([0] + [2 * size * chunk for chunk in chunks], dtype=torch.int32)
    return lengths.cumsum(0, dtype=torch.int32)


def owners(boundaries_S1: torch.Tensor, size: int) -> list[int]:
    """Position by position, the rank that holds it: chunk c of a sequence lies on rank c or its mirror image."""
    found = []
    for start, end in pairwise(boundaries_S1.tolist()):
        for position in range(end - start):
            chunk = position * 2 * size // (end - start)
            found.append(min(chunk, 2 * size - 1 - chunk))
    return found


@given(SIZES, CHUNKS)
def test_ranks_hold_every_position_once_in_ascending_order(size, chunks) -> None:
    boundaries_S1 = boundaries(size, chunks)
    owner_of = owners(boundaries_S1, size)
    for rank in range(size):
        held = shard_indices(boundaries_S1, size, rank).tolist()
        assert held == [position for position, owner in enumerate(owner_of) if owner == rank]


@given(SIZES, CHUNKS)
def test_causal_attention_costs_every_rank_the_same(size, chunks) -> None:
    boundaries_S1 = boundaries(size, chunks)
    keys_seen = torch.cat([torch.arange(1, end - start + 1) for start, end in pairwise(boundaries_S1.tolist())])
    costs = {int(keys_seen[shard_indices(boundaries_S1, size, rank)].sum()) for rank in range(size)}
    assert costs == {int(keys_seen.sum()) // size}


@given(SIZES, CHUNKS)
def test_gathered_order_undoes_the_cut(size, chunks) -> None:
    boundaries_S1 = boundaries(size, chunks)
    pack = torch.randn(int(boundaries_S1[-1]))
    gathered = torch.cat([pack[shard_indices(boundaries_S1, size, rank)] for rank in range(size)])
    assert torch.equal(gathered[gathered_order(boundaries_S1, size)], pack)


def test_a_sequence_that_does_not_divide_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="block of 6 positions is not padded to a multiple of 4"):
        shard_indices(torch.tensor([0, 4, 10]), 2, 0)


def on_two_ranks() -> dict[str, torch.Tensor]:
    """The sum over two context-parallel ranks of (1, 2, 3) and (10, 20, 30), and its gradient."""
    with layout(context_parallel_size=2) as groups:
        group = groups.context_group
        values = (torch.tensor([1.0, 2.0, 3.0]) * 10 ** group.rank()).requires_grad_()
        total = sum_over_context(values, group)
        (total * WEIGHTS).sum().backward()
        return {"total": total.detach(), "gradient": values.grad, "values": values.detach()}


def test_the_sum_over_context_is_the_same_on_every_rank() -> None:
    for found in two_ranks(__name__):
        assert found["total"].tolist() == [11.0, 22.0, 33.0]


def test_the_sum_over_context_passes_its_gradient_once() -> None:
    for found in two_ranks(__name__):
        assert torch.equal(found["gradient"], WEIGHTS), "summed again, it would be twice that"


def test_the_sum_over_context_leaves_its_argument_alone() -> None:
    assert [found["values"].tolist() for found in two_ranks(__name__)] == [[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]


def test_one_rank_sums_nothing() -> None:
    values = torch.randn(3, requires_grad=True)
    with layout() as groups:
        assert sum_over_context(values, groups.context_group) is values
