"""How many checkpoints a run has at once, and what one takes."""

from dataclasses import replace

import pytest

from megatron_solopo.architecture.experts import ExpertShape
from megatron_solopo.config import Config, parse_config
from megatron_solopo.plan.disk import checkpoint_bytes, most_checkpoints
from megatron_solopo.plan.memory import rank_state
from tests.tiny_models import TINY


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
    model = {"path": "model", "dtype": dtype}
    settings = config({}, model=model, optimizer={"use_distributed_optimizer": distributed})
    assert checkpoint_bytes(settings, TINY) == size * TINY.num_parameters


def test_a_checkpoint_of_adapters_holds_no_base() -> None:
    lora = config({}, lora={"rank": 4, "target_modules": ["q_proj", "down_proj"]})
    hidden, ffn = TINY.hidden_size, TINY.ffn_hidden_size
    each = 4 * (hidden + TINY.num_attention_heads * TINY.head_dim) + 4 * (ffn + hidden)
    assert checkpoint_bytes(lora, TINY) == 16 * TINY.num_layers * each
    assert rank_state(TINY, lora, 0, 1).saved == checkpoint_bytes(lora, TINY)


def test_frozen_routers_have_no_optimizer_state() -> None:
    experts = ExpertShape(8, 2, 16, renormalizes=True, layers=(True, False, True, True))
    sparse, routers = replace(TINY, experts=experts), 3 * 8 * TINY.hidden_size
    assert checkpoint_bytes(config({}), sparse) == 16 * sparse.num_parameters - 12 * routers
    assert checkpoint_bytes(config({}, moe={"router_trainable": True}), sparse) == 16 * sparse.num_parameters
