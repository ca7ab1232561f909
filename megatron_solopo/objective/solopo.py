"""The objective of training, on a pack of triplets.

    solopo:    L = L_PO(x_short, y_w, y_l) + alpha * s(r(x_short, y_w) - r(x_long, y_w))     (SoLoPO, arXiv 2505.11166)
    short_po:  L = L_PO(x_short, y_w, y_l)
    long_po:   L = L_PO(x_long, y_w, y_l)
    sft:       L = -log pi(y_w|x_short) / |y_w|

The second term of solopo is SoLo-RA, the alignment of rewards between the short and the long context. With `align:
both`, the distance of y_l is added to that of y_w, under the same alpha. Each objective but sft also adds
`nll_coefficient` * NLL per token of y_w on the pair's own context (the likelihood term of RPO, arXiv 2404.19733).

With `ld_alpha`, rewards take log pi(y|x) - (1 - ld_alpha) * log pi(verbose tokens of y|x), and the reference's numbers
come so (LD-DPO, arXiv 2409.06411). With `use_weighting`, w(y_w) * w(y_l) multiplies L_PO (WPO, arXiv 2406.11827):

    w(y) = exp(mean over the tokens t of log(pi(y_t) / sum_v pi(v)**2)), without gradient

With `token_alignment: reverse_kl`, solopo also has this term, after OPSDL (arXiv 2604.17535):

    token_alignment_weight * mean over the tokens t of y_w of KL(pi(.|x_long, y_<t) || pi(.|x_short, y_<t))

The model behind the long context is the student, and the model behind the short one its teacher, without gradient.
OPSDL takes answers that the model has just written behind the long context. Here they are the data's chosen answers.

With `reference.context: short`, log pi_ref(y|x) is log pi_ref(y|x_short) also behind x_long. With long_po, `dpo` and
`nll_coefficient`, this is LongPO (arXiv 2502.13922).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import huber_loss

from megatron_solopo.config import ObjectiveConfig, Role
from megatron_solopo.objective.preference import PREFERENCE_LOSSES, ResponseLogprobs

Distance = Literal["l1", "l2", "huber"]
FurtherSum = Literal["verbose_logps", "log_squares", "divergences"]
"""What some objectives sum over the response tokens besides their log-probabilities:

- verbose_logps: log-probabilities of the tokens beyond the length of the shorter response of the triplet
- log_squares: log of the sum of the squared probabilities of the whole vocabulary, at each token
- divergences: KL(pi(.|x_long, y) || pi(.|x_short, y)) at each token, for `long_chosen` alone
"""

DISTANCES: dict[Distance, Callable[[Tensor, float], Tensor]] = {
    "l1": lambda gap_T, _: gap_T.abs(),
    "l2": lambda gap_T, _: gap_T.square(),
    "huber": lambda gap_T, delta: huber_loss(gap_T, torch.zeros_like(gap_T), reduction="none", delta=delta),
}


def alignment_distance(
    short_reward_T: Tensor, long_reward_T: Tensor, distance: Distance, huber_delta: float, detach_short: bool
) -> Tensor:
    """s(g) of the gap g = r(x_short, y) - r(x_long, y) of one response, `[T]`, not yet weighted by alpha.

    - l1: |g|, the paper's choice. With a logistic pair loss it bounds the pair loss of the long context.
    - l2: g**2, the bound for a squared pair loss.
    - huber: g**2 / 2 up to `huber_delta`, then huber_delta * (|g| - huber_delta / 2).

    With `detach_short` the gradient reaches only the long reward. A gap then closes only because the long reward moves;
    what the model learned on the short context stays.
    """
    target_T = short_reward_T.detach() if detach_short else short_reward_T
    return DISTANCES[distance](target_T - long_reward_T, huber_delta)


@dataclass(frozen=True)
class ObjectiveOutput:
    """Loss and metrics of one pack."""

    loss_T: Tensor
    """Loss per triplet, differentiable. The caller sums it and divides by the triplets of the global batch."""
    metrics: dict[str, Tensor]
    """Detached values per triplet, `[T]`, with the keys of `metric_names`."""


@cache
def metric_names(config: ObjectiveConfig) -> tuple[str, ...]:
    """The keys of `ObjectiveOutput.metrics`, in order. Pipeline ranks that compute no loss need them too."""
    nothing = dict.fromkeys(config.roles.all, torch.zeros(0))
    further = dict.fromkeys(further_sums(config), nothing)
    return tuple(compute_objective(config, nothing, nothing, nothing, further).metrics)


def further_sums(config: ObjectiveConfig) -> tuple[FurtherSum, ...]:
    """What the objective needs besides the summed log-probabilities."""
    needed: dict[FurtherSum, bool] = {
        "verbose_logps": config.ld_alpha is not None,
        "log_squares": config.use_weighting,
        "divergences": config.aligns_tokens,
    }
    return tuple(name for name, is_needed in needed.items() if is_needed)


def compute_objective(
    config: ObjectiveConfig,
    logps: Mapping[Role, Tensor],
    lengths: Mapping[Role, Tensor],
    reference_logps: Mapping[Role, Tensor] | None = None,
    further: Mapping[FurtherSum, Mapping[Role, Tensor]] | None = None,
) -> ObjectiveOutput:
    """Loss and metrics of T triplets; T may be 0.

    Args:
        logps: role -> log pi(y|x) summed over the response tokens, float32 or float64 `[T]`, for every required role.
        lengths: role -> response tokens of the whole response, `[T]`, at least 1.
        reference_logps: role of the policy's sequence -> log pi_ref(y|x), `[T]`; required if `config.needs_reference`,
            else ignored. With `ld_alpha`, verbose tokens have their weight in it.
        further: for each name in `further_sums(config)`, role -> the sum, `[T]`.

    Metrics per triplet:
        loss = po_loss + alpha * solo_ra/loss + nll_coefficient * nll_loss + token_alignment_weight * token_alignment/kl
        po_loss: the pair loss (with ORPO's own likelihood term, and with WPO's weight).
        wpo_weights: that weight, with `use_weighting`.
        solo_ra/loss: the distance before alpha; with `align: both`, the sum of both distances.
        solo_ra/gap_signed, solo_ra/gap_abs: chosen reward on the short minus the long context, and its size.
        solo_ra/gap_abs_rejected: the size for the rejected response, with `align: both`.
        rewards/*, logps/*: rewards and summed log-probabilities of the pair; `chosen_long`: on the long context.
        token_alignment/kl: the mean divergence at a token of y_w, in nats, with `token_alignment`.
        nll_loss: -log pi(y_w|x) / |y_w| on the pair's context.
    Only solopo has solo_ra/* and *_long. The pair of long_po is on the long context. sft has loss, which is nll_loss,
    and logps/chosen.
    """
    roles = config.roles.all
    assert all(logps[role].dtype in (torch.float32, torch.float64) for role in roles), "sums of log-probs need float32"
    if config.name == "sft":
        return _likelihood(logps[roles[0]], lengths[roles[0]])
    assert reference_logps is not None or not config.needs_reference, f"{config.loss_type} needs reference log-probs"
    further = further or {}
    responses = _responses(config, logps, lengths, reference_logps, further)
    loss_type = PREFERENCE_LOSSES[config.loss_type]
    rewards = {role: loss_type.reward(response, config.beta) for role, response in responses.items()}

    chosen, rejected = config.roles.pair
    nll_T = -logps[chosen] / lengths[chosen]
    po_loss_T = loss_type.pair_loss(rewards[chosen], rewards[rejected], nll_T, config)
    metrics = {"po_loss": po_loss_T}
    if config.use_weighting:
        log_weights = [(logps[role] - further["log_squares"][role]) / lengths[role] for role in config.roles.pair]
        weights_T = torch.stack(log_weights).sum(dim=0).exp().detach()
        po_loss_T = po_loss_T * weights_T
        metrics = {"po_loss": po_loss_T, "wpo_weights": weights_T}
    loss_T = po_loss_T + config.nll_coefficient * nll_T
    if config.name == "solopo":
        alignment_T = _alignment(config, rewards)
        loss_T = loss_T + config.alignment_weight * alignment_T
        metrics |= {"solo_ra/loss": alignment_T} | _alignment_metrics(rewards, logps)
    if config.aligns_tokens:
        divergence_T = further["divergences"][Role.LONG_CHOSEN] / lengths[Role.LONG_CHOSEN]
        loss_T = loss_T + config.token_alignment_weight * divergence_T
        metrics["token_alignment/kl"] = divergence_T
    metrics = {"loss": loss_T} | metrics | _pair_metrics(rewards[chosen], rewards[rejected])
    metrics |= {"logps/chosen": logps[chosen], "logps/rejected": logps[rejected], "nll_loss": nll_T}
    return ObjectiveOutput(loss_T, {name: value_T.detach() for name, value_T in metrics.items()})


def _likelihood(logp_T: Tensor, length_T: Tensor) -> ObjectiveOutput:
    """Supervised fine-tuning. Every row counts the same, however long its response is."""
    loss_T = -logp_T / length_T
    metrics = {"loss": loss_T, "logps/chosen": logp_T, "nll_loss": loss_T}
    return ObjectiveOutput(loss_T, {name: value_T.detach() for name, value_T in metrics.items()})


def _responses(
    config: ObjectiveConfig,
    logps: Mapping[Role, Tensor],
    lengths: Mapping[Role, Tensor],
    reference_logps: Mapping[Role, Tensor] | None,
    further: Mapping[FurtherSum, Mapping[Role, Tensor]],
) -> dict[Role, ResponseLogprobs]:
    """What rewards are made of, by role; see `compute_objective`."""
    references = reference_logps if config.needs_reference else None
    if config.ld_alpha is not None:
        verbose = further["verbose_logps"]
        logps = {role: logps[role] - (1 - config.ld_alpha) * verbose[role] for role in config.roles.all}
    return {
        role: ResponseLogprobs(logps[role], lengths[role], None if references is None else references[role])
        for role in config.roles.all
    }


def _alignment(config: ObjectiveConfig, rewards: Mapping[Role, Tensor]) -> Tensor:
    """Sum of the distances of the aligned responses, `[T]`."""
    distances = [
        alignment_distance(
            rewards[role.on_short_context],
            rewards[role],
            config.distance,
            config.huber_delta,
            config.detach_short,
        )
        for role in config.roles.aligned
    ]
    return torch.stack(distances).sum(dim=0)


def _alignment_metrics(rewards: Mapping[Role, Tensor], logps: Mapping[Role, Tensor]) -> dict[str, Tensor]:
    long = Role.LONG_CHOSEN
    gap_T = rewards[Role.SHORT_CHOSEN] - rewards[long]
    metrics = {"solo_ra/gap_abs": gap_T.abs(), "solo_ra/gap_signed": gap_T}
    if Role.LONG_REJECTED in rewards:
        gap_T = rewards[Role.SHORT_REJECTED] - rewards[Role.LONG_REJECTED]
        metrics["solo_ra/gap_abs_rejected"] = gap_T.abs()
    return metrics | {"rewards/chosen_long": rewards[long], "logps/chosen_long": logps[long]}


def _pair_metrics(chosen_T: Tensor, rejected_T: Tensor) -> dict[str, Tensor]:
    return {
        "rewards/chosen": chosen_T,
        "rewards/rejected": rejected_T,
        "rewards/margins": chosen_T - rejected_T,
        "rewards/accuracies": (chosen_T > rejected_T).to(chosen_T.dtype),
    }
