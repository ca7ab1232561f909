"""Filling a context to a length, for tokenizers whose joined documents differ from the sum of the documents."""

from collections.abc import Sequence

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_solopo.triplets.contexts import TOLERANCE, Filler, Pool


def make_pool(sizes: Sequence[int], keys: Sequence[int] | None = None) -> Pool:
    keys = np.array(range(len(sizes)) if keys is None else keys, dtype=np.int32)
    return Pool(np.arange(len(sizes)), np.array(sizes, dtype=np.int32), keys)


@settings(deadline=None, max_examples=300)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=2, max_size=40),
    joint=st.sampled_from([-2, -1, 0, 1, 4]),
    room=st.integers(0, 400),
    leak=st.integers(0, 3),
    seed=st.integers(0, 99),
)
def test_never_over_and_complete_only_within_a_hundredth(sizes, joint, room, leak, seed) -> None:
    pool = make_pool(sizes)
    rng = np.random.default_rng(seed)
    empty = 50 + sizes[0]
    limit = empty + room

    def count(taken: Sequence[int]) -> int:
        return empty + sum(sizes[index] for index in taken) + joint * len(taken)

    def usable(index: int) -> bool:
        return leak == 0 or index % (leak + 1) > 0

    filled = Filler(pool, usable, count, limit, rng).fill([0], map(int, rng.permutation(len(sizes))), empty)
    taken = filled.documents
    assert filled.length == count(taken) <= limit
    assert len(set(taken)) == len(taken) and 0 not in taken and all(map(usable, taken))
    assert filled.complete == (filled.length >= limit - int(limit * TOLERANCE))
    if joint == 0 and not filled.complete:
        free = [size for index, size in enumerate(sizes) if index and index not in taken and usable(index)]
        assert all(size > limit - filled.length for size in free)


def test_a_large_pool_always_suffices() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(30, 400, size=3000)
    pool = make_pool(sizes)
    for limit in [2048, 4096, 8192, 32768, 131072] * 20:
        # Every joint costs a token that the sizes do not know of.
        filler = Filler(
            pool, lambda index: index % 7 > 0, lambda taken: int(100 + sizes[taken].sum() + len(taken)), limit, rng
        )
        filled = filler.fill([], map(int, rng.permutation(3000)), 100)
        assert filled.complete and 0.99 * limit - 1 < filled.length <= limit


def test_documents_of_one_text_never_share_a_context() -> None:
    pool = make_pool([10] * 6, keys=[0, 0, 2, 2, 4, 4])
    pool.members = np.arange(6)
    filled = Filler(pool, lambda index: True, lambda taken: 10 * (1 + len(taken)), 60, np.random.default_rng(0)).fill(
        [0], range(6), 10
    )
    assert sorted(pool.keys[filled.documents]) == [2, 4] and not filled.complete


def test_every_document_is_asked_about_once() -> None:
    asked: list[int] = []

    def usable(index: int) -> bool:
        asked.append(index)
        return index % 2 == 0

    pool = make_pool(range(10, 60))
    Filler(pool, usable, lambda taken: sum(taken) + 10 * len(taken), 700, np.random.default_rng(0)).fill(
        [], range(50), 0
    )
    assert asked and len(set(asked)) == len(asked)


def test_the_same_generator_makes_the_same_choice() -> None:
    pool = make_pool(np.random.default_rng(5).integers(5, 50, size=200))

    def choose(seed: int) -> list[int]:
        rng = np.random.default_rng(seed)
        filler = Filler(pool, lambda index: True, lambda taken: int(pool.tokens[taken].sum()), 1500, rng)
        return filler.fill([], map(int, rng.permutation(200)), 0).documents

    assert choose(1) == choose(1) != choose(2)
