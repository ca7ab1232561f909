"""cuDNN's fused attention: scores and softmax in fp32, sequence by sequence.

Shapes: S sequence, B batch, T tokens of a pack, H heads, G groups of keys and values, D head size.
"""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tests.emulated_gpu.extension import ENUMS, emulates

_Layout = ENUMS["NVTE_QKV_Layout"]
_THD = _Layout.NVTE_THD_THD_THD
_BATCH_DIMENSION = {_Layout.NVTE_SBHD_SBHD_SBHD: 1, _Layout.NVTE_BSHD_BSHD_BSHD: 0}


@emulates
def get_fused_attn_backend(fused_attn_params: Any) -> tuple[Any, str]:
    return ENUMS["NVTE_Fused_Attn_Backend"].NVTE_F16_arbitrary_seqlen, ""


def _scores(q_SHD: Tensor, k_SHD: Tensor, scale: float, mask_type: Any) -> Tensor:
    """fp32 [H, queries, keys]; what the mask hides is -inf."""
    scores = torch.einsum("qhd,khd->hqk", q_SHD, k_SHD) * scale
    if "CAUSAL" in mask_type.name:
        shift = len(k_SHD) - len(q_SHD) if "BOTTOM_RIGHT" in mask_type.name else 0
        hidden = torch.ones(len(q_SHD), len(k_SHD), dtype=torch.bool).triu(1 + shift)
        scores.masked_fill_(hidden, float("-inf"))
    return scores


def _per_head(kv_SGD: Tensor, heads: int) -> Tensor:
    return kv_SGD.float().repeat_interleave(heads // kv_SGD.shape[1], 1)


def _sequences(cu_q: Tensor, cu_kv: Tensor, cu_q_padded: Any, cu_kv_padded: Any) -> Iterator[tuple[slice, slice]]:
    """Queries, and keys and values, of each sequence: its valid tokens, where the padded sequence begins."""
    sides = []
    for cu, padded in ((cu_q, cu_q_padded), (cu_kv, cu_kv_padded)):
        starts = (cu if padded is None else padded).tolist()
        sides.append(
            [
                slice(start, start + end - begin)
                for start, (begin, end) in zip(starts[:-1], pairwise(cu.tolist()), strict=True)
            ]
        )
    for queries, keys in zip(*sides, strict=True):
        if queries.start < queries.stop and keys.start < keys.stop:
            yield queries, keys


@emulates
def fused_attn_fwd(
    max_q: int, max_kv: int, is_training: bool, scale: float, dropout: float, set_zero: bool, layout: Any,
    o_format: Any, scale_inv_format: Any, bias_type: Any, mask_type: Any, softmax_type: Any, window: Any,
    bottom_right: bool, cu_q: Tensor, cu_kv: Tensor, q: Tensor, k: Tensor, v: Tensor, fake_dtype: Any,
    cu_q_padded: Any, cu_kv_padded: Any, page_k: Any, page_v: Any, s_quantizer: Any, o_quantizer: Any, bias: Any,
    softmax_offset: Any, rng: Any, rng_elts: int, return_max_logit: bool, cuda_graph: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The output, the softmax's log-sum-exp fp32 [T, H, 1], and the state of the random numbers (none are used)."""
    assert dropout == 0 and bias is None and softmax_offset is None and o_quantizer is None and s_quantizer is None
    assert cu_q.dtype == cu_kv.dtype == torch.int32 and not return_max_logit
    no_random = torch.zeros(2, dtype=torch.int64)
    if layout != _THD:
        assert not is_training, "a padded batch is emulated without gradients"
        return _batch_forward(q, k, v, layout, mask_type, scale, cu_q, cu_kv), torch.empty(0), no_random
    assert tuple(window) in ((-1, -1), (-1, 0)), window
    heads = q.shape[1]
    out = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    stats = torch.full((len(q), heads, 1), float("-inf"))
    for queries, keys in _sequences(cu_q, cu_kv, cu_q_padded, cu_kv_padded):
        assert queries.stop - queries.start <= max_q and keys.stop - keys.start <= max_kv, (max_q, max_kv)
        scores = _scores(q[queries].float(), _per_head(k[keys], heads), scale, mask_type)
        logsumexp = scores.logsumexp(-1)
        weights = (scores - logsumexp[..., None]).exp()
        out[queries] = torch.einsum("hqk,khd->qhd", weights, _per_head(v[keys], heads)).to(out.dtype)
        stats[queries, :, 0] = logsumexp.t()
    return out, stats, no_random


def _batch_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: Any, mask_type: Any, scale: float, cu_q: Tensor, cu_kv: Tensor
) -> Tensor:
    """Each sequence of a padded batch is as long as `cu_q` and `cu_kv` say."""
    dimension, heads = _BATCH_DIMENSION[layout], q.shape[2]
    out = torch.zeros_like(q)
    for row, (queries, keys) in enumerate(zip(cu_q.diff().tolist(), cu_kv.diff().tolist(), strict=True)):
        q_SHD, k_SGD, v_SGD = (tensor.select(dimension, row) for tensor in (q, k, v))
        weights = _scores(q_SHD[:queries].float(), _per_head(k_SGD[:keys], heads), scale, mask_type).softmax(-1)
        found = torch.einsum("hqk,khd->qhd", weights, _per_head(v_SGD[:keys], heads))
        out.select(dimension, row)[:queries] = found.to(q.dtype)
    return out


@emulates
def fused_attn_bwd(
    max_q: int, max_kv: int, scale: float, dropout: float, set_zero: bool, layout: Any, o_format: Any,
    do_format: Any, dqkv_layout: Any, scale_inv_format: Any, do_scale_inv_format: Any, bias_type: Any,
    mask_type: Any, softmax_type: Any, window: Any, bottom_right: bool, deterministic: bool, cu_q: Tensor,
    cu_kv: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, do: Tensor, fake_dtype: Any, aux: Any,
    cu_q_padded: Any, cu_kv_padded: Any, s_quantizer: Any, dp_quantizer: Any, dqkv_quantizer: Any, cuda_graph: bool,
) -> tuple[Tensor, Tensor, Tensor, None, None]:  # fmt: skip
    assert layout == _THD and dropout == 0, (layout, dropout)
    heads, groups, stats = q.shape[1], k.shape[1], aux[0]
    dq, dk, dv = (torch.zeros_like(tensor) for tensor in (q, k, v))

    def per_group(gradient_SHD: Tensor) -> Tensor:
        return gradient_SHD.unflatten(1, (groups, -1)).sum(2).to(k.dtype)

    for queries, keys in _sequences(cu_q, cu_kv, cu_q_padded, cu_kv_padded):
        query, key, value = q[queries].float(), _per_head(k[keys], heads), _per_head(v[keys], heads)
        gradient = do[queries].float()
        weights = (_scores(query, key, scale, mask_type) - stats[queries, :, 0].t()[..., None]).exp()
        delta = (o[queries].float() * gradient).sum(-1).t()[..., None]
        dscores = weights * (torch.einsum("qhd,khd->hqk", gradient, value) - delta) * scale
        dq[queries] = torch.einsum("hqk,khd->qhd", dscores, key).to(q.dtype)
        dk[keys] = per_group(torch.einsum("hqk,qhd->khd", dscores, query))
        dv[keys] = per_group(torch.einsum("hqk,qhd->khd", weights, gradient))
    return dq, dk, dv, None, None


def _rows(cu_seqlens: Tensor) -> Iterator[tuple[int, int, int]]:
    """Of each sequence: its row of a batch, its first token of a pack, and the token after its last."""
    for row, (start, end) in enumerate(pairwise(cu_seqlens.tolist())):
        yield row, start, end


@emulates
def convert_thd_to_bshd(tensor_THD: Tensor, cu_seqlens: Tensor, batch_size: int, max_length: int) -> Tensor:
    """A pack as a batch [B, S, H, D], padded with zeros: what attention that is not fused works on."""
    out = torch.zeros(batch_size, max_length, *tensor_THD.shape[1:], dtype=tensor_THD.dtype)
    for row, start, end in _rows(cu_seqlens):
        out[row, : end - start] = tensor_THD[start:end]
    return out


@emulates
def convert_bshd_to_thd(tensor_BSHD: Tensor, cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    out = torch.zeros(num_tokens, *tensor_BSHD.shape[2:], dtype=tensor_BSHD.dtype)
    for row, start, end in _rows(cu_seqlens):
        out[start:end] = tensor_BSHD[row, : end - start]
    return out
