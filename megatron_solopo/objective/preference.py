"""The losses of preference pairs: for each loss type, the reward of a response and the loss of a pair.

r_w and r_l are the rewards r(x, y_w) and r(x, y_l) of one context x, with the reward of the same loss type, and m is
their margin r_w - r_l. The convex functions of m are instances of GPO (arXiv 2402.05749). Every loss is a function of
the two rewards, so each may be aligned between contexts.

All functions take and return `[T]`. Token counts are of the whole response, over all context-parallel ranks, and at
least 1.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_solopo.config import LossType, ObjectiveConfig

_LOG_HALF = -math.log(2)
_LARGEST_MEAN_LOGP = -(2.0**-24)
"""Above it, float32 rounds exp() to 1, and the odds p / (1 - p) are infinite."""


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
    """beta * (log pi(y|x) - log pi_ref(y|x)) / |y|, the averaged form in the losses of TRL's `ipo` and `sigmoid_norm`.

    TRL's charts show the rewards of these losses without the division by |y|.
    """
    return beta * response.log_ratio_T / response.length_T


def mean_logp_reward(response: ResponseLogprobs, beta: float) -> Tensor:
    """beta * log pi(y|x) / |y|, SimPO (arXiv 2405.14734)."""
    return beta * response.mean_logp_T


def logp_reward(response: ResponseLogprobs, beta: float) -> Tensor:
    """beta * log pi(y|x), CPO (arXiv 2401.08417)."""
    return beta * response.logp_T


def log_odds_reward(response: ResponseLogprobs, beta: float) -> Tensor:
    """log(p / (1 - p)) with p = exp(log pi(y|x) / |y|), ORPO (arXiv 2403.07691); it does not depend on `beta`.

    p is limited to 1 - 2**-24, the largest value that float32 separates from 1. Above it the reward is constant (16.6)
    and its gradient is 0 instead of infinite. TRL's charts show `beta * log pi(y|x)` for ORPO, but its loss compares
    the log odds.
    """
    mean_logp_T = response.mean_logp_T.clamp(max=_LARGEST_MEAN_LOGP)
    return mean_logp_T - log1mexp(mean_logp_T)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, elementwise, accurate and with a finite gradient at both ends.

    The formula is log(-expm1(x)) above -ln 2, and log1p(-exp(x)) below (Maechler, "Accurately computing
    log(1 - exp(-|a|))", 2012).
    """
    # The gradient of `where` multiplies the unused branch by 0. The clamp keeps that branch finite, so there is no
    # 0 * inf.
    far = torch.log1p(-torch.exp(x.clamp(max=_LOG_HALF)))
    return torch.where(x > _LOG_HALF, torch.log(-torch.expm1(x)), far)


def dpo_loss(margin_T: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) logsigmoid(m) - e logsigmoid(-m): DPO (arXiv 2305.18290, TRL `sigmoid`); e > 0 is conservative DPO.

    e is the probability that a label is wrong (Mitchell, "A note on DPO with noisy preferences", 2023). On rewards per
    token it is length-normalised DPO (TRL `sigmoid_norm`, open-instruct `dpo_norm`; arXiv 2411.15124).
    """
    return -(1 - label_smoothing) * logsigmoid(margin_T) - label_smoothing * logsigmoid(-margin_T)


def robust_loss(margin_T: Tensor, label_smoothing: float) -> Tensor:
    """[-(1 - e) logsigmoid(m) + e logsigmoid(-m)] / (1 - 2e), e in [0, 0.5): robust DPO (arXiv 2403.00409).

    If labels are flipped with probability e, its expectation is the DPO loss of the true labels. TRL `robust`.
    """
    flipped_T = label_smoothing * logsigmoid(-margin_T)
    return (-(1 - label_smoothing) * logsigmoid(margin_T) + flipped_T) / (1 - 2 * label_smoothing)


def hinge_loss(margin_T: Tensor) -> Tensor:
    """max(0, 1 - m): SLiC's hinge (arXiv 2305.10425) on DPO's reward, as RSO has it (arXiv 2309.06657); TRL `hinge`."""
    return torch.relu(1 - margin_T)


def ipo_loss(margin_T: Tensor, beta: float) -> Tensor:
    """(m / beta - 1 / (2 beta))**2: IPO (arXiv 2310.12036, eq. 17) on token-averaged log ratios, as TRL `ipo`."""
    return (margin_T / beta - 1 / (2 * beta)) ** 2


def apo_zero_loss(chosen_T: Tensor, rejected_T: Tensor) -> Tensor:
    """1 - sigmoid(r_w) + sigmoid(r_l): APO-zero (arXiv 2408.06266, eq. 7), for chosen answers above the model's own."""
    return torch.sigmoid(-chosen_T) + torch.sigmoid(rejected_T)


def apo_down_loss(chosen_T: Tensor, rejected_T: Tensor) -> Tensor:
    """sigmoid(r_w) + 1 - sigmoid(m): APO-down (arXiv 2408.06266, eq. 8), for chosen answers below the model's own."""
    return torch.sigmoid(chosen_T) + torch.sigmoid(rejected_T - chosen_T)


def exo_pair_loss(margin_T: Tensor, label_smoothing: float) -> Tensor:
    """q log(q / (1 - e)) + (1 - q) log((1 - q) / e), q = sigmoid(m): EXO of a pair (arXiv 2402.00856, eq. 16).

    It is the reverse KL divergence from the labels, of which a share e in (0, 0.5) is wrong. It is least where m is
    log((1 - e) / e).
    """
    log_chosen_T, log_rejected_T = logsigmoid(margin_T), logsigmoid(-margin_T)
    chosen_T = log_chosen_T.exp() * (log_chosen_T - math.log1p(-label_smoothing))
    return chosen_T + log_rejected_T.exp() * (log_rejected_T - math.log(label_smoothing))


def nca_pair_loss(chosen_T: Tensor, rejected_T: Tensor) -> Tensor:
    """-logsigmoid(r_w) - [logsigmoid(-r_w) + logsigmoid(-r_l)] / 2: NCA of a pair (arXiv 2402.05369)."""
    return -logsigmoid(chosen_T) - 0.5 * logsigmoid(-chosen_T) - 0.5 * logsigmoid(-rejected_T)


def sppo_hard_loss(chosen_T: Tensor, rejected_T: Tensor, beta: float) -> Tensor:
    """[(r_w - 1/2)**2 + (r_l + 1/2)**2] / beta**2: SPPO (arXiv 2405.00675, eq. 4.7) where the winner is sure.

    Its rewards are beta times the log ratios, so this is (log ratio - 1 / (2 beta))**2 of y_w, and + of y_l.
    """
    return ((chosen_T - 0.5).square() + (rejected_T + 0.5).square()) / beta**2


def simpo_loss(margin_T: Tensor, gamma: float) -> Tensor:
    """-logsigmoid(m - gamma): SimPO (arXiv 2405.14734). gamma is the margin itself, TRL's `simpo_gamma`."""
    return -logsigmoid(margin_T - gamma)


def cpo_loss(margin_T: Tensor) -> Tensor:
    """-logsigmoid(m): CPO (arXiv 2401.08417, TRL `CPOTrainer`) without its likelihood term.

    The paper adds NLL(y_w) with weight 1; set `nll_coefficient` (TRL's `cpo_alpha`) for it.
    """
    return -logsigmoid(margin_T)


def orpo_loss(margin_T: Tensor, chosen_nll_T: Tensor, odds_weight: float) -> Tensor:
    """NLL(y_w|x) / |y_w| - lambda * logsigmoid(m): ORPO (arXiv 2403.07691), `odds_weight` is lambda (TRL's `beta`).

    The likelihood is of the response alone; TRL's `ORPOTrainer` also counts the tokens of the prompt.
    """
    return chosen_nll_T - odds_weight * logsigmoid(margin_T)


@dataclass(frozen=True)
class PreferenceLoss:
    """One loss type: how a response is rewarded and how a pair is judged."""

    reward: Callable[[ResponseLogprobs, float], Tensor]
    """(response, beta) -> reward [T]."""
    pair_loss: Callable[[Tensor, Tensor, Tensor, ObjectiveConfig], Tensor]
    """(reward of the chosen response [T], that of the rejected one [T], NLL per token of the chosen response [T],
    config) -> loss [T]."""


PREFERENCE_LOSSES: dict[LossType, PreferenceLoss] = {
    "dpo": PreferenceLoss(log_ratio_reward, lambda won, lost, _, config: dpo_loss(won - lost, config.label_smoothing)),
    "robust": PreferenceLoss(
        log_ratio_reward, lambda won, lost, _, config: robust_loss(won - lost, config.label_smoothing)
    ),
    "hinge": PreferenceLoss(log_ratio_reward, lambda won, lost, _, config: hinge_loss(won - lost)),
    "ipo": PreferenceLoss(mean_log_ratio_reward, lambda won, lost, _, config: ipo_loss(won - lost, config.beta)),
    "dpo_norm": PreferenceLoss(mean_log_ratio_reward, lambda won, lost, _, config: dpo_loss(won - lost)),
    "apo_zero": PreferenceLoss(log_ratio_reward, lambda won, lost, _, config: apo_zero_loss(won, lost)),
    "apo_down": PreferenceLoss(log_ratio_reward, lambda won, lost, _, config: apo_down_loss(won, lost)),
    "exo_pair": PreferenceLoss(
        log_ratio_reward, lambda won, lost, _, config: exo_pair_loss(won - lost, config.label_smoothing)
    ),
    "nca_pair": PreferenceLoss(log_ratio_reward, lambda won, lost, _, config: nca_pair_loss(won, lost)),
    "sppo_hard": PreferenceLoss(log_ratio_reward, lambda won, lost, _, config: sppo_hard_loss(won, lost, config.beta)),
    "simpo": PreferenceLoss(mean_logp_reward, lambda won, lost, _, config: simpo_loss(won - lost, config.gamma)),
    "cpo": PreferenceLoss(logp_reward, lambda won, lost, _, config: cpo_loss(won - lost)),
    "orpo": PreferenceLoss(
        log_odds_reward, lambda won, lost, nll, config: orpo_loss(won - lost, nll, config.orpo_lambda)
    ),
}
