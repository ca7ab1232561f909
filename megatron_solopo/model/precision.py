"""FP8 through Transformer Engine: what is legal, and what this machine can do."""

import importlib
from typing import Any

from megatron_solopo.architecture.fp8 import check_fp8
from megatron_solopo.architecture.huggingface_config import Architecture
from megatron_solopo.config import FP8Recipe, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_solopo.errors import UserError
from megatron_solopo.model.layer_spec import uses_transformer_engine
from megatron_solopo.parallel.megatron_internals import FP8_PARAMETERS_SINCE, installed_version

# Transformer Engine's own question for each recipe; what to take instead where the answer is no.
_AVAILABLE = {
    "delayed": "is_fp8_available",
    "tensorwise": "is_fp8_available",
    "blockwise": "is_fp8_block_scaling_available",
    "mxfp8": "is_mxfp8_available",
}
_NEAREST: dict[str, tuple[FP8Recipe, ...]] = {
    "mxfp8": ("blockwise", "tensorwise"),
    "blockwise": ("mxfp8", "tensorwise"),
    "tensorwise": (),
    "delayed": (),
}


def check_precision(
    architecture: Architecture, model: ModelConfig, parallel: ParallelConfig, optimizer: OptimizerConfig
) -> None:
    """Refuse precisions that are illegal, that do not fit the model, or that this machine cannot compute.

    Raises UserError naming the key, the reason and, for a recipe, the nearest one that can serve.
    """
    check_fp8(architecture, model, parallel, optimizer)
    if model.fp8 is None:
        return
    if model.fp8_param and installed_version() < FP8_PARAMETERS_SINCE:
        raise UserError(
            f"model.fp8_param=true needs megatron-core {FP8_PARAMETERS_SINCE} or newer (Python 3.12), which can write "
            f"such weights to checkpoints; {installed_version()} is installed. Set it to false"
        )
    if not uses_transformer_engine(model):
        raise UserError(
            f"model.fp8={model.fp8} needs Transformer Engine on a CUDA device, model.dtype=bfloat16 and "
            "model.implementation=auto; set model.fp8=null to train in bfloat16, or see `megatron-solopo doctor`"
        )
    reason = unavailable(model.fp8_recipe)
    if reason:
        can = next((recipe for recipe in _NEAREST[model.fp8_recipe] if not unavailable(recipe)), None)
        nearest = f"model.fp8_recipe={can}" if can else "model.fp8=null (bfloat16)"
        raise UserError(f"model.fp8_recipe={model.fp8_recipe} cannot run here: {reason}; the nearest is {nearest}")


def unavailable(recipe: FP8Recipe) -> str:
    """Why this device and this Transformer Engine cannot run a recipe; empty where they can."""
    ask = getattr(importlib.import_module("transformer_engine.pytorch"), _AVAILABLE[recipe], None)
    if ask is None:
        return "this Transformer Engine is too old for it"
    available, reason = ask(return_reason=True)
    return "" if available else " ".join(str(reason).split()).rstrip(".")


def precision_settings(model: ModelConfig) -> dict[str, Any]:
    """The fields of Megatron-Core's TransformerConfig for FP8."""
    if model.fp8 is None:
        return {}
    return {
        "fp8": model.fp8,
        "fp8_recipe": model.fp8_recipe,
        "fp8_param": model.fp8_param,
        # Megatron's and Transformer Engine's usual history, which Megatron's own default (1) would switch off.
        "fp8_amax_history_len": 1024,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": model.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": model.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": model.num_layers_at_end_in_bf16,
    }
