"""How much disk the checkpoints of a run take."""

from megatron_solopo.architecture.adapters import num_adapter_parameters
from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.config import Config, ModelConfig, OptimizerConfig

_FP32_BYTES = 4
_MOMENT_BYTES = 8
_WIDTHS = {"float32": 4, "bfloat16": 2}


def optimizer_bytes_per_parameter(model: ModelConfig, optimizer: OptimizerConfig) -> int:
    """What a checkpoint adds to a trained weight: Adam's moments, and master weights where they are kept apart."""
    has_masters = optimizer.use_distributed_optimizer or model.dtype != "float32"
    return _MOMENT_BYTES + (_FP32_BYTES if has_masters else 0)


def checkpoint_bytes(config: Config, architecture: ModelShape) -> int:
    """Bytes of one checkpoint, but for a few small files."""
    if config.lora is None:
        count = architecture.num_parameters
        trained = count - (0 if config.moe.router_trainable else architecture.num_router_parameters)
    else:  # the base is not stored
        count = trained = num_adapter_parameters(architecture, config.lora)
    return count * _WIDTHS[config.model.dtype] + trained * optimizer_bytes_per_parameter(config.model, config.optimizer)


def most_checkpoints(config: Config, max_steps: int) -> int | None:
    """The most checkpoints that the disk holds at one time: those that stay, and one that is being written.

    The best one (`best_metric`) counts as one more. No run has more checkpoints than saves. None: all stay, and the
    clock alone knows how many. With pipeline stages, the time of an evaluation decides whether the run is saved before.
    """
    checkpoint = config.checkpoint
    saves_early = config.parallel.pipeline_model_parallel_size > 1 and config.training.eval_steps is not None
    is_timed = checkpoint.every_minutes is not None or checkpoint.must_save_by is not None or saves_early
    saves = 1 if checkpoint.save_steps is None else -(-max_steps // checkpoint.save_steps)
    if checkpoint.keep_last is None:
        return None if is_timed else saves
    kept = checkpoint.keep_last + 1 + (checkpoint.best_metric is not None)
    if checkpoint.keep_every is not None:
        kept += max_steps // checkpoint.keep_every
    return min(kept, max_steps if is_timed else saves)
