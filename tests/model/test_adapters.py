"""Dropout of adapters' inputs: its statistics, PEFT's gradients for the same masks, and which ranks share a mask."""

from contextlib import nullcontext
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora import Linear
from torch import Tensor

from megatron_solopo.errors import UserError
from megatron_solopo.model.adapters import ColumnAdapter, InputDropout, RowAdapter, StoresAdapters, begin_dropout
from tests.ranks import layout, two_ranks

# isort: split
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig

RANK, INPUTS, TOKENS, SCALING = 3, 8, 6, 2.0
SEGMENTS = (("q_proj", 4), ("k_proj", 2), ("v_proj", 2))
MODULES = tuple(name for name, _ in SEGMENTS)


def matrices(rows: int, *, modules: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(modules * RANK, INPUTS, generator=generator),
        torch.randn(rows, RANK, generator=generator),
    )


def transformer(size: int = 1, *, sequence_parallel: bool = False) -> TransformerConfig:
    return TransformerConfig(
        num_layers=1,
        hidden_size=INPUTS,
        num_attention_heads=2,
        tensor_model_parallel_size=size,
        sequence_parallel=sequence_parallel,
    )


def attention_adapter(config: TransformerConfig, dropout: InputDropout | None) -> ColumnAdapter:
    """That of queries, keys and values, with the same rows on every rank."""
    group = parallel_state.get_tensor_model_parallel_group()
    lora_A, lora_B = matrices(8, modules=3)
    return ColumnAdapter(lora_A, lora_B, SCALING, config, group, dropout, targets=MODULES, segments=SEGMENTS, repeats=1)


def active(probability: float = 0.5) -> InputDropout:
    dropout = InputDropout(probability)
    dropout.is_active = True
    return dropout


def inputs() -> Tensor:
    return torch.randn(TOKENS, 1, INPUTS, generator=torch.Generator().manual_seed(1))


def on_two_ranks() -> dict[str, Any]:
    """The inputs that A gets, and its gradient, under each kind of tensor parallelism."""
    found: dict[str, Any] = {}
    for name, sequence_parallel in (("whole", False), ("sequence", True)):
        with layout(tensor_model_parallel_size=2, sequence_parallel=sequence_parallel):
            config = transformer(2, sequence_parallel=sequence_parallel)
            adapter = attention_adapter(config, active())
            found[name] = forward_and_backward(adapter)
            found[f"{name} rows"] = forward_and_backward(
                RowAdapter(*matrices(8), SCALING, config, adapter.group, active())
            )
    return found


def forward_and_backward(adapter: Any) -> tuple[list[Tensor], Tensor]:
    seen: list[Tensor] = []
    drop = InputDropout.__call__

    def spy(dropout: InputDropout, x: Tensor, **keywords: Any) -> Tensor:
        seen.append(drop(dropout, x, **keywords))
        return seen[-1]

    in_block = get_cuda_rng_tracker().fork() if adapter.sequence_parallel else nullcontext()
    with in_block, mock.patch.object(InputDropout, "__call__", spy):
        adapter(inputs()).square().sum().backward()
    return [each.detach() for each in seen], adapter.lora_A.grad


def test_dropout_keeps_the_mean_and_drops_as_many_as_asked() -> None:
    torch.manual_seed(0)
    dropout, ones = active(0.3), torch.ones(200, 500)
    first, second = (dropout(ones, own_generator=False) for _ in range(2))
    for each in (first, second):
        assert set(each.unique().tolist()) == {0.0, float(torch.tensor(1.0) / 0.7)}
        share = float((each == 0).float().mean())
        assert abs(share - 0.3) < 5 * (0.3 * 0.7 / ones.numel()) ** 0.5
    both = float(((first == 0) & (second == 0)).float().mean())
    assert abs(both - 0.09) < 0.005, "the masks of two passes are independent"


def test_masks_differ_by_seed_step_replica_and_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    monkeypatch.setattr("megatron_solopo.model.adapters.model_parallel_cuda_manual_seed", drawn.append)
    for seed, step, replica, stage in (
        (1, 2, 0, 0),
        (9, 2, 0, 0),
        (1, 3, 0, 0),
        (1, 2, 1, 0),
        (1, 2, 0, 1),
        (1, 2, 0, 0),
    ):
        monkeypatch.setattr(parallel_state, "get_data_parallel_rank", mock.Mock(return_value=replica))
        monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_rank", mock.Mock(return_value=stage))
        begin_dropout(seed, step)
    assert len(set(drawn)) == 5 and drawn[0] == drawn[-1], "a continued run has the same masks"


def test_without_dropout_nothing_changes() -> None:
    with layout():
        plain = attention_adapter(transformer(), None)
        inactive = attention_adapter(transformer(), InputDropout(0.5))
        assert torch.equal(inactive(inputs()), plain(inputs()))


def test_gradients_are_those_of_peft_with_the_same_masks() -> None:
    with layout():
        torch.manual_seed(0)
        adapter = attention_adapter(transformer(), active())
        weight = torch.arange(TOKENS * 8.0).view(TOKENS, 1, 8)
        seen: list[Tensor] = []
        drop = InputDropout.__call__

        def spy(dropout: InputDropout, x: Tensor, **keywords: Any) -> Tensor:
            seen.append(drop(dropout, torch.ones_like(x), **keywords))
            return x * seen[-1]

        with mock.patch.object(InputDropout, "__call__", spy):
            output = adapter(x := inputs().requires_grad_())
        (output * weight).sum().backward()
        assert len(seen) == 3 and not torch.equal(seen[0], seen[1])
        theirs, of_input, start = [], torch.zeros_like(x), 0
        for number, (_, rows) in enumerate(SEGMENTS):
            linear = peft_linear(adapter, number, slice(start, start + rows), seen[number])
            theirs.append(linear(y := x.detach().requires_grad_()))
            (theirs[-1] * weight[..., start : start + rows]).sum().backward()
            grad_A, grad_B = linear.lora_A["default"].weight.grad, linear.lora_B["default"].weight.grad
            torch.testing.assert_close(adapter.lora_A.grad.chunk(3)[number], grad_A)
            torch.testing.assert_close(adapter.lora_B.grad[start : start + rows], grad_B)
            of_input += y.grad
            start += rows
        torch.testing.assert_close(output, torch.cat(theirs, dim=-1))
        torch.testing.assert_close(x.grad, of_input)


class Mask(torch.nn.Module):
    """A dropout whose mask is known."""

    def __init__(self, factors: Tensor) -> None:
        super().__init__()
        self.factors = factors

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factors


def peft_linear(adapter: ColumnAdapter, number: int, rows: slice, factors: Tensor) -> Any:
    """PEFT's layer with one module's matrices, over a weight of zeros."""
    base = torch.nn.Linear(INPUTS, rows.stop - rows.start, bias=False)
    torch.nn.init.zeros_(base.weight)
    settings = LoraConfig(r=RANK, lora_alpha=RANK * SCALING, lora_dropout=0.5)
    linear = Linear(base, "default", settings, r=RANK, lora_alpha=RANK * SCALING, lora_dropout=0.5)
    linear.lora_dropout["default"] = Mask(factors)
    with torch.no_grad():
        linear.lora_A["default"].weight.copy_(adapter.lora_A.chunk(3)[number])
        linear.lora_B["default"].weight.copy_(adapter.lora_B[rows])
    return linear


@pytest.mark.parametrize(("kind", "share"), [("whole", True), ("sequence", False)])
def test_tensor_parallel_ranks_share_a_mask_where_they_share_the_input(kind: str, share: bool) -> None:
    (one, gradient), (other, other_gradient) = (rank[kind] for rank in two_ranks(__name__))
    assert len(one) == 3
    assert [torch.equal(*each) for each in zip(one, other, strict=True)] == [share] * 3
    if share:  # whole on each rank, and not summed
        assert torch.equal(gradient, other_gradient)


@pytest.mark.parametrize("kind", ["whole rows", "sequence rows"])
def test_ranks_with_other_features_have_other_masks(kind: str) -> None:
    (one, _), (other, _) = (rank[kind] for rank in two_ranks(__name__))
    assert not torch.equal(one[0], other[0])


class Chunk(StoresAdapters, torch.nn.Module):
    """Stands for a model chunk: a base and the adapter of one layer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.linear_adapter = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2, bias=False)


@pytest.mark.parametrize("strict", [True, False])
def test_a_checkpoint_with_other_entries_than_the_adapters_is_refused(strict: bool) -> None:
    """Megatron-LM loads strictly, catches every exception, and loads once more without."""
    chunk, weight = Chunk(), torch.ones(2, 2)
    chunk.load_state_dict({"linear_adapter.weight": weight}, strict=strict)
    assert torch.equal(chunk.linear_adapter.weight, weight)
    with pytest.raises(UserError, match=r"--load: the checkpoint lacks linear_adapter.weight \(1 in all\); give"):
        chunk.load_state_dict({}, strict=strict)
    with pytest.raises(UserError, match=r"--load: the checkpoint has entries of no adapter here: other \(1 in all\)"):
        chunk.load_state_dict({"linear_adapter.weight": weight, "other": weight}, strict=strict)
