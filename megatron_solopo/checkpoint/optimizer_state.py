"""The share of a checkpoint's optimizer state that one data-parallel rank needs.

Megatron has every data-parallel rank ask for the state of all parameters of its TP and PP rank, 12 bytes per
parameter in host memory and from the file system, of which it keeps its share: on a node of eight GPUs 768 GB for a
model of 8 billion parameters without TP and PP. Here a rank asks for the parameters that it owns a part of, and for
all of each.

What Megatron's optimizers need around a checkpoint, whichever Adam is inside.

torch's Adam keeps `step` with every parameter, Transformer Engine's with every group, and the hybrid optimizer keeps
classes in its groups: a checkpoint that one of them wrote must load into the others, and be readable without
running code.
"""

from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_solopo.parallel.megatron_internals import (
    STATE_NAMES,
    dense_optimizer,
    load_parameter_state,
    numbered_parameters,
    places_without_padding,
)


def requested_share(optimizer: DistributedOptimizer, parameters: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """What to load of `param_state`: places in the checkpoint, by the parameter's number and the state's name.

    Numbers are those that `load_parameter_state_from_fully_reshardable` counts by, which looks up no other ones.

    Args:
        parameters: the model's own sharded state, whose places in the checkpoint are those of the optimizer's state.
    """
    places = {place.data: place for place in nested_values(extract_sharded_tensors_and_factories(parameters)[0])}
    return {
        number: {state: _place(places[parameter], state) for state in STATE_NAMES}
        for number, parameter in numbered_parameters(optimizer).items()
    }


def _place(place: Any, state: str) -> Any:
    """Where a parameter's state is stored, and room for it in host memory."""
    changes: dict[str, Any] = {
        "key": f"optimizer.state.{state}.{place.key}",
        "data": torch.empty(place.data.shape, dtype=torch.float32, device="cpu"),
    }
    if not isinstance(place, ShardedTensorFactory):
        changes["dtype"] = torch.float32
    return replace(place, **changes)


def state_to_save(optimizer: MegatronOptimizer, parameters: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """What Megatron calls `sharded_state_dict`, in a form that every other optimizer here reads, under any layout.

    Args:
        parameters: the model's own sharded state, for the places of its parameters.
    """
    with places_without_padding(optimizer):
        return portable(optimizer.sharded_state_dict(parameters, is_loading=False, metadata=metadata))


def state_to_load(optimizer: MegatronOptimizer, parameters: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """Of what `state_to_save` gave under any layout, what this rank needs; `load_state` takes it."""
    inner = dense_optimizer(optimizer)
    if not isinstance(inner, DistributedOptimizer):
        return portable(optimizer.sharded_state_dict(parameters, is_loading=True, metadata=metadata))
    return {"param_state": requested_share(inner, parameters)}  # all else comes from the checkpoint unasked


def portable(state: dict[str, Any]) -> dict[str, Any]:
    """An optimizer's sharded state without the classes in its parameter groups, which no safe reader takes back.

    Moments that another data-parallel rank has gathered are no part of this rank's state.
    """
    if state.get("param_state", ...) is None:
        state = {key: value for key, value in state.items() if key != "param_state"}
    groups = state.get("optimizer", {}).get("param_groups")
    if groups is None:
        return state
    plain = [{key: value for key, value in group.items() if not isinstance(value, type)} for group in groups]
    return state | {"optimizer": state["optimizer"] | {"param_groups": plain}}


def load_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load the optimizer's state, and torch Adam's step count with it."""
    part = dense_optimizer(optimizer)
    moments = state.pop("param_state", {})  # none of a rank that owns no parameter
    if "param_groups" in state.get("optimizer", {}):
        groups = [complete_group(part.optimizer, group) for group in state["optimizer"]["param_groups"]]
        state = state | {"optimizer": state["optimizer"] | {"param_groups": groups}}
    part.load_state_dict(state)
    if isinstance(part, DistributedOptimizer):  # the state of another one was loaded whole
        load_parameter_state(part, moments)


def complete_group(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """A saved group with what this optimizer's groups hold besides: another kind of Adam may have written it."""
    group = optimizer.defaults | saved
    if "step" in group:
        group["step"] = int(group["step"])  # torch counts in floats, fused kernels take integers alone
    return group
