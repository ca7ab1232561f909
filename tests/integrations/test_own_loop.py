"""The loop that the README shows, against our own trainer: the same losses and gradient norms."""

import runpy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from megatron.core import parallel_state

from megatron_solopo.config import Config
from megatron_solopo.errors import UserError
from megatron_solopo.integrations import PreferenceTask
from megatron_solopo.model.build import build_model
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.train.trainer import precompute_reference, train
from tests.distributed import run_distributed
from tests.integrations.megatron_runs import STEPS, config, recorded, with_experts
from tests.ranks import layout
from tests.tiny_models import make_model
from tests.train.runs import make_inputs

pytestmark = pytest.mark.parity

EXAMPLE = Path(__file__).parents[2] / "examples" / "megatron_lm" / "own_loop.py"
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
    "dp2": {},
}
CONSTANT = {"lr": 1e-3, "lr_decay_style": "constant"}
EP2 = {"expert_model_parallel_size": 2}


def run_all(folder: Path) -> dict[str, list[dict[str, float]]]:
    """Both trainers on every rank."""
    precompute_reference(config(folder, "unused", {}), overwrite=False)
    example = runpy.run_path(str(EXAMPLE))
    found = {}
    for name, parallel in LAYOUTS.items():
        settings = config(folder, name, parallel, optimizer=CONSTANT)
        train(settings)
        found[name] = example["train"](settings)
        parallel_state.destroy_model_parallel()
    settings = config(folder, "ep2", EP2, **with_experts(folder) | {"optimizer": CONSTANT})
    precompute_reference(settings, overwrite=False)
    train(settings)
    example["train"].__globals__["build_model"] = model_with_experts
    found["ep2"] = example["train"](settings)
    parallel_state.destroy_model_parallel()
    return found


def model_with_experts(settings: Config, task: PreferenceTask) -> ResponseModel:
    (model,) = build_model(task.model, chunk_tokens=settings.logprob.chunk_tokens, device=task.topology.device)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_inputs(tmp_path_factory.mktemp("own_loop"), rows=10, eval_count=0)
    make_model(path / "moe", "qwen2_moe", seed=0)
    make_model(path / "reference_moe", "qwen2_moe", seed=1)
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, list[dict[str, float]]]]:
    """By rank: metrics are the same on all of them."""
    return run_distributed(run_all, 2, folder)


@pytest.mark.parametrize("name", [*LAYOUTS, "ep2"])
def test_it_gives_our_trainers_losses_and_gradient_norms_on_every_rank(found: Any, folder: Path, name: str) -> None:
    ours = recorded(folder, name)
    assert len(ours) == STEPS
    for rank in found:
        for mine, theirs in zip(ours, rank[name], strict=True):
            assert theirs == pytest.approx({key: mine[key] for key in theirs}, rel=1e-6)
            assert ("moe/route_agreement" in theirs) == (name == "ep2")


def test_it_needs_process_groups(folder: Path) -> None:
    with pytest.raises(UserError, match=r"no process groups yet: call .* initialize_model_parallel first"):
        PreferenceTask(config(folder, "unused", {}))


def test_a_reference_cache_that_is_not_there_is_refused_by_name(folder: Path) -> None:
    settings = config(folder, "unused", {}, reference={"cache": folder / "nowhere"})
    with layout(), pytest.raises(UserError, match=r"nowhere: no cached reference log-probs; .*set reference.cache"):
        PreferenceTask(settings)


def test_without_a_reference_model_no_cache_is_needed(folder: Path) -> None:
    settings = config(folder, "unused", {}, reference={"cache": folder / "nowhere"}, objective={"loss_type": "simpo"})
    with layout() as groups:
        task = PreferenceTask(settings)
        assert task.topology == replace(groups, owns_world=False)
        assert task.batches(global_batch_size=2).next_batch().num_triplets == 2
