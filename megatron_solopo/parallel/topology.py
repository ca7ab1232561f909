"""Process groups: this process's place among the ranks."""

import os
import resource
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch._C._distributed_c10d import HashStore

from megatron_solopo.architecture.layout import (
    check_world_size,
    pack_multiple,
    packs_multiple,
    packs_per_part,
    sequence_multiple,
    wanted_packs,
)
from megatron_solopo.config import ModelConfig, ParallelConfig
from megatron_solopo.cpu_features import is_cpu
from megatron_solopo.errors import UserError
from megatron_solopo.files import counted

# At most this many gloo groups on CPUs are as large as the world, if all of it is data parallel. Beside NCCL there are
# none.
_WORLD_GROUPS = 10
_OTHER_FILES = 1024


@dataclass(frozen=True)
class Topology:
    """This rank's place in every parallel dimension, as Megatron-Core's groups."""

    device: torch.device
    tensor_group: dist.ProcessGroup
    pipeline_group: dist.ProcessGroup
    context_group: dist.ProcessGroup
    data_group: dist.ProcessGroup
    num_model_chunks: int
    owns_world: bool
    """Whether `initialize` made the world group. Then `destroy` ends it."""

    @property
    def sequence_multiple(self) -> int:
        """Padded length of every packed sequence is a multiple of this: 2 x CP, or 1 without context parallelism."""
        return sequence_multiple(self.context_group.size())

    def pack_multiple(self, model: ModelConfig | None = None) -> int:
        """Padded length of every pack is a multiple of this; see `megatron_solopo.architecture.layout`."""
        return pack_multiple(self.tensor_group.size(), self.context_group.size(), model)

    @property
    def packs_multiple(self) -> int:
        """Number of a rank's packs is a multiple of this, which the interleaved schedule needs."""
        return packs_multiple(self.pipeline_group.size(), self.num_model_chunks)

    @property
    def wanted_packs(self) -> int:
        """Number of a rank's packs that keeps the pipeline busy."""
        return wanted_packs(self.pipeline_group.size())

    @property
    def packs_per_part(self) -> int:
        """Number of packs that a rank runs in one go in a pass over a data set."""
        return packs_per_part(self.pipeline_group.size())

    @property
    def stage_rank(self) -> int:
        """This rank's place among the TP x CP x DP ranks of its pipeline stage, in Megatron's order."""
        data_rank = self.data_group.rank() * self.context_group.size() + self.context_group.rank()
        return data_rank * self.tensor_group.size() + self.tensor_group.rank()

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the last pipeline stage, which computes the loss."""
        return self.pipeline_group.rank() == self.pipeline_group.size() - 1

    @property
    def last_stage_rank(self) -> int:
        """Global rank of the last stage of this rank's pipeline."""
        return dist.get_global_rank(self.pipeline_group, self.pipeline_group.size() - 1)


def initialize(config: ParallelConfig, seed: int, check: Callable[[], None] | None = None) -> Topology:
    """Join the process group that torchrun describes, or make one of a single process, and split it.

    Args:
        check: called after the join and before the split. No rank relies yet on all having the same sizes.

    Raises UserError for a world size that does not fit, before any process waits for another. After any error, also
    one of `check`, no group is left that this function has made.
    """
    world_size = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" not in os.environ and tasks != "1":
        raise UserError(
            f"srun started {tasks} tasks, but RANK and WORLD_SIZE are not set: each would run alone, over the same "
            "files; let srun start torchrun, one task per node"
        )
    check_world_size(config, world_size)
    _check_hierarchical_groups(config)
    device = prepare_device(config)
    owns_world = not dist.is_initialized()
    if not owns_world:
        return _split(config, seed, check, device, owns_world=False)
    _join(device, world_size, timedelta(minutes=config.distributed_timeout_minutes))
    try:
        return _split(config, seed, check, device, owns_world=True)
    except BaseException:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
        raise


def prepare_device(config: ParallelConfig) -> torch.device:
    """Make this rank's device the current one and return it; `initialize` does so, too.

    Call it before anything else asks CUDA or Transformer Engine a question: the first one starts CUDA, with the
    settings of that moment.

    Raises UserError if this host has too few devices.
    """
    if is_cpu():
        return torch.device("cpu")
    _prepare_cuda(config)
    index, count = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if index >= count:
        raise UserError(
            f"LOCAL_RANK={index}: this process sees {counted(count, 'CUDA device')}; start no more ranks per node"
        )
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def _split(
    config: ParallelConfig, seed: int, check: Callable[[], None] | None, device: torch.device, *, owns_world: bool
) -> Topology:
    if check is not None:
        check()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=config.tensor_model_parallel_size,
        pipeline_model_parallel_size=config.pipeline_model_parallel_size,
        virtual_pipeline_model_parallel_size=config.virtual_pipeline_model_parallel_size,
        context_parallel_size=config.context_parallel_size,
        expert_model_parallel_size=config.expert_model_parallel_size,
        expert_tensor_parallel_size=config.expert_tensor_size,
        hierarchical_context_parallel_sizes=config.hierarchical_context_parallel_sizes,
        num_distributed_optimizer_instances=config.num_distributed_optimizer_instances,
        # Annotated as an int, but used in a timedelta: fractions work.
        distributed_timeout_minutes=config.distributed_timeout_minutes,
        # Megatron would gather the optimizer's state over them for a save. Here each rank writes its own.
        create_gloo_process_groups=False,
    )
    model_parallel_cuda_manual_seed(seed)
    return _of_existing_groups(device, config.virtual_pipeline_model_parallel_size or 1, owns_world)


def current() -> Topology:
    """Return this rank's place in the groups that some caller of `initialize_model_parallel` has made.

    Raises UserError if there are none yet.
    """
    if not parallel_state.model_parallel_is_initialized():
        raise UserError("no process groups yet: call megatron.core's initialize_model_parallel first")
    device = torch.device("cpu") if is_cpu() else torch.device("cuda", torch.cuda.current_device())
    chunks = parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1
    return _of_existing_groups(device, chunks, owns_world=False)


def _of_existing_groups(device: torch.device, num_model_chunks: int, owns_world: bool) -> Topology:
    return Topology(
        device=device,
        tensor_group=parallel_state.get_tensor_model_parallel_group(),
        pipeline_group=parallel_state.get_pipeline_model_parallel_group(),
        context_group=parallel_state.get_context_parallel_group(),
        data_group=parallel_state.get_data_parallel_group(),
        num_model_chunks=num_model_chunks,
        owns_world=owns_world,
    )


def destroy(topology: Topology) -> None:
    """Leave the groups that `initialize` made."""
    parallel_state.destroy_model_parallel()
    if topology.owns_world:
        dist.destroy_process_group()


def _check_hierarchical_groups(config: ParallelConfig) -> None:
    """Megatron-Core makes groups within groups with the package einops, which it does not install."""
    instances, sizes = config.num_distributed_optimizer_instances, config.hierarchical_context_parallel_sizes
    if (instances > 1 or sizes) and find_spec("einops") is None:
        key = (
            f"num_distributed_optimizer_instances={instances}"
            if instances > 1
            else f"hierarchical_context_parallel_sizes={sizes}"
        )
        raise UserError(f"parallel.{key} needs the package einops; install it with `pip install einops`")


def _prepare_cuda(config: ParallelConfig) -> None:
    """Set what CUDA and torch's allocator read once, when CUDA starts. What the user has set stays.

    CUDA starts later: the package has torch ask NVML whether there is a GPU (`megatron_solopo/parallel/__init__.py`).
    With both names of the allocator's settings set, torch 2.13 takes the older one alone.
    """
    # Packs differ in length. Segments that can grow keep freed memory usable for the next, larger pack.
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & set(os.environ):
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    # Megatron's overlap under TP and CP needs communication kernels to start in the order of issue, which one hardware
    # queue ensures. In other layouts one queue would only keep copies to the host from running beside kernels.
    # Megatron-LM asks for it before Blackwell alone. To ask CUDA for the GPU's type here would start it.
    if config.tensor_model_parallel_size * config.context_parallel_size > 1:
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")


def _join(device: torch.device, world_size: int, timeout: timedelta) -> None:
    backend = "gloo" if device.type == "cpu" else "nccl"
    _allow_sockets(world_size)
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        assert world_size == 1
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)


def _allow_sockets(world_size: int) -> None:
    """Raise this process's limit of open files, 1,024 by default, to what it needs or as far as it may.

    Every gloo group connects all of its ranks with each other. torch's TORCH_GLOO_LAZY_INIT would connect only ranks
    that talk, but it hung in several trials on 4 and 8 ranks with torch 2.13.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _OTHER_FILES + _WORLD_GROUPS * world_size
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
