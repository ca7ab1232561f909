"""The order of passes is Megatron-Core's, and a number of packs makes every stage's peak."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.enums import ModelType
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.transformer import TransformerConfig

from megatron_solopo.architecture.pipeline_schedule import packs_at_peak, peak_in_flight, stage_order
from megatron_solopo.config import ParallelConfig
from megatron_solopo.parallel import topology
from megatron_solopo.parallel.megatron_internals import pipeline_settings, simulated_rank, without_shape_messages

pytestmark = pytest.mark.parity

SIZES = st.sampled_from([1, 2, 3, 4])
CHUNKS = st.sampled_from([1, 2, 3])
PIPELINES = [(2, 1), (4, 1), (2, 2), (2, 3), (3, 3), (4, 2), (4, 4), (8, 2)]


@given(SIZES, CHUNKS, st.integers(1, 4))
def test_interleaved_order_is_megatrons_table(size: int, chunks: int, rounds: int) -> None:
    if chunks == 1 or size == 1:
        return
    microbatches = size * rounds
    table = get_schedule_table(microbatches, chunks, size)
    for rank in range(size):
        order = stage_order(rank, size, chunks, microbatches)
        forward = [(work.microbatch, work.chunk) for work in order if work.is_forward]
        backward = [(work.microbatch, chunks - 1 - work.chunk) for work in order if not work.is_forward]
        assert forward == table and backward == table


@pytest.mark.parametrize(
    ("rank", "size", "chunks", "alive"),
    [(0, 4, 1, 4), (3, 4, 1, 1), (0, 4, 2, 11), (3, 4, 2, 5), (0, 1, 1, 1), (0, 4, 4, 19), (0, 8, 2, 23)],
)
def test_packs_in_flight(rank: int, size: int, chunks: int, alive: int) -> None:
    for packs in (packs_at_peak(size, chunks), 16, 48):
        assert peak_in_flight(stage_order(rank, size, chunks, packs), lambda chunk, number: 1.0) == alive


@pytest.mark.parametrize(("size", "chunks"), PIPELINES)
def test_more_packs_keep_no_more_and_fewer_keep_less(size: int, chunks: int) -> None:
    """Whatever each chunk keeps of a pack: uneven stages too."""
    packs, step = packs_at_peak(size, chunks), 1 if chunks == 1 else size
    weights = [[float(n == chunk) for n in range(chunks)] for chunk in range(chunks)]
    for each in (*weights, [1.0] * chunks, [2.0**n for n in range(chunks)], [2.0**-n for n in range(chunks)]):

        def peak(rank: int, number: int, kept: Any = each) -> float:
            return peak_in_flight(stage_order(rank, size, chunks, number), lambda chunk, _: kept[chunk])

        for rank in range(size):
            assert {peak(rank, number) for number in range(packs, 7 * size, step)} == {peak(rank, packs)}
    assert peak(0, packs - step) < peak(0, packs)


class Alive:
    """How many forward passes wait for their backward pass: now, and at most so far."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def add(self, count: int) -> None:
        self.now += count
        self.most = max(self.most, self.now)


class Pass(torch.autograd.Function):
    """Passes a tensor on, and counts from its forward to its backward."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, alive: Alive) -> torch.Tensor:
        ctx.alive = alive
        alive.add(1)
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.alive.add(-1)
        return gradients[0], None


class Chunk(torch.nn.Module):
    """A model chunk without layers."""

    def __init__(self, config: Any, alive: Alive) -> None:
        super().__init__()
        self.config, self.alive, self.received = config, alive, None
        self.model_type = ModelType.encoder_or_decoder
        self.weight = torch.nn.Parameter(torch.zeros(1, 1, 4))

    def set_input_tensor(self, received: Any) -> None:
        self.received = received[0] if isinstance(received, list) else received

    def forward(self) -> torch.Tensor:
        return Pass.apply(self.weight if self.received is None else self.received, self.alive)


def most_alive(rank: int, size: int, chunks: int, packs: int) -> int:
    """Run Megatron's own schedule as one rank of a pipeline, and count."""
    sizes = {
        "pipeline_model_parallel_size": size,
        "virtual_pipeline_model_parallel_size": chunks if chunks > 1 else None,
    }
    layers = {"num_layers": size * chunks, "hidden_size": 4, "num_attention_heads": 1}
    settings = pipeline_settings(interleaved=chunks > 1) | {"batch_p2p_comm": False}
    alive = Alive()

    def loss(output: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        return output.sum(), torch.tensor(1, dtype=torch.int), None

    def forward_step(iterator: Iterator[int], model: Chunk) -> tuple[torch.Tensor, Any]:
        next(iterator)
        return model(), partial(loss)

    with simulated_rank(rank, size), ExitStack() as stack:
        groups = topology.initialize(ParallelConfig(**sizes), seed=1)
        stack.callback(topology.destroy, groups)
        config = TransformerConfig(**layers, **sizes, **settings, pipeline_dtype=torch.float32)
        config.calculate_per_token_loss = True
        model = [Chunk(config, alive) for _ in range(chunks)]
        iterators = [iter(range(packs)) for _ in range(chunks)]
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if chunks > 1 else iterators[0],
            model=model if chunks > 1 else model[0],
            num_microbatches=packs,
            seq_length=1,
            micro_batch_size=1,
            **without_shape_messages(config, [(1, 1, 4)] * packs),
        )
    return alive.most


@pytest.mark.parametrize(("size", "chunks"), PIPELINES)
def test_megatrons_schedule_keeps_as_much_with_this_number_of_packs_as_with_more(size: int, chunks: int) -> None:
    packs = packs_at_peak(size, chunks)
    for rank in {0, size // 2, size - 1}:
        simulated = peak_in_flight(stage_order(rank, size, chunks, packs), lambda chunk, number: 1.0)
        assert most_alive(rank, size, chunks, packs) == most_alive(rank, size, chunks, 4 * size) == simulated
