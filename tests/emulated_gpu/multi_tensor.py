"""Operations on lists of tensors: the optimizer's, and the scales of weights that are stored in FP8."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tests.emulated_gpu.extension import emulates
from tests.emulated_gpu.float8 import cast_to_bytes
from tests.emulated_gpu.quantization import scale_of, tile_maxima

Lists = Sequence[Sequence[Tensor]]


@emulates
def multi_tensor_scale(chunk_size: int, flag: Tensor, lists: Lists, scale: float) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)
        flag.masked_fill_(~torch.isfinite(source).all(), 1)


@emulates
def multi_tensor_scale_tensor(chunk_size: int, flag: Tensor, lists: Lists, scale: Tensor) -> None:
    for source, target in zip(*lists, strict=True):
        target.copy_(source * scale)


@emulates
def multi_tensor_l2norm(chunk_size: int, flag: Tensor, lists: Lists, per_tensor: bool | None) -> tuple[Tensor, Tensor]:
    norms = torch.stack([tensor.float().norm() for tensor in lists[0]]) if lists[0] else torch.zeros(0)
    return norms.norm().reshape(1), norms if per_tensor else torch.zeros(0)


@emulates
def multi_tensor_adam(
    chunk_size: int, flag: Tensor, lists: Lists, lr: float, beta1: float, beta2: float, eps: float, step: int,
    mode: int, bias_correction: int, weight_decay: float,
) -> None:  # fmt: skip
    """Mode 0 is Adam with L2 regularization, mode 1 is AdamW. A fifth list holds the fp32 weights."""
    masters = lists[4] if len(lists) > 4 else lists[1]
    corrections = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for grad, parameter, first, second, master in zip(*lists[:4], masters, strict=True):
        weight = master.float()
        slope = grad.float() + (weight_decay * weight if mode == 0 else 0)
        first.copy_(beta1 * first + (1 - beta1) * slope)
        second.copy_(beta2 * second + (1 - beta2) * slope * slope)
        update = (first / corrections[0]) / ((second / corrections[1]).sqrt() + eps)
        weight = weight - lr * (update + (weight_decay * weight if mode == 1 else 0))
        master.copy_(weight)
        if master is not parameter:
            parameter.copy_(weight)


@emulates
def multi_tensor_compute_scale_and_scale_inv(
    chunk_size: int, flag: Tensor, lists: Lists, max_fp8: float, powers_of_two: bool, epsilon: float
) -> None:
    for amax, scale, inverse in zip(*lists, strict=True):
        scale.copy_(scale_of(amax, max_fp8, powers_of_two, epsilon))
        inverse.copy_(scale.reciprocal())


@emulates
def fp8_block_scaling_compute_partial_amax(
    tensor: Tensor, amax: Tensor, h: int, w: int, start_offset: int, block_len: int
) -> None:
    """Maxima of the blocks of a matrix [h, w], of which `tensor` is a part of the flattened values."""
    whole = torch.zeros(h * w)
    whole[start_offset : start_offset + tensor.numel()] = tensor.flatten().float()
    found = tile_maxima(whole.reshape(h, w), block_len, block_len)
    amax.zero_()
    amax[: found.shape[0], : found.shape[1]] = found


@emulates
def fp8_block_scaling_partial_cast(
    inp: Tensor, out: Tensor, scale: Tensor, h: int, w: int, start_offset: int, block_len: int, out_dtype: Any
) -> None:
    spread = scale.repeat_interleave(block_len, 0)[:h].repeat_interleave(block_len, 1)[:, :w].flatten()
    values = inp.flatten().float() * spread[start_offset : start_offset + inp.numel()]
    out.copy_(cast_to_bytes(values, out_dtype).reshape(out.shape))
