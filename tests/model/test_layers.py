"""Packed attention against each sequence by itself, softmax written out, in float64."""

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor

from megatron_solopo.data.blocks import Block
from megatron_solopo.model.head import PackedResponses
from megatron_solopo.model.layers import PackedAttention
from megatron_solopo.model.segments import plan_segments
from tests.ranks import layout, two_ranks

HEADS, GROUPS, SIZE = 4, 2, 8
# Multiples of 2 x CP for CP 2; an odd number of sequences, the first as short as they come.
LENGTHS = (4, 12, 8)
TOTAL = sum(LENGTHS)
BOUNDARIES = torch.tensor([0, 4, 16, 24], dtype=torch.int32)
# By definition: of each sequence's four chunks, the first rank holds 0 and 3, the second 1 and 2.
HELD = {
    0: [0, 3, *(4, 5, 6), *(13, 14, 15), *(16, 17), *(22, 23)],
    1: [1, 2, *(7, 8, 9), *(10, 11, 12), *(18, 19), *(20, 21)],
}
NAMES = ("query", "key", "value")


def inputs() -> dict[str, Tensor]:
    """Query, key, value of the whole pack, and an arbitrary gradient of the output."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"query": (HEADS, SIZE), "key": (GROUPS, SIZE), "value": (GROUPS, SIZE), "gradient": (HEADS * SIZE,)}
    return {
        name: torch.randn(TOTAL, *shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()
    }


def dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention, sequence by sequence, head by head."""
    outputs = []
    for start, end in pairwise(BOUNDARIES.tolist()):
        here = slice(start, end)
        future = torch.ones(end - start, end - start, dtype=torch.bool).triu(diagonal=1)
        heads = []
        for head in range(HEADS):
            group = head // (HEADS // GROUPS)
            scores = scale * query[here, head] @ key[here, group].T
            weights = scores.masked_fill(future, -torch.inf).exp()
            weights = weights / weights.sum(dim=1, keepdim=True)
            heads.append(weights @ value[here, group])
        outputs.append(torch.cat(heads, dim=1))
    return torch.cat(outputs)


def module(group: Any, scale: float | None = None) -> PackedAttention:
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=HEADS, num_query_groups=GROUPS, kv_channels=SIZE
    )
    collection = SimpleNamespace(cp=group)
    return PackedAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=scale, pg_collection=collection)


def packed(group: Any, query: Tensor, key: Tensor, value: Tensor, scale: float | None = None) -> Tensor:
    """The same through the module, as Megatron-Core's SelfAttention calls it."""
    blocks = [Block(start, (start, end), end) for start, end in pairwise(BOUNDARIES.tolist())]
    packing = PackedResponses(qkv_format="thd", segments=plan_segments(blocks, group.size(), group.rank()))
    return module(group, scale)(query, key, value, None, packed_seq_params=packing)


def differentiate(run: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Output of `run` and the gradients of query, key and value."""
    leaves = {name: tensors[name].clone().requires_grad_() for name in NAMES}
    output = run(*leaves.values())
    (output * tensors["gradient"]).sum().backward()
    return {"output": output.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("scale", [None, 0.7])
def test_equals_each_sequence_by_itself(scale: float | None) -> None:
    with layout() as groups:
        found = differentiate(lambda *qkv: packed(groups.context_group, *qkv, scale), inputs())
    assert_close(found, differentiate(lambda *qkv: dense(*qkv, scale or SIZE**-0.5), inputs()))


@pytest.mark.parametrize("changed", range(len(LENGTHS)))
def test_one_sequence_does_not_see_another(changed: int) -> None:
    tensors = inputs()
    here = slice(BOUNDARIES[changed], BOUNDARIES[changed + 1])
    with layout() as groups:
        before = packed(groups.context_group, *(tensors[name] for name in NAMES))
        for name in NAMES:
            tensors[name][here] += 1e3
        after = packed(groups.context_group, *(tensors[name] for name in NAMES))
    is_same = (before == after).all(dim=1)
    assert not bool(is_same[here].any()) and int(is_same.sum()) == TOTAL - LENGTHS[changed]


@pytest.mark.parametrize("position", [0, 3, 4, 9, 15, 16, 23])
def test_the_past_does_not_see_the_future(position: int) -> None:
    tensors = inputs()
    with layout() as groups:
        before = packed(groups.context_group, *(tensors[name] for name in NAMES))
        tensors["key"][position] += 1
        tensors["value"][position] += 1
        after = packed(groups.context_group, *(tensors[name] for name in NAMES))
    end = next(int(boundary) for boundary in BOUNDARIES if boundary > position)
    changed = (before != after).any(dim=1).nonzero().flatten().tolist()
    assert changed == list(range(position, end))


@pytest.mark.parametrize("last", [1, 3, 8])
def test_a_batch_attends_to_what_came_before(last: int) -> None:
    """The last positions of the last sequence with the keys of all of it, as in generation; twice in one batch."""
    expected = dense(*(inputs()[name] for name in NAMES), SIZE**-0.5)[-last:]
    sequence = {name: inputs()[name][BOUNDARIES[2] :] for name in NAMES}
    with layout() as groups:
        query, key, value = (torch.stack([sequence[name]] * 2, dim=1) for name in NAMES)
        found = module(groups.context_group)(query[-last:], key, value, None)
    torch.testing.assert_close(found, torch.stack([expected] * 2, dim=1))


def on_two_ranks() -> dict[str, Tensor]:
    """This context-parallel rank's share of output and gradients."""
    with layout(context_parallel_size=2) as groups:
        group = groups.context_group
        share = {name: tensor[HELD[group.rank()]] for name, tensor in inputs().items()}
        return differentiate(lambda *qkv: packed(group, *qkv), share)


def test_context_parallelism_changes_nothing() -> None:
    expected = differentiate(lambda *qkv: dense(*qkv, SIZE**-0.5), inputs())
    for rank, found in enumerate(two_ranks(__name__)):
        assert_close(found, {name: value[HELD[rank]] for name, value in expected.items()})
