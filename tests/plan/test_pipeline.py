"""The timeline obeys the order of passes and what each pass needs."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_solopo.architecture.pipeline_schedule import ChunkPass
from megatron_solopo.plan.pipeline import simulate_schedule

SIZES = st.sampled_from([1, 2, 3, 4])
CHUNKS = st.sampled_from([1, 2, 3])


@given(SIZES, CHUNKS, st.integers(1, 4), st.floats(0.1, 3.0), st.floats(0.0, 0.5))
def test_nothing_starts_before_what_it_needs(size: int, chunks: int, rounds: int, backward: float, message) -> None:
    chunks = 1 if size == 1 else chunks
    microbatches = size * rounds if chunks > 1 else rounds
    timeline = simulate_schedule(
        size, chunks, microbatches, lambda _, work: 1.0 if work.is_forward else backward, message
    )
    ends = {(rank, span.work): span.end for rank, spans in enumerate(timeline.stages) for span in spans}
    assert len(ends) == size * 2 * chunks * microbatches
    for rank, spans in enumerate(timeline.stages):
        assert all(one.end <= two.start for one, two in pairwise(spans))
        for span in spans:
            stage = span.work.chunk * size + rank
            if span.work.is_forward and stage:
                chunk, before = divmod(stage - 1, size)
                assert span.start >= ends[before, span.work._replace(chunk=chunk)]
            if not span.work.is_forward:
                assert span.start >= ends[rank, ChunkPass(True, span.work.chunk, span.work.microbatch)]


@pytest.mark.parametrize(("size", "chunks", "microbatches"), [(1, 1, 5), (4, 1, 8), (4, 2, 8), (8, 4, 32)])
def test_equal_packs_take_the_textbook_time(size: int, chunks: int, microbatches: int) -> None:
    timeline = simulate_schedule(size, chunks, microbatches, lambda _, work: 1.0 if work.is_forward else 2.0, 0.0)
    busy = 3.0 * chunks * microbatches
    assert timeline.seconds == pytest.approx(busy + 3.0 * (size - 1))
    assert timeline.bubble == pytest.approx(1 - busy / timeline.seconds)
