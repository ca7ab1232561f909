"""Sequence log-probabilities: sums over each sequence's rows, wherever those lie."""

from typing import Any

import torch

from megatron_solopo.model.logprob import sequence_logprobs
from tests.ranks import layout, two_ranks

LOGPROBS = torch.tensor([-1.0, -2.0, -4.0, -8.0, -16.0])
SEQUENCES = torch.tensor([2, 0, 2, 0, 0])
WEIGHTS = torch.tensor([1.0, 10.0, 100.0])


def sums(logprobs: torch.Tensor, sequences: torch.Tensor, group: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The sums of three sequences, and the rows' gradient of their weighted sum."""
    logprobs = logprobs.clone().requires_grad_()
    total = sequence_logprobs(logprobs, sequences, 3, group)
    (total * WEIGHTS).sum().backward()
    return total.detach(), logprobs.grad


def on_two_ranks() -> dict[str, Any]:
    """The rows dealt out unevenly: the second rank has one of them, and then none."""
    with layout(context_parallel_size=2) as groups:
        group = groups.context_group
        cuts = {"four and one": 4, "five and none": 5}
        shares = {name: slice(0, cut) if group.rank() == 0 else slice(cut, None) for name, cut in cuts.items()}
        return {name: sums(LOGPROBS[share], SEQUENCES[share], group) for name, share in shares.items()}


def test_rows_are_summed_by_sequence_and_a_sequence_without_rows_is_zero() -> None:
    with layout() as groups:
        total, gradient = sums(LOGPROBS, SEQUENCES, groups.context_group)
        nothing, _ = sums(LOGPROBS[:0], SEQUENCES[:0], groups.context_group)
    assert total.tolist() == [-26.0, 0.0, -5.0] and gradient.tolist() == [100.0, 1.0, 100.0, 1.0, 1.0]
    assert nothing.tolist() == [0.0, 0.0, 0.0]


def test_every_rank_has_the_whole_sum_and_its_own_rows_gradient() -> None:
    ranks = two_ranks(__name__)
    assert len(ranks) == 2
    for name in ranks[0]:
        for found in ranks:
            assert found[name][0].tolist() == [-26.0, 0.0, -5.0]
        assert torch.cat([found[name][1] for found in ranks]).tolist() == [100.0, 1.0, 100.0, 1.0, 1.0]
