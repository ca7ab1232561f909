"""Rewards, preference losses and the alignment of rewards between short and long contexts.

All are pure functions of `[T]` tensors, T triplets of a pack, with one number per sequence. To add a loss, write its
function in `preference.py` and add a line to `PREFERENCE_LOSSES`.
"""

from megatron_solopo.objective.solopo import FurtherSum, ObjectiveOutput, compute_objective, further_sums, metric_names

__all__ = ["FurtherSum", "ObjectiveOutput", "compute_objective", "further_sums", "metric_names"]
