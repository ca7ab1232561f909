"""The learning-rate schedule, step by step, against its formulas; what does not fit a run is refused."""

import math
from pathlib import Path

import pytest
import torch

from megatron_solopo.config import ModelConfig, OptimizerConfig
from megatron_solopo.train.optimizer import build_scheduler, check_offload, check_schedule

LR, MIN_LR, WARMUP, STEPS = 8e-4, 2e-4, 4, 12


def rates(steps: int, **settings: float | int | str) -> list[float]:
    """The learning rate of each step of a run of 12, and of those after it."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    config = OptimizerConfig.model_validate({"lr": LR, "min_lr": MIN_LR, "weight_decay": 0.1} | settings)
    scheduler = build_scheduler(optimizer, config, STEPS)
    found = []
    for _ in range(steps):
        found.append(optimizer.param_groups[0]["lr"])
        assert optimizer.param_groups[0]["weight_decay"] == pytest.approx(0.1)
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
    with pytest.raises(ValueError) as error:
        check_schedule(OptimizerConfig.model_validate({"lr": LR} | settings), STEPS)
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message


def test_state_is_not_offloaded_from_a_gpu_that_is_not_used() -> None:
    model = ModelConfig(path=Path("model"), implementation="local")
    check_offload(OptimizerConfig(), model)
    with pytest.raises(
        ValueError, match=r"optimizer\.optimizer_offload_fraction=0\.5 needs a CUDA device.*set it to 0"
    ):
        check_offload(OptimizerConfig(optimizer_offload_fraction=0.5), model)
