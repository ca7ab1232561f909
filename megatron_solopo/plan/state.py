"""Bytes of parameters, gradients and optimizer state: what a rank holds from the first step to the last."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_solopo.architecture.shape import Shape
from megatron_solopo.config import Config
from megatron_solopo.plan.parameters import Buffer, Chunk, buffers, chunk_parameters, model_chunks

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
    architecture: Shape,
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
    architecture: Shape,
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


def _fp8_copies(architecture: Shape, config: Config, chunks: Sequence[Chunk]) -> int:
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
