"""Which FP8 settings and layouts a model's matrices allow, whatever the machine: arithmetic alone."""

from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.config import ModelConfig, OptimizerConfig, ParallelConfig
from megatron_solopo.errors import UserError

# Rows and columns of an FP8 matrix product's operands; rows are the tokens of a pack that one rank holds.
FP8_MULTIPLES = {"delayed": 16, "tensorwise": 16, "mxfp8": 32, "blockwise": 128}


def pack_multiple(parallel: ParallelConfig, model: ModelConfig) -> int:
    """What the tokens of a whole pack are padded to a multiple of, beyond the padding of its sequences.

    1 without FP8. With it, each of the CP x TP ranks needs a multiple of `FP8_MULTIPLES`. The last sequence
    takes the difference: padding every short sequence to such a multiple would cost more.
    """
    if model.fp8 is None:
        return 1
    ranks = parallel.context_parallel_size * parallel.tensor_model_parallel_size
    return FP8_MULTIPLES[model.fp8_recipe] * ranks


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
            "model.first_last_layers_bf16=true has no meaning with model.fp8_recipe=delayed, which scales all layers "
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
    """Megatron wants those layers on the first and on the last pipeline stage."""
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
    """Both sides of every weight matrix of a rank must suit the kernels, as the tokens must."""
    tp, multiple = parallel.tensor_model_parallel_size, FP8_MULTIPLES[model.fp8_recipe]
    a = architecture
    for what, width in (
        ("hidden size", a.hidden_size),
        ("attention heads x head_dim / TP", a.num_attention_heads * a.head_dim // tp),
        ("queries, keys and values / TP", (a.num_attention_heads + 2 * a.num_query_groups) * a.head_dim // tp),
        ("feed-forward columns / TP", a.ffn_hidden_size // tp),
    ):
        if width % multiple:
            raise UserError(
                f"model.fp8_recipe={model.fp8_recipe} needs matrices of multiples of {multiple}, but {what} is {width} "
                f"(parallel.tensor_model_parallel_size={tp}); choose another recipe, a smaller TP, or model.fp8=null"
            )
