"""Whether this process computes on the CPU, and what the CPU of this machine can do."""

import os
import sys
from typing import Any

from tqdm import tqdm

from megatron_solopo.errors import UserError

DEVICE_VARIABLE = "MEGATRON_SOLOPO_DEVICE"


def is_cpu() -> bool:
    """Whether this process computes on the CPU: CUDA is absent, or the user asked for the CPU.

    Raises UserError if MEGATRON_SOLOPO_DEVICE is neither cpu nor cuda nor empty, or is cuda without CUDA.
    """
    import torch

    wanted = os.environ.get(DEVICE_VARIABLE, "")
    if wanted not in ("", "cpu", "cuda"):
        raise UserError(f"{DEVICE_VARIABLE}={wanted!r}: expected cpu or cuda")
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{DEVICE_VARIABLE}=cuda, but torch {torch.__version__} finds no CUDA device; unset it")
    return wanted == "cpu" or not torch.cuda.is_available()


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
