"""Which parallel layouts divide a model and a number of GPUs, and what they pad to: arithmetic alone, no Megatron."""

from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.config import ParallelConfig
from megatron_solopo.errors import UserError

_VOCAB_MULTIPLE_PER_RANK = 128


def sequence_multiple(tensor_model_parallel_size: int, context_parallel_size: int) -> int:
    """What every packed sequence is padded to a multiple of: 2 x CP chunks, each shared out to TP ranks."""
    return 2 * context_parallel_size * tensor_model_parallel_size


def packs_multiple(pipeline_model_parallel_size: int, num_model_chunks: int) -> int:
    """What each rank's number of packs is a multiple of: the interleaved schedule wants the pipeline size."""
    return pipeline_model_parallel_size if num_model_chunks > 1 else 1


def check_world_size(config: ParallelConfig, world_size: int) -> None:
    """Refuse a world size that the parallel sizes do not divide.

    Raises UserError naming the sizes and what to change.
    """
    if world_size % config.model_parallel_size:
        raise UserError(
            f"{world_size} processes, but parallel.tensor_model_parallel_size="
            f"{config.tensor_model_parallel_size} x pipeline_model_parallel_size="
            f"{config.pipeline_model_parallel_size} x context_parallel_size={config.context_parallel_size} "
            f"= {config.model_parallel_size} must divide them; launch a multiple of {config.model_parallel_size} "
            "(torchrun --nproc-per-node) or change parallel.*"
        )


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int) -> int:
    """Vocabulary rows to allocate: Megatron's usual multiple of 128 x TP, so that shards are equal and fast."""
    multiple = _VOCAB_MULTIPLE_PER_RANK * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def check_layout(architecture: ModelShape, parallel: ParallelConfig) -> None:
    """Refuse a layout that does not divide the model; raises UserError naming both numbers and the key."""
    tp = parallel.tensor_model_parallel_size
    for what, count in (
        ("attention heads", architecture.num_attention_heads),
        ("feed-forward columns", architecture.ffn_hidden_size),
    ):
        if count % tp:
            raise UserError(f"parallel.tensor_model_parallel_size={tp} does not divide the model's {count} {what}")
    groups = architecture.num_query_groups
    if groups % tp and tp % groups:
        raise UserError(
            f"parallel.tensor_model_parallel_size={tp} is neither a divisor nor a multiple of the model's "
            f"{groups} key-value heads"
        )
    if parallel.uses_sequence_parallel and tp == 1:
        raise UserError("parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size > 1")
    chunks = parallel.virtual_pipeline_model_parallel_size
    stages = parallel.pipeline_model_parallel_size * (chunks or 1)
    if chunks is not None and parallel.pipeline_model_parallel_size == 1:
        raise UserError(
            f"parallel.virtual_pipeline_model_parallel_size={chunks} needs parallel.pipeline_model_parallel_size > 1"
        )
    layers_per_stage = architecture.num_layers // stages
    if parallel.recompute_granularity == "full" and parallel.recompute_num_layers > max(layers_per_stage, 1):
        raise UserError(
            f"parallel.recompute_num_layers={parallel.recompute_num_layers} is more than the {layers_per_stage} "
            "layers of a pipeline stage"
        )
    if architecture.num_layers % stages:
        raise UserError(
            f"the model's {architecture.num_layers} layers do not divide into {stages} pipeline stages "
            "(parallel.pipeline_model_parallel_size x virtual_pipeline_model_parallel_size)"
        )
    _check_exchange_by_heads(architecture, parallel)
    _check_activation_offload(architecture, parallel)


def _check_exchange_by_heads(architecture: ModelShape, parallel: ParallelConfig) -> None:
    cp, tp = parallel.context_parallel_size, parallel.tensor_model_parallel_size
    if parallel.cp_comm_type != "a2a":
        return
    for what, count in (
        ("attention heads", architecture.num_attention_heads // tp),
        ("key-value heads", max(architecture.num_query_groups // tp, 1)),
    ):
        if count % cp:
            raise UserError(
                f"parallel.cp_comm_type=a2a: the {count} {what} of a tensor-parallel rank do not divide by "
                f"parallel.context_parallel_size={cp}; set parallel.cp_comm_type=p2p"
            )


def _check_activation_offload(architecture: ModelShape, parallel: ParallelConfig) -> None:
    count = parallel.cpu_offloading_num_layers
    if not count:
        return
    problem = ""
    if parallel.pipeline_model_parallel_size > 1:
        problem = "needs parallel.pipeline_model_parallel_size=1"
    elif parallel.recompute_granularity is not None:
        problem = "needs parallel.recompute_granularity=null"
    elif count >= architecture.num_layers:
        problem = f"must be below the model's {architecture.num_layers} layers"
    if problem:
        raise UserError(f"parallel.cpu_offloading_num_layers={count} {problem}")
