"""Which parallel layouts and FP8 settings fit a model, and what sequences and packs are padded to. Arithmetic only."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.architecture.pipeline_layout import stage_layers
from megatron_solopo.config import ModelConfig, MoEConfig, OptimizerConfig, ParallelConfig
from megatron_solopo.config.load import as_override
from megatron_solopo.errors import UserError

_VOCAB_MULTIPLE_PER_RANK = 128
_LARGE_BUBBLE = 0.2
# Both sides of an FP8 matrix must be a multiple of this. One side is the tokens of a pack that one rank holds.
# Upstream: `get_fp8_align_size` in `megatron/core/fp8_utils.py`.
FP8_MULTIPLES = {"delayed": 16, "tensorwise": 16, "mxfp8": 32, "blockwise": 16}
# Sequence parallelism gathers blockwise FP8 values only if each rank holds whole blocks. Otherwise Transformer Engine
# gathers twice the bytes and waits for them. Upstream: `Float8BlockQuantizer.is_quantizable`.
FP8_BLOCK = 128


def context_chunks(start: int, end: int, size: int, rank: int) -> list[range]:
    """What context-parallel rank `rank` of `size` holds of the positions [start, end), in its local order.

    They are cut into 2 x CP equal chunks. Rank r holds chunks r and 2 x CP - 1 - r, so that causal attention costs
    every rank the same. Transformer Engine expects this order.
    """
    if size == 1:
        return [range(start, end)]
    chunk, remainder = divmod(end - start, 2 * size)
    assert remainder == 0, f"block of {end - start} positions is not padded to a multiple of {2 * size}"
    first, last = start + rank * chunk, end - rank * chunk
    return [range(first, first + chunk), range(last - chunk, last)]


def sequence_multiple(context_parallel_size: int) -> int:
    """Every packed sequence is padded to a multiple of this: context parallelism cuts it into 2 x CP chunks."""
    return 2 * context_parallel_size if context_parallel_size > 1 else 1


def pack_multiple(tensor_model_parallel_size: int, context_parallel_size: int, model: ModelConfig | None = None) -> int:
    """The tokens of a whole pack are padded to a multiple of this, after the padding of its sequences.

    Sequence parallelism divides the pack's tokens over CP x TP ranks. With FP8, each of these ranks needs a multiple of
    `FP8_MULTIPLES`, or whole blocks where it gathers blockwise values. The last sequence takes the difference, because
    padding every short sequence would cost more.

    Args:
        model: whether and how FP8 is used; None: not.
    """
    tokens_per_rank = 1
    if model is not None and model.fp8:
        gathers_blocks = model.fp8_recipe == "blockwise" and tensor_model_parallel_size > 1
        tokens_per_rank = FP8_BLOCK if gathers_blocks else FP8_MULTIPLES[model.fp8_recipe]
    ranks = tensor_model_parallel_size * context_parallel_size
    return math.lcm(sequence_multiple(context_parallel_size), tokens_per_rank * ranks)


def packs_multiple(pipeline_model_parallel_size: int, num_model_chunks: int) -> int:
    """Each rank's number of packs is a multiple of this. The interleaved schedule needs the pipeline size."""
    return pipeline_model_parallel_size if num_model_chunks > 1 else 1


def wanted_packs(pipeline_model_parallel_size: int) -> int:
    """Each rank gets this number of packs if the batch has enough triplets: 4 x PP, so that a pipeline waits little."""
    return 4 * pipeline_model_parallel_size if pipeline_model_parallel_size > 1 else 1


def packs_per_part(pipeline_model_parallel_size: int) -> int:
    """The most packs that a rank runs in one go in a pass over a data set: 24 x PP.

    A pass is divided into equal parts, because only between them all pipeline ranks can stop together. A part of a long
    pass has nearly this number of packs, and its pipeline waits about 4 % of the time.
    """
    return 24 * pipeline_model_parallel_size


def describe_bubble(bubble: float) -> str:
    """One line about the share of time that pipeline stages wait, with advice if it is large."""
    found = f"pipeline stages wait {bubble:.1%} of a step's time"
    if bubble <= _LARGE_BUBBLE:
        return found
    return (
        f"warning: {found}; raise training.global_batch_size, for more packs on each rank, or lower "
        "parallel.pipeline_model_parallel_size"
    )


def check_world_size(config: ParallelConfig, world_size: int) -> None:
    """Refuse a world size that the parallel sizes do not divide.

    Raises UserError naming the sizes and what to change.
    """
    if world_size % config.model_parallel_size:
        raise UserError(
            f"{world_size} processes, but this layout needs a multiple of {config.model_parallel_size}: "
            f"parallel.tensor_model_parallel_size={config.tensor_model_parallel_size} x pipeline_model_parallel_size="
            f"{config.pipeline_model_parallel_size} x context_parallel_size={config.context_parallel_size}; "
            f"launch as many (torchrun --nproc-per-node {config.model_parallel_size} -m megatron_solopo ...) "
            "or change parallel.*"
        )
    experts = config.expert_model_parallel_size * config.expert_tensor_size
    if (world_size // config.pipeline_model_parallel_size) % experts:
        raise UserError(
            f"parallel.expert_model_parallel_size={config.expert_model_parallel_size} x expert_tensor_parallel_size="
            f"{config.expert_tensor_size} does not divide the {world_size // config.pipeline_model_parallel_size} "
            "ranks of a pipeline stage (TP x CP x DP); change one of them or the number of ranks. Without the key, "
            "expert_tensor_parallel_size is tensor_model_parallel_size; 1 is legal where experts are shared"
        )
    instances = config.num_distributed_optimizer_instances
    ranks = world_size // (config.tensor_model_parallel_size * config.pipeline_model_parallel_size)
    of_experts = world_size // config.pipeline_model_parallel_size // experts
    for count, what in ((ranks, "DP x CP"), (of_experts, "those with the same experts")):
        if count % instances:
            raise UserError(
                f"parallel.num_distributed_optimizer_instances={instances} does not divide the {count} ranks ({what}) "
                "that share the optimizer's state; set it to a divisor"
            )


class DataParallelOverlap(NamedTuple):
    """Which data-parallel communication runs beside computation."""

    grad_reduce: bool
    param_gather: bool


def data_parallel_overlap(
    parallel: ParallelConfig, optimizer: OptimizerConfig, ranks: int, *, on_gpu: bool
) -> DataParallelOverlap:
    """What `overlap_grad_reduce` and `overlap_param_gather` mean where they are null.

    Args:
        ranks: DP x CP, the ranks that share a gradient.
    """
    reduce, gather = parallel.overlap_grad_reduce, parallel.overlap_param_gather
    if reduce is None:
        reduce = bool(gather) or (on_gpu and ranks > 1)
    if gather is None:
        gather = reduce and optimizer.use_distributed_optimizer
    return DataParallelOverlap(reduce, gather)


def padded_vocab_size(vocab_size: int, tensor_model_parallel_size: int) -> int:
    """Vocabulary rows to allocate: Megatron's usual multiple of 128 x TP, which makes shards equal and fast."""
    multiple = _VOCAB_MULTIPLE_PER_RANK * tensor_model_parallel_size
    return -(-vocab_size // multiple) * multiple


def check_layout(architecture: ModelShape, parallel: ParallelConfig) -> None:
    """Refuse a layout that does not divide the model; raises UserError naming both numbers and the key."""
    tp = parallel.tensor_model_parallel_size
    experts = architecture.experts
    for what, count in (
        ("attention heads", architecture.num_attention_heads),
        ("feed-forward columns", 0 if experts and experts.in_all_layers else architecture.ffn_hidden_size),
        ("feed-forward columns of the shared expert", experts.shared_ffn_hidden_size if experts else 0),
    ):
        if count % tp:
            raise UserError(f"parallel.tensor_model_parallel_size={tp} does not divide the model's {count} {what}")
    groups = architecture.num_query_groups
    if groups % tp and tp % groups:
        raise UserError(
            f"parallel.tensor_model_parallel_size={tp} is neither a divisor nor a multiple of the model's "
            f"{groups} key-value heads"
        )
    if architecture.norms_all_heads and tp > groups:
        raise UserError(
            f"parallel.tensor_model_parallel_size={tp} is more than the model's {groups} key-value heads, which "
            f"one norm takes together; set it to a divisor of {groups}"
        )
    if parallel.uses_sequence_parallel and tp == 1:
        raise UserError("parallel.sequence_parallel=true needs parallel.tensor_model_parallel_size > 1")
    chunks = parallel.virtual_pipeline_model_parallel_size
    if chunks is not None and parallel.pipeline_model_parallel_size == 1:
        raise UserError(
            f"parallel.virtual_pipeline_model_parallel_size={chunks} needs parallel.pipeline_model_parallel_size > 1"
        )
    _check_experts(architecture, parallel)
    _check_recomputation(stage_layers(architecture.num_layers, parallel), parallel)
    _check_activation_offload(architecture, parallel)


def _check_experts(architecture: ModelShape, parallel: ParallelConfig) -> None:
    experts, ep, etp = architecture.experts, parallel.expert_model_parallel_size, parallel.expert_tensor_size
    tp = parallel.tensor_model_parallel_size
    problem = ""
    if experts is None:
        for key, value, default in (("expert_model", ep, 1), ("expert_tensor", etp, tp)):
            if value != default:
                problem = (
                    f"{key}_parallel_size={value} needs a model with experts; {architecture.model_type} has none; set "
                    f"it to {default}"
                )
        if parallel.moe_token_dispatcher_type != "alltoall":
            problem = f"moe_token_dispatcher_type=flex needs a model with experts; {architecture.model_type} has none"
    elif experts.num_experts % ep:
        legal = ", ".join(str(size) for size in range(1, experts.num_experts + 1) if experts.num_experts % size == 0)
        problem = (
            f"expert_model_parallel_size={ep} does not divide the model's {experts.num_experts} experts; legal: {legal}"
        )
    elif experts.ffn_hidden_size % etp:
        problem = (
            f"expert_tensor_parallel_size={etp} does not divide the {experts.ffn_hidden_size} feed-forward columns of "
            "an expert; set it to 1"
        )
    elif ep == 1 and etp != tp:
        problem = (
            f"expert_tensor_parallel_size={etp} needs expert_model_parallel_size > 1 or the value of "
            f"tensor_model_parallel_size={tp}, because the gradients of experts would not be summed over other ranks"
        )
    elif ep == 1 and parallel.moe_token_dispatcher_type == "flex":
        problem = "moe_token_dispatcher_type=flex needs expert_model_parallel_size > 1; set it to alltoall"
    if problem:
        raise UserError(f"parallel.{problem}")


def check_training(
    architecture: ModelShape, parallel: ParallelConfig, optimizer: OptimizerConfig, moe: MoEConfig
) -> None:
    """Refuse what the experts of a model do not allow in training; raises UserError naming the key."""
    experts, tp = architecture.experts, parallel.tensor_model_parallel_size
    if experts is None:
        for key, field in type(moe).model_fields.items():
            if value := getattr(moe, key):
                raise UserError(
                    f"moe.{key}={as_override(value)} needs a model with experts; {architecture.model_type} has none; "
                    f"set it to {as_override(field.default)}"
                )
        return
    if tp > 1 and not parallel.uses_sequence_parallel:
        raise UserError(
            f"parallel.sequence_parallel=false with tensor_model_parallel_size={tp} is not supported for a model with "
            "experts, because every rank would send all tokens; set it to true"
        )
    if parallel.expert_model_parallel_size == 1 or optimizer.use_distributed_optimizer:
        return
    first = 0
    for stage, count in enumerate(stage_layers(architecture.num_layers, parallel)):
        if not any(experts.layers[first : first + count]):
            # Megatron's optimizer of experts exists only where there are some, and its ranks wait for each other.
            raise UserError(
                f"optimizer.use_distributed_optimizer=false is not supported with expert_model_parallel_size above 1 "
                f"where a pipeline stage (here {stage}) has no experts; set it to true"
            )
        first += count


def _check_recomputation(layers: Sequence[int], parallel: ParallelConfig) -> None:
    if parallel.recompute_granularity != "full":
        return
    count, problem = parallel.recompute_num_layers, ""
    if count > max(layers):
        problem = f"is more than the {max(layers)} layers of a pipeline stage"
    elif parallel.recompute_method == "uniform":
        # Megatron's last group would reach beyond the stage.
        undivided = [number for number in layers if number % count]
        if undivided:
            problem = (
                f"does not divide the {undivided[0]} layers of a pipeline stage, which "
                "parallel.recompute_method=uniform needs"
            )
    if problem:
        raise UserError(f"parallel.recompute_num_layers={count} {problem}")


def check_exchange_by_heads(architecture: ModelShape, parallel: ParallelConfig) -> None:
    """Refuse a `cp_comm_type` that the model's heads do not allow; raises UserError naming both numbers and the key.

    Ask only where it acts: in Transformer Engine's attention, over packs without shared prompts.
    """
    tp, kind = parallel.tensor_model_parallel_size, parallel.cp_comm_type
    if kind == "p2p":
        return
    sizes = parallel.hierarchical_context_parallel_sizes
    ranks, key = (
        (sizes[0], "the first of parallel.hierarchical_context_parallel_sizes")
        if sizes
        else (parallel.context_parallel_size, "parallel.context_parallel_size")
    )
    for what, count in (
        ("attention heads", architecture.num_attention_heads // tp),
        ("key-value heads", max(architecture.num_query_groups // tp, 1)),
    ):
        if count % ranks:
            raise UserError(
                f"parallel.cp_comm_type={kind}: the {count} {what} of a tensor-parallel rank do not divide by {key}="
                f"{ranks}; set parallel.cp_comm_type=p2p"
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


def check_fp8(
    architecture: ModelShape, model: ModelConfig, parallel: ParallelConfig, optimizer: OptimizerConfig
) -> None:
    """Refuse FP8 settings that contradict each other or do not fit the model; raises UserError naming the key."""
    if model.fp8 is None:
        for key in ("fp8_param", "first_last_layers_bf16"):
            if getattr(model, key):
                raise UserError(f"model.{key}=true needs model.fp8=hybrid or e4m3")
        return
    _check_combination(model, optimizer)
    _check_bfloat16_layers(architecture, model, parallel)
    _check_widths(architecture, model, parallel)


def _check_combination(model: ModelConfig, optimizer: OptimizerConfig) -> None:
    if model.first_last_layers_bf16 and model.fp8_recipe == "delayed":
        raise UserError(
            "model.first_last_layers_bf16=true is not supported with model.fp8_recipe=delayed, which scales all layers "
            "together; set model.fp8_recipe to tensorwise or blockwise"
        )
    if not model.fp8_param:
        return
    if model.fp8_recipe == "mxfp8":
        raise UserError("model.fp8_param=true is not supported with model.fp8_recipe=mxfp8; set it to false")
    if not optimizer.use_distributed_optimizer:
        raise UserError("model.fp8_param=true needs optimizer.use_distributed_optimizer=true")
    if optimizer.optimizer_offload_fraction:
        raise UserError(
            "model.fp8_param=true is not supported with optimizer.optimizer_offload_fraction="
            f"{optimizer.optimizer_offload_fraction}; set one of them to its default"
        )


def _check_bfloat16_layers(architecture: ModelShape, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Megatron needs those layers on the first and on the last pipeline stage."""
    if not model.first_last_layers_bf16:
        return
    layers = architecture.num_layers // parallel.pipeline_model_parallel_size
    for key in ("num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16"):
        if getattr(model, key) > layers:
            raise UserError(
                f"model.{key}={getattr(model, key)} is more than the {layers} layers of a pipeline stage "
                f"(parallel.pipeline_model_parallel_size={parallel.pipeline_model_parallel_size})"
            )


def _check_widths(architecture: ModelShape, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Both sides of every weight matrix of a rank must be multiples, like the tokens."""
    tp, multiple = parallel.tensor_model_parallel_size, FP8_MULTIPLES[model.fp8_recipe]
    a, experts = architecture, architecture.experts
    for what, width in (
        ("hidden size", a.hidden_size),
        ("attention heads x head_dim / TP", a.num_attention_heads * a.head_dim // tp),
        ("queries, keys and values / TP", (a.num_attention_heads + 2 * a.num_query_groups) * a.head_dim // tp),
        ("feed-forward columns / TP", 0 if experts and experts.in_all_layers else a.ffn_hidden_size // tp),
        ("columns of an expert / expert TP", experts.ffn_hidden_size // parallel.expert_tensor_size if experts else 0),
        ("columns of the shared expert / TP", experts.shared_ffn_hidden_size // tp if experts else 0),
    ):
        if width % multiple:
            raise UserError(
                f"model.fp8_recipe={model.fp8_recipe} needs matrices of multiples of {multiple}, but {what} is {width} "
                f"(parallel.tensor_model_parallel_size={tp}); choose another recipe, a smaller TP, or model.fp8=null"
            )
