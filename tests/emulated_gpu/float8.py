"""The extension's number types, and rounding to FP8."""

import functools
from typing import Any

import torch
from torch import Tensor

from tests.emulated_gpu.extension import ENUMS

_DType = ENUMS["DType"]
_TORCH_DTYPES = {
    _DType.kByte: torch.uint8,
    _DType.kInt32: torch.int32,
    _DType.kFloat32: torch.float32,
    _DType.kFloat16: torch.float16,
    _DType.kBFloat16: torch.bfloat16,
    _DType.kFloat8E4M3: torch.float8_e4m3fn,
    _DType.kFloat8E5M2: torch.float8_e5m2,
}


def torch_dtype(dtype: Any) -> torch.dtype:
    """Of the extension's `DType`."""
    return _TORCH_DTYPES[_DType(int(dtype))]


@functools.cache
def tensor_classes() -> Any:
    """Transformer Engine's module of tensor classes, which itself imports the extension."""
    import transformer_engine.pytorch.tensor as module

    return module


def largest(dtype: Any) -> float:
    return torch.finfo(torch_dtype(dtype)).max


def cast_to_bytes(values: Tensor, dtype: Any) -> Tensor:
    """Values rounded to an FP8 type; what is too large becomes the largest number."""
    return values.clamp(-largest(dtype), largest(dtype)).to(torch_dtype(dtype)).view(torch.uint8)
