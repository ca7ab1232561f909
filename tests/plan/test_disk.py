"""How many checkpoints a run has at once, and what one takes."""

import pytest

from megatron_solopo.config import CheckpointConfig, ModelConfig, OptimizerConfig
from megatron_solopo.plan.disk import checkpoint_bytes_per_parameter, most_checkpoints


@pytest.mark.parametrize(
    ("settings", "max_steps", "most"),
    [
        ({}, 1000, 4),
        ({}, 2, 2),
        ({"keep_last": 1}, 1000, 2),
        ({"keep_last": 2, "best_metric": "loss", "keep_every": 100}, 1000, 14),
        ({"keep_last": None}, 1000, None),
        ({"keep_last": None, "every_minutes": None, "save_steps": 300}, 1000, 4),
        ({"every_minutes": None}, 1000, 1),
        ({"every_minutes": None, "save_steps": 500}, 1000, 2),
        ({"every_minutes": None, "must_save_by": "slurm"}, 1000, 4),
    ],
)
def test_the_most_checkpoints_at_once(settings: dict[str, object], max_steps: int, most: int | None) -> None:
    assert most_checkpoints(CheckpointConfig(**settings), max_steps) == most


@pytest.mark.parametrize(
    ("dtype", "distributed", "size"),
    [("float32", True, 16), ("float32", False, 12), ("bfloat16", True, 14), ("bfloat16", False, 14)],
)
def test_bytes_per_parameter(dtype: str, distributed: bool, size: int) -> None:
    model, optimizer = ModelConfig(path="model", dtype=dtype), OptimizerConfig(use_distributed_optimizer=distributed)
    assert checkpoint_bytes_per_parameter(model, optimizer) == size
