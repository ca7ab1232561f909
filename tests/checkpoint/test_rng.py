"""Random number generators go on where they were."""

import random
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_solopo.checkpoint.rng import restore_rng, rng_state
from tests.ranks import layout


@pytest.fixture(scope="module", autouse=True)
def one_rank() -> Iterator[None]:
    with layout():
        yield


def draw() -> list[float]:
    with get_cuda_rng_tracker().fork():
        tracked = float(torch.rand(1))
    numbers = [random.random(), random.gauss(0, 1), float(np.random.rand()), float(np.random.normal()), tracked]
    return [*numbers, float(torch.rand(1))]


@pytest.mark.parametrize("drawn", range(3))  # a Gaussian of the last draw may be waiting, in Python and numpy
def test_the_same_numbers_follow(drawn: int) -> None:
    for _ in range(drawn):
        draw()
    state = rng_state()
    expected = [draw() for _ in range(3)]
    for _ in range(5):
        draw()
    restore_rng(state)
    assert [draw() for _ in range(3)] == expected
    assert rng_state() != state
