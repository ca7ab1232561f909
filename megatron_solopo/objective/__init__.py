"""Rewards, preference losses and short-to-long reward alignment, on one number per sequence.

Pure functions of `[num_triplets]` tensors: no logits, no process groups, no model. Adding a loss is one
function in `preference.py` (or `reward.py`) and one line of `PREFERENCE_LOSSES`.

Shape suffix: T = triplets of a pack.
"""

from megatron_solopo.objective.solopo import ObjectiveOutput, compute_objective, metric_names

__all__ = ["ObjectiveOutput", "compute_objective", "metric_names"]
