"""The share of a checkpoint's optimizer state that one data-parallel rank needs.

Megatron has every data-parallel rank ask for the state of all parameters of its TP and PP rank, 12 bytes per
parameter in host memory and from the file system, of which it keeps its share: on a node of eight GPUs 768 GB for a
model of 8 billion parameters without TP and PP. Here a rank asks for the parameters that it owns a part of, and for
all of each.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

# Of `DistributedOptimizer.get_parameter_state_dp_zero`: the float32 master weights, and Adam's moments.
_STATES = ("param", "exp_avg", "exp_avg_sq")


def requested_share(optimizer: DistributedOptimizer, parameters: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What to load of `param_state`: places in the checkpoint, by the parameter's number and the state's name.

    Numbers are those that `load_parameter_state_from_fully_reshardable` counts by, which looks up no other ones.

    Args:
        parameters: the model's own sharded state, whose places in the checkpoint are those of the optimizer's state.
    """
    places = {place.data: place for place in nested_values(extract_sharded_tensors_and_factories(parameters)[0])}
    owned = set(_owned(optimizer))
    numbered = enumerate(parameter for buffer in optimizer.buffers for parameter in buffer.param_index_map)
    return {
        number: {state: _place(places[parameter], state) for state in _STATES}
        for number, parameter in numbered
        if parameter in owned
    }


def _owned(optimizer: DistributedOptimizer) -> Iterator[Tensor]:
    """Parameters whose update is, at least in part, this rank's."""
    for ranges in optimizer.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                yield from bucket["param_map"]


def _place(place: Any, state: str) -> Any:
    """Where a parameter's state is stored, and room for it in host memory."""
    changes: dict[str, Any] = {
        "key": f"optimizer.state.{state}.{place.key}",
        "data": torch.empty(place.data.shape, dtype=torch.float32, device="cpu"),
    }
    if not isinstance(place, ShardedTensorFactory):
        changes["dtype"] = torch.float32
    return replace(place, **changes)
