"""Bytes of parameters, gradients and optimizer state: what a rank holds from the first step to the last.

Peak memory of every pipeline stage, by part.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_solopo.architecture.gpus import Reserve
from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.config import Config
from megatron_solopo.plan.activations import (
    element_bytes,
    logits_bytes,
    recomputed_bytes,
    rotary_bytes,
    saved_rate,
    uses_local_layers,
    working_bytes,
)
from megatron_solopo.plan.parameters import Buffer, Chunk, buffers, chunk_parameters, model_chunks
from megatron_solopo.plan.pipeline import most_alive, stage_order
from megatron_solopo.plan.workload import PackShape

_FP32 = 4
_MOMENTS = 2 * _FP32
_HOST_BYTES_PER_PARAMETER = 16
"""fp32 weight, two moments and the update, in pinned memory."""


@dataclass(frozen=True)
class State:
    """Bytes on one GPU, but for `host`."""

    parameters: int
    fp8_weights: int
    """FP8 copies of the weights and of their transposes, that Transformer Engine keeps for a step."""
    gradients: int
    optimizer: int
    host: int
    num_parameters: int
    """Elements of this rank's parameters, padding excluded."""

    @property
    def total(self) -> int:
        """Bytes on the GPU."""
        return self.parameters + self.fp8_weights + self.gradients + self.optimizer


def rank_state(
    architecture: ModelShape,
    config: Config,
    pipeline_rank: int,
    data_parallel_size: int,
    data_rank: int | None = None,
) -> State:
    """State of one rank.

    Args:
        data_rank: its place among the DP x CP ranks that share the optimizer state; None: the fullest one.
    """
    return chunks_state(
        architecture, config, model_chunks(architecture, config.parallel, pipeline_rank), data_parallel_size, data_rank
    )


def chunks_state(
    architecture: ModelShape,
    config: Config,
    chunks: Sequence[Chunk],
    data_parallel_size: int,
    data_rank: int | None = None,
) -> State:
    """State of a rank that holds these chunks; see `rank_state`."""
    distributed = config.optimizer.use_distributed_optimizer
    shards = data_parallel_size * config.parallel.context_parallel_size
    parameters = [chunk_parameters(architecture, config.model, config.parallel, chunk) for chunk in chunks]
    laid_out: list[Buffer] = [buffer for each in parameters for buffer in buffers(each, shards, distributed)]
    width = _FP32 if config.model.dtype == "float32" else 2
    elements = sum(buffer.numel for buffer in laid_out)
    owned = _owned(laid_out, shards, data_rank) if distributed else elements
    per_element = _MOMENTS + (0 if config.model.dtype == "float32" else _FP32)
    offloaded = config.optimizer.optimizer_offload_fraction
    return State(
        parameters=sum(buffer.numel * (1 if buffer.is_fp8 else width) for buffer in laid_out),
        fp8_weights=_fp8_copies(architecture, config, chunks),
        gradients=elements * (_FP32 if config.optimizer.grad_reduce_in_fp32 else width),
        optimizer=round(owned * per_element * (1 - offloaded)),
        host=round(owned * _HOST_BYTES_PER_PARAMETER * offloaded),
        num_parameters=sum(parameter.numel for each in parameters for parameter in each),
    )


def _owned(laid_out: Sequence[Buffer], shards: int, data_rank: int | None) -> int:
    if data_rank is not None:
        return sum(buffer.owned(data_rank, shards) for buffer in laid_out)
    # The padding lies at the ends of buckets, so the first rank's shard is full wherever any is.
    return sum(buffer.owned(0, shards) for buffer in laid_out)


def _fp8_copies(architecture: ModelShape, config: Config, chunks: Sequence[Chunk]) -> int:
    """One byte per weight for each direction; the parameters themselves serve as the first where they are FP8."""
    if config.model.fp8 is None:
        return 0
    as_fp8 = config.model.model_copy(update={"fp8_param": True})
    weights = sum(
        parameter.numel
        for chunk in chunks
        for parameter in chunk_parameters(architecture, as_fp8, config.parallel, chunk)
        if parameter.is_fp8
    )
    return weights * (1 if config.model.fp8_param else 2)


GIB = 2**30


@dataclass(frozen=True)
class StageMemory:
    """Bytes on each GPU of a pipeline rank at its fullest moment."""

    pipeline_rank: int
    parameters: float
    fp8_weights: float
    gradients: float
    optimizer: float
    activations: float
    """Of the layers, over all packs in flight."""
    head: float
    """The response head's share of what the packs in flight keep."""
    working: float
    """Backward's own, for a moment: what is recomputed, gradients of activations, a chunk of logits."""
    communication: float
    reserve: float
    """CUDA's context and fragmentation."""
    host: float
    """Pinned memory on the host; not part of the total."""
    packs_in_flight: int
    """Passes through one model chunk, of which a rank has several in the interleaved schedule."""

    @property
    def parts(self) -> dict[str, float]:
        """By name, in the order of the picture."""
        names = ("parameters", "fp8_weights", "gradients", "optimizer", "activations", "head", "working")
        return {name: getattr(self, name) for name in (*names, "communication", "reserve")}

    @property
    def total(self) -> float:
        """Bytes on the GPU."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class Alive:
    """Activations of all packs in flight on one pipeline rank, at most."""

    saved: float
    head: float
    """The response head's share."""
    recomputed: float
    """What backward makes again beside that."""
    packs: int

    @property
    def most(self) -> float:
        """All that autograd keeps at any moment."""
        return self.saved + self.recomputed


def alive_bytes(
    architecture: ModelShape, config: Config, pipeline_rank: int, packs: Sequence[PackShape], *, local: bool
) -> Alive:
    """What Megatron's schedule of these packs keeps alive.

    As if the largest packs met: then the first rounds of the schedule are the fullest, and stand for all.
    """
    size = config.parallel.pipeline_model_parallel_size
    chunks = model_chunks(architecture, config.parallel, pipeline_rank)
    rates = [saved_rate(architecture, config, chunk, local=local) for chunk in chunks]
    largest = sorted(packs, key=lambda pack: -pack.padded_tokens)
    order = stage_order(pipeline_rank, size, len(chunks), len(packs))[: 4 * size * len(chunks)]
    recomputed = recomputed_bytes(architecture, config, chunks, largest[0], local=local)
    if chunks[-1].has_head:
        # When the layers' backward begins, the head's is over.
        recomputed = max(0.0, recomputed - rates[-1].head(largest[0]))
        if largest[0].response_rows > config.logprob.chunk_tokens:
            recomputed = max(recomputed, logits_bytes(architecture, config, largest[0]))
    return Alive(
        saved=most_alive(order, lambda chunk, number: rates[chunk].total(largest[number])),
        head=most_alive(order, lambda chunk, number: rates[chunk].head(largest[number])),
        recomputed=recomputed,
        packs=round(most_alive(order, lambda chunk, number: 1.0)),
    )


def stage_memory(
    architecture: ModelShape,
    config: Config,
    data_parallel_size: int,
    pipeline_rank: int,
    packs: Sequence[PackShape],
    reserve: Reserve,
    state: State,
) -> StageMemory:
    """Memory of one pipeline rank, which holds `state` and runs these packs in a step."""
    local = uses_local_layers(config)
    alive = alive_bytes(architecture, config, pipeline_rank, packs, local=local)
    chunks = model_chunks(architecture, config.parallel, pipeline_rank)
    extremes = (max(packs, key=lambda pack: pack.padded_tokens), max(packs, key=lambda pack: pack.response_rows))
    working = max(working_bytes(architecture, config, chunks, pack, local=local) for pack in extremes)
    communication = _communication(architecture, config, data_parallel_size, packs, reserve)
    rotary = rotary_bytes(architecture, max(pack.longest for pack in packs))
    tensors = state.total + alive.saved + working + rotary + communication
    return StageMemory(
        pipeline_rank=pipeline_rank,
        parameters=state.parameters,
        fp8_weights=state.fp8_weights,
        gradients=state.gradients,
        optimizer=state.optimizer,
        activations=alive.saved - alive.head + rotary,
        head=alive.head,
        working=working,
        communication=communication,
        reserve=reserve.context_gib * GIB + reserve.fragmentation * tensors,
        host=state.host,
        packs_in_flight=alive.packs,
    )


def _communication(
    architecture: ModelShape, config: Config, data_parallel_size: int, packs: Sequence[PackShape], reserve: Reserve
) -> float:
    """NCCL's buffers of the groups in use, messages of the pipeline, keys and values of the context-parallel ring."""
    parallel, e = config.parallel, element_bytes(config)
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    pp = parallel.pipeline_model_parallel_size
    groups = sum(size > 1 for size in (tp, pp, cp, data_parallel_size * cp))
    tokens = max(pack.padded_tokens for pack in packs) / cp
    hidden = architecture.hidden_size / (tp if parallel.uses_sequence_parallel else 1)
    messages = 4 * e * tokens * hidden if pp > 1 else 0  # one to send and one to receive, each way
    keys = max(architecture.num_query_groups / tp, 1) * architecture.head_dim
    ring = 2 * 2 * 2 * e * tokens * keys if cp > 1 else 0  # keys and values, two buffers, and their gradients
    return groups * reserve.communicator_gib * GIB + messages + ring


def fullest_stage(stages: Sequence[StageMemory]) -> StageMemory:
    """The stage that decides whether a layout fits."""
    return max(stages, key=lambda stage: stage.total)
