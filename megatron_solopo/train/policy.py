"""The model that is trained: its chunks with Megatron's gradient buffers, its optimizer and schedule, one step."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_solopo.architecture.huggingface_config import Architecture
from megatron_solopo.architecture.layout import data_parallel_overlap
from megatron_solopo.checkpoint.adapter_checkpoint import is_adapter_checkpoint
from megatron_solopo.checkpoint.adapters import add_adapters, fresh_adapters
from megatron_solopo.checkpoint.load import load_weights
from megatron_solopo.checkpoint.mapping import ReadTensor
from megatron_solopo.checkpoint.peft_directory import PeftDirectory
from megatron_solopo.config import Config, LoRAConfig, MoEConfig, OptimizerConfig, ParallelConfig
from megatron_solopo.cpu_features import is_cpu
from megatron_solopo.data.packing import Pack
from megatron_solopo.errors import UserError
from megatron_solopo.model.build import build_model
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.model.layers import layers_and_routers
from megatron_solopo.model.microbatch import Microbatch
from megatron_solopo.model.resolve import ResolvedModel
from megatron_solopo.model.routing import RouterWatch
from megatron_solopo.parallel.megatron_internals import (
    begin_gathering_ahead,
    forget_largest_values,
    fuse_weight_gradients,
    gather_parameters,
    make_optimizer,
    own_gradient_sums,
    record_own_gradients,
    release_exact_values,
)
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train.metrics import reduce_over_ranks
from megatron_solopo.train.step import LossFunction, run_schedule


def freeze_routers(chunks: Sequence[ResponseModel], config: MoEConfig) -> None:
    """Let the routers of experts stay as they are, unless they are to learn. Call it before the chunks are wrapped."""
    for chunk in chunks:
        for _, router in layers_and_routers(chunk):
            router.requires_grad_(config.router_trainable)


def wrap_data_parallel(
    chunks: Sequence[ResponseModel], optimizer: OptimizerConfig, parallel: ParallelConfig
) -> list[DistributedDataParallel]:
    """Give each model chunk its gradient buffers and data-parallel communication."""
    config = chunks[0].config
    ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    # Without this, a later pipeline stage or chunk would begin to gather when its first input is there.
    gathers_ahead = len(chunks) > 1 or parallel_state.get_pipeline_model_parallel_rank() > 0
    ddp_config = data_parallel_config(
        optimizer, parallel, ranks, fp8_param=bool(config.fp8_param), gathers_ahead=gathers_ahead
    )
    # Later chunks of the interleaved schedule are one bucket each: their communication overlaps with other chunks.
    wrapped = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=number > 0)
        for number, chunk in enumerate(chunks)
    ]
    # Without this function Megatron's schedules do not synchronize gradients over DP, of norms and of tied embeddings.
    config.finalize_model_grads_func = _finalize_and_check_finite
    config.no_sync_func = [chunk.no_sync for chunk in wrapped] if len(chunks) > 1 else wrapped[0].no_sync
    if ddp_config.align_param_gather and len(chunks) > 1:  # for the interleaved schedule
        config.param_sync_func = [chunk.start_param_sync for chunk in wrapped]
    for chunk in wrapped:
        record_own_gradients(chunk)
    wrapped[0].before_reduction = lambda: None
    for chunk in chunks:  # now that there are buffers to add to
        fuse_weight_gradients(chunk)
    return wrapped


def data_parallel_config(
    optimizer: OptimizerConfig, parallel: ParallelConfig, ranks: int, *, fp8_param: bool, gathers_ahead: bool = False
) -> DistributedDataParallelConfig:
    """Megatron-Core's settings of the gradient buffers, for weights that are FP8 or not.

    Args:
        ranks: DP x CP, the ranks that share a gradient.
        gathers_ahead: whether something else than a layer's forward begins the gather of its parameters.
    """
    overlap = data_parallel_overlap(parallel, optimizer, ranks, on_gpu=not is_cpu())
    return DistributedDataParallelConfig(
        grad_reduce_in_fp32=optimizer.grad_reduce_in_fp32,
        overlap_grad_reduce=overlap.grad_reduce,
        overlap_param_gather=overlap.param_gather,
        align_param_gather=overlap.param_gather and gathers_ahead,
        use_distributed_optimizer=optimizer.use_distributed_optimizer,
        num_distributed_optimizer_instances=parallel.num_distributed_optimizer_instances,
        fp8_param_gather=fp8_param,
    )


def _finalize_and_check_finite(model: Sequence[DistributedDataParallel], *arguments: Any, **keywords: Any) -> None:
    """Let Megatron reduce the gradient, and remember whether this rank's own one was finite.

    After the reduction a NaN is on every rank, and its origin is lost. The result stays on the device, so that nothing
    waits for it here.
    """
    model[0].before_reduction()
    finalize_model_grads(list(model), *arguments, **keywords)
    sums = [own for chunk in model for own in own_gradient_sums(chunk)]
    model[0].gradient_was_finite = torch.stack(sums).isfinite().all()


def check_offload(optimizer: OptimizerConfig, model: ResolvedModel) -> None:
    """Raise UserError if optimizer state is to leave a GPU that is not there, or without Transformer Engine."""
    if optimizer.optimizer_offload_fraction and not model.uses_transformer_engine:
        raise UserError(
            f"optimizer.optimizer_offload_fraction={optimizer.optimizer_offload_fraction} needs a CUDA device, "
            "Transformer Engine and model.dtype=bfloat16; set it to 0"
        )


def build_optimizer(chunks: Sequence[DistributedDataParallel], optimizer: OptimizerConfig) -> MegatronOptimizer:
    """Adam over this rank's parameters, with fp32 master weights where the model is bfloat16."""
    model = chunks[0].module.config
    dtype = model.params_dtype
    return make_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=optimizer.lr,
            min_lr=optimizer.min_lr,
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.adam_beta1,
            adam_beta2=optimizer.adam_beta2,
            adam_eps=optimizer.adam_eps,
            # Megatron measures the gradient norm only if it clips; an infinite bound clips nothing.
            clip_grad=optimizer.clip_grad or math.inf,
            bf16=dtype is torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=optimizer.use_distributed_optimizer,
            overlap_param_gather=chunks[0].ddp_config.overlap_param_gather,
            fp8_recipe=model.fp8_recipe if model.fp8 else None,
            **offload_settings(optimizer, dtype),
        ),
        list(chunks),
    )


def offload_settings(optimizer: OptimizerConfig, params_dtype: torch.dtype) -> dict[str, Any]:
    """Megatron-Core's settings of an optimizer whose state is partly in host memory (its hybrid optimizer)."""
    offload = optimizer.optimizer_offload_fraction > 0
    grads_dtype = torch.float32 if optimizer.grad_reduce_in_fp32 else params_dtype
    return {
        "optimizer_cpu_offload": offload,
        "optimizer_offload_fraction": optimizer.optimizer_offload_fraction,
        # With the overlap, gradients that must be cast are cast on a stream of their own, and the update on the GPU
        # does not wait for it. So overlap only fp32 gradients.
        "overlap_cpu_optimizer_d2h_h2d": offload and optimizer.grad_reduce_in_fp32,
        # The hybrid optimizer then holds the only fp32 weights, without a copy on the GPU.
        "use_precision_aware_optimizer": offload,
        "main_grads_dtype": grads_dtype if offload else torch.float32,
    }


def decay_iters(config: OptimizerConfig, max_steps: int) -> int:
    """Steps until the learning rate has fallen to `min_lr`, in a run of `max_steps` steps."""
    return max_steps if config.lr_decay_iters is None else config.lr_decay_iters


def check_schedule(config: OptimizerConfig, max_steps: int) -> None:
    """Raise UserError if the warm-up or the minimum learning rate does not fit the run."""
    if config.lr_warmup_iters >= decay_iters(config, max_steps):
        length = (
            f"the run's {max_steps} steps (training.max_steps or training.num_train_epochs)"
            if config.lr_decay_iters is None
            else f"optimizer.lr_decay_iters={config.lr_decay_iters}"
        )
        raise UserError(f"optimizer.lr_warmup_iters={config.lr_warmup_iters} must be below {length}")
    if config.min_lr > config.lr:
        raise UserError(f"optimizer.min_lr={config.min_lr} must not exceed optimizer.lr={config.lr}")


def describe_decay(config: OptimizerConfig, max_steps: int) -> str | None:
    """One line if the learning rate stops to fall before the run ends."""
    end = decay_iters(config, max_steps)
    if config.lr_decay_style == "constant" or end >= max_steps:
        return None
    nothing = ", so those steps change nothing" if config.min_lr == 0 else ""
    return (
        f"note: the learning rate stays at optimizer.min_lr={config.min_lr:g} after step {end} of {max_steps} "
        f"(optimizer.lr_decay_iters){nothing}"
    )


def build_scheduler(optimizer: MegatronOptimizer, config: OptimizerConfig, max_steps: int) -> OptimizerParamScheduler:
    """Linear warm-up, then the chosen decay down to `min_lr`; `check_schedule` says what is legal."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=config.lr_warmup_iters,
        lr_decay_steps=decay_iters(config, max_steps),
        lr_decay_style=config.lr_decay_style,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=max_steps,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )


def next_learning_rate(policy: "Policy", decay_steps: int) -> float:
    """The learning rate of the next step, if the decay took `decay_steps` steps."""
    scheduler = copy.copy(policy.scheduler)
    scheduler.lr_decay_steps = decay_steps
    return float(scheduler.get_lr(policy.optimizer.param_groups[0]))


_WARMING_PASSES = 3


@dataclass(frozen=True)
class StepResult:
    """One optimizer step."""

    reports: list[torch.Tensor]
    """What the loss function reported for each of this rank's packs; empty before the last pipeline stage."""
    grad_norm: float
    """Norm of the whole gradient before clipping, equal on every rank."""
    learning_rate: float
    skipped: bool
    """Whether a loss or the gradient was not finite on some rank, so that no rank updated anything."""
    gradient_was_finite: bool
    """This rank's own gradient, before it was reduced."""


@dataclass(frozen=True)
class Policy:
    """This rank's share of the trained model."""

    chunks: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    scheduler: OptimizerParamScheduler
    router_watch: RouterWatch | None = None
    """None for a model without experts."""

    def step(
        self,
        packs: Sequence[Pack],
        loss_function: Callable[[Microbatch], LossFunction],
        topology: Topology,
        *,
        before_pack: Callable[[], None] | None = None,
        before_reduction: Callable[[], None] = lambda: None,
    ) -> StepResult:
        """Forward and backward over this rank's packs, then one optimizer step on all ranks together.

        If a loss or the gradient is not finite on any rank, no rank updates the model, the optimizer or the schedule.

        Args:
            before_pack: see `run_schedule`; if it raises, the policy is unchanged.
            before_reduction: called when this rank's own gradients are complete.
        """
        learning_rate = self.optimizer.param_groups[0]["lr"]
        self.chunks[0].before_reduction = before_reduction
        reports = self._accumulate(packs, loss_function, topology, before_pack)
        # Megatron's step does both again, which changes nothing.
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        finite = math.isfinite(grad_norm) and all(bool(report.isfinite().all()) for report in reports)
        (broken,) = reduce_over_ranks([not finite], dist.ReduceOp.MAX, topology)
        if not broken:
            _, grad_norm, _ = self.optimizer.step()
            self.scheduler.step(increment=1)
        return StepResult(
            reports, float(grad_norm), learning_rate, bool(broken), bool(self.chunks[0].gradient_was_finite)
        )

    def warm_scales(
        self,
        packs: Sequence[Pack],
        loss_function: Callable[[Microbatch], LossFunction],
        topology: Topology,
        before_pack: Callable[[], None] | None = None,
    ) -> None:
        """Run the first step's packs for the scales of FP8's delayed recipe alone. All ranks together.

        A new model has scales of 1: activations above FP8's largest value become it, and small gradients become 0. So
        the largest values of a pass are wrong until the scales before it are right. Each pass forgets those of the one
        before. The next step drops the gradients.
        """
        for _ in range(_WARMING_PASSES):
            for chunk in self.chunks:
                forget_largest_values(chunk)
            self._accumulate(packs, loss_function, topology, before_pack)

    def _accumulate(
        self,
        packs: Sequence[Pack],
        loss_function: Callable[[Microbatch], LossFunction],
        topology: Topology,
        before_pack: Callable[[], None] | None,
    ) -> list[torch.Tensor]:
        """Forward and backward; the gradients replace those of before."""
        if self.router_watch is not None:
            self.router_watch.reset()
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        if len(self.chunks) == 1:  # the interleaved schedule does this itself
            begin_gathering_ahead(self.chunks[0])
        return run_schedule(self.chunks, packs, loss_function, topology, forward_only=False, before_pack=before_pack)

    def gather_parameters(self) -> None:
        """Complete the parameters on every rank, also those that the next step would gather in its forward pass.

        All ranks call it together before they read parameters outside of a training step.
        """
        for chunk in self.chunks:
            gather_parameters(chunk)


def load_model(model: ResolvedModel, topology: Topology, *, chunk_tokens: int) -> list[ResponseModel]:
    """Build this rank's chunks of a model and load its weights.

    Raises UserError for damaged weights.
    """
    chunks = build_model(model, chunk_tokens=chunk_tokens, device=topology.device)
    load_weights(chunks, model.architecture, model.path)
    return chunks


def load_frozen(
    model: ResolvedModel, topology: Topology, *, chunk_tokens: int, moe: MoEConfig | None = None
) -> list[ResponseModel]:
    """`load_model` for a model that is not trained, in the precision of passes without gradients.

    Args:
        moe: of a reference model, which replays routes as the policy does. Otherwise a policy that is its own reference
            would have other rewards than 0.
    """
    scored = replace(model, settings=model.settings.without_gradients)
    chunks = load_model(scored, topology, chunk_tokens=chunk_tokens)
    for chunk in chunks:
        release_exact_values(chunk)
    if moe is not None and moe.replay:
        RouterWatch(chunks, moe, counts_routes=False)
    return chunks


def check_starts_whole(path: Path) -> None:
    """Raise UserError if the model in `path` is a checkpoint of adapters."""
    if is_adapter_checkpoint(path):
        raise UserError(
            f"model.path={path}: holds adapters without their base, which no run trains; `convert export "
            "--merge` writes the whole model, and model.adapter takes what `convert export --adapter` writes"
        )


def set_trainable(
    chunks: Sequence[ResponseModel], architecture: Architecture, config: Config, *, adapters: ReadTensor | None = None
) -> None:
    """Freeze what the run does not train, and add the adapters that it trains. Call it before the chunks are wrapped.

    Each chunk's response head learns what the objective needs.

    Args:
        adapters: reads the adapters; None: those that the run starts from.

    Raises UserError if `model.adapter` does not fit.
    """
    for chunk in chunks:
        chunk.with_squares = config.objective.use_weighting
        chunk.aligns_tokens = config.objective.aligns_tokens
    if config.lora is None:
        freeze_routers(chunks, config.moe)
    else:
        read = _adapters(config, config.lora, architecture) if adapters is None else adapters
        add_adapters(chunks, architecture, config.lora, read)


def _adapters(config: Config, lora: LoRAConfig, architecture: Architecture) -> ReadTensor:
    """Reads the adapters that a run starts from."""
    if config.model.adapter is None:
        return fresh_adapters(architecture, lora, config.seed)
    return PeftDirectory(config.model.adapter, architecture, lora).read


def build_policy(config: Config, model: ResolvedModel, topology: Topology, max_steps: int) -> Policy:
    """Load the model and make it ready for its first step.

    Raises UserError for damaged weights, or if the model is a checkpoint of adapters.
    """
    check_starts_whole(model.path)
    loaded = load_model(model, topology, chunk_tokens=config.logprob.chunk_tokens)
    set_trainable(loaded, model.architecture, config)
    chunks = wrap_data_parallel(loaded, config.optimizer, config.parallel)
    optimizer = build_optimizer(chunks, config.optimizer)
    for chunk in chunks:
        release_exact_values(chunk)
    watch = RouterWatch(loaded, config.moe) if model.architecture.experts else None
    return Policy(chunks, optimizer, build_scheduler(optimizer, config.optimizer, max_steps), watch)
