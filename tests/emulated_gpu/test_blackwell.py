"""What a Blackwell GPU does otherwise than a Hopper GPU: MXFP8, no stored transposes, and blockwise scales as bytes.

`EMULATED_GPU=blackwell` chooses the device, for ranks and subprocesses too.
"""

import math
import sys
from pathlib import Path

import pytest
import torch
import transformer_engine_torch as tex
from megatron.core.fp8_utils import get_fp8_align_size
from transformer_engine.common.recipe import Float8BlockScaling, Float8CurrentScaling, MXFP8BlockScaling, Recipe
from transformer_engine.pytorch import (
    Float8BlockQuantizer,
    Float8CurrentScalingQuantizer,
    Linear,
    MXFP8Quantizer,
    autocast,
)

from megatron_solopo.architecture.layout import FP8_MULTIPLES
from megatron_solopo.cli import doctor
from tests.distributed import run_distributed
from tests.emulated_gpu.extension import calls
from tests.emulated_gpu.mxfp8 import exponents_of, swizzled
from tests.emulated_gpu.quantization import matrix_of
from tests.emulated_gpu.test_kernels import assert_layer_is_within_rounding
from tests.gpu.test_training import DPO, FP8, batches, losses, model
from tests.layouts import cp, tp
from tests.parity.layouts import PACKED, TWO_RANKS, Case, Layout, RankResult, run_cases

E4M3, E5M2 = tex.DType.kFloat8E4M3, tex.DType.kFloat8E5M2
FP32 = tex.DType.kFloat32
MXFP8 = FP8 | {"fp8_recipe": "mxfp8"}


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def product(a, b, transa, transb):
    return tex.generic_gemm(
        a, transa, b, transb, None, None, FP32, None, FP32, False, None, False, None, 0, False, False
    )[0]


def rounded(block: torch.Tensor) -> torch.Tensor:
    """A block of 32 values as MXFP8 holds it: the least power of two that leaves no value above 448."""
    scale = 2.0 ** math.ceil(math.log2(float(block.abs().max()) / 448))
    return (block / scale).to(torch.float8_e4m3fn).float() * scale


def test_the_device_is_a_blackwell_gpu() -> None:
    assert torch.cuda.get_device_capability() == (10, 0)


def test_scales_are_powers_of_two_rounded_up() -> None:
    """2^-127, the least one, also stands for no value at all."""
    amax = torch.tensor([448.0, 449.0, 896.0, 1.0, 0.0, math.inf, math.nan, 2.0**-130])
    assert exponents_of(amax, E4M3).tolist() == [127, 128, 128, 127 - 8, 0, 254, 255, 0]


def test_each_32_values_of_a_row_and_of_a_column_have_their_own_scale() -> None:
    x = torch.randn(64, 96) * torch.logspace(-3, 3, 64)[:, None]
    quantized = MXFP8Quantizer(E4M3)(x)
    by_row = torch.stack([torch.cat([rounded(part) for part in row.split(32)]) for row in x])
    by_column = torch.stack([torch.cat([rounded(part) for part in column.split(32)]) for column in x.t()]).t()
    assert torch.equal(matrix_of(quantized, rowwise=True), by_row)
    assert torch.equal(matrix_of(quantized, rowwise=False), by_column)
    assert torch.equal(quantized.dequantize(dtype=torch.float32), by_row)
    # Padded to 128 x 4, and 4 x 128, as cuBLAS reads them.
    shapes = [tuple(scale.shape) for scale in (quantized._rowwise_scale_inv, quantized._columnwise_scale_inv)]
    assert shapes == [(128, 4), (4, 128)]
    assert quantized._columnwise_data.shape == x.shape  # no transpose


def test_scales_lie_in_the_order_of_cublas() -> None:
    """Byte (m, k) of a tile of 128 x 4 is the byte (m mod 32) x 16 + (m / 32) x 4 + k; tiles of a row follow."""
    scales = torch.arange(256 * 8).reshape(256, 8)
    found = swizzled(scales).flatten()
    for m, k in ((0, 0), (1, 0), (32, 0), (127, 3), (128, 0), (5, 4), (200, 7)):
        tile = (m // 128) * 2 + k // 4
        assert found[tile * 512 + (m % 32) * 16 + (m % 128) // 32 * 4 + k % 4] == scales[m, k]


def test_scales_in_the_order_of_a_product_give_the_same_product() -> None:
    weight, x, dy = torch.randn(160, 256), torch.randn(64, 256), torch.randn(64, 160)
    plain, ordered = MXFP8Quantizer(E4M3), MXFP8Quantizer(E4M3)
    ordered.optimize_for_gemm = True
    for a, b, layout in ((weight, x, (True, False)), (weight, dy, (False, False)), (x, dy, (False, True))):
        wanted = product(plain(a), plain(b), *layout)
        assert torch.equal(product(ordered(a), ordered(b), *layout), wanted)
        exact = product(a, b, *layout)
        assert 0 < float((wanted - exact).norm() / exact.norm()) < 2**-4
    scales = [quantizer(weight)._columnwise_scale_inv for quantizer in (plain, ordered)]
    assert not torch.equal(*scales)
    with pytest.raises(AssertionError, match="not dequantized"):
        tex.dequantize(ordered(x), FP32)


@pytest.mark.parametrize("usages", [(True, False), (False, True), (True, True)])
def test_a_tensor_holds_the_sides_that_its_quantizer_asks_for(usages: tuple[bool, bool]) -> None:
    x, quantizer = torch.randn(32, 64), MXFP8Quantizer(E4M3)
    quantized = quantizer(x)
    quantizer.set_usage(rowwise=usages[0], columnwise=usages[1])
    tex.quantize(x, quantizer, quantized)
    names = ("_rowwise", "_columnwise")
    for part in ("_data", "_scale_inv"):
        assert tuple(getattr(quantized, name + part) is not None for name in names) == usages


def test_what_mxfp8_refuses() -> None:
    with pytest.raises(AssertionError, match="multiple of 32"):
        MXFP8Quantizer(E4M3)(torch.randn(48, 64))
    x = torch.randn(32, 32)
    with pytest.raises(AssertionError, match="two E5M2"):
        product(MXFP8Quantizer(E5M2)(x), MXFP8Quantizer(E5M2)(x), True, False)
    with pytest.raises(AssertionError, match="MXFP8 multiplies MXFP8"):
        product(MXFP8Quantizer(E4M3)(x), Float8CurrentScalingQuantizer(E4M3, torch.device("cpu"))(x), True, False)
    quantizer = Float8BlockQuantizer(E4M3, rowwise=True, columnwise=True, force_pow_2_scales=False)
    with pytest.raises(AssertionError, match="powers of two"):
        quantizer(torch.randn(128, 128))


def test_one_scale_for_a_tensor_needs_no_transpose() -> None:
    quantizer = Float8CurrentScalingQuantizer(E4M3, torch.device("cpu"))
    quantizer.set_usage(rowwise=False, columnwise=True)
    quantized = quantizer(torch.randn(32, 64))
    assert quantized._transpose is None and quantized._data is not None
    assert torch.equal(matrix_of(quantized, rowwise=False), matrix_of(quantized, rowwise=True))


@pytest.mark.parametrize("recipe", [MXFP8BlockScaling(), Float8BlockScaling()], ids=["mxfp8", "blockwise"])
def test_a_layer_of_transformer_engine(recipe: Recipe) -> None:
    """No side is a multiple of 128."""
    assert_layer_is_within_rounding(recipe, tokens=64, inputs=224, outputs=96)


@pytest.mark.parametrize("recipe", [MXFP8BlockScaling(), Float8CurrentScaling()], ids=["mxfp8", "tensorwise"])
def test_blocks_of_one_token_keep_sequences_apart(recipe: Recipe) -> None:
    """What follows in a pack changes no bit of the sequences before it, unless one scale serves the whole pack."""
    layer = Linear(64, 64, bias=False, params_dtype=torch.float32, device="cpu")
    x = torch.randn(64, 64)
    with torch.no_grad(), autocast(enabled=True, recipe=recipe):
        found, wide = (layer(torch.cat([x[:32], x[32:] * factor]))[:32] for factor in (1, 1000))
    assert torch.equal(found, wide) == recipe.mxfp8()


def test_our_multiples_are_megatrons() -> None:
    assert {recipe: get_fp8_align_size(recipe) for recipe in FP8_MULTIPLES} == FP8_MULTIPLES


def test_doctor_finds_every_recipe() -> None:
    check = doctor._fp8(sys.modules["transformer_engine.pytorch"])
    assert (check.status, check.found) == ("ok", "works on this device: blockwise, tensorwise, delayed, mxfp8")


LAYOUTS = {
    1: [Layout("one", model=MXFP8, pack_multiple=32)],
    2: [
        Layout("tp2-sp", PACKED, tp(2), model=MXFP8, pack_multiple=64),
        Layout("dp2", TWO_RANKS, distributed_optimizer=True, model=MXFP8, pack_multiple=32),
        Layout("cp2", PACKED, cp(2), model=MXFP8, pack_multiple=64),
    ],
}


def _run(models: Path, cases: list[Case]) -> tuple[dict[str, RankResult], int]:
    return run_cases(models, cases, batches()), calls["generic_gemm"]


def test_ranks_train_in_mxfp8() -> None:
    """Ranks of tensor and context parallelism round other values than one rank; data-parallel ones the same."""
    found: dict[str, torch.Tensor] = {}
    for size, layouts in LAYOUTS.items():
        cases = [Case("llama3", DPO, layout) for layout in layouts]
        ranks = run_distributed(_run, size, model("llama3").parent, cases)
        assert all(called for _, called in ranks)
        for case in cases:
            results = [rank[case.name] for rank, _ in ranks]
            assert all(math.isfinite(norm) for result in results for norm in result.grad_norms)
            counted = [result for result in results if result.is_counted]
            found[case.layout.name] = sum(losses(result) for result in counted)
    print(found)
    torch.testing.assert_close(found["dp2"], found["one"], rtol=1e-4, atol=0)
    for name in ("tp2-sp", "cp2"):
        torch.testing.assert_close(found[name], found["one"], rtol=0.2, atol=0)
