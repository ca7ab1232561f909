"""What is exported from the middle of a run and from its end is the model that was trained."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_solopo.checkpoint.conversion import export_model, verify_models
from megatron_solopo.config import Config, parse_config
from megatron_solopo.files import read_jsonl
from megatron_solopo.train.callbacks import Callback
from megatron_solopo.train.session import open_session
from megatron_solopo.train.state import Metrics
from megatron_solopo.train.trainer import Trainer, train
from tests.distributed import run_distributed
from tests.prepared import make_prepared
from tests.scoring import expected, joined, score
from tests.tiny_models import make_model

pytestmark = pytest.mark.parity

TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
VPP2 = TP2_PP2 | {"virtual_pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
FAMILIES = {"qwen2_tied": TP2_PP2, "qwen3": VPP2, "olmoe": TP2_PP2}
TOLERANCE = 2e-5


def config(folder: Path, name: str, model: Path, parallel: dict[str, Any], **training: Any) -> Config:
    return parse_config(
        {
            "run_dir": folder / name,
            "model": {"path": model},
            "data": {"path": folder / "prepared", "max_tokens_per_pack": 400},
            "training": {"global_batch_size": 4, **training},
            "optimizer": {"lr": 1e-2, "lr_decay_style": "constant"},
            "checkpoint": {"save_steps": 1},
            "parallel": parallel,
        },
        source="test",
    )


class RemoveSource(Callback):
    """Remove the model after the first step, before the first save."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_step_end(self, metrics: Metrics) -> None:
        shutil.rmtree(self.path, ignore_errors=True)


def train_all(folder: Path) -> dict[str, Tensor | None]:
    """On every rank: two steps from a source that disappears during the run, then one run from the checkpoint."""
    found = {}
    for family, parallel in FAMILIES.items():
        settings = config(folder, family, folder / family / "source", parallel, max_steps=2)
        with open_session(settings) as session:
            trainer = Trainer(session)
            if torch.distributed.get_rank() == 0:
                trainer.callbacks.append(RemoveSource(folder / family / "source"))
            trainer.run()
            found[family] = score(trainer.policy.chunks, session.topology)
    train(config(folder, "on", folder / family_checkpoint("qwen2_tied", 2), CP2, max_steps=1))
    return found


def family_checkpoint(family: str, step: int) -> str:
    return f"{family}/checkpoints/iter_{step:07d}"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("trained")
    make_prepared(folder / "prepared", rows=8, eval_count=0, seed=3)
    for family in FAMILIES:
        make_model(folder / family / "source", family)
        shutil.copytree(folder / family / "source", folder / f"{family}-kept")
    ranks = run_distributed(train_all, 4, folder)
    return folder, {family: joined([rank[family] for rank in ranks]) for family in FAMILIES}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_exported_model_is_the_trained_one(family: str, world, tmp_path: Path) -> None:
    folder, trained = world
    checkpoint = folder / family_checkpoint(family, 2)
    report = export_model(checkpoint, tmp_path / "exported", dtype=None, verification="full")
    assert "greatest relative error" in dict(report.rows)["logits"]
    found = expected(tmp_path / "exported")
    assert float((found - trained[family]).abs().max()) < TOLERANCE
    assert float((found - expected(folder / f"{family}-kept")).abs().max()) > 100 * TOLERANCE, "training changed it"
    assert not verify_models(tmp_path / "exported", checkpoint, logits=False).failures


@pytest.mark.parametrize("family", FAMILIES)
def test_the_middle_of_a_run_is_another_model(family: str, world, tmp_path: Path) -> None:
    folder, trained = world
    export_model(folder / family_checkpoint(family, 1), tmp_path / "exported", dtype=None, verification="tensors")
    assert float((expected(tmp_path / "exported") - trained[family]).abs().max()) > 100 * TOLERANCE
    failures = verify_models(tmp_path / "exported", folder / family_checkpoint(family, 2), logits=True).failures
    assert len(failures) == 1 and "tensors differ" in failures[0]


def test_a_run_starts_from_a_checkpoint(world) -> None:
    """Under another layout, without the Hugging Face directory; as its own reference the loss is ln 2."""
    folder, _ = world
    (first,) = read_jsonl(folder / "on" / "metrics.jsonl")
    assert first["po_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert (folder / "on" / "checkpoints" / "iter_0000001" / "huggingface" / "config.json").is_file()
