"""The learning-rate schedule, step by step, against its formulas; what does not fit a run is refused."""

import math
from pathlib import Path

import pytest
import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig

from megatron_solopo.architecture.layout import data_parallel_overlap
from megatron_solopo.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_solopo.errors import UserError
from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.parallel.megatron_internals import fuse_weight_gradients
from megatron_solopo.train.policy import (
    build_scheduler,
    check_offload,
    check_schedule,
    data_parallel_config,
    offload_settings,
)
from tests.tiny_models import make_model

LR, MIN_LR, WARMUP, STEPS = 8e-4, 2e-4, 4, 12


def rates(steps: int, **settings: float | int | str) -> list[float]:
    """The learning rate of each step of a run of 12, and of those after it."""
    sgd = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    config = OptimizerConfig.model_validate({"lr": LR, "min_lr": MIN_LR, "weight_decay": 0.1} | settings)
    scheduler = build_scheduler(sgd, config, STEPS)
    found = []
    for _ in range(steps):
        found.append(sgd.param_groups[0]["lr"])
        assert sgd.param_groups[0]["weight_decay"] == pytest.approx(0.1)
        scheduler.step(increment=1)
    return found


def expected(style: str, warmup: int, step: int) -> float:
    """The rate of step `step`, counted from 0."""
    if step < warmup:
        return LR * step / warmup
    done = min((step - warmup) / (STEPS - warmup), 1)
    match style:
        case "constant":
            return LR
        case "linear":
            return LR + (MIN_LR - LR) * done
        case "cosine":
            return MIN_LR + (LR - MIN_LR) * (1 + math.cos(math.pi * done)) / 2
    raise KeyError(style)


@pytest.mark.parametrize("style", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 1, WARMUP])
def test_the_rate_of_every_step_is_the_formulas(style: str, warmup: int) -> None:
    found = rates(STEPS + 1, lr_decay_style=style, lr_warmup_iters=warmup)
    assert found == pytest.approx([expected(style, warmup, step) for step in range(STEPS + 1)], rel=1e-12)


def test_the_shapes_differ_where_they_should() -> None:
    """By hand: half-way through the decay all is symmetric, a quarter in cosine lags behind linear."""
    linear, cosine = (rates(9, lr_decay_style=style, lr_warmup_iters=WARMUP) for style in ("linear", "cosine"))
    assert linear[:5] == cosine[:5] == pytest.approx([0.0, 2e-4, 4e-4, 6e-4, 8e-4])
    assert linear[8] == pytest.approx(5e-4) and cosine[8] == pytest.approx(5e-4)
    assert cosine[6] == pytest.approx(5e-4 + 3e-4 * math.sqrt(0.5)) and linear[6] == pytest.approx(6.5e-4)


def test_the_rate_stays_at_its_minimum_after_the_last_step() -> None:
    assert rates(STEPS + 4, lr_decay_style="cosine")[STEPS:] == pytest.approx([MIN_LR] * 4)


@pytest.mark.parametrize("warmup", [0, 1, STEPS - 1])
def test_a_warm_up_shorter_than_the_run_is_accepted(warmup: int) -> None:
    check_schedule(OptimizerConfig(lr=LR, min_lr=LR, lr_warmup_iters=warmup), STEPS)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"lr_warmup_iters": STEPS}, ["optimizer.lr_warmup_iters=12", "12 steps", "training.max_steps"]),
        ({"lr_warmup_iters": STEPS + 1}, ["optimizer.lr_warmup_iters=13", "12 steps", "training.num_train_epochs"]),
        ({"min_lr": 2 * LR}, ["optimizer.min_lr=0.0016", "optimizer.lr=0.0008"]),
    ],
)
def test_a_schedule_that_does_not_fit_the_run_is_refused(settings, words) -> None:
    with pytest.raises(UserError) as error:
        check_schedule(OptimizerConfig.model_validate({"lr": LR} | settings), STEPS)
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message


def test_state_is_not_offloaded_from_a_gpu_that_is_not_used(tmp_path: Path) -> None:
    model = resolve_model(ModelConfig(path=make_model(tmp_path, "llama3"), implementation="local"), ParallelConfig())
    check_offload(OptimizerConfig(), model)
    with pytest.raises(UserError, match=r"optimizer\.optimizer_offload_fraction=0\.5 needs a CUDA device.*set it to 0"):
        check_offload(OptimizerConfig(optimizer_offload_fraction=0.5), model)


def test_gradient_buffers_follow_the_config() -> None:
    plain = data_parallel_config(OptimizerConfig(), ParallelConfig(), 1, fp8_param=False)
    assert plain.grad_reduce_in_fp32 and plain.use_distributed_optimizer and not plain.fp8_param_gather
    other = OptimizerConfig(grad_reduce_in_fp32=False, use_distributed_optimizer=False)
    changed = data_parallel_config(other, ParallelConfig(), 1, fp8_param=True)
    assert not changed.grad_reduce_in_fp32 and not changed.use_distributed_optimizer and changed.fp8_param_gather


@pytest.mark.parametrize(
    ("parallel", "distributed", "ranks", "on_gpu", "expected"),
    [
        ({}, True, 8, True, (True, True)),
        ({}, False, 8, True, (True, False)),
        ({}, True, 1, True, (False, False)),
        ({}, True, 8, False, (False, False)),
        ({"overlap_grad_reduce": False}, True, 8, True, (False, False)),
        ({"overlap_grad_reduce": True}, True, 8, False, (True, True)),
        ({"overlap_param_gather": False}, True, 8, True, (True, False)),
        ({"overlap_param_gather": True}, True, 8, False, (True, True)),
    ],
)
def test_communication_overlaps_on_gpus_unless_the_config_says_otherwise(
    parallel, distributed, ranks, on_gpu, expected
) -> None:
    optimizer = OptimizerConfig(use_distributed_optimizer=distributed)
    assert data_parallel_overlap(ParallelConfig(**parallel), optimizer, ranks, on_gpu=on_gpu) == expected


@pytest.mark.parametrize(
    ("settings", "overlap", "grads_dtype"),
    [
        ({"optimizer_offload_fraction": 0.7}, True, torch.float32),
        ({"optimizer_offload_fraction": 0.7, "grad_reduce_in_fp32": False}, False, torch.bfloat16),
    ],
)
def test_offloaded_state_has_no_second_copy_and_overlaps_only_fp32_gradients(settings, overlap, grads_dtype) -> None:
    found = offload_settings(OptimizerConfig.model_validate(settings), torch.bfloat16)
    assert found["optimizer_cpu_offload"] and found["use_precision_aware_optimizer"]
    assert found["optimizer_offload_fraction"] == 0.7
    assert found["overlap_cpu_optimizer_d2h_h2d"] is overlap and found["main_grads_dtype"] is grads_dtype


@pytest.mark.parametrize("grad_reduce_in_fp32", [True, False])
def test_without_offload_megatron_gets_its_own_defaults(grad_reduce_in_fp32: bool) -> None:
    found = offload_settings(OptimizerConfig(grad_reduce_in_fp32=grad_reduce_in_fp32), torch.bfloat16)
    defaults = MegatronOptimizerConfig()
    assert {name for name, value in found.items() if value != getattr(defaults, name)} <= {
        "overlap_cpu_optimizer_d2h_h2d"
    }
    assert not found["overlap_cpu_optimizer_d2h_h2d"]


def test_layers_that_can_fuse_their_weight_gradient_do() -> None:
    linear = torch.nn.Linear(2, 2)
    linear.fuse_wgrad_accumulation = False
    fuse_weight_gradients(torch.nn.Sequential(linear, torch.nn.Linear(2, 2)))
    assert linear.fuse_wgrad_accumulation is True
