"""Runs that stop and go on, on a GPU and between a CPU and a GPU: same checkpoints, same course."""

import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

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


# A run is a fork of a server that has imported what runs need.
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["tests.preloaded"])


def train(folder: Path, run: str, max_steps: int, *overrides: str, on_cpu: bool = False) -> None:
    """Start or continue a run; its learning rate does not depend on `max_steps`."""
    config = folder / f"{run}.yaml"
    values = {
        "run_dir": str(folder / run),
        "model": {"path": str(folder / "model"), "dtype": "bfloat16"},
        "data": {"path": str(folder / "prepared"), "max_tokens_per_pack": 400},
        "training": {"global_batch_size": 4},
        "reference": {"cache": str(folder / f"reference-{run}-{'cpu' if on_cpu else 'gpu'}")},
        "optimizer": {"lr": LEARNING_RATE, "lr_decay_style": "constant"},
        "logging": {"tensorboard": False},
    }
    config.write_text(yaml.safe_dump(values))
    arguments = ["train", "--config", str(config), f"training.max_steps={max_steps}", *overrides]
    if on_cpu:
        command = [sys.executable, "-m", "megatron_solopo", *arguments]
        subprocess.run(command, env=os.environ | {"MEGATRON_SOLOPO_DEVICE": "cpu"}, check=True)
        return
    process = _SERVER.Process(target=_command_line, args=(arguments,))
    process.start()
    process.join()
    assert process.exitcode == 0


def _command_line(arguments: list[str]) -> None:
    from megatron_solopo.cli.main import main

    main(arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    make_model(folder / "model", "qwen3", seed=0)
    make_prepared(folder / "prepared", rows=16, eval_count=0, seed=0)
    return folder


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
BLOCKWISE = (*FP8, "model.fp8_recipe=blockwise")
STATEFUL = {
    "optimizer offload": ("optimizer.optimizer_offload_fraction=0.5",),
    "delayed scales": (*FP8, "model.fp8_recipe=delayed"),
    "FP8 weights": (*BLOCKWISE, "model.fp8_param=true"),
    "mxfp8": (*FP8, "model.fp8_recipe=mxfp8"),
}


def run_twice(folder: Path, name: str) -> tuple[Path, Path]:
    """Four steps at once, and four with a stop after the second, once for all tests. Returns both runs' folders."""
    whole, stopped = (folder / f"{name} {kind}" for kind in ("whole", "stopped"))
    if not whole.exists():
        train(folder, whole.name, 4, *STATEFUL[name])
        for steps in (2, 4):
            train(folder, stopped.name, steps, *STATEFUL[name])
    return whole, stopped


def metrics(run: Path) -> list[dict[str, Any]]:
    return read_jsonl(run / "metrics.jsonl")


@pytest.mark.parametrize("name", STATEFUL)
def test_a_run_goes_on_as_if_it_had_not_stopped(name: str, folder: Path) -> None:
    skip_without(STATEFUL[name][-1].removeprefix("model.fp8_recipe="))
    runs = run_twice(folder, name)
    whole, stopped = map(metrics, runs)
    # The attention's backward pass adds in no fixed order; what is lost in a checkpoint shows from step 3 on.
    for key, tolerance in (("loss", 1e-2), ("grad_norm", 5e-2)):
        assert [step[key] for step in stopped] == pytest.approx([step[key] for step in whole], rel=tolerance)
    wanted, found = (master_weights(run / "checkpoints" / "iter_0000004") for run in runs)
    for parameter, tensor in wanted.items():
        assert float((found[parameter] - tensor).abs().max()) < 4 * 2 * LEARNING_RATE, parameter
        assert float((found[parameter] - tensor).norm() / tensor.norm()) < 2e-3, parameter


def test_master_weights_of_fp8_weights_are_exact(folder: Path) -> None:
    """They come from the model's own numbers, not from FP8 roundings (off by up to 6 %), and small updates stay."""
    _, fp8 = run_twice(folder, "FP8 weights")
    train(folder, "bf16", 2, *BLOCKWISE, "profile.steps=[2,2]")
    assert list(folder.glob("bf16/**/memory*")), "no snapshot of the GPU's memory"
    found, wanted = (master_weights(run / "checkpoints" / "iter_0000002") for run in (fp8, folder / "bf16"))
    assert found.keys() == wanted.keys() != set()
    for name, tensor in wanted.items():
        # Two steps of Adam move a weight by the learning rate each, in one direction or the other.
        assert float((found[name] - tensor).abs().max()) < 2 * 2 * LEARNING_RATE + 1e-7, name


def test_a_run_moves_from_cpu_to_gpu_and_back(folder: Path) -> None:
    """Each device scores the reference with its own kernels, into a cache of its own."""
    train(folder, "cpu", 3, on_cpu=True)
    for steps, on_cpu in ((1, True), (2, False), (3, True)):
        train(folder, "moved", steps, on_cpu=on_cpu)
    stayed, moved = (metrics(folder / run) for run in ("cpu", "moved"))
    assert [step["step"] for step in moved] == [1, 2, 3]
    for name, tolerance in (("loss", 5e-2), ("grad_norm", 1e-1)):
        assert [step[name] for step in moved] == pytest.approx([step[name] for step in stayed], rel=tolerance)
