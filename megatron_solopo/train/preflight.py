"""What all ranks check together before the first step, so that a mistake costs a minute and not a night.

    check          what it finds                                              cost
    same start     another config, data, model or library on one rank         one exchange of a few KiB per rank
    run directory  a rank that does not see it, no room for one checkpoint,   one small file
                   or (a warning) for all that checkpoint.keep_last keeps
    groups         a group whose collective fails or does not end             one all-reduce of a number in each
    largest pack   too little memory                                          forward and backward of that pack, as many
                                                                              times as a pipeline keeps packs

The first three always run. The last runs on a GPU, or as `training.try_largest_pack` says.
"""

import os
import platform
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any
from uuid import uuid4

import psutil
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_solopo import __version__
from megatron_solopo.architecture.huggingface_config import Architecture
from megatron_solopo.architecture.pipeline_schedule import packs_at_peak
from megatron_solopo.checkpoint.directory import checkpoints
from megatron_solopo.checkpoint.fingerprint import sample_weights
from megatron_solopo.config import Config, ParallelConfig, dotted
from megatron_solopo.data.loader import GlobalBatchLoader
from megatron_solopo.data.packing import Pack
from megatron_solopo.data.prepared import PreparedManifest
from megatron_solopo.errors import UserError
from megatron_solopo.files import described_bytes
from megatron_solopo.parallel.agreement import from_rank, on_every_rank, on_rank_0, over_ranks
from megatron_solopo.parallel.megatron_internals import optimizer_parts
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.plan.disk import checkpoint_bytes, most_checkpoints
from megatron_solopo.train.callbacks import say
from megatron_solopo.train.metrics import peak_memory_bytes, reduce_over_ranks, reset_peak_memory
from megatron_solopo.train.policy import Policy
from megatron_solopo.train.run_data import RunSource
from megatron_solopo.train.step import ReferenceLogprobs, SourceLoss, mixture_loss, run_schedule

Finding = tuple[str, str]
"""A check and what it found."""

_PACKAGES = ("torch", "megatron-core", "transformer-engine", "transformers", "numpy")
_SHARED_WITHIN_SECONDS = 10.0
_MOMENT_BYTES = 8
_PLANNED_BATCHES = 20


def start_facts(config: Config, data: Sequence[PreparedManifest]) -> dict[str, str | None]:
    """What must be the same on every rank, by the key or the package that decides it; None: this rank does not look.

    Ranks of one host see the same files, so one of them looks into the weights.

    Args:
        data: of each source.
    """
    facts: dict[str, str | None] = {key: repr(value) for key, value in dotted(config.model_dump(mode="json"))}
    for source, manifest in zip(config.sources, data, strict=True):
        place = f"data.sources, {source.name}" if source.name else "data.path"
        facts[f"{place} (its content)"] = manifest.fingerprint
    is_first_of_host = os.environ.get("LOCAL_RANK", "0") == "0"
    facts["model.path (its weights)"] = sample_weights(config.model.path) if is_first_of_host else None
    facts["python"] = platform.python_version()
    facts["megatron-solopo"] = __version__
    return facts | {name: _version(name) for name in _PACKAGES}


def check_same_start(facts: Mapping[str, str | None]) -> None:
    """Raise UserError, on every rank, naming what differs between rank 0 and another rank, with both values.

    It uses no other group than the world, because the sizes of the other groups are among what it compares.
    """
    first_host, first = from_rank(0, (socket.gethostname(), dict(facts)))

    def compare() -> None:
        for key, value in sorted(facts.items()):
            if value is not None and first.get(key) != value:
                raise UserError(
                    f"the ranks do not start alike: {key} is {first.get(key)} on rank 0 ({first_host}), but {value} on "
                    f"rank {dist.get_rank()} ({socket.gethostname()}); start every rank with the same config and "
                    "environment"
                )

    on_every_rank(compare)


def check_surroundings(
    config: Config, architecture: Architecture, topology: Topology, max_steps: int, enter_check: Callable[[str], None]
) -> list[Finding]:
    """Check the run directory and the process groups.

    Args:
        max_steps: the run's last step.
        enter_check: gets the name of every check that begins, so that the watchdog can name one that hangs.

    Raises UserError, on every rank, for a directory that is not shared or too full. An all-reduce with a wrong sum
    raises RuntimeError.
    """
    enter_check("preflight: run directory")
    rows = [
        ("same start", f"config, data, model and packages are the same on {dist.get_world_size()} ranks"),
        ("run directory", _check_run_dir(config, checkpoint_bytes(config, architecture), max_steps)),
    ]
    sizes = []
    for name, group in _groups(config.parallel, topology):
        enter_check(f"preflight: a collective over the {name} ranks")
        total = torch.ones(1, device=topology.device)
        dist.all_reduce(total, group=group)
        if int(total) != group.size():
            raise RuntimeError(f"an all-reduce over {group.size()} {name} ranks counted {int(total)}: a faulty network")
        sizes.append(f"{name} {group.size()}")
    return [*rows, ("groups", ", ".join(sizes))]


def _check_run_dir(config: Config, needed: int, max_steps: int) -> str:
    """Check that all ranks see the same directory, and that a checkpoint of `needed` bytes fits into it.

    Too little room for all checkpoints that stay is a warning: the run goes on without those that do not fit.
    """
    run_dir = config.run_dir
    probe = on_rank_0(lambda: _write_probe(run_dir))
    seen = _appears(Path(probe))
    free = on_every_rank(lambda: psutil.disk_usage(str(run_dir)).free if seen else 0)
    (blind,) = over_ranks(dist.ReduceOp.SUM, not seen)
    on_rank_0(lambda: Path(probe).unlink(missing_ok=True))
    if blind:
        raise UserError(
            f"run_dir={run_dir}: {_blind_ranks(seen)} cannot see what rank 0 writes there; set run_dir to a directory "
            "that all hosts share"
        )
    (least,) = over_ranks(dist.ReduceOp.MIN, free)
    if least < needed:
        raise UserError(
            f"run_dir={run_dir}: {described_bytes(least)} free, but one checkpoint takes {described_bytes(needed)}; "
            "make room, or set run_dir to another directory"
        )
    found = f"{described_bytes(least)} free, {described_bytes(needed)} per checkpoint"
    most = most_checkpoints(config, max_steps)
    if most is None:
        return f"seen by all, {found}, and checkpoint.keep_last=null keeps all"
    present = on_rank_0(lambda: len(checkpoints(run_dir / "checkpoints")))
    total, more = most * needed, max(most - present, 1) * needed
    at_once = f"{described_bytes(total)} for the {most} that the run has at most at once"
    if least < more:
        there = f", of which {present} are there" if present else ""
        say(
            f"warning: run_dir={run_dir}: {found}, but checkpoint.keep_last={config.checkpoint.keep_last} and one that "
            f"is being written take {described_bytes(total)} ({most} checkpoints at most at once{there}); make room, "
            "lower checkpoint.keep_last, or set run_dir to another directory"
        )
    return f"seen by all, {found}, {at_once}"


def _blind_ranks(seen: bool) -> str:
    """The ranks that have not seen a file, with their hosts. All ranks call it together, after a failure alone."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, None if seen else socket.gethostname())
    return ", ".join(f"rank {rank} ({host})" for rank, host in enumerate(everyone) if host is not None)


def _write_probe(run_dir: Path) -> str:
    run_dir.mkdir(parents=True, exist_ok=True)
    probe = run_dir / f".preflight-{uuid4().hex}"
    probe.touch()
    return str(probe)


def _appears(path: Path) -> bool:
    """Wait for a file: network file systems show a new one late."""
    until = time.monotonic() + _SHARED_WITHIN_SECONDS
    while not path.exists():
        if time.monotonic() > until:
            return False
        time.sleep(0.2)
    return True


def _groups(config: ParallelConfig, topology: Topology) -> Iterator[tuple[str, Any]]:
    """Yield the groups that this rank uses in a step, in the same order on all their ranks."""
    yield "all", dist.group.WORLD
    yield "tensor-parallel", topology.tensor_group
    yield "pipeline-parallel", topology.pipeline_group
    yield "context-parallel", topology.context_group
    yield "data-parallel", topology.data_group
    yield "data- and context-parallel", parallel_state.get_data_parallel_group(with_context_parallel=True)
    if config.expert_model_parallel_size > 1:
        yield "expert-parallel", parallel_state.get_expert_model_parallel_group()
        yield "expert-tensor-parallel", parallel_state.get_expert_tensor_parallel_group()
        yield "expert-data-parallel", parallel_state.get_expert_data_parallel_group()
    if config.hierarchical_context_parallel_sizes:
        heads, ring = parallel_state.get_hierarchical_context_parallel_groups()
        yield "context-parallel, by heads", heads
        yield "context-parallel, in a ring", ring
    if config.num_distributed_optimizer_instances > 1:
        yield (
            "optimizer instance",
            parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=True),
        )
        yield "between optimizer instances", parallel_state.get_inter_distributed_optimizer_instance_group()
    yield "model-parallel", parallel_state.get_model_parallel_group()
    embedding = parallel_state.get_embedding_group(check_initialized=False)
    if embedding is not None and dist.get_rank() in dist.get_process_group_ranks(embedding):
        yield "embedding", embedding


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


@dataclass(frozen=True)
class Trial:
    """What the largest pack took."""

    tokens: int
    """With padding, over all context-parallel ranks."""
    seconds: float
    """On the slowest rank."""
    peak_memory: int
    """Bytes on the fullest rank."""

    def __str__(self) -> str:
        return f"{self.tokens:,} tokens: {self.seconds:.1f} s, peak memory {described_bytes(self.peak_memory)}"


def tries_largest_pack(config: Config, topology: Topology) -> bool:
    """`training.try_largest_pack`. If not set: on a GPU, unless FP8's delayed scales would remember the trial."""
    if config.training.try_largest_pack is not None:
        return config.training.try_largest_pack
    return topology.device.type == "cuda" and not config.model.has_delayed_scales


def try_largest_pack(
    config: Config,
    policy: Policy,
    loader: GlobalBatchLoader,
    sources: Sequence[RunSource],
    topology: Topology,
    before_pack: Callable[[], None],
) -> Trial:
    """Run forward and backward of the largest pack on every replica, with memory reserved for Adam's moments.

    It changes nothing: gradients are dropped, and no step draws random numbers. The largest pack is that of the next 20
    global batches, or the largest single triplet of the data set if that is larger. A pipeline keeps several packs at a
    time, so it gets as many as make each stage's peak.

    Args:
        sources: those of the run.

    Raises UserError on a rank with too little memory.
    """
    pack = loader.largest_pack(_PLANNED_BATCHES)
    packs = [pack] * trial_packs(config.training.global_batch_size, topology)
    loss = mixture_loss([_without_reference(source) for source in sources], topology)
    reset_peak_memory()
    started = time.monotonic()
    try:
        moments = torch.empty(_missing_moment_bytes(config, policy), dtype=torch.uint8, device=topology.device)
        run_schedule(policy.chunks, packs, loss, topology, forward_only=False, before_pack=before_pack)
        del moments
    except torch.OutOfMemoryError as error:
        raise UserError(_too_large(config, pack, str(error))) from None
    for chunk in policy.chunks:
        chunk.zero_grad_buffer()
    measured = [time.monotonic() - started, float(peak_memory_bytes())]
    seconds, peak = reduce_over_ranks(measured, dist.ReduceOp.MAX, topology)
    return Trial(len(pack.tokens_T), seconds, int(peak))


def _without_reference(source: RunSource) -> SourceLoss:
    """Its loss with reference log-probabilities of 0, which take the same memory."""
    roles = source.config.objective.roles.all
    return SourceLoss(source.config.objective, ReferenceLogprobs(roles, torch.zeros(len(source.train), len(roles))))


def trial_packs(global_batch_size: int, topology: Topology) -> int:
    """Number of packs with which each pipeline stage keeps as much as in any step of the run."""
    triplets = global_batch_size // topology.data_group.size()  # no pack is empty
    return min(triplets, packs_at_peak(topology.pipeline_group.size(), topology.num_model_chunks))


def _missing_moment_bytes(config: Config, policy: Policy) -> int:
    """Bytes that the first update will add on this rank's device for Adam's moments; 0 if they exist already."""
    parts = optimizer_parts(policy.optimizer)
    if any(part.optimizer.state for part in parts):
        return 0
    num_parameters = sum(weight.numel() for group in policy.optimizer.param_groups for weight in group["params"])
    return int(num_parameters * _MOMENT_BYTES * (1 - config.optimizer.optimizer_offload_fraction))


def _too_large(config: Config, pack: Pack, error: str) -> str:
    shown = ", ".join(pack.ids[:5]) + (f" and {len(pack.ids) - 5} more" if len(pack.ids) > 5 else "")
    return (
        f"rank {dist.get_rank()}: out of memory with the largest pack, {len(pack.tokens_T):,} tokens of {shown}, under "
        f"data.max_tokens_per_pack={config.data.max_tokens_per_pack}; lower that key, raise "
        "parallel.context_parallel_size or parallel.tensor_model_parallel_size, or set "
        f"parallel.recompute_granularity=full ({' '.join(error.split())[:200]})"
    )
