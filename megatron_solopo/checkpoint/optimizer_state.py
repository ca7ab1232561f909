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

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
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


def state_to_save(optimizer: MegatronOptimizer, parameters: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """What Megatron calls `sharded_state_dict`, in a form that every other optimizer here reads, under any layout.

    Args:
        parameters: the model's own sharded state, for the places of its parameters.
    """
    with _places_without_padding(optimizer):
        return portable(optimizer.sharded_state_dict(parameters, is_loading=False, metadata=metadata))


def state_to_load(optimizer: MegatronOptimizer, parameters: dict[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """Of what `state_to_save` gave under any layout, what this rank needs; `load_state` takes it."""
    inner = _inner(optimizer)
    if not isinstance(inner, DistributedOptimizer):
        return portable(optimizer.sharded_state_dict(parameters, is_loading=True, metadata=metadata))
    return {"param_state": requested_share(inner, parameters)}  # all else comes from the checkpoint unasked


@contextmanager
def _places_without_padding(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Megatron gathers a buffer's state without the padding between its buckets, but then cuts the parameters out at
    places that count it (0.16 and 0.19): behind the first bucket it would save other numbers, and zeros at the end.

    Tied embeddings have a bucket of their own under pipeline parallelism.
    """
    buffers = getattr(_inner(optimizer), "buffers", [])
    kept = [buffer.param_index_map for buffer in buffers]
    for buffer in buffers:
        padding, before = 0, {}
        for bucket in buffer.buckets:
            before[bucket.bucket_id] = padding
            padding += bucket.grad_data.numel() - bucket.numel_unpadded
        buffer.param_index_map = {
            parameter: (start - before[number], end - before[number], number)
            for parameter, (start, end, number) in buffer.param_index_map.items()
        }
    try:
        yield
    finally:
        for buffer, places in zip(buffers, kept, strict=True):
            buffer.param_index_map = places


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


def initialize_state(optimizer: MegatronOptimizer) -> None:
    """Adam makes its state at the first step; a fresh optimizer needs it there to be loaded into."""
    inner = _inner(optimizer)
    if isinstance(inner.optimizer, HybridDeviceOptimizer):
        inner.optimizer.dummy_step()  # what it does to the parameters is undone by loading them
        return
    inner.init_state_fn(inner.optimizer, inner.config)
    # Transformer Engine's and Apex's Adam count steps per group and know no such state.
    if isinstance(inner.optimizer, torch.optim.Optimizer) and type(inner.optimizer).__module__.startswith("torch."):
        for state in inner.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))


def load_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load the optimizer's state, and torch Adam's step count with it.

    Megatron restores the moments of a sharded optimizer by copying every entry of a parameter's
    state, but torch's Adam also keeps `step` there, which is saved with the parameter group. So
    `step` steps aside meanwhile, and returns as one tensor per parameter: Megatron hands all of
    them the same one, which would then advance once per parameter.
    """
    inner = _inner(optimizer)
    moments = state.pop("param_state", {})  # none of a rank that owns no parameter
    if "param_groups" in state.get("optimizer", {}):
        groups = [complete_group(inner.optimizer, group) for group in state["optimizer"]["param_groups"]]
        state = state | {"optimizer": state["optimizer"] | {"param_groups": groups}}
    inner.load_state_dict(state)
    if not isinstance(inner, DistributedOptimizer):  # its state was loaded whole
        return
    steps = {parameter: each.pop("step") for parameter, each in inner.optimizer.state.items() if "step" in each}
    inner.load_parameter_state_from_fully_reshardable(moments)
    for parameter, step in steps.items():
        inner.optimizer.state[parameter]["step"] = step.clone()
    if isinstance(inner.optimizer, HybridDeviceOptimizer):
        # It copies its groups over those of the optimizers inside before every step, which count for themselves.
        for group in inner.optimizer.param_groups:
            group.pop("step", None)


def complete_group(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """A saved group with what this optimizer's groups hold besides: another kind of Adam may have written it."""
    group = optimizer.defaults | saved
    if "step" in group:
        group["step"] = int(group["step"])  # torch counts in floats, fused kernels take integers alone
    return group


def _inner(optimizer: MegatronOptimizer) -> Any:
    """The one optimizer that a dense model has."""
    (inner,) = getattr(optimizer, "chained_optimizers", [optimizer])
    return inner
