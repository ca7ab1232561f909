"""`pretrain()` of Megatron-LM with our plug-in, against our own trainer. One launch on two ranks runs them all."""

import shutil
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_solopo.train.trainer import precompute_reference, train
from tests.distributed import run_distributed
from tests.integrations.megatron_runs import STEPS, arguments, config, pretrain, recorded
from tests.prepared import make_prepared
from tests.tiny_models import make_model

pytestmark = pytest.mark.parity
pytest.importorskip("megatron.training", reason="this megatron-core has no megatron.training")

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
SAVED = 2
# Layout -> what our trainer is told, and Megatron-LM.
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tp2": (TP2, TP2 | {"micro_batch_size": 1}),
    "pp2": (PP2, PP2 | {"micro_batch_size": 2}),
    "vpp2": (
        PP2 | {"virtual_pipeline_model_parallel_size": 2},
        PP2 | {"num_layers_per_virtual_pipeline_stage": 1, "micro_batch_size": 1},
    ),
    "cp2": (CP2, CP2 | {"micro_batch_size": 4}),
    "dp2": ({}, {"micro_batch_size": 2}),
}
EVALUATED = {"eval_iters": 1, "eval_interval": 2}


def run_all(folder: Path) -> dict[str, Any]:
    """On every rank: our runs, Megatron-LM's, each from the other's checkpoint, and what is refused."""
    precompute_reference(config(folder, "unused", TP2), overwrite=False)
    found: dict[str, Any] = {}
    for name, (ours, theirs) in LAYOUTS.items():
        save = {"checkpoint": {"save_steps": SAVED}} if name == "tp2" else {}
        train(config(folder, f"ours-{name}", ours, **save))
        changes = {"save": folder / "theirs-tp2", "save_interval": SAVED} | EVALUATED if name == "tp2" else {}
        found[name], found[f"{name} evaluated"] = run_with_evaluation(arguments(folder, name, theirs | changes))
    return found


def run_with_evaluation(argv: list[str], **keywords: Any) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    from megatron.training import training

    evaluated = []
    evaluate = training.evaluate

    def spy(*arguments: Any, **keywords: Any) -> Any:
        result = evaluate(*arguments, **keywords)
        evaluated.append({name: float(value) for name, value in result[0].items()})
        return result

    with mock.patch.object(training, "evaluate", spy):
        return pretrain(argv, **keywords), evaluated


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("megatron_lm")
    make_model(path / "model", "qwen2_tied", seed=0)
    make_model(path / "reference_model", "qwen2_tied", seed=1)
    make_prepared(path / "prepared", rows=14, eval_count=4, seed=0)
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """The last rank's results: it is on the last stage, where losses are."""
    result: dict[str, Any] = run_distributed(run_all, 2, folder)[-1]
    return result


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradient_norms_are_our_trainers(found: dict[str, Any], folder: Path, layout: str) -> None:
    ours, theirs = recorded(folder, f"ours-{layout}"), found[layout]
    assert len(ours) == len(theirs) == STEPS
    for name in ("loss", "grad_norm", "rewards/chosen", "solo_ra/gap_signed"):
        wanted = [step[name] for step in ours]
        assert [step[name] for step in theirs] == pytest.approx(wanted, rel=2e-5, abs=1e-6), name
