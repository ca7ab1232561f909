"""Bytes that the trained model holds from its first step on: the figures that a plan must meet."""

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer


def parameter_bytes(chunks: Sequence[DistributedDataParallel]) -> int:
    """Parameters; under the distributed optimizer in Megatron's padded buffers."""
    total = 0
    for buffer in (buffer for chunk in chunks for buffer in chunk.buffers):
        tensors = buffer.params if buffer.param_data is None else [buffer.param_data]
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return total


def gradient_bytes(chunks: Sequence[DistributedDataParallel]) -> int:
    """Gradient buffers, padding included."""
    buffers = [buffer.grad_data for chunk in chunks for buffer in chunk.buffers]
    return sum(tensor.numel() * tensor.element_size() for tensor in buffers)


def initialize_state(optimizer: MegatronOptimizer) -> None:
    """Make Adam's moments, which a first step would make."""
    for part in _parts(optimizer):
        if part.init_state_fn is not None:
            part.init_state_fn(part.optimizer, part.config)


def state_bytes(optimizer: MegatronOptimizer, chunks: Sequence[DistributedDataParallel]) -> int:
    """Moments and, where they are not the model's own, fp32 weights; counters of steps do not count."""
    models = {tensor.untyped_storage()._cdata for chunk in chunks for tensor in chunk.parameters()}
    total = 0
    for part in _parts(optimizer):
        for weight in (weight for group in part.optimizer.param_groups for weight in group["params"]):
            moments = [value for value in part.optimizer.state[weight].values() if torch.is_tensor(value)]
            tensors = [tensor for tensor in (weight, *moments) if tensor.dim() > 0]
            total += sum(t.numel() * t.element_size() for t in tensors if t.untyped_storage()._cdata not in models)
    return total


def _parts(optimizer: MegatronOptimizer) -> Sequence[MegatronOptimizer]:
    parts: Sequence[MegatronOptimizer] = getattr(optimizer, "chained_optimizers", [optimizer])
    return parts
