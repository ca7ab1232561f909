"""The response-only head against the same model's full logits; rows gathered over sequence-parallel ranks."""

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from megatron_solopo.checkpoint.load import load_weights
from megatron_solopo.config import ModelConfig, ParallelConfig
from megatron_solopo.data.blocks import Block
from megatron_solopo.model.build import build_model
from megatron_solopo.model.head import PackedResponses, ResponseModel, gather_rows, plan_gathering
from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.model.segments import plan_segments
from megatron_solopo.parallel.topology import Topology
from tests.ranks import layout, two_ranks
from tests.tiny_models import VOCAB_SIZE, make_model

BOUNDARIES = torch.tensor([0, 6, 16, 20], dtype=torch.int32)
ROWS = torch.tensor([3, 4, 11, 12, 13, 14, 16])
LENGTH = int(BOUNDARIES[-1])


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Topology]:
    with layout() as groups:
        yield groups


def response_model(path: Path, family: str, groups: Topology, chunk_tokens: int) -> ResponseModel:
    """A tiny model with its weights."""
    make_model(path, family)
    resolved = resolve_model(ModelConfig(path=path), ParallelConfig())
    (model,) = build_model(resolved, chunk_tokens=chunk_tokens, device=groups.device)
    load_weights([model], resolved.architecture, path)
    return model


def packing(kind: type[PackedSeqParams], **responses: Tensor) -> PackedSeqParams:
    longest = int(BOUNDARIES.diff().max())
    made = kind(
        qkv_format="thd",
        cu_seqlens_q=BOUNDARIES,
        cu_seqlens_kv=BOUNDARIES,
        cu_seqlens_q_padded=BOUNDARIES,
        cu_seqlens_kv_padded=BOUNDARIES,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
        **responses,
    )
    blocks = [Block(start, (start, end), end) for start, end in pairwise(BOUNDARIES.tolist())]
    made.segments = plan_segments(blocks, 1, 0)
    return made


def gradients(model: torch.nn.Module, value: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(value, parameters), strict=True))


@pytest.mark.parametrize("chunk_tokens", [100, 2])
@pytest.mark.parametrize("family", ["llama3", "qwen2_tied", "qwen3"])
def test_equals_the_models_own_full_logits(one_rank: Topology, tmp_path: Path, family: str, chunk_tokens: int) -> None:
    model = response_model(tmp_path, family, one_rank, chunk_tokens)
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(VOCAB_SIZE, (1, LENGTH), generator=generator)
    labels = torch.randint(VOCAB_SIZE, (len(ROWS),), generator=generator)
    weights = torch.randn(len(ROWS), generator=generator)
    responses = packing(PackedResponses, response_rows=ROWS, response_labels=labels)
    found = model(tokens, None, None, packed_seq_params=responses)

    logits = model(tokens, None, None, packed_seq_params=packing(PackedSeqParams))[0]
    assert logits.shape == (LENGTH, 256)
    logprobs = logits[ROWS, :VOCAB_SIZE].log_softmax(dim=-1)
    expected = logprobs.gather(1, labels[:, None]).squeeze(1)

    assert found.dtype is torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    wanted = gradients(model, (expected * weights).sum())
    for name, gradient in gradients(model, (found * weights).sum()).items():
        error = (gradient - wanted[name]).norm() / wanted[name].norm().clamp(min=1e-3)
        assert error < 1e-4, name


def test_a_pack_without_rows_here_gives_no_values_and_zero_gradients(one_rank: Topology, tmp_path: Path) -> None:
    model = response_model(tmp_path, "llama2", one_rank, chunk_tokens=100)
    nothing = torch.tensor([], dtype=torch.int64)
    responses = packing(PackedResponses, response_rows=nothing, response_labels=nothing)
    found = model(torch.zeros(1, LENGTH, dtype=torch.int64), None, None, packed_seq_params=responses)
    assert found.shape == (0,)
    assert all(gradient.count_nonzero() == 0 for gradient in gradients(model, found.sum()).values())


HIDDEN = 3
WHOLE = torch.arange(8 * HIDDEN, dtype=torch.float32).view(8, HIDDEN)
# Four of the eight positions on each rank.
SELECTIONS = {
    "both": [1, 3, 4, 6, 7],
    "first rank only": [0, 2],
    "second rank only": [5, 6, 7],
    "one": [4],
    "none": [],
    "all": list(range(8)),
}


def row_weights(name: str, rank: int) -> Tensor:
    """A gradient of the gathered rows, another one on each rank."""
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(len(SELECTIONS[name]), HIDDEN, generator=generator)


def on_two_ranks() -> dict[str, dict[str, Tensor]]:
    """The gathered rows and the gradient of this rank's half, by selection."""
    with layout(tensor_model_parallel_size=2) as groups:
        return {name: gathered(name, groups.tensor_group) for name in SELECTIONS}


def gathered(name: str, group: Any) -> dict[str, Tensor]:
    half = WHOLE.chunk(2)[group.rank()].clone().requires_grad_()
    plan = plan_gathering(torch.tensor(SELECTIONS[name], dtype=torch.int64), len(half), group.size(), group.rank())
    rows = gather_rows(half, plan, group)
    (rows * row_weights(name, group.rank())).sum().backward()
    return {"rows": rows.detach(), "gradient": half.grad}


@pytest.mark.parametrize("name", SELECTIONS)
def test_gathered_rows_are_those_of_the_whole(name: str) -> None:
    for found in two_ranks(__name__):
        assert torch.equal(found[name]["rows"], WHOLE[SELECTIONS[name]])


@pytest.mark.parametrize("name", SELECTIONS)
def test_a_gathered_rows_gradient_is_the_sum_over_ranks(name: str) -> None:
    expected = torch.zeros(8, HIDDEN)
    expected[SELECTIONS[name]] = row_weights(name, 0) + row_weights(name, 1)
    found = torch.cat([rank[name]["gradient"] for rank in two_ranks(__name__)])
    torch.testing.assert_close(found, expected)
