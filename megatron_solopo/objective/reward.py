"""What a response is worth under a context: r(x, y), one function per family of losses.

Every function takes a `Response` and `beta` and returns `[T]`. Token counts are those of the whole
response, over all context-parallel ranks, and at least 1.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_LOG_HALF = -math.log(2)
_LARGEST_MEAN_LOGP = -(2.0**-24)
"""Above it exp() rounds to 1 in float32, so that the odds p / (1 - p) are not representable."""


@dataclass(frozen=True)
class ResponseLogprobs:
    """The responses of one role (such as `short_chosen`), one per triplet."""

    logp_T: Tensor
    """log pi(y|x), summed over the response tokens."""
    length_T: Tensor
    """|y|, the number of response tokens."""
    reference_logp_T: Tensor | None
    """log pi_ref(y|x), summed over the response tokens; None for losses without a reference."""

    @property
    def mean_logp_T(self) -> Tensor:
        """log pi(y|x) / |y|, the mean over the response tokens."""
        return self.logp_T / self.length_T

    @property
    def log_ratio_T(self) -> Tensor:
        """log pi(y|x) - log pi_ref(y|x), summed over the response tokens."""
        assert self.reference_logp_T is not None, "this loss type needs the reference's log-probabilities"
        return self.logp_T - self.reference_logp_T


def log_ratio_reward(response: ResponseLogprobs, beta: float) -> Tensor:
    """beta * (log pi(y|x) - log pi_ref(y|x)), DPO's implicit reward (arXiv 2305.18290)."""
    return beta * response.log_ratio_T


def mean_log_ratio_reward(response: ResponseLogprobs, beta: float) -> Tensor:
    """beta * (log pi(y|x) - log pi_ref(y|x)) / |y|, the averaged form that TRL's `ipo` puts into the loss.

    TRL charts the rewards of `ipo` without the division by |y|.
    """
    return beta * response.log_ratio_T / response.length_T


def mean_logp_reward(response: ResponseLogprobs, beta: float) -> Tensor:
    """beta * log pi(y|x) / |y|, SimPO (arXiv 2405.14734)."""
    return beta * response.mean_logp_T


def logp_reward(response: ResponseLogprobs, beta: float) -> Tensor:
    """beta * log pi(y|x), CPO (arXiv 2401.08417)."""
    return beta * response.logp_T


def log_odds_reward(response: ResponseLogprobs, beta: float) -> Tensor:
    """log(p / (1 - p)) with p = exp(log pi(y|x) / |y|), ORPO (arXiv 2403.07691); `beta` has no part in it.

    p stays below 1 - 2**-24, where float32 still tells it from 1: above, the reward is constant (16.6) and its
    gradient 0 instead of infinite. TRL charts `beta * log pi(y|x)` for ORPO, which is not what its loss compares.
    """
    mean_logp_T = response.mean_logp_T.clamp(max=_LARGEST_MEAN_LOGP)
    return mean_logp_T - log1mexp(mean_logp_T)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, elementwise, accurate and with a finite gradient at both ends.

    log(-expm1(x)) near 0 and log1p(-exp(x)) far from it, parted at -ln 2 (Maechler, "Accurately computing
    log(1 - exp(-|a|))", 2012).
    """
    # `where` multiplies the branch not taken by 0: the clamp keeps that branch finite, so that no 0 * inf arises.
    far = torch.log1p(-torch.exp(x.clamp(max=_LOG_HALF)))
    return torch.where(x > _LOG_HALF, torch.log(-torch.expm1(x)), far)
