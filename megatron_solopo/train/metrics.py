"""What a step costs: floating-point operations by true lengths, peak rates, memory.

Metrics of a run: reduced over the ranks, and written where people and programs look.
"""

import json
import math
import os
import resource
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from tqdm import tqdm

from megatron_solopo.architecture.flops import forward_flops
from megatron_solopo.architecture.gpus import bf16_peak
from megatron_solopo.architecture.huggingface_config import Architecture
from megatron_solopo.config import LoggingConfig
from megatron_solopo.data.packing import Pack
from megatron_solopo.errors import UserError
from megatron_solopo.files import atomic_path, read_jsonl
from megatron_solopo.parallel.cpu import is_cpu
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train.alarms import Alarms
from megatron_solopo.train.bad_numbers import SKIPPED_FILE


def training_flops(architecture: Architecture, packs: Sequence[Pack]) -> float:
    """Model FLOPs of forward and backward over these packs: recomputation and padding do not count.

    Backward is twice forward; see `megatron_solopo.architecture.flops`.
    """
    lengths = [pack.sequence_lengths_S.double() for pack in packs]
    tokens = sum(float(each.sum()) for each in lengths)
    squares = sum(float(each.square().sum()) for each in lengths)
    responses = sum(float(pack.response_lengths_S.sum()) for pack in packs)
    return 3.0 * forward_flops(architecture, tokens, squares, responses).total


def peak_flops() -> float | None:
    """Dense bfloat16 peak of this device, or None where it is not known (a CPU, another GPU)."""
    if is_cpu():
        return None
    return bf16_peak(torch.cuda.get_device_name())


def reset_peak_memory() -> None:
    """Start a new interval for `peak_memory_bytes` (on a CPU the peak is the process's, since its start)."""
    if not is_cpu():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes() -> int:
    """Peak memory of this rank: allocated on the GPU, or resident on a CPU."""
    if is_cpu():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()


Metrics = dict[str, float | int | None]


def reduce_sums(reports: Sequence[Tensor], size: int, topology: Topology) -> list[float]:
    """Sum the packs' reports [size] over packs and data-parallel ranks; the same list on every rank."""
    zero = torch.zeros(size, dtype=torch.float64, device=topology.device)
    total = torch.stack([zero, *(report.double() for report in reports)]).sum(dim=0)
    dist.all_reduce(total, group=topology.data_group)
    # Only the last pipeline stage has reports.
    dist.broadcast(total, topology.last_stage_rank, group=topology.pipeline_group)
    values: list[float] = total.tolist()
    return values


def reduce_over_ranks(values: Sequence[float], operation: Any, topology: Topology) -> list[float]:
    """Reduce numbers that every rank of the world has."""
    tensor = torch.tensor(values, dtype=torch.float64, device=topology.device)
    dist.all_reduce(tensor, op=operation)
    result: list[float] = tensor.tolist()
    return result


def finite_or_none(values: Mapping[str, float | int | None]) -> Metrics:
    """JSON has neither NaN nor infinity: None stands for them."""
    return {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}


class MetricsWriter:
    """Writes on rank 0: `metrics.jsonl`, TensorBoard, W&B if asked for, one console line per step, and alarms."""

    def __init__(
        self, run_dir: Path, logging: LoggingConfig, config: Mapping[str, Any], *, first_step: int, total_steps: int
    ) -> None:
        """Continue after `first_step` - 1: later lines of an interrupted run are dropped, as they will be run again."""
        self.path = run_dir / "metrics.jsonl"
        for file in (self.path, run_dir / SKIPPED_FILE):
            keep_before(file, first_step)
        self._sinks: list[Callable[[int, Mapping[str, float]], None]] = []
        self._tensorboard = _tensorboard(run_dir, first_step) if logging.tensorboard else None
        if self._tensorboard is not None:
            self._sinks.append(partial(_add_scalars, self._tensorboard))
        if logging.wandb_project:
            self._sinks.append(_wandb(run_dir, logging.wandb_project, config))
        self._total_steps, self._logging = total_steps, logging
        begins = "continuing" if first_step > 1 else "starting"
        finished = first_step > total_steps
        tqdm.write(
            f"{run_dir}: all {total_steps} steps are done" if finished else f"{begins} {run_dir} at step {first_step}"
        )
        self._alarms = Alarms(read_jsonl(self.path) if self.path.is_file() else [])
        self._started = time.monotonic()
        self._first_step = first_step

    def say(self, line: str) -> None:
        """A line on the console, above a progress bar if there is one."""
        tqdm.write(line)

    def close(self) -> None:
        """End the thread of TensorBoard's writer. W&B ends its run itself, when the process does."""
        if self._tensorboard is not None:
            self._tensorboard.close()

    def write(self, metrics: Metrics) -> None:
        """Record one step; `metrics` holds `step`."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(metrics, allow_nan=False) + "\n")
            stream.flush()
            # A checkpoint must never be ahead of its metrics, not even after a power loss.
            os.fsync(stream.fileno())
        step = int(metrics["step"] or 0)
        for sink in self._sinks:
            sink(step, {name: value for name, value in metrics.items() if value is not None and name != "step"})
        done = max(1, step - self._first_step + 1)  # a step that was done before, but for its evaluation, comes first
        remaining = (time.monotonic() - self._started) / done * (self._total_steps - step)
        if has_console_line(metrics, self._logging.console_steps, self._total_steps):
            self.say(console_line(metrics, self._total_steps, remaining))
        for warning in self._alarms.after(metrics):
            self.say(f"warning: step {step}: {warning}")


def has_console_line(metrics: Metrics, console_steps: int, total_steps: int) -> bool:
    """Whether a step is printed: every `console_steps`-th, the last, a skipped one, and one with an evaluation."""
    step = int(metrics["step"] or 0)
    is_special = bool(metrics.get("skipped")) or metrics.get("eval_loss") is not None
    return step % console_steps == 0 or step == total_steps or is_special


def console_line(metrics: Metrics, total_steps: int, remaining_seconds: float) -> str:
    """One step for a person: progress, losses, rewards, speed, time to go. Negative values are shown as such."""
    if metrics.get("skipped"):
        return f"step {metrics['step']}/{total_steps} | skipped, {metrics['skipped_steps']} so far"
    parts = [f"step {metrics['step']}/{total_steps}", f"loss {metrics['loss']:.4f}"]
    if "solo_ra/gap_abs" in metrics:
        parts.append(f"po {metrics['po_loss']:.4f} gap {metrics['solo_ra/gap_abs']:.4f}")
    parts.append(
        f"rewards {metrics['rewards/chosen']:+.4f} {metrics['rewards/rejected']:+.4f} "
        f"accuracy {metrics['rewards/accuracies']:.2f}"
    )
    if metrics.get("eval_loss") is not None:
        parts.append(f"eval loss {metrics['eval_loss']:.4f} accuracy {metrics['eval_rewards/accuracies']:.2f}")
    parts.append(f"grad {metrics['grad_norm']:.3f} lr {metrics['learning_rate']:.2e}")
    parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    parts.append(f"ETA {timedelta(seconds=round(remaining_seconds))}")
    return " | ".join(parts)


def keep_before(path: Path, first_step: int) -> None:
    """Drop the lines of a file of steps from `first_step` on, if there is one."""
    if path.is_file():
        kept = [metrics for metrics in read_jsonl(path) if metrics["step"] < first_step]
        with atomic_path(path) as temporary:
            temporary.write_text(
                "".join(json.dumps(metrics, allow_nan=False) + "\n" for metrics in kept), encoding="utf-8"
            )


def wandb_run_id(run_dir: Path) -> str:
    """The id of this run on W&B, made at its first start: continued, it is the same run there."""
    file = run_dir / "wandb_run_id"
    if not file.is_file():
        with atomic_path(file) as temporary:
            temporary.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
    return file.read_text(encoding="utf-8").strip()


def _tensorboard(run_dir: Path, first_step: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run_dir / "tensorboard"), purge_step=first_step)


def _add_scalars(writer: Any, step: int, values: Mapping[str, float]) -> None:
    for name, value in values.items():
        writer.add_scalar(name, value, step)
    writer.flush()


def _wandb(run_dir: Path, project: str, config: Mapping[str, Any]) -> Any:
    try:
        import wandb
    except ImportError:
        raise UserError(
            f"logging.wandb_project={project}: the package wandb is missing; pip install 'megatron-solopo[wandb]'"
        ) from None
    # W&B leaves out steps that it has already: what a run did twice, after a checkpoint and a crash, is there once.
    run = wandb.init(project=project, dir=str(run_dir), config=dict(config), id=wandb_run_id(run_dir), resume="allow")
    return lambda step, values: run.log(dict(values), step=step)
