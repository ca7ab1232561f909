"""Norms, activations and rotary embeddings."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tests.emulated_gpu.extension import ENUMS, emulates
from tests.emulated_gpu.float8 import torch_dtype
from tests.emulated_gpu.quantization import quantize

_QKVFormat = ENUMS["NVTE_QKV_Format"]


def _gamma(weight: Tensor, zero_centered_gamma: bool) -> Tensor:
    return weight.detach().float() + (1 if zero_centered_gamma else 0)


@emulates
def rmsnorm_fwd(
    input: Tensor, weight: Tensor, eps: float, ln_out: Any, quantizer: Any, otype: Any, sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Any, None, Tensor]:  # fmt: skip
    flat = input.detach().reshape(-1, input.shape[-1]).float()
    rsigma = torch.rsqrt(flat.square().mean(-1) + eps)
    out = (flat * rsigma[:, None] * _gamma(weight, zero_centered_gamma)).to(torch_dtype(otype)).reshape(input.shape)
    if quantizer is not None:
        out = quantize(out, quantizer, ln_out)
    elif ln_out is not None:
        out = ln_out.copy_(out)
    return out, None, rsigma


@emulates
def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> tuple[Tensor, Tensor]:
    flat_dz, flat_x = (tensor.reshape(-1, x.shape[-1]).float() for tensor in (dz, x))
    normed = flat_x * rsigma[:, None]
    dnormed = flat_dz * _gamma(gamma, zero_centered_gamma)
    dx = rsigma[:, None] * (dnormed - normed * (dnormed * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype).reshape(x.shape), (flat_dz * normed).sum(0).to(gamma.dtype)


@emulates
def swiglu(input: Tensor, quantizer: Any) -> Any:
    gate, up = input.detach().float().chunk(2, -1)
    out = (torch.nn.functional.silu(gate) * up).to(input.dtype)
    return out if quantizer is None else quantize(out, quantizer)


@emulates
def dswiglu(grad: Tensor, fwd_input: Tensor, quantizer: Any) -> Any:
    gate, up = fwd_input.detach().float().chunk(2, -1)
    wide_grad, sigmoid = grad.float(), torch.sigmoid(gate)
    by_gate = wide_grad * up * sigmoid * (1 + gate * (1 - sigmoid))
    out = torch.cat([by_gate, wide_grad * gate * sigmoid], -1).to(fwd_input.dtype)
    return out if quantizer is None else quantize(out, quantizer)


def _local_positions(cu_seqlens: Tensor, cp_size: int, cp_rank: int) -> Tensor:
    """Position in its sequence of each token that a rank holds: of 2 x CP chunks, the rank's and its mirror image."""
    found = []
    for start, end in pairwise(cu_seqlens.tolist()):
        positions = torch.arange(end - start)
        if cp_size > 1:
            chunks = positions.tensor_split(2 * cp_size)
            positions = torch.cat([chunks[cp_rank], chunks[2 * cp_size - 1 - cp_rank]])
        found.append(positions)
    return torch.cat(found)


def _angles(x: Tensor, freqs: Tensor, start: Any, qkv_format: Any, cu_seqlens: Any, cp_size: int, rank: int) -> Tensor:
    """The angles of `x`, shaped to be multiplied with it."""
    assert start is None and freqs.dtype == torch.float32 and freqs.dim() == 4
    if qkv_format == _QKVFormat.NVTE_THD:
        positions = _local_positions(cu_seqlens, cp_size, rank)
        assert len(positions) == len(x), (len(positions), x.shape)
        return freqs[positions, 0]
    assert cp_size == 1
    by_position = qkv_format == _QKVFormat.NVTE_SBHD
    angles = freqs[: x.shape[0 if by_position else 1]]
    return angles if by_position else angles.transpose(0, 1)


def _rotate(x: Tensor, angles: Tensor, interleaved: bool, sign: int) -> Tensor:
    width = angles.shape[-1]
    rotated, rest = x[..., :width].float(), x[..., width:]
    if interleaved:
        pairs = rotated.unflatten(-1, (-1, 2))
        turned = torch.stack([-pairs[..., 1], pairs[..., 0]], -1).flatten(-2)
    else:
        first, second = rotated.chunk(2, -1)
        turned = torch.cat([-second, first], -1)
    return torch.cat([(rotated * angles.cos() + sign * turned * angles.sin()).to(x.dtype), rest], -1)


@emulates
def fused_rope_forward(
    input: Tensor, freqs: Tensor, start_positions: Any, qkv_format: Any, interleaved: bool, cu_seqlens: Any,
    cp_size: int, cp_rank: int,
) -> Tensor:  # fmt: skip
    angles = _angles(input, freqs, start_positions, qkv_format, cu_seqlens, cp_size, cp_rank)
    return _rotate(input, angles, interleaved, 1)


@emulates
def fused_rope_backward(
    grad: Tensor, freqs: Tensor, start_positions: Any, qkv_format: Any, interleaved: bool, cu_seqlens: Any,
    cp_size: int, cp_rank: int,
) -> Tensor:  # fmt: skip
    angles = _angles(grad, freqs, start_positions, qkv_format, cu_seqlens, cp_size, cp_rank)
    return _rotate(grad, angles, interleaved, -1)
