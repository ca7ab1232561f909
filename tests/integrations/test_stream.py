"""As many packs a step as Megatron-LM asks for, and every triplet in one of them."""

from itertools import islice
from typing import Any

import datasets
import pytest

from megatron_solopo.config import ObjectiveConfig
from megatron_solopo.data.loader import GlobalBatchLoader, LoaderSource, Packing, TripletDataset
from megatron_solopo.errors import UserError
from megatron_solopo.integrations.megatron_lm import PackStream
from tests.tiny_models import TINY

ROLES = ObjectiveConfig().roles.all
ROWS, BATCH = 14, 8


@pytest.fixture(scope="module")
def dataset() -> TripletDataset:
    def column(lengths: list[int]) -> list[list[int]]:
        return [[7] * length for length in lengths]

    table = datasets.Dataset.from_dict(
        {
            "id": [f"row-{number}" for number in range(ROWS)],
            "prompt_short": column([3 + number % 5 for number in range(ROWS)]),
            "prompt_long": column([10 + 7 * (number % 9) for number in range(ROWS)]),
            "chosen": column([1 + number % 3 for number in range(ROWS)]),
            "rejected": column([1 + number % 4 for number in range(ROWS)]),
        }
    )
    return TripletDataset(table, {"short": "prompt_short", "long": "prompt_long"}, TINY)


def stream(
    dataset: TripletDataset,
    num_packs: int,
    *,
    rank: int = 0,
    size: int = 1,
    start: int = 0,
    num_batches: int = 3,
    **limits: Any,
) -> Any:
    packing = Packing(
        2,
        True,
        **({"max_tokens_per_pack": 1000} | limits),
        dp_rank=rank,
        dp_size=size,
        packs_multiple=num_packs,
    )
    loader = GlobalBatchLoader([LoaderSource(dataset, ROLES)], packing, global_batch_size=BATCH, seed=3)
    return PackStream(loader, "train", num_packs, consumed_triplets=start, num_batches=num_batches)


@pytest.mark.parametrize(("num_packs", "size"), [(8, 1), (4, 1), (4, 2), (2, 2), (1, 2)])
def test_every_step_has_its_packs_and_every_triplet_once(dataset: TripletDataset, num_packs: int, size: int) -> None:
    ranks = [list(islice(stream(dataset, num_packs, rank=rank, size=size), 3 * num_packs)) for rank in range(size)]
    expected = stream(dataset, 1)
    for step in range(3):
        mine = [item for rank in ranks for item in rank[step * num_packs : (step + 1) * num_packs]]
        wanted = next(expected).pack
        assert sorted(name for item in mine for name in item.pack.ids) == sorted(wanted.ids)
        assert [item.number for item in mine] == list(range(num_packs)) * size
        assert [item.is_last for item in mine] == ([False] * (num_packs - 1) + [True]) * size
        assert {item.batch.num_triplets for item in mine} == {BATCH} and {item.split for item in mine} == {"train"}


def test_a_micro_batch_of_one_is_a_triplet(dataset: TripletDataset) -> None:
    assert {item.pack.num_triplets for item in islice(stream(dataset, BATCH), 3 * BATCH)} == {1}


def test_it_starts_where_the_consumed_samples_say(dataset: TripletDataset) -> None:
    whole = list(islice(stream(dataset, 4), 12))
    resumed = list(islice(stream(dataset, 4, start=BATCH), 8))
    assert [item.pack.ids for item in resumed] == [item.pack.ids for item in whole[4:]]


@pytest.mark.parametrize("limits", [{"max_tokens_per_pack": 300}, {"max_triplets_per_pack": 7}])
def test_a_budget_too_small_for_a_later_batch_is_refused_at_the_start(dataset: TripletDataset, limits: Any) -> None:
    with pytest.raises(
        ValueError, match=r"starts with triplet \d+ needs 2 packs .* has 1 .*max_tokens_per_pack"
    ) as error:
        stream(dataset, 1, num_batches=20, **limits)
    assert "\n" not in str(error.value)
    items = stream(dataset, 1, num_batches=0, **limits)
    with pytest.raises(UserError, match=r"needs 2 packs"):
        list(islice(items, 20))


def test_a_budget_of_micro_batch_size_times_the_largest_triplet_always_suffices(dataset: TripletDataset) -> None:
    largest = int(dataset.sizes(ROLES, 2, share_prompts=True).padded_tokens.max())
    for num_packs in (1, 2, 4):
        items = list(
            islice(stream(dataset, num_packs, max_tokens_per_pack=BATCH // num_packs * largest), 20 * num_packs)
        )
        assert len({id(item.batch) for item in items}) == 20
