"""What a step costs: floating-point operations by true lengths, peak rates, memory."""

import resource
from collections.abc import Sequence

import torch

from megatron_solopo.architecture.flops import forward_flops
from megatron_solopo.architecture.huggingface import Architecture
from megatron_solopo.data.packing import Pack
from megatron_solopo.parallel.cpu import is_cpu
from megatron_solopo.plan.gpus import bf16_peak


def training_flops(architecture: Architecture, packs: Sequence[Pack]) -> float:
    """Model FLOPs of forward and backward over these packs: recomputation and padding do not count.

    Backward is twice forward; see `megatron_solopo.architecture.flops`.
    """
    lengths = [pack.sequence_lengths_S.double() for pack in packs]
    tokens = sum(float(each.sum()) for each in lengths)
    squares = sum(float(each.square().sum()) for each in lengths)
    responses = sum(float(pack.response_lengths_S.sum()) for pack in packs)
    return 3.0 * forward_flops(architecture, tokens, squares, responses).total


def peak_flops() -> float | None:
    """Dense bfloat16 peak of this device, or None where it is not known (a CPU, another GPU)."""
    if is_cpu():
        return None
    return bf16_peak(torch.cuda.get_device_name())


def reset_peak_memory() -> None:
    """Start a new interval for `peak_memory_bytes` (on a CPU the peak is the process's, since its start)."""
    if not is_cpu():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes() -> int:
    """Peak memory of this rank: allocated on the GPU, or resident on a CPU."""
    if is_cpu():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()
