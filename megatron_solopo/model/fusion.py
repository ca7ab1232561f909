"""Which optional fused kernels are installed."""

from importlib.util import find_spec

from megatron_solopo.parallel.cpu import is_cpu


def supports_gradient_accumulation_fusion() -> bool:
    """Whether NVIDIA Apex's fused weight-gradient kernel, which Megatron's own linear layers use, can run here."""
    return not is_cpu() and find_spec("fused_weight_gradient_mlp_cuda") is not None
