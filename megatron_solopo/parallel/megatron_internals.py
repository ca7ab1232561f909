"""Everything that this package touches in Megatron-LM without a promise of Megatron's that it will stay.

Each entry names the versions that it was read in and tested with, the reason, and the file or pull request upstream.
Paths are those of https://github.com/NVIDIA/Megatron-LM. `tests/parallel/test_megatron_internals.py` has a test for
each entry. It fails when the installed Megatron changes what the entry relies on, or no longer needs the entry.
The adaptation of `torch.cuda` to a CPU is in `parallel/cpu.py`.
"""

import importlib
import inspect
import queue
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import megatron.core
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from megatron.core.distributed import DistributedDataParallel
from megatron.core.enums import ModelType
from megatron.core.extensions.transformer_engine import HAVE_TE, TEDotProductAttention
from megatron.core.fp8_utils import get_fp8_recipe
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe import fused_a2a, moe_utils
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.router_replay import RouterReplay, RouterReplayAction
from packaging.version import Version
from torch import Tensor
from torch.distributed.checkpoint import default_planner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_solopo.architecture.pipeline_schedule import receiving_order
from megatron_solopo.cpu_features import is_cpu

# --- the model ---


class OutputOverride:
    """Base class of a GPTModel: another output than logits, and rotary angles by token.

    The last pipeline stage may return something else than logits. Where the packing metadata has `positions`, their
    angles replace the table of angles. Megatron's rotary embedding takes them if the pack is one sequence of as many
    tokens.

    Versions: 0.16 and 0.19. 0.16 has no other place for it than the method `_postprocess`. 0.19 also has the argument
    `output_processor`, but only of `forward`, which a script of Megatron-LM's calls without it.
    Upstream: `megatron/core/models/gpt/gpt_model.py`.
    """

    def overrides(self, packed_seq_params: PackedSeqParams | None) -> bool:
        """Whether `override` applies to this forward pass."""
        raise NotImplementedError

    def override(self, hidden_states: Tensor, packed_seq_params: Any) -> Tensor:
        """Return the model's output from the hidden states [t, 1, H] of the last layer."""
        raise NotImplementedError

    def _preprocess(self, *args: Any, packed_seq_params: PackedSeqParams | None = None, **kwargs: Any) -> Any:
        hidden, angles, *others = super()._preprocess(  # type: ignore[misc]
            *args, packed_seq_params=packed_seq_params, **kwargs
        )
        positions = getattr(packed_seq_params, "positions", None)
        return (hidden, angles if positions is None else angles.index_select(0, positions), *others)

    def _postprocess(
        self: Any, hidden_states: Tensor, *args: Any, packed_seq_params: PackedSeqParams | None = None, **kwargs: Any
    ) -> Tensor:
        if self.post_process and self.overrides(packed_seq_params):
            output: Tensor = self.override(hidden_states, packed_seq_params)
            return output
        plain: Tensor = super()._postprocess(  # type: ignore[misc]
            hidden_states, *args, packed_seq_params=packed_seq_params, **kwargs
        )
        return plain


def add_base_class(module: torch.nn.Module, base: type) -> None:
    """Put `base` before the class of a module that exists already. Parameters and their names stay.

    Versions: all. Megatron-LM and its forks build the model in their own code, of a subclass of their own.
    """
    built = type(module)
    module.__class__ = type(f"{base.__name__}{built.__name__}", (base, built), {})


LOWER_RIGHT_MASK = SimpleNamespace(name="padding_causal_bottom_right")
"""A mask of Transformer Engine: the last query sees all keys, the one before sees one key less.

Versions: 0.16 and 0.19 pass the name on, and have no member of `AttnMaskType` with this one.
Upstream: `megatron/core/extensions/transformer_engine.py`, `megatron/core/transformer/enums.py`.
"""


def computes_lower_right_masks(heads: int, groups: int, head_dim: int) -> bool:
    """Whether Transformer Engine has an attention kernel here for packs under `LOWER_RIGHT_MASK`.

    Its version, those of its kernels, the device and the NVTE_* variables decide. Versions: 2.9 to 2.20. Transformer
    Engine asks itself the same in the first forward pass, and raises there.
    Upstream: `transformer_engine/pytorch/attention/dot_product_attention/utils.py`.

    Args:
        heads: query heads of a tensor-parallel rank.
        groups: its key-value heads.
    """
    try:
        utils = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.utils")
        asked = utils.AttentionParams(
            qkv_layout="thd_thd_thd",
            num_heads=heads,
            num_gqa_groups=groups,
            max_seqlen_q=128,
            max_seqlen_kv=256,
            head_dim_qk=head_dim,
            head_dim_v=head_dim,
            attn_mask_type=LOWER_RIGHT_MASK.name,
        )
    except (ImportError, AttributeError, TypeError):
        return False
    flash, _, fused, _, unfused, *_ = utils.get_attention_backend(asked)
    return bool(flash or fused or unfused)


def is_transformer_engine_attention(module: torch.nn.Module) -> bool:
    """Whether a module is Megatron's wrapper of Transformer Engine's attention, which may be absent."""
    return HAVE_TE and isinstance(module, TEDotProductAttention)


def attention_kernels(attention: torch.nn.Module) -> list[torch.nn.Module]:
    """The parts of a Transformer Engine attention that `attending_to_gathered_keys` sets."""
    return [part for part in attention.modules() if hasattr(part, "attention_type")]


@contextmanager
def attending_to_gathered_keys(attention: Any, kernels: Sequence[Any]) -> Iterator[None]:
    """Within the block, Transformer Engine's attention takes its keys as complete, and as others than its queries.

    Versions: 0.16 and 0.19. They can turn context parallelism off for one pack, but do not turn it on again. Unequal
    numbers of queries and keys are "cross" attention in Transformer Engine, whose own code sets this attribute so.
    Upstream: `TEDotProductAttention.forward` in `megatron/core/extensions/transformer_engine.py`, and
    `transformer_engine/pytorch/attention/dot_product_attention/dot_product_attention.py`.
    """
    group, ranks, stream = attention.cp_group, attention.cp_global_ranks, attention.cp_stream
    attention.set_context_parallel_group(None, None, None, attention.cp_comm_type)
    kinds = [kernel.attention_type for kernel in kernels]
    for kernel in kernels:
        kernel.attention_type = "cross"
    try:
        yield
    finally:
        attention.set_context_parallel_group(group, ranks, stream, attention.cp_comm_type)
        for kernel, kind in zip(kernels, kinds, strict=True):
            kernel.attention_type = kind


def set_rotary_frequencies(model: GPTModel, inv_freq: Tensor) -> None:
    """Replace the frequencies [head_dim / 2] that Megatron has computed, on whatever device they are given.

    Versions: 0.16 and 0.19. Megatron computes the usual frequencies and those of Llama 3.1 in its own way. We want
    transformers' numbers, which exist for every rope type.
    Upstream: `megatron/core/models/common/embeddings/rotary_pos_embedding.py`.
    """
    model.rotary_pos_emb.inv_freq = inv_freq


def dispatcher_settings(kind: Literal["alltoall", "flex"]) -> dict[str, Any]:
    """Return the fields of a TransformerConfig that say how tokens reach the ranks of their experts.

    Versions: 0.16 and 0.19. `moe_enable_deepep` is deprecated in both. 0.19 has more backends of `flex`.
    Upstream: `megatron/core/transformer/transformer_config.py`.
    """
    return {"moe_token_dispatcher_type": kind} | ({"moe_flex_dispatcher_backend": "deepep"} if kind == "flex" else {})


def has_deep_ep() -> bool:
    """Whether Megatron could import DeepEP.

    Versions: 0.16 and 0.19. Upstream: `HAVE_DEEP_EP` of `megatron/core/transformer/moe/fused_a2a.py`.
    """
    return bool(fused_a2a.HAVE_DEEP_EP)


def pipeline_settings(*, interleaved: bool) -> dict[str, Any]:
    """Return the fields of a TransformerConfig under which pipeline stages can exchange packs of different lengths.

    Versions: 0.16 and 0.19. `variable_seq_lengths` needs the all-to-all dispatcher of experts, even in a dense model
    (`megatron/core/transformer/transformer_config.py`). The interleaved schedule on two stages swaps forward and
    backward tensors under the other two values (https://github.com/NVIDIA/Megatron-LM/pull/1495).
    `batch_p2p_sync` waits for the whole device after every message, against a fault that torch mended before 2.6
    (https://github.com/pytorch/pytorch/pull/82450).
    """
    return {
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
        "batch_p2p_sync": False,
    }


Shape = tuple[int, int, int]


class _KnownShapes(P2PCommunicator):  # type: ignore[misc]
    """Messages between pipeline stages that both know the shape of each micro-batch, so that none is sent."""

    def __init__(self, config: ModelParallelConfig, from_previous: Iterator[Shape], from_next: Iterator[Shape]) -> None:
        super().__init__(parallel_state.get_pipeline_model_parallel_group(), config)
        self._from_previous, self._from_next = from_previous, from_next

    def _communicate(
        self, *, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, **receiving: Any
    ) -> tuple[Tensor | None, Tensor | None, Any]:
        # The interleaved schedule frees an output while its message is on the way. Without shapes, nothing has waited
        # until then. A second tensor keeps the memory as long as the message.
        sent = [None if tensor is None else tensor.detach() for tensor in (tensor_send_next, tensor_send_prev)]
        received: tuple[Tensor | None, Tensor | None, Any] = super()._communicate(
            tensor_send_next=sent[0], tensor_send_prev=sent[1], **receiving
        )
        return received

    def _communicate_shapes(
        self, tensor_send_next: Tensor | None, tensor_send_prev: Tensor | None, recv_prev: bool, recv_next: bool
    ) -> tuple[Shape, Shape]:
        nothing = (0, 0, 0)
        return (
            next(self._from_previous) if recv_prev else nothing,
            next(self._from_next) if recv_next else nothing,
        )


def without_shape_messages(config: ModelParallelConfig, shapes: Sequence[Shape]) -> dict[str, Any]:
    """Return the arguments of Megatron's schedules under which pipeline stages send tensors alone.

    Versions: 0.16 and 0.19. With `variable_seq_lengths`, Megatron's communicator sends the shape before every tensor
    and waits for the whole device. It receives in the order of the schedule, so each stage can tell what comes next.
    A communicator is taken only together with the process groups.
    Upstream: `megatron/core/pipeline_parallel/p2p_communication.py` and `schedules.py`.

    Args:
        shapes: of the hidden states [positions of a rank, batch, H] of each micro-batch, in order.
    """
    size = config.pipeline_model_parallel_size
    if size == 1:
        return {}
    rank = parallel_state.get_pipeline_model_parallel_rank()
    chunks = config.virtual_pipeline_model_parallel_size or 1
    arriving = [(shapes[number] for number in numbers) for numbers in receiving_order(rank, size, chunks, len(shapes))]
    groups = ProcessGroupCollection.use_mpu_process_groups(["tp", "pp", "cp", "embd", "pos_embd", "dp_cp"])
    return {"p2p_communicator": _KnownShapes(config, *arriving), "pg_collection": groups}


def allow_router_without_transformer_engine() -> None:
    """Let the router of experts compute without Transformer Engine's matrix product.

    Versions: 0.16, whose router reads a name that exists only beside Transformer Engine. 0.19 has it as None.
    Upstream: `te_general_gemm` in `megatron/core/transformer/moe/moe_utils.py`.
    """
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def allow_replay(router: TopKRouter) -> None:
    """Let `replayed` choose a router's experts.

    Versions: 0.16 and 0.19. Megatron does it for a whole model while it is built, and keeps a list of all of them.
    Upstream: `megatron/core/transformer/moe/router_replay.py`.
    """
    router.router_replay = RouterReplay()
    RouterReplay.global_router_replay_instances.pop()  # nobody commands all routers at once
    router.config.moe_enable_routing_replay = True


@contextmanager
def replayed(router: TopKRouter, experts_tK: Tensor) -> Iterator[None]:
    """Within the block, a router sends its tokens to these experts, int64. Their weights come from its own logits.

    Versions: 0.16 and 0.19. Megatron's own setter keeps the experts for a pass that computes them again.
    Upstream: `megatron/core/transformer/moe/router_replay.py`.
    """
    router.router_replay.target_topk_idx = experts_tK
    router.router_replay.set_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
    try:
        yield
    finally:
        router.router_replay.clear_router_replay_action()
        router.router_replay.clear_indices()


def advance_cache(context: StaticInferenceContext, num_tokens: int) -> None:
    """Tell the key-value cache that `num_tokens` more positions of every sequence are in it.

    Versions: 0.16 and 0.19. Megatron's text generation does the same for its own models.
    Upstream: `megatron/core/inference/contexts/static_context.py`.
    """
    context.sequence_len_offset += num_tokens
    context.enable_decode_mode()


# --- kernels and precisions ---


def has_transformer_engine() -> bool:
    """Whether Megatron could import Transformer Engine.

    Versions: 0.16 and 0.19. Upstream: `HAVE_TE` of `megatron/core/extensions/transformer_engine.py`.
    """
    return bool(HAVE_TE)


def has_fused_weight_gradients() -> bool:
    """Whether the output layer can add its weight gradient to Megatron's gradient buffer in one kernel of Apex's.

    Versions: 0.16 and 0.19. A model with `gradient_accumulation_fusion` cannot be built without the kernel.
    Upstream: `megatron/core/tensor_parallel/layers.py`.
    """
    return not is_cpu() and find_spec("fused_weight_gradient_mlp_cuda") is not None


def fuse_weight_gradients(model: torch.nn.Module) -> None:
    """Let Transformer Engine's linear layers add their weight gradients to `main_grad` themselves.

    Versions: 0.16 and 0.19. These layers do not need Apex, but Megatron has one switch for them and for its own output
    layer, which does (`has_fused_weight_gradients`).
    Upstream: `megatron/core/extensions/transformer_engine.py`.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True  # type: ignore[assignment]


FP8_PARAMETERS_SINCE = Version("0.19")
"""First version that can write FP8 parameters to checkpoints, because it dequantizes them before.

Upstream: `megatron/core/dist_checkpointing/strategies/filesystem_async.py`.
"""


def installed_version() -> Version:
    """Version of megatron-core."""
    return Version(megatron.core.__version__)


def assign(parameter: torch.nn.Parameter, value: Tensor) -> None:
    """Give a parameter its value, cast to the parameter's precision.

    Versions: 0.16 and 0.19. The optimizer makes its master weight of an FP8 parameter from the exact value that
    Transformer Engine kept when it initialized the parameter. So the exact value is replaced too, in bfloat16.
    Upstream: `megatron/core/optimizer/distrib_optimizer.py`, and `get_high_precision_init_val` in Transformer Engine.
    """
    is_fp8 = hasattr(parameter, "get_high_precision_init_val")
    if is_fp8:  # the kernels that quantize a value want it on the device
        value = value.detach().to(parameter.device, torch.bfloat16)
        _fit_scale(parameter, value)
    with torch.no_grad():
        parameter.copy_(value)
    if is_fp8:
        parameter._high_precision_init_val = value.to("cpu", copy=True)  # type: ignore[attr-defined]


def _fit_scale(parameter: torch.nn.Parameter, value: Tensor) -> None:
    """Let an FP8 parameter of the delayed recipe hold a value with the scale that fits it.

    Versions: 0.19. Its scale is 1 until the first update, and weights are small: FP8 would keep two bits of them.
    Upstream: `Float8Quantizer` in Transformer Engine's `pytorch/tensor/float8_tensor.py`.
    """
    scale = getattr(parameter._quantizer, "scale", None)  # type: ignore[attr-defined]
    largest = value.abs().amax().float()
    if scale is not None and 0 < largest < torch.inf:
        scale.fill_(torch.finfo(torch.float8_e4m3fn).max / largest)


def broadcast_parameter(parameter: torch.nn.Parameter, owner: int, group: dist.ProcessGroup) -> None:
    """Give a parameter, on all ranks of a group, the value that `assign` gave it on the one with number `owner`.

    Versions: 0.16 and 0.19. Of an FP8 parameter the exact value is sent, see `assign`.
    """
    if group.size() == 1:
        return
    source, is_owner = dist.get_global_rank(group, owner), group.rank() == owner
    if not hasattr(parameter, "get_high_precision_init_val"):
        dist.broadcast(parameter.detach(), source, group)
        return
    exact = parameter.get_high_precision_init_val() if is_owner else torch.empty(parameter.shape, dtype=torch.bfloat16)
    value = exact.to(parameter.device)
    dist.broadcast(value, source, group)
    if not is_owner:
        assign(parameter, value)


def release_exact_values(model: torch.nn.Module) -> None:
    """Free the host memory of the exact values (see `assign`), once the optimizer is built or there is none."""
    for parameter in model.parameters():
        if hasattr(parameter, "clear_high_precision_init_val"):
            parameter.clear_high_precision_init_val()


@contextmanager
def without_delayed_fp8(config: TransformerConfig) -> Iterator[None]:
    """Let forward passes of a model compute in bfloat16 where the config asks for FP8's delayed recipe.

    Versions: 0.16 and 0.19, with Transformer Engine 2.9 to 2.20. Transformer Engine updates delayed scales only in
    passes with gradients. Without them a new model has scales of 1, and larger values than FP8's largest become that.
    The layers keep their scales meanwhile.
    Upstream: `get_fp8_context` in `megatron/core/fp8_utils.py`, and `autocast_exit` and `set_meta_tensor` in
    Transformer Engine's `pytorch/quantization.py` and `pytorch/module/base.py`.
    """
    fp8 = config.fp8
    if config.fp8_recipe == "delayed":
        config.fp8 = None
    try:
        yield
    finally:
        config.fp8 = fp8


_SCALES = [(side, name) for side in ("scaling_fwd", "scaling_bwd") for name in ("scale", "amax_history")]


def delayed_scales(layer: torch.nn.Module, number: int) -> dict[str, Tensor]:
    """Copy what FP8's delayed recipe keeps of one product of a Transformer Engine layer: scales and largest values.

    Versions: 0.16 and 0.19, with Transformer Engine 2.9 to 2.20. Empty before the layer has computed in FP8.
    Upstream: `get_extra_state` in Transformer Engine's `pytorch/module/base.py`, which makes a pickle of them.

    Args:
        number: of the expert among those that the layer computes; 0 in a layer with one product.
    """
    states: dict[str, Any] = getattr(layer, "fp8_meta", {})
    products = getattr(layer, "num_gemms", 1)
    found = {f"{side}.{name}": getattr(states.get(side), name, None) for side, name in _SCALES}
    return {
        name: _by_product(layer, value.detach(), products)[..., number, :].to("cpu", copy=True)
        for name, value in found.items()
        if value is not None
    }


def _by_product(layer: torch.nn.Module, values: Tensor, products: int) -> Tensor:
    """Divide numbers of a layer by its products: [..., products * tensors] -> [..., products, tensors of a product].

    Versions: input, weight and output of a product lie side by side (Transformer Engine 2.20), or the inputs of all
    products, then all weights, then all outputs. Upstream: `_offsets` in its `pytorch/module/grouped_linear.py`.
    """
    leading = values.shape[:-1]
    if _products_are_apart(layer):
        return values.view(*leading, products, -1)
    return values.view(*leading, -1, products).transpose(-1, -2)


def _products_are_apart(layer: torch.nn.Module) -> bool:
    offsets: dict[str, int] = getattr(layer, "_offsets", {})
    return offsets.get("weight", 1) == 1


def forget_largest_values(model: torch.nn.Module) -> None:
    """Let the next scales of FP8's delayed recipe come from the passes that follow alone.

    Versions: 0.16 and 0.19, with Transformer Engine 2.9 to 2.20.
    """
    for layer in model.modules():
        for side in ("scaling_fwd", "scaling_bwd"):
            history = getattr(getattr(layer, "fp8_meta", {}).get(side), "amax_history", None)
            if history is not None:
                history.zero_()


def load_delayed_scales(layer: Any, config: TransformerConfig, scales: Sequence[dict[str, Tensor]]) -> None:
    """Give a Transformer Engine layer what `delayed_scales` copied of each of its products.

    Versions: 0.16 and 0.19, with Transformer Engine 2.9 to 2.20.
    Upstream: `set_extra_state` in Transformer Engine's `pytorch/module/base.py`.
    """
    recipe = get_fp8_recipe(config)
    # A layer counts its products when it first computes.
    layer.fp8_meta |= {"recipe": recipe, "num_gemms": len(scales)}
    layer.init_fp8_meta_tensors(recipe)
    for name in scales[0]:
        side, _, attribute = name.partition(".")
        values = torch.stack([each[name] for each in scales], dim=-2)
        if not _products_are_apart(layer):
            values = values.transpose(-1, -2)
        getattr(layer.fp8_meta[side], attribute).copy_(values.flatten(-2))


# --- the optimizer and its state ---

STATE_NAMES = ("param", "exp_avg", "exp_avg_sq")
"""Names of a parameter's state in a checkpoint: fp32 master weight, and Adam's two moments.

Versions: 0.16 and 0.19. Upstream: `_get_main_param_and_optimizer_states` in
`megatron/core/optimizer/distrib_optimizer.py`.
"""


def make_optimizer(config: OptimizerConfig, chunks: list[DistributedDataParallel]) -> MegatronOptimizer:
    """Megatron's optimizer, whose ranks learn of the parameter groups of their own model replica alone.

    Versions: 0.16 and 0.19. Megatron gathers the keys of all ranks' groups on every rank, so that all ranks have the
    same groups in the same order. That grows with the square of the number of ranks over all of them. The ranks of one
    replica have all the keys that there are.
    Upstream: `_get_param_groups` in `megatron/core/optimizer/__init__.py`.
    """
    replica, gather = parallel_state.get_model_parallel_group(), dist.all_gather_object

    def gather_in_replica(found: list[Any], own: Any) -> None:
        found[:] = [None] * replica.size()
        gather(found, own, replica)

    with mock.patch.object(dist, "all_gather_object", gather_in_replica):
        return get_megatron_optimizer(config, chunks, use_gloo_process_groups=False)


def gradient_buffers(chunk: DistributedDataParallel) -> list[Any]:
    """Return the buffers that hold this chunk's gradients and, under the distributed optimizer, its parameters.

    Versions: 0.16 and 0.19. Upstream: `megatron/core/distributed/distributed_data_parallel.py`.
    """
    return [*chunk.buffers, *chunk.expert_parallel_buffers]


def record_own_gradients(chunk: DistributedDataParallel) -> None:
    """Let every bucket group keep the sum of its gradients from right before they are reduced, as `own_gradient_sum`.

    Versions: 0.16 and 0.19. With `overlap_grad_reduce` the reduction starts within the backward pass, at moments that
    only the group knows. Upstream: `megatron/core/distributed/param_and_grad_buffer.py`.
    """
    for group in _bucket_groups(chunk):
        group.start_grad_sync = partial(_record_and_start, group, group.start_grad_sync)


def _record_and_start(group: Any, start: Callable[..., None], *arguments: Any, **keywords: Any) -> None:
    group.own_gradient_sum = torch.stack([bucket.grad_data.sum() for bucket in group.buckets]).sum()
    start(*arguments, **keywords)


def own_gradient_sums(chunk: DistributedDataParallel) -> list[Tensor]:
    """Return the sums that `record_own_gradients` has kept since the last reduction, on the device."""
    return [group.own_gradient_sum for group in _bucket_groups(chunk)]


def _bucket_groups(chunk: DistributedDataParallel) -> list[Any]:
    return [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]


def gather_parameters(chunk: DistributedDataParallel) -> None:
    """Gather the parameters that a forward pass with `overlap_param_gather` would gather, unless it has done so.

    Versions: 0.16 and 0.19. Megatron's `start_param_sync(force_sync=True)` gathers also what is there already, and in
    0.16 it leaves the transposes of FP8 parameters as they were.
    Upstream: `megatron/core/distributed/distributed_data_parallel.py`.
    """
    if chunk.ddp_config.overlap_param_gather:
        for group in reversed(_bucket_groups(chunk)):  # the order of the forward pass
            group.finish_param_sync(skip_next_bucket_dispatch=True)


def begin_gathering_ahead(chunk: DistributedDataParallel) -> None:
    """With `align_param_gather`, begin to gather the parameters that the forward pass will wait for.

    Versions: 0.16 and 0.19. Only the interleaved schedule does so. Upstream: `megatron/core/pipeline_parallel/`.
    """
    if chunk.ddp_config.align_param_gather:
        for group in reversed(_bucket_groups(chunk)):
            if not group.param_gather_dispatched:
                group.start_param_sync()


def run_forward_pre_hooks(module: torch.nn.Module) -> None:
    """Run what a module's call would run before its `forward`. Call this before reading its weight without a call.

    Versions: 0.16 and 0.19. With `overlap_param_gather`, such a hook waits until the module's parameters are gathered.
    Upstream: `megatron/core/distributed/distributed_data_parallel.py`.
    """
    for hook in module._forward_pre_hooks.values():
        hook(module, ())


def is_expert(parameter: Tensor) -> bool:
    """Whether a parameter belongs to an expert that not all ranks of its pipeline stage hold.

    Versions: 0.16 and 0.19. With `expert_model_parallel_size` of 1, experts count as dense.
    Upstream: `megatron/core/tensor_parallel/layers.py`.
    """
    return not getattr(parameter, "allreduce", True)


def replica_group(parameter: Tensor) -> dist.ProcessGroup:
    """The ranks that hold the same numbers of a parameter, this one among them."""
    group: dist.ProcessGroup = (
        parallel_state.get_expert_data_parallel_group()
        if is_expert(parameter)
        else parallel_state.get_data_parallel_group(with_context_parallel=True)
    )
    return group


def optimizer_parts(optimizer: MegatronOptimizer) -> Sequence[Any]:
    """Return the optimizers that Megatron has chained, or the one that it has not: for dense parameters, then experts.

    Versions: 0.16 and 0.19. Which of the two Megatron returns depends on the model and on its settings.
    Upstream: `get_megatron_optimizer` in `megatron/core/optimizer/__init__.py`.
    """
    parts: Sequence[Any] = getattr(optimizer, "chained_optimizers", [optimizer])
    return parts


@dataclass(frozen=True)
class OwnedState:
    """The state of the part of a parameter that this rank updates."""

    parameter: Tensor
    """The whole parameter of the model."""
    start: int
    """First element of the part in the flattened parameter."""
    tensors: dict[str, Tensor]
    """By `STATE_NAMES`, [elements] each: the optimizer's own tensors, which may be changed in place."""

    @property
    def edges(self) -> tuple[int, int]:
        """The part's first element in the flattened parameter, and the one behind its last."""
        return self.start, self.start + len(self.tensors[STATE_NAMES[0]])


def owned_states(optimizer: DistributedOptimizer) -> Iterator[OwnedState]:
    """Yield the state of every parameter that this rank updates at least in part.

    Versions: 0.16 and 0.19. Of this rank's share of a buffer, `gbuf_ranges` says which elements of which parameter it
    holds. Megatron's own `fully_reshardable` gathers the shares of all data-parallel ranks on one of them. That takes
    30 bytes per parameter of host memory there, and puts the state behind a bucket's padding in the wrong place
    (https://github.com/NVIDIA/Megatron-LM/pull/5077).
    Upstream: `_get_main_param_and_optimizer_states` in `megatron/core/optimizer/distrib_optimizer.py`.
    """
    buckets = (bucket for ranges in optimizer.gbuf_ranges for of_dtype in ranges.values() for bucket in of_dtype)
    for bucket in buckets:
        for parameter, ranges in bucket["param_map"].items():
            state = optimizer._get_main_param_and_optimizer_states(parameter)
            tensors = {name: state[name].detach().view(-1) for name in STATE_NAMES}
            yield OwnedState(parameter, ranges["param"].start, tensors)


def initialize_adam_state(optimizer: MegatronOptimizer) -> None:
    """Make the state that Adam makes at its first step, so that a checkpoint can be loaded into it.

    Versions: 0.16 and 0.19. Megatron's `init_state_fn` leaves out `step`, without which torch's Adam cannot be loaded.
    The hybrid optimizer has no `init_state_fn`. Its `dummy_step` changes the parameters, which must be loaded after it.
    Upstream: `megatron/core/optimizer/__init__.py`, `megatron/core/optimizer/cpu_offloading/hybrid_optimizer.py`.
    """
    for part in optimizer_parts(optimizer):
        if isinstance(part.optimizer, HybridDeviceOptimizer):
            part.optimizer.dummy_step()
            continue
        part.init_state_fn(part.optimizer, part.config)
        # The Adam of Transformer Engine and that of Apex count steps per group and have no such state.
        if isinstance(part.optimizer, torch.optim.Optimizer) and type(part.optimizer).__module__.startswith("torch."):
            for state in part.optimizer.state.values():
                state.setdefault("step", torch.tensor(0.0))


def load_counts(optimizer: DistributedOptimizer, state: dict[str, Any]) -> None:
    """Load the groups and the count of steps; afterwards the tensors of `owned_states` wait to be overwritten.

    Versions: 0.16 and 0.19. Megatron gives all parameters of torch's Adam the same tensor as `step`, which would
    advance once per parameter. torch casts the state of the hybrid optimizer to the precision of the weights.
    Upstream: `megatron/core/optimizer/distrib_optimizer.py`.
    """
    optimizer.load_state_dict(state)
    inner = optimizer.optimizer
    for held in inner.state.values():
        if "step" in held:
            held["step"] = held["step"].clone()
        if isinstance(inner, HybridDeviceOptimizer):
            tensors = {name: each for name, each in held.items() if name != "step"}
            held.update(
                {name: torch.empty_like(each, dtype=torch.float32, device="cpu") for name, each in tensors.items()}
            )


def hand_out_state(optimizer: DistributedOptimizer) -> None:
    """After the tensors of `owned_states` were loaded: let the optimizers inside the hybrid optimizer have them.

    Versions: 0.16 and 0.19. The hybrid optimizer copies its groups over those of the optimizers in it, which count for
    themselves. So its own groups must not hold `step`.
    Upstream: `megatron/core/optimizer/cpu_offloading/hybrid_optimizer.py`.
    """
    inner = optimizer.optimizer
    if isinstance(inner, HybridDeviceOptimizer):
        inner._sync_hdo_state_to_sub_optimizers()
        for group in inner.param_groups:
            group.pop("step", None)


# --- writing checkpoints ---


class ShardedFiles:
    """The files that one rank writes of a sharded state. Megatron plans them; the caller decides who writes when.

    Versions: 0.16 and 0.19. Megatron's own writer starts processes for it (0.16 by fork, 0.19 in a daemon). Our
    process runs threads of CUDA and of the process groups, which must not be forked. Its results go through a further
    process, which outlives a rank that was killed. So the plan is taken before Megatron makes functions of it, and its
    results go through a queue of this process.
    Upstream: `megatron/core/dist_checkpointing/strategies/` (`torch.py`, `filesystem_async.py`).
    """

    def __init__(
        self, state: dict[str, Any], folder: Path, content_metadata: dict[str, Any], plans: "SavePlans"
    ) -> None:
        """Plan, on all ranks together; writes nothing but, with megatron-core 0.16, rank 0's `common.pt`.

        Args:
            plans: of the save before, if all ranks write the same pieces again; of no save otherwise.
        """
        filesystem_async._results_queue = queue.Queue()  # Megatron would start a process that holds a queue
        options: dict[str, Any] = {}
        if "async_strategy" in inspect.signature(dist_checkpointing.save).parameters:  # 0.19
            options["async_strategy"] = "mcore"
        # Megatron's check would gather the description of all ranks' pieces on every rank. torch checks on rank 0 that
        # the pieces of every tensor cover it and do not overlap.
        with _check_by_layer():
            dist_checkpointing.save(
                state,
                str(folder),
                plans,
                validate_access_integrity=False,
                async_sharded_save=True,
                content_metadata=content_metadata,
                **options,
            )
        self._writer, self._metadata = plans.writer, plans.metadata
        plans.keep(state)

    @property
    def names(self) -> list[str]:
        """Names of the files that this rank writes."""
        return [name for _, name, _ in self._writer.write_buckets]

    def stage(self) -> None:
        """Bring to host memory the tensors that are not there."""
        for _, _, (_, tensors) in self._writer.write_buckets:
            tensors[:] = [(item, tensor.to("cpu")) for item, tensor in tensors]

    def write(self, number: int) -> list[Any]:
        """Write file `number` of `names` to the disk. Returns what `finish` needs; raises what the file system raises.

        Files may be written by several threads at once.
        """
        transforms = [self._writer.transforms] if hasattr(self._writer, "transforms") else []  # newer torch
        results, running = queue.Queue[Any](), queue.Queue[int]()
        running.put(number)
        filesystem_async.FileSystemWriterAsync.write_preloaded_data(
            transforms, number, self._writer.write_buckets[number], results, running, use_fsync=True
        )
        _, found = results.get()
        if isinstance(found, Exception):
            raise found
        written: list[Any] = found
        return written

    def release(self) -> None:
        """Free the tensors that `stage` has brought."""
        self._writer.write_buckets = []

    def finish(self, results: list[Any]) -> None:
        """On rank 0: write the list of pieces. `results` has one entry per rank, all that its `write` returned."""
        self._writer.finish(self._metadata, results)


class SavePlans(TorchDistSaveShardedStrategy):  # type: ignore[misc]
    """What the ranks have planned for a save. The next save takes it over, if no rank writes other pieces.

    A plan holds no values. Rank 0 gathers the plans of all ranks, checks them, and makes the list of all pieces.
    Versions: 0.16 and 0.19. Megatron takes a plan over from the third save on, and never looks whether pieces have
    changed. The list of pieces would hold the plans of all ranks, too. Megatron uses them only to take over the plan of
    a checkpoint that it has loaded, and does without them where they are absent.
    Upstream: `megatron/core/dist_checkpointing/strategies/` (`torch.py`, `state_dict_saver.py`).
    """

    writer: Any
    metadata: Any

    def __init__(self, files_per_rank: int) -> None:
        super().__init__("torch_dist", 1, thread_count=files_per_rank, cached_metadata=True)
        self._pieces: list[tuple[Any, ...]] | None = None

    def are_of(self, state: dict[str, Any]) -> bool:
        """Whether this rank's part of the plans is for the pieces of `state`."""
        return self._pieces == _pieces(state)

    def forget(self) -> None:
        """The next save plans anew. All ranks must forget, if one must."""
        self._pieces = None
        self.cached_central_plan = self.cached_local_plan = self.cached_global_metadata = None
        self.validated_cache_reuse = False

    def keep(self, state: dict[str, Any]) -> None:
        """The plans are those of `state`; the next save takes them over."""
        self._pieces = _pieces(state)
        self.cached_global_metadata, self.validated_cache_reuse = self.metadata, True

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *strategy: Any) -> Any:
        # Megatron would turn the plan into functions to call later.
        self.writer, self.metadata = writer, planned[1]
        if self.metadata is not None:  # rank 0
            vars(self.metadata).pop("all_local_plans", None)
        return super()._get_save_and_finalize_callbacks(writer, planned, *strategy)


@contextmanager
def _check_by_layer() -> Iterator[None]:
    """Within the block, torch checks the pieces of each layer for themselves.

    Versions: torch 2.6 to 2.13. Megatron stores the tensors of all layers as one, with an axis of layers. Before pull
    request 166820 of November 2025, torch compares every piece of a tensor with every other one. Since then it compares
    those that meet along the longest axis, and pieces of all layers do: 26 million times for 58,676 pieces.
    Upstream: `torch/distributed/checkpoint/default_planner.py`.
    """
    check = default_planner._validate_global_plan
    with mock.patch.object(default_planner, "_validate_global_plan", lambda plan, found: check(plan, by_layer(found))):
        yield


def by_layer(metadata: Metadata) -> Metadata:
    """Describe each layer of a stacked tensor as a tensor, if every layer has pieces and every piece is of one layer.

    The pieces cover a stacked tensor and do not overlap if and only if those of each layer do so.
    """
    found: dict[str, Any] = {}
    for key, entry in metadata.state_dict_metadata.items():
        found |= _layers(key, entry) if isinstance(entry, TensorStorageMetadata) else {key: entry}
    return Metadata(found)


def _layers(key: str, entry: TensorStorageMetadata) -> dict[str, TensorStorageMetadata]:
    layers: dict[int, list[ChunkStorageMetadata]] = defaultdict(list)
    if len(entry.size) > 1 and all(chunk.sizes[0] == 1 for chunk in entry.chunks):
        for chunk in entry.chunks:
            layers[chunk.offsets[0]].append(ChunkStorageMetadata(chunk.offsets[1:], chunk.sizes[1:]))
    if not layers or layers.keys() != set(range(entry.size[0])):
        return {key: entry}
    size = entry.size[1:]
    return {
        f"{key}[{number}]": TensorStorageMetadata(entry.properties, size, chunks) for number, chunks in layers.items()
    }


def _pieces(state: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Everything of a sharded state that a plan depends on, in its order."""
    apply_factories(state)
    return [
        (each.key, each.global_shape, each.global_offset, each.replica_id)
        + ((each.local_shape, each.dtype) if isinstance(each, ShardedTensor) else ())
        for each in nested_values(state)
        if isinstance(each, ShardedTensor | ShardedObject)
    ]


# --- one rank without memory and without the other ranks ---


@contextmanager
def simulated_rank(rank: int, world_size: int, store: Any = None) -> Iterator[None]:
    """Within the block, this process is one of `world_size` ranks of which no other exists.

    Collectives return at once and move nothing. Only the caller may read from the `store`, where one is given.
    Versions: 0.16 and 0.19. Megatron makes some of its groups on gloo by name, which waits for the other ranks. The
    fake backend is torch's own, made for its tests (`torch/testing/_internal/distributed/fake_pg.py`).
    Upstream: `megatron/core/parallel_state.py`.
    """
    assert not dist.is_initialized()
    new_group = dist.new_group

    def without_gloo(*args: Any, **kwargs: Any) -> Any:
        return new_group(*args, **kwargs | {"backend": None})

    dist.init_process_group("fake", rank=rank, world_size=world_size, store=store or FakeStore())
    try:
        with mock.patch.object(dist, "new_group", without_gloo):
            yield
    finally:
        dist.destroy_process_group()


@contextmanager
def megatron_on_meta() -> Iterator[None]:
    """Within the block, tensors are made without memory, also where Megatron asks for the current CUDA device.

    Versions: 0.16 and 0.19. The distributed optimizer asserts the name of a gradient's type. The response rows stay
    real tensors, because the number of rows is read from them. Megatron keeps the scale of the router's losses in a
    class; the block has one of its own, because it cannot be copied to a real tensor.
    Upstream: `megatron/core/optimizer/clip_grads.py`, `megatron/core/transformer/moe/moe_utils.py`.
    """
    meta = torch.device("meta")
    select, tensor_type = Tensor.index_select, Tensor.type

    def select_on_meta(self: Tensor, dim: int, index: Tensor) -> Tensor:
        return select(self, dim, index.to(self.device))

    def type_as_on_cuda(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        result = tensor_type(self, *args, **kwargs)
        return f"torch.cuda.{result.rpartition('.')[2]}" if isinstance(result, str) else result

    with (
        mock.patch.object(torch.cuda, "current_device", lambda: meta),
        mock.patch.object(Tensor, "index_select", select_on_meta),
        mock.patch.object(Tensor, "type", type_as_on_cuda),
        mock.patch.object(moe_utils.MoEAuxLossAutoScaler, "main_loss_backward_scale", None),
        meta,
    ):
        yield


# --- megatron.training (its wheel is part of megatron-core since 0.19) ---


def call_pretrain(
    pretrain: Callable[..., Any],
    *,
    datasets: Callable[..., Any],
    model_provider: Callable[..., Any],
    forward_step: Callable[..., Any],
    add_arguments: Callable[..., Any],
    keywords: dict[str, Any],
) -> None:
    """Call Megatron-LM's `pretrain`, or one of the same form, in the form that its signature shows.

    Versions: up to 0.16 it parses the arguments itself; since 0.19 it takes a container of them first.
    Upstream: `megatron/training/training.py`.
    """
    model_type = ModelType.encoder_or_decoder
    if "cfg_container" not in inspect.signature(pretrain).parameters:
        pretrain(datasets, model_provider, model_type, forward_step, extra_args_provider=add_arguments, **keywords)
        return
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    args = parse_and_validate_args(add_arguments, args_defaults=keywords.pop("args_defaults", {}))
    container = pretrain_cfg_container_from_args(args)
    pretrain(container, datasets, model_type, forward_step, model_provider=model_provider, **keywords)


def count_sequence_lengths(lengths_B: Tensor) -> None:
    """Tell Megatron-LM's throughput the real lengths [B] of a pack's blocks.

    It takes responses behind one prompt for one sequence, and so counts a little too much attention.
    Versions: since 0.19. Earlier ones assume that every sequence has the length of `--seq-length`.
    Upstream: `megatron/training/training.py`.
    """
    from megatron.training import training

    count = getattr(training, "update_seqlen_stats_from_cu_seqlens", None)
    if count is not None:
        count(torch.nn.functional.pad(lengths_B.cumsum(0), (1, 0)))
