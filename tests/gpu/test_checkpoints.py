"""Runs that stop and go on, on a GPU and between a CPU and a GPU: same checkpoints, same course."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
import yaml
from torch import Tensor

from megatron_solopo.files import read_jsonl
from tests.gpu.models import make_model, skip_without
from tests.prepared import make_prepared

pytestmark = pytest.mark.gpu

LEARNING_RATE = 1e-4


def train(folder: Path, run: str, max_steps: int, device: str, *overrides: str) -> None:
    """Start or continue a run; its learning rate does not depend on `max_steps`."""
    config = folder / "config.yaml"
    values = {
        "run_dir": str(folder / run),
        "model": {"path": str(folder / "model"), "dtype": "bfloat16"},
        "data": {"path": str(folder / "prepared"), "max_tokens_per_pack": 400},
        "training": {"global_batch_size": 4},
        "reference": {"cache": str(folder / f"reference-{run}-{device}")},
        "optimizer": {"lr": LEARNING_RATE, "lr_decay_style": "constant"},
        "logging": {"tensorboard": False},
    }
    config.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "megatron_solopo", "train", "--config", str(config)]
    done = subprocess.run(
        [*command, f"training.max_steps={max_steps}", *overrides],
        env=os.environ | {"MEGATRON_SOLOPO_DEVICE": device},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model(tmp_path / "model", "qwen3", seed=0)
    make_prepared(tmp_path / "prepared", rows=24, eval_count=0, seed=0)
    return tmp_path


def master_weights(checkpoint: Path) -> dict[str, Tensor]:
    """The optimizer's fp32 weights, by Megatron's name."""
    entries = torch_checkpoint.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    found = {
        name: torch.empty(entry.size, dtype=torch.float32)
        for name, entry in entries.items()
        if name.startswith("optimizer.state.param.")
    }
    torch_checkpoint.load(found, checkpoint_id=checkpoint, no_dist=True)
    return found


FP8 = ("model.fp8=hybrid", "model.implementation=transformer_engine")
STATEFUL = {
    "optimizer offload": ("optimizer.optimizer_offload_fraction=0.5",),
    "delayed scales": (*FP8, "model.fp8_recipe=delayed"),
    "FP8 weights": (*FP8, "model.fp8_recipe=blockwise", "model.fp8_param=true"),
    "mxfp8": (*FP8, "model.fp8_recipe=mxfp8"),
}


@pytest.mark.parametrize("overrides", STATEFUL.values(), ids=STATEFUL)
def test_a_run_goes_on_as_if_it_had_not_stopped(overrides: tuple[str, ...], folder: Path) -> None:
    skip_without(overrides[-1].removeprefix("model.fp8_recipe="))
    train(folder, "whole", 6, "cuda", *overrides)
    for steps in (3, 6):
        train(folder, "stopped", steps, "cuda", *overrides)
    whole, stopped = (read_jsonl(folder / run / "metrics.jsonl") for run in ("whole", "stopped"))
    # The attention's backward pass adds in no fixed order; what is lost in a checkpoint shows from step 4 on.
    for name, tolerance in (("loss", 1e-2), ("grad_norm", 5e-2)):
        assert [step[name] for step in stopped] == pytest.approx([step[name] for step in whole], rel=tolerance)
    wanted, found = (master_weights(folder / run / "checkpoints" / "iter_0000006") for run in ("whole", "stopped"))
    for name, tensor in wanted.items():
        assert float((found[name] - tensor).abs().max()) < 6 * 2 * LEARNING_RATE, name
        assert float((found[name] - tensor).norm() / tensor.norm()) < 2e-3, name


def test_master_weights_of_fp8_weights_are_exact(folder: Path) -> None:
    """They come from the model's own numbers, not from FP8 roundings (off by up to 6 %), and small updates stay."""
    recipe = (*FP8, "model.fp8_recipe=blockwise")
    train(folder, "fp8", 2, "cuda", *recipe, "model.fp8_param=true")
    train(folder, "bf16", 2, "cuda", *recipe)
    found, wanted = (master_weights(folder / run / "checkpoints" / "iter_0000002") for run in ("fp8", "bf16"))
    assert found.keys() == wanted.keys() != set()
    for name, tensor in wanted.items():
        # Two steps of Adam move a weight by the learning rate each, in one direction or the other.
        assert float((found[name] - tensor).abs().max()) < 2 * 2 * LEARNING_RATE + 1e-7, name


def test_a_run_moves_from_cpu_to_gpu_and_back(folder: Path) -> None:
    train(folder, "cpu", 6, "cpu")
    for steps, device in ((2, "cpu"), (4, "cuda"), (6, "cpu")):
        train(folder, "moved", steps, device)
    stayed, moved = (read_jsonl(folder / run / "metrics.jsonl") for run in ("cpu", "moved"))
    assert [step["step"] for step in moved] == [1, 2, 3, 4, 5, 6]
    for name, tolerance in (("loss", 5e-2), ("grad_norm", 1e-1)):
        assert [step[name] for step in moved] == pytest.approx([step[name] for step in stayed], rel=tolerance)
