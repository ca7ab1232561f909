"""What a plan says of a layout: the length and price of the run, utilization, the keys that make it."""

import json
from dataclasses import dataclass
from typing import Any

from megatron_solopo.architecture.flops import forward_flops
from megatron_solopo.config import Config
from megatron_solopo.plan.search import Estimate, Planner
from megatron_solopo.plan.workload import Workload

_HOUR = 3600.0


@dataclass(frozen=True)
class Run:
    """A whole run under one layout."""

    steps: int
    step_seconds: float
    reference_seconds: float
    """Scoring every sequence once with the reference model; 0 where the loss needs none."""
    gpus: int
    price_per_gpu_hour: float | None

    @property
    def hours(self) -> float:
        """Wall clock, checkpoints and evaluation not counted."""
        return (self.steps * self.step_seconds + self.reference_seconds) / _HOUR

    @property
    def gpu_hours(self) -> float:
        """Of all GPUs."""
        return self.hours * self.gpus

    @property
    def cost(self) -> float | None:
        """In the currency of the price."""
        return None if self.price_per_gpu_hour is None else self.gpu_hours * self.price_per_gpu_hour


def run_of(estimate: Estimate, workload: Workload, price: float | None) -> Run:
    """Steps, hours and cost of training on the whole workload, reference pass included."""
    config = estimate.layout.config
    training = config.training
    triplets = training.num_train_epochs * workload.num_triplets
    steps = training.max_steps or -int(-triplets // training.global_batch_size)
    reference = 0.0
    if config.objective.needs_reference:
        reference = estimate.time.forward_seconds / estimate.batch.num_triplets * workload.num_triplets
    return Run(steps, estimate.time.seconds, reference, estimate.gpus, price)


def model_flops_utilization(estimate: Estimate, planner: Planner) -> float:
    """Model FLOPs by true lengths over what the GPUs' bfloat16 peak could do in a step."""
    rows, roles = planner.packer.rows, planner.packer.roles
    prompts, responses = planner.workload.prompts, planner.workload.responses
    tokens = squares = answers = 0.0
    for role in roles:
        context, answer = role.split("_")
        lengths = prompts[context][rows] + responses[answer][rows]
        tokens += float(lengths.sum())
        squares += float((lengths.astype(float) ** 2).sum())
        answers += float(responses[answer][rows].sum())
    flops = 3 * forward_flops(planner.architecture, tokens, squares, answers).total
    return flops / (estimate.time.seconds * estimate.gpus * estimate.gpu.bf16_tflops * 1e12)


def as_json(estimate: Estimate, planner: Planner, price: float | None) -> dict[str, Any]:
    """Everything about one layout, bytes and seconds."""
    run = run_of(estimate, planner.workload, price)
    time = estimate.time
    return {
        "objective": planner.config.objective.name,
        "layout": estimate.layout.sizes,
        "savers": estimate.layout.savers,
        "gpus": estimate.gpus,
        "fits": estimate.excess_gib <= 0,
        "memory_bytes": [
            {"pipeline_rank": stage.pipeline_rank, "total": stage.total, "host": stage.host}
            | {"packs_in_flight": stage.packs_in_flight}
            | stage.parts
            for stage in estimate.stages
        ],
        "step_seconds": time.seconds,
        "busiest_stage_seconds": time.compute.parts,
        "pipeline_seconds": time.timeline.seconds,
        "pipeline_bubble": time.timeline.bubble,
        "data_traffic_seconds": time.data_traffic,
        "optimizer_seconds": time.optimizer,
        "triplets_per_second": estimate.triplets_per_second,
        "mfu": model_flops_utilization(estimate, planner),
        "pad_waste": estimate.batch.pad_waste,
        "balance": estimate.batch.balance,
        "packs": estimate.batch.num_packs,
        "steps": run.steps,
        "reference_seconds": run.reference_seconds,
        "hours": run.hours,
        "gpu_hours": run.gpu_hours,
        "cost": run.cost,
        "overrides": overrides(estimate, planner.config),
    }


_ALWAYS_SHOWN = {
    "parallel": (
        "tensor_model_parallel_size",
        "pipeline_model_parallel_size",
        "virtual_pipeline_model_parallel_size",
        "context_parallel_size",
        "cp_comm_type",
        "recompute_granularity",
    ),
    "model": ("fp8",),
    "optimizer": ("optimizer_offload_fraction",),
}


def overrides(estimate: Estimate, base: Config) -> list[str]:
    """Dotted keys that make this layout of the configuration that the plan began with."""
    found = {}
    for section, shown in _ALWAYS_SHOWN.items():
        given = getattr(base, section).model_dump()
        for name, value in getattr(estimate.layout.config, section).model_dump().items():
            if name in shown or value != given[name]:
                found[f"{section}.{name}"] = value
    return [f"{key}={_as_yaml(value)}" for key, value in found.items()]


def _as_yaml(value: Any) -> str:
    if isinstance(value, list):
        return f"[{','.join(value)}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)
