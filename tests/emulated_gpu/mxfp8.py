"""MXFP8, Blackwell's format: each 32 values of a row, or of a column, share a scale that is a power of two.

Scales are bytes: the power plus 127 (E8M0). Columnwise data is no transpose: it has the shape of the values.
M, K: rows and columns of a matrix.
"""

from typing import Any

import torch
from torch import Tensor

from tests.emulated_gpu.float8 import cast_to_bytes, largest, tensor_classes, torch_dtype

BLOCK = 32
_BIAS = 127


def is_mxfp8_quantizer(quantizer: Any) -> bool:
    return type(quantizer).__name__ == "MXFP8Quantizer"


def is_mxfp8(operand: Any) -> bool:
    return hasattr(operand, "_with_gemm_swizzled_scales")


def exponents_of(amax: Tensor, dtype: Any) -> Tensor:
    """uint8: the least power of two, biased, that brings `amax` (fp32) down to the largest number of an FP8 type.

    Upstream: `float_to_e8m0` in `transformer_engine/common/util/ptx.cuh`.
    """
    share = amax * (1 / largest(dtype))
    bits = share.contiguous().view(torch.int32)
    power, fraction = bits >> 23, bits & 0x7FFFFF
    rounds_up = (fraction > 0) & (power != 0xFE) & ~((power == 0) & (fraction <= 0x400000))
    power = torch.where(torch.isinf(share), 0xFE, power + rounds_up)
    return torch.where(torch.isnan(share), 0xFF, power).to(torch.uint8)


def _power(exponents: Tensor, sign: int) -> Tensor:
    """fp32: 2 to the power of unbiased exponents, or of their negatives."""
    return torch.ldexp(torch.ones(exponents.shape), sign * (exponents.int() - _BIAS))


def swizzled(scales_MK: Tensor) -> Tensor:
    """Scales in the order that a product reads: tiles of 128 x 4, and in a tile, rows 32 apart side by side.

    Upstream: "1D block scaling factors layout" in cuBLAS' manual.
    """
    rows, columns = scales_MK.shape
    parts = scales_MK.reshape(rows // 128, 4, 32, columns // 4, 4)
    return parts.permute(0, 3, 2, 1, 4).reshape(rows, columns)


def _compact(scales: Tensor) -> Tensor:
    """What was swizzled, row by row again."""
    rows, columns = scales.shape
    parts = scales.reshape(rows // 128, columns // 4, 32, 4, 4)
    return parts.permute(0, 3, 2, 1, 4).reshape(rows, columns)


def empty(quantizer: Any, shape: list[int], kind: dict[str, Any]) -> Any:
    """A tensor whose sides are allocated; `kind`: the arguments that all quantized tensors take."""
    rows = torch.Size(shape[:-1]).numel()
    assert rows % BLOCK == 0 and shape[-1] % BLOCK == 0, f"MXFP8 takes sides of a multiple of 32, not {tuple(shape)}"
    parts = dict.fromkeys(("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv"))
    parts |= {name.lstrip("_"): torch.empty(*spec[:1], dtype=spec[1]) for name, spec in _specs(quantizer, shape)}
    make = getattr(tensor_classes(), "MXFP8Tensor" + ("Storage" if quantizer.internal else ""))
    return make(**parts, with_gemm_swizzled_scales=quantizer.optimize_for_gemm, **kind)


def _specs(quantizer: Any, shape: list[int]) -> Any:
    return quantizer.inner_tensor_specs(tuple(shape)).items()


def fill(output: Any, quantizer: Any, values: Tensor) -> None:
    """Write the sides that the quantizer's usages ask for, and drop the others."""
    assert not quantizer.with_2d_quantization
    specs = dict(_specs(quantizer, list(values.shape)))
    flat_MK = values.reshape(-1, values.shape[-1])
    output._with_gemm_swizzled_scales = quantizer.optimize_for_gemm
    for side, columnwise in (("_rowwise", False), ("_columnwise", True)):
        names = side + "_data", side + "_scale_inv"
        for name in names:
            if name not in specs:
                setattr(output, name, None)
            elif getattr(output, name) is None:
                setattr(output, name, torch.empty(specs[name][0], dtype=torch.uint8))
        if names[0] in specs:
            data, scales = (getattr(output, name) for name in names)
            _fill_side(data, scales, flat_MK.t() if columnwise else flat_MK, quantizer, columnwise)


def _fill_side(data: Tensor, scales: Tensor, matrix: Tensor, quantizer: Any, columnwise: bool) -> None:
    """`matrix`: blocks lie along its rows; it is the transpose of the values where they are cut columnwise."""
    exponents = exponents_of(matrix.unflatten(1, (-1, BLOCK)).abs().amax(-1), quantizer.dtype)
    factors = torch.where(exponents == 0, 1.0, _power(exponents, -1))
    found = cast_to_bytes(matrix * factors.repeat_interleave(BLOCK, 1), quantizer.dtype)
    data.copy_((found.t() if columnwise else found).reshape(data.shape))
    padded = torch.zeros(scales.shape[::-1] if columnwise else scales.shape, dtype=torch.uint8)
    padded[: exponents.shape[0], : exponents.shape[1]] = exponents
    if quantizer.optimize_for_gemm:
        scales.copy_(swizzled(padded).reshape(scales.shape))
    else:
        scales.copy_(padded.t() if columnwise else padded)


def values_of(operand: Any, rowwise: bool) -> Tensor:
    """fp32 [M, K], from the side that a product reads."""
    side = "_rowwise" if rowwise else "_columnwise"
    data, scales = getattr(operand, side + "_data"), getattr(operand, side + "_scale_inv")
    assert data is not None, f"no {side[1:]} data"
    data = data.reshape(-1, data.shape[-1])
    if operand._with_gemm_swizzled_scales:
        scales = _compact(scales) if rowwise else _compact(scales.reshape(scales.shape[::-1])).t()
    spread = _power(scales, 1).repeat_interleave(BLOCK, 1 if rowwise else 0)
    return data.view(torch_dtype(operand._fp8_dtype)).float() * spread[: data.shape[0], : data.shape[1]]
