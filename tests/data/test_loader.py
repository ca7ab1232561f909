"""The loader: which triplets come when, under every layout and after every resume."""

import itertools
import math
import re

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_solopo.architecture.flops import forward_flops
from megatron_solopo.config import ObjectiveConfig
from megatron_solopo.data.loader import GlobalBatchLoader, LoaderSource, Packing, SinglePass, TripletDataset
from megatron_solopo.errors import UserError
from tests.tiny_models import TINY

SOLOPO, SHORT_PO, LONG_PO = (ObjectiveConfig(name=name).roles.all for name in ("solopo", "short_po", "long_po"))
COLUMNS = {"short": "prompt_short", "long": "prompt_long"}
MAX_TOKENS = 700
RECORDED_ORDER = [28, 24, 20, 38, 5, 34, 18, 36]


def table_of(lengths):
    """Rows from (short, long, chosen, rejected) token counts; a row's token ids tell it from the others."""
    names = ("prompt_short", "prompt_long", "chosen", "rejected")
    features = {"id": datasets.Value("string")} | {name: datasets.List(datasets.Value("int32")) for name in names}
    rows = {"id": [f"row-{i}" for i in range(len(lengths))]}
    for column, name in enumerate(names):
        rows[name] = [[1000 * i + column * 200 + k for k in range(row[column])] for i, row in enumerate(lengths)]
    return datasets.Dataset.from_dict(rows, features=datasets.Features(features))


def random_lengths(count, seed=0):
    rng = np.random.default_rng(seed)
    return np.stack([rng.integers(1, high, count) for high in (48, 124, 32, 32)], axis=1).tolist()


TABLE = table_of(random_lengths(47))


def split(changes):
    """The loader's own arguments, and its packing."""
    own = {
        name: changes.pop(name) for name in ("global_batch_size", "seed", "packs_per_part", "done") if name in changes
    }
    layout = {"sequence_multiple": 4, "max_tokens_per_pack": MAX_TOKENS, "dp_rank": 0, "dp_size": 1}
    return own, Packing(**layout | changes, share_prompts=False)


def loader(table=TABLE, roles=SOLOPO, **changes):
    own, packing = split(changes)
    own = {"global_batch_size": 8, "seed": 1234} | own
    return GlobalBatchLoader([LoaderSource(TripletDataset(table, COLUMNS, TINY), roles)], packing, **own)


def sequential(table=TABLE, roles=SOLOPO, **changes):
    own, packing = split(changes)
    return SinglePass(TripletDataset(table, COLUMNS, TINY), roles, packing, **{"packs_per_part": 4} | own)


def rows_of(batches):
    """Dataset rows of one batch as all its ranks hold it, sorted."""
    return sorted(row for batch in batches for pack in batch.packs for row in pack.triplet_indices.tolist())


def stream(loaders, steps):
    return [rows_of([one.next_batch() for one in loaders]) for _ in range(steps)]


def all_ranks(dp_size, **changes):
    return [loader(dp_rank=rank, dp_size=dp_size, **changes) for rank in range(dp_size)]


def test_same_triplets_in_every_batch_under_every_layout():
    expected = stream(all_ranks(1), 15)
    assert stream(all_ranks(2), 15) == expected
    assert stream(all_ranks(4), 15) == expected
    assert stream(all_ranks(2, packs_multiple=2), 15) == expected
    assert stream(all_ranks(2, sequence_multiple=16, max_triplets_per_pack=1), 15) == expected


def test_every_epoch_holds_every_triplet_once_in_an_order_of_its_own():
    one = loader(global_batch_size=1)
    order = [rows_of([one.next_batch()])[0] for _ in range(3 * len(TABLE))]
    epochs = [order[start : start + len(TABLE)] for start in range(0, len(order), len(TABLE))]
    assert all(sorted(epoch) == list(range(len(TABLE))) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert list(range(len(TABLE))) not in epochs


def test_nothing_is_dropped_where_a_batch_spans_two_epochs():
    one = loader()
    seen = [row for _ in range(47) for row in rows_of([one.next_batch()])]
    assert np.bincount(seen, minlength=47).tolist() == [8] * 47


def test_order_depends_on_the_seed_alone():
    assert stream([loader()], 5) == stream([loader()], 5)
    assert stream([loader()], 5) != stream([loader(seed=1235)], 5)


def test_order_is_the_recorded_one():
    """A change here would make every checkpoint resume on other triplets."""
    one = loader(global_batch_size=1)
    assert [rows_of([one.next_batch()])[0] for _ in range(8)] == RECORDED_ORDER


@pytest.mark.parametrize("steps", [0, 3, 5, 6, 13])
@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_resume_continues_exactly_also_mid_epoch_and_on_other_ranks(steps, dp_size):
    whole = stream(all_ranks(2), steps + 8)
    before = all_ranks(2)
    stream(before, steps)
    resumed = all_ranks(dp_size)
    for one in resumed:
        one.load_state_dict(before[1].state_dict())
    assert stream(resumed, 8) == whole[steps:]


def test_resume_on_the_same_layout_gives_the_same_packs():
    first = loader(dp_rank=1, dp_size=2)
    first.next_batch()
    second = loader(dp_rank=1, dp_size=2)
    second.load_state_dict(first.state_dict())
    ours, theirs = first.next_batch().packs, second.next_batch().packs
    assert [pack.tokens_T.tolist() for pack in ours] == [pack.tokens_T.tolist() for pack in theirs]


def test_state_is_the_same_on_every_rank_and_plain():
    states = []
    for one in all_ranks(2):
        one.next_batch()
        states.append(one.state_dict())
    assert states[0] == states[1] == {
        "seed": 1234, "dataset_length": 47, "global_batch_size": 8, "consumed_triplets": 8
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "key", "change"),
    [
        ("seed", "seed", {"seed": 7}),
        ("dataset_length", "data.path (or data.sources)", {"table": TABLE.select(range(40))}),
        ("global_batch_size", "training.global_batch_size", {"global_batch_size": 4}),
    ],
)
def test_a_foreign_state_is_refused_by_name(name, key, change):
    ours = loader()
    ours.next_batch()
    with pytest.raises(UserError, match=f"{name} .*restore {re.escape(key)}, or set run_dir") as error:
        ours.load_state_dict(loader(**change).state_dict())
    assert "\n" not in str(error.value)
    assert ours.consumed_triplets == 8


def test_packs_hold_the_tokens_of_their_rows():
    for pack in loader().next_batch().packs:
        lengths = pack.sequence_lengths_S.reshape(pack.num_triplets, 3).tolist()
        starts = pack.cu_seqlens_B1[:-1].reshape(pack.num_triplets, 3).tolist()
        for triplet, index in enumerate(pack.triplet_indices.tolist()):
            row = TABLE[index]
            assert pack.ids[triplet] == row["id"]
            expected = [
                row["prompt_short"] + row["chosen"],
                row["prompt_short"] + row["rejected"],
                row["prompt_long"] + row["chosen"],
            ]
            for start, length, tokens in zip(starts[triplet], lengths[triplet], expected, strict=True):
                assert pack.tokens_T[start : start + length].tolist() == tokens


@pytest.mark.parametrize("dp_size", [1, 2, 4])
def test_totals_are_of_all_ranks_and_known_to_each(dp_size):
    batches = [one.next_batch() for one in all_ranks(dp_size)]
    packs = [pack for batch in batches for pack in batch.packs]
    assert len({len(batch.packs) for batch in batches}) == 1
    for batch in batches:
        assert batch.num_triplets == 8
        assert batch.num_packs == len(packs)
        assert batch.num_tokens == sum(pack.num_tokens for pack in packs)
        assert batch.padded_tokens == sum(pack.padded_tokens for pack in packs)
        assert batch.pack_fill == pytest.approx(batch.num_tokens / (len(packs) * MAX_TOKENS))
    assert max(pack.padded_tokens for pack in packs) <= MAX_TOKENS


def test_sequences_are_padded_for_the_layout():
    for pack in loader(sequence_multiple=16).next_batch().packs:
        assert all(length % 16 == 0 for length in pack.cu_seqlens_B1.diff().tolist())


def test_dataset_smaller_than_a_batch():
    message = "holds 47 triplets, fewer than one global batch of 48; .*training.global_batch_size"
    with pytest.raises(UserError, match=message):
        loader(global_batch_size=48)


def test_batch_that_the_ranks_cannot_share():
    with pytest.raises(UserError, match=r"training.global_batch_size=10: must be a multiple of 8 .*parallel"):
        loader(global_batch_size=10, dp_size=4, packs_multiple=2)


def test_triplets_over_the_budget_are_all_reported_at_construction():
    table = table_of([(10, 10, 5, 5), (10, 100, 5, 5), (10, 10, 5, 5), (10, 120, 5, 5)])
    # 3 sequences: 16 + 16 + round_up(long + 5, 4), so 140 and 160.
    message = r"2 of 4 triplets .*data.max_tokens_per_pack=100, first row-1, row-3; the largest needs 160 "
    with pytest.raises(UserError, match=message) as error:
        loader(table, global_batch_size=1, max_tokens_per_pack=100)
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=message):
        sequential(table, max_tokens_per_pack=100)
    loader(table, global_batch_size=1, max_tokens_per_pack=160).next_batch()


def test_short_prompts_alone_do_not_need_the_long_budget():
    table = table_of([(10, 900, 5, 5)] * 4)
    assert loader(table, roles=SHORT_PO, global_batch_size=4).next_batch().num_tokens == 4 * 30


def test_missing_context_is_named():
    table = TABLE.remove_columns("prompt_long")
    assert loader(table, roles=SHORT_PO).next_batch().num_triplets == 8
    with pytest.raises(UserError, match=r"no long prompts .*objective.name"):
        loader(table)


@pytest.mark.parametrize(("column", "lengths"), [("prompt_short", (0, 9, 9, 9)), ("rejected", (9, 9, 9, 0))])
def test_empty_prompt_or_response_is_named(column, lengths):
    with pytest.raises(UserError, match=f"1 triplets have no token in {column}, first row-1; .*data.path"):
        loader(table_of([(9, 9, 9, 9), lengths]), global_batch_size=1)


def test_a_selected_table_is_read_through_its_selection():
    """`datasets` keeps a selection as an index beside the full table."""
    chosen = [40, 3, 17, 3]
    dataset = TripletDataset(TABLE.select(chosen), COLUMNS, TINY)
    whole = TripletDataset(TABLE, COLUMNS, TINY)
    sizes, expected = dataset.sizes(SOLOPO, 4, share_prompts=False), whole.sizes(SOLOPO, 4, share_prompts=False)
    assert sizes.select(np.arange(4)) == expected.select(np.array(chosen))
    for row, original in zip(dataset.rows([3, 0], SOLOPO), whole.rows([3, 40], SOLOPO), strict=True):
        assert row.id == original.id
        assert row.prompts["long"].tolist() == original.prompts["long"].tolist()


def test_masks_reach_the_packs_and_the_lengths():
    generator = np.random.default_rng(7)
    masks = {
        f"{name}_mask": [
            (generator.random(len(tokens)) < 0.5) | (np.arange(len(tokens)) == 0) for tokens in TABLE[name]
        ]
        for name in ("chosen", "rejected")
    }
    table = TABLE
    for column, values in masks.items():
        feature = datasets.List(datasets.Value("bool"))
        table = table.add_column(column, [value.tolist() for value in values], feature=feature)
    table = table.select(range(40, 0, -1))
    dataset = TripletDataset(table, COLUMNS, TINY)
    assert dataset.counted_lengths("chosen").tolist() == [masks["chosen_mask"][row].sum() for row in range(40, 0, -1)]
    for pack in loader(table).next_batch().packs:
        counts = pack.counted_lengths_S.reshape(pack.num_triplets, 3).tolist()
        labels = pack.response_labels_N.split(pack.counted_lengths_S.tolist())
        for triplet, row in enumerate(40 - pack.triplet_indices):
            kept = {name: masks[f"{name}_mask"][row] for name in ("chosen", "rejected")}
            chosen, rejected = (int(kept[name].sum()) for name in ("chosen", "rejected"))
            assert counts[triplet] == [chosen, rejected, chosen]
            assert labels[3 * triplet + 1].tolist() == np.array(TABLE[int(row)]["rejected"])[kept["rejected"]].tolist()


def test_sizes_equal_the_packs_built_from_them():
    sizes = TripletDataset(TABLE, COLUMNS, TINY).sizes(LONG_PO, 8, share_prompts=False)
    for batch in sequential(roles=LONG_PO, sequence_multiple=8, max_triplets_per_pack=1):
        for pack in batch.packs:
            (index,) = pack.triplet_indices.tolist()
            assert sizes.tokens[index] == pack.num_tokens
            assert sizes.padded_tokens[index] == pack.padded_tokens
            squares = int(pack.cu_seqlens_B1.diff().square().sum())
            flops = forward_flops(TINY, pack.padded_tokens, squares, int(pack.response_lengths_S.sum())).total
            assert sizes.cost[index] == math.ceil(flops / 1e6)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2]), st.sets(st.integers(0, 46)))
def test_a_pass_counts_every_triplet_that_is_not_done(packs_per_part, dp_size, packs_multiple, done_rows):
    done = np.zeros(47, dtype=bool)
    done[list(done_rows)] = True
    passes = [
        sequential(packs_per_part=packs_per_part, dp_rank=rank, dp_size=dp_size, packs_multiple=packs_multiple, done=d)
        for d in (None, done)
        for rank in range(dp_size)
    ]
    whole, rest = passes[:dp_size], passes[dp_size:]
    packs_of = {row: pack for each in whole for pack in counted_packs(each) for row in pack}
    assert sorted(row for each in whole for pack in counted_packs(each) for row in pack) == list(range(47))
    again = [pack for each in rest for pack in counted_packs(each)]
    # The same packs, whole, so that their numbers are the same bits.
    assert sorted(again) == sorted({packs_of[row] for row in set(range(47)) - done_rows})
    for batches in zip(*rest, strict=True):
        assert len({len(batch.packs) for batch in batches}) == 1 and len(batches[0].packs) % packs_multiple == 0
        assert len({tuple(batch.triplets_at) for batch in batches}) == 1
        assert len(batches[0].triplets_at) == len(batches[0].packs)
    assert sum(sum(batch.triplets_at) for batch in rest[0]) == 47 - len(done_rows) == rest[0].num_triplets


def counted_packs(one):
    """The rows of every pack that counts on one rank."""
    return [
        tuple(pack.triplet_indices.tolist())
        for batch in one
        for pack, counts in zip(batch.packs, batch.counted, strict=True)
        if counts
    ]


def test_one_triplet_on_four_ranks():
    batches = [next(iter(sequential(TABLE.select([5]), dp_rank=rank, dp_size=4))) for rank in range(4)]
    assert sorted(batch.counted for batch in batches) == [[False], [False], [False], [True]]
    assert {batch.packs[0].ids for batch in batches} == {("row-5",)}
    assert {tuple(batch.triplets_at) for batch in batches} == {(1,)}


SFT = ObjectiveConfig(name="sft").roles.all


@pytest.mark.parametrize("share_prompts", [True, False])
def test_rows_of_all_sources_share_packs_with_the_sequences_of_their_own(share_prompts: bool) -> None:
    """Each pack against the rows themselves, over two ranks."""
    tables = [TABLE.select(range(20)), TABLE.select(range(20, 30)), TABLE.select(range(30, 47))]
    sources = [
        LoaderSource(TripletDataset(table, COLUMNS, TINY), roles, weight)
        for table, roles, weight in zip(tables, (SOLOPO, LONG_PO, SFT), (3.0, 1.0, 2.0), strict=True)
    ]
    seen: list[tuple[int, int]] = []
    for rank in range(2):
        packing = Packing(4, share_prompts, MAX_TOKENS, rank, 2)
        batch = GlobalBatchLoader(sources, packing, global_batch_size=12, seed=3).next_batch()
        assert batch.triplets_of == (6, 2, 4)
        for pack in batch.packs:
            rows = iter(pack.triplet_indices.tolist())
            expected = []
            for group in pack.groups:
                for row in itertools.islice(rows, group.num_triplets):
                    seen.append((group.source, row))
                    tokens = tables[group.source][row]
                    expected += [(tokens[f"prompt_{role.context}"], tokens[role.response]) for role in group.roles]
            prompts_S = (pack.cu_seqlens_B1[pack.blocks_S], pack.prompt_lengths_B[pack.blocks_S])
            places = zip(*prompts_S, pack.response_starts_S, pack.response_lengths_S, expected, strict=True)
            for start, length, response_start, response_length, (prompt, response) in places:
                assert pack.tokens_T[start : start + length].tolist() == prompt
                assert pack.tokens_T[response_start : response_start + response_length].tolist() == response
    assert len(set(seen)) == 12 and [source for source, _ in sorted(seen)] == [0] * 6 + [1] * 2 + [2] * 4


def test_an_id_in_a_mixture_says_which_source_it_is_of() -> None:
    """Two sources with the same ids, in packs and in errors."""
    table = TABLE.select(range(6))
    names = ("books", "chats")
    sources = [LoaderSource(TripletDataset(table, COLUMNS, TINY, name), SOLOPO) for name in names]
    batch = GlobalBatchLoader(sources, Packing(4, False, MAX_TOKENS, 0, 1), global_batch_size=12, seed=3).next_batch()
    ids = {each for pack in batch.packs for each in pack.ids}
    assert ids == {f"{name}/row-{row}" for name in names for row in range(6)}
    with pytest.raises(UserError, match=r"12 of 12 triplets are larger .*, first books/row-0, "):
        GlobalBatchLoader(sources, Packing(4, False, 4, 0, 1), global_batch_size=12, seed=3)
    empty = TripletDataset(table_of([(9, 9, 9, 0)]), COLUMNS, TINY, "chats")
    with pytest.raises(UserError, match=r"no token in rejected, first chats/row-0; .* \(or data\.sources\)"):
        empty.sizes(SOLOPO, 1, share_prompts=False)
