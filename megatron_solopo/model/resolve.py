"""A model, its layout and its layers, read and checked once where a run, an evaluation or a conversion begins."""

import importlib
from dataclasses import dataclass
from pathlib import Path

from megatron.core.utils import get_te_version
from packaging.version import Version

from megatron_solopo.architecture.gpus import FP8_QUESTIONS
from megatron_solopo.architecture.huggingface_config import Architecture, read_architecture
from megatron_solopo.architecture.layout import check_exchange_by_heads, check_fp8, check_layout
from megatron_solopo.config import Config, FP8Recipe, ModelConfig, OptimizerConfig, ParallelConfig
from megatron_solopo.cpu_features import is_cpu
from megatron_solopo.errors import UserError
from megatron_solopo.parallel.megatron_internals import (
    FP8_PARAMETERS_SINCE,
    LOWER_RIGHT_MASK,
    computes_lower_right_masks,
    has_deep_ep,
    has_transformer_engine,
    installed_version,
)

# Upstream: `get_attention_backend` in `transformer_engine/pytorch/attention/dot_product_attention/utils.py`.
_HIERARCHICAL_PACKING_SINCE = Version("2.18")


@dataclass(frozen=True)
class ResolvedModel:
    """What the settings of a model come to on this machine. `settings.path` holds its weights."""

    settings: ModelConfig
    parallel: ParallelConfig
    architecture: Architecture
    uses_transformer_engine: bool
    """Whether the layers are Transformer Engine's, or those of plain PyTorch."""

    @property
    def path(self) -> Path:
        """Hugging Face directory or Megatron checkpoint."""
        return self.settings.path

    def at(self, path: Path, key: str = "reference.model_path") -> "ResolvedModel":
        """Resolve the model in another directory, under the same settings and layout.

        Args:
            key: what names the directory, for errors.
        """
        if path == self.path:
            return self
        settings = self.settings.model_copy(update={"path": path})
        return resolve_model(settings, self.parallel, architecture=read_architecture(path, key))


def resolve_model(
    settings: ModelConfig, parallel: ParallelConfig, *, architecture: Architecture | None = None
) -> ResolvedModel:
    """Read config.json, check that the layout divides the model, and choose the layers.

    Args:
        architecture: what config.json says, where the caller has read it already.

    Raises UserError for an unsupported model, a layout that does not fit it, or layers that cannot run here.
    """
    architecture = architecture or read_architecture(settings.path)
    check_layout(architecture, parallel)
    _check_dispatcher(parallel)
    return ResolvedModel(settings, parallel, architecture, uses_transformer_engine(settings))


def check_attention(model: ResolvedModel, config: Config) -> None:
    """Refuse packs that Transformer Engine's attention cannot compute here. Plain attention computes them all.

    Packs with shared prompts need a mask. Packs without them are exchanged over context-parallel ranks.

    Raises UserError naming the key to change.
    """
    if not model.uses_transformer_engine:
        return
    installed, parallel, shape = get_te_version(), model.parallel, model.architecture
    if config.has_shared_packs:
        tp = parallel.tensor_model_parallel_size
        heads = shape.num_attention_heads // tp, max(shape.num_query_groups // tp, 1)
        if not computes_lower_right_masks(*heads, shape.head_dim):
            raise UserError(
                f"data.share_prompts=true needs the mask {LOWER_RIGHT_MASK.name} over packed sequences, which no "
                f"attention kernel of transformer-engine {installed} computes here (NVTE_* variables choose among "
                "them); set data.share_prompts=false"
            )
    if not config.has_unshared_packs:
        return
    check_exchange_by_heads(shape, parallel)
    # Older versions disable every kernel that could exchange packed sequences by heads and in a ring.
    if parallel.cp_comm_type == "a2a+p2p" and installed < _HIERARCHICAL_PACKING_SINCE:
        raise UserError(
            f"parallel.cp_comm_type=a2a+p2p needs transformer-engine {_HIERARCHICAL_PACKING_SINCE} or newer for packed "
            f"sequences; {installed} is installed. Set parallel.cp_comm_type=p2p"
        )


def _check_dispatcher(parallel: ParallelConfig) -> None:
    if parallel.moe_token_dispatcher_type != "flex":
        return
    reason = ""
    if is_cpu():
        reason = "a CUDA device"
    elif not has_deep_ep():
        reason = "DeepEP, whose package deep_ep is not installed or cannot be imported"
    if reason:
        raise UserError(
            f"parallel.moe_token_dispatcher_type=flex needs {reason}; set it to alltoall, or see "
            "`megatron-solopo doctor`"
        )


def uses_transformer_engine(settings: ModelConfig) -> bool:
    """Whether `model.implementation` comes to Transformer Engine here. Its attention kernels take bfloat16 alone.

    Raises UserError if Transformer Engine is asked for and cannot run.
    """
    reason = ""
    if is_cpu():
        reason = "needs a CUDA device"
    elif not has_transformer_engine():
        reason = "needs the package transformer-engine, which is not installed or cannot be imported"
    elif settings.dtype == "float32":
        reason = "needs model.dtype=bfloat16"
    if reason and settings.implementation == "transformer_engine":
        raise UserError(
            f"model.implementation=transformer_engine {reason}; use auto or local, or see `megatron-solopo doctor`"
        )
    return not reason and settings.implementation != "local"


# The recipes to take instead of one that this device does not compute, nearest first.
_NEAREST: dict[str, tuple[FP8Recipe, ...]] = {
    "mxfp8": ("blockwise", "tensorwise"),
    "blockwise": ("mxfp8", "tensorwise"),
    "tensorwise": (),
    "delayed": (),
}


def check_precision(model: ResolvedModel, optimizer: OptimizerConfig) -> None:
    """Refuse FP8 that is illegal, that does not fit the model, or that this machine cannot compute.

    Raises UserError naming the key, the reason and, for a recipe, the nearest one that this machine can compute.
    """
    settings = model.settings
    check_fp8(model.architecture, settings, model.parallel, optimizer)
    if settings.fp8 is None:
        return
    if settings.fp8_param and installed_version() < FP8_PARAMETERS_SINCE:
        raise UserError(
            f"model.fp8_param=true needs megatron-core {FP8_PARAMETERS_SINCE} or newer (Python 3.12), which can write "
            f"such weights to checkpoints; {installed_version()} is installed. Set it to false"
        )
    if not model.uses_transformer_engine:
        raise UserError(
            f"model.fp8={settings.fp8} needs Transformer Engine on a CUDA device, model.dtype=bfloat16 and "
            "model.implementation=auto; set model.fp8=null to train in bfloat16, or see `megatron-solopo doctor`"
        )
    reason = _unavailable(settings.fp8_recipe)
    if reason:
        possible = next((recipe for recipe in _NEAREST[settings.fp8_recipe] if not _unavailable(recipe)), None)
        nearest = f"model.fp8_recipe={possible}" if possible else "model.fp8=null (bfloat16)"
        raise UserError(f"model.fp8_recipe={settings.fp8_recipe} cannot run here: {reason}; the nearest is {nearest}")


def _unavailable(recipe: FP8Recipe) -> str:
    """Why this device and this Transformer Engine cannot run a recipe; empty where they can."""
    ask = getattr(importlib.import_module("transformer_engine.pytorch"), FP8_QUESTIONS[recipe], None)
    if ask is None:
        return "this Transformer Engine is too old for it"
    available, reason = ask(return_reason=True)
    return "" if available else " ".join(str(reason).split()).rstrip(".")
