"""Whole runs with adapters: they continue under every layout, and PEFT and transformers load what is exported."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  (imported once, before ranks are forked)
from transformers import AutoModelForCausalLM

from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.checkpoint.conversion import export_adapter, export_model
from megatron_solopo.config import Config, LoRAConfig
from megatron_solopo.errors import UserError
from megatron_solopo.plan.disk import checkpoint_bytes
from megatron_solopo.train.trainer import train
from tests.distributed import run_distributed
from tests.layouts import pp, tp
from tests.tiny_models import make_adapter
from tests.train.runs import make_inputs, recorded, small_config

pytestmark = pytest.mark.parity

SAVED, LAST = "iter_0000002", "iter_0000004"
LORA = {"rank": 4, "alpha": 8.0}
CONTINUED = {"same": tp(2), "pp2": pp(2), "dp2": {}}


def config(folder: Path, name: str, parallel: dict[str, Any], **sections: Any) -> Config:
    """Run `name` of four steps, with a checkpoint in the middle."""
    return small_config(
        folder,
        name,
        parallel,
        **{
            "lora": LORA,
            "checkpoint": {"save_steps": 2},
            "optimizer": {"lr": 1e-2, "lr_warmup_iters": 1, "adam_eps": 1e-4},
            **sections,
        },
    )


def run_on_two(folder: Path) -> list[str]:
    """On every rank: a whole run, its continuations, and the start of a run from PEFT's adapter; returns refusals."""
    train(config(folder, "whole", tp(2)))
    for name, parallel in CONTINUED.items():
        if torch.distributed.get_rank() == 0:
            shutil.copytree(folder / "whole" / "checkpoints" / SAVED, folder / name / "checkpoints" / SAVED)
        torch.distributed.barrier()
        train(config(folder, name, parallel))
    # The learning rate of the first step is 0: the adapters stay as they are.
    from_peft = {"model": {"path": folder / "model", "adapter": folder / "model" / "adapter-4"}}
    short = {"training": {"global_batch_size": 4, "max_steps": 2}, "checkpoint": {"save_steps": 1}}
    train(config(folder, "peft-run", tp(2), **from_peft, **short))
    found = []
    for more in ({"lora": LORA | {"rank": 8}}, {"lora": None}, {"model": {"path": folder / "reference_model"}}):
        with pytest.raises(UserError) as error:
            train(config(folder, "whole", tp(2), **more))
        found.append(str(error.value))
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_inputs(tmp_path_factory.mktemp("adapters"))
    make_adapter(path / "model", LoRAConfig(**LORA))
    return path


@pytest.fixture(scope="module")
def refusals(folder: Path) -> list[str]:
    found: list[str] = run_distributed(run_on_two, 2, folder)[0]
    return found


@pytest.fixture(scope="module")
def exported(folder: Path, refusals: list[str]) -> Path:
    export_adapter(folder / "whole" / "checkpoints" / LAST, folder / "adapter", dtype=None)
    return folder / "adapter"


@pytest.mark.usefixtures("refusals")
@pytest.mark.parametrize("name", CONTINUED)
def test_a_run_continues_under_another_layout(name: str, folder: Path) -> None:
    whole, continued = recorded(folder, "whole")[2:], recorded(folder, name)
    if name == "same":
        assert continued == whole, "bit by bit"
    for one, other in zip(continued, whole, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.mark.usefixtures("refusals")
def test_a_checkpoint_holds_no_base(folder: Path) -> None:
    metadata = FileSystemReader(folder / "whole" / "checkpoints" / LAST).read_metadata().state_dict_metadata
    tensors = [each for each in metadata.values() if isinstance(each, TensorStorageMetadata)]
    stored = sum(each.size.numel() * each.properties.dtype.itemsize for each in tensors)
    planned = checkpoint_bytes(config(folder, "whole", tp(2)), read_architecture(folder / "model"))
    assert stored == planned, "adapters, and Adam's three numbers for each of theirs"


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(1, 60)[None]).logits[0]


def test_peft_loads_the_adapters(folder: Path, exported: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    before = logits(base)
    adapted = PeftModel.from_pretrained(base, exported)
    assert (logits(adapted) - before).norm() > 1e-3 * before.norm()
    report = export_model(
        folder / "whole" / "checkpoints" / LAST, folder / "merged", dtype=None, verification="full", merge=True
    )
    assert not report.failures and "greatest relative error" in str(report)
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("refusals")
def test_an_adapter_of_peft_comes_back_bit_by_bit(folder: Path) -> None:
    export_adapter(folder / "peft-run" / "checkpoints" / "iter_0000001", folder / "back", dtype=None)
    before, after = (load_file(folder / name / "adapter_model.safetensors") for name in ("model/adapter-4", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    settings = json.loads((folder / "back" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)


def test_a_run_keeps_its_adapters_and_its_base(refusals: list[str]) -> None:
    rank, none, base = refusals
    assert "lora=" in rank and "lora=null" in none and "holds other weights" in base


def test_an_export_says_what_it_writes(folder: Path, exported: Path) -> None:
    with pytest.raises(UserError, match="--adapter writes them for PEFT"):
        export_model(folder / "whole" / "checkpoints" / LAST, folder / "out", dtype=None, verification="none")
