"""Megatron-Core's gradient buffers, optimizer and learning-rate schedule, from our configuration."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_solopo.config import ModelConfig, OptimizerConfig
from megatron_solopo.model.fusion import fuse_weight_gradients
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.model.spec import uses_transformer_engine


def wrap_data_parallel(chunks: Sequence[ResponseModel], optimizer: OptimizerConfig) -> list[DistributedDataParallel]:
    """Give each model chunk its gradient buffers and data-parallel gradient reduction (in fp32)."""
    config = chunks[0].config
    # Without this, Megatron's schedules skip the data-parallel, norm and tied-embedding gradient sync.
    config.finalize_model_grads_func = _note_and_finalize
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=optimizer.grad_reduce_in_fp32,
        overlap_grad_reduce=False,
        use_distributed_optimizer=optimizer.use_distributed_optimizer,
        fp8_param_gather=bool(config.fp8_param),
    )
    wrapped = [DistributedDataParallel(config, ddp_config, chunk) for chunk in chunks]
    for chunk in chunks:  # now that there are buffers to add to
        fuse_weight_gradients(chunk)
    return wrapped


def _note_and_finalize(model: Sequence[DistributedDataParallel], *arguments: Any, **keywords: Any) -> None:
    """Keep whether this rank's own gradient is finite, not waiting for the answer, and let Megatron reduce it.

    Afterwards a NaN is everywhere, and nobody can tell whose it was.
    """
    sums = [buffer.grad_data.sum() for chunk in model for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    model[0].gradient_was_finite = torch.stack(sums).isfinite().all()
    finalize_model_grads(list(model), *arguments, **keywords)


def check_offload(optimizer: OptimizerConfig, model: ModelConfig) -> None:
    """Raise ValueError if optimizer state is to leave a GPU that is not there, or without Transformer Engine."""
    if optimizer.optimizer_offload_fraction and not uses_transformer_engine(model):
        raise ValueError(
            f"optimizer.optimizer_offload_fraction={optimizer.optimizer_offload_fraction} needs a CUDA device, "
            "Transformer Engine and model.dtype=bfloat16; set it to 0"
        )


def build_optimizer(chunks: Sequence[DistributedDataParallel], optimizer: OptimizerConfig) -> MegatronOptimizer:
    """Adam over this rank's parameters, with fp32 master weights where the model is bfloat16."""
    model = chunks[0].module.config
    dtype = model.params_dtype
    offload = optimizer.optimizer_offload_fraction > 0
    grads_dtype = torch.float32 if optimizer.grad_reduce_in_fp32 else dtype
    return get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.adam_beta1,
            adam_beta2=optimizer.adam_beta2,
            adam_eps=optimizer.adam_eps,
            # Megatron measures the gradient norm only where it clips: an infinite bound does just that.
            clip_grad=optimizer.clip_grad or math.inf,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=optimizer.use_distributed_optimizer,
            fp8_recipe=model.fp8_recipe if model.fp8 else None,
            optimizer_cpu_offload=offload,
            optimizer_offload_fraction=optimizer.optimizer_offload_fraction,
            # With the overlap, gradients that must be cast first are cast on another stream than the GPU's share of
            # the update runs on, and nothing makes the update wait for them.
            overlap_cpu_optimizer_d2h_h2d=offload and optimizer.grad_reduce_in_fp32,
            # The hybrid optimizer then holds the only fp32 weights, and no copy of them stays on the GPU.
            use_precision_aware_optimizer=offload,
            main_grads_dtype=grads_dtype if offload else torch.float32,
        ),
        list(chunks),
    )


def check_schedule(config: OptimizerConfig, max_steps: int) -> None:
    """Raise ValueError if the warm-up or the minimum learning rate does not fit the run."""
    if config.lr_warmup_iters >= max_steps:
        raise ValueError(
            f"optimizer.lr_warmup_iters={config.lr_warmup_iters} must be below the run's {max_steps} steps "
            "(training.max_steps or training.num_train_epochs)"
        )
    if config.min_lr > config.lr:
        raise ValueError(f"optimizer.min_lr={config.min_lr} must not exceed optimizer.lr={config.lr}")


def build_scheduler(optimizer: MegatronOptimizer, config: OptimizerConfig, max_steps: int) -> OptimizerParamScheduler:
    """Linear warm-up, then the chosen decay down to `min_lr` at `max_steps`; see `check_schedule` for what is legal."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_iters,
        lr_decay_steps=max_steps,
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=max_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
