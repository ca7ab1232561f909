"""NaN in one rank's gradient or one triplet's loss: all ranks skip the step and go on as if it had not been."""

import math
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_solopo.files import read_jsonl
from megatron_solopo.objective import compute_objective
from megatron_solopo.train import step
from megatron_solopo.train.bad_numbers import SKIPPED_FILE, SkippedStep, record_skip
from megatron_solopo.train.policy import Policy, StepResult
from megatron_solopo.train.state import SkippedSteps
from megatron_solopo.train.trainer import precompute_reference, train
from tests.distributed import run_distributed
from tests.train.runs import at_call, make_inputs, recorded, small_config

TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
TP2_DP2 = {"tensor_model_parallel_size": 2}
BAD = 2


@contextmanager
def at_step(number: int, change: Any) -> Iterator[None]:
    """Replace call `number` of `Policy.step` by `change(original, policy, ...)`."""
    original, calls = Policy.step, 0

    def counting(*arguments: Any, **keywords: Any) -> StepResult:
        nonlocal calls
        calls += 1
        if calls == number:
            return change(original, *arguments, **keywords)
        return original(*arguments, **keywords)

    with mock.patch.object(Policy, "step", counting):
        yield


def nan_in_the_gradient(original: Any, this: Policy, *arguments: Any, **keywords: Any) -> StepResult:
    """One value of one parameter's gradient, on rank 2 alone, before it is reduced."""
    if dist.get_rank() != 2:
        return original(this, *arguments, **keywords)
    parameter = next(each for each in this.chunks[0].parameters() if each.dim() == 2)
    hook = parameter.register_hook(lambda gradient: torch.full_like(gradient, math.nan))
    try:
        return original(this, *arguments, **keywords)
    finally:
        hook.remove()


def never_seen(original: Any, this: Policy, *arguments: Any, **keywords: Any) -> StepResult:
    """What a skip must be equal to: nothing is computed at all."""
    keywords["before_reduction"]()
    return StepResult([], math.nan, 0.0, skipped=True, gradient_was_finite=True)


def nan_in_one_loss_of_the_first_replica() -> Callable[..., Any]:
    """The second step's first pack, which is one triplet: two packs per step and rank."""
    calls = iter(range(1, 1000))

    def compute(*arguments: Any) -> Any:
        result = compute_objective(*arguments)
        bad = next(calls) == 3 and dist.get_rank() < 2
        return replace(result, loss_T=result.loss_T * math.nan) if bad else result

    return compute


def run_all(folder: Path) -> None:
    precompute_reference(small_config(folder, "unused", TP2_PP2), overwrite=False)
    for name, change in {"gradient": nan_in_the_gradient, "never-seen": never_seen}.items():
        with at_step(BAD, change):
            train(small_config(folder, name, TP2_PP2))
    stop = at_call(Policy, "step", BAD + 1, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with at_step(BAD, nan_in_the_gradient), stop, pytest.raises(SystemExit):
        train(small_config(folder, "resumed", TP2_PP2))
    train(small_config(folder, "resumed", TP2_PP2))
    with mock.patch.object(step, "compute_objective", nan_in_one_loss_of_the_first_replica()):
        train(small_config(folder, "loss", TP2_DP2))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_inputs(tmp_path_factory.mktemp("bad_numbers"))
    run_distributed(run_all, 4, path)
    return path


def test_a_skipped_step_is_counted_and_leaves_its_numbers_out(folder: Path) -> None:
    steps = recorded(folder, "gradient")
    assert [each["step"] for each in steps] == [1, 2, 3, 4]
    assert [each["skipped"] for each in steps] == [0, 1, 0, 0]
    assert [each["skipped_steps"] for each in steps] == [0, 1, 1, 1]
    assert steps[1]["grad_norm"] is None and steps[1]["loss"] is not None


def test_the_run_is_the_one_that_never_saw_the_step(folder: Path) -> None:
    skipped, never_seen = recorded(folder, "gradient"), recorded(folder, "never-seen")
    assert skipped[0] == never_seen[0] and skipped[2:] == never_seen[2:]
    assert {name: value for name, value in skipped[1].items() if name.startswith("eval_")} == {
        name: value for name, value in never_seen[1].items() if name.startswith("eval_")
    }
    # The second step's place in the schedule went to the third: its rate is the first behind the warm-up.
    assert [each["learning_rate"] for each in skipped[:3]] == [0.0, 1e-3, 1e-3]


def test_a_restart_behind_a_skipped_step_changes_nothing(folder: Path) -> None:
    assert recorded(folder, "resumed") == recorded(folder, "gradient")


def test_a_bad_gradient_is_told_with_its_rank_and_triplets(folder: Path) -> None:
    (skip,) = read_jsonl(folder / "gradient" / "skipped_steps.jsonl")
    assert skip["step"] == BAD and skip["cause"] == "gradient"
    assert len(skip["ranks"]) == 1 and skip["ranks"][0].startswith("rank 2 (")
    assert len(skip["triplets"]) == 4 and all(triplet.startswith("row-") for triplet in skip["triplets"])


def test_a_bad_loss_is_told_with_its_triplet_alone(folder: Path) -> None:
    (skip,) = read_jsonl(folder / "loss" / "skipped_steps.jsonl")
    assert skip["cause"] == "loss" and len(skip["triplets"]) == 1
    assert [rank.split(" (")[0] for rank in skip["ranks"]] == ["rank 0", "rank 1"]
    assert skip["step"] == 2 and [each["skipped"] for each in recorded(folder, "loss")] == [0, 1, 0, 0]


def test_steps_in_a_row_are_counted() -> None:
    count = SkippedSteps()
    found = []
    for skipped in (True, True, False, True):
        count = count.after(skipped=skipped)
        found.append((count.total, count.in_a_row))
    assert found == [(1, 1), (2, 2), (2, 0), (3, 1)]


def test_a_full_disk_costs_the_line_of_a_skipped_step_and_not_the_run(tmp_path: Path, capsys: Any) -> None:
    skip = SkippedStep(3, "loss", ["a"], ["rank 0 (host)"])
    record_skip(tmp_path, skip)
    assert [each["triplets"] for each in read_jsonl(tmp_path / SKIPPED_FILE)] == [["a"]]
    full = tmp_path / "full"
    full.mkdir()
    (full / SKIPPED_FILE).symlink_to("/dev/full")
    record_skip(full, skip)
    said = capsys.readouterr().out
    assert said.count("warning: step 3 skipped: the loss of a is not finite on rank 0 (host)") == 2
    assert f"warning: {full / SKIPPED_FILE}: No space left on device; step 3 is missing in it" in said
    with pytest.raises(IsADirectoryError):
        (tmp_path / "other" / SKIPPED_FILE).mkdir(parents=True)
        record_skip(tmp_path / "other", skip)
