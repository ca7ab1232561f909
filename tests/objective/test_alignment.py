"""SoLo-RA distances and where their gradients go."""

from typing import get_args

import pytest
import torch

from megatron_solopo.config import ObjectiveConfig
from megatron_solopo.objective.solopo import DISTANCES, alignment_distance

GAPS = [-7.0, -1.0, -0.2, 0.0, 0.3, 1.0, 4.0]
DELTA = 0.8


def distance(gaps: torch.Tensor, kind: str, detach_short: bool = False) -> torch.Tensor:
    long_T = torch.linspace(-3, 2, len(GAPS), dtype=gaps.dtype)
    return alignment_distance(long_T + gaps, long_T, kind, DELTA, detach_short)


def huber(gap: float) -> float:
    return gap * gap / 2 if abs(gap) <= DELTA else DELTA * (abs(gap) - DELTA / 2)


@pytest.mark.parametrize(("kind", "formula"), [("l1", abs), ("l2", lambda g: g * g), ("huber", huber)])
def test_distances_equal_their_formulae(kind, formula):
    values_T = distance(torch.tensor(GAPS, dtype=torch.float64), kind)
    assert values_T.tolist() == pytest.approx([formula(gap) for gap in GAPS], rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("kind", DISTANCES)
def test_gradients(kind):
    short_T = torch.tensor([-1.5, 0.3, 2.0], dtype=torch.float64, requires_grad=True)
    long_T = torch.tensor([-2.0, 0.9, -1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s, x: alignment_distance(s, x, kind, DELTA, False), (short_T, long_T))


@pytest.mark.parametrize("kind", DISTANCES)
def test_detach_short_moves_the_long_side_alone(kind):
    gradients = {}
    for detach in (False, True):
        short_T = torch.tensor([-1.5, 0.3], dtype=torch.float64, requires_grad=True)
        long_T = torch.tensor([-2.0, 0.9], dtype=torch.float64, requires_grad=True)
        value_T = alignment_distance(short_T, long_T, kind, DELTA, detach)
        value_T.sum().backward()
        gradients[detach] = (value_T.tolist(), short_T.grad, long_T.grad)
    assert gradients[True][0] == gradients[False][0]
    assert gradients[True][1] is None
    torch.testing.assert_close(gradients[False][1], -gradients[False][2])
    torch.testing.assert_close(gradients[True][2], gradients[False][2])
    # A long reward below the short one is pulled up, one above it down.
    assert gradients[True][2][0] < 0 < gradients[True][2][1]


@pytest.mark.parametrize("kind", DISTANCES)
def test_no_gap_no_gradient(kind):
    reward_T = torch.tensor([-1.5, 0.0], requires_grad=True)
    alignment_distance(reward_T, reward_T.detach().clone(), kind, DELTA, False).sum().backward()
    assert reward_T.grad.tolist() == [0.0, 0.0]


def test_distances_are_those_of_the_config():
    assert set(DISTANCES) == set(get_args(ObjectiveConfig.model_fields["distance"].annotation))
