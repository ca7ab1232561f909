"""Worked examples: from log-probabilities to accuracies, margins and gaps."""

import numpy as np
import torch

from megatron_solopo.config import ObjectiveConfig, Role
from megatron_solopo.evaluate.rewards import summarise, summarise_groups, triplet_columns


def columns(objective: ObjectiveConfig, logps: list[list[float]], references: list[list[float]] | None = None):
    """Rows are triplets, in the order of `Role`; chosen answers have 4 tokens, rejected ones 2."""
    by_role = dict(zip(Role, torch.tensor(logps).unbind(dim=1), strict=True))
    lengths = {role: np.full(len(logps), 4 if role.response == "chosen" else 2) for role in Role}
    if references is None:
        return triplet_columns(objective, by_role, lengths, None)
    return triplet_columns(objective, by_role, lengths, dict(zip(Role, torch.tensor(references).T, strict=True)))


LOGPS = [[-2.0, -3.0, -9.0, -3.0], [-4.0, -4.0, -4.0, -5.0]]


def test_dpo_rewards_are_against_the_reference() -> None:
    found = columns(ObjectiveConfig(beta=0.5), LOGPS, [[-3.0, -3.0, -3.0, -3.0], [-4.0, -4.0, -4.0, -4.0]])
    assert found["rewards/chosen_short"].tolist() == [0.5, 0.0]
    assert found["rewards/chosen_long"].tolist() == [-3.0, 0.0]
    assert found["rewards/margins_short"].tolist() == [0.5, 0.0]
    assert found["rewards/margins_long"].tolist() == [-3.0, 0.5]
    assert found["solo_ra/gap_signed"].tolist() == [3.5, 0.0]
    assert found["solo_ra/gap_abs_rejected"].tolist() == [0.0, 0.5]
    whole = summarise(found, np.array([True, True]))
    assert (whole["n"], whole["ties_short"], whole["ties_long"]) == (2, 1, 0)
    assert whole["metrics"]["rewards/accuracies_short"].mean == 0.5
    assert whole["metrics"]["rewards/accuracies_long"].mean == 0.5
    assert whole["metrics"]["logps/accuracies_long"].mean == 0.5
    assert whole["metrics"]["logps/accuracies_short"].mean == 0.5


def test_simpo_rewards_are_per_token_and_of_no_reference() -> None:
    found = columns(ObjectiveConfig(loss_type="simpo", beta=2.0), LOGPS)
    assert found["rewards/chosen_short"].tolist() == [-1.0, -2.0]
    assert found["rewards/rejected_short"].tolist() == [-3.0, -4.0]
    assert not any(name.startswith("reference") for name in found)


def test_groups_are_means_over_their_own_triplets() -> None:
    found = columns(ObjectiveConfig(loss_type="cpo", beta=1.0), LOGPS)
    groups = summarise_groups(found, np.array([1000, 3000]), [[0.1], []])
    assert [(each.up_to, each.n) for each in groups["by_length"]] == [(1024, 1), (4096, 1)]
    assert [each.metrics["solo_ra/gap_abs"].mean for each in groups["by_length"]] == [7.0, 0.0]
    assert [(each.start, each.n) for each in groups["by_depth"]] == [(0.0, 1), (None, 1)]
    assert [(each.up_to, each.start) for each in groups["by_length_and_depth"]] == [(1024, 0.0), (4096, None)]
    assert groups["overall"].metrics["solo_ra/gap_abs"].mean == 3.5
