"""FP8's multiples: every rank's share of every pack suits its kernels, and budgets hold."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_solopo.architecture.fp8 import pack_multiple
from megatron_solopo.config import ModelConfig, ObjectiveConfig, ParallelConfig
from megatron_solopo.data.loader import Packing
from megatron_solopo.data.packing import TokenizedTriplet, build_pack
from megatron_solopo.parallel.context import shard_indices

# Transformer Engine's documentation of its recipes, and Megatron-Core's padding for them.
TOKENS_PER_RANK = {"delayed": 16, "tensorwise": 16, "mxfp8": 32, "blockwise": 128}
ROLES = ObjectiveConfig().roles.all
SIZES = st.sampled_from([1, 2, 4, 8])
LENGTHS = st.lists(st.tuples(*[st.integers(1, 90)] * 4), min_size=1, max_size=3)


def layouts(context: int, tensor: int, **model: object) -> tuple[ParallelConfig, ModelConfig]:
    parallel = ParallelConfig(context_parallel_size=context, tensor_model_parallel_size=tensor)
    return parallel, ModelConfig.model_validate({"path": "model", **model})


@given(SIZES, SIZES, st.sampled_from(list(TOKENS_PER_RANK)), LENGTHS)
def test_every_rank_holds_a_multiple_of_tokens(context: int, tensor: int, recipe: str, lengths: list) -> None:
    multiple = pack_multiple(*layouts(context, tensor, fp8="hybrid", fp8_recipe=recipe))
    names = ("short", "long", "chosen", "rejected")
    rows = [
        TokenizedTriplet(str(i), i, {n: np.ones(k, int) for n, k in zip(names[:2], row[:2], strict=True)},
                         {n: np.ones(k, int) for n, k in zip(names[2:], row[2:], strict=True)})
        for i, row in enumerate(lengths)
    ]  # fmt: skip
    pack = build_pack(rows, ROLES, 2 * context * tensor, multiple)
    plain = build_pack(rows, ROLES, 2 * context * tensor)
    for rank in range(context):
        assert len(shard_indices(pack.cu_seqlens_S1, context, rank)) % (tensor * TOKENS_PER_RANK[recipe]) == 0
    assert 0 <= pack.padded_tokens - plain.padded_tokens < multiple
    assert pack.cu_seqlens_S1[:-1].tolist() == plain.cu_seqlens_S1[:-1].tolist()
    assert pack.response_rows_N.tolist() == plain.response_rows_N.tolist()
    assert pack.tokens_T[: plain.padded_tokens].tolist() == plain.tokens_T.tolist()


@pytest.mark.parametrize("fp8", [None, "hybrid"])
def test_without_fp8_packs_are_not_padded(fp8: str | None) -> None:
    assert (pack_multiple(*layouts(4, 2, fp8=fp8)) == 1) is (fp8 is None)


@given(st.integers(1, 5000), st.sampled_from([1, 16, 96, 128, 1024]))
def test_a_pack_filled_to_its_budget_stays_within_it_when_padded(budget: int, multiple: int) -> None:
    packing = Packing(2, budget, dp_rank=0, dp_size=1, pack_multiple=multiple)
    fullest = packing.max_sequence_tokens
    assert -(-fullest // multiple) * multiple <= budget
    assert -(-(fullest + 1) // multiple) * multiple > budget
