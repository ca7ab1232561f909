"""What fits is ranked, what does not has one clear reason."""

from dataclasses import replace

import pytest

from megatron_solopo.architecture.gpus import GPUS
from megatron_solopo.errors import UserError
from megatron_solopo.plan import VARIED
from megatron_solopo.plan.layouts import candidate_sizes, layout_variants, make_layout
from megatron_solopo.plan.memory import GIB
from megatron_solopo.plan.search import SearchResult
from tests.plan.models import make_planner

SAVERS = ("recompute", "offload", "cp_comm")


@pytest.fixture(scope="module")
def found() -> SearchResult:
    return make_planner("llama-3.1-70b", gpus=64, vary=SAVERS).search()


def test_those_that_fit_come_fastest_first(found: SearchResult) -> None:
    times = [estimate.time.seconds for estimate in found.ranked]
    assert times == sorted(times) and len(times) > 5
    assert all(estimate.excess_gib <= 0 and estimate.layout.gpus == 64 for estimate in found.ranked)
    for estimate in found.ranked:
        parts = estimate.fullest.parts
        assert sum(parts.values()) == pytest.approx(estimate.fullest.total) and min(parts.values()) >= 0


def test_every_layout_fits_or_has_a_reason(found: SearchResult) -> None:
    planner = make_planner("llama-3.1-70b", gpus=64, vary=SAVERS)
    names = {
        make_layout(planner.config, sizes, 64).name for sizes in candidate_sizes(planner.architecture, 64, planner.gpu)
    }
    refused = {each.name for each in found.refused}
    fitting = {estimate.layout.name for estimate in found.ranked}
    assert refused < names and fitting < names and not refused & fitting
    assert len(refused) == len(found.refused)
    assert all(each.reason and "\n" not in each.reason for each in found.refused)
    assert any("do not divide into" in each.reason for each in found.refused)
    over = [each for each in found.refused if each.excess_gib is not None]
    assert over and all(each.excess_gib > 0 and "GiB over 79.1 GiB" in each.reason for each in over)
    assert found.nearest.excess_gib == min(each.excess_gib for each in over)


def test_a_layout_over_the_memory_is_refused_by_what_it_is_over() -> None:
    planner = make_planner("llama-3.1-8b", gpus=1)
    layout = make_layout(planner.config, {"tp": 1, "pp": 1, "vpp": None, "cp": 1}, 1)
    estimate = planner.best_variant(layout)
    roomy = planner.gpu.model_copy(update={"memory_gib": planner.gpu.memory_gib + estimate.excess_gib + 0.1})
    assert estimate.excess_gib > 0 and replace(planner, gpu=roomy).best_variant(layout).excess_gib <= 0


def test_the_exchange_by_heads_is_tried_where_heads_allow_it() -> None:
    planner = make_planner("llama-3.1-8b", "data.share_prompts=false", gpus=64)
    for cp, exchanges in ((8, {"p2p", "a2a"}), (16, {"p2p"}), (1, {"p2p"})):
        layout = make_layout(planner.config, {"tp": 1, "pp": 1, "vpp": None, "cp": cp}, 64)
        rows = layout_variants(planner.architecture, layout, planner.gpu, SAVERS)
        assert {each.config.parallel.cp_comm_type for row in rows for each in row} == exchanges


def test_a_configured_hierarchy_is_tried_where_it_fits_beside_the_others() -> None:
    keys = ("context_parallel_size=8", "cp_comm_type=a2a+p2p", "hierarchical_context_parallel_sizes=[2,4]")
    planner = make_planner("llama-3.1-8b", "data.share_prompts=false", *(f"parallel.{key}" for key in keys), gpus=64)
    for tp, cp, exchanges in ((1, 8, {"a2a+p2p", "p2p", "a2a"}), (8, 8, {"p2p"}), (1, 16, {"p2p"}), (1, 1, {"p2p"})):
        layout = make_layout(planner.config, {"tp": tp, "pp": 1, "vpp": None, "cp": cp}, 64)
        rows = layout_variants(planner.architecture, layout, planner.gpu, SAVERS)
        assert {each.config.parallel.cp_comm_type for row in rows for each in row} == exchanges
    asked = make_layout(planner.config, {"tp": 1, "pp": 1, "vpp": None, "cp": 8}, 64)
    rows = layout_variants(planner.architecture, asked, planner.gpu, ())
    assert {each.config.parallel.cp_comm_type for row in rows for each in row} == {"a2a+p2p"}


def test_sizes_that_cannot_hold_the_optimizer_instances_are_refused_and_others_fit() -> None:
    found = make_planner("llama-3.1-8b", "parallel.num_distributed_optimizer_instances=4", gpus=64).search()
    reasons = {each.name: each.reason for each in found.refused}
    assert "does not divide the 2 ranks (DP x CP)" in reasons["tp8,pp4,cp1"]
    ranks = [64 // (layout.sizes["tp"] * layout.sizes["pp"]) for layout in (each.layout for each in found.ranked)]
    assert ranks and all(number % 4 == 0 for number in ranks)


def test_variants_of_a_row_take_less_memory_and_more_time_one_after_the_other() -> None:
    planner = make_planner("llama-3.1-70b", gpus=64)
    layout = make_layout(planner.config, {"tp": 8, "pp": 2, "vpp": None, "cp": 4}, 64)
    rows = layout_variants(planner.architecture, layout, planner.gpu, VARIED)
    offloaded = [row[0].config.optimizer.optimizer_offload_fraction for row in rows]
    assert (
        set(offloaded) == {0.0, 1.0} and len(rows) == 8
    )  # both with and without FP8, and with and without shared prompts
    for row in rows:
        estimates = [planner.estimate(each) for each in row]
        sizes = [estimate.fullest.total for estimate in estimates]
        times = [estimate.time.seconds for estimate in estimates]
        assert len(row) == 3 and sizes == sorted(sizes, reverse=True) and times == sorted(times)
    here, away = (planner.estimate(row[0]).fullest for row in rows[:2])
    assert away.total < here.total and away.optimizer == 0 < away.host


def test_moving_the_state_is_preferred_to_recomputing_where_it_is_faster() -> None:
    """Recomputation costs with every pack, moving the state once a step."""
    planner = make_planner("llama-3.1-8b", "training.global_batch_size=256", gpus=8, vary=("recompute", "offload"))
    layout = make_layout(planner.config, {"tp": 8, "pp": 1, "vpp": None, "cp": 1}, 8)
    rows = layout_variants(planner.architecture, layout, planner.gpu, planner.vary)
    here, away = ([planner.estimate(each).fullest.total / GIB for each in row] for row in rows)
    assert here[2] < away[1] < here[1]
    between = planner.gpu.model_copy(update={"memory_gib": (away[1] + here[1]) / 2})
    found = replace(planner, gpu=between).best_variant(layout)
    assert found.layout.savers == "recompute mlp, offload optimizer 1"
    assert found.time.seconds < planner.estimate(rows[0][2]).time.seconds  # everything recomputed, which fits too


def test_the_other_objective_is_offered_the_same_precisions() -> None:
    planner = make_planner("llama-3.1-8b", gpus=8, vary=("fp8", "recompute"))
    other = planner.for_objective("long_po")
    assert {each.layout.config.model.fp8 for each in other.search().ranked} >= {"e4m3"}


def test_fp8_is_offered_only_where_the_gpu_has_it_and_the_matrices_allow_it() -> None:
    planner = make_planner("llama-3.1-8b", gpus=8, vary=("fp8",))
    layout = make_layout(planner.config, {"tp": 1, "pp": 1, "vpp": None, "cp": 8}, 8)
    for gpu, expected in (("h100", {None, "e4m3"}), ("a100", {None})):
        rows = layout_variants(planner.architecture, layout, GPUS[gpu], ("fp8",))
        assert {each.config.model.fp8 for row in rows for each in row} == expected


@pytest.mark.parametrize(
    ("model", "sizes", "words"),
    [
        ("qwen2.5-7b", {"tp": 8}, "tensor_model_parallel_size=8 does not divide the model's 28 attention heads"),
        ("llama-3.1-8b", {"pp": 64}, "32 layers do not divide into 64 pipeline stages"),
        ("llama-3.1-8b", {"tp": 4, "pp": 3}, "needs a multiple of 12"),
        ("llama-3.1-8b", {"cp": 16, "pp": 4, "vpp": 4, "tp": 1}, None),
    ],
)
def test_an_illegal_layout_that_is_asked_for_gets_one_line(model: str, sizes: dict, words: str | None) -> None:
    planner = make_planner(model)
    asked = {"tp": 1, "pp": 1, "vpp": None, "cp": 1, "ep": 1, "etp": None} | sizes
    if words is None:
        assert planner.best_variant(make_layout(planner.config, asked, 64)).layout.sizes == asked | {"dp": 1}
        return
    with pytest.raises(UserError, match=words) as error:
        planner.best_variant(make_layout(planner.config, asked, 64))
    assert "\n" not in str(error.value)


def test_a_layout_of_stages_stays_where_its_number_of_stages_fits() -> None:
    text = "Et*6|t*10|t*9|t*7L"
    planner = make_planner("llama-3.1-8b", f"parallel.pipeline_model_parallel_layout={text}", gpus=8)
    found = {
        (pp, vpp): make_layout(planner.config, {"tp": 1, "pp": pp, "vpp": vpp, "cp": 1}, 8)
        for pp, vpp in ((4, None), (2, 2), (8, None), (1, None))
    }
    kept = {sizes: layout.config.parallel.pipeline_model_parallel_layout for sizes, layout in found.items()}
    assert kept == {(4, None): text, (2, 2): text, (8, None): None, (1, None): None}
    assert f"stages {text}" in found[4, None].savers and found[4, None].extreme_ranks == [0, 1, 2, 3]
    assert planner.estimate(found[4, None]).fullest.pipeline_rank == 1
