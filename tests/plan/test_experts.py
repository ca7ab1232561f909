"""Plans of mixtures of experts: sizes of published models, shares of the ranks, traffic, layouts."""

from dataclasses import replace

import pytest

from megatron_solopo.architecture.gpus import GPUS
from megatron_solopo.architecture.layout import check_layout, check_training
from megatron_solopo.config import MoEConfig
from megatron_solopo.errors import UserError
from megatron_solopo.plan import PlanSettings
from megatron_solopo.plan.answer import make_answer
from megatron_solopo.plan.answer import make_planner as planner_of_command
from megatron_solopo.plan.layouts import candidate_sizes, make_layout, parse_sizes
from megatron_solopo.plan.memory import rank_state
from tests.plan.models import ROOT, TOKENS, estimate, load_example, make_planner, with_load

MODEL = "qwen3-30b-a3b"


@pytest.mark.parametrize(
    ("model", "total", "active"),
    [("qwen3-30b-a3b", 30_532_122_624, 3_353_032_704), ("qwen3-235b-a22b", 235_093_634_560, 22_190_763_520)],
)
def test_published_models_have_as_many_parameters_as_published(model: str, total: int, active: int) -> None:
    architecture = load_example(model)[1]
    assert architecture.num_parameters == total
    assert architecture.num_active_parameters == active


def test_ranks_divide_the_experts_and_their_state() -> None:
    """EP 8 within 32 ranks: an eighth of the experts, of whose state four ranks hold a quarter each."""
    config, architecture = load_example("qwen3-30b-a3b", "parallel.expert_model_parallel_size=8")
    experts = architecture.experts
    assert experts is not None
    expert_weights = 48 * 128 * 3 * 2048 * 768
    others = architecture.num_parameters - expert_weights
    state = rank_state(architecture, config, 0, 32)
    assert state.expert_parameters == 2 * expert_weights / 8
    assert state.parameters == pytest.approx(2 * (expert_weights / 8 + others), rel=1e-4)
    trained = others - architecture.num_router_parameters
    assert state.gradients == pytest.approx(4 * (expert_weights / 8 + trained), rel=1e-4)
    assert state.optimizer == pytest.approx(12 * (expert_weights / 8 / 4 + trained / 32), rel=1e-3)


def test_the_fullest_rank_decides_time_and_memory() -> None:
    even = make_planner(MODEL, gpus=8, gpu=GPUS["h200"])
    uneven = with_load(even, 1.5)
    one, two = (estimate(planner, cp=8, ep=8) for planner in (even, uneven))
    routed = 48 * 8 * 3 * 2048 * 768
    linear = routed + 48 * 2048 * (128 + 2 * 4096 + 2 * 512)
    growth = two.time.compute.gemm / one.time.compute.gemm
    assert growth == pytest.approx((linear + 0.5 * routed) / linear)
    assert two.time.compute.expert_traffic == pytest.approx(1.5 * one.time.compute.expert_traffic, rel=0.02)
    assert two.fullest.activations > one.fullest.activations and two.fullest.working > one.fullest.working
    alone = [estimate(planner, cp=8).fullest.total for planner in (even, uneven)]
    assert alone[0] == alone[1], "a rank with all experts gets all tokens of its own"


def test_tokens_move_at_the_networks_pace_to_other_nodes() -> None:
    planner = make_planner(MODEL, gpus=64, gpu=GPUS["h200"])
    traffic = {ep: estimate(planner, cp=64, ep=ep).time.compute.expert_traffic for ep in (1, 2, 8, 16, 64)}
    assert traffic[1] == 0 < traffic[2] < traffic[8] < traffic[16] < traffic[64]
    assert traffic[16] > 2 * traffic[8]
    # To and fro, in forward and backward, a token of 2,048 bfloat16 numbers for each of 8 experts, 7 of 8 elsewhere.
    pack = estimate(planner, cp=64).batch.heaviest_rank[0]
    sent = 4 * 48 * pack.padded_tokens / 64 * 8 * 2 * 2048 * 7 / 8
    seconds = sent / (450e9 * planner.efficiency.nvlink) + 4 * 48 * 7 * planner.efficiency.message_seconds
    assert traffic[8] == pytest.approx(128 * seconds, rel=1e-6)
    again = estimate(planner, cp=64, ep=8, parallel={"recompute_granularity": "full"}).time.compute.expert_traffic
    assert again == pytest.approx(1.5 * traffic[8])


def test_gradients_of_experts_are_reduced_among_fewer_ranks() -> None:
    planner = make_planner(MODEL, gpus=16, gpu=GPUS["h200"])
    alone, shared = (estimate(planner, ep=ep, parallel={"overlap_grad_reduce": False}) for ep in (1, 16))
    assert shared.time.data_traffic.exposed < alone.time.data_traffic.exposed / 5


def test_every_proposed_layout_is_one_that_training_takes() -> None:
    planner = make_planner(MODEL, gpus=64, gpu=GPUS["h200"])
    sizes = list(candidate_sizes(planner.architecture, 64, planner.gpu))
    assert {each["ep"] for each in sizes} == {1, 2, 4, 8, 16, 32, 64}
    assert {each["etp"] for each in sizes} == {None, 1}
    layouts = [make_layout(planner.config, each, 64) for each in sizes]
    assert len({layout.name for layout in layouts}) == len(layouts)
    for layout in layouts:
        if 48 % ((layout.sizes["pp"] or 1) * (layout.sizes["vpp"] or 1)) == 0 and layout.sizes["tp"] != 8:
            check_layout(planner.architecture, layout.config.parallel)
            check_training(planner.architecture, layout.config.parallel, layout.config.optimizer, layout.config.moe)
    dense = make_planner("llama-3.1-8b", gpus=64)
    assert {(each["ep"], each["etp"]) for each in candidate_sizes(dense.architecture, 64, dense.gpu)} == {(1, None)}


def test_a_layout_of_experts_can_be_asked_for() -> None:
    assert parse_sizes("tp=2,ep=8,etp=1") == {"tp": 2, "pp": 1, "vpp": None, "cp": 1, "ep": 8, "etp": 1}
    planner = make_planner(MODEL, gpus=16, gpu=GPUS["h200"])
    layout = make_layout(planner.config, parse_sizes("tp=2,cp=8,ep=8,etp=1"), 16)
    assert layout.name == "tp2,pp1,cp8,ep8,etp1,dp1"
    for sizes, words in (
        ("tp=2,etp=1", "expert_tensor_parallel_size=1 needs expert_model_parallel_size > 1"),
        ("ep=16,tp=2", "does not divide the 16 ranks of a pipeline stage"),
    ):
        with pytest.raises(UserError, match=words):
            planner.best_variant(make_layout(planner.config, parse_sizes(sizes), 16))


def test_stages_that_hold_other_numbers_of_experts_are_all_estimated() -> None:
    planner = make_planner(MODEL, gpus=4, gpu=GPUS["b200"])
    experts = planner.architecture.experts
    assert experts is not None
    uneven = replace(experts, layers=(False,) * 12 + (True,) * 12 + (False,) * 24)
    planner = replace(planner, architecture=replace(planner.architecture, experts=uneven))
    layout = make_layout(planner.config, {"tp": 1, "pp": 4, "vpp": None, "cp": 1, "ep": 1, "etp": None}, 4)
    fullest = planner.estimate(layout).fullest
    assert fullest.pipeline_rank == 1
    assert planner._first_that_fits([layout])[1] == pytest.approx(fullest.total / 2**30 - planner.gpu.memory_gib)


def test_experts_have_no_adapters_and_attention_beside_them_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = PlanSettings(gpus=8, gpu="h200", tokens=TOKENS, triplets=1000)
    with pytest.raises(UserError, match=r"^lora\.target_modules: gate_proj, up_proj, down_proj are parts of experts"):
        planner_of_command(load_example(MODEL, "lora.rank=16")[0], settings)
    whole = planner_of_command(load_example(MODEL)[0], settings)
    adapted = whole.for_other_weights()
    full, lora = (estimate(planner, cp=8, ep=8) for planner in (whole, adapted))
    assert lora.fullest.base == full.fullest.parameters > 100 * lora.fullest.parameters
    assert lora.fullest.optimizer < full.fullest.optimizer / 100
    assert lora.time.compute.expert_traffic == full.time.compute.expert_traffic
    assert adapted.for_other_weights().config == whole.config


def test_the_load_of_the_fullest_expert_is_an_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    settings = {"gpus": 8, "gpu": "h200", "tokens": TOKENS, "triplets": 1000, "explain": "cp=8,ep=8"}
    config = load_example(MODEL)[0]
    totals = []
    for more in ({}, {"expert_imbalance": 3.0}):
        asked = PlanSettings.model_validate(settings | more)
        planner = planner_of_command(config, asked)
        layout = make_layout(planner.config, parse_sizes("cp=8,ep=8"), 8)
        answer = make_answer(planner, planner.search(), asked) if not more else None
        totals.append(planner.best_variant(layout).time.seconds)
        if answer is not None:
            text = answer.as_text()
            assert "30,532,122,624 parameters, 3,353,032,704 active" in text and "gets 1.5 x the mean" in text
            assert '"expert_imbalance": 1.5' in answer.as_json()
    assert totals[1] > totals[0]
    dense = load_example("llama-3.1-8b")[0]
    with pytest.raises(UserError, match="--expert-imbalance 3: needs a model with experts; llama has none"):
        planner_of_command(dense, PlanSettings.model_validate(settings | {"expert_imbalance": 3.0}))
    for value, bound in ((0.5, "at least 1"), (float("nan"), "a finite number")):
        with pytest.raises(UserError, match=f"--expert-imbalance {value}: must be {bound}"):
            PlanSettings(gpus=8, gpu="h200", expert_imbalance=value)
    routers = dense.model_copy(update={"moe": MoEConfig(router_trainable=True)})
    with pytest.raises(UserError, match=r"^moe\.router_trainable=true needs a model with experts"):
        planner_of_command(routers, PlanSettings.model_validate(settings))
