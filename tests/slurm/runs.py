"""A small two-rank run, its configuration on disk, and what counts as the same result."""

from pathlib import Path
from typing import Any

import yaml

from megatron_solopo.files import read_jsonl
from tests.train.runs import make_inputs


def write_config(folder: Path, *, max_steps: int, save_steps: int) -> Path:
    """Model, data and `config.yaml` in `folder`; every run names its own `run_dir`."""
    make_inputs(folder, rows=40)
    config: dict[str, Any] = {
        "run_dir": str(folder / "unnamed"),
        "model": {"path": str(folder / "model")},
        "data": {"path": str(folder / "prepared"), "max_tokens_per_pack": 400},
        "reference": {"model_path": str(folder / "reference_model"), "cache": str(folder / "reference")},
        "training": {"global_batch_size": 4, "max_steps": max_steps, "eval_steps": max_steps // 2},
        "optimizer": {"lr": 1e-3, "lr_warmup_iters": 1},
        "checkpoint": {"save_steps": save_steps},
        "logging": {"tensorboard": False},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def steps_done(run_dir: Path) -> int:
    """Steps in the metrics so far."""
    path = run_dir / "metrics.jsonl"
    return len(read_jsonl(path)) if path.exists() else 0
