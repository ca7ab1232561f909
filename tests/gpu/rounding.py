"""FP8's rounding in plain layers: how far a recipe takes a model from float32, without a line of Transformer Engine.

M, N, K: tokens, outputs and inputs of a product.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor

_E4M3, _E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def _rounded(values: Tensor, tile: tuple[int, int], dtype: torch.dtype, room: float) -> Tensor:
    """fp32: a matrix whose tiles were scaled to their largest value and rounded; `room` leaves a part of the range."""
    rows, columns = (side or whole for side, whole in zip(tile, values.shape, strict=True))
    padded = torch.nn.functional.pad(values.float(), (0, -values.shape[1] % columns, 0, -values.shape[0] % rows))
    tiles = padded.unflatten(0, (-1, rows)).unflatten(2, (-1, columns))
    scale = room * torch.finfo(dtype).max / tiles.abs().amax((1, 3), keepdim=True).clamp(min=1e-30)
    rounded = (tiles * scale).to(dtype).float() / scale
    return rounded.flatten(2, 3).flatten(0, 1)[: values.shape[0], : values.shape[1]]


class _RoundedProduct(torch.autograd.Function):
    """x [..., K] times the transpose of w [N, K]: both, and the gradient, rounded before each of the three products."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, tiles: "Tiles", gradients: torch.dtype, room: float) -> Tensor:
        ctx.tiles, ctx.gradients, ctx.room = tiles, gradients, room
        ctx.save_for_backward(x, w)
        x_MK = _rounded(x.flatten(0, -2), tiles.values, _E4M3, room)
        return (x_MK @ _rounded(w, tiles.weights, _E4M3, room).t()).to(x.dtype).unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        (x, w), tiles, gradients, room = ctx.saved_tensors, ctx.tiles, ctx.gradients, ctx.room
        x_MK, dy_MN = x.flatten(0, -2), dy.flatten(0, -2)
        dx = _rounded(dy_MN, tiles.values, gradients, room) @ _rounded(w, tiles.weights, _E4M3, room)
        # The products of a weight's gradient run along the tokens, and so do their tiles.
        dy_NM, x_KM = _rounded(dy_MN.t(), tiles.values, gradients, room), _rounded(x_MK.t(), tiles.values, _E4M3, room)
        return dx.to(x.dtype).reshape(x.shape), (dy_NM @ x_KM.t()).to(w.dtype), None, None, None


class Tiles(NamedTuple):
    """Rows and columns that share a scale; 0 is all of them."""

    values: tuple[int, int]
    """Of activations and gradients."""
    weights: tuple[int, int]


TILES = {
    "tensorwise": Tiles((0, 0), (0, 0)),
    "blockwise": Tiles((1, 128), (128, 128)),
    "mxfp8": Tiles((1, 32), (1, 32)),
}


@contextmanager
def rounded_products(recipe: str, fp8: str, room: float) -> Iterator[None]:
    """Round in the linear layers of Megatron-Core's own implementation. Samples differ by `room`, 1/2 to 1.

    Args:
        fp8: e4m3 for all values, or hybrid, which is e5m2 for gradients.
    """
    gradients = {"e4m3": _E4M3, "hybrid": _E5M2}[fp8]

    def product(input: Tensor, weight: Tensor, bias: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = _RoundedProduct.apply(input, weight, TILES[recipe], gradients, room)
        return found if bias is None else found + bias

    with mock.patch.object(layers, "linear_with_grad_accumulation_and_async_allreduce", product):
        yield
