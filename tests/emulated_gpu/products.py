"""cuBLASLt's matrix products."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from tests.emulated_gpu.device import IS_BLACKWELL
from tests.emulated_gpu.extension import ENUMS, emulates
from tests.emulated_gpu.float8 import torch_dtype
from tests.emulated_gpu.mxfp8 import is_mxfp8
from tests.emulated_gpu.quantization import is_blockwise, is_quantized, matrix_of, quantize

_WIDTH_MULTIPLE = 16  # cuBLASLt refuses another leading dimension of an FP8 matrix


def _check_fp8(operands: tuple[Any, Any], matrices: tuple[Tensor, Tensor], use_split_accumulator: bool) -> None:
    """Raise AssertionError for a product that cuBLASLt refuses."""
    assert all(map(is_quantized, operands)), "one operand is FP8, the other is not"
    e5m2 = ENUMS["DType"].kFloat8E5M2
    assert any(int(each._fp8_dtype) != e5m2 for each in operands), "cuBLASLt has no product of two E5M2 matrices"
    for matrix in matrices:
        assert all(side % _WIDTH_MULTIPLE == 0 for side in matrix.shape), f"an FP8 matrix of {tuple(matrix.shape)}"
    if any(map(is_mxfp8, operands)):
        assert all(map(is_mxfp8, operands)) and IS_BLACKWELL, "MXFP8 multiplies MXFP8, on Blackwell"
    if any(map(is_blockwise, operands)):
        assert all(map(is_blockwise, operands)) and use_split_accumulator
        assert not all(each._is_2D_scaled for each in operands), "no product of two matrices with 2D blocks"


@emulates
def generic_gemm(
    A: Any, transA: bool, B: Any, transB: bool, D: Any, quantizer: Any, output_dtype: Any, bias: Any, bias_type: Any,
    gelu: bool, gelu_in: Any, grad: bool, workspace: Any, workspace_size: int, accumulate: bool,
    use_split_accumulator: bool, comm_overlap: Any = None, comm_type: Any = None, extra_output: Any = None,
    bulk_overlap: bool = False, alpha: float = 1.0, beta: float | None = None,
) -> tuple[Any, Tensor | None, None, None]:  # fmt: skip
    """op(B) op(A) in fp32, as column-major cuBLAS sees op(A) op(B); the sum of B's rows is the bias' gradient."""
    assert comm_overlap is None and extra_output is None and not gelu and not bulk_overlap
    a, b = matrix_of(A, transA), matrix_of(B, not transB)
    if is_quantized(A) or is_quantized(B):
        _check_fp8((A, B), (a, b), use_split_accumulator)
    left, right = (b.t() if transB else b), (a.t() if transA else a)
    result = alpha * (left.float() @ right.float())
    dtype = torch_dtype(output_dtype) if output_dtype is not None else A.dtype
    bias_gradient = b.float().sum(0).to(dtype) if bias is not None and grad else None
    if bias is not None and not grad:
        result = result + bias.float()
    shape = result.shape if transB else (*B.size()[:-1], result.shape[-1])
    result = result.reshape(shape)
    if D is None:
        assert not accumulate
        result = result.to(dtype)
        return (result if quantizer is None else quantize(result, quantizer)), bias_gradient, None, None
    assert D.shape == result.shape and (output_dtype is None or D.dtype == dtype), (D.shape, D.dtype)
    D.copy_(D.float() + result if accumulate else result)
    return D, bias_gradient, None, None


@emulates
def te_general_grouped_gemm(
    A: Sequence[Any], transA: bool, B: Sequence[Any], transB: bool, D: Sequence[Tensor], output_dtype: Any,
    m_splits: Sequence[int] | None, bias: Sequence[Tensor], bias_type: Any, single_output: bool,
    gelu_in: Sequence[Tensor], grad: bool, workspaces: Any, workspace_size: int, accumulate: bool,
    use_split_accumulator: bool, sm_count: int,
) -> Sequence[Tensor]:  # fmt: skip
    """One product for each expert, into tensors of their own or, one after another, into the rows of a single one.

    An expert without tokens multiplies nothing: its output is zero where there is one.
    """
    assert not any(each.numel() for each in (*bias, *gelu_in)), "no bias and no GELU is emulated here"
    outputs = D[0].split(list(m_splits or [])) if single_output else D
    for a, b, out in zip(A, B, outputs, strict=True):
        if 0 in (*a.size(), *b.size()):
            if not accumulate:
                out.zero_()
            continue
        rest = (None, output_dtype, None, bias_type, False, None, grad, None, workspace_size)
        generic_gemm(a, transA, b, transB, out, *rest, accumulate, use_split_accumulator)
    return bias
