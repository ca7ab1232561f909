"""Which rank the others wait for: by hand-made times, and in runs where one rank of several is delayed on purpose."""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_solopo.config import ModelConfig
from megatron_solopo.data.loader import GlobalBatchLoader
from megatron_solopo.files import read_jsonl
from megatron_solopo.train import step as step_module
from megatron_solopo.train.metrics import console_line
from megatron_solopo.train.policy import Policy
from megatron_solopo.train.straggler import Straggler, WorkClock, find_straggler
from megatron_solopo.train.trainer import train
from tests.distributed import run_distributed
from tests.train.runs import make_inputs, recorded, small_config
from tests.train.test_metrics import step_metrics

DELAY_SECONDS, WARMING_SECONDS, PACKS = 1.0, 3.0, 4
DP2: dict[str, Any] = {}
TP2_DP2 = {"tensor_model_parallel_size": 2}
PP2_DP2 = {"pipeline_model_parallel_size": 2}


def found(work: list[float], **sizes: int) -> Straggler | None:
    return find_straggler(work, 10.0, **{"ranks_per_replica_stage": 1, "stages": 1, **sizes})


def test_the_slowest_replica_is_named_with_the_share_that_the_others_wait() -> None:
    straggler = found([4.0, 4.0, 7.0, 5.0])
    assert straggler is not None and straggler.rank == 2
    assert straggler.share == pytest.approx((7 - (4 + 4 + 5) / 3) / 10)


def test_one_replica_has_nobody_to_wait_for() -> None:
    assert found([4.0]) is None
    assert found([4.0, 9.0], ranks_per_replica_stage=2) is None
    assert found([4.0, 9.0], stages=2) is None


def test_ranks_of_a_replica_that_are_equally_late_count_as_its_first_rank() -> None:
    straggler = found([4.0, 4.0, 6.98, 7.0], ranks_per_replica_stage=2)
    assert straggler is not None and (straggler.rank, straggler.share) == (2, pytest.approx(0.3))
    clear = found([4.0, 4.0, 6.0, 7.0], ranks_per_replica_stage=2)
    assert clear is not None and clear.rank == 3


def test_pipeline_stages_are_compared_with_their_own_kind() -> None:
    """The first stage ends last by the schedule; that is nobody's fault."""
    straggler = found([9.0, 9.0, 5.0, 5.5], stages=2)
    assert straggler is not None and (straggler.rank, straggler.share) == (3, pytest.approx(0.05))


def test_waits_are_no_work() -> None:
    clock = WorkClock(torch.device("cpu"))
    # Two steps. In the first the rank works for 1 s, waits for 20 s, and works for 2 s.
    with mock.patch.object(time, "perf_counter", side_effect=[10.0, 11.0, 31.0, 33.0, 40.0, 45.0]):
        clock.start()
        for _ in range(3):
            clock.switch()
        assert clock.seconds() == 3
        clock.start()
        clock.switch()
        assert clock.seconds() == 5


def test_the_console_names_the_rank_only_where_it_costs_something() -> None:
    line = console_line(step_metrics(3, straggler_rank=5, straggler_share=0.12), 10, 60)
    assert "| waits for rank 5 12% |" in line
    for share in (0.01, None):
        assert "waits" not in console_line(step_metrics(3, straggler_rank=5, straggler_share=share), 10, 60)


def slowed(original: Callable[..., Any], seconds: float) -> Callable[..., Any]:
    def delayed(*arguments: Any) -> Any:
        time.sleep(seconds)
        return original(*arguments)

    return delayed


def run_all(folder: Path, layouts: dict[str, tuple[dict[str, Any], int, str]]) -> None:
    """On every rank: an undisturbed run, then one with a delay on one rank, once per step or in each of its packs."""
    for name, (parallel, late_rank, where) in layouts.items():
        target: tuple[Any, str] = (
            (GlobalBatchLoader, "next_batch") if where == "data" else (step_module, "forward_microbatch")
        )
        seconds = DELAY_SECONDS / (1 if where == "data" else PACKS)
        for delayed in (False, True):
            patch: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
            if delayed and dist.get_rank() == late_rank:
                patch = mock.patch.object(*target, slowed(getattr(*target), seconds))
            training = {"global_batch_size": 2 * PACKS, "max_steps": 3}
            config = small_config(
                folder, f"{name}-{delayed}", parallel, objective={"loss_type": "simpo"}, training=training
            )
            with patch:
                train(config)


def run_two(folder: Path) -> None:
    """On both ranks: runs with a late rank, and one that is late only while it finds FP8's delayed scales."""
    run_all(folder, {"dp2": (DP2, 1, "data"), "dp2-packs": (DP2, 0, "pack")})
    slow = slowed(Policy.warm_scales, WARMING_SECONDS if dist.get_rank() == 1 else 0)
    objective, training = {"loss_type": "simpo"}, {"global_batch_size": 2 * PACKS, "max_steps": 2}
    # No CPU computes FP8: the passes are the same, without scales.
    with mock.patch.object(ModelConfig, "has_delayed_scales", True), mock.patch.object(Policy, "warm_scales", slow):
        train(small_config(folder, "warm", DP2, objective=objective, training=training))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_inputs(tmp_path_factory.mktemp("straggler"), eval_count=0)
    run_distributed(run_two, 2, path)
    return path


@pytest.fixture(scope="module")
def four_ranks(folder: Path) -> Path:
    layouts = {"tp2": (TP2_DP2, 3, "data"), "pp2": (PP2_DP2, 3, "data")}
    run_distributed(run_all, 4, folder, layouts)
    return folder


def assert_named(folder: Path, name: str, ranks: set[int]) -> None:
    first, *steps = read_jsonl(folder / f"{name}-True" / "metrics.jsonl")
    assert first["straggler_share"] > 0, "whoever it is: the first step also prepares things"
    assert {step["straggler_rank"] for step in steps} <= ranks, steps
    for step in steps:
        # A loaded machine slows the ranks too, the late one and the others.
        assert step["straggler_share"] * step["step_time"] > DELAY_SECONDS / 2, step
    assert recorded(folder, f"{name}-True") == recorded(folder, f"{name}-False"), "a delay changes no number"


@pytest.mark.parametrize(("name", "rank"), [("dp2", 1), ("dp2-packs", 0)])
def test_a_delayed_rank_is_named(folder: Path, name: str, rank: int) -> None:
    """Although every rank ends every step at the same time, and waits for the others before every pack."""
    assert_named(folder, name, {rank})


@pytest.mark.parametrize(("name", "replica"), [("tp2", {2, 3}), ("pp2", {1, 3})])
def test_a_delayed_rank_of_a_model_parallel_replica_names_the_replica(
    four_ranks: Path, name: str, replica: set[int]
) -> None:
    assert_named(four_ranks, name, replica)


def test_passes_that_find_delayed_scales_are_no_part_of_the_first_step(folder: Path) -> None:
    step, _ = read_jsonl(folder / "warm" / "metrics.jsonl")
    assert step["step_time"] < WARMING_SECONDS and step["straggler_share"] * step["step_time"] < WARMING_SECONDS / 2
    assert step["tokens_per_second"] == pytest.approx(step["num_tokens"] / step["step_time"])
