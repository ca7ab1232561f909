"""Pair losses and rewards against plain float arithmetic, their limits, and the registry."""

import math
from typing import get_args

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_solopo.config import LossType, ObjectiveConfig
from megatron_solopo.objective.preference import (
    PREFERENCE_LOSSES,
    ResponseLogprobs,
    apo_down_loss,
    apo_zero_loss,
    cpo_loss,
    dpo_loss,
    exo_pair_loss,
    hinge_loss,
    ipo_loss,
    log1mexp,
    log_odds_reward,
    log_ratio_reward,
    logp_reward,
    mean_log_ratio_reward,
    mean_logp_reward,
    nca_pair_loss,
    orpo_loss,
    robust_loss,
    simpo_loss,
    sppo_hard_loss,
)

SMOOTHING = {"exo_pair": 0.1}  # it needs some
MARGINS = [-30.0, -2.5, -0.3, 0.0, 0.4, 1.7, 25.0]
NLL = 1.25

margins = st.floats(-50, 50)


def softplus(x: float) -> float:
    """log(1 + exp(x)) = -log sigmoid(-x)."""
    return max(x, 0.0) + math.log1p(math.exp(-abs(x)))


def sigmoid(x: float) -> float:
    return math.exp(-softplus(-x))


def divergence(q: float, p: float) -> float:
    """KL(q, 1 - q || p, 1 - p)."""
    return sum(a * math.log(a / b) if a else 0.0 for a, b in ((q, p), (1 - q, 1 - p)))


LOSSES = {
    "dpo": (lambda m: dpo_loss(m), lambda m: softplus(-m)),
    "cdpo": (lambda m: dpo_loss(m, 0.2), lambda m: 0.8 * softplus(-m) + 0.2 * softplus(m)),
    "robust": (lambda m: robust_loss(m, 0.2), lambda m: (0.8 * softplus(-m) - 0.2 * softplus(m)) / 0.6),
    "hinge": (lambda m: hinge_loss(m), lambda m: max(0.0, 1 - m)),
    "ipo": (lambda m: ipo_loss(m, 0.3), lambda m: (m / 0.3 - 1 / 0.6) ** 2),
    "simpo": (lambda m: simpo_loss(m, 0.5), lambda m: softplus(0.5 - m)),
    "cpo": (lambda m: cpo_loss(m), lambda m: softplus(-m)),
    "orpo": (lambda m: orpo_loss(m, torch.full_like(m, NLL), 0.4), lambda m: NLL + 0.4 * softplus(-m)),
    "exo_pair": (lambda m: exo_pair_loss(m, 0.2), lambda m: divergence(sigmoid(m), 0.8)),
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
        if name in ("robust", "exo_pair"):  # not convex: the first subtracts one, the second flattens far out
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
    "dpo_norm": LOSSES["dpo"][1],
    "exo_pair": LOSSES["exo_pair"][1],
}
# What both rewards decide, not their margin alone; of rewards of 0.3 times the log ratios.
OF_BOTH = {
    "apo_zero": lambda won, lost: 1 - sigmoid(won) + sigmoid(lost),
    "apo_down": lambda won, lost: sigmoid(won) + 1 - sigmoid(won - lost),
    "nca_pair": lambda won, lost: softplus(-won) + (softplus(won) + softplus(lost)) / 2,
    "sppo_hard": lambda won, lost: (won / 0.3 - 1 / 0.6) ** 2 + (lost / 0.3 + 1 / 0.6) ** 2,
}


@pytest.mark.parametrize("loss_type", get_args(LossType))
def test_registry_binds_the_keys_of_the_config(loss_type):
    smoothing = 0.2 if loss_type in ("dpo", "robust", "exo_pair") else 0.0
    settings = CONFIG | ({"beta": 0.1} if loss_type == "orpo" else {})  # ORPO has none, and refuses another
    config = ObjectiveConfig(loss_type=loss_type, label_smoothing=smoothing, **settings)
    chosen_T = torch.tensor([2.0, -1.5, 0.7, 0.0, 0.2, -3.0, 20.0], dtype=torch.float64)
    rejected_T = chosen_T - torch.tensor(MARGINS, dtype=torch.float64)
    loss_T = PREFERENCE_LOSSES[loss_type].pair_loss(chosen_T, rejected_T, torch.full_like(chosen_T, NLL), config)
    formula = OF_BOTH.get(loss_type) or (lambda won, lost: EXPECTED[loss_type](won - lost))
    expected = [formula(*pair) for pair in zip(chosen_T.tolist(), rejected_T.tolist(), strict=True)]
    torch.testing.assert_close(loss_T, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("loss", [apo_zero_loss, apo_down_loss, nca_pair_loss, lambda w, r: sppo_hard_loss(w, r, 0.3)])
def test_gradients_of_losses_of_both_rewards(loss):
    rewards = [
        torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in ([-2.0, 0.0, 3], [1, -1.0, 2])
    ]
    assert torch.autograd.gradcheck(loss, rewards)
    assert loss(torch.full((1,), 500.0), torch.full((1,), -500.0)).isfinite().all()


def test_exo_is_content_where_the_odds_are_those_of_the_labels():
    margin_T = torch.tensor([math.log(0.9 / 0.1), 400.0, -400.0], dtype=torch.float64, requires_grad=True)
    loss_T = exo_pair_loss(margin_T, 0.1)
    loss_T.sum().backward()
    assert loss_T.tolist() == pytest.approx([0.0, -math.log(0.9), -math.log(0.1)], abs=1e-12)
    assert margin_T.grad.tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-12)


@pytest.mark.parametrize("loss_type", get_args(LossType))
def test_the_reward_reads_a_reference_exactly_where_the_config_says_so(loss_type):
    reward = PREFERENCE_LOSSES[loss_type].reward
    logp_T, length_T = torch.tensor([-4.0]), torch.tensor([3])
    if ObjectiveConfig(loss_type=loss_type, label_smoothing=SMOOTHING.get(loss_type, 0.0)).needs_reference:
        assert reward(ResponseLogprobs(logp_T, length_T, logp_T), 0.1).item() == 0.0
    else:
        assert math.isfinite(reward(ResponseLogprobs(logp_T, length_T, None), 0.1).item())


LOGPS = [-3.0, -41.5, -0.25, -700.0]
REFERENCES = [-2.5, -50.0, -0.25, -640.0]
LENGTHS = [3, 17, 1, 1009]
BETA = 0.7

# Mean log-probabilities per token, from a near certain response to a hopeless one, both sides of -ln 2.
MEAN_LOGPS = [-1e-7, -1e-5, -1e-3, -0.1, -0.6931, -math.log(2), -0.6932, -1.0, -5.0, -20.0, -50.0]


def response(dtype: torch.dtype = torch.float64) -> ResponseLogprobs:
    return ResponseLogprobs(
        torch.tensor(LOGPS, dtype=dtype), torch.tensor(LENGTHS), torch.tensor(REFERENCES, dtype=dtype)
    )


@pytest.mark.parametrize(
    ("reward", "expected"),
    [
        (log_ratio_reward, lambda c, ref, n: BETA * (c - ref)),
        (mean_log_ratio_reward, lambda c, ref, n: BETA * (c - ref) / n),
        (mean_logp_reward, lambda c, ref, n: BETA * c / n),
        (logp_reward, lambda c, ref, n: BETA * c),
        (log_odds_reward, lambda c, ref, n: math.log(math.exp(c / n) / (1 - math.exp(c / n)))),
    ],
)
def test_rewards_equal_their_formulae(reward, expected):
    values = [expected(*row) for row in zip(LOGPS, REFERENCES, LENGTHS, strict=True)]
    torch.testing.assert_close(reward(response(), BETA), torch.tensor(values, dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "reward", [log_ratio_reward, mean_log_ratio_reward, mean_logp_reward, logp_reward, log_odds_reward]
)
def test_gradients_and_dtype_of_the_rewards(reward):
    logp_T = torch.tensor(LOGPS, dtype=torch.float64, requires_grad=True)
    references_T = torch.tensor(REFERENCES, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: reward(ResponseLogprobs(x, torch.tensor(LENGTHS), references_T), BETA), logp_T, eps=1e-6, atol=1e-7
    )
    assert reward(response(torch.float32), BETA).dtype == torch.float32


@pytest.mark.parametrize("mean_logp", MEAN_LOGPS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)])
def test_log_odds_are_exact_from_certain_to_hopeless(mean_logp, dtype, tolerance):
    length = 16  # a power of two: logp / length is exact
    logp_T = torch.tensor([mean_logp * length], dtype=dtype, requires_grad=True)
    reward_T = log_odds_reward(ResponseLogprobs(logp_T, torch.tensor([length]), None), BETA)
    (gradient_T,) = torch.autograd.grad(reward_T.sum(), logp_T)

    with mpmath.workdps(60):
        x = mpmath.mpf(logp_T.item()) / length
        odds = x - mpmath.log(1 - mpmath.exp(x))
        slope = 1 / (length * (1 - mpmath.exp(x)))
        # Near p = 1/2 the log odds pass through 0: there the error is absolute.
        assert abs(reward_T.item() - odds) <= tolerance * max(1, abs(odds))
        assert abs(gradient_T.item() - slope) <= tolerance * slope


@pytest.mark.parametrize("mean_logp", [-1e-30, *MEAN_LOGPS])
def test_log1mexp_keeps_relative_accuracy(mean_logp):
    x_T = torch.tensor([mean_logp], dtype=torch.float32, requires_grad=True)
    value_T = log1mexp(x_T)
    value_T.sum().backward()
    exact_x = x_T.item()
    expected = math.log1p(-math.exp(exact_x)) if exact_x < -0.5 else math.log(-math.expm1(exact_x))
    assert value_T.item() == pytest.approx(expected, rel=1e-6)
    assert x_T.grad.item() == pytest.approx(math.exp(exact_x) / math.expm1(exact_x), rel=1e-6)


@pytest.mark.parametrize("logp", [0.0, -1e-30, -1e-9, 1e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_log_odds_of_a_certain_response_are_finite(logp, dtype):
    logp_T = torch.tensor([logp, -2.0], dtype=dtype, requires_grad=True)
    reward_T = log_odds_reward(ResponseLogprobs(logp_T, torch.tensor([4, 4]), None), BETA)
    reward_T.sum().backward()
    assert reward_T[0].item() == pytest.approx(24 * math.log(2), rel=1e-6)
    assert logp_T.grad[0].item() == 0.0
    assert logp_T.grad[1].item() == pytest.approx(1 / (4 * (1 - math.exp(-0.5))), rel=1e-6)


def test_log_odds_of_an_impossible_response_are_finite():
    logp_T = torch.tensor([-1e6], requires_grad=True)
    reward_T = log_odds_reward(ResponseLogprobs(logp_T, torch.tensor([2]), None), BETA)
    reward_T.backward()
    assert reward_T.item() == -5e5
    assert logp_T.grad.item() == 0.5


@pytest.mark.parametrize("reward", [log_ratio_reward, mean_log_ratio_reward])
def test_missing_reference_is_refused(reward):
    with pytest.raises(AssertionError, match="reference"):
        reward(ResponseLogprobs(torch.zeros(2), torch.ones(2, dtype=torch.int64), None), BETA)
