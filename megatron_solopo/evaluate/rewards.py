"""Rewards, accuracies and gaps of every triplet from its log-probabilities, and their means over groups of triplets.

Names are those of `metrics.jsonl` with the context at the end: `rewards/accuracies_long` is the share of triplets whose
chosen answer has the higher reward on the long context.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_solopo.config import ObjectiveConfig, Role
from megatron_solopo.evaluate.statistics import Mask, by_depth, by_length, mean_measure, proportion
from megatron_solopo.objective.preference import PREFERENCE_LOSSES, ResponseLogprobs
from megatron_solopo.results.preference import DepthGroup, LengthAndDepthGroup, LengthGroup, TripletGroup
from megatron_solopo.results.results_file import MeanWithInterval

TripletColumn = NDArray[np.float64]


def triplet_columns(
    objective: ObjectiveConfig,
    logps: Mapping[Role, Tensor],
    lengths: Mapping[Role, NDArray[np.int64]],
    references: Mapping[Role, Tensor] | None,
) -> dict[str, TripletColumn]:
    """Numbers of every triplet, by name: float64 [D] for D triplets.

    Args:
        objective: Its `loss_type` and `beta` say what a reward is.
        logps: Summed log-probabilities of the responses [D], by role (`short_chosen`, `long_rejected` and so on).
        lengths: Tokens of the responses [D], by role.
        references: Log-probabilities under the reference model [D], by role, for losses that need them.
    """
    contexts = list(dict.fromkeys(role.context for role in logps))
    reward = PREFERENCE_LOSSES[objective.loss_type].reward
    columns: dict[str, TripletColumn] = {}
    for role, logp in logps.items():
        context, answer = role.context, role.response
        reference = None if references is None else references[role].double()
        columns[f"logps/{answer}_{context}"] = logp.double().numpy()
        if reference is not None:
            columns[f"reference_logps/{answer}_{context}"] = reference.numpy()
        response = ResponseLogprobs(logp.double(), torch.from_numpy(lengths[role]).double(), reference)
        columns[f"rewards/{answer}_{context}"] = reward(response, objective.beta).numpy()
    for context in contexts:
        columns[f"rewards/margins_{context}"] = (
            columns[f"rewards/chosen_{context}"] - columns[f"rewards/rejected_{context}"]
        )
    if len(contexts) > 1:
        gap = columns["rewards/chosen_short"] - columns["rewards/chosen_long"]
        columns |= {"solo_ra/gap_signed": gap, "solo_ra/gap_abs": np.abs(gap)}
        columns["solo_ra/gap_abs_rejected"] = np.abs(
            columns["rewards/rejected_short"] - columns["rewards/rejected_long"]
        )
    return columns


def summarise(columns: Mapping[str, TripletColumn], mask: Mask) -> dict[str, Any]:
    """The fields of a `TripletGroup`: means and shares over its triplets, which must be at least one."""
    chosen = {name: values[mask] for name, values in columns.items() if not name.startswith("reference")}
    metrics: dict[str, MeanWithInterval] = {}
    ties: dict[str, int | None] = {"ties_short": None, "ties_long": None}
    for context in (context for context in ("short", "long") if f"rewards/margins_{context}" in chosen):
        margin = chosen[f"rewards/margins_{context}"]
        metrics[f"rewards/accuracies_{context}"] = proportion(margin > 0)
        likelier = chosen[f"logps/chosen_{context}"] > chosen[f"logps/rejected_{context}"]
        metrics[f"logps/accuracies_{context}"] = proportion(likelier)
        ties[f"ties_{context}"] = int((margin == 0).sum())
    metrics |= {name: mean_measure(values) for name, values in chosen.items()}
    return {"n": int(mask.sum()), **ties, "metrics": metrics}


def summarise_groups(
    columns: Mapping[str, TripletColumn], tokens: NDArray[np.int64], depths: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """The fields of `PreferenceResults` that hold groups: all triplets, by length, by depth, by both.

    Args:
        columns: What `triplet_columns` returns.
        tokens: Length of every triplet [D].
        depths: Depths of every triplet's pieces of evidence; empty where they are not known.
    """
    lengths, fifths = list(by_length(tokens)), list(by_depth(depths))
    both = [({**a, **b}, in_a & in_b) for a, in_a in lengths for b, in_b in fifths if (in_a & in_b).any()]
    return {
        "overall": TripletGroup(**summarise(columns, np.ones(len(tokens), dtype=bool))),
        "by_length": [LengthGroup(**bounds, **summarise(columns, mask)) for bounds, mask in lengths],
        "by_depth": [DepthGroup(**bounds, **summarise(columns, mask)) for bounds, mask in fifths],
        "by_length_and_depth": [LengthAndDepthGroup(**bounds, **summarise(columns, mask)) for bounds, mask in both],
    }
