"""Pair losses against plain float arithmetic, their limits, and the registry."""

import math
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_solopo.config import LossType, ObjectiveConfig
from megatron_solopo.objective.preference import (
    PREFERENCE_LOSSES,
    cpo_loss,
    dpo_loss,
    hinge_loss,
    ipo_loss,
    orpo_loss,
    robust_loss,
    simpo_loss,
)
from megatron_solopo.objective.reward import ResponseLogprobs

MARGINS = [-30.0, -2.5, -0.3, 0.0, 0.4, 1.7, 25.0]
NLL = 1.25

margins = st.floats(-50, 50)


def softplus(x: float) -> float:
    """log(1 + exp(x)) = -log sigmoid(-x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


LOSSES = {
    "dpo": (lambda m: dpo_loss(m), lambda m: softplus(-m)),
    "cdpo": (lambda m: dpo_loss(m, 0.2), lambda m: 0.8 * softplus(-m) + 0.2 * softplus(m)),
    "robust": (lambda m: robust_loss(m, 0.2), lambda m: (0.8 * softplus(-m) - 0.2 * softplus(m)) / 0.6),
    "hinge": (lambda m: hinge_loss(m), lambda m: max(0.0, 1 - m)),
    "ipo": (lambda m: ipo_loss(m, 0.3), lambda m: (m / 0.3 - 1 / 0.6) ** 2),
    "simpo": (lambda m: simpo_loss(m, 0.5), lambda m: softplus(0.5 - m)),
    "cpo": (lambda m: cpo_loss(m), lambda m: softplus(-m)),
    "orpo": (lambda m: orpo_loss(m, torch.full_like(m, NLL), 0.4), lambda m: NLL + 0.4 * softplus(-m)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_equal_their_formulae(name):
    loss, formula = LOSSES[name]
    expected = torch.tensor([formula(m) for m in MARGINS], dtype=torch.float64)
    torch.testing.assert_close(loss(torch.tensor(MARGINS, dtype=torch.float64)), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", LOSSES)
def test_gradients(name):
    margin_T = torch.tensor(MARGINS, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(LOSSES[name][0], margin_T)


def test_orpo_gradient_reaches_the_likelihood():
    nll_T = torch.tensor([1.0, 2.0], dtype=torch.float64, requires_grad=True)
    orpo_loss(torch.zeros(2, dtype=torch.float64), nll_T, 0.4).sum().backward()
    assert nll_T.grad.tolist() == [1.0, 1.0]


@given(margins)
def test_without_noise_conservative_and_robust_are_dpo(margin):
    margin_T = torch.tensor([margin], dtype=torch.float64)
    assert dpo_loss(margin_T, 0.0).item() == dpo_loss(margin_T).item()
    assert robust_loss(margin_T, 0.0).item() == dpo_loss(margin_T).item()


@given(margins)
def test_half_noise_cannot_tell_the_pair_apart(margin):
    margin_T = torch.tensor([margin, -margin], dtype=torch.float64)
    loss_T = dpo_loss(margin_T, 0.5)
    assert loss_T[0].item() == pytest.approx(loss_T[1].item(), rel=1e-12)


@given(margins, st.floats(0, 0.45))
def test_robust_is_unbiased_under_flipped_labels(margin, noise):
    """(1 - e) L(m) + e L(-m) = L_DPO(m), the property that defines robust DPO."""
    loss_T = robust_loss(torch.tensor([margin, -margin], dtype=torch.float64), noise)
    expectation = (1 - noise) * loss_T[0].item() + noise * loss_T[1].item()
    assert expectation == pytest.approx(softplus(-margin), rel=1e-9, abs=1e-9)


@given(margins, margins)
def test_losses_are_convex_in_the_margin(first, second):
    points_T = torch.tensor([first, (first + second) / 2, second], dtype=torch.float64)
    for name, (loss, _) in LOSSES.items():
        if name == "robust":  # not a convex function: it subtracts one
            continue
        left, middle, right = loss(points_T).tolist()
        assert middle <= (left + right) / 2 + 1e-9 * max(1.0, abs(left + right)), name


def test_ipo_and_hinge_are_content_at_their_target_margin():
    beta = 0.1
    margin_T = torch.tensor([0.5, 1.0], dtype=torch.float64)
    assert ipo_loss(margin_T, beta).tolist() == pytest.approx([0.0, 25.0], abs=1e-12)
    assert hinge_loss(margin_T).tolist() == [0.5, 0.0]


def test_registry_covers_every_loss_type():
    assert set(PREFERENCE_LOSSES) == set(get_args(LossType))


CONFIG = {"beta": 0.3, "gamma": 0.5, "orpo_lambda": 0.4}
EXPECTED = {
    "dpo": LOSSES["cdpo"][1],
    "robust": LOSSES["robust"][1],
    "hinge": LOSSES["hinge"][1],
    "ipo": LOSSES["ipo"][1],
    "simpo": LOSSES["simpo"][1],
    "cpo": LOSSES["cpo"][1],
    "orpo": LOSSES["orpo"][1],
}


@pytest.mark.parametrize("loss_type", get_args(LossType))
def test_registry_binds_the_keys_of_the_config(loss_type):
    smoothing = 0.2 if loss_type in ("dpo", "robust") else 0.0
    settings = CONFIG | ({"beta": 0.1} if loss_type == "orpo" else {})  # ORPO has none, and refuses another
    config = ObjectiveConfig(loss_type=loss_type, label_smoothing=smoothing, **settings)
    margin_T = torch.tensor(MARGINS, dtype=torch.float64)
    loss_T = PREFERENCE_LOSSES[loss_type].pair_loss(margin_T, torch.full_like(margin_T, NLL), config)
    expected = torch.tensor([EXPECTED[loss_type](m) for m in MARGINS], dtype=torch.float64)
    torch.testing.assert_close(loss_T, expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("loss_type", get_args(LossType))
def test_the_reward_reads_a_reference_exactly_where_the_config_says_so(loss_type):
    reward = PREFERENCE_LOSSES[loss_type].reward
    logp_T, length_T = torch.tensor([-4.0]), torch.tensor([3])
    if ObjectiveConfig(loss_type=loss_type).needs_reference:
        assert reward(ResponseLogprobs(logp_T, length_T, logp_T), 0.1).item() == 0.0
    else:
        assert math.isfinite(reward(ResponseLogprobs(logp_T, length_T, None), 0.1).item())
