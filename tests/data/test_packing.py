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


def with_masks(rows):
    """The same, but only every third token of chosen answers counts, and all of a rejected one by its mask."""
    for row in rows:
        row.masks["chosen"] = np.arange(len(row.responses["chosen"])) % 3 == 0
        if row.index % 2:
            row.masks["rejected"] = np.ones(len(row.responses["rejected"]), bool)
    return rows


def triplets_of(lengths):
    starts = np.concatenate([[1], 1 + np.cumsum([sum(row) for row in lengths])])
    return [triplet(10 + i, *row, start=int(starts[i])) for i, row in enumerate(lengths)]


COLUMNS = ("tokens", "positions", "runs", "boundaries", "lengths", "blocks", "responses", "counted", "rows", "labels",
           "sequences")  # fmt: skip


def naive_pack(rows, roles, multiple, share_prompts):
    """What a pack must hold, by appending one token at a time."""
    expected = {name: [] for name in COLUMNS}
    expected["boundaries"].append(0)
    num_blocks = len(rows) * (len({role.context for role in roles}) if share_prompts else len(roles))

    def append(token, position, run):
        for name, value in (("tokens", token), ("positions", position), ("runs", run)):
            expected[name].append(value)

    for row in rows:
        before = None
        for role in roles:
            if role.context != before or not share_prompts:
                while len(expected["tokens"]) % multiple:
                    append(PAD_TOKEN, expected["positions"][-1] + 1, expected["runs"][-1])
                if expected["tokens"]:
                    expected["boundaries"].append(len(expected["tokens"]))
                prompt, before = row.prompts[role.context].tolist(), role.context
                for position, token in enumerate(prompt):
                    append(token, position, len(expected["boundaries"]) - 1)
                prompt_end = len(expected["tokens"]) - 1
            predictor = prompt_end
            response = row.responses[role.response].tolist()
            counts = row.masks.get(role.response, [True] * len(response))
            for position, token in enumerate(response, start=len(prompt)):
                if counts[position - len(prompt)]:
                    expected["rows"].append(predictor)
                    expected["labels"].append(token)
                    expected["sequences"].append(len(expected["lengths"]))
                append(token, position, num_blocks + len(expected["lengths"]))
                predictor = len(expected["tokens"]) - 1
            expected["blocks"].append(len(expected["boundaries"]) - 1)
            expected["lengths"].append(len(prompt) + len(response))
            expected["responses"].append(len(response))
            expected["counted"].append(sum(counts))
    while len(expected["tokens"]) % multiple:
        append(PAD_TOKEN, expected["positions"][-1] + 1, expected["runs"][-1])
    expected["boundaries"].append(len(expected["tokens"]))
    return expected


def assert_equals_naive(rows, roles, multiple, share_prompts):
    pack = build_pack(rows, roles, multiple, share_prompts=share_prompts)
    expected = naive_pack(rows, roles, multiple, share_prompts)
    assert all(length % multiple == 0 for length in pack.cu_seqlens_B1.diff().tolist())
    assert pack.shares_prompts == (len(set(expected["blocks"])) < len(expected["blocks"]))
    assert pack.positions_T.tolist() == expected["positions"]
    assert pack.runs_T.tolist() == expected["runs"]
    assert pack.blocks_S.tolist() == expected["blocks"]
    assert pack.tokens_T.tolist() == expected["tokens"]
    assert pack.cu_seqlens_B1.tolist() == expected["boundaries"]
    assert pack.sequence_lengths_S.tolist() == expected["lengths"]
    assert pack.response_lengths_S.tolist() == expected["responses"]
    assert pack.counted_lengths_S.tolist() == expected["counted"]
    assert pack.response_rows_N.tolist() == expected["rows"]
    assert pack.response_labels_N.tolist() == expected["labels"]
    assert pack.response_sequences_N.tolist() == expected["sequences"]
    once = {block: prompt for block, prompt in zip(expected["blocks"], prompts_of(expected), strict=True)}
    assert pack.num_tokens == sum(expected["responses"]) + sum(once.values())
    assert pack.squares == 2 * attended_pairs(expected) - pack.num_tokens
    assert pack.padded_tokens == len(expected["tokens"])
    assert pack.max_block_length == max(np.diff(expected["boundaries"]))


def prompts_of(expected):
    return [length - response for length, response in zip(expected["lengths"], expected["responses"], strict=True)]


def attended_pairs(expected):
    """Pairs of a query and a key that it sees, itself included: a shared prompt's queries count once."""
    pairs = {
        block: prompt * (prompt + 1) // 2
        for block, prompt in zip(expected["blocks"], prompts_of(expected), strict=True)
    }
    responses = zip(prompts_of(expected), expected["responses"], strict=True)
    return sum(pairs.values()) + sum(prompt * count + count * (count + 1) // 2 for prompt, count in responses)


@pytest.mark.parametrize("share_prompts", [False, True])
@pytest.mark.parametrize("roles", ROLE_SETS)
@pytest.mark.parametrize("multiple", [1, 2, 8, 16])
def test_awkward_lengths(roles, multiple, share_prompts):
    rows = triplets_of([(3, 47, 31, 1), (31, 123, 1, 3), (1, 1, 1, 1)])
    assert_equals_naive(rows, roles, multiple, share_prompts)
    assert_equals_naive(with_masks(rows), roles, multiple, share_prompts)


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.tuples(*[st.integers(1, 20)] * 4), min_size=1, max_size=5),
    st.sampled_from(ROLE_SETS),
    st.integers(1, 24),
    st.booleans(),
)
def test_any_lengths(lengths, roles, multiple, share_prompts):
    assert_equals_naive(triplets_of(lengths), roles, multiple, share_prompts)


def test_labels_are_the_tokens_after_their_rows_and_stay_inside_the_sequence():
    pack = build_pack(triplets_of([(3, 47, 31, 5), (31, 123, 2, 3)]), tuple(Role), 8, share_prompts=False)
    assert torch.equal(pack.tokens_T[pack.response_rows_N + 1], pack.response_labels_N)
    starts = pack.cu_seqlens_B1[:-1].long()[pack.response_sequences_N]
    ends = starts + pack.sequence_lengths_S[pack.response_sequences_N]
    assert bool(((pack.response_rows_N >= starts) & (pack.response_rows_N + 1 < ends)).all())


def test_sequences_are_triplet_major_with_roles_inner():
    rows = triplets_of([(3, 10, 2, 4), (5, 20, 1, 6)])
    pack = build_pack(rows, SOLOPO, 4, share_prompts=False)
    lengths_per_triplet = pack.sequence_lengths_S.reshape(pack.num_triplets, len(SOLOPO))
    assert lengths_per_triplet.tolist() == [[5, 7, 12], [6, 11, 21]]
    (group,) = pack.groups
    assert group.roles == ("short_chosen", "short_rejected", "long_chosen")
    assert pack.ids == ("row-10", "row-11")
    assert pack.triplet_indices.tolist() == [10, 11]


def test_types_are_what_kernels_and_indexing_want():
    pack = build_pack(triplets_of([(3, 10, 2, 4)]), SOLOPO, 4, share_prompts=False)
    assert pack.cu_seqlens_B1.dtype == torch.int32
    for tensor in (pack.tokens_T, pack.response_rows_N, pack.response_labels_N, pack.response_sequences_N,
                   pack.sequence_lengths_S, pack.response_lengths_S, pack.counted_lengths_S,
                   pack.predictors_L, pack.triplet_indices):  # fmt: skip
        assert tensor.dtype == torch.int64
