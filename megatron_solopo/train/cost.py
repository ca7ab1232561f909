"""What a step costs: floating-point operations by true lengths, peak rates, memory."""

import resource
from collections.abc import Sequence

import torch

from megatron_solopo.architecture.huggingface import Architecture
from megatron_solopo.data.packing import Pack
from megatron_solopo.parallel.cpu import is_cpu

# Dense bfloat16 peak in FLOP/s (NVIDIA data sheets, no sparsity) by a part of the device name: the first that fits.
_PEAK_FLOPS = {
    "A100": 312e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H200": 989e12,
    "GB200": 2500e12,
    "B200": 2250e12,
}


def training_flops(architecture: Architecture, packs: Sequence[Pack]) -> float:
    """Model FLOPs of forward and backward over these packs: recomputation and padding do not count.

    Linear layers cost 2 FLOPs per weight and token; causal attention 2 x heads x head_dim x L^2 per
    sequence of length L and layer (half of the full square, for scores and for values); the output
    layer is paid for response tokens alone. Backward is twice forward.
    """
    a = architecture
    queries, keys = a.num_attention_heads * a.head_dim, a.num_query_groups * a.head_dim
    layer_weights = a.hidden_size * (2 * queries + 2 * keys) + 3 * a.hidden_size * a.ffn_hidden_size
    flops = 0.0
    for pack in packs:
        lengths = pack.sequence_lengths_S.double()
        linear = 2.0 * layer_weights * float(lengths.sum())
        attention = 2.0 * queries * float(lengths.square().sum())
        head = 2.0 * a.hidden_size * a.vocab_size * float(pack.response_lengths_S.sum())
        flops += a.num_layers * (linear + attention) + head
    return 3.0 * flops


def peak_flops() -> float | None:
    """Dense bfloat16 peak of this device, or None where it is not known (a CPU, another GPU)."""
    if is_cpu():
        return None
    name = torch.cuda.get_device_name()
    return next((peak for part, peak in _PEAK_FLOPS.items() if part in name), None)


def reset_peak_memory() -> None:
    """Start a new interval for `peak_memory_bytes` (on a CPU the peak is the process's, since its start)."""
    if not is_cpu():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes() -> int:
    """Peak memory of this rank: allocated on the GPU, or resident on a CPU."""
    if is_cpu():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()
