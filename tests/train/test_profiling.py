"""Runs of two processes with a profile and with garbage collected by hand; neither changes a number."""

import contextlib
import gc
import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from pydantic import ValidationError

from megatron_solopo.config import ProfileConfig
from megatron_solopo.errors import UserError
from megatron_solopo.train.trainer import Trainer, train
from tests.distributed import run_distributed
from tests.train.runs import make_inputs, recorded, small_config

STEPS, INTERVAL = 6, 2
WAYS = ("manual", "automatic")


def run(folder: Path, name: str, *, manual_gc: bool | None = None, **profile: Any) -> tuple[str, str]:
    """On every rank: a run; returns what this rank said on its two streams."""
    training = {"global_batch_size": 4, "max_steps": STEPS, "manual_gc": manual_gc, "manual_gc_interval": INTERVAL}
    config = small_config(folder, name, {}, objective={"loss_type": "simpo"}, training=training, profile=profile)
    said, warned = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(warned):
        train(config)
    return said.getvalue(), warned.getvalue()


@contextlib.contextmanager
def collections() -> Iterator[list[tuple[int, int]]]:
    """Step and generation of every garbage collection of this process while steps run."""
    found: list[tuple[int, int]] = []
    trainers: list[Trainer] = []
    run_steps = Trainer._run_steps

    def note(phase: str, info: dict[str, int]) -> None:
        if phase == "start" and trainers:
            found.append((trainers[0].state.step, info["generation"]))

    def noted(trainer: Trainer) -> None:
        trainers.append(trainer)
        run_steps(trainer)
        trainers.clear()

    gc.callbacks.append(note)
    try:
        with mock.patch.object(Trainer, "_run_steps", noted):
            yield found
    finally:
        gc.callbacks.remove(note)


def run_all(folder: Path) -> dict[str, Any]:
    """On every rank."""
    found: dict[str, Any] = {}
    with collections() as found["automatic"]:
        run(folder, "plain", manual_gc=False)
    with collections() as found["manual"]:
        run(folder, "collected")
    found["enabled after"] = gc.isenabled()
    found["profiled"] = run(folder, "profiled", steps=[2, 3], ranks=[1])
    with mock.patch.object(torch.profiler.profile, "start", side_effect=RuntimeError("no\ntracing")):
        found["no start"] = run(folder, "no-start", steps=[2, 3])
    if dist.get_rank() == 0:
        (folder / "no-room").mkdir()
        (folder / "no-room" / "profile").touch()
    dist.barrier()
    found["no room"] = run(folder, "no-room", steps=[2, 3])
    found["refused"] = []
    for profile in ({"steps": [2, STEPS + 1]}, {"steps": [1, 1], "ranks": [0, 2]}):
        with pytest.raises(UserError) as error:
            run(folder, "refused", **profile)
        found["refused"].append(str(error.value))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("profiled"), eval_count=0)


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return run_distributed(run_all, 2, folder)


def test_all_ranks_collect_garbage_after_the_same_steps_and_at_no_other_moment(found: list[dict[str, Any]]) -> None:
    """Megatron collects after the last step, when the run is saved."""
    manual, automatic = ([[each for each in rank[way] if each[0] < STEPS] for rank in found] for way in WAYS)
    assert manual == [[(step, 2) for step in range(INTERVAL, STEPS, INTERVAL)]] * 2
    assert any(generation < 2 for rank in automatic for _, generation in rank)
    assert all(rank["enabled after"] for rank in found)


@pytest.mark.parametrize("name", ["collected", "profiled", "no-start", "no-room"])
def test_no_number_changes(found: list[dict[str, Any]], folder: Path, name: str) -> None:
    assert recorded(folder, name) == recorded(folder, "plain") and len(recorded(folder, name)) == STEPS


def test_the_chosen_rank_leaves_a_trace_of_the_steps(found: list[dict[str, Any]], folder: Path) -> None:
    path = folder / "profiled" / "profile" / "steps_2-3_rank_0001"
    assert list(path.parent.iterdir()) == [path]
    with gzip.open(path / "trace.json.gz", "rt") as stream:
        events = json.load(stream)["traceEvents"]
    names = [event.get("name", "") for event in events]
    assert "aten::mm" in names and any("gloo" in name or "allreduce" in name for name in names)
    assert [f"[rank 1] profiled: {path}\n" in rank["profiled"][0] for rank in found] == [False, True]


def test_a_profiler_that_fails_is_a_warning_of_its_rank(found: list[dict[str, Any]], folder: Path) -> None:
    first, second = found
    assert "[rank 0] warning: the profile of this rank cannot start: RuntimeError: no tracing\n" in first["no start"][1]
    assert "[rank 0] warning: the profile of this rank was not written: " in first["no room"][1]
    assert "warning" not in second["no start"][1] and "warning" not in second["no room"][1]


def test_steps_and_ranks_that_the_run_does_not_have_are_refused(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["refused"] == [
            f"profile.steps=[2, {STEPS + 1}]: the run has {STEPS} steps; set earlier steps",
            "profile.ranks: there is no rank 2 among 2; set lower ranks",
        ]


@pytest.mark.parametrize("steps", [[3, 2], [3], [0, 1], [1, 2, 3]])
def test_a_window_is_a_first_and_a_last_step(steps: list[int]) -> None:
    with pytest.raises(ValidationError):
        ProfileConfig(steps=steps)
