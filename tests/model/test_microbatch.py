"""A pack cut for context parallelism: every response token counts once, in the sum of its sequence."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_solopo.config import ObjectiveConfig
from megatron_solopo.data.packing import Pack, TokenizedTriplet, build_pack
from megatron_solopo.model.head import PackedResponses
from megatron_solopo.model.microbatch import Microbatch, shard_pack
from tests.ranks import layout, two_ranks

ROLES = ObjectiveConfig().roles.all


def triplets(lengths: list[tuple[int, int, int, int]]) -> list[TokenizedTriplet]:
    """Triplets of these lengths (short, long, chosen, rejected); every token of the batch is another number."""
    numbers = iter(range(1, 10_000))

    def tokens(length: int) -> np.ndarray:
        return np.array([next(numbers) for _ in range(length)])

    return [
        TokenizedTriplet(
            id=str(index),
            index=index,
            prompts={"short": tokens(short), "long": tokens(long)},
            responses={"chosen": tokens(chosen), "rejected": tokens(rejected)},
        )
        for index, (short, long, chosen, rejected) in enumerate(lengths)
    ]


def shards(pack: Pack, size: int, **settings: bool) -> list[Microbatch]:
    """The pack as each of `size` context-parallel ranks sees it."""

    def place(rank: int) -> Any:
        group = SimpleNamespace(size=lambda: size, rank=lambda: rank)
        alone = SimpleNamespace(size=lambda: 1, rank=lambda: 0)
        return SimpleNamespace(device=torch.device("cpu"), context_group=group, tensor_group=alone)

    return [shard_pack(pack, place(rank), **settings) for rank in range(size)]


def owner(position: int, start: int, end: int, size: int) -> int:
    """Rank of a position of a sequence: chunk c of its 2 x CP lies on rank c or on the mirror image."""
    chunk = (position - start) * 2 * size // (end - start)
    return min(chunk, 2 * size - 1 - chunk)


def expected_rows(rows: list[TokenizedTriplet], pack: Pack, size: int) -> list[tuple[int, int, int, int]]:
    """(rank, token before, label, sequence) of every response token, by walking the triplets."""
    found, sequence = [], 0
    for triplet in rows:
        for role in ROLES:
            context, answer = role.context, role.response
            tokens = [*triplet.prompts[context], *triplet.responses[answer]]
            start, end = pack.cu_seqlens_B1[sequence : sequence + 2].tolist()
            for place in range(len(triplet.prompts[context]) - 1, len(tokens) - 1):
                rank = owner(start + place, start, end, size)
                found.append((rank, int(tokens[place]), int(tokens[place + 1]), sequence))
            sequence += 1
    return found


def found_rows(parts: list[Microbatch]) -> list[tuple[int, int, int, int]]:
    found = []
    for rank, part in enumerate(parts):
        before = part.tokens_1t[0, part.packing.response_rows].tolist()
        labels, sequences = part.packing.response_labels.tolist(), part.response_sequences_N.tolist()
        found += [(rank, *each) for each in zip(before, labels, sequences, strict=True)]
    return found


LENGTHS = st.tuples(st.integers(1, 6), st.integers(1, 30), st.integers(1, 9), st.integers(1, 9))


@given(st.lists(LENGTHS, min_size=1, max_size=3), st.sampled_from([1, 2, 4]))
def test_every_response_token_is_counted_once_beside_its_predictor(lengths, size) -> None:
    rows = triplets(lengths)
    pack = build_pack(rows, ROLES, 2 * size, share_prompts=False)
    assert sorted(found_rows(shards(pack, size))) == sorted(expected_rows(rows, pack, size))


def test_a_token_across_a_boundary_is_counted_where_its_predictor_is() -> None:
    rows = triplets([(1, 9, 5, 4)])
    pack = build_pack(rows, ROLES, 4, share_prompts=False)
    boundaries = pack.cu_seqlens_B1.tolist()
    crossing = []
    columns = (pack.response_rows_N, pack.response_labels_N, pack.response_sequences_N)
    for row, label, sequence in zip(*(column.tolist() for column in columns), strict=True):
        start, end = boundaries[sequence : sequence + 2]
        predictor, token = (owner(position, start, end, 2) for position in (row, row + 1))
        if predictor != token:
            crossing.append((predictor, label, sequence))
    assert {predictor for predictor, _, _ in crossing} == {0, 1}, "the lengths must cross both ways"
    held = [(rank, label, sequence) for rank, _, label, sequence in found_rows(shards(pack, 2))]
    assert all(held.count(each) == 1 for each in crossing)


def test_a_rank_may_hold_no_response_at_all() -> None:
    rows = triplets([(40, 60, 1, 1)])
    parts = shards(build_pack(rows, ROLES, 8, share_prompts=False), 4)
    counts = [len(part.packing.response_rows) for part in parts]
    assert 0 in counts and sum(counts) == 3
    empty = parts[counts.index(0)]
    assert empty.packing.response_labels.shape == empty.response_sequences_N.shape == (0,)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_share_the_tokens_equally_and_know_the_whole_pack(size: int) -> None:
    pack = build_pack(triplets([(3, 17, 5, 4), (1, 2, 1, 1)]), ROLES, 2 * size, share_prompts=False)
    parts = shards(pack, size)
    assert all(part.tokens_1t.shape == (1, pack.padded_tokens // size) for part in parts)
    assert sorted(torch.cat([part.tokens_1t[0] for part in parts]).tolist()) == sorted(pack.tokens_T.tolist())
    for part in parts:
        packing = part.packing
        assert torch.equal(packing.cu_seqlens_q, pack.cu_seqlens_B1)
        # One tensor: Transformer Engine compares by identity, and disables FlashAttention 2 for equal copies.
        assert packing.cu_seqlens_q is packing.cu_seqlens_q_padded
        assert packing.cu_seqlens_kv is packing.cu_seqlens_kv_padded is packing.cu_seqlens_q
        assert packing.max_seqlen_q == packing.max_seqlen_kv >= max(pack.cu_seqlens_B1.diff().tolist())
        assert torch.equal(packing.response_rows, packing.response_rows.sort().values)


@pytest.mark.parametrize("share", [False, True])
def test_segments_are_planned_where_attention_reads_them(share: bool) -> None:
    pack = build_pack(triplets([(3, 17, 5, 4)]), ROLES, 2, share_prompts=share)
    (every,), (needed,) = (shards(pack, 1, all_segments=each) for each in (True, False))
    assert every.packing.segments is not None and (needed.packing.segments is not None) == share


LOGPROBS = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0])
SEQUENCES = torch.tensor([2, 0, 2, 0, 0])
WEIGHTS = torch.tensor([1.0, 10.0, 100.0])


def sums(logprobs: torch.Tensor, sequences: torch.Tensor, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of three sequences, and the rows' gradient of their weighted sum."""
    logprobs = logprobs.clone().requires_grad_()
    pack: Any = None
    microbatch = Microbatch(
        torch.zeros(1, 1), PackedResponses(), sequences, sequences > 9, torch.ones(3), torch.zeros(1), pack
    )
    total = microbatch.sequence_sums(logprobs, group)
    (total * WEIGHTS).sum().backward()
    return total.detach(), logprobs.grad


def on_two_ranks() -> dict[str, Any]:
    """The rows dealt out unevenly: the second rank has one of them, and then none."""
    with layout(context_parallel_size=2) as groups:
        group = groups.context_group
        cuts = {"four and one": 4, "five and none": 5}
        shares = {name: slice(0, cut) if group.rank() == 0 else slice(cut, None) for name, cut in cuts.items()}
        return {name: sums(LOGPROBS[share], SEQUENCES[share], group) for name, share in shares.items()}


def test_rows_are_summed_by_sequence_and_a_sequence_without_rows_is_zero() -> None:
    with layout() as groups:
        total, gradient = sums(LOGPROBS, SEQUENCES, groups.context_group)
        nothing, _ = sums(LOGPROBS[:0], SEQUENCES[:0], groups.context_group)
    assert total.tolist() == [-26.0, 0.0, -5.0] and gradient.tolist() == [100.0, 1.0, 100.0, 1.0, 1.0]
    assert nothing.tolist() == [0.0, 0.0, 0.0]


def test_every_rank_has_the_whole_sum_and_its_own_rows_gradient() -> None:
    ranks = two_ranks(__name__)
    assert len(ranks) == 2
    for name in ranks[0]:
        for found in ranks:
            assert found[name][0].tolist() == [-26.0, 0.0, -5.0]
        assert torch.cat([found[name][1] for found in ranks]).tolist() == [100.0, 1.0, 100.0, 1.0, 1.0]
