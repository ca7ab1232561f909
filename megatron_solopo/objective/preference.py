"""Pair losses, and the registry that joins each loss type's reward and pair loss.

In all formulae m is the reward margin r(x, y_w) - r(x, y_l) of one context, with the reward of the same loss type.
The convex functions of m are instances of GPO (arXiv 2402.05749). All take and return `[T]`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_solopo.config import LossType, ObjectiveConfig
from megatron_solopo.objective.reward import (
    ResponseLogprobs,
    log_odds_reward,
    log_ratio_reward,
    logp_reward,
    mean_log_ratio_reward,
    mean_logp_reward,
)


def dpo_loss(margin_T: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """-(1 - e) logsigmoid(m) - e logsigmoid(-m): DPO (arXiv 2305.18290, TRL `sigmoid`); e > 0 is conservative DPO.

    e is the probability that a label is wrong (Mitchell, "A note on DPO with noisy preferences", 2023).
    """
    return -(1 - label_smoothing) * logsigmoid(margin_T) - label_smoothing * logsigmoid(-margin_T)


def robust_loss(margin_T: Tensor, label_smoothing: float) -> Tensor:
    """[-(1 - e) logsigmoid(m) + e logsigmoid(-m)] / (1 - 2e), e in [0, 0.5): robust DPO (arXiv 2403.00409).

    Over labels flipped with probability e, its expectation is the DPO loss of the true labels. TRL `robust`.
    """
    flipped_T = label_smoothing * logsigmoid(-margin_T)
    return (-(1 - label_smoothing) * logsigmoid(margin_T) + flipped_T) / (1 - 2 * label_smoothing)


def hinge_loss(margin_T: Tensor) -> Tensor:
    """max(0, 1 - m): SLiC's hinge (arXiv 2305.10425) on DPO's reward, as RSO has it (arXiv 2309.06657); TRL `hinge`."""
    return torch.relu(1 - margin_T)


def ipo_loss(margin_T: Tensor, beta: float) -> Tensor:
    """(m / beta - 1 / (2 beta))**2: IPO (arXiv 2310.12036, eq. 17) on token-averaged log ratios, as TRL `ipo`."""
    return (margin_T / beta - 1 / (2 * beta)) ** 2


def simpo_loss(margin_T: Tensor, gamma: float) -> Tensor:
    """-logsigmoid(m - gamma): SimPO (arXiv 2405.14734). gamma is the margin itself, TRL's `simpo_gamma`."""
    return -logsigmoid(margin_T - gamma)


def cpo_loss(margin_T: Tensor) -> Tensor:
    """-logsigmoid(m): CPO (arXiv 2401.08417, TRL `CPOTrainer`) without its likelihood term.

    The paper's loss has NLL(y_w) with weight 1 besides: set `nll_coefficient` (TRL's `cpo_alpha`).
    """
    return -logsigmoid(margin_T)


def orpo_loss(margin_T: Tensor, chosen_nll_T: Tensor, odds_weight: float) -> Tensor:
    """NLL(y_w|x) / |y_w| - lambda * logsigmoid(m): ORPO (arXiv 2403.07691), `odds_weight` is lambda (TRL's `beta`).

    The likelihood is that of the response alone; TRL's `ORPOTrainer` counts the prompt's tokens too.
    """
    return chosen_nll_T - odds_weight * logsigmoid(margin_T)


@dataclass(frozen=True)
class PreferenceLoss:
    """One loss type: how a response is rewarded and how a pair is judged."""

    reward: Callable[[ResponseLogprobs, float], Tensor]
    """(response, beta) -> reward [T]."""
    pair_loss: Callable[[Tensor, Tensor, ObjectiveConfig], Tensor]
    """(reward margin [T], NLL per token of the chosen response [T], config) -> loss [T]."""


PREFERENCE_LOSSES: dict[LossType, PreferenceLoss] = {
    "dpo": PreferenceLoss(log_ratio_reward, lambda margin, _, config: dpo_loss(margin, config.label_smoothing)),
    "robust": PreferenceLoss(log_ratio_reward, lambda margin, _, config: robust_loss(margin, config.label_smoothing)),
    "hinge": PreferenceLoss(log_ratio_reward, lambda margin, _, config: hinge_loss(margin)),
    "ipo": PreferenceLoss(mean_log_ratio_reward, lambda margin, _, config: ipo_loss(margin, config.beta)),
    "simpo": PreferenceLoss(mean_logp_reward, lambda margin, _, config: simpo_loss(margin, config.gamma)),
    "cpo": PreferenceLoss(logp_reward, lambda margin, _, config: cpo_loss(margin)),
    "orpo": PreferenceLoss(log_odds_reward, lambda margin, nll, config: orpo_loss(margin, nll, config.orpo_lambda)),
}
