"""Rewards against plain float arithmetic, ORPO's log odds against arbitrary precision."""

import math

import mpmath
import pytest
import torch

from megatron_solopo.objective.reward import (
    ResponseLogprobs,
    log1mexp,
    log_odds_reward,
    log_ratio_reward,
    logp_reward,
    mean_log_ratio_reward,
    mean_logp_reward,
)

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
def test_gradients_and_dtype(reward):
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
