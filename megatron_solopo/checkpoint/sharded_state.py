"""The state of model and optimizer in the form that Megatron's checkpoints store, for saving and for loading.

The model's state has Megatron's keys: `model`, or `model0`, `model1`, ... with virtual pipeline stages. It leaves out
the kernels' own state, so that every layer implementation reads the checkpoints of the others. Only the scales of FP8's
delayed recipe are kept, because they come from the values of earlier steps.

The optimizer's state is stored once per parameter and not per rank's share of a buffer, so it loads under another TP,
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

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor

SHARDING = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "distrib_optim_fully_reshardable_mem_efficient": True,
}
KERNEL_STATE = "_extra_state"
# Megatron's names in `DistributedOptimizer.get_parameter_state_dp_zero`: fp32 master weights and Adam's moments.
_PARAMETER_STATES = ("param", "exp_avg", "exp_avg_sq")
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
    with _offsets_without_padding(optimizer):
        state = optimizer.sharded_state_dict(_by_parameter(model), is_loading=False, metadata=_metadata())
    return without_classes(state)


def optimizer_state_to_load(optimizer: MegatronOptimizer, model: dict[str, Any]) -> dict[str, Any]:
    """Return the state that this rank must load from a checkpoint of any layout; `load_optimizer_state` takes it."""
    inner = _inner(optimizer)
    if not isinstance(inner, DistributedOptimizer):
        state = optimizer.sharded_state_dict(_by_parameter(model), is_loading=True, metadata=_metadata())
        return without_classes(state)
    # The checkpoint's other values (counts, learning rates) load without being asked for.
    return {"param_state": owned_parameter_state(inner, _by_parameter(model))}


def owned_parameter_state(optimizer: DistributedOptimizer, parameters: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return what this rank must load of `param_state`: by parameter number and state name, where it is stored.

    The numbers are those of `DistributedOptimizer.load_parameter_state_from_fully_reshardable`. That method looks up
    only the parameters that this rank owns.

    Args:
        parameters: the model's sharded state; the optimizer's state is stored under the same keys and offsets.
    """
    stored = {each.data: each for each in nested_values(extract_sharded_tensors_and_factories(parameters)[0])}
    owned = set(_owned_parameters(optimizer))
    numbered = enumerate(parameter for buffer in optimizer.buffers for parameter in buffer.param_index_map)
    return {
        number: {name: _stored_state(stored[parameter], name) for name in _PARAMETER_STATES}
        for number, parameter in numbered
        if parameter in owned
    }


def initialize_optimizer_state(optimizer: MegatronOptimizer) -> None:
    """Create Adam's state, which a fresh optimizer lacks until its first step, so that it can be loaded into."""
    inner = _inner(optimizer)
    if isinstance(inner.optimizer, HybridDeviceOptimizer):
        inner.optimizer.dummy_step()  # it also changes the parameters, which are loaded afterwards
        return
    inner.init_state_fn(inner.optimizer, inner.config)
    # Transformer Engine's and Apex's Adam count steps per group and have no such entry.
    if isinstance(inner.optimizer, torch.optim.Optimizer) and type(inner.optimizer).__module__.startswith("torch."):
        for state in inner.optimizer.state.values():
            state.setdefault("step", torch.tensor(0.0))


def load_optimizer_state(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Load the optimizer's state, the step count of torch's Adam included.

    Megatron restores the moments of a sharded optimizer by copying every entry of a parameter's state. torch's Adam
    also keeps `step` there, which is saved with the parameter group. So `step` is taken out before, and put back
    afterwards as one tensor per parameter. Megatron gives all parameters the same tensor, which would then advance
    once per parameter.
    """
    inner = _inner(optimizer)
    moments = state.pop("param_state", {})  # absent on a rank that owns no parameter
    if "param_groups" in state.get("optimizer", {}):
        groups = [complete_group(inner.optimizer, group) for group in state["optimizer"]["param_groups"]]
        state = state | {"optimizer": state["optimizer"] | {"param_groups": groups}}
    inner.load_state_dict(state)
    if not isinstance(inner, DistributedOptimizer):  # `load_state_dict` has loaded everything
        return
    steps = {parameter: each.pop("step") for parameter, each in inner.optimizer.state.items() if "step" in each}
    inner.load_parameter_state_from_fully_reshardable(moments)
    for parameter, step in steps.items():
        inner.optimizer.state[parameter]["step"] = step.clone()
    if isinstance(inner.optimizer, HybridDeviceOptimizer):
        # Before every step it copies its groups over those of its inner optimizers, which count their own steps.
        for group in inner.optimizer.param_groups:
            group.pop("step", None)


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


def _owned_parameters(optimizer: DistributedOptimizer) -> Iterator[Tensor]:
    """Yield the parameters that this rank updates, in whole or in part."""
    for ranges in optimizer.gbuf_ranges:
        for buckets in ranges.values():
            for bucket in buckets:
                yield from bucket["param_map"]


def _stored_state(parameter: Any, name: str) -> Any:
    """Where a parameter's state is stored, with an empty fp32 tensor in host memory to load it into."""
    changes: dict[str, Any] = {
        "key": f"optimizer.state.{name}.{parameter.key}",
        "data": torch.empty(parameter.data.shape, dtype=torch.float32, device="cpu"),
    }
    if not isinstance(parameter, ShardedTensorFactory):
        changes["dtype"] = torch.float32
    return replace(parameter, **changes)


@contextmanager
def _offsets_without_padding(optimizer: MegatronOptimizer) -> Iterator[None]:
    """Work around an error of Megatron-Core 0.16 and 0.19 in the offsets of a buffer's parameters.

    Megatron gathers a buffer's state without the padding between its buckets, but cuts the parameters out at offsets
    that count this padding. After the first bucket it would save wrong numbers, and zeros at the end. Tied embeddings
    have a bucket of their own under pipeline parallelism.
    """
    buffers = getattr(_inner(optimizer), "buffers", [])
    original = [buffer.param_index_map for buffer in buffers]
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
        for buffer, offsets in zip(buffers, original, strict=True):
            buffer.param_index_map = offsets


def _inner(optimizer: MegatronOptimizer) -> Any:
    """The one optimizer that a dense model has."""
    (inner,) = getattr(optimizer, "chained_optimizers", [optimizer])
    return inner
