"""Each emulated kernel against a direct formula: autograd's derivative, torch's own operation, or exact arithmetic."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
import transformer_engine_torch as tex
from megatron.core.fusions import fused_bias_swiglu
from transformer_engine.common.recipe import Float8BlockScaling, Recipe
from transformer_engine.pytorch import (
    Float8BlockQuantizer,
    Float8CurrentScalingQuantizer,
    Float8Quantizer,
    Linear,
    autocast,
)

from tests.emulated_gpu.device import WaitOnce
from tests.emulated_gpu.quantization import matrix_of

E4M3, E5M2 = tex.DType.kFloat8E4M3, tex.DType.kFloat8E5M2
FP32, BF16 = tex.DType.kFloat32, tex.DType.kBFloat16
THD = tex.NVTE_QKV_Layout.NVTE_THD_THD_THD
MASKS = tex.NVTE_Mask_Type


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def close(found, wanted, tolerance=1e-5) -> None:
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


# ---- norms, activations, rotary embedding


@pytest.mark.parametrize("zero_centered", [False, True])
def test_rmsnorm(zero_centered: bool) -> None:
    x, weight, gradient = torch.randn(3, 5, 8), torch.randn(8), torch.randn(3, 5, 8)
    x.requires_grad_(), weight.requires_grad_()
    wanted = F.rms_norm(x, (8,), weight + (1 if zero_centered else 0), 1e-5)
    wanted.backward(gradient)
    out, _, rsigma = tex.rmsnorm_fwd(x, weight, 1e-5, None, None, FP32, 0, zero_centered)
    close(out, wanted.detach())
    for found, each in zip(tex.rmsnorm_bwd(gradient, x, rsigma, weight, 0, zero_centered), (x, weight), strict=True):
        close(found.detach(), each.grad)


def test_swiglu() -> None:
    x, gradient = torch.randn(7, 12, requires_grad=True), torch.randn(7, 6)
    wanted = F.silu(x[:, :6]) * x[:, 6:]
    wanted.backward(gradient)
    close(tex.swiglu(x, None), wanted.detach())
    close(tex.dswiglu(gradient, x, None), x.grad)


def direct_rotation(x, position, freqs):
    """One token [H, D]: each pair of numbers as a complex number that is turned."""
    half = x.shape[-1] // 2
    turned = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones(half), freqs[position, 0, 0, :half])
    return torch.cat([turned.real, turned.imag], -1)


@pytest.mark.parametrize("cp_size, positions", [(1, [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 6, 7]), (2, [1, 2, 2, 3, 4, 5])])
def test_rope_of_a_pack(cp_size: int, positions: list[int]) -> None:
    """Two sequences of 4 and 8 tokens. With CP 2, the second rank holds the middle chunks."""
    x = torch.randn(len(positions), 2, 6)
    half = torch.rand(8, 1, 1, 3)
    freqs, cu = torch.cat([half, half], -1), torch.tensor([0, 4, 12])
    rest = (None, tex.NVTE_QKV_Format.NVTE_THD, False, cu, cp_size, cp_size - 1)
    out = tex.fused_rope_forward(x, freqs, *rest)
    close(out, torch.stack([direct_rotation(x[n], p, freqs) for n, p in enumerate(positions)]))
    close(tex.fused_rope_backward(out, freqs, *rest), x)  # a rotation's derivative turns back


def test_rope_leaves_the_columns_behind_its_angles() -> None:
    x, freqs = torch.randn(5, 2, 3, 8), torch.rand(9, 1, 1, 4)
    out = tex.fused_rope_forward(x, freqs, None, tex.NVTE_QKV_Format.NVTE_SBHD, True, None, 1, 0)
    assert torch.equal(out[..., 4:], x[..., 4:])
    pair = torch.complex(x[2, 0, 1, 0], x[2, 0, 1, 1]) * torch.polar(torch.tensor(1.0), freqs[2, 0, 0, 0])
    # Interleaved: neighbours are a pair, and angles are stored twice side by side by the caller.
    close(out[2, 0, 1, 0], pair.real)


# ---- attention


def attend(q, k, v, scale, bottom_right):
    """torch's own attention of one sequence [S, H, D], causal."""
    heads = q.shape[1]
    k, v = (each.repeat_interleave(heads // k.shape[1], 1) for each in (k, v))
    shift = len(k) - len(q) if bottom_right else 0
    mask = torch.ones(len(q), len(k), dtype=torch.bool).tril(shift)
    q, k, v = (each.transpose(0, 1)[None] for each in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)[0].transpose(0, 1)


@pytest.mark.parametrize(
    "mask, cu_q, cu_kv, padded",
    [
        ("NVTE_PADDING_CAUSAL_MASK", [0, 3, 8], [0, 3, 8], None),
        ("NVTE_PADDING_CAUSAL_MASK", [0, 3, 8], [0, 3, 8], [0, 4, 12]),
        ("NVTE_PADDING_CAUSAL_BOTTOM_RIGHT_MASK", [0, 2, 5], [0, 3, 8], None),
    ],
    ids=["packed", "padded", "lower-right"],
)
def test_fused_attention_of_a_pack(mask, cu_q, cu_kv, padded) -> None:
    ends = [(padded or cu)[-1] for cu in (cu_q, cu_kv)]
    q, gradient = torch.randn(ends[0], 4, 8, requires_grad=True), torch.randn(ends[0], 4, 8)
    k, v = (torch.randn(ends[1], 2, 8, requires_grad=True) for _ in range(2))
    scale = 0.3
    wanted = torch.zeros_like(q)
    for row in range(2):
        places = [
            slice((padded or cu)[row], (padded or cu)[row] + cu[row + 1] - cu[row]) for cu in (cu_q, cu_kv, cu_kv)
        ]
        parts = (each[place] for each, place in zip((q, k, v), places, strict=True))
        wanted[places[0]] = attend(*parts, scale, "BOTTOM_RIGHT" in mask)
    wanted.backward(gradient)
    cus = [torch.tensor(cu, dtype=torch.int32) for cu in (cu_q, cu_kv)]
    cu_padded = None if padded is None else torch.tensor(padded, dtype=torch.int32)
    common = (THD, None, None)
    q0, k0, v0 = (each.detach() for each in (q, k, v))
    out, stats, rng = tex.fused_attn_fwd(
        8, 8, True, scale, 0.0, False, *common, None, MASKS[mask], None, (-1, 0), True, *cus, q0, k0, v0,
        torch.float32, cu_padded, cu_padded, None, None, None, None, None, None, None, 0, False, False,
    )  # fmt: skip
    close(out, wanted.detach())
    found = tex.fused_attn_bwd(
        8, 8, scale, 0.0, False, THD, None, None, THD, None, None, None, MASKS[mask], None, (-1, 0), True, False,
        *cus, q0, k0, v0, out, gradient, torch.float32, (stats, rng), cu_padded, cu_padded, None, None, None, False,
    )  # fmt: skip
    for ours, each in zip(found[:3], (q, k, v), strict=True):
        close(ours, each.grad)


@pytest.mark.parametrize("layout", ["NVTE_SBHD_SBHD_SBHD", "NVTE_BSHD_BSHD_BSHD"])
def test_fused_attention_of_a_padded_batch(layout: str) -> None:
    q, k, v = (torch.randn(2, 5, heads, 8) for heads in (4, 2, 2))
    lengths = [3, 5]
    wanted = torch.zeros_like(q)
    for row, length in enumerate(lengths):
        wanted[row, :length] = attend(q[row, :length], k[row, :length], v[row, :length], 0.3, False)
    cu = torch.tensor([0, 3, 8], dtype=torch.int32)
    if layout.startswith("NVTE_SBHD"):
        q, k, v, wanted = (each.transpose(0, 1).contiguous() for each in (q, k, v, wanted))
    out, *_ = tex.fused_attn_fwd(
        5, 5, False, 0.3, 0.0, False, tex.NVTE_QKV_Layout[layout], None, None, None, MASKS.NVTE_PADDING_CAUSAL_MASK,
        None, (-1, 0), False, cu, cu, q, k, v, torch.float32, *[None] * 9, 0, False, False,
    )  # fmt: skip
    close(out, wanted)


def test_a_pack_becomes_a_padded_batch_and_a_pack_again() -> None:
    cu, pack = torch.tensor([0, 3, 8], dtype=torch.int32), torch.randn(8, 2, 4)
    batch = tex.convert_thd_to_bshd(pack, cu, 2, 6)
    assert torch.equal(batch, torch.stack([F.pad(part, (0, 0, 0, 0, 0, 6 - len(part))) for part in pack.split([3, 5])]))
    assert torch.equal(tex.convert_bshd_to_thd(batch, cu, 8), pack)


def test_a_fused_function_rounds_once() -> None:
    y = torch.randn(64, 32).bfloat16()
    gate, up = y.float().chunk(2, -1)
    assert torch.equal(fused_bias_swiglu.swiglu(y), (F.silu(gate) * up).bfloat16())


# ---- context parallelism


CU = torch.tensor([0, 4, 12], dtype=torch.int32)
FIRST, SECOND = [0, 1, 4, 5, 6, 7], [2, 3, 8, 9, 10, 11]


def test_halves_of_sequences() -> None:
    tensor = torch.randn(12, 2, 3)
    assert torch.equal(tex.thd_read_half_tensor(tensor, CU, 0), tensor[FIRST])
    assert torch.equal(tex.thd_read_half_tensor(tensor[None].repeat(2, 1, 1, 1), CU, 1)[1], tensor[SECOND])
    lse = torch.randn(2, 12)
    found = tex.thd_read_second_half_lse(lse, CU, True, 8)
    assert torch.equal(found[:, :6], lse[:, SECOND]) and found.shape == (2, 8)


@pytest.mark.parametrize("only_second_half", [False, True])
def test_outputs_over_two_sets_of_keys_join_to_that_over_all(only_second_half: bool) -> None:
    rows = SECOND if only_second_half else list(range(12))
    scores, values = torch.randn(2, 12, 6), torch.randn(6, 2, 4)  # [H, queries, keys], [keys, H, D]

    def over(keys, queries):
        part = scores[:, queries][:, :, keys]
        return torch.einsum("hqk,khd->qhd", part.softmax(-1), values[keys]), part.logsumexp(-1)

    out, lse = over([0, 1, 2], range(12))
    step_out, step_lse = over([3, 4, 5], rows)
    old = lse.clone()
    if only_second_half:
        tex.thd_second_half_lse_correction(lse, step_lse, CU, True)
    else:
        lse = torch.logaddexp(lse, step_lse)
    before = out.clone()
    tex.thd_out_correction(out, step_out, old, lse, step_lse, CU, only_second_half, True)
    wanted, wanted_lse = over(range(6), rows)
    close(out[rows], wanted)
    close(lse[:, rows], wanted_lse)
    rest = sorted(set(range(12)) - set(rows))
    assert torch.equal(out[rest], before[rest])


@pytest.mark.parametrize("actions", list(itertools.permutations(["add", "copy", "none", "zero"], 2)))
def test_gradients_of_each_half(actions: tuple[str, str]) -> None:
    grad, step = torch.randn(2, 12, 2, 3), torch.randn(2, 12, 2, 3)
    wanted = grad.clone()
    for rows, action in zip((FIRST, SECOND), actions, strict=True):
        wanted[:, rows] = {"add": grad + step, "copy": step, "none": grad, "zero": grad * 0}[action][:, rows]
    tex.thd_grad_correction(grad, step, CU, *actions)
    assert torch.equal(grad, wanted)


def test_a_step_of_one_half_alone_is_added_to_that_half() -> None:
    grad, step = torch.randn(12, 2, 3), torch.randn(6, 2, 3)
    wanted = grad.clone()
    wanted[SECOND] += step
    tex.thd_grad_correction(grad, step, CU, "none", "add")
    close(grad, wanted)


def test_ranks_hold_mirrored_chunks() -> None:
    ranks = [tex.thd_get_partitioned_indices(CU, 12, 2, rank).tolist() for rank in (0, 1)]
    assert ranks == [[0, 3, 4, 5, 10, 11], [1, 2, 6, 7, 8, 9]]
    tensor = torch.randn(12, 3)
    moved = tex.thd_sequence_order_to_cp_rank_order(tensor, CU, 2, 12)
    assert torch.equal(moved, tensor[ranks[0] + ranks[1]])
    assert torch.equal(tex.thd_cp_rank_order_to_sequence_order(moved, CU, 2, 12), tensor)


# ---- quantized tensors and their products


def matrix(quantized, columnwise=False):
    return matrix_of(quantized, rowwise=not columnwise)


def current(dtype=E4M3, powers_of_two=False, **usage):
    return Float8CurrentScalingQuantizer(dtype, torch.device("cpu"), force_pow_2_scales=powers_of_two, **usage)


def test_tensorwise_scaling_brings_the_largest_value_to_the_largest_number() -> None:
    x = torch.randn(32, 48) * 7
    quantized = current()(x)
    scale = 448 / x.abs().max()
    wanted = (x * scale).to(torch.float8_e4m3fn).float() / scale
    close(tex.dequantize(quantized, FP32), wanted)
    assert torch.equal(quantized._transpose, quantized._data.t())
    assert float(current(powers_of_two=True)(x)._scale_inv.log2() % 1) == 0


def test_delayed_scaling_saturates_and_records_the_largest_value() -> None:
    scale, amax = torch.tensor([2.0]), torch.zeros(1)
    quantized = Float8Quantizer(scale, amax, E4M3)(torch.tensor([[300.0] * 16] * 16))
    assert float(amax) == 300
    close(tex.dequantize(quantized, FP32), torch.full((16, 16), 224.0))  # 448 / 2


@pytest.mark.parametrize("dimension", [1, 2])
def test_blocks_have_their_own_scales(dimension: int) -> None:
    x = torch.randn(256, 384) * torch.logspace(-3, 3, 256)[:, None]
    quantizer = Float8BlockQuantizer(E4M3, rowwise=True, columnwise=True, block_scaling_dim=dimension)
    quantized = quantizer(x)
    rows = 128 if dimension == 2 else 1
    wanted = torch.empty_like(x)
    for i in range(0, 256, rows):
        for j in range(0, 384, 128):
            block = x[i : i + rows, j : j + 128]
            scale = 2.0 ** math.floor(math.log2(448 / float(block.abs().max())))
            wanted[i : i + rows, j : j + 128] = (block * scale).to(torch.float8_e4m3fn).float() / scale
    assert torch.equal(matrix(quantized), wanted)
    if dimension == 2:
        assert torch.equal(matrix(quantized, columnwise=True), wanted)


@pytest.mark.parametrize("usages", [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("kind", ["tensorwise", "blockwise"])
def test_a_tensor_holds_the_sides_that_its_quantizer_asks_for(kind: str, usages: tuple[bool, bool]) -> None:
    make = current if kind == "tensorwise" else (lambda **usage: Float8BlockQuantizer(E4M3, **usage))
    x = torch.randn(128, 256)
    quantizer = make(rowwise=True, columnwise=True)
    quantized = quantizer(x)
    quantizer.set_usage(rowwise=usages[0], columnwise=usages[1])
    tex.quantize(x, quantizer, quantized)
    names = ("_data", "_transpose") if kind == "tensorwise" else ("_rowwise_data", "_columnwise_data")
    assert tuple(getattr(quantized, name) is not None for name in names) == usages


def product(a, b, transa, transb, out=None, dtype=FP32, accumulate=False, **more):
    arguments = (out, None, dtype, more.get("bias"), BF16, False, None, more.get("grad", False), None, 0)
    return tex.generic_gemm(a, transa, b, transb, *arguments, accumulate, True)


def test_products() -> None:
    weight, x, dy, bias = torch.randn(6, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 6), torch.randn(6)
    close(product(weight, x, True, False, bias=bias)[0], F.linear(x, weight, bias))
    close(product(weight, dy, False, False)[0], dy @ weight)
    wanted = dy.flatten(0, 1).t() @ x.flatten(0, 1)
    found, bias_gradient, *_ = product(x, dy, False, True, bias=bias, grad=True)
    close(found, wanted)
    close(bias_gradient, dy.sum((0, 1)))
    total = torch.ones(6, 8)
    product(x, dy, False, True, out=total, accumulate=True)
    close(total, 1 + wanted)


@pytest.mark.parametrize("kind", ["tensorwise", "blockwise"])
def test_fp8_products_multiply_the_rounded_values(kind: str) -> None:
    weight, x = torch.randn(128, 256), torch.randn(384, 256)
    if kind == "tensorwise":
        a, b = current()(weight), current()(x)
    else:
        a = Float8BlockQuantizer(E4M3, rowwise=True, columnwise=True, block_scaling_dim=2)(weight)
        b = Float8BlockQuantizer(E4M3, rowwise=True, columnwise=True, block_scaling_dim=1)(x)
    found = product(a, b, True, False)[0]
    close(found, matrix(b) @ matrix(a).t())
    assert float((found - x @ weight.t()).norm() / (x @ weight.t()).norm()) < 2**-4
    dx = product(a, current(E5M2)(torch.randn(384, 128)), False, False)[0] if kind == "tensorwise" else None
    assert dx is None or dx.shape == x.shape


def assert_layer_is_within_rounding(recipe: Recipe, tokens: int, inputs: int, outputs: int) -> None:
    """Transformer Engine's own layer, forward and backward: the products are within FP8's rounding of exact ones."""
    layer = Linear(inputs, outputs, bias=False, params_dtype=torch.float32, device="cpu")
    x, dy = torch.randn(tokens, inputs, requires_grad=True), torch.randn(tokens, outputs)
    with autocast(enabled=True, recipe=recipe):
        y = layer(x)
    y.backward(dy)
    weight = layer.weight.detach()
    for found, wanted in (
        (y.detach(), x.detach() @ weight.t()),
        (x.grad, dy @ weight),
        (layer.weight.grad, dy.t() @ x.detach()),
    ):
        assert 0 < float((found - wanted).norm() / wanted.norm()) < 2**-4


def test_blocks_may_be_cut_at_the_edges_of_a_matrix() -> None:
    """No side is a multiple of 128."""
    assert_layer_is_within_rounding(Float8BlockScaling(), tokens=48, inputs=208, outputs=80)


def test_products_that_cublas_refuses() -> None:
    x = torch.randn(16, 16)
    with pytest.raises(AssertionError, match="two E5M2"):
        product(current(E5M2)(x), current(E5M2)(x), True, False)
    with pytest.raises(AssertionError, match="the other is not"):
        product(current()(x), x, True, False)
    with pytest.raises(AssertionError, match="an FP8 matrix of"):
        product(current()(torch.randn(16, 24)), current()(torch.randn(16, 24)), True, False)


def grouped(experts, a, b, out, transa, transb, m_splits=None, accumulate=False):
    nothing = [torch.empty(0)] * experts
    arguments = (m_splits, nothing, BF16, m_splits is not None, nothing, transb, [None], 0, accumulate, True, 0)
    tex.te_general_grouped_gemm(a, transa, b, transb, out, FP32, *arguments)


def test_products_of_experts() -> None:
    """The second of three experts has no token."""
    splits, x, dy = [3, 0, 4], torch.randn(7, 8), torch.randn(7, 6)
    weights = torch.randn(3, 6, 8)
    of_expert = torch.tensor([0, 0, 0, 2, 2, 2, 2])
    y = torch.empty(7, 6)
    grouped(3, list(weights), x.split(splits), [y], True, False, splits)
    close(y, torch.einsum("tk,tnk->tn", x, weights[of_expert]))
    dx = torch.empty(7, 8)
    grouped(3, list(weights), dy.split(splits), [dx], False, False, splits)
    close(dx, torch.einsum("tn,tnk->tk", dy, weights[of_expert]))
    wanted = torch.zeros(3, 6, 8).index_add_(0, of_expert, torch.einsum("tn,tk->tnk", dy, x))
    for accumulate in (False, True):
        gradients = torch.ones(3, 6, 8)
        grouped(3, x.split(splits), dy.split(splits), list(gradients), False, True, accumulate=accumulate)
        close(gradients, wanted + (1 if accumulate else 0))


@pytest.mark.parametrize("kind", ["tensorwise", "blockwise"])
def test_fp8_products_of_experts_multiply_the_rounded_values(kind: str) -> None:
    splits, x, weights = [32, 0, 16], torch.randn(48, 256), torch.randn(3, 128, 256)
    if kind == "tensorwise":
        of_x, of_weights = current(), current()
    else:
        of_x, of_weights = (
            Float8BlockQuantizer(E4M3, rowwise=True, columnwise=True, block_scaling_dim=d) for d in (1, 2)
        )
    parts, rounded = (
        tex.split_quantize(x, splits, [of_x] * 3),
        tex.multi_tensor_quantize(list(weights), [of_weights] * 3),
    )
    y = torch.empty(48, 128)
    grouped(3, rounded, parts, [y], True, False, splits)
    close(y[:32], matrix(of_x(x[:32])) @ matrix(of_weights(weights[0])).t())
    close(y[32:], matrix(of_x(x[32:])) @ matrix(of_weights(weights[2])).t())


def test_rows_of_experts_are_padded_and_cut_again() -> None:
    x, padded, cut = torch.randn(7, 4), torch.full((48, 4), 9.0), torch.empty(7, 4)
    tex.fused_multi_row_padding(x, padded, [3, 0, 4], [16, 0, 32])
    wanted = torch.zeros(48, 4)
    wanted[:3], wanted[16:20] = x[:3], x[3:]
    assert torch.equal(padded, wanted)
    tex.fused_multi_row_unpadding(padded, cut, [16, 0, 32], [3, 0, 4])
    assert torch.equal(cut, x)


def test_delayed_scales_come_from_the_largest_values_of_earlier_steps() -> None:
    history, scale = torch.zeros(4, 2), torch.ones(2)
    for amax in ([2.0, 0.0], [8.0, 0.0], [4.0, 0.0]):
        tex.fused_amax_and_scale_update_after_reduction(torch.tensor(amax), [history], [scale], "max", E4M3, 0)
    assert scale.tolist() == [448 / 8, 1.0]  # no value was seen in the second: its scale stays
    tex.fused_amax_and_scale_update_after_reduction(
        torch.tensor([4.0, 1.0]), [history], [scale], "most_recent", E5M2, 1
    )
    assert scale.tolist() == [57344 / 4 / 2, 57344 / 2]


def test_small_helpers() -> None:
    x, amax = torch.randn(4, 3, 5), torch.zeros(1)
    tex.compute_amax(x, amax)
    assert amax == x.abs().max()
    assert torch.equal(tex.swap_first_dims(x, out=None), x.transpose(0, 1))
    data = torch.randint(255, (4, 6), dtype=torch.uint8)
    assert torch.equal(tex.fp8_transpose(data, E4M3, out=None), data.t())
    bias, quantized = tex.bgrad_quantize(torch.ones(16, 32), current())
    assert torch.equal(bias, torch.full((32,), 16.0)) and torch.equal(matrix(quantized), torch.ones(16, 32))
    parts = tex.split_quantize(torch.randn(48, 16), [16, 32], [current(), current()])
    assert [tuple(part.size()) for part in parts] == [(16, 16), (32, 16)]


# ---- lists of tensors


@pytest.mark.parametrize("mode, optimizer", [(0, torch.optim.Adam), (1, torch.optim.AdamW)])
def test_adam(mode: int, optimizer: type) -> None:
    theirs = torch.nn.Parameter(torch.randn(9))
    ours, first, second = theirs.detach().clone(), torch.zeros(9), torch.zeros(9)
    low = ours.bfloat16()
    torch_adam = optimizer([theirs], lr=0.1, betas=(0.9, 0.99), eps=1e-6, weight_decay=0.2)
    for step in (1, 2, 3):
        theirs.grad = torch.randn(9)
        torch_adam.step()
        lists = [[theirs.grad], [low], [first], [second], [ours]]
        tex.multi_tensor_adam(0, None, lists, 0.1, 0.9, 0.99, 1e-6, step, mode, 1, 0.2)
    close(ours, theirs.detach())
    assert torch.equal(low, ours.bfloat16())


def test_norm_scale_and_flag() -> None:
    tensors, flag = [torch.randn(3), torch.randn(2, 2)], torch.zeros(1, dtype=torch.int)
    total, each = tex.multi_tensor_l2norm(0, flag, [tensors], True)
    close(total, torch.cat([t.flatten() for t in tensors]).norm()[None])
    close(each, torch.stack([t.norm() for t in tensors]))
    targets = [torch.empty(3), torch.empty(2, 2)]
    tex.multi_tensor_scale(0, flag, [tensors, targets], 0.5)
    close(targets[1], tensors[1] / 2)
    assert flag == 0
    tex.multi_tensor_scale_tensor(0, flag, [tensors, targets], torch.tensor(2.0))
    close(targets[0], tensors[0] * 2)
    tensors[0][1] = math.inf
    tex.multi_tensor_scale(0, flag, [tensors, targets], 0.5)
    assert flag == 1


def test_scales_of_weights_that_are_stored_in_fp8() -> None:
    amax, scale, inverse = torch.tensor([2.0, 0.0]), torch.empty(2), torch.empty(2)
    tex.multi_tensor_compute_scale_and_scale_inv(0, None, [[amax], [scale], [inverse]], 448.0, False, 0.0)
    assert scale.tolist() == [224.0, 1.0]
    close(inverse, scale.reciprocal())


def test_a_rank_casts_its_part_of_a_weight_like_the_whole() -> None:
    weight = torch.randn(130, 200)
    start, stop = 5_000, 21_000
    amaxes = []
    for part in (slice(0, start), slice(start, stop), slice(stop, None)):
        amax = torch.empty(2, 2)
        offset = part.start or 0
        tex.fp8_block_scaling_compute_partial_amax(weight.flatten()[part], amax, 130, 200, offset, 128)
        amaxes.append(amax)
    whole = torch.stack(amaxes).amax(0)
    wanted = [[weight[i : i + 128, j : j + 128].abs().max() for j in (0, 128)] for i in (0, 128)]
    assert torch.equal(whole, torch.tensor(wanted))
    out = torch.empty(stop - start, dtype=torch.uint8)
    scale = 448 / whole
    tex.fp8_block_scaling_partial_cast(weight.flatten()[start:stop], out, scale, 130, 200, start, 128, E4M3)
    spread = torch.stack([scale[n // 200 // 128, n % 200 // 128] for n in range(start, stop)])
    wanted = (weight.flatten()[start:stop] * spread).clamp(-448, 448).to(torch.float8_e4m3fn)
    assert torch.equal(out.view(torch.float8_e4m3fn).float(), wanted.float())


# ---- the CUDA calls


def test_the_device_is_a_hopper_gpu() -> None:
    assert torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
    tensor = torch.zeros(2).to("cuda")
    assert tensor.is_cuda and not tensor.cpu().is_cuda and not tensor.cpu().detach().is_cuda


def test_a_message_is_awaited_once() -> None:
    waits = []
    message = WaitOnce(SimpleNamespace(wait=lambda: waits.append(1)))
    message.wait()
    message.wait()
    assert waits == [1]
