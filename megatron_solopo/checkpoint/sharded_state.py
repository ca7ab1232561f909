"""The state of model and optimizer in the form that Megatron's checkpoints store, for saving and for loading.

The model's state has Megatron's keys: `model`, or `model0`, `model1`, ... with virtual pipeline stages. It leaves out
the kernels' own state, so that every layer implementation reads the checkpoints of the others. Only the scales of FP8's
delayed recipe are kept, because they come from the values of earlier steps.

The optimizer's state is stored once per parameter and not per rank's share of a buffer. So it loads under another TP,
PP, CP or DP. The first data-parallel rank gathers it in host memory and writes it. With Megatron's default, every rank
would hold all of it, and would take 4 bytes per parameter on its GPU meanwhile.

To load, Megatron lets every data-parallel rank read the state of all parameters of its TP and PP rank: 12 bytes per
parameter from the file system into host memory, of which the rank keeps a share. That is 768 GB on a node of eight GPUs
for a model of 8 billion parameters without TP and PP. Here a rank reads only the parameters of which it owns a part,
each of them whole.

The optimizers differ: torch's Adam keeps `step` with every parameter, Transformer Engine's Adam keeps it with every
group, and the hybrid optimizer keeps classes in its groups. Whatever one of them saved must load into the others, and
must be readable without running code.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_solopo.parallel.megatron_internals import (
    STATE_NAMES,
    dense_optimizer,
    load_parameter_state,
    numbered_parameters,
    places_without_padding,
)

SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}
KERNEL_STATE = "_extra_state"
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


def optimizer_state_to_save(optimizer: MegatronOptimizer, model: dict[str, Any]) -> dict[str, Any]:
    """The optimizer's sharded state in a form that every other optimizer here reads, under any layout.

    Args:
        model: from `model_state`; it says where each parameter's state belongs.
    """
    with places_without_padding(optimizer):
        state = optimizer.sharded_state_dict(_by_parameter(model), is_loading=False, metadata=_metadata())
    return without_classes(state)


def optimizer_state_to_load(optimizer: MegatronOptimizer, model: dict[str, Any]) -> dict[str, Any]:
    """Return the state that this rank must load from a checkpoint of any layout; `load_optimizer_state` takes it."""
    part = dense_optimizer(optimizer)
    if not isinstance(part, DistributedOptimizer):
        state = optimizer.sharded_state_dict(_by_parameter(model), is_loading=True, metadata=_metadata())
        return without_classes(state)
    stored = {each.data: each for each in nested_values(extract_sharded_tensors_and_factories(_by_parameter(model))[0])}
    owned = {
        number: {name: _stored_state(stored[parameter], name) for name in STATE_NAMES}
        for number, parameter in numbered_parameters(part).items()
    }
    return {"param_state": owned}  # the checkpoint's other values (counts, learning rates) load without a request


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load the optimizer's state, the step count of torch's Adam included."""
    part = dense_optimizer(optimizer)
    parameter_states = state.pop("param_state", {})  # absent on a rank that owns no parameter
    if "param_groups" in state.get("optimizer", {}):
        groups = [complete_group(part.optimizer, group) for group in state["optimizer"]["param_groups"]]
        state = state | {"optimizer": state["optimizer"] | {"param_groups": groups}}
    part.load_state_dict(state)
    if isinstance(part, DistributedOptimizer):  # for any other optimizer, `load_state_dict` has loaded everything
        load_parameter_state(part, parameter_states)


def complete_group(optimizer: torch.optim.Optimizer, stored: dict[str, Any]) -> dict[str, Any]:
    """Add to a stored parameter group the keys that this kind of Adam has and the one that saved it had not."""
    group = optimizer.defaults | stored
    if "step" in group:
        group["step"] = int(group["step"])  # torch counts in floats; fused kernels accept only integers
    return group


def without_classes(state: dict[str, Any]) -> dict[str, Any]:
    """Drop the classes in an optimizer's parameter groups, because no safe reader accepts them.

    Also drop `param_state` where it is None: another data-parallel rank has gathered it.
    """
    if state.get("param_state", ...) is None:
        state = {key: value for key, value in state.items() if key != "param_state"}
    groups = state.get("optimizer", {}).get("param_groups")
    if groups is None:
        return state
    plain = [{key: value for key, value in group.items() if not isinstance(value, type)} for group in groups]
    return state | {"optimizer": state["optimizer"] | {"param_groups": plain}}


def _metadata() -> dict[str, Any]:
    return SHARDING | {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _chunk_state(module: Any, metadata: dict[str, Any]) -> dict[str, Any]:
    state: dict[str, Any] = module.sharded_state_dict(metadata=metadata)
    has_delayed_scales = module.config.fp8 and module.config.fp8_recipe == "delayed"
    return state if has_delayed_scales else _without_kernel_state(state)


def _without_kernel_state(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in state.items() if not key.endswith(KERNEL_STATE)}


def _by_parameter(model: dict[str, Any]) -> dict[str, Any]:
    """The model's sharded state as Megatron's optimizers take it."""
    return dict(model["model"] if len(model) == 1 else model)


def _stored_state(parameter: Any, name: str) -> Any:
    """Where a parameter's state is stored, with an empty fp32 tensor in host memory to load it into."""
    changes: dict[str, Any] = {
        "key": f"optimizer.state.{name}.{parameter.key}",
        "data": torch.empty(parameter.data.shape, dtype=torch.float32, device="cpu"),
    }
    if not isinstance(parameter, ShardedTensorFactory):
        changes["dtype"] = torch.float32
    return replace(parameter, **changes)
