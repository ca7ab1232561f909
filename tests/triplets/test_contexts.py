"""Where the evidence lies in a context, and how documents fill it.

The test of uniformity must fail for the usual mistakes. Filling must work for tokenizers whose joined documents differ
from the sum of the documents.
"""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_solopo.triplets.contexts import (
    TOLERANCE,
    Filler,
    Pool,
    arrange,
    draw_depths,
    evidence_depths,
    uniform_distance,
)

SAMPLES, DOCUMENTS = 150, 60


def depths_of(draw) -> list[float]:
    """Depths of two pieces of evidence in each of 150 contexts, as `draw(sample, rng)` wants them."""
    tokens = np.random.default_rng(1).integers(30, 300, size=DOCUMENTS).astype(np.int32)
    found = []
    for sample in range(SAMPLES):
        rng = np.random.default_rng([7, sample])
        others = [int(index) for index in rng.permutation(np.arange(2, DOCUMENTS))]
        found += evidence_depths(arrange([0, 1], others, draw(sample, rng), tokens), {0, 1}, tokens)
    return found


def test_depths_are_uniform_more_evenly_than_chance() -> None:
    distance, critical = uniform_distance(depths_of(lambda sample, rng: draw_depths(2, sample, SAMPLES, 0, "0", rng)))
    assert distance < critical / 2


@pytest.mark.parametrize(
    "mistake",
    [
        lambda sample, rng: np.zeros(2),
        lambda sample, rng: np.array([0.0, 1.0]),
        lambda sample, rng: np.full(2, 0.5),
        # RULER's: one seed for every sample of a size.
        lambda sample, rng: np.random.default_rng(42).random(2),
        lambda sample, rng: rng.random(2) * 0.8,
        lambda sample, rng: rng.beta(0.4, 0.4, 2),
    ],
    ids=["first", "ends", "middle", "one seed", "never late", "edges"],
)
def test_a_mistake_in_the_depths_is_seen(mistake) -> None:
    distance, critical = uniform_distance(depths_of(mistake))
    assert distance > critical


def test_the_critical_value_is_that_of_independent_draws() -> None:
    rng = np.random.default_rng(0)
    over = sum(np.greater(*uniform_distance(rng.random(200))) for _ in range(2000))
    assert 0.03 < over / 2000 < 0.07


def test_distance_is_the_largest_gap_between_the_distributions() -> None:
    assert uniform_distance([0.5])[0] == 0.5
    assert uniform_distance([0.25, 0.75])[0] == 0.25
    assert uniform_distance([0.0, 0.0])[0] == 1.0


@given(
    sizes=st.lists(st.integers(1, 400), min_size=1, max_size=40),
    evidence=st.integers(1, 4),
    seed=st.integers(0, 999),
)
def test_every_document_is_there_once_and_others_keep_their_order(sizes, evidence, seed) -> None:
    tokens = np.array([50] * evidence + sizes, dtype=np.int32)
    depths = np.random.default_rng(seed).random(evidence)
    others = list(range(evidence, len(tokens)))
    arranged = arrange(list(range(evidence)), others, depths, tokens)
    assert sorted(arranged) == list(range(len(tokens)))
    assert [index for index in arranged if index >= evidence] == others
    wanted = np.argsort(depths, kind="stable")
    assert [index for index in arranged if index < evidence] == wanted.tolist()


def test_evidence_comes_as_near_to_its_depth_as_documents_allow() -> None:
    tokens = np.full(101, 10, dtype=np.int32)
    for depth in np.linspace(0, 1, 23):
        arranged = arrange([0], list(range(1, 101)), np.array([depth]), tokens)
        (found,) = evidence_depths(arranged, {0}, tokens)
        assert abs(found - depth) <= 0.5 / 101 + 1e-4


def test_depth_is_the_middle_of_the_document() -> None:
    tokens = np.array([11, 21, 11], dtype=np.int32)
    assert evidence_depths([0, 1, 2], {0, 2}, tokens) == [round(5.5 / 43, 4), round(37.5 / 43, 4)]
    assert evidence_depths([1], {1}, tokens) == [0.5]


def test_each_ordinal_has_every_stratum_once_and_streams_differ() -> None:
    drawn = {
        stream: np.array(
            [draw_depths(3, sample, SAMPLES, 0, stream, np.random.default_rng(sample)) for sample in range(SAMPLES)]
        )
        for stream in ("0", "1")
    }
    for depths in drawn.values():
        assert all(sorted((column * SAMPLES).astype(int)) == list(range(SAMPLES)) for column in depths.T)
        assert np.abs(np.corrcoef(depths.T)[np.triu_indices(3, 1)]).max() < 0.25
    assert not np.allclose(drawn["0"], drawn["1"], atol=0.1)


def make_pool(sizes: Sequence[int], keys: Sequence[int] | None = None) -> Pool:
    keys = np.array(range(len(sizes)) if keys is None else keys, dtype=np.int32)
    return Pool(np.arange(len(sizes)), np.array(sizes, dtype=np.int32), keys)


@settings(max_examples=300)
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

    filled = Filler(pool, usable, count, limit, rng).fill([0], map(int, rng.permutation(len(sizes))))
    taken = filled.documents
    assert filled.length == count(taken) <= limit
    assert len(set(taken)) == len(taken) and 0 not in taken and all(map(usable, taken))
    assert filled.complete == (filled.length >= limit - int(limit * TOLERANCE))
    if joint == 0 and not filled.complete:
        free = [size for index, size in enumerate(sizes) if index and index not in taken and usable(index)]
        assert all(size > limit - filled.length for size in free)


def test_given_documents_that_exceed_the_limit_are_left_alone() -> None:
    filler = Filler(make_pool([10] * 6), lambda index: True, lambda taken: 70, 60, np.random.default_rng(0))
    filled = filler.fill([0], range(6))
    assert (filled.documents, filled.length, filled.complete) == ([], 70, False)


def test_a_large_pool_always_suffices() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(30, 400, size=3000)
    pool = make_pool(sizes)
    for limit in [2048, 4096, 8192, 32768, 131072] * 20:
        # Every joint costs a token that the sizes do not know of.
        filler = Filler(
            pool, lambda index: index % 7 > 0, lambda taken: int(100 + sizes[taken].sum() + len(taken)), limit, rng
        )
        filled = filler.fill([], map(int, rng.permutation(3000)))
        assert filled.complete and 0.99 * limit - 1 < filled.length <= limit


def test_documents_of_one_text_never_share_a_context() -> None:
    pool = make_pool([10] * 6, keys=[0, 0, 2, 2, 4, 4])
    pool.members = np.arange(6)
    filled = Filler(pool, lambda index: True, lambda taken: 10 * (1 + len(taken)), 60, np.random.default_rng(0)).fill(
        [0], range(6)
    )
    assert sorted(pool.keys[filled.documents]) == [2, 4] and not filled.complete


def test_every_document_is_asked_about_once() -> None:
    asked: list[int] = []

    def usable(index: int) -> bool:
        asked.append(index)
        return index % 2 == 0

    pool = make_pool(range(10, 60))
    Filler(pool, usable, lambda taken: sum(taken) + 10 * len(taken), 700, np.random.default_rng(0)).fill([], range(50))
    assert asked and len(set(asked)) == len(asked)


def test_the_same_generator_makes_the_same_choice() -> None:
    pool = make_pool(np.random.default_rng(5).integers(5, 50, size=200))

    def choose(seed: int) -> list[int]:
        rng = np.random.default_rng(seed)
        filler = Filler(pool, lambda index: True, lambda taken: int(pool.tokens[taken].sum()), 1500, rng)
        return filler.fill([], map(int, rng.permutation(200))).documents

    assert choose(1) == choose(1) != choose(2)
