"""Plans of global batches: complete, within the budget, even, balanced and full."""

import math
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_solopo.config import ObjectiveConfig
from megatron_solopo.data import batch_plan
from megatron_solopo.data.batch_plan import (
    TripletSize,
    TripletSizes,
    padded_lengths,
    plan_global_batch,
    plan_single_pass,
    share_out_pass,
    triplet_sizes,
)
from megatron_solopo.errors import UserError
from tests.tiny_models import TINY

SOLOPO = ObjectiveConfig().roles.all
MAX_TOKENS = 1000


def size(tokens):
    return TripletSize(padded_tokens=tokens, tokens=tokens, cost=tokens**2)


def lognormal_sizes(count, seed):
    """Lengths like those of multi-hop question answering: 1.1K short, 7.5K long, 150 tokens of answer."""
    rng = np.random.default_rng(seed)

    def lengths(median, sigma):
        return np.maximum(1, rng.lognormal(np.log(median), sigma, count)).astype(np.int64)

    prompts = {"short": lengths(1100, 0.4), "long": lengths(7500, 0.5)}
    responses = {"chosen": lengths(150, 0.6), "rejected": lengths(150, 0.6)}
    return triplet_sizes(prompts, responses, SOLOPO, 8, TINY, share_prompts=False).select(np.arange(count))


def rank_loads(plan, sizes):
    return np.array([sum(sizes[i].cost for pack in packs for i in pack) for packs in plan])


def assert_legal(plan, sizes, max_triplets):
    for pack in (pack for packs in plan for pack in packs):
        assert 0 < len(pack) <= (max_triplets or len(sizes))
        assert sum(sizes[i].padded_tokens for i in pack) <= MAX_TOKENS


# Cost and tokens on their own: of two triplets the shorter may well be the costlier.
any_size = st.builds(TripletSize, st.integers(1, MAX_TOKENS), st.just(1), st.integers(1, MAX_TOKENS**2))
batches = st.lists(any_size, min_size=1, max_size=40)
limits = st.one_of(st.none(), st.integers(1, 5))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), limits, st.data())
def test_plan_is_complete_even_within_budget_and_deterministic(num_ranks, packs_multiple, rounds, max_triplets, data):
    count = num_ranks * packs_multiple * rounds
    sizes = data.draw(st.lists(any_size, min_size=count, max_size=count))
    arguments = {
        "max_tokens": MAX_TOKENS, "max_triplets": max_triplets, "num_ranks": num_ranks, "packs_multiple": packs_multiple
    }  # fmt: skip
    plan = plan_global_batch(sizes, **arguments)
    assert sorted(i for packs in plan for pack in packs for i in pack) == list(range(count))
    assert len(plan) == num_ranks
    assert len({len(packs) for packs in plan}) == 1
    assert len(plan[0]) % packs_multiple == 0
    assert_legal(plan, sizes, max_triplets)
    assert plan == plan_global_batch(list(sizes), **arguments)


def columns(sizes):
    padded, tokens, cost = (np.array(column, dtype=np.int64) for column in zip(*sizes, strict=True))
    return TripletSizes(padded, tokens, cost, *[tokens] * 3)  # the others are not read


@settings(max_examples=200, deadline=None)
@given(batches, st.integers(1, 5), st.integers(1, 3), limits, st.integers(1, 9), st.integers(1, 60))
def test_single_pass_counts_each_triplet_once_for_any_number_of_them(
    sizes, num_ranks, packs_multiple, max_triplets, wanted, window
):
    share = {"num_ranks": num_ranks, "packs_multiple": packs_multiple}
    with mock.patch.object(batch_plan, "_WINDOW", window):
        packs = plan_single_pass(
            columns(sizes), max_tokens=MAX_TOKENS, max_triplets=max_triplets, wanted_packs=wanted, **share
        )
    assert sorted(row for pack in packs for row in pack.tolist()) == list(range(len(sizes)))
    assert_legal([[pack.tolist() for pack in packs]], sizes, max_triplets)
    costs = [sum(sizes[row].cost for row in pack) for pack in packs]
    parts = share_out_pass(costs, packs_per_part=wanted, **share)
    counted = [number for part in parts for number in part.packs[part.counted].tolist()]
    assert sorted(counted) == list(range(len(packs)))
    for part in parts:
        assert part.packs.shape == part.counted.shape and part.packs.shape[0] == num_ranks
        assert part.packs.shape[1] % packs_multiple == 0
        assert part.packs.shape[1] <= -(-wanted // packs_multiple) * packs_multiple
    assert sum(part.packs.size for part in parts) - len(packs) < num_ranks * packs_multiple, "few repetitions"


def test_a_pass_of_nothing_has_no_parts():
    assert share_out_pass([], num_ranks=4, packs_multiple=2, packs_per_part=40) == []


@pytest.mark.parametrize(("packs", "parts", "longest"), [(1536, 1, 192), (1537, 2, 97), (3071, 2, 192), (3073, 3, 129)])
def test_a_part_of_a_pass_is_never_longer_than_asked(packs, parts, longest):
    found = share_out_pass([1] * packs, num_ranks=8, packs_per_part=192)
    assert [len(found), max(part.packs.shape[1] for part in found)] == [parts, longest]


def test_single_pass_repeats_nothing_where_an_even_plan_exists():
    packs = plan_single_pass(columns([size(10)] * 8), max_tokens=MAX_TOKENS, max_triplets=None, num_ranks=4)
    assert [len(pack) for pack in packs] == [2] * 4


def test_a_rank_without_a_pack_repeats_the_cheapest():
    (part,) = share_out_pass([900, 7], num_ranks=4)
    assert part.packs.tolist() == [[0], [1], [1], [1]] and part.counted.tolist() == [[True], [True], [False], [False]]


@pytest.mark.parametrize("seed", range(5))
def test_ranks_of_a_pass_do_equal_work_place_by_place(seed):
    sizes = lognormal_sizes(3000, seed)
    packs = plan_single_pass(columns(sizes), max_tokens=65_536, max_triplets=None, num_ranks=4, wanted_packs=40)
    costs = np.array([sum(sizes[row].cost for row in pack) for pack in packs])
    parts = share_out_pass(costs.tolist(), num_ranks=4, packs_per_part=40)
    assert len(parts) == -(-len(packs) // 160) and all(20 <= part.packs.shape[1] <= 40 for part in parts[:-1])
    loads = np.array([costs[part.packs].sum(axis=1) for part in parts])
    uneven = loads.max(axis=1) / loads.mean(axis=1)
    # A single triplet may cost more than several packs. With as many packs as the others, its rank has most work.
    assert np.median(uneven) < 1.005 and uneven.max() < 1.05
    for part in parts:
        assert (costs[part.packs].max(axis=0) <= 1.2 * costs[part.packs].min(axis=0)).mean() > 0.9


def test_the_packs_of_a_pass_fill_their_budget_when_nothing_else_is_wanted():
    sizes = lognormal_sizes(3000, 0)
    packs = plan_single_pass(columns(sizes), max_tokens=65_536, max_triplets=None, num_ranks=4, wanted_packs=1)
    assert sum(s.tokens for s in sizes) / (len(packs) * 65_536) > 0.9


@pytest.mark.parametrize(
    ("tokens", "num_packs"),
    [
        ([300, 700, 450, 550, 100, 900, 1000], 4),
        ([400, 400, 600, 600], 2),  # in the order given it takes three
        ([600, 560, 401, 39] + [25] * 16, 2),  # 39 in the first pack that takes it, not the fullest: three
    ],
)
def test_best_fit_decreasing_finds_the_full_packing(tokens, num_packs):
    sizes = [size(count) for count in tokens]
    plan = plan_global_batch(sizes, max_tokens=MAX_TOKENS, max_triplets=None, num_ranks=1)
    assert [sum(tokens[i] for i in pack) for pack in plan[0]] == [MAX_TOKENS] * num_packs


def test_costliest_pack_of_each_rank_comes_first():
    sizes = lognormal_sizes(64, seed=0)
    for packs in plan_global_batch(sizes, max_tokens=32_768, max_triplets=None, num_ranks=4):
        costs = [sum(sizes[i].cost for i in pack) for pack in packs]
        assert costs == sorted(costs, reverse=True)


@pytest.mark.parametrize("seed", range(5))
def test_fill_and_balance_on_lognormal_lengths(seed):
    sizes = lognormal_sizes(256, seed)
    plan = plan_global_batch(sizes, max_tokens=65_536, max_triplets=None, num_ranks=4)
    loads = rank_loads(plan, sizes)
    assert loads.max() / loads.mean() < 1.01
    num_packs = sum(len(packs) for packs in plan)
    assert sum(s.tokens for s in sizes) / (num_packs * 65_536) > 0.9


@pytest.mark.parametrize("seed", range(5))
def test_balance_beats_round_robin(seed):
    sizes = lognormal_sizes(64, seed)
    loads = rank_loads(plan_global_batch(sizes, max_tokens=32_768, max_triplets=None, num_ranks=4), sizes)
    round_robin = rank_loads([[list(range(rank, 64, 4))] for rank in range(4)], sizes)
    assert loads.max() / loads.mean() - 1 < 0.2 * (round_robin.max() / round_robin.mean() - 1)
    assert loads.max() / loads.mean() < 1.02


def test_balance_without_packing():
    sizes = lognormal_sizes(64, seed=3)
    plan = plan_global_batch(sizes, max_tokens=65_536, max_triplets=1, num_ranks=4)
    assert {len(pack) for packs in plan for pack in packs} == {1}
    loads = rank_loads(plan, sizes)
    assert loads.max() / loads.mean() < 1.02


def test_a_triplet_over_the_budget_is_named():
    message = "triplet 2 needs 1001 padded tokens, more than one pack's 1000; .*data.max_tokens_per_pack"
    sizes = [size(5), size(1000), size(1001)]
    for planner, given_sizes in ((plan_global_batch, sizes), (plan_single_pass, columns(sizes))):
        with pytest.raises(UserError, match=message):
            planner(given_sizes, max_tokens=MAX_TOKENS, max_triplets=None, num_ranks=1)


@pytest.mark.parametrize(("count", "num_ranks", "packs_multiple", "needed"), [(3, 4, 1, 4), (7, 4, 2, 8), (0, 2, 1, 2)])
def test_too_few_triplets_for_the_ranks(count, num_ranks, packs_multiple, needed):
    message = f"{count} triplets .*{num_ranks} data-parallel ranks.*{needed} triplets are needed.*global_batch_size"
    with pytest.raises(UserError, match=message):
        plan_global_batch(
            [size(1)] * count,
            max_tokens=MAX_TOKENS,
            max_triplets=None,
            num_ranks=num_ranks,
            packs_multiple=packs_multiple,
        )


@pytest.mark.parametrize(("wanted", "packs"), [(1, 1), (4, 4), (5, 6), (7, 8), (8, 8), (9, 8), (100, 8)])
def test_a_pipeline_gets_the_packs_that_it_wants_as_far_as_there_are_triplets(wanted, packs):
    limits = {"max_tokens": MAX_TOKENS, "max_triplets": None, "num_ranks": 2, "packs_multiple": 2 if packs > 1 else 1}
    plan = plan_global_batch([size(10)] * 17, wanted_packs=wanted, **limits)
    assert [len(rank) for rank in plan] == [packs, packs]
    assert sorted(i for rank in plan for pack in rank for i in pack) == list(range(17))
    assert len(plan_single_pass(columns([size(10)] * 17), wanted_packs=wanted, **limits)) == 2 * packs


def test_packs_that_cannot_be_shared_evenly():
    """Five triplets of a whole pack each make five packs, which two ranks cannot share."""
    with pytest.raises(UserError, match=r"6 triplets are needed.*multiple of 2"):
        plan_global_batch([size(MAX_TOKENS)] * 5, max_tokens=MAX_TOKENS, max_triplets=None, num_ranks=2)


def test_padded_lengths():
    assert padded_lengths(np.array([1, 3, 4, 31, 47, 123]), 4).tolist() == [4, 4, 4, 32, 48, 124]
    assert padded_lengths(np.array([3, 47]), 1).tolist() == [3, 47]


def _flops(length, prompt_and_response):
    """Forward FLOPs of one sequence of TINY: matrix products, causal attention, and the output of its response."""
    weights = 4 * 32 * 32 + 3 * 32 * 48
    return 4 * (2 * weights * length + 2 * 32 * length**2) + 2 * 32 * 131 * prompt_and_response[1]


def test_triplet_sizes_against_a_loop():
    prompts = {"short": np.array([3, 47]), "long": np.array([123, 31])}
    responses = {"chosen": np.array([5, 2]), "rejected": np.array([1, 7])}
    sizes = triplet_sizes(prompts, responses, SOLOPO, 8, TINY, share_prompts=False)
    for row, expected in enumerate([[(3, 5), (3, 1), (123, 5)], [(47, 2), (47, 7), (31, 2)]]):
        lengths = [prompt + response for prompt, response in expected]
        padded = [length if length % 8 == 0 else length + 8 - length % 8 for length in lengths]
        assert sizes.select(np.array([row])) == [
            TripletSize(sum(padded), sum(lengths), math.ceil(sum(map(_flops, padded, expected)) / 1e6))
        ]
    assert len(sizes) == 2
