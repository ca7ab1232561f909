"""Fused kernels that add weight gradients straight to Megatron's gradient buffers."""

from importlib.util import find_spec

import torch

from megatron_solopo.parallel.cpu import is_cpu


def supports_gradient_accumulation_fusion() -> bool:
    """Whether NVIDIA Apex's fused weight-gradient kernel, which Megatron's own linear layers use, can run here."""
    return not is_cpu() and find_spec("fused_weight_gradient_mlp_cuda") is not None


def fuse_weight_gradients(model: torch.nn.Module) -> None:
    """Let Transformer Engine's linear layers add their weight gradients to `main_grad` themselves.

    They need no Apex for that. Megatron's configuration has one switch for them and for its own output layer,
    which does need it and refuses to be built without.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
