"""Ranks built in no memory agree with the estimate, at toy size and at 1,024 GPUs."""

import time
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.plan.dry_run import dry_run
from megatron_solopo.plan.layouts import Layout, distinct_ranks, make_layout
from tests.layouts import cp, ep, pp, stages, tp
from tests.plan.memory_ranks import Case, shapes
from tests.plan.models import make_planner
from tests.plan.test_memory import ATTENTION, BF16, DROPOUT, FULL
from tests.tiny_models import FAMILIES

pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the command does it in a process that computes on the CPU"),
    pytest.mark.filterwarnings("ignore::FutureWarning:torch"),
]
TOY = [
    Case("tied", family="qwen2_tied", parallel=tp(2) | pp(2), model=BF16),
    Case("interleaved", parallel=pp(2, 2) | cp(2), model=BF16),
    Case("uneven", parallel=pp(4, **stages("E|tt|tt|L")), model=BF16),
    Case("full", family="qwen3", parallel=tp(2, **FULL)),
    Case("experts", family="qwen2_moe", parallel=ep(2) | cp(2) | pp(2), model=BF16),
    Case("whole-experts", family="qwen3_moe", parallel=tp(2) | ep(2, expert_tensor_parallel_size=1)),
    Case("plain-optimizer", parallel=pp(2), model=BF16, distributed_optimizer=False),
    Case("adapters", lora=DROPOUT, family="qwen2_tied", parallel=tp(2) | pp(2) | cp(2), model=BF16),
    Case("adapters-of-experts", lora=ATTENTION, family="qwen3_moe", parallel=pp(2, 2) | cp(2) | ep(2)),
]


@pytest.mark.parametrize("case", TOY, ids=lambda case: case.name)
def test_a_toy_layout_is_as_estimated(case: Case, tmp_path: Path) -> None:
    FAMILIES[case.family].save_pretrained(tmp_path / case.family)
    config = case.config(tmp_path)
    checks = dry_run(read_architecture(config.model.path), Layout(config, 3), shapes(config)[0], 4)
    assert [check.difference for check in checks] == [""] * len(checks)
    run = [check for check in checks if check.saved_bytes is not None]
    assert len(run) == (1 if case.name in ("full", "whole-experts") else 3 if case.name == "uneven" else 2)
    shared = 3 * 8 * shapes(config)[0].padded_tokens  # token ids: the packs of a dry run share them
    for check in run:
        assert check.estimated_saved_bytes == pytest.approx(check.saved_bytes, rel=0.1, abs=shared)
    assert not dist.is_initialized()


def test_a_process_that_trained_experts_can_run_dry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron keeps the scale of the router's losses in a class, which outlives a run."""
    scale = torch.tensor(2.0)
    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", scale)
    FAMILIES["qwen3_moe"].save_pretrained(tmp_path / "qwen3_moe")
    config = Case("experts", family="qwen3_moe", parallel=ep(2), model=BF16).config(tmp_path)
    checks = dry_run(read_architecture(config.model.path), Layout(config, 2), shapes(config)[0], 2)
    assert [check.difference for check in checks] == [""] * len(checks)
    assert MoEAuxLossAutoScaler.main_loss_backward_scale is scale and scale == 2


def test_a_run_that_fails_leaves_no_process_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FAMILIES["llama3"].save_pretrained(tmp_path / "llama3")
    config = Case("failing", parallel=pp(2), model=BF16).config(tmp_path)
    monkeypatch.setattr("megatron_solopo.plan.dry_run.build_optimizer", mock.Mock(side_effect=RuntimeError("as asked")))
    with pytest.raises(RuntimeError, match="as asked"):
        dry_run(read_architecture(config.model.path), Layout(config, 2), shapes(config)[0], 2)
    assert not dist.is_initialized() and not parallel_state.model_parallel_is_initialized()


def test_1024_ranks_of_a_70b_model_in_under_a_minute() -> None:
    planner = make_planner("llama-3.1-70b", gpus=1024)
    layout = make_layout(planner.config, {"tp": 8, "pp": 4, "vpp": 2, "cp": 8}, 1024)
    packs = planner.packer.pack(layout.config, layout.data_parallel_size).heaviest_rank
    ranks = distinct_ranks(layout)
    assert [each.rank for each in ranks] == [0, 255, 512, 767, 768, 1023]
    started = time.process_time()
    checks = dry_run(planner.architecture, layout, packs[0], len(packs))
    assert time.process_time() - started < 60
    assert [check.rank for check in checks] == [each.rank for each in ranks]
    assert not any(check.difference for check in checks)
    for check in checks:
        if check.saved_bytes is not None:
            assert check.estimated_saved_bytes == pytest.approx(check.saved_bytes, rel=0.02)
    # All tensor-parallel ranks of all stages hold the model once, but for norms, which they share.
    assert checks[0].num_parameters * 8 * 4 == pytest.approx(planner.architecture.num_parameters, rel=0.05)


def test_1024_ranks_that_share_128_experts() -> None:
    planner = make_planner("qwen3-30b-a3b", gpus=1024)
    layout = make_layout(planner.config, {"tp": 2, "pp": 8, "vpp": None, "cp": 8, "ep": 64, "etp": 1}, 1024)
    packs = planner.packer.pack(layout.config, layout.data_parallel_size).heaviest_rank
    checks = dry_run(planner.architecture, layout, packs[0], len(packs))
    assert [check.rank for check in checks] == [0, 127, 512, 639, 896, 1023]
    assert not any(check.difference for check in checks)
    for check in checks:
        if check.saved_bytes is not None:
            assert check.estimated_saved_bytes == pytest.approx(check.saved_bytes, rel=0.02)
