"""Peak memory of every pipeline stage by part, and the state of the model and the optimizer that each rank holds."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, NamedTuple

import numpy as np

from megatron_solopo.architecture.gpus import Reserve
from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.architecture.layout import data_parallel_overlap
from megatron_solopo.architecture.pipeline_schedule import peak_in_flight, stage_order
from megatron_solopo.config import Config, ModelConfig
from megatron_solopo.data.batch_plan import IntArray
from megatron_solopo.plan.activations import (
    activation_rate,
    element_bytes,
    logits_bytes,
    recomputed_bytes,
    recomputed_parts,
    rotary_bytes,
    sequence_shards,
    uses_local_layers,
    working_bytes,
)
from megatron_solopo.plan.parameters import (
    ModelChunk,
    ParameterShard,
    ShardSizes,
    chunk_parameters,
    layer_adapters,
    model_chunks,
    overlap_bucket_size,
    parameter_buffers,
    ranks_of_a_copy,
    sharing_ranks,
)
from megatron_solopo.plan.workload import PackShape

GIB = 2**30
_FP32 = 4
_MOMENTS = 2 * _FP32
_HOST_BYTES_PER_PARAMETER = 16
"""fp32 weight, two moments and the update, in pinned memory."""
_COPIES_OF_A_PIECE = 2
"""While a piece of a checkpoint is read: the file's bytes, and the tensor that is made of them."""


@dataclass(frozen=True)
class RankState:
    """Bytes of parameters, gradients and optimizer state of one rank. All are on the GPU except `host`."""

    parameters: int
    fp8_weights: int
    """FP8 copies of the weights and of their transposes, which Transformer Engine keeps for a step."""
    gradients: int
    optimizer: int
    host: int
    num_parameters: int
    """Elements of this rank's parameters without padding."""
    buckets: int
    """Parts in which gradients are reduced and parameters gathered."""
    saved: int
    """What it writes of a checkpoint: its optimizer state, and its share of the weights that several ranks have. Host
    memory holds it while it is written."""
    largest_piece: int
    """The largest piece of it. To continue, a rank reads piece by piece into the memory of the GPU."""
    expert_parameters: int = 0
    """Those of `parameters` that learn and that expert parallelism divides. Other ranks gather them."""
    expert_gradients: int = 0
    """Their gradients. Other ranks reduce them."""
    frozen: int = 0
    """Those of `parameters` that do not learn. No rank gathers them."""

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return self.parameters + self.fp8_weights + self.gradients + self.optimizer


@dataclass(frozen=True, eq=False)
class _SharedState:
    """What a rank has of the parameters whose gradients the same ranks share. Sizes count elements."""

    trained: int
    frozen: int
    largest: int
    """Its largest parameter that learns."""
    largest_frozen: int
    in_buffers: int
    """Those that learn, with padding."""
    trained_fp8: int
    """Those of them in FP8."""
    frozen_fp8: int
    num_buckets: int
    owned: IntArray
    """Parameters whose optimizer state each of the ranks holds that divide it."""

    def parameter_bytes(self, width: int) -> int:
        """Bytes of all parameters, those in FP8 with one each."""
        return self.frozen_bytes(width) + self.in_buffers * width + self.trained_fp8 * (1 - width)

    def frozen_bytes(self, width: int) -> int:
        """Bytes of the parameters that do not learn."""
        return self.frozen * width + self.frozen_fp8 * (1 - width)


class _Sharing(NamedTuple):
    """How ranks share parameters and their optimizer's state."""

    sizes: ShardSizes
    shards: int
    distributed: bool
    bucket_size: int | None
    """Of the first chunk."""
    trains_routers: bool
    of_experts: bool
    """Whether these are the experts that expert parallelism divides, or the other parameters."""
    adapters: tuple[ParameterShard, ...]
    """Of a layer. If there are any, nothing else learns."""

    def learns(self, parameter: ParameterShard) -> bool:
        """Whether a parameter is trained."""
        return parameter.is_adapter if self.adapters else self.trains_routers or not parameter.is_router


@lru_cache(maxsize=4096)
def _shared_state(
    architecture: ModelShape, model: ModelConfig, chunks: tuple[ModelChunk, ...], sharing: _Sharing
) -> _SharedState:
    """Many layouts of a search share it."""
    parameters = [
        [
            each
            for each in chunk_parameters(architecture, model, sharing.sizes, chunk, sharing.adapters)
            if each.is_expert is sharing.of_experts
        ]
        for chunk in chunks
    ]
    trained = [[each for each in chunk if sharing.learns(each)] for chunk in parameters]
    frozen = [each for chunk in parameters for each in chunk if not sharing.learns(each)]
    shards, distributed = sharing.shards, sharing.distributed
    buffers = [
        buffer
        for number, chunk in enumerate(trained)
        for buffer in parameter_buffers(chunk, shards, distributed, None if number else sharing.bucket_size)
    ]
    count = sum(each.numel for chunk in trained for each in chunk)
    return _SharedState(
        trained=count,
        frozen=sum(each.numel for each in frozen),
        largest=max((each.numel for chunk in trained for each in chunk), default=0),
        largest_frozen=max((each.numel for each in frozen), default=0),
        in_buffers=sum(buffer.numel for buffer in buffers),
        trained_fp8=sum(buffer.numel for buffer in buffers if buffer.is_fp8),
        frozen_fp8=sum(each.numel for each in frozen if each.is_fp8),
        num_buckets=sum(len(buffer.buckets_B2) for buffer in buffers),
        owned=sum((buffer.owned(shards) for buffer in buffers), np.zeros(shards, np.int64))
        if distributed
        else np.full(shards, count),
    )


def _both_states(
    architecture: ModelShape, config: Config, pipeline_rank: int, data_parallel_size: int
) -> tuple[_SharedState, _SharedState]:
    """Of the parameters that all DP x CP ranks share, and of the experts that expert parallelism divides."""
    parallel, sizes = config.parallel, ShardSizes.of(config.parallel)
    data_ranks = sharing_ranks(parallel, data_parallel_size, is_expert=False)
    overlaps = data_parallel_overlap(parallel, config.optimizer, data_ranks, on_gpu=True).grad_reduce
    chunks = tuple(model_chunks(architecture, parallel, pipeline_rank))

    def state(of_experts: bool) -> _SharedState:
        sharing = _Sharing(
            sizes,
            sharing_ranks(parallel, data_parallel_size, is_expert=of_experts)
            // parallel.num_distributed_optimizer_instances,
            config.optimizer.use_distributed_optimizer,
            overlap_bucket_size(data_parallel_size) if overlaps and pipeline_rank == 0 else None,
            config.moe.router_trainable,
            of_experts,
            layer_adapters(architecture, config),
        )
        return _shared_state(architecture, config.model, chunks, sharing)

    return state(False), state(True)


def rank_state(
    architecture: ModelShape,
    config: Config,
    pipeline_rank: int,
    data_parallel_size: int,
    stage_rank: int | None = None,
) -> RankState:
    """The state of one rank.

    Args:
        stage_rank: its place among the TP x CP x DP ranks of its pipeline stage, in Megatron's order. It decides the
            shard of the optimizer's state. None means the fullest one.
    """
    parallel, distributed = config.parallel, config.optimizer.use_distributed_optimizer
    dense, experts = parts = _both_states(architecture, config, pipeline_rank, data_parallel_size)
    ranks = [sharing_ranks(parallel, data_parallel_size, is_expert=is_expert) for is_expert in (False, True)]
    width = element_bytes(config)
    gradient_width = _FP32 if config.optimizer.grad_reduce_in_fp32 else width
    per_element = _MOMENTS + (0 if config.model.dtype == "float32" else _FP32)
    offloaded = config.optimizer.optimizer_offload_fraction
    stage = np.arange(ranks[0] * parallel.tensor_model_parallel_size) if stage_rank is None else np.array([stage_rank])
    owned = int(
        sum(
            part.owned[stage // ranks_of_a_copy(parallel, is_expert=is_expert) % len(part.owned)]
            for part, is_expert in ((dense, False), (experts, True))
        ).max()
    )
    # Without the distributed optimizer all ranks have the same state, and share the work of writing it. Only the
    # distributed optimizer writes weights of a float32 model a second time.
    written = owned if distributed else sum(part.trained / size for part, size in zip(parts, ranks, strict=True))
    saved_per_element = _MOMENTS + _FP32 if distributed else per_element
    # A checkpoint of adapters holds no base. Whoever loads it reads the base from its own files, in its precision.
    in_checkpoint = [part.trained + (0 if config.lora else part.frozen) for part in parts]
    weights = sum(count * width / size for count, size in zip(in_checkpoint, ranks, strict=True))
    pieces = [_FP32 * min(round(written), max(part.largest for part in parts))]
    pieces += [width * part.largest_frozen for part in parts]
    return RankState(
        parameters=sum(part.parameter_bytes(width) for part in parts),
        fp8_weights=_fp8_copies(architecture, config, model_chunks(architecture, parallel, pipeline_rank)),
        gradients=sum(part.in_buffers for part in parts) * gradient_width,
        optimizer=round(owned * per_element * (1 - offloaded)),
        host=round(owned * _HOST_BYTES_PER_PARAMETER * offloaded),
        buckets=sum(part.num_buckets for part in parts),
        num_parameters=sum(part.trained + part.frozen for part in parts),
        saved=round(written * saved_per_element + weights),
        largest_piece=max(pieces),
        expert_parameters=experts.parameter_bytes(width) - experts.frozen_bytes(width),
        expert_gradients=experts.in_buffers * gradient_width,
        frozen=sum(part.frozen_bytes(width) for part in parts),
    )


def _fp8_copies(architecture: ModelShape, config: Config, chunks: Sequence[ModelChunk]) -> int:
    """One byte per weight for each direction. FP8 parameters serve as the first copy themselves."""
    if config.model.fp8 is None:
        return 0
    as_fp8 = config.model.model_copy(update={"fp8_param": True})
    weights = sum(
        parameter.numel
        for chunk in chunks
        for parameter in chunk_parameters(architecture, as_fp8, ShardSizes.of(config.parallel), chunk)
        if parameter.is_fp8
    )
    return weights * (1 if config.model.fp8_param else 2)


@dataclass(frozen=True)
class RankCheck:
    """A dry run's bytes of one rank, which was built without memory, and the estimates for it."""

    rank: int
    place: str
    """Which pipeline stage, and which shard of the optimizer's state."""
    num_parameters: int
    built: dict[str, int]
    """Bytes of parameters, gradients and optimizer state, by these names, as Megatron-Core allocates them."""
    estimated: dict[str, int]
    """The same by arithmetic."""
    saved_bytes: int | None
    """Most bytes that autograd kept at any moment of Megatron's schedule, with plain PyTorch layers; None: not run."""
    estimated_saved_bytes: float | None
    seconds: float

    @property
    def difference(self) -> str:
        """Which of the exact figures disagree, and by how many bytes; empty if none does."""
        differences = {name: self.estimated[name] - size for name, size in self.built.items()}
        return ", ".join(f"{name} {difference:+,}" for name, difference in differences.items() if difference)

    def as_json(self) -> dict[str, Any]:
        """All figures, and whether the exact ones are equal."""
        return vars(self) | {"equal": not self.difference}


@dataclass(frozen=True)
class PeakActivations:
    """Most bytes that the packs in flight on one pipeline rank keep at any moment."""

    saved: float
    head: float
    """The response head's share of `saved`."""
    recomputed: float
    """What backward computes again besides that."""
    packs_in_flight: int

    @property
    def total(self) -> float:
        """All bytes that autograd keeps."""
        return self.saved + self.recomputed


def peak_activations(
    architecture: ModelShape, config: Config, pipeline_rank: int, packs: Sequence[PackShape], *, local: bool
) -> PeakActivations:
    """What Megatron's schedule of these packs keeps.

    The estimate assumes that the packs that keep most meet. Then the first rounds of the schedule are the fullest.

    Args:
        local: whether the layers are plain PyTorch.
    """
    size = config.parallel.pipeline_model_parallel_size
    chunks = model_chunks(architecture, config.parallel, pipeline_rank)
    rates = [activation_rate(architecture, config, chunk, local=local) for chunk in chunks]
    # Many packs of a plan are the same object.
    kept = cache(lambda chunk, pack: rates[chunk].total(pack))
    fullest = sorted(packs, key=lambda pack: -sum(kept(chunk, pack) for chunk in range(len(rates))))
    order = stage_order(pipeline_rank, size, len(chunks), len(packs))[: 4 * size * len(chunks)]
    again = recomputed_parts(architecture, config, chunks, local=local)

    def recomputed(pack: PackShape) -> float:
        found = recomputed_bytes(again, config, pack, local=local)
        if not chunks[-1].has_head:
            return found
        # When the layers' backward begins, the head's is over.
        of_layers = max(0.0, found - rates[-1].head(pack))
        has_chunks = pack.response_rows > config.logprob.chunk_tokens
        return max(of_layers, logits_bytes(architecture, config, pack)) if has_chunks else of_layers

    return PeakActivations(
        saved=peak_in_flight(order, lambda chunk, number: kept(chunk, fullest[number])),
        head=peak_in_flight(order, lambda chunk, number: rates[chunk].head(fullest[number])),
        recomputed=max(map(recomputed, set(packs))),
        packs_in_flight=round(peak_in_flight(order, lambda chunk, number: 1.0)),
    )


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each GPU of a pipeline rank at its fullest moment."""

    pipeline_rank: int
    base: float
    """Parameters beside adapters. They are frozen. Without adapters all are `parameters`."""
    parameters: float
    fp8_weights: float
    gradients: float
    optimizer: float
    activations: float
    """What the layers keep of all packs in flight, and the rotary angles."""
    head: float
    """What the response head keeps of all packs in flight."""
    working: float
    """What backward needs for a moment: recomputed activations, their gradients, a chunk of logits."""
    communication: float
    reserve: float
    """CUDA's context and fragmentation."""
    host: float
    """Pinned memory on the host. It is not part of the total."""
    save_host: float
    """Host memory of a save, while it lasts."""
    resume_host: float
    """Host memory of loading a checkpoint."""
    packs_in_flight: int
    """Passes through one model chunk. A rank of the interleaved schedule has several chunks."""

    @property
    def parts(self) -> dict[str, float]:
        """The parts of the total by name, in the order of the picture. `base` is one only where it is frozen."""
        names = (*(("base",) if self.base else ()), "parameters", "fp8_weights", "gradients", "optimizer")
        others = ("activations", "head", "working", "communication", "reserve")
        return {name: getattr(self, name) for name in (*names, *others)}

    @property
    def total(self) -> float:
        """Bytes on the GPU."""
        return sum(self.parts.values())


def stage_memory(
    architecture: ModelShape,
    config: Config,
    data_parallel_size: int,
    pipeline_rank: int,
    packs: Sequence[PackShape],
    reserve: Reserve,
    state: RankState,
) -> StageMemory:
    """Memory of a pipeline rank that holds `state` and runs these packs in a step."""
    local = uses_local_layers(config)
    peak = peak_activations(architecture, config, pipeline_rank, packs, local=local)
    chunks = model_chunks(architecture, config.parallel, pipeline_rank)
    working = working_bytes(architecture, config, chunks, set(packs), local=local)
    communication = _communication(architecture, config, data_parallel_size, packs, reserve)
    rotary = rotary_bytes(architecture, max(pack.longest for pack in packs))
    tensors = state.total + peak.saved + working + rotary + communication
    base = 0 if config.lora is None else state.frozen
    return StageMemory(
        pipeline_rank=pipeline_rank,
        base=base,
        parameters=state.parameters - base,
        fp8_weights=state.fp8_weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        activations=peak.saved - peak.head + rotary,
        head=peak.head,
        working=working,
        communication=communication,
        reserve=reserve.context_gib * GIB + reserve.fragmentation * tensors,
        host=state.host,
        save_host=state.saved,
        resume_host=_COPIES_OF_A_PIECE * state.largest_piece,
        packs_in_flight=peak.packs_in_flight,
    )


def _communication(
    architecture: ModelShape, config: Config, data_parallel_size: int, packs: Sequence[PackShape], reserve: Reserve
) -> float:
    """NCCL's buffers of the groups in use, messages of the pipeline, keys and values of the context-parallel ring."""
    parallel, e = config.parallel, element_bytes(config)
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    pp = parallel.pipeline_model_parallel_size
    sizes = [tp, pp, cp, data_parallel_size * cp]
    if parallel.expert_model_parallel_size > 1:
        of_experts = sharing_ranks(parallel, data_parallel_size, is_expert=True)
        sizes += [parallel.expert_model_parallel_size, parallel.expert_tensor_size, of_experts]
    groups = sum(size > 1 for size in sizes)
    tokens = max(pack.padded_tokens for pack in packs) / cp
    hidden = architecture.hidden_size / sequence_shards(config)
    messages = 4 * e * tokens * hidden if pp > 1 else 0  # one to send and one to receive, each way
    keys = max(architecture.num_query_groups / tp, 1) * architecture.head_dim
    ring = 2 * 2 * 2 * e * tokens * keys if cp > 1 else 0  # keys and values, two buffers, and their gradients
    return groups * reserve.communicator_gib * GIB + messages + ring
