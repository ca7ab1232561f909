"""Small whole runs on forked ranks, and what they left."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch.distributed as dist

from megatron_solopo.config import Config, parse_config
from megatron_solopo.files import read_jsonl
from tests.prepared import make_prepared
from tests.tiny_models import make_model

# What depends on the clock and the machine.
_MEASURED = ("step_time", "tokens_per_second", "mfu", "peak_memory_bytes", "straggler_rank", "straggler_share")


def make_inputs(folder: Path, *, rows: int = 15, eval_count: int = 5) -> Path:
    """A tiny model, another one for reference, and prepared triplets, some of them held out."""
    make_model(folder / "model", "qwen2_tied", seed=0)
    make_model(folder / "reference_model", "qwen2_tied", seed=1)
    make_prepared(folder / "prepared", rows=rows, eval_count=eval_count, seed=0)
    return folder


def small_config(folder: Path, name: str, parallel: dict[str, Any], **sections: Any) -> Config:
    """Run `name` of four steps, several packs each, on what `make_inputs` made."""
    return parse_config(
        {
            "run_dir": folder / name,
            "model": {"path": folder / "model"},
            "data": {"path": folder / "prepared", "max_tokens_per_pack": 200, "max_triplets_per_pack": 1},
            "reference": {"cache": folder / "reference"},
            "training": {"global_batch_size": 4, "max_steps": 4, "eval_steps": 2},
            "optimizer": {"lr": 1e-3, "lr_warmup_iters": 1},
            "logging": {"tensorboard": False},
            "parallel": parallel,
            **sections,
        },
        source="test",
    )


def leave_interrupted(folder: Path, source: str, name: str, saved: int) -> None:
    """On every rank: make the directory of run `name` that `source` would have left, had it died soon after a save.

    Args:
        saved: the step of its last checkpoint. It had got one step further.
    """
    if dist.get_rank() == 0:
        kept = folder / source / "checkpoints" / f"iter_{saved:07d}"
        shutil.copytree(kept, folder / name / "checkpoints" / kept.name)
        (folder / name / "checkpoints" / "latest").write_text(kept.name + "\n")
        lines = (folder / source / "metrics.jsonl").read_text().splitlines(keepends=True)
        (folder / name / "metrics.jsonl").write_text("".join(lines[: saved + 1]))
    dist.barrier()


def recorded(folder: Path, name: str) -> list[dict[str, Any]]:
    """What a run wrote per step, without what the clock and the machine decide: the same bits in equal runs."""
    steps = read_jsonl(folder / name / "metrics.jsonl")
    return [{key: value for key, value in step.items() if key not in _MEASURED} for step in steps]


@contextmanager
def at_call(target: Any, name: str, number: int, rank: int, action: Any) -> Iterator[None]:
    """Do `action()` before call `number` (from 1) of `target.name`, on one rank alone."""
    original, calls = getattr(target, name), 0

    def counting(*arguments: Any, **keywords: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and dist.get_rank() == rank:
            action()
        return original(*arguments, **keywords)

    with mock.patch.object(target, name, counting):
        yield
