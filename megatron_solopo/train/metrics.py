"""Metrics of a run: measured, reduced over the ranks, and written where people and programs look."""

import json
import math
import resource
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_solopo.architecture.flops import forward_flops
from megatron_solopo.architecture.gpus import bf16_peak
from megatron_solopo.architecture.huggingface_config import Architecture
from megatron_solopo.config import LoggingConfig
from megatron_solopo.cpu_features import is_cpu
from megatron_solopo.data.packing import Pack
from megatron_solopo.errors import OutOfSpaceError, UserError, is_out_of_space
from megatron_solopo.files import append_synced, atomic_path, read_jsonl
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.run_directory import SOURCE_METRIC
from megatron_solopo.train.bad_numbers import SKIPPED_FILE
from megatron_solopo.train.callbacks import Callback, say
from megatron_solopo.train.state import Metrics, TrainState

# Less than this share of a step, which replicas wait for the slowest rank, is no news.
_SHOWN_STRAGGLER_SHARE = 0.05


def training_flops(architecture: Architecture, packs: Sequence[Pack], *, base_learns: bool = True) -> float:
    """The model's FLOPs of forward and backward over these packs; recomputation and padding do not count.

    Args:
        base_learns: see `Flops.of_training`.
    """
    tokens = sum(pack.num_tokens for pack in packs)
    squares = sum(pack.squares for pack in packs)
    responses = sum(len(pack.response_rows_N) for pack in packs)
    return forward_flops(architecture, tokens, squares, responses).of_training(base_learns=base_learns)


def peak_flops() -> float | None:
    """Dense bfloat16 peak of this device in FLOP/s, or None if it is not known (a CPU, another GPU)."""
    if is_cpu():
        return None
    return bf16_peak(torch.cuda.get_device_name())


def reset_peak_memory() -> None:
    """Start a new interval for `peak_memory_bytes`. On a CPU the peak always counts from the process's start."""
    if not is_cpu():
        torch.cuda.reset_peak_memory_stats()


def peak_memory_bytes() -> int:
    """Peak memory of this rank: allocated on the GPU, or resident on a CPU."""
    if is_cpu():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated()


def reduce_sums(reports: Sequence[Tensor], size: int, topology: Topology) -> list[float]:
    """Sum the packs' reports [size] over packs and data-parallel ranks; returns the same list on every rank."""
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
    """Replace NaN and infinity by None, because JSON has neither."""
    return {name: value if value is None or math.isfinite(value) else None for name, value in values.items()}


class MetricsWriter(Callback):
    """On rank 0: `metrics.jsonl`, TensorBoard, W&B if asked for, a console line per step, `metrics.png` at the end."""

    def __init__(self, run_dir: Path, logging: LoggingConfig, config: Mapping[str, Any], *, total_steps: int) -> None:
        """Open nothing yet; `config` is what W&B shows as the run's configuration."""
        self.path = run_dir / "metrics.jsonl"
        self._run_dir, self._logging, self._config, self._total_steps = run_dir, logging, config, total_steps
        self._sinks: list[Callable[[int, Mapping[str, float]], None]] = []
        self._tensorboard: Any = None
        self._unwritten: list[str] = []
        self._first_step = 1
        self._started = 0.0

    def on_start(self, state: TrainState) -> None:
        """Open the files, and drop the lines of steps that an interrupted run will do again."""
        self._first_step = first_step = state.first_unrecorded_step
        for file in (self.path, self._run_dir / SKIPPED_FILE):
            keep_before(file, first_step)
        if self._logging.tensorboard:
            self._tensorboard = _tensorboard(self._run_dir, first_step)
            self._sinks.append(self._to_tensorboard)
        if self._logging.wandb_project:
            self._sinks.append(_wandb(self._run_dir, self._logging.wandb_project, self._config))
        begins = "continuing" if first_step > 1 else "starting"
        if first_step > self._total_steps:
            say(f"{self._run_dir}: all {self._total_steps} steps are done")
        else:
            say(f"{begins} {self._run_dir} at step {first_step}")
        self._started = time.monotonic()

    def on_step_end(self, metrics: Metrics) -> None:
        """Record one step."""
        self._unwritten.append(json.dumps(metrics, allow_nan=False) + "\n")
        try:
            self._write_lines()
        except OSError as error:
            if not is_out_of_space(error):
                raise
            if len(self._unwritten) == 1:
                say(f"warning: {self.path}: {error.strerror}; the lines from this step on wait in memory for room")
        step = int(metrics["step"] or 0)
        for sink in self._sinks:
            sink(step, {name: value for name, value in metrics.items() if value is not None and name != "step"})
        # A continued run may first complete the evaluation of a step that was done before.
        done = max(1, step - self._first_step + 1)
        remaining = (time.monotonic() - self._started) / done * (self._total_steps - step)
        if has_console_line(metrics, self._logging.console_steps, self._total_steps):
            say(console_line(metrics, self._total_steps, remaining))

    def on_save_begin(self) -> None:
        """Write the lines that wait for room: a checkpoint must never be ahead of its metrics."""
        try:
            self._write_lines()
        except OSError as error:
            if not is_out_of_space(error):
                raise
            raise OutOfSpaceError(f"{self.path}: {error.strerror}; no checkpoint is saved before the metrics") from None

    def _to_tensorboard(self, step: int, values: Mapping[str, float]) -> None:
        if self._tensorboard is None:
            return
        try:
            _add_scalars(self._tensorboard, step, values)
        except OSError as error:
            if not is_out_of_space(error):
                raise
            # Its thread has ended, and it would raise this error for ever.
            say(f"warning: {self._run_dir / 'tensorboard'}: {error.strerror}; it gets no more until the next start")
            self._tensorboard = None

    def _write_lines(self) -> None:
        """Append the lines that are not in `metrics.jsonl` yet, all or none of them."""
        if not self._unwritten:
            return
        # Synced: not even after a power loss may a checkpoint be ahead.
        append_synced(self.path, "".join(self._unwritten))
        self._unwritten.clear()

    def on_success(self) -> None:
        """Draw the run's course."""
        plot_metrics(read_jsonl(self.path), self._run_dir / "metrics.png")

    def close(self) -> None:
        """End the thread of TensorBoard's writer. W&B ends its run itself, when the process does."""
        if self._tensorboard is not None:
            self._tensorboard.close()


def has_console_line(metrics: Metrics, console_steps: int, total_steps: int) -> bool:
    """Whether a step is printed: every `console_steps`-th, the last, a skipped one, and one with an evaluation."""
    step = int(metrics["step"] or 0)
    is_special = bool(metrics.get("skipped")) or metrics.get("eval_loss") is not None
    return step % console_steps == 0 or step == total_steps or is_special


def console_line(metrics: Metrics, total_steps: int, remaining_seconds: float) -> str:
    """One step in a line for a person: progress, losses, rewards, speed and the time that remains."""
    if metrics.get("skipped"):
        return f"step {metrics['step']}/{total_steps} | skipped, {metrics['skipped_steps']} so far"
    parts = [f"step {metrics['step']}/{total_steps}", f"loss {metrics['loss']:.4f}"]
    if of_sources := [f"{source} {metrics[name]:.4f}" for source, name in source_losses(metrics)]:
        parts.append(" ".join(of_sources))
    elif "solo_ra/gap_abs" in metrics:
        divergence = metrics.get("token_alignment/kl")
        of_tokens = "" if divergence is None else f" kl {divergence:.4f}"
        parts.append(f"po {metrics['po_loss']:.4f} gap {metrics['solo_ra/gap_abs']:.4f}{of_tokens}")
    if metrics.get("rewards/chosen") is not None:  # no row of the step may have two responses
        parts.append(
            f"rewards {metrics['rewards/chosen']:+.4f} {metrics['rewards/rejected']:+.4f} "
            f"accuracy {metrics['rewards/accuracies']:.2f}"
        )
    if metrics.get("eval_loss") is not None:
        accuracy = metrics.get("eval_rewards/accuracies")
        of_pairs = "" if accuracy is None else f" accuracy {accuracy:.2f}"
        parts.append(f"eval loss {metrics['eval_loss']:.4f}{of_pairs}")
    parts.append(f"grad {metrics['grad_norm']:.3f} lr {metrics['learning_rate']:.2e}")
    parts += computed_tokens(metrics)
    parts.append(f"{metrics['tokens_per_second']:,.0f} tokens/s")
    if (share := metrics.get("straggler_share")) is not None and share >= _SHOWN_STRAGGLER_SHARE:
        parts.append(f"waits for rank {metrics['straggler_rank']} {share:.0%}")
    parts.append(f"ETA {timedelta(seconds=round(remaining_seconds))}")
    return " | ".join(parts)


def source_losses(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Each source that has rows in a step, and the name of its loss."""
    found = ((name, SOURCE_METRIC.fullmatch(name)) for name, value in metrics.items() if value is not None)
    return [
        (each["source"], name) for name, each in found if each and each["metric"] == "loss" and not each["held_out"]
    ]


def computed_tokens(counts: Metrics) -> list[str]:
    """In words, how many of all sequences' tokens a step computes; nothing where it computes every one."""
    computed, all_sequences = counts["num_tokens"], counts["num_sequence_tokens"]
    return [] if computed == all_sequences else [f"{computed:,} of {all_sequences:,} tokens computed"]


def keep_before(path: Path, first_step: int) -> None:
    """Drop the lines from `first_step` on from a file with a line per step, if the file exists."""
    if path.is_file():
        kept = [metrics for metrics in read_jsonl(path) if metrics["step"] < first_step]
        with atomic_path(path) as temporary:
            temporary.write_text(
                "".join(json.dumps(metrics, allow_nan=False) + "\n" for metrics in kept), encoding="utf-8"
            )


def wandb_run_id(run_dir: Path) -> str:
    """The run's id on W&B, made at its first start; a continued run is the same run there."""
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
    # W&B ignores steps that it has already, so a step that was done again after a crash is there once.
    run = wandb.init(project=project, dir=str(run_dir), config=dict(config), id=wandb_run_id(run_dir), resume="allow")
    return lambda step, values: run.log(dict(values), step=step)


_PANELS = {
    "loss": ("loss", "po_loss", "eval_loss"),
    "reward": ("rewards/chosen", "rewards/rejected", "rewards/chosen_long"),
    "reward gap, short minus long": ("solo_ra/gap_abs", "solo_ra/gap_signed", "eval_solo_ra/gap_abs"),
    "reward accuracy": ("rewards/accuracies", "eval_rewards/accuracies"),
    "gradient norm": ("grad_norm",),
    "tokens per second": ("tokens_per_second",),
}


def plot_metrics(metrics: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw losses, rewards, accuracy, gradient norm and speed over the steps into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 7))
    # matplotlib's own search for margins would take longer than the picture.
    figure.subplots_adjust(left=0.04, right=0.99, bottom=0.07, top=0.95, wspace=0.17, hspace=0.27)
    of_sources = dict.fromkeys(name for each in metrics for _, name in source_losses(each))
    panels = _PANELS | {"loss": (*_PANELS["loss"], *of_sources)}
    for axis, (title, names) in zip(figure.subplots(2, 3).flat, panels.items(), strict=True):
        for name in names:
            points = [(each["step"], each[name]) for each in metrics if each.get(name) is not None]
            if points:
                # Evaluations are far apart, and a line of one point would be invisible: draw dots.
                marker = "o" if name.startswith("eval_") or len(points) == 1 else ""
                axis.plot(*zip(*points, strict=True), label=name, marker=marker)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.lines:  # objectives without a long context have no gap
            axis.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
