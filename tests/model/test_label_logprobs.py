"""Label log-probabilities: plain torch's log_softmax and gather, in chunks and over a split vocabulary."""

import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_solopo.architecture.layout import padded_vocab_size
from megatron_solopo.model.head import label_logprobs
from megatron_solopo.parallel.topology import Topology
from tests.ranks import layout, two_ranks

HIDDEN = 12
# Real vocabulary -> where it ends under TP 2: within the second rank's share, or with the first one's.
VOCABULARIES = (131, 100)
CASES = [(vocabulary, chunk, reduce) for vocabulary in VOCABULARIES for chunk in (100, 3) for reduce in (False, True)]


def inputs(vocabulary: int, rows: int = 10, padding: float = 0.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, a weight padded for TP 2 (whatever the world), labels, and an arbitrary gradient."""
    generator = torch.Generator().manual_seed(vocabulary)
    hidden = torch.randn(rows, HIDDEN, generator=generator)
    weight = torch.full((padded_vocab_size(vocabulary, 2), HIDDEN), padding)
    weight[:vocabulary] = torch.randn(vocabulary, HIDDEN, generator=generator)
    labels = torch.randint(vocabulary, (rows,), generator=generator)
    if rows >= 2:
        labels[:2] = torch.tensor([0, vocabulary - 1])
    return hidden, weight, labels, torch.randn(rows, generator=generator)


def measure(
    vocabulary: int,
    groups: Topology,
    *,
    chunk_tokens: int = 100,
    reduce_hidden_gradient: bool = False,
    with_squares: bool = False,
    rows: int = 10,
    padding: float = 0.0,
) -> dict[str, Tensor]:
    """Value and gradients with this rank's share of the weight; with squares, also their logarithms."""
    hidden, weight, labels, gradient = inputs(vocabulary, rows, padding)
    group = groups.tensor_group
    hidden, weight = hidden.requires_grad_(), weight.chunk(group.size())[group.rank()].clone().requires_grad_()
    value = label_logprobs(
        hidden,
        weight,
        labels,
        vocab_size=vocabulary,
        chunk_tokens=chunk_tokens,
        tensor_group=group,
        reduce_hidden_gradient=reduce_hidden_gradient,
        with_squares=with_squares,
    )
    squares = {}
    if with_squares:
        value, squares["squares"] = value[0], value[1].detach()
    (value * gradient).sum().backward()
    return squares | {"value": value.detach(), "hidden": hidden.grad, "weight": weight.grad}


def plain(vocabulary: int, rows: int = 10) -> dict[str, Tensor]:
    """The same by definition, over the real vocabulary alone."""
    hidden, weight, labels, gradient = inputs(vocabulary, rows)
    hidden, weight = hidden.requires_grad_(), weight.requires_grad_()
    logprobs = (hidden @ weight[:vocabulary].T).log_softmax(dim=-1)
    value = logprobs.gather(1, labels[:, None]).squeeze(1)
    (value * gradient).sum().backward()
    squares = logprobs.detach().exp().square().sum(dim=-1).log()
    return {"value": value.detach(), "squares": squares, "hidden": hidden.grad, "weight": weight.grad}


@pytest.fixture(scope="module")
def one_rank() -> Iterator[Topology]:
    with layout() as groups:
        yield groups


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        if name == "squares" and name not in found:
            continue
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("vocabulary", VOCABULARIES)
@pytest.mark.parametrize("chunk_tokens", [100, 10, 9, 3, 1])
def test_equals_log_softmax_and_gather(one_rank: Topology, vocabulary: int, chunk_tokens: int) -> None:
    assert_close(measure(vocabulary, one_rank, chunk_tokens=chunk_tokens), plain(vocabulary))


@pytest.mark.parametrize("chunk_tokens", [100, 3])
def test_squares_come_beside_and_change_nothing(one_rank: Topology, chunk_tokens: int) -> None:
    without = measure(131, one_rank, chunk_tokens=chunk_tokens, padding=1e4)
    found = measure(131, one_rank, chunk_tokens=chunk_tokens, padding=1e4, with_squares=True)
    assert_close({"squares": found.pop("squares")}, {"squares": plain(131)["squares"]})
    assert all(torch.equal(found[name], value) for name, value in without.items())


def test_labels_of_probability_one_keep_their_gradient_finite(one_rank: Topology) -> None:
    hidden = torch.full((1, 2), 100.0, requires_grad=True)
    weight = torch.tensor([[100.0, 100.0], [-100.0, -100.0]], requires_grad=True)
    options: dict[str, Any] = {"vocab_size": 2, "chunk_tokens": 1, "tensor_group": one_rank.tensor_group}
    for label, expected in ((0, 0.0), (1, -40000.0)):
        value = label_logprobs(
            hidden,
            weight,
            torch.tensor([label]),
            **options,
            reduce_hidden_gradient=False,
        )
        value.sum().backward()
        assert value.item() == expected and bool(hidden.grad.isfinite().all())


@pytest.mark.parametrize("chunk_tokens", [100, 3])
def test_padding_columns_have_no_probability_and_no_gradient(one_rank: Topology, chunk_tokens: int) -> None:
    found = measure(131, one_rank, chunk_tokens=chunk_tokens, padding=1e4)
    assert_close(found, plain(131))
    assert found["weight"][131:].count_nonzero() == 0 and found["weight"][:131].count_nonzero() > 0


@pytest.mark.parametrize("chunk_tokens", [100, 1])
def test_no_rows_give_no_values_and_a_zero_gradient(one_rank: Topology, chunk_tokens: int) -> None:
    found = measure(131, one_rank, chunk_tokens=chunk_tokens, rows=0)
    assert found["value"].shape == (0,) and found["hidden"].shape == (0, HIDDEN)
    assert torch.equal(found["weight"], torch.zeros(256, HIDDEN))


class LiveLogits(TorchDispatchMode):
    """The most rows that tensors of the vocabulary's width held at any time, all copies of the logits counted."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        # The weight's transpose is as wide.
        if isinstance(result, Tensor) and result.shape[-1:] == (self.width,) and len(result) != HIDDEN:
            storage = result.untyped_storage()
            if storage.data_ptr() not in self.live:
                self.live[storage.data_ptr()] = result.numel() // self.width
                weakref.finalize(storage, self.live.pop, storage.data_ptr(), None)
            self.peak = max(self.peak, sum(self.live.values()))
        return result


class Projections(TorchDispatchMode):
    """Rows of every matrix product whose result is as wide as the vocabulary."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.rows: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.mm.default and result.shape[-1] == self.width:
            self.rows.append(len(result))
        return result


def test_projections_never_exceed_the_chunk(one_rank: Topology) -> None:
    with Projections(width=256) as projected:
        measure(131, one_rank, chunk_tokens=4, rows=10)
    assert projected.rows == [4, 4, 2] * 2, "once in the forward pass, again in the backward pass"
    with Projections(width=256) as projected:
        measure(131, one_rank, chunk_tokens=10, rows=10)
    assert projected.rows == [10], "what fits one chunk is kept"


@pytest.mark.parametrize("has_main_grad", [False, True])
def test_in_bfloat16_the_weights_gradient_does_not_depend_on_the_chunk(one_rank: Topology, has_main_grad: bool) -> None:
    """1,024 rows in 1, 8 or 32 chunks: more chunks add no error, because their sum is in fp32."""
    hidden, weight, labels, gradient = inputs(131, rows=1024)
    exact = weight.double().requires_grad_()
    rounded = hidden.bfloat16().double()
    logprobs = (rounded @ exact[:131].bfloat16().double().T).log_softmax(dim=-1)
    (logprobs.gather(1, labels[:, None]).squeeze(1) * gradient).sum().backward()
    errors = {}
    for chunk_tokens in (1024, 128, 32):
        parameter = torch.nn.Parameter(weight.bfloat16())
        if has_main_grad:
            parameter.main_grad, parameter.grad_added_to_main_grad = torch.ones(weight.shape), False
        value = label_logprobs(
            hidden.bfloat16().requires_grad_(),
            parameter,
            labels,
            vocab_size=131,
            chunk_tokens=chunk_tokens,
            tensor_group=one_rank.tensor_group,
            reduce_hidden_gradient=False,
        )
        (value * gradient).sum().backward()
        if has_main_grad:
            assert parameter.grad_added_to_main_grad and parameter.grad.count_nonzero() == 0
            found = parameter.main_grad - 1
        else:
            found = parameter.grad
        errors[chunk_tokens] = float((found.double() - exact.grad).norm() / exact.grad.norm())
    assert max(errors.values()) < min(0.006, 1.1 * errors[1024]), errors


def test_live_logits_depend_on_the_chunk_alone(one_rank: Topology) -> None:
    def peak(rows: int, chunk_tokens: int) -> int:
        with LiveLogits(width=256) as logits:
            measure(131, one_rank, chunk_tokens=chunk_tokens, rows=rows)
        return logits.peak

    assert 4 <= peak(13, 4) == peak(40, 4)
    assert peak(13, 4) == 4 and peak(40, 40) == 40


def on_two_ranks() -> dict[Any, dict[str, Tensor]]:
    """Every case with the vocabulary split over two ranks."""
    with layout(tensor_model_parallel_size=2) as groups:
        return {
            case: measure(
                case[0],
                groups,
                chunk_tokens=case[1],
                reduce_hidden_gradient=case[2],
                with_squares=case[2],
                padding=50.0,
            )
            for case in CASES
        }


@pytest.mark.parametrize(("vocabulary", "chunk", "reduce"), CASES)
def test_a_split_vocabulary_changes_nothing(vocabulary: int, chunk: int, reduce: bool) -> None:
    first, second = (found[vocabulary, chunk, reduce] for found in two_ranks(__name__))
    assert torch.equal(first["value"], second["value"])
    if reduce:
        assert torch.equal(first["hidden"], second["hidden"])
    joined = {
        "value": first["value"],
        **{name: first[name] for name in ("squares",) if reduce},
        "hidden": first["hidden"] if reduce else first["hidden"] + second["hidden"],
        "weight": torch.cat([first["weight"], second["weight"]]),
    }
    assert_close(joined, plain(vocabulary))
    assert joined["weight"][vocabulary:].count_nonzero() == 0
