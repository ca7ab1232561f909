"""What the CPU of this machine can do."""


def has_fast_bfloat16() -> bool:
    """Whether torch has kernels for bfloat16 on this CPU. Without them it multiplies several times slower than float32.

    On x86 they need AVX-512.
    """
    import torch

    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
