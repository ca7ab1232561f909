"""The acceptance tool on a CPU, where bfloat16 stands for the lower precision."""

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner, Result

from megatron_solopo.config import load_config
from megatron_solopo.parallel import topology
from megatron_solopo.train.session import check_and_join
from tests.distributed import run_distributed
from tests.prepared import make_prepared
from tests.ranks import layout
from tests.tiny_models import make_model

STEPS = 4


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("acceptance")
    values = {
        "run_dir": str(folder / "run"),
        "model": {"path": str(make_model(folder / "model", "qwen3"))},
        "data": {"path": str(make_prepared(folder / "prepared", rows=20, eval_count=0, seed=0))},
        "training": {"global_batch_size": 4},
        # After larger steps the losses of a tiny model depend on the processor's rounding.
        "optimizer": {"lr": 3e-5},
    }
    values["data"]["max_tokens_per_pack"] = 400
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.fixture(scope="module")
def done(config: Path) -> tuple[subprocess.CompletedProcess[str], dict]:
    output = config.parent / "accepted"
    command = [sys.executable, "-m", "tools.checks.fp8_acceptance", "--config", config, "--output", output]
    command += [f"--steps={STEPS}", "--triplets=12", "model.dtype=bfloat16"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert (output / "acceptance.png").stat().st_size > 10_000, run.stderr
    return run, json.loads((output / "result.json").read_text())


@pytest.fixture
def accept(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """The tool's command in this process."""
    command = importlib.import_module("tools.checks.fp8_acceptance").main
    options = ["--config", str(config), "--output", str(tmp_path / "out")]
    return lambda *arguments: CliRunner().invoke(command, [*options, *arguments])


def test_a_close_precision_is_accepted(done) -> None:
    run, result = done
    assert run.returncode == 0 and "accepted: model.dtype float32 -> bfloat16" in run.stdout, run.stderr
    assert result["accepted"] and all(each["passed"] for each in result["criteria"])
    assert {each["name"] for each in result["criteria"]} == {
        "gradient_cosine",
        "logp_difference_per_token",
        "gap_noise",
        "loss_difference",
    }


def test_the_precisions_do_differ_a_little(done) -> None:
    """Equal numbers would mean that one precision was measured twice."""
    _, result = done
    assert 0.999 < result["gradient_cosine"] < 0.999999
    assert 1e-5 < result["logp_difference_per_token"] < 0.05
    assert 1e-5 < result["gap_noise"] < 0.2 and result["gap_size"] > 0
    assert result["triplets"] == 12


def test_both_runs_are_told_step_by_step(done) -> None:
    _, result = done
    baseline, candidate = result["runs"]["baseline"], result["runs"]["candidate"]
    for curve in ("losses", "gaps", "grad_norms", "seconds"):
        assert len(baseline[curve]) == len(candidate[curve]) == STEPS
    assert baseline["losses"][0] == pytest.approx(0.693147, abs=1e-5)
    assert candidate["losses"] == pytest.approx(baseline["losses"], rel=0.05)
    assert candidate["losses"][1:] != baseline["losses"][1:]


@pytest.mark.parametrize(
    ("threshold", "criterion"),
    [("--min-gradient-cosine=1.01", "gradient_cosine"), ("--max-gap-noise=1e-9", "gap_noise")],
)
def test_a_threshold_that_is_not_met_is_the_verdict(accept, tmp_path: Path, threshold: str, criterion: str) -> None:
    run = accept("--steps=1", "--triplets=4", threshold, "model.dtype=bfloat16")
    assert run.exit_code == 1 and "NOT accepted" in run.stdout, run.output
    (failed,) = [
        each for each in json.loads((tmp_path / "out/result.json").read_text())["criteria"] if not each["passed"]
    ]
    assert failed["name"] == criterion


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["model.fp8"]),
        (["model.dtype=bfloat16", "objective.beta=1"], ["only model.* may differ"]),
        (["model.dtype=float32"], ["another precision"]),
        (["model.dtype=float8"], ["model.dtype='float8'"]),
        (["--triplets=2", "model.dtype=bfloat16"], ["global_batch_size"]),
    ],
)
def test_a_mistake_is_one_line_and_writes_nothing(accept, tmp_path: Path, arguments, words) -> None:
    run = accept(*arguments)
    lines = [line for line in run.stderr.splitlines() if line and not line.startswith("note: ")]
    assert run.exit_code == 1 and len(lines) == 1 and all(word in lines[0] for word in words), run.stderr
    assert not (tmp_path / "out").exists()


def cosine_on_two_ranks() -> float:
    """Each rank of a tensor-parallel pair holds one half of the vectors (3, 4 | 0, 12) and (6, 0 | 0, 6)."""
    precision_runs = importlib.import_module("tools.checks.precision_runs")
    with layout(tensor_model_parallel_size=2) as groups:
        halves = [([3.0, 4.0], [6.0, 0.0]), ([0.0, 12.0], [0.0, 6.0])][groups.tensor_group.rank()]
        one, other = ([torch.tensor(values[:1]), torch.tensor(values[1:])] for values in halves)
        return precision_runs.gradient_cosine(one, other, groups.device)


def test_the_cosine_is_over_all_ranks() -> None:
    expected = (3 * 6 + 12 * 6) / (13 * 72**0.5)
    assert run_distributed(cosine_on_two_ranks, 2) == [pytest.approx(expected)] * 2


def test_the_compared_gradient_holds_the_alignments_part(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the policy as its own reference the gap is 0, and |gap| has no gradient there."""
    precision_runs = importlib.import_module("tools.checks.precision_runs")
    norms = []
    for alpha in (0.0, 3.0):
        loaded = load_config(config, [f"objective.alpha={alpha}", "optimizer.use_distributed_optimizer=false"])
        _, groups, (source,) = check_and_join(loaded)
        datasets = source.datasets
        try:
            gradients = precision_runs.run_precision(loaded, datasets, groups, steps=1).gradients
        finally:
            topology.destroy(groups)
        norms.append(float(sum(gradient.square().sum() for gradient in gradients)) ** 0.5)
    assert norms[1] > 1.2 * norms[0] > 0
