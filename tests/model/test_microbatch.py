"""A pack cut for context parallelism: every response token is counted once, on the rank of its predictor."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_solopo.config import ObjectiveConfig
from megatron_solopo.data.packing import Pack, TokenizedTriplet, build_pack
from megatron_solopo.model.microbatch import Microbatch, shard_pack

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


def shards(pack: Pack, size: int) -> list[Microbatch]:
    """The pack as each of `size` context-parallel ranks sees it."""

    def place(rank: int) -> Any:
        group = SimpleNamespace(size=lambda: size, rank=lambda: rank)
        return SimpleNamespace(device=torch.device("cpu"), context_group=group)

    return [shard_pack(pack, place(rank)) for rank in range(size)]


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
            start, end = pack.cu_seqlens_S1[sequence : sequence + 2].tolist()
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
    pack = build_pack(rows, ROLES, 2 * size)
    assert sorted(found_rows(shards(pack, size))) == sorted(expected_rows(rows, pack, size))


def test_a_token_across_a_boundary_is_counted_where_its_predictor_is() -> None:
    rows = triplets([(1, 9, 5, 4)])
    pack = build_pack(rows, ROLES, 4)
    boundaries = pack.cu_seqlens_S1.tolist()
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
    parts = shards(build_pack(rows, ROLES, 8), 4)
    counts = [len(part.packing.response_rows) for part in parts]
    assert 0 in counts and sum(counts) == 3
    empty = parts[counts.index(0)]
    assert empty.packing.response_labels.shape == empty.response_sequences_N.shape == (0,)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_share_the_tokens_equally_and_know_the_whole_pack(size: int) -> None:
    pack = build_pack(triplets([(3, 17, 5, 4), (1, 2, 1, 1)]), ROLES, 2 * size)
    parts = shards(pack, size)
    assert all(part.tokens_1t.shape == (1, pack.padded_tokens // size) for part in parts)
    assert sorted(torch.cat([part.tokens_1t[0] for part in parts]).tolist()) == sorted(pack.tokens_T.tolist())
    for part in parts:
        packing = part.packing
        for boundaries in (packing.cu_seqlens_q, packing.cu_seqlens_kv, packing.cu_seqlens_q_padded):
            assert torch.equal(boundaries, pack.cu_seqlens_S1)
        assert packing.max_seqlen_q == packing.max_seqlen_kv >= max(pack.cu_seqlens_S1.diff().tolist())
        assert torch.equal(packing.response_rows, packing.response_rows.sort().values)
