"""A run that moves between a CPU and a GPU: same checkpoints, same course."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_solopo.files import read_jsonl
from tests.gpu.models import make_model
from tests.prepared import make_prepared

pytestmark = pytest.mark.gpu


def train(folder: Path, run: str, max_steps: int, device: str) -> None:
    """Start or continue a run; its learning rate does not depend on `max_steps`."""
    config = folder / "config.yaml"
    values = {
        "run_dir": str(folder / run),
        "model": {"path": str(folder / "model"), "dtype": "bfloat16"},
        "data": {"path": str(folder / "prepared"), "max_tokens_per_pack": 400},
        "training": {"global_batch_size": 4},
        "reference": {"cache": str(folder / f"reference-{run}-{device}")},
        "optimizer": {"lr": 1e-4, "lr_decay_style": "constant"},
        "logging": {"tensorboard": False},
    }
    config.write_text(yaml.safe_dump(values))
    command = [sys.executable, "-m", "megatron_solopo", "train", "--config", str(config)]
    done = subprocess.run(
        [*command, f"training.max_steps={max_steps}"],
        env=os.environ | {"MEGATRON_SOLOPO_DEVICE": device},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_run_moves_from_cpu_to_gpu_and_back(tmp_path: Path) -> None:
    make_model(tmp_path / "model", "qwen3", seed=0)
    make_prepared(tmp_path / "prepared", rows=24, eval_count=0, seed=0)
    train(tmp_path, "cpu", 6, "cpu")
    for steps, device in ((2, "cpu"), (4, "cuda"), (6, "cpu")):
        train(tmp_path, "moved", steps, device)
    stayed, moved = (read_jsonl(tmp_path / run / "metrics.jsonl") for run in ("cpu", "moved"))
    assert [step["step"] for step in moved] == [1, 2, 3, 4, 5, 6]
    for name, tolerance in (("loss", 5e-2), ("grad_norm", 1e-1)):
        assert [step[name] for step in moved] == pytest.approx([step[name] for step in stayed], rel=tolerance)
