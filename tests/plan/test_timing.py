"""Times follow from FLOPs, bytes and rates."""

from dataclasses import replace

import pytest

from megatron_solopo.architecture.gpus import GPUS, Efficiency
from megatron_solopo.plan.answer import model_flops_utilization, overrides, run_of
from megatron_solopo.plan.layouts import Layout, make_layout, with_keys
from megatron_solopo.plan.search import LayoutEstimate, Planner
from tests.plan.models import load_example, make_planner

PERFECT = Efficiency(gemm=1, fp8_gemm=1, attention=1, head=1, memory=1, message_seconds=0)


def estimate(planner: Planner, tp: int = 1, pp: int = 1, cp: int = 1, **sections: dict) -> LayoutEstimate:
    layout = make_layout(planner.config, {"tp": tp, "pp": pp, "vpp": None, "cp": cp}, planner.gpus)
    return planner.estimate(Layout(with_keys(layout.config, **sections), layout.data_parallel_size))


def test_a_perfect_gpu_without_overheads_reaches_its_peak() -> None:
    """But for the vocabulary's padding and flash attention's fifth product, which model FLOPs do not count."""
    free = GPUS["h100"].model_copy(update={"hbm_gb_per_s": 1e12})
    planner = make_planner(gpus=1, gpu=free, efficiency=PERFECT, tokens="short=64,long=256,response=16")
    assert model_flops_utilization(estimate(planner), planner) == pytest.approx(1, abs=0.01)
    long = make_planner(gpus=1, gpu=free, efficiency=PERFECT)
    found = estimate(long)
    attention = found.time.compute.attention
    useful = 3 / 3.5 * attention + found.time.compute.gemm + found.time.compute.head
    assert model_flops_utilization(found, long) == pytest.approx(useful / found.time.seconds, rel=1e-3)


def test_full_recomputation_adds_one_forward_pass_of_the_layers() -> None:
    planner = make_planner(gpus=1)
    plain = estimate(planner).time.compute
    full = estimate(planner, parallel={"recompute_granularity": "full"}).time.compute
    assert full.gemm == pytest.approx(plain.gemm * 4 / 3)
    assert full.attention == pytest.approx(plain.attention * 4.5 / 3.5)
    assert full.head == plain.head


def test_work_is_shared_and_traffic_appears_with_the_group() -> None:
    planner = make_planner(gpus=8)
    one = estimate(make_planner(gpus=1))
    for sizes, part in (({"tp": 8}, "tensor_traffic"), ({"cp": 8}, "context_traffic")):
        found = estimate(planner, **sizes)
        assert found.time.compute.gemm == pytest.approx(one.time.compute.gemm / 8, rel=1e-6)
        traffic = found.time.compute.parts
        others = {"tensor_traffic", "context_traffic"} - {part}
        assert all(traffic[name] == 0 for name in others)
    assert estimate(planner, tp=8).time.compute.tensor_traffic > 0
    slow = replace(planner, gpu=planner.gpu.model_copy(update={"nvlink_gb_per_s": 1.0}))
    assert estimate(slow, cp=8).time.compute.context_traffic > 0


def test_a_group_wider_than_a_node_moves_at_the_networks_pace() -> None:
    inside, across = (estimate(make_planner(gpus=gpus)).time.data_traffic for gpus in (8, 16))
    assert across > 5 * inside > 0


def test_a_pipeline_waits_less_with_more_packs() -> None:
    bubbles = [
        estimate(make_planner("llama-3.1-8b", f"training.global_batch_size={size}", gpus=4), pp=4).time.timeline.bubble
        for size in (8, 32, 128)
    ]
    assert bubbles == sorted(bubbles, reverse=True) and bubbles[0] == pytest.approx(3 / 11, abs=0.03)


def test_vanilla_long_training_costs_about_twice_and_its_reference_pass_is_counted() -> None:
    planner = make_planner(gpus=8)
    other = planner.for_objective("long_po")
    ours, vanilla = estimate(planner, cp=8), estimate(other, cp=8)
    assert 1.8 < vanilla.time.seconds / ours.time.seconds < 2.0
    runs = [run_of(each, planner.workload, 2.0) for each in (ours, vanilla)]
    assert all(0 < run.reference_seconds < run.steps * run.step_seconds for run in runs)
    assert runs[0].cost == pytest.approx(2.0 * 8 * runs[0].hours)
    simpo = make_planner("llama-3.1-8b", "objective.loss_type=simpo", gpus=8)
    assert run_of(estimate(simpo, cp=8), simpo.workload, None).reference_seconds == 0


def test_state_on_the_host_is_updated_at_its_memorys_pace() -> None:
    planner = make_planner(gpus=8)
    here, away = (estimate(planner, optimizer={"optimizer_offload_fraction": share}) for share in (0.0, 1.0))
    # 16 bytes per parameter in host memory, read and written; 4 of gradients down and 2 of weights up.
    each = planner.architecture.num_parameters / 8
    assert away.time.optimizer == pytest.approx(each * (32 / 50e9 + 6 / 64e9) / 0.75, rel=0.01)
    assert here.time.optimizer < away.time.optimizer / 10


def test_fp8_speeds_up_matrix_products_alone() -> None:
    planner = make_planner(gpus=1)
    plain, fp8 = estimate(planner).time.compute, estimate(planner, model={"fp8": "hybrid"}).time.compute
    assert fp8.gemm < plain.gemm and fp8.attention == pytest.approx(plain.attention, rel=1e-3)


def test_the_overrides_make_the_layout_of_the_configuration_given() -> None:
    given = [
        "parallel.sequence_parallel=false",
        "parallel.recompute_granularity=full",
        "parallel.recompute_num_layers=4",
    ]
    planner = make_planner("llama-3.1-8b", *given, gpus=8, vary=("recompute",))
    for estimate in planner.search().ranked:
        found = load_example("llama-3.1-8b", *given, *overrides(estimate, planner.config))[0]
        assert found == estimate.layout.config
