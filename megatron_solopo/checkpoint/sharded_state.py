"""The state of model and optimizer in the form that Megatron's checkpoints store, for saving and for loading.

The model's state has Megatron's keys: `model`, or `model0`, `model1`, ... with virtual pipeline stages. It leaves out
the kernels' own state, so that every layer implementation reads the checkpoints of the others. Only the scales of FP8's
delayed recipe are kept, because they come from the values of earlier steps. They are stored as plain tensors:
Transformer Engine makes a pickle of them, which it refuses to load since 2.18.

Of a model with adapters, the adapters alone are stored. The base is frozen, so it stays where it was read.

The optimizer's state is stored once per parameter and not per rank's share of a buffer. So it loads under another TP,
PP, CP or DP. Under the distributed optimizer a rank holds some elements of a parameter, in the order of the flattened
parameter. They are cut into boxes of the parameter, at most three of a matrix, and every rank writes its own boxes
without asking another. Whoever loads a checkpoint asks for the boxes that it holds, and a box may come from several of
those that were written. Earlier versions stored parameters whole, which are boxes, too.

Data-parallel ranks have the same weights. They share the work of writing them (`share_replicas`).

Where ranks share experts, Megatron has an optimizer for the dense parameters and one for the experts. All step
together, so the counts and settings of the first are stored for all. So a checkpoint loads under another EP.

The optimizers differ: torch's Adam keeps `step` with every parameter, Transformer Engine's Adam keeps it with every
group, and the hybrid optimizer keeps classes in its groups. Whatever one of them saved must load into the others, and
must be readable without running code.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

from megatron_solopo.architecture.adapters import ADAPTER
from megatron_solopo.model.adapters import has_adapters
from megatron_solopo.parallel.agreement import least_loaded
from megatron_solopo.parallel.megatron_internals import (
    OwnedState,
    delayed_scales,
    hand_out_state,
    is_expert,
    load_counts,
    load_delayed_scales,
    optimizer_parts,
    owned_states,
    replica_group,
)

SHARDING = {"distrib_optim_sharding_type": "fully_reshardable"}
# A layer that computes its experts in one kernel has a state for each: `_extra_state`, `_extra_state1`, and so on.
_KERNEL_STATE = re.compile(r"(.+)\._extra_state(\d*)")
OPTIMIZER, _EXPERT_OPTIMIZER = "optimizer", "expert_optimizer"
# What an optimizer's group keeps of its own, whatever was stored.
_OWN_KEYS = ("params", "is_expert_parallel")
_Chunk = TypeVar("_Chunk")


def keyed(chunks: Sequence[_Chunk]) -> dict[str, _Chunk]:
    """This rank's model chunks by Megatron's keys."""
    if len(chunks) == 1:
        return {"model": chunks[0]}
    return {f"model{number}": chunk for number, chunk in enumerate(chunks)}


def parameter_state(chunks: Sequence[Any]) -> dict[str, Any]:
    """The sharded parameters of `chunks` (models without their DDP wrappers), without any state of kernels."""
    metadata = _metadata()
    return {
        key: _without_kernel_state(chunk.sharded_state_dict(metadata=metadata)) for key, chunk in keyed(chunks).items()
    }


def model_state(chunks: Sequence[DistributedDataParallel]) -> dict[str, Any]:
    """The sharded state of the trained model, as it is saved."""
    metadata = _metadata()
    return {key: _chunk_state(chunk.module, metadata) for key, chunk in keyed(chunks).items()}


def state_to_save(chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> dict[str, Any]:
    """The sharded state of model and optimizer. It shares their memory, and replicas share the work of writing it."""
    model = model_state(chunks)
    share_replicas(model)
    return model | optimizer_state_to_save(optimizer, model)


def load_kernel_state(module: Any, state: dict[str, Any]) -> None:
    """Give the layers of a model chunk the scales of FP8's delayed recipe, and take them out of `state`.

    Args:
        state: of the chunk, loaded. A pickle, as older versions stored it, stays there for Transformer Engine.
    """
    by_layer: dict[str, dict[int, dict[str, Tensor]]] = defaultdict(dict)
    for name in [name for name, value in state.items() if is_kernel_state(name) and isinstance(value, dict)]:
        layer, number = _owner(name)
        by_layer[layer][number] = state.pop(name)
    for layer, scales in by_layer.items():
        if all(scales.values()):  # a layer that had not computed has none
            ordered = [scales[number] for number in sorted(scales)]
            load_delayed_scales(module.get_submodule(layer), module.config, ordered)


def is_kernel_state(name: str) -> bool:
    """Whether a name in a model's state is that of its kernels' own state, and not of a parameter."""
    return _KERNEL_STATE.fullmatch(name) is not None


def share_replicas(model: dict[str, Any]) -> None:
    """Let each of several ranks with the same tensors write some of them, with about as many bytes each.

    These ranks hold equal tensors in equal order. All of them make the same choice without asking.

    Args:
        model: from `model_state`; changed in place.
    """
    shared = [
        each
        for each in nested_values(model)
        if isinstance(each, ShardedTensor | ShardedTensorFactory) and is_main_replica((*each.replica_id[:-1], 0))
    ]
    for alike in ([each for each in shared if is_expert(each.data) is kind] for kind in (False, True)):
        if not alike:
            continue
        group = replica_group(alike[0].data)
        for each, writer in zip(alike, least_loaded([each.data.nbytes for each in alike], group.size()), strict=True):
            each.replica_id = (*each.replica_id[:-1], (group.rank() - writer) % group.size())


def optimizer_state_to_save(optimizer: MegatronOptimizer, model: dict[str, Any]) -> dict[str, Any]:
    """The optimizers' sharded state, by its keys in a checkpoint. Every other optimizer here reads it, in any layout.

    Args:
        model: from `model_state`; it says where each parameter's state belongs.
    """
    parts = optimizer_parts(optimizer)
    if isinstance(parts[0], DistributedOptimizer):
        kind = {"param_state_sharding_type": SHARDING["distrib_optim_sharding_type"]}
        return {OPTIMIZER: _without_classes(parts[0].state_dict()) | kind | {"param_state": owned_boxes(parts, model)}}
    return {
        key: _without_classes(part.sharded_state_dict(_by_parameter(model), is_loading=False, metadata=_metadata()))
        for key, part in zip((OPTIMIZER, _EXPERT_OPTIMIZER), parts, strict=False)
    }


def load_optimizer(path: Path, optimizer: MegatronOptimizer, model: dict[str, Any]) -> None:
    """Load the optimizers' state from a checkpoint of any layout, the step count of torch's Adam included.

    Under the distributed optimizer a rank reads what it owns into the place where it keeps it. This takes host memory
    for the largest stored piece alone.
    """
    parts = optimizer_parts(optimizer)
    if not isinstance(parts[0], DistributedOptimizer):
        for part in parts:
            _load_whole(path, part, model)
        return
    state = dist_checkpointing.load_common_state_dict(str(path))[OPTIMIZER]
    for part in parts:
        load_counts(part, _with_complete_groups(part, state))
    boxes = {OPTIMIZER: {"param_state": owned_boxes(parts, model)}}
    # Megatron's check expects that all ranks together ask for every tensor of the checkpoint exactly once.
    dist_checkpointing.load(boxes, str(path), validate_access_integrity=False)
    for part in parts:
        hand_out_state(part)


def _load_whole(path: Path, part: Any, model: dict[str, Any]) -> None:
    """Load the state of an optimizer that holds the whole state of its parameters."""
    wanted = part.sharded_state_dict(_by_parameter(model), is_loading=True, metadata=_metadata())
    # Megatron would merge these groups with the stored ones, which another layout may have divided otherwise.
    wanted.get("optimizer", wanted).pop("param_groups")
    # Several optimizers ask for parts, but Megatron's check expects that all of a checkpoint is asked for at once.
    state = dist_checkpointing.load({OPTIMIZER: wanted}, str(path), validate_access_integrity=False)[OPTIMIZER]
    part.load_state_dict(_with_complete_groups(part, state))


def owned_boxes(optimizers: Sequence[DistributedOptimizer], model: dict[str, Any]) -> dict[int, ShardedTensor]:
    """Numbered boxes of the state that this rank owns. They share memory with it: reading and writing copy nothing.

    Args:
        optimizers: from `optimizer_parts`.
        model: from `model_state`; it says where each parameter's state belongs.
    """
    parameters = nested_values(extract_sharded_tensors_and_factories(_by_parameter(model))[0])
    places = {each.data: each for each in parameters}
    found = (
        box
        for part in optimizers
        for owned in owned_states(part)
        for box in _boxes(owned, places[owned.parameter], part.distributed_optimizer_instance_id)
    )
    return dict(enumerate(found))


def _boxes(owned: OwnedState, place: ShardedTensor | ShardedTensorFactory, instance: int) -> Iterator[ShardedTensor]:
    """Cut a part of a flattened parameter into boxes, where `place` is the parameter's own place in a checkpoint."""
    if isinstance(place, ShardedTensorFactory):  # a gated MLP's two weights, which are stored apart
        whole = replace(place, data=torch.empty(place.data.shape, device="meta")).build()
        tensors = [(each, each.data.storage_offset()) for each in whole]
    else:
        tensors = [(place, 0)]
    for name, flat in owned.tensors.items():
        for tensor, first in tensors:
            start, end = (max(0, min(edge - first, math.prod(tensor.local_shape))) for edge in owned.edges)
            position = first + start - owned.start
            for offsets, sizes in boxes_of_range(tensor.local_shape, start, end):
                data = flat[position : position + math.prod(sizes)]
                position += len(data)
                yield _box(f"optimizer.state.{name}.{tensor.key}", data, tensor, offsets, sizes, instance)


def _box(
    key: str, data: Tensor, tensor: ShardedTensor, offsets: tuple[int, ...], sizes: tuple[int, ...], instance: int
) -> ShardedTensor:
    """A box of a stored tensor, at `offsets` in this rank's part of it. It fits into no regular grid."""
    stacked = tensor.prepend_axis_num  # the axes of a tensor that is stacked of those of all layers
    sizes = (1,) * stacked + sizes
    offsets = (0,) * stacked + offsets
    return ShardedTensor(
        key,
        data.view(sizes),
        data.dtype,
        local_shape=sizes,
        global_shape=tensor.global_shape,
        global_offset=tuple(a + b for a, b in zip(tensor.global_offset, offsets, strict=True)),
        axis_fragmentations=None,
        replica_id=(*tensor.replica_id[:-1], instance),
        allow_shape_mismatch=tensor.allow_shape_mismatch,
    )


def boxes_of_range(shape: Sequence[int], start: int, end: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Yield offsets and sizes of boxes that hold the elements [start, end) of a flattened tensor, in their order."""
    if start >= end:
        return
    row = math.prod(shape[1:])
    top, bottom = -(-start // row), end // row  # the rows that are whole
    if top > bottom:
        yield from _boxes_of_row(shape, bottom, start, end)
        return
    yield from _boxes_of_row(shape, top - 1, start, top * row)
    if top < bottom:
        rest = tuple(shape[1:])
        yield (top, *(0 for _ in rest)), (bottom - top, *rest)
    yield from _boxes_of_row(shape, bottom, bottom * row, end)


def _boxes_of_row(
    shape: Sequence[int], row: int, start: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Boxes of [start, end), which is within one row."""
    first = row * math.prod(shape[1:])
    for offsets, sizes in boxes_of_range(shape[1:], start - first, end - first):
        yield (row, *offsets), (1, *sizes)


def _with_complete_groups(optimizer: Any, state: dict[str, Any]) -> dict[str, Any]:
    """Leave out what every rank loads for itself, and give each of the optimizer's groups what its like was stored as.

    A checkpoint of another layout, or of another Adam, may have stored experts' groups apart, and has other keys.
    """
    state = {key: value for key, value in state.items() if key != "param_state"}
    inner = state.get("optimizer", state)  # Adam of float32 weights has no shell around it
    stored_as = {_multipliers(group): group for group in reversed(inner["param_groups"])}
    groups = []
    for group in optimizer.optimizer.state_dict()["param_groups"]:
        own = {name: group[name] for name in _OWN_KEYS if name in group}
        groups.append(complete_group(optimizer.optimizer, stored_as[_multipliers(group)] | own))
    inner = inner | {"param_groups": groups}
    return state | {"optimizer": inner} if "optimizer" in state else inner


def _multipliers(group: dict[str, Any]) -> tuple[float, float]:
    return group["wd_mult"], group["lr_mult"]


def complete_group(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> dict[str, Any]:
    """Add to a stored parameter group the keys that this kind of Adam has and the one that saved it had not."""
    group = optimizer.defaults | stored
    if "step" in group:
        group["step"] = int(group["step"])  # torch counts in floats; fused kernels accept only integers
    return group


def _without_classes(state: dict[str, Any]) -> dict[str, Any]:
    """Drop the classes in an optimizer's parameter groups, because no safe reader accepts them."""
    groups = state.get("optimizer", {}).get("param_groups")
    if groups is None:
        return state
    plain = [{key: value for key, value in group.items() if not isinstance(value, type)} for group in groups]
    return state | {"optimizer": state["optimizer"] | {"param_groups": plain}}


def _metadata() -> dict[str, Any]:
    return SHARDING | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _chunk_state(module: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = module.sharded_state_dict(metadata=metadata)
    kept = _without_kernel_state(state)
    if has_adapters(module):
        kept = {name: value for name, value in kept.items() if ADAPTER in name}
    if module.config.fp8 and module.config.fp8_recipe == "delayed":
        for name in filter(is_kernel_state, state):
            layer, number = _owner(name)
            kept[name] = replace(state[name], data=delayed_scales(module.get_submodule(layer), number))
    return kept


def _owner(name: str) -> tuple[str, int]:
    """The layer whose kernels' state has this name, and the number of its product among those of the layer."""
    found = _KERNEL_STATE.fullmatch(name)
    assert found is not None, name
    return found[1], int(found[2] or 0)


def _without_kernel_state(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not is_kernel_state(key)}


def _by_parameter(model: dict[str, Any]) -> dict[str, Any]:
    """The model's sharded state as Megatron's optimizers take it."""
    return dict(model["model"] if len(model) == 1 else model)
