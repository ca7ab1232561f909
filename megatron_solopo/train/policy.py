"""The model that is trained: its chunks, optimizer and learning-rate schedule, and one step of them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_solopo.architecture.huggingface import read_architecture
from megatron_solopo.checkpoint.loading import load_weights
from megatron_solopo.config import Config
from megatron_solopo.data.packing import Pack
from megatron_solopo.model.build import build_model
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.model.microbatch import Microbatch
from megatron_solopo.model.precision import release_exact_values
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train.metrics import reduce_over_ranks
from megatron_solopo.train.optimizer import build_optimizer, build_scheduler, wrap_data_parallel
from megatron_solopo.train.step import LossFunction, run_schedule


@dataclass(frozen=True)
class StepResult:
    """One optimizer step."""

    reports: list[torch.Tensor]
    """What the loss function reported for each of this rank's packs (last pipeline stage only)."""
    grad_norm: float
    """Norm of the whole gradient before clipping, equal on every rank."""
    learning_rate: float
    skipped: bool
    """Whether the loss or the gradient was not finite on any rank, so that nothing was updated on all of them."""
    gradient_was_finite: bool
    """Of this rank alone, before it was reduced."""


@dataclass(frozen=True)
class Policy:
    """This rank's share of the trained model."""

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler

    def step(
        self,
        packs: Sequence[Pack],
        loss_function: Callable[[Microbatch], LossFunction],
        topology: Topology,
        *,
        before_pack: Callable[[], None] | None = None,
    ) -> StepResult:
        """Forward and backward over this rank's packs, then one optimizer step on all ranks together.

        Where a loss or the gradient is not finite on any rank, no rank updates anything, the schedule neither.
        `before_pack` is that of `run_schedule`; where it raises, the policy is as it was.
        """
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        learning_rate = self.optimizer.param_groups[0]["lr"]
        reports = run_schedule(self.chunks, packs, loss_function, topology, forward_only=False, before_pack=before_pack)
        # Both are idempotent: Megatron's step does them again.
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        finite = math.isfinite(grad_norm) and all(bool(report.isfinite().all()) for report in reports)
        (broken,) = reduce_over_ranks([not finite], dist.ReduceOp.MAX, topology)
        if not broken:
            _, grad_norm, _ = self.optimizer.step()
            self.scheduler.step(increment=1)
        return StepResult(
            reports, float(grad_norm), learning_rate, bool(broken), bool(self.chunks[0].gradient_was_finite)
        )

    def evaluate(
        self, packs: Sequence[Pack], loss_function: Callable[[Microbatch], LossFunction], topology: Topology
    ) -> list[torch.Tensor]:
        """Forward only; returns the packs' reports."""
        with torch.no_grad():
            return run_schedule(self.chunks, packs, loss_function, topology, forward_only=True)


def load_model(config: Config, path: Path, topology: Topology) -> list[ResponseModel]:
    """Build this rank's chunks of the Hugging Face directory or Megatron checkpoint in `path`, and load its weights.

    Raises ValueError for an unsupported model, a layout that does not fit it, or damaged weights.
    """
    architecture = read_architecture(path)
    chunks = build_model(
        architecture,
        config.model,
        config.parallel,
        chunk_tokens=config.logprob.chunk_tokens,
        device=topology.device,
    )
    load_weights(chunks, architecture, path)
    return chunks


def load_frozen(config: Config, path: Path, topology: Topology) -> list[ResponseModel]:
    """`load_model` for a model that is only read."""
    chunks = load_model(config, path, topology)
    for chunk in chunks:
        release_exact_values(chunk)
    return chunks


def build_policy(config: Config, topology: Topology, max_steps: int) -> Policy:
    """The model of `config.model.path`, ready for its first step."""
    chunks = wrap_data_parallel(load_model(config, config.model.path, topology), config.optimizer)
    optimizer = build_optimizer(chunks, config.optimizer)
    for chunk in chunks:
        release_exact_values(chunk)
    return Policy(chunks, optimizer, build_scheduler(optimizer, config.optimizer, max_steps))
