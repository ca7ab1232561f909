"""Length, cost, utilization and overrides of a planned run."""

import re
from dataclasses import replace

import pytest

from megatron_solopo.architecture.gpus import GPUS, Efficiency
from megatron_solopo.plan.answer import PlannedRun, _figure
from tests.plan.models import estimate, load_example, make_planner

PERFECT = Efficiency(gemm=1, fp8_gemm=1, attention=1, head=1, memory=1, message_seconds=0)


def test_a_perfect_gpu_without_overheads_reaches_its_peak() -> None:
    """But for the vocabulary's padding and flash attention's fifth product, which model FLOPs do not count."""
    free = GPUS["h100"].model_copy(update={"hbm_gb_per_s": 1e12})
    planner = make_planner(gpus=1, gpu=free, efficiency=PERFECT, tokens="short=64,long=256,response=16")
    assert PlannedRun(planner, estimate(planner), None).model_flops_utilization == pytest.approx(1, abs=0.01)
    sparse = make_planner("qwen3-30b-a3b", gpus=1, gpu=free, efficiency=PERFECT, tokens="short=64,long=256,response=16")
    assert PlannedRun(sparse, estimate(sparse), None).model_flops_utilization == pytest.approx(1, abs=0.01)
    long = make_planner(gpus=1, gpu=free, efficiency=PERFECT)
    found = estimate(long)
    attention = found.time.compute.attention
    useful = 3 / 3.5 * attention + found.time.compute.gemm + found.time.compute.head
    assert PlannedRun(long, found, None).model_flops_utilization == pytest.approx(useful / found.time.seconds, rel=1e-3)


def test_vanilla_long_training_costs_about_twice_where_it_shares_no_prompts() -> None:
    shared, ours = (estimate(make_planner(gpus=8).for_objective(name), cp=8) for name in ("long_po", "solopo"))
    # The short prompt costs SoLoPO as little as two copies of the long prompt's keys cost pairs behind it.
    assert 0.95 < shared.time.seconds / ours.time.seconds < 1.05
    planner = make_planner("llama-3.1-8b", "data.share_prompts=false", gpus=8)
    other = planner.for_objective("long_po")
    ours, vanilla = estimate(planner, cp=8), estimate(other, cp=8)
    assert 1.8 < vanilla.time.seconds / ours.time.seconds < 2.0
    runs = [PlannedRun(planner, ours, 2.0), PlannedRun(other, vanilla, 2.0)]
    assert all(0 < run.reference.seconds < run.steps * run.estimate.time.seconds for run in runs)
    assert runs[0].cost == pytest.approx(2.0 * 8 * runs[0].hours)
    simpo = make_planner("llama-3.1-8b", "objective.loss_type=simpo", gpus=8)
    assert PlannedRun(simpo, estimate(simpo, cp=8), None).reference.seconds == 0


def test_the_overrides_make_the_layout_of_the_configuration_given() -> None:
    given = [
        "parallel.sequence_parallel=false",
        "parallel.recompute_granularity=full",
        "parallel.recompute_num_layers=4",
    ]
    for model in ("llama-3.1-8b", "qwen3-30b-a3b"):
        planner = make_planner(model, *given, gpus=8, gpu=GPUS["h200"], vary=("recompute",))
        ranked = planner.search().ranked
        assert len(ranked) > 5
        for each in ranked:
            overrides = PlannedRun(planner, each, None).overrides
            assert load_example(model, *given, *overrides)[0] == each.layout.config
            assert any("expert" in key for key in overrides) is (planner.architecture.experts is not None)


def test_figures_of_a_tiny_model_are_not_zero() -> None:
    """They keep two significant digits, and those of a large model their decimals."""
    shown = [_figure(value, 2) for value in (0, 0.000123, 0.0468, 1.2345, 1234.5)]
    assert shown == ["0", "0.00012", "0.047", "1.23", "1,234.50"]
    planner = make_planner("llama-3.1-8b", gpus=8, tokens="short=64,long=128,response=8")
    tiny = replace(planner.architecture, hidden_size=64, num_layers=2, ffn_hidden_size=64)
    planner = replace(planner, architecture=tiny)
    text = PlannedRun(planner, estimate(planner, cp=1), None).explanation().split("Overrides:")[0]
    assert not re.search(r"(?<![\d.])0\.0+(?![\d%])", text), text


def test_the_host_memory_of_saves_and_resumes_is_that_of_the_fullest_node() -> None:
    """8 billion parameters: 12 bytes each of the optimizer's state, 2 of the weights, and nothing twice."""
    planner = make_planner("llama-3.1-8b", gpus=8)
    parameters = planner.architecture.num_parameters
    one_node = PlannedRun(planner, estimate(planner, cp=8), None)
    assert one_node.host_bytes_per_node()["save"] == pytest.approx(14 * parameters, rel=0.01)
    assert "a save 104.7, which async_save keeps; a resume" in one_node.explanation()
    assert one_node.checkpoint_bytes == pytest.approx(one_node.host_bytes_per_node()["save"], rel=1e-3)
    assert "Disk: 104.70 GiB per checkpoint, 418.81 GiB for 4 at once (checkpoint.keep_last=3" in one_node.explanation()
    two_nodes = make_planner("llama-3.1-8b", gpus=16)
    spread = PlannedRun(two_nodes, estimate(two_nodes, cp=8), None).host_bytes_per_node()
    assert spread["save"] == pytest.approx(7 * parameters, rel=0.01)
    assert 0 < spread["resume"] <= one_node.host_bytes_per_node()["resume"]
    staged = PlannedRun(two_nodes, estimate(two_nodes, pp=2, cp=8), None)
    assert staged.host_bytes_per_node()["save"] == pytest.approx(7 * parameters, rel=0.1)
    assert staged.as_json()["host_bytes_per_node"] == staged.host_bytes_per_node()
