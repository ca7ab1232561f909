"""Whether the largest pack fits into memory, tried before the first step."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker

from megatron_solopo.config import Config
from megatron_solopo.data.loader import GlobalBatchLoader
from megatron_solopo.data.packing import Pack
from megatron_solopo.files import described_bytes
from megatron_solopo.objective import required_roles
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train.cost import peak_memory_bytes, reset_peak_memory
from megatron_solopo.train.metrics import reduce_over_ranks
from megatron_solopo.train.policy import Policy
from megatron_solopo.train.step import ReferenceLogprobs, objective_loss, run_schedule

_PLANNED_BATCHES = 20
_MOMENT_BYTES = 8


@dataclass(frozen=True)
class Trial:
    """What the largest pack took."""

    tokens: int
    """Padded, before the cut for context parallelism."""
    seconds: float
    """Of the slowest rank."""
    peak_memory: int
    """Bytes of the fullest rank."""

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens: {self.seconds:.1f} s, peak memory {described_bytes(self.peak_memory)}"


def is_wanted(config: Config, topology: Topology) -> bool:
    """`training.try_largest_pack`; if not set: on a GPU, unless FP8's delayed scales would remember the trial."""
    if config.training.try_largest_pack is not None:
        return config.training.try_largest_pack
    return topology.device.type == "cuda" and not config.model.has_delayed_scales


def try_largest_pack(
    config: Config,
    policy: Policy,
    loader: GlobalBatchLoader,
    num_rows: int,
    topology: Topology,
    before_pack: Callable[[], None],
) -> Trial:
    """Forward and backward of the largest pack, on every replica, beside what Adam's moments will take.

    Nothing is changed by it. The largest is that of the next 20 global batches, or the largest single triplet of the
    data set if that is larger. A pipeline holds several packs at a time: it gets as many as it has stages. Their
    gradients are dropped, random states are put back. Of the optimizer's state only the moments are not there yet.

    Args:
        num_rows: of the training split.

    Raises ValueError, on the rank that has it, for too little memory.
    """
    pack = loader.largest_pack(_PLANNED_BATCHES)
    packs = [pack] * max(topology.packs_multiple, topology.pipeline_group.size())
    roles = required_roles(config.objective)
    loss = objective_loss(config.objective, ReferenceLogprobs(roles, torch.zeros(num_rows, len(roles))), topology)
    reset_peak_memory()
    started = time.monotonic()
    states = get_cuda_rng_tracker().get_states()
    try:
        with torch.random.fork_rng(devices=[topology.device.index] if topology.device.type == "cuda" else []):
            moments = torch.empty(_missing_moments(config, policy), dtype=torch.uint8, device=topology.device)
            run_schedule(policy.chunks, packs, loss, topology, forward_only=False, before_pack=before_pack)
            del moments
    except torch.OutOfMemoryError as error:
        raise ValueError(_too_large(config, pack, str(error))) from None
    finally:
        get_cuda_rng_tracker().set_states(states)
        for chunk in policy.chunks:
            chunk.zero_grad_buffer()
    measured = [time.monotonic() - started, float(peak_memory_bytes())]
    seconds, peak = reduce_over_ranks(measured, dist.ReduceOp.MAX, topology)
    return Trial(len(pack.tokens_T), seconds, int(peak))


def _missing_moments(config: Config, policy: Policy) -> int:
    """Bytes that Adam's moments will take on this rank's device from the first update on; 0 where they are there."""
    parts = getattr(policy.optimizer, "chained_optimizers", [policy.optimizer])
    if any(part.optimizer.state for part in parts):
        return 0
    held = sum(weight.numel() for group in policy.optimizer.param_groups for weight in group["params"])
    return int(held * _MOMENT_BYTES * (1 - config.optimizer.optimizer_offload_fraction))


def _too_large(config: Config, pack: Pack, error: str) -> str:
    shown = ", ".join(pack.ids[:5]) + (f" and {len(pack.ids) - 5} more" if len(pack.ids) > 5 else "")
    return (
        f"rank {dist.get_rank()}: out of memory with the largest pack, {len(pack.tokens_T):,} tokens of {shown}, under "
        f"data.max_tokens_per_pack={config.data.max_tokens_per_pack}; lower that key, raise "
        "parallel.context_parallel_size or parallel.tensor_model_parallel_size, or set "
        f"parallel.recompute_granularity=full ({' '.join(error.split())[:200]})"
    )
