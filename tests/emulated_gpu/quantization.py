"""FP8 tensors: values rounded to float8 and scales as the recipes make them.

A columnwise operand is a stored transpose; on Blackwell, products read a tensor with one scale either way, and its
transpose is not stored. M, K: rows and columns of a matrix.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.emulated_gpu import mxfp8
from tests.emulated_gpu.device import IS_BLACKWELL
from tests.emulated_gpu.extension import emulates
from tests.emulated_gpu.float8 import cast_to_bytes, largest, tensor_classes, torch_dtype

BLOCK = 128


def _transposed(data: Tensor) -> Tensor:
    """[..., K] -> [K, ...]."""
    return data.movedim(-1, 0).contiguous() if data.dim() else data


def scale_of(amax: Tensor, top: float, powers_of_two: bool, epsilon: float) -> Tensor:
    """fp32: what brings `amax` to `top`, elementwise; 1 where the amax is zero or not finite."""
    amax = amax.clamp(min=epsilon)
    no_scale = (amax == 0) | ~torch.isfinite(amax)
    scale = torch.where(no_scale, 1.0, top / amax).clamp(max=torch.finfo(torch.float32).max)
    return torch.ldexp(torch.ones_like(scale), torch.frexp(scale).exponent - 1) if powers_of_two else scale


def _scale_for(quantizer: Any, amax: Tensor) -> Tensor:
    return scale_of(amax, largest(quantizer.dtype), quantizer.force_pow_2_scales, quantizer.amax_epsilon)


def tile_maxima(values_MK: Tensor, rows: int, columns: int) -> Tensor:
    """Largest absolute value of each tile; the last tiles may be smaller."""
    M, K = values_MK.shape
    padded = torch.nn.functional.pad(values_MK, (0, -K % columns, 0, -M % rows))
    return padded.abs().unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).amax(dim=(1, 3))


def _spread(scale: Tensor, is_2d: bool, shape: Sequence[int]) -> Tensor:
    """One scale for each value of a matrix, from one for each block or for each 128 values of a row."""
    spread = scale.repeat_interleave(BLOCK, 0)[: shape[0]] if is_2d else scale[: shape[0]]
    return spread.repeat_interleave(BLOCK, 1)[:, : shape[1]]


def _is_blockwise(quantizer: Any) -> bool:
    return type(quantizer).__name__ == "Float8BlockQuantizer"


def _is_delayed(quantizer: Any) -> bool:
    return type(quantizer).__name__ == "Float8Quantizer"


@emulates
def create_empty_quantized_tensor(
    quantizer: Any, shape: Sequence[int], dtype: torch.dtype, device: Any, pin_memory: bool
) -> Any:
    shape, row, column = list(shape), quantizer.rowwise_usage, quantizer.columnwise_usage
    kind: dict[str, Any] = {"fp8_dtype": quantizer.dtype, "quantizer": quantizer}
    if quantizer.internal:
        kind |= {"fake_dtype": dtype}
    else:
        strides = torch.empty(shape, device="meta").stride()
        kind |= {"shape": shape, "dtype": dtype, "device": torch.device("cpu"), "stride": strides}
    if mxfp8.is_mxfp8_quantizer(quantizer):
        return mxfp8.empty(quantizer, shape, kind)
    suffix = "Storage" if quantizer.internal else ""
    if _is_blockwise(quantizer):
        columns = quantizer.get_columnwise_shape(shape)
        return getattr(tensor_classes(), "Float8BlockwiseQTensor" + suffix)(
            rowwise_data=torch.empty(shape, dtype=torch.uint8) if row else None,
            rowwise_scale_inv=torch.empty(quantizer.get_scale_shape(shape, False)) if row else None,
            columnwise_data=torch.empty(columns, dtype=torch.uint8) if column else None,
            columnwise_scale_inv=torch.empty(quantizer.get_scale_shape(shape, True)) if column else None,
            is_2D_scaled=quantizer.block_scaling_dim == 2,
            **kind,
        )
    assert _is_delayed(quantizer) or type(quantizer).__name__ == "Float8CurrentScalingQuantizer", type(quantizer)
    inverse = quantizer.scale.reciprocal().reshape(1) if _is_delayed(quantizer) else torch.empty(1)
    return getattr(tensor_classes(), "Float8Tensor" + suffix)(
        data=torch.empty(shape, dtype=torch.uint8) if row or IS_BLACKWELL else None,
        data_transpose=torch.empty([shape[-1], *shape[:-1]], dtype=torch.uint8)
        if column and not IS_BLACKWELL
        else None,
        fp8_scale_inv=inverse,
        **kind,
    )


@emulates
def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    if noop is not None and noop.item():
        return output
    values = tensor.detach().float().contiguous()
    if output is None:
        output = create_empty_quantized_tensor(quantizer, tensor.shape, tensor.dtype, torch.device("cpu"), False)
    output._fp8_dtype = quantizer.dtype
    if mxfp8.is_mxfp8_quantizer(quantizer):
        mxfp8.fill(output, quantizer, values)
        return output
    _give_wanted_buffers(output, quantizer, list(tensor.shape))
    if _is_blockwise(quantizer):
        _fill_blocks(output, quantizer, values)
    else:
        _fill(output, quantizer, values)
    return output


def _give_wanted_buffers(output: Any, quantizer: Any, shape: list[int]) -> None:
    """Allocate what the quantizer's usages ask for and drop the rest."""
    blockwise = _is_blockwise(quantizer)
    names = ("_rowwise_data", "_columnwise_data") if blockwise else ("_data", "_transpose")
    for name, columnwise in zip(names, (False, True), strict=True):
        wanted = quantizer.columnwise_usage if columnwise else quantizer.rowwise_usage
        if IS_BLACKWELL and not blockwise:
            wanted = not columnwise
        if wanted == (getattr(output, name) is not None):
            continue
        wide = [shape[-1], *shape[:-1]] if columnwise else shape
        setattr(output, name, torch.empty(wide, dtype=torch.uint8) if wanted else None)
        if blockwise:
            scale = torch.empty(quantizer.get_scale_shape(shape, columnwise)) if wanted else None
            setattr(output, name.replace("data", "scale_inv"), scale)
    if not blockwise:
        output._transpose_invalid = output._transpose is None


def _fill(output: Any, quantizer: Any, values: Tensor) -> None:
    """One scale for the tensor: from earlier steps (delayed), or from its own largest value (tensorwise)."""
    if _is_delayed(quantizer):
        scale = quantizer.scale.reshape(1)
        if quantizer.amax.numel() and values.numel():
            quantizer.amax.copy_(torch.maximum(quantizer.amax, values.abs().amax()))
    else:
        amax = values.abs().amax().reshape(1) if values.numel() else torch.zeros(1)
        if quantizer.with_amax_reduction:
            group = quantizer._canonicalized_amax_reduction_group()
            torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=group)
        scale = _scale_for(quantizer, amax)
    output._scale_inv.copy_(scale.reciprocal().reshape(output._scale_inv.shape))
    data = cast_to_bytes(values * scale, quantizer.dtype)
    if output._data is not None:
        output._data.copy_(data)
    if output._transpose is not None:
        output._transpose.copy_(_transposed(data))


def _fill_blocks(output: Any, quantizer: Any, values: Tensor) -> None:
    """A scale for each 128 x 128 values (weights), or for each 128 values of a row (activations, gradients)."""
    assert quantizer.force_pow_2_scales or not IS_BLACKWELL, "Blackwell's scales are powers of two"
    if not values.numel():
        return
    flat_MK = values.reshape(-1, values.shape[-1])
    is_2d = quantizer.block_scaling_dim == 2
    for matrix, side in ((flat_MK, "_rowwise"), (flat_MK.t().contiguous(), "_columnwise")):
        data, inverse = getattr(output, side + "_data"), getattr(output, side + "_scale_inv")
        if data is None:
            continue
        scales = _scale_for(quantizer, tile_maxima(matrix, BLOCK if is_2d else 1, BLOCK))
        spread = _spread(scales, is_2d, matrix.shape)
        data.copy_(cast_to_bytes(matrix * spread, quantizer.dtype).reshape(data.shape))
        stored = scales.reciprocal() if is_2d else scales.reciprocal().t()  # the product reads [blocks, rows]
        inverse.zero_()
        inverse[: stored.shape[0], : stored.shape[1]] = stored


def is_quantized(operand: Any) -> bool:
    return hasattr(operand, "_fp8_dtype")


def is_blockwise(operand: Any) -> bool:
    return hasattr(operand, "_is_2D_scaled")


def matrix_of(operand: Any, rowwise: bool) -> Tensor:
    """The operand as [M, K]: a plain tensor as it is, an FP8 tensor in fp32 from the side that a product reads."""
    if not is_quantized(operand):
        return operand.reshape(-1, operand.shape[-1])
    if mxfp8.is_mxfp8(operand):
        return mxfp8.values_of(operand, rowwise)
    if not is_blockwise(operand) and IS_BLACKWELL:
        rowwise = True
    if is_blockwise(operand):
        side = "_rowwise" if rowwise else "_columnwise"
        data, scale = getattr(operand, side + "_data"), getattr(operand, side + "_scale_inv")
    else:
        assert rowwise or not operand._transpose_invalid, "the transpose is out of date"
        data, scale = operand._data if rowwise else operand._transpose, operand._scale_inv
    assert data is not None, f"no {'row' if rowwise else 'column'}wise data"
    data = data.reshape(-1, data.shape[-1]) if rowwise else data.reshape(data.shape[0], -1)
    if is_blockwise(operand):
        scale = _spread(scale if operand._is_2D_scaled else scale.t(), operand._is_2D_scaled, data.shape)
    values = data.view(torch_dtype(operand._fp8_dtype)).float() * scale
    return values if rowwise else values.t()


@emulates
def dequantize(input: Any, otype: Any) -> Tensor:
    rowwise = True
    if mxfp8.is_mxfp8(input):
        assert not input._with_gemm_swizzled_scales, "scales in the order of a product are not dequantized"
        rowwise = input._rowwise_data is not None
    return matrix_of(input, rowwise).reshape(input.size()).to(torch_dtype(otype))


@emulates
def compute_amax(input: Tensor, amax: Tensor) -> None:
    amax.copy_(input.float().abs().amax().reshape(amax.shape))


@emulates
def fp8_transpose(input: Tensor, dtype: Any, *, out: Tensor | None) -> Tensor:
    result = _transposed(input)
    return result if out is None else out.copy_(result.reshape(out.shape))


@emulates
def swap_first_dims(tensor: Tensor, *, out: Tensor | None) -> Tensor:
    result = tensor.transpose(0, 1).contiguous()
    return result if out is None else out.copy_(result)


@emulates
def bgrad_quantize(input: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    """The gradient of the bias, and the quantized gradient."""
    bias = input.reshape(-1, input.shape[-1]).sum(0, dtype=torch.float32).to(input.dtype)
    return bias, quantize(input, quantizer)


@emulates
def split_quantize(
    tensor: Tensor, split_sections: Sequence[int], quantizer_list: Sequence[Any], disable_bulk_allocation: bool = False
) -> list[Any]:
    return multi_tensor_quantize(tensor.split(list(split_sections)), quantizer_list)


@emulates
def multi_tensor_quantize(tensor_list: Sequence[Tensor], quantizer_list: Sequence[Any]) -> list[Any]:
    return [quantize(part, quantizer) for part, quantizer in zip(tensor_list, quantizer_list, strict=True)]


@emulates
def fused_multi_row_padding(
    input: Tensor, output: Tensor, input_rows: Sequence[int], padded_rows: Sequence[int]
) -> None:
    """Put each expert's rows first among as many rows as its products need; the others are zero."""
    for found, out in zip(input.split(list(input_rows)), output.split(list(padded_rows)), strict=True):
        out[: len(found)] = found
        out[len(found) :] = 0


@emulates
def fused_multi_row_unpadding(input: Tensor, output: Tensor, input_rows: Sequence[int], rows: Sequence[int]) -> None:
    """Take what `fused_multi_row_padding` has added away."""
    for found, out in zip(input.split(list(input_rows)), output.split(list(rows)), strict=True):
        out.copy_(found[: len(out)])


@emulates
def fused_amax_and_scale_update_after_reduction(
    buffer: Tensor, histories: Sequence[Tensor], scales: Sequence[Tensor], algorithm: str, dtype: Any, margin: float
) -> None:
    """Enter the largest values of this step (`buffer`, one after another) and make the scales of the next one."""
    start = 0
    for history, scale in zip(histories, scales, strict=True):
        newest = buffer[start : start + history.shape[1]]
        start += history.shape[1]
        history[0] = newest
        amax = history.amax(0) if algorithm == "max" else newest
        fresh = (largest(dtype) / amax / 2.0**margin).clamp(max=torch.finfo(torch.float32).max)
        scale.copy_(torch.where((amax <= 0) | ~torch.isfinite(amax), scale, fresh))
        history.copy_(history.roll(-1, 0))
        history[0] = 0
