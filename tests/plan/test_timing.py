"""Times follow from FLOPs, bytes and rates."""

from dataclasses import replace

import pytest

from megatron_solopo.architecture.adapters import num_adapter_parameters
from megatron_solopo.architecture.flops import linear_weights
from megatron_solopo.plan.layouts import layout_variants
from megatron_solopo.plan.memory import rank_state
from megatron_solopo.plan.timing import StepTimer
from tests.plan.models import estimate, make_planner


def test_full_recomputation_adds_one_forward_pass_of_the_layers() -> None:
    planner = make_planner("llama-3.1-8b", "data.share_prompts=false", gpus=1)
    plain = estimate(planner).time.compute
    full = estimate(planner, parallel={"recompute_granularity": "full"}).time.compute
    assert full.gemm == pytest.approx(plain.gemm * 4 / 3)
    assert full.attention == pytest.approx(plain.attention * 4.5 / 3.5)
    assert full.head == plain.head


def test_copies_of_shared_keys_take_the_time_to_read_and_write_them() -> None:
    """Of keys that CP does not divide: bfloat16 keys and values of 8 heads of 128 in each of 32 layers."""
    one, eight = (estimate(make_planner(gpus=8), cp=cp) for cp in (1, 8))
    planner = make_planner("llama-3.1-8b", "data.share_prompts=false", gpus=8)
    bare = [estimate(planner, cp=cp).time.compute.attention for cp in (1, 8)]
    packs = one.batch.heaviest_rank
    prompts = sum(pack.squares for pack in packs), sum(pack.squares for pack in estimate(planner).batch.heaviest_rank)
    keys, tokens = sum(pack.attended_keys for pack in packs), sum(pack.padded_tokens for pack in packs)
    copied = 32 * 2 * 8 * 128 * (keys * (2 * 2) + keys * (3 * 2 + 4 * 4) + tokens * (2 * 4 + 2))
    rate = planner.gpu.hbm_gb_per_s * 1e9 * planner.efficiency.memory
    kernels = bare[0] * prompts[0] / prompts[1]
    assert one.time.compute.attention == pytest.approx(kernels + copied / rate, rel=1e-9)
    assert eight.time.compute.attention > kernels / 8 + copied / 8 / rate


def test_packs_of_one_response_cost_what_they_cost_without_shared_prompts() -> None:
    """An instruction has one response, so its packs exchange keys as `cp_comm_type` says."""
    shared, bare = (
        make_planner("llama-3.1-8b", "objective.name=sft", f"data.share_prompts={share}", gpus=8)
        for share in ("true", "false")
    )
    for cp in (1, 8):
        found, expected = (estimate(planner, cp=cp) for planner in (shared, bare))
        assert not any(pack.shares_prompts for pack in found.batch.heaviest_rank)
        assert found.time == expected.time and found.stages == expected.stages
    assert found.layout.savers == "cp p2p" and expected.layout.savers == "cp p2p, prompts not shared"
    vary = ("cp_comm", "share_prompts")
    tried = [each for row in layout_variants(shared.architecture, found.layout, shared.gpu, vary) for each in row]
    exchanges = [each.config.parallel.cp_comm_type for each in tried]
    assert sorted(exchanges) == ["a2a", "p2p"], "sharing changes nothing, and is not tried"


def test_a_pack_that_shares_prompts_is_timed_apart_from_one_that_does_not() -> None:
    """Two packs of one batch that differ in nothing else."""
    planner = make_planner(gpus=8)
    found = estimate(planner, cp=8)
    shared, config = found.batch.heaviest_rank[0], found.layout.config
    plain, state = replace(shared, shares_prompts=False), rank_state(planner.architecture, config, 0, 1)
    timer = StepTimer(planner.architecture, config, 1, planner.gpu, planner.efficiency)
    one, other, both = (timer.time_step(packs, [state]).compute.total for packs in ([shared], [plain], [shared, plain]))
    assert other < one and both == pytest.approx(one + other)


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
    assert across.exposed + across.hidden > 5 * (inside.exposed + inside.hidden) > 0


def test_computation_hides_traffic_but_for_one_bucket_and_what_is_longer_than_it() -> None:
    planner = make_planner("llama-3.1-8b", gpus=8)
    found = estimate(planner, cp=8).time.data_traffic
    plain = estimate(planner, cp=8, parallel={"overlap_grad_reduce": False}).time.data_traffic
    assert plain.hidden == 0 and plain.exposed == pytest.approx(found.exposed + found.hidden)
    half = estimate(planner, cp=8, parallel={"overlap_param_gather": False}).time.data_traffic
    assert 0 < found.exposed < half.exposed < plain.exposed
    apart = make_planner("llama-3.1-8b", gpus=16)
    slow = replace(apart, gpu=apart.gpu.model_copy(update={"network_gb_per_s": 0.01}))
    longer = estimate(slow, cp=8).time.data_traffic
    assert longer.hidden < longer.exposed


def test_copies_of_the_optimizer_gather_within_a_node_and_hold_more() -> None:
    planner = make_planner("llama-3.1-8b", gpus=16)
    plain = {"overlap_grad_reduce": False}
    one = estimate(planner, tp=2, parallel=plain)
    two = estimate(planner, tp=2, parallel=plain | {"num_distributed_optimizer_instances": 2})
    assert two.time.data_traffic.exposed < one.time.data_traffic.exposed
    assert two.stages[0].optimizer == pytest.approx(2 * one.stages[0].optimizer, rel=1e-3)


def test_an_exchange_by_heads_within_a_node_shortens_the_ring() -> None:
    planner = make_planner("llama-3.1-8b", "data.share_prompts=false", gpus=16)
    slow = replace(planner, gpu=planner.gpu.model_copy(update={"network_gb_per_s": 0.1}))
    both = {"cp_comm_type": "a2a+p2p", "hierarchical_context_parallel_sizes": [8, 2]}
    ring, nested = (estimate(slow, cp=16, parallel=each).time.compute.context_traffic for each in ({}, both))
    assert 0 < nested < ring / 4


def test_a_pipeline_waits_less_with_more_packs() -> None:
    bubbles = [
        estimate(make_planner("llama-3.1-8b", f"training.global_batch_size={size}", gpus=4), pp=4).time.timeline.bubble
        for size in (8, 32, 128)
    ]
    assert bubbles == sorted(bubbles, reverse=True) and bubbles[0] == pytest.approx(3 / 11, abs=0.03)


def test_a_stage_with_more_layers_takes_longer_and_holds_more() -> None:
    planner = make_planner("llama-3.1-8b", gpus=4)
    stages = {"pipeline_model_parallel_layout": "Et*6|t*10|t*9|t*7L"}
    even, uneven = estimate(planner, pp=4), estimate(planner, pp=4, parallel=stages)
    assert uneven.time.compute.gemm == pytest.approx(even.time.compute.gemm * 10 / 8) and uneven.time.compute.head == 0
    busy = [sum(span.end - span.start for span in spans) for spans in uneven.time.timeline.stages]
    assert [round(each / busy[0] * 6, 3) for each in busy[:3]] == [6, 10, 9] and busy[3] > busy[0] * 7 / 6
    layer = even.stages[1].parameters / 8
    assert [stage.parameters / layer for stage in uneven.stages[1:3]] == pytest.approx([10, 9], rel=1e-3)
    block = {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 7}
    again = estimate(planner, pp=4, parallel=stages | block).time.compute
    assert again.gemm == pytest.approx(even.time.compute.gemm / 8 * (10 + 7 / 3))


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


def test_a_term_per_token_projects_the_chosen_answers_once_more() -> None:
    """A third of the rows, in the forward pass and again in the backward pass."""
    plain, aligned = (
        estimate(make_planner("llama-3.1-8b", *more, gpus=8)) for more in ([], ["objective.token_alignment=reverse_kl"])
    )
    assert aligned.time.compute.head == pytest.approx(plain.time.compute.head * (4 + 2 / 3) / 4)
    assert aligned.time.compute.gemm == plain.time.compute.gemm


def test_adapters_save_the_gradients_of_the_base() -> None:
    """A third of the products of the layers, half of those of the head's backward, and nearly all of the reduction."""
    whole, adapted = (make_planner("llama-3.1-70b", *more, gpus=16) for more in ([], ["lora.rank=16"]))
    slow = {"overlap_grad_reduce": False}
    full, lora = (estimate(planner, tp=8, parallel=slow).time for planner in (whole, adapted))
    own = adapted.config.lora and num_adapter_parameters(adapted.architecture, adapted.config.lora)
    weights = linear_weights(adapted.architecture)
    assert lora.compute.gemm / full.compute.gemm == pytest.approx((2 * weights + 3 * own) / (3 * weights))
    assert lora.compute.head == pytest.approx(full.compute.head * (2 + 1) / (3 + 1))  # rows are projected twice
    assert lora.compute.attention == full.compute.attention
    assert full.compute.memory < lora.compute.memory < 6 * full.compute.memory
    assert 4 / 5 * full.compute.tensor_traffic < lora.compute.tensor_traffic < 0.85 * full.compute.tensor_traffic
    assert lora.data_traffic.exposed < full.data_traffic.exposed / 50
    assert lora.optimizer < full.optimizer / 50
    dropped = estimate(make_planner("llama-3.1-70b", "lora.rank=16", "lora.dropout=0.1", gpus=16), tp=8)
    assert dropped.time.compute.memory > lora.compute.memory and dropped.time.compute.gemm == lora.compute.gemm


def test_the_reference_of_adapters_is_the_model_without_them() -> None:
    whole, adapted = (make_planner(*more, gpus=8) for more in (["llama-3.1-8b"], ["llama-3.1-8b", "lora.rank=16"]))
    seconds = [planner.time_reference(estimate(planner, tp=8).layout).seconds for planner in (whole, adapted)]
    assert seconds[0] == seconds[1]


def test_a_reference_that_reads_short_contexts_costs_what_the_pass_of_short_po_costs() -> None:
    def seconds(objective: str, *more: str) -> float:
        overrides = (f"objective.name={objective}", "data.max_tokens_per_pack=262144", *more)
        planner = make_planner("llama-3.1-8b", *overrides, gpus=8)
        return planner.time_reference(estimate(planner, tp=8).layout).seconds

    short, long, solopo = (
        (seconds(name), seconds(name, "reference.context=short")) for name in ("short_po", "long_po", "solopo")
    )
    assert short[0] == short[1] == long[1] == solopo[1]
    assert min(long[0], solopo[0]) > 5 * short[0]


def test_a_reference_pass_fills_the_pipeline_once_in_a_while() -> None:
    """Triplets of a pack each on PP 8. Each costs its share of the time, and filling the pipeline comes on top."""
    planners = {count: make_planner(gpus=8, num_triplets=count) for count in (150, 1000, 2000)}
    layout = estimate(planners[1000], pp=8).layout
    found = {count: planner.time_reference(layout) for count, planner in planners.items()}
    assert found[150].bubble == pytest.approx(7 / 157)
    # 6 parts of at most 192 packs.
    assert found[1000].bubble == pytest.approx(7 / (1000 / 6 + 7), rel=0.01) and found[1000].bubble < 0.05
    one = (1 - found[1000].bubble) * found[1000].seconds / 1000
    assert (1 - found[150].bubble) * found[150].seconds / 150 == pytest.approx(one, rel=0.02)
    assert found[2000].seconds == pytest.approx(2 * found[1000].seconds, rel=0.02)
    spread = planners[1000].time_reference(estimate(planners[1000]).layout)
    assert spread.bubble == 0 and spread.seconds == pytest.approx(1000 * one, rel=0.05)


def test_a_reference_pass_under_delayed_scales_is_timed_in_bfloat16() -> None:
    planner = make_planner(gpus=1)

    def seconds(recipe: str, fp8: str | None) -> tuple[float, float]:
        found = estimate(planner, model={"fp8_recipe": recipe, "fp8": fp8})
        return planner.time_reference(found.layout).seconds, found.time.seconds

    plain, delayed, tensorwise = seconds("delayed", None), seconds("delayed", "hybrid"), seconds("tensorwise", "hybrid")
    assert delayed[0] == pytest.approx(plain[0], rel=1e-3) and tensorwise[0] < 0.95 * plain[0]
    assert delayed[1] == tensorwise[1] < plain[1]
