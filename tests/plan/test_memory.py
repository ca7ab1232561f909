"""The estimate against real training on gloo ranks: state to the byte, activations within 10 %."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_solopo.architecture.huggingface_config import Architecture, read_architecture
from megatron_solopo.architecture.pipeline_schedule import peak_in_flight, stage_order
from megatron_solopo.config import Config
from megatron_solopo.parallel import topology
from megatron_solopo.parallel.megatron_internals import simulated_rank
from megatron_solopo.plan.activations import element_bytes
from megatron_solopo.plan.memory import PeakActivations, Reserve, peak_activations, rank_state, stage_memory
from megatron_solopo.plan.parameters import ModelChunk, model_chunks, ranks_of_a_copy, sharing_ranks
from megatron_solopo.plan.workload import PackShape, pack_shape
from tests.distributed import run_distributed
from tests.layouts import cp, ep, pp, stages, tp
from tests.plan.memory_ranks import Case, MemoryInUse, expert_groups, run_cases, shapes
from tests.tiny_models import FAMILIES

ACTIVATION_TOLERANCE = 0.10
BF16 = {"dtype": "bfloat16"}
FULL = {"recompute_granularity": "full"}
CORE = {"recompute_granularity": "selective"}
MLP = {"recompute_granularity": "selective", "recompute_modules": ["mlp", "core_attn"]}


ONE = [
    Case("one"),
    Case("one-bf16", model=BF16),
    Case("one-unshared", model=BF16, share_prompts=False),
    Case("one-instructions", model=BF16, objective={"name": "sft"}),
    Case("one-core-unshared", parallel=CORE, share_prompts=False),
    Case("one-bf16-plain-optimizer", model=BF16, distributed_optimizer=False),
    Case("one-core", parallel=CORE, model=BF16),
    Case("one-mlp", parallel=MLP),
    Case("one-full", parallel=FULL, model=BF16),
    Case("one-full-2", parallel=FULL | {"recompute_num_layers": 2}),
    Case("one-block", parallel=FULL | {"recompute_num_layers": 3, "recompute_method": "block"}),
    Case("one-chunks", chunk_tokens=16, family="qwen2_tied"),
    Case("one-qwen3", family="qwen3", model=BF16),
    Case("one-tokens", objective={"token_alignment": "reverse_kl"}),
    Case("one-tokens-chunks", objective={"token_alignment": "reverse_kl"}, chunk_tokens=16),
]
TWO = [
    Case("dp2"),
    Case("dp2-bf16-small-gradients", model=BF16, optimizer={"grad_reduce_in_fp32": False}),
    Case("dp2-plain-optimizer", distributed_optimizer=False, model=BF16),
    Case("tp2", parallel=tp(2), model=BF16),
    Case("tp2-full", parallel=tp(2, **FULL)),
    Case("tp2-no-sp", parallel=tp(2, sequence_parallel=False)),
    Case("cp2-full", parallel=cp(2, **FULL), family="qwen2"),
    Case("cp2", parallel=cp(2)),
    Case("cp2-unshared", parallel=cp(2), share_prompts=False),
    Case("cp2-core", parallel=cp(2, **CORE), model=BF16),
    Case("cp2-mlp", parallel=cp(2, **MLP)),
    Case("pp2", parallel=pp(2), model=BF16),
    Case("pp2-tied", parallel=pp(2), family="qwen2_tied"),
    Case("vpp2-tied", parallel=pp(2, 2), family="qwen2_tied", model=BF16),
    Case("pp2-uneven", parallel=pp(2, **stages("Ettt|tL")), model=BF16),
    Case("vpp2-uneven-block", parallel=pp(2, 2, **stages("E|tt|t|tL"), **FULL, recompute_method="block")),
    Case("pp2-full", parallel=pp(2, **FULL)),
    Case("pp2-core", parallel=pp(2, **CORE), model=BF16),
]
FOUR = [
    Case("tp4-more-than-kv-heads", parallel=tp(4), family="qwen3"),
    Case("tp2-pp2-tied", parallel=tp(2) | pp(2), family="qwen2_tied", model=BF16),
    Case("tp2-dp2", parallel=tp(2), family="qwen2", model=BF16),
    Case("pp4-ends-alone", parallel=pp(4, **stages("E|ttt|t|L")), family="qwen2_tied"),
    Case("pp2-dp2-tied", parallel=pp(2), family="qwen2_tied"),
    Case("pp2-vpp2-cp2", parallel=pp(2, 2) | cp(2), model=BF16),
    Case("cp2-dp2", parallel=cp(2), family="qwen3", model=BF16),
    Case("cp4-full", parallel=cp(4, **FULL), family="qwen2", model=BF16),
    Case("tp2-cp2", parallel=tp(2) | cp(2), model=BF16),
    Case("tp2-pp2-full", parallel=tp(2) | pp(2, **FULL), model=BF16),
]
MOE_ONE = [
    Case("moe-one", family="qwen3_moe"),
    Case("moe-one-router", family="qwen2_moe", model=BF16, moe={"router_trainable": True}),
    Case("moe-one-full", family="mixtral", parallel=FULL, model=BF16),
]
MOE_TWO = [
    Case("moe-ep2", family="qwen3_moe", parallel=ep(2), model=BF16),
    Case("moe-ep2-plain-optimizer", family="qwen2_moe", parallel=ep(2), distributed_optimizer=False),
    Case("moe-ep2-cp2", family="qwen2_moe", parallel=ep(2) | cp(2)),
    Case("moe-ep2-idle-experts", family="qwen3_moe", parallel=ep(2), idle_experts=8),
    Case("moe-tp2", family="qwen2_moe", parallel=tp(2), model=BF16),
    Case("moe-pp2", family="qwen2_moe", parallel=pp(2)),
    Case("moe-tp2-all-heads", family="olmoe", parallel=tp(2), model=BF16),
]
MOE_FOUR = [
    Case("moe-ep2-tp2", family="qwen2_moe", parallel=ep(2) | tp(2)),
    Case("moe-ep2-tp2-etp1", family="qwen3_moe", parallel=ep(2, expert_tensor_parallel_size=1) | tp(2), model=BF16),
    Case("moe-ep4-tp2-etp1", family="qwen2_moe", parallel=ep(4, expert_tensor_parallel_size=1) | tp(2), model=BF16),
    Case("moe-ep2-pp2", family="qwen2_moe", parallel=ep(2) | pp(2), model=BF16),
    Case("moe-ep2-dp4-small-gradients", family="mixtral", parallel=ep(2), optimizer={"grad_reduce_in_fp32": False}),
    Case("moe-ep2-pp2-vpp2-full", family="qwen3_moe", parallel=ep(2) | pp(2, 2, **FULL)),
]
LORA = {"rank": 4}
ATTENTION = {"rank": 4, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}
DROPOUT = LORA | {"dropout": 0.1}
LORA_ONE = [
    Case("lora-one", lora=LORA),
    Case("lora-one-bf16-plain-optimizer", lora=LORA, model=BF16, distributed_optimizer=False),
    Case("lora-one-proj-up-qwen3", family="qwen3", lora={"rank": 3, "target_modules": ["o_proj", "up_proj"]}),
    Case("lora-one-down", lora={"rank": 8, "target_modules": ["down_proj"]}, model=BF16),
    Case("lora-one-gate-down", lora={"rank": 8, "target_modules": ["gate_proj", "down_proj"]}),
    Case("lora-one-query", lora={"rank": 4, "target_modules": ["q_proj"]}, family="qwen2_tied", chunk_tokens=16),
    Case("lora-one-mlp", lora=ATTENTION, parallel=MLP),
    Case("lora-one-full", lora=LORA, parallel=FULL, model=BF16),
    Case("lora-one-core", lora=LORA, parallel=CORE, model=BF16),
    Case("lora-one-dropout", lora=DROPOUT, model=BF16),
    Case("lora-one-dropout-mlp", lora=DROPOUT, parallel=MLP),
    Case("lora-moe-one", lora=ATTENTION, family="qwen3_moe"),
    Case("lora-moe-one-shared", lora=ATTENTION, family="qwen2_moe", model=BF16),
]
LORA_TWO = [
    Case("lora-tp2", lora=LORA, parallel=tp(2), model=BF16),
    Case("lora-tp2-dropout", lora=DROPOUT, parallel=tp(2)),
    Case("lora-tp2-no-sp", lora=LORA, parallel=tp(2, sequence_parallel=False)),
    Case("lora-tp2-full", lora=LORA, parallel=tp(2, **FULL)),
    Case("lora-pp2-tied", lora=LORA, parallel=pp(2), family="qwen2_tied", model=BF16),
    Case("lora-vpp2-tied", lora=LORA, parallel=pp(2, 2), family="qwen2_tied"),
    Case("lora-pp2-uneven", lora=LORA, parallel=pp(2, **stages("Ettt|tL")), model=BF16),
    Case("lora-cp2", lora=LORA, parallel=cp(2)),
    Case("lora-cp2-mlp", lora=LORA, parallel=cp(2, **MLP)),
    Case("lora-dp2", lora=LORA, model=BF16, optimizer={"grad_reduce_in_fp32": False}),
    Case("lora-moe-ep2", lora=ATTENTION, family="qwen3_moe", parallel=ep(2), model=BF16),
    Case("lora-moe-tp2-all-heads", lora=ATTENTION, family="olmoe", parallel=tp(2), model=BF16),
]
LORA_FOUR = [
    Case("lora-tp4-more-than-kv-heads", lora=LORA, parallel=tp(4), family="qwen3"),
    Case("lora-tp2-pp2-tied", lora=LORA, parallel=tp(2) | pp(2), family="qwen2_tied", model=BF16),
    Case("lora-tp2-cp2", lora=LORA, parallel=tp(2) | cp(2), model=BF16),
    Case("lora-tp2-dp2", lora=LORA, parallel=tp(2), family="qwen2", model=BF16),
    Case(
        "lora-moe-ep2-tp2-etp1",
        lora=ATTENTION,
        family="qwen2_moe",
        parallel=ep(2, expert_tensor_parallel_size=1) | tp(2),
    ),
]
ONE, TWO, FOUR = ONE + MOE_ONE + LORA_ONE, TWO + MOE_TWO + LORA_TWO, FOUR + MOE_FOUR + LORA_FOUR
CASES = {1: ONE, 2: TWO, 4: FOUR}


def cpu_masks(config: Config, chunks: Sequence[ModelChunk], rank: MemoryInUse) -> float:
    """Bytes of the masks that attention's kernel keeps under context parallelism on a CPU; a GPU's makes its own.

    A rank's queries are two chunks, mirrored; each has a mask of [chunk, keys up to its end], in its own precision,
    but for the first chunk of all: its mask is square, and no kernel needs that one.
    """
    parallel, packs = config.parallel, shapes(config)
    size = parallel.context_parallel_size
    if size == 1:
        return 0.0
    data_rank = rank.stage_rank // parallel.tensor_model_parallel_size
    widths = 2 * size + (0 if data_rank % size == 0 else 1)  # of both masks, in chunks

    def one_layer(number: int) -> float:
        return element_bytes(config) * packs[number].squares * widths / (2 * size) ** 2

    if parallel.recompute_granularity == "full":
        return one_layer(0)
    if parallel.recompute_granularity == "selective":
        return 0.0  # one is made again when the head's logits, which are more, have gone
    order = stage_order(rank.pipeline_rank, parallel.pipeline_model_parallel_size, len(chunks), len(packs))
    # All layers share it, in all chunks of a rank. The first chunk is the first forward and the last backward.
    return peak_in_flight(order, lambda chunk, number: 0.0 if chunk else one_layer(number))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for family in ("llama3", "qwen2", "qwen2_tied", "qwen3", "qwen3_moe", "qwen2_moe", "mixtral", "olmoe"):
        FAMILIES[family].save_pretrained(folder / family)
    return folder


@pytest.fixture(scope="module")
def in_use(models: Path) -> dict[str, list[MemoryInUse]]:
    """By case, what each rank holds; one launch per world size."""
    found: dict[str, list[MemoryInUse]] = {}
    for size, cases in CASES.items():
        ranks: Sequence[list[MemoryInUse]] = run_distributed(run_cases, size, models, cases)
        found |= {case.name: [rank[number] for rank in ranks] for number, case in enumerate(cases)}
    return found


@pytest.mark.parametrize("case", ONE + TWO + FOUR, ids=lambda case: case.name)
def test_state_is_what_the_training_process_holds_to_the_byte(case: Case, models: Path, in_use: dict) -> None:
    config = case.config(models)
    architecture = read_architecture(config.model.path)
    for rank in in_use[case.name]:
        state = rank_state(architecture, config, rank.pipeline_rank, rank.data_parallel_size, rank.stage_rank)
        real = (rank.num_parameters, rank.parameters, rank.gradients, rank.optimizer)
        assert (state.num_parameters, state.parameters, state.gradients, state.optimizer) == real
        fullest = rank_state(architecture, config, rank.pipeline_rank, rank.data_parallel_size)
        assert fullest.optimizer >= rank.optimizer


def architecture_of(case: Case, config: Config) -> Architecture:
    """The model, with the load of its fullest expert: those that are not idle share all tokens."""
    architecture = read_architecture(config.model.path)
    experts = architecture.experts
    if experts is None:
        return architecture
    load = experts.num_experts / (experts.num_experts - case.idle_experts)
    return replace(architecture, experts=replace(experts, load_max_over_mean=load))


@pytest.mark.parametrize("case", ONE + TWO + FOUR, ids=lambda case: case.name)
def test_activations_are_those_that_autograd_keeps(case: Case, models: Path, in_use: dict) -> None:
    config = case.config(models)
    architecture = architecture_of(case, config)
    packs = shapes(config)
    busy = in_use[case.name][:1] if case.idle_experts else in_use[case.name]
    for rank in busy:
        peak = peak_activations(architecture, config, rank.pipeline_rank, packs, local=True)
        expected = peak.total + cpu_masks(config, model_chunks(architecture, config.parallel, rank.pipeline_rank), rank)
        assert expected == pytest.approx(rank.saved, rel=ACTIVATION_TOLERANCE)


@pytest.mark.parametrize("parallel", [{}, FULL])
def test_the_fullest_pack_is_the_one_that_keeps_most(parallel: dict, models: Path) -> None:
    """Of two packs with as many tokens, that with the longer shared prompt gathers more keys."""
    config = Case("one", parallel=parallel).config(models)
    answers = {"chosen": 20, "rejected": 15}
    triplets = [{"short": 40, "long": 300}, {"short": 300, "long": 40}]
    few, many = (
        pack_shape([triplet | answers], [config.objective.roles.all], 1, 1, 1, share_prompts=True)
        for triplet in triplets
    )
    assert few.padded_tokens == many.padded_tokens and few.attended_keys + 260 == many.attended_keys

    def peak(*packs: PackShape) -> PeakActivations:
        return peak_activations(read_architecture(config.model.path), config, 0, packs, local=True)

    assert peak(few, many) == peak(many, few) == peak(many, many) and peak(many).total > peak(few).total


def test_no_pack_is_computed_again_in_less_than_the_estimate(models: Path) -> None:
    """Of these packs, one keeps most and one gathers most keys; a third has nearly as many of both."""
    config = Case("one", parallel=FULL).config(models)
    architecture = read_architecture(config.model.path)
    packs = [
        pack_shape(
            [{"short": short, "long": long, "chosen": 20, "rejected": 15}],
            [config.objective.roles.all],
            *(1, 1, 1),
            share_prompts=True,
        )
        for short, long in ((40, 330), (340, 20), (300, 65))
    ]
    most_tokens, most_keys, worst = packs
    assert most_tokens.padded_tokens > worst.padded_tokens > most_keys.padded_tokens
    assert most_tokens.attended_keys < worst.attended_keys < most_keys.attended_keys
    state = rank_state(architecture, config, 0, 1)

    def found(*packs: PackShape) -> tuple[float, float]:
        peak = peak_activations(architecture, config, 0, packs, local=True)
        return peak.recomputed, stage_memory(architecture, config, 1, 0, packs, Reserve(), state).working

    assert found(*packs) == found(worst) and min(found(worst)) > 0
    for figure, others in zip(found(worst), zip(found(most_tokens), found(most_keys), strict=True), strict=True):
        assert figure > max(others)


def test_a_rank_keeps_the_tokens_that_reach_its_experts(models: Path, in_use: dict) -> None:
    """Where half of the experts are idle, the rank with the others has twice the mean: no more than all tokens."""
    (case,) = (case for case in CASES[2] if case.idle_experts)
    busy, idle = (rank.saved for rank in in_use[case.name])
    assert busy > 1.5 * idle
    architecture = architecture_of(case, case.config(models))
    assert architecture.experts is not None
    loads = [replace(architecture.experts, load_max_over_mean=load).rank_load(2) for load in (1.0, 1.5, 2.0, 16.0)]
    assert loads == [1.0, 1.5, 2.0, 2.0]


@pytest.mark.parametrize("case", MOE_FOUR, ids=lambda case: case.name)
def test_simulated_ranks_are_in_the_groups_of_real_ones(case: Case, models: Path, in_use: dict) -> None:
    """Ranks that share experts, and those that share the gradients, also by the plan's own arithmetic."""
    parallel = case.config(models).parallel
    for number, rank in enumerate(in_use[case.name]):
        with simulated_rank(number, 4):
            groups = topology.initialize(parallel, seed=1)
            assert expert_groups() == rank.expert_groups
            assert groups.stage_rank == rank.stage_rank
            topology.destroy(groups)
        place = rank.stage_rank // ranks_of_a_copy(parallel, is_expert=True)
        sharing = rank.expert_groups["gradients"]
        assert len(sharing) == sharing_ranks(parallel, rank.data_parallel_size, is_expert=True)
        assert sharing.index(number) == place
