"""The layout of a pack, token by token against a plain loop."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_solopo.config import ObjectiveConfig, Role
from megatron_solopo.data.packing import PAD_TOKEN, TokenizedTriplet, build_pack

SOLOPO = ObjectiveConfig().roles.all
ROLE_SETS = [SOLOPO, *(ObjectiveConfig(name=name).roles.all for name in ("short_po", "long_po")), tuple(Role)]


def triplet(index, short, long, chosen, rejected, start=1):
    """Lengths to a triplet in which every token id is another, so that no mix-up can hide."""
    lengths = (short, long, chosen, rejected)
    ids = [np.arange(start + sum(lengths[:i]), start + sum(lengths[: i + 1]), dtype=np.int32) for i in range(4)]
    return TokenizedTriplet(
        id=f"row-{index}",
        index=index,
        prompts={"short": ids[0], "long": ids[1]},
        responses={"chosen": ids[2], "rejected": ids[3]},
    )


def triplets_of(lengths):
    starts = np.concatenate([[1], 1 + np.cumsum([sum(row) for row in lengths])])
    return [triplet(10 + i, *row, start=int(starts[i])) for i, row in enumerate(lengths)]


def naive_pack(rows, roles, multiple):
    """What a pack must hold, by appending one token at a time."""
    expected = {name: [] for name in ("tokens", "boundaries", "lengths", "responses", "rows", "labels", "sequences")}
    expected["boundaries"].append(0)
    for row in rows:
        for role in roles:
            prompt = row.prompts[role.context].tolist()
            response = row.responses[role.response].tolist()
            expected["tokens"] += prompt
            for token in response:
                expected["rows"].append(len(expected["tokens"]) - 1)
                expected["labels"].append(token)
                expected["sequences"].append(len(expected["lengths"]))
                expected["tokens"].append(token)
            expected["lengths"].append(len(prompt) + len(response))
            expected["responses"].append(len(response))
            while len(expected["tokens"]) % multiple:
                expected["tokens"].append(PAD_TOKEN)
            expected["boundaries"].append(len(expected["tokens"]))
    return expected


def assert_equals_naive(pack, rows, roles, multiple):
    expected = naive_pack(rows, roles, multiple)
    assert pack.tokens_T.tolist() == expected["tokens"]
    assert pack.cu_seqlens_S1.tolist() == expected["boundaries"]
    assert pack.sequence_lengths_S.tolist() == expected["lengths"]
    assert pack.response_lengths_S.tolist() == expected["responses"]
    assert pack.response_rows_N.tolist() == expected["rows"]
    assert pack.response_labels_N.tolist() == expected["labels"]
    assert pack.response_sequences_N.tolist() == expected["sequences"]
    assert pack.num_tokens == sum(expected["lengths"])
    assert pack.padded_tokens == len(expected["tokens"])
    assert pack.max_sequence_length == max(np.diff(expected["boundaries"]))


@pytest.mark.parametrize("roles", ROLE_SETS)
@pytest.mark.parametrize("multiple", [1, 2, 8, 16])
def test_awkward_lengths(roles, multiple):
    rows = triplets_of([(3, 47, 31, 1), (31, 123, 1, 3), (1, 1, 1, 1)])
    assert_equals_naive(build_pack(rows, roles, multiple), rows, roles, multiple)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(1, 20)] * 4), min_size=1, max_size=5),
    st.sampled_from(ROLE_SETS),
    st.integers(1, 24),
)
def test_any_lengths(lengths, roles, multiple):
    rows = triplets_of(lengths)
    pack = build_pack(rows, roles, multiple)
    assert_equals_naive(pack, rows, roles, multiple)
    assert all(length % multiple == 0 for length in pack.cu_seqlens_S1.diff().tolist())


def test_labels_are_the_tokens_after_their_rows_and_stay_inside_the_sequence():
    pack = build_pack(triplets_of([(3, 47, 31, 5), (31, 123, 2, 3)]), tuple(Role), 8)
    assert torch.equal(pack.tokens_T[pack.response_rows_N + 1], pack.response_labels_N)
    starts = pack.cu_seqlens_S1[:-1].long()[pack.response_sequences_N]
    ends = starts + pack.sequence_lengths_S[pack.response_sequences_N]
    assert bool(((pack.response_rows_N >= starts) & (pack.response_rows_N + 1 < ends)).all())


def test_sequences_are_triplet_major_with_roles_inner():
    rows = triplets_of([(3, 10, 2, 4), (5, 20, 1, 6)])
    pack = build_pack(rows, SOLOPO, 4)
    lengths_per_triplet = pack.sequence_lengths_S.reshape(pack.num_triplets, len(pack.roles))
    assert lengths_per_triplet.tolist() == [[5, 7, 12], [6, 11, 21]]
    assert pack.roles == ("short_chosen", "short_rejected", "long_chosen")
    assert pack.ids == ("row-10", "row-11")
    assert pack.triplet_indices.tolist() == [10, 11]


def test_types_are_what_kernels_and_indexing_want():
    pack = build_pack(triplets_of([(3, 10, 2, 4)]), SOLOPO, 4)
    assert pack.cu_seqlens_S1.dtype == torch.int32
    for tensor in (pack.tokens_T, pack.response_rows_N, pack.response_labels_N, pack.response_sequences_N,
                   pack.sequence_lengths_S, pack.response_lengths_S, pack.triplet_indices):  # fmt: skip
        assert tensor.dtype == torch.int64
