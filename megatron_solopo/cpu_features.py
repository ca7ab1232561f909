"""What the CPU of this machine can do."""

import os
import sys
from typing import Any

from tqdm import tqdm


def has_bfloat16_kernels() -> bool:
    """Whether torch has kernels for bfloat16 on this CPU. Without them it multiplies several times slower than float32.

    On x86 they need AVX-512, or the conversions of AVX-NE-CONVERT.
    """
    import torch

    mkldnn: Any = torch.backends.mkldnn
    return mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def warn_about_slow_bfloat16(remedy: str) -> None:
    """Print on one rank, for a run in bfloat16 on this CPU, that `remedy` is faster, if it is."""
    if os.environ.get("RANK", "0") == "0" and not has_bfloat16_kernels():
        tqdm.write(
            f"warning: torch has no kernels for bfloat16 on this CPU; {remedy} is several times as fast",
            file=sys.stderr,
        )
