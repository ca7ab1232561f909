"""A layout or FP8 setting that does not fit a model is refused; sequences, packs and vocabulary are padded evenly."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_solopo.architecture.experts import ExpertShape
from megatron_solopo.architecture.huggingface_config import Architecture, read_architecture
from megatron_solopo.architecture.layout import (
    check_exchange_by_heads,
    check_fp8,
    check_layout,
    check_training,
    check_world_size,
    describe_bubble,
    pack_multiple,
    padded_vocab_size,
    sequence_multiple,
    wanted_packs,
)
from megatron_solopo.config import ModelConfig, MoEConfig, ObjectiveConfig, OptimizerConfig, ParallelConfig
from megatron_solopo.data.loader import Packing
from megatron_solopo.data.packing import TokenizedTriplet, build_pack
from megatron_solopo.errors import UserError
from megatron_solopo.parallel.context import shard_indices
from megatron_solopo.plan.pipeline import pipeline_bubble
from tests.tiny_models import FAMILIES

TP2, CP2, PP2 = ({f"{name}_parallel_size": 2} for name in ("tensor_model", "context", "pipeline_model"))
VPP2 = PP2 | {"virtual_pipeline_model_parallel_size": 2}


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    """4 layers, 4 heads, 2 key-value heads, 48 feed-forward columns."""
    path = tmp_path_factory.mktemp("model")
    FAMILIES["llama3"].save_pretrained(path)
    return read_architecture(path)


def sizes(tensor: int = 1, pipeline: int = 1, chunks: int | None = None, **more: Any) -> ParallelConfig:
    return ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=chunks,
        **more,
    )


@pytest.mark.parametrize(
    "parallel",
    [
        sizes(),
        sizes(2),
        sizes(4),
        sizes(pipeline=4),
        sizes(pipeline=2, chunks=2),
        sizes(4, 2),
        sizes(2, 2, 2),
        sizes(sequence_parallel=False),
        sizes(2, sequence_parallel=True),
        sizes(context_parallel_size=8),
        sizes(context_parallel_size=16, cp_comm_type="a2a"),
        sizes(cpu_offloading_num_layers=3),
    ],
)
def test_a_layout_that_divides_the_model_is_accepted(architecture: Architecture, parallel: ParallelConfig) -> None:
    check_layout(architecture, parallel)


@pytest.mark.parametrize(
    ("parallel", "changes", "words"),
    [
        (sizes(3), {}, ["tensor_model_parallel_size=3", "4 attention heads"]),
        (sizes(8), {}, ["tensor_model_parallel_size=8", "4 attention heads"]),
        (sizes(4), {"ffn_hidden_size": 50}, ["tensor_model_parallel_size=4", "50 feed-forward columns"]),
        (sizes(4), {"num_query_groups": 6, "num_attention_heads": 12}, ["tensor_model_parallel_size=4", "6 key-value"]),
        (sizes(sequence_parallel=True), {}, ["sequence_parallel=true", "tensor_model_parallel_size > 1"]),
        (sizes(chunks=2), {}, ["virtual_pipeline_model_parallel_size=2", "pipeline_model_parallel_size > 1"]),
        (sizes(pipeline=3), {}, ["4 layers", "3 pipeline stages", "pipeline_model_parallel_size"]),
        (sizes(pipeline=2, chunks=3), {}, ["4 layers", "6 pipeline stages", "virtual_pipeline_model_parallel_size"]),
        (sizes(pipeline=8), {}, ["4 layers", "8 pipeline stages"]),
        (sizes(cpu_offloading_num_layers=4), {}, ["cpu_offloading_num_layers=4", "4 layers"]),
        (sizes(pipeline=2, cpu_offloading_num_layers=1), {}, ["cpu_offloading_num_layers=1", "pipeline"]),
        (
            sizes(cpu_offloading_num_layers=1, recompute_granularity="full"),
            {},
            ["cpu_offloading_num_layers=1", "recompute_granularity=null"],
        ),
    ],
)
def test_another_is_refused_with_the_numbers_and_the_key(architecture, parallel, changes, words) -> None:
    with pytest.raises(UserError) as error:
        check_layout(replace(architecture, **changes), parallel)
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message


@pytest.mark.parametrize(
    ("parallel", "words"),
    [
        (sizes(context_parallel_size=2, cp_comm_type="a2a"), None),
        (sizes(context_parallel_size=16), None),
        (sizes(context_parallel_size=8, cp_comm_type="a2a+p2p", hierarchical_context_parallel_sizes=[2, 4]), None),
        (
            sizes(2, context_parallel_size=2, cp_comm_type="a2a"),
            "cp_comm_type=a2a: the 1 key-value heads .*context_parallel_size=2; set .*p2p",
        ),
        (
            sizes(2, context_parallel_size=4, cp_comm_type="a2a+p2p", hierarchical_context_parallel_sizes=[2, 2]),
            r"cp_comm_type=a2a\+p2p: the 1 key-value heads .*hierarchical_context_parallel_sizes=2; set .*p2p",
        ),
        (sizes(context_parallel_size=3, cp_comm_type="a2a"), "4 attention heads .*context_parallel_size=3"),
    ],
)
def test_an_exchange_by_heads_needs_heads_that_divide(architecture, parallel, words: str | None) -> None:
    if words is None:
        check_exchange_by_heads(architecture, parallel)
        return
    with pytest.raises(UserError, match=words):
        check_exchange_by_heads(architecture, parallel)


@given(st.integers(1, 300_000), st.sampled_from([1, 2, 4, 8]))
def test_the_padded_vocabulary_is_the_least_that_splits_into_multiples_of_128(vocab: int, size: int) -> None:
    padded = padded_vocab_size(vocab, size)
    assert padded % (128 * size) == 0 and padded - 128 * size < vocab <= padded


@pytest.mark.parametrize(("world_size", "sizes"), [(1, {}), (3, {}), (4, TP2), (8, TP2 | CP2 | PP2), (6, VPP2)])
def test_a_world_of_whole_replicas_is_accepted(world_size, sizes) -> None:
    check_world_size(ParallelConfig(**sizes), world_size)


@pytest.mark.parametrize(("world_size", "sizes"), [(1, TP2), (3, CP2), (12, TP2 | CP2 | PP2), (6, TP2 | PP2)])
def test_another_world_size_is_refused_with_sizes_and_keys(world_size, sizes) -> None:
    config = ParallelConfig(**sizes)
    with pytest.raises(UserError) as error:
        check_world_size(config, world_size)
    message = str(error.value)
    assert message.startswith(f"{world_size} processes") and "\n" not in message
    for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        assert f"{key}={getattr(config, key)}" in message
    assert f"needs a multiple of {config.model_parallel_size}: parallel." in message
    assert f"--nproc-per-node {config.model_parallel_size} " in message


# What cuBLAS asks for, as in Megatron-Core's `get_fp8_align_size`.
TOKENS_PER_RANK = {"delayed": 16, "tensorwise": 16, "mxfp8": 32, "blockwise": 16}
ROLES = ObjectiveConfig().roles.all
SIZES = st.sampled_from([1, 2, 4, 8])
LENGTHS = st.lists(st.tuples(*[st.integers(1, 90)] * 4), min_size=1, max_size=3)


def model(**settings: object) -> ModelConfig:
    return ModelConfig.model_validate({"path": "model", **settings})


@given(SIZES, SIZES, st.sampled_from(list(TOKENS_PER_RANK)), LENGTHS)
def test_every_rank_holds_a_multiple_of_tokens(context: int, tensor: int, recipe: str, lengths: list) -> None:
    multiple = pack_multiple(tensor, context, model(fp8="hybrid", fp8_recipe=recipe))
    names = ("short", "long", "chosen", "rejected")
    rows = [
        TokenizedTriplet(str(i), i, {n: np.ones(k, int) for n, k in zip(names[:2], row[:2], strict=True)},
                         {n: np.ones(k, int) for n, k in zip(names[2:], row[2:], strict=True)})
        for i, row in enumerate(lengths)
    ]  # fmt: skip
    pack = build_pack(rows, ROLES, sequence_multiple(context), multiple, share_prompts=False)
    plain = build_pack(rows, ROLES, sequence_multiple(context), share_prompts=False)
    for rank in range(context):
        assert len(shard_indices(pack.cu_seqlens_B1, context, rank)) % (tensor * TOKENS_PER_RANK[recipe]) == 0
    assert 0 <= pack.padded_tokens - plain.padded_tokens < multiple
    assert pack.cu_seqlens_B1[:-1].tolist() == plain.cu_seqlens_B1[:-1].tolist()
    assert pack.response_rows_N.tolist() == plain.response_rows_N.tolist()
    assert pack.tokens_T[: plain.padded_tokens].tolist() == plain.tokens_T.tolist()


def test_only_sequence_parallelism_gathers_whole_blocks_of_tokens() -> None:
    blockwise = model(fp8="hybrid", fp8_recipe="blockwise")
    assert pack_multiple(1, 8, blockwise) == 8 * 16
    assert pack_multiple(8, 8, blockwise) == 8 * 8 * 128


@pytest.mark.parametrize(
    ("tensor", "context", "multiple"), [(1, 1, 1), (8, 1, 8), (1, 4, 8), (2, 4, 8), (8, 4, 32), (6, 2, 12)]
)
def test_without_fp8_a_pack_divides_over_its_ranks_and_chunks(tensor: int, context: int, multiple: int) -> None:
    assert pack_multiple(tensor, context) == pack_multiple(tensor, context, model()) == multiple
    assert multiple % (tensor * context) == multiple % sequence_multiple(context) == 0


@pytest.mark.parametrize("stages", [1, 2, 8])
@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("rounds", [1, 4])
def test_the_bubble_of_equal_packs_is_that_of_the_schedule(stages: int, chunks: int, rounds: int) -> None:
    """(PP - 1) / (VPP x packs + PP - 1)."""
    packs = rounds * stages
    parallel = sizes(pipeline=stages, chunks=chunks if chunks > 1 and stages > 1 else None)
    expected = (stages - 1) / ((parallel.virtual_pipeline_model_parallel_size or 1) * packs + stages - 1)
    assert pipeline_bubble(parallel, packs) == pytest.approx(expected)


def test_uneven_stages_wait_for_the_longest() -> None:
    uneven = sizes(pipeline=2, pipeline_model_parallel_layout="Et|t*4L")
    assert pipeline_bubble(uneven, 1000) == pytest.approx((5 - 2) / (2 * 5), rel=0.01)
    balanced = sizes(pipeline=4, pipeline_model_parallel_layout="Et*7|(t*8|)*2t*7L")
    assert pipeline_bubble(balanced, 16) == pytest.approx(pipeline_bubble(sizes(pipeline=4), 16))


@pytest.mark.parametrize(("stages", "packs", "is_warned"), [(1, 1, False), (8, 32, False), (8, 16, True), (2, 1, True)])
def test_a_large_bubble_is_warned_of_and_the_wanted_packs_avoid_it(stages: int, packs: int, is_warned: bool) -> None:
    said = describe_bubble(pipeline_bubble(sizes(pipeline=stages), packs))
    assert said.startswith("warning: ") is is_warned is ("training.global_batch_size" in said)
    assert is_warned or packs >= wanted_packs(stages)


@given(st.integers(1, 5000), st.sampled_from([1, 16, 96, 128, 1024]))
def test_a_pack_filled_to_its_budget_stays_within_it_when_padded(budget: int, multiple: int) -> None:
    packing = Packing(2, True, budget, dp_rank=0, dp_size=1, pack_multiple=multiple)
    fullest = packing.max_sequence_tokens
    assert -(-fullest // multiple) * multiple <= budget
    assert -(-(fullest + 1) // multiple) * multiple > budget


EXPERTS = ExpertShape(num_experts=12, topk=2, ffn_hidden_size=24, renormalizes=True, layers=(True,) * 4)
EP = "expert_model_parallel_size"
EXPERT_TP = "expert_tensor_parallel_size"
DISPATCHER = "moe_token_dispatcher_type"


@pytest.mark.parametrize("sizes", [{}, {EP: 4}, {EP: 12} | TP2, {EP: 2, EXPERT_TP: 1} | TP2, {EP: 3, EXPERT_TP: 4}])
def test_a_layout_that_divides_the_experts_is_accepted(architecture: Architecture, sizes: dict[str, int]) -> None:
    model, parallel = replace(architecture, experts=EXPERTS), ParallelConfig(**sizes)
    check_layout(model, parallel)
    check_training(model, parallel, OptimizerConfig(), MoEConfig(router_trainable=True))


@pytest.mark.parametrize(
    ("experts", "sizes", "words"),
    [
        (None, {EP: 2}, ["expert_model_parallel_size=2", "llama has none"]),
        (None, {EXPERT_TP: 2}, ["expert_tensor_parallel_size=2", "llama has none"]),
        (None, {DISPATCHER: "flex"}, ["moe_token_dispatcher_type=flex", "llama has none"]),
        (EXPERTS, {DISPATCHER: "flex"}, ["moe_token_dispatcher_type=flex", "expert_model_parallel_size > 1"]),
        (EXPERTS, {EP: 5}, ["expert_model_parallel_size=5", "12 experts"]),
        (EXPERTS, {EP: 2, EXPERT_TP: 5}, ["expert_tensor_parallel_size=5", "24 feed-forward columns", "set it to 1"]),
        (EXPERTS, {EXPERT_TP: 1} | TP2, ["expert_tensor_parallel_size=1", "expert_model_parallel_size > 1"]),
        (replace(EXPERTS, shared_ffn_hidden_size=7), TP2, ["does not divide", "7 feed-forward", "shared expert"]),
    ],
)
def test_another_layout_of_experts_is_refused(architecture, experts, sizes, words) -> None:
    with pytest.raises(UserError) as error:
        check_layout(replace(architecture, experts=experts), ParallelConfig(**sizes))
    assert all(word in str(error.value) for word in words), error.value


def test_experts_train_with_sequence_parallelism_alone(architecture: Architecture) -> None:
    model, parallel = replace(architecture, experts=EXPERTS), ParallelConfig(**TP2, sequence_parallel=False)
    check_layout(model, parallel)  # generation runs so
    check_training(architecture, parallel, OptimizerConfig(), MoEConfig())
    with pytest.raises(UserError, match=r"sequence_parallel=false .*experts.*set it to true"):
        check_training(model, parallel, OptimizerConfig(), MoEConfig())


def test_settings_of_routers_need_routers(architecture: Architecture) -> None:
    with pytest.raises(
        UserError, match=r"moe.router_trainable=true needs a model with experts; llama has none; set it to false"
    ):
        check_training(architecture, ParallelConfig(), OptimizerConfig(), MoEConfig(router_trainable=True))


def test_every_stage_has_experts_or_the_optimizer_is_distributed(architecture: Architecture) -> None:
    model = replace(architecture, experts=replace(EXPERTS, layers=(False, False, True, True)))
    parallel, plain = ParallelConfig(**{EP: 2}, **PP2), OptimizerConfig(use_distributed_optimizer=False)
    check_training(model, parallel, OptimizerConfig(), MoEConfig())
    check_training(replace(architecture, experts=EXPERTS), parallel, plain, MoEConfig())
    with pytest.raises(UserError, match=r"use_distributed_optimizer=false .*stage \(here 0\) has no experts"):
        check_training(model, parallel, plain, MoEConfig())


def test_experts_need_whole_groups_of_a_stages_ranks() -> None:
    check_world_size(ParallelConfig(**{EP: 4}, **PP2), 16)
    with pytest.raises(UserError, match=r"expert_model_parallel_size=3 x expert_tensor_parallel_size=1.*the 8 ranks"):
        check_world_size(ParallelConfig(**{EP: 3}, **PP2), 16)


def test_optimizer_instances_divide_the_ranks_of_an_expert() -> None:
    sizes = {EP: 4, "num_distributed_optimizer_instances": 2}
    check_world_size(ParallelConfig(**sizes), 8)
    with pytest.raises(UserError, match=r"instances=2 does not divide the 1 ranks \(those with the same experts\)"):
        check_world_size(ParallelConfig(**sizes), 4)


def test_an_experts_columns_fit_fp8(architecture: Architecture) -> None:
    model = ModelConfig(path="unused", fp8="e4m3", dtype="bfloat16")
    wide = replace(architecture, hidden_size=64, head_dim=16, experts=replace(EXPERTS, ffn_hidden_size=32))
    check_fp8(wide, model, ParallelConfig(**{EP: 2}), OptimizerConfig())
    with pytest.raises(UserError, match=r"columns of an expert / expert TP is 8"):
        narrow = replace(wide, experts=replace(EXPERTS, ffn_hidden_size=8))
        check_fp8(narrow, model, ParallelConfig(**{EP: 2}), OptimizerConfig())
