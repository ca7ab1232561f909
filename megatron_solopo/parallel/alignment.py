"""What FP8 kernels want the sizes of their operands to be a multiple of."""

from megatron_solopo.config import ModelConfig, ParallelConfig

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
