"""How many checkpoints a run has at once, and what one takes."""

import pytest

from megatron_solopo.config import Config, ModelConfig, OptimizerConfig, parse_config
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
    assert most_checkpoints(config(settings), max_steps) == most


def config(checkpoint: dict[str, object], **sections: dict[str, object]) -> Config:
    required = {
        "run_dir": "run",
        "model": {"path": "model"},
        "data": {"path": "data", "max_tokens_per_pack": 100},
        "training": {"global_batch_size": 4},
    }
    return parse_config(required | {"checkpoint": checkpoint} | sections, source="test")


def test_a_pipeline_may_save_before_evaluations() -> None:
    rarely, training = {"every_minutes": None}, {"global_batch_size": 4, "eval_steps": 10}
    pipeline = {"pipeline_model_parallel_size": 2}
    assert most_checkpoints(config(rarely, training=training), 1000) == 1
    assert most_checkpoints(config(rarely, parallel=pipeline), 1000) == 1
    assert most_checkpoints(config(rarely, training=training, parallel=pipeline), 1000) == 4


@pytest.mark.parametrize(
    ("dtype", "distributed", "size"),
    [("float32", True, 16), ("float32", False, 12), ("bfloat16", True, 14), ("bfloat16", False, 14)],
)
def test_bytes_per_parameter(dtype: str, distributed: bool, size: int) -> None:
    model, optimizer = ModelConfig(path="model", dtype=dtype), OptimizerConfig(use_distributed_optimizer=distributed)
    assert checkpoint_bytes_per_parameter(model, optimizer) == size
