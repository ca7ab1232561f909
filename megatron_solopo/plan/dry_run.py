"""The dry run: it builds ranks of a layout without memory, and compares their bytes with the plan.

A fake process group of the full size gives each rank its place. Model, gradient buffers and optimizer are those of
Megatron-Core on the meta device, so their sizes are exact. Megatron's schedule then runs the heaviest pack forward and
backward, and a meter counts what autograd keeps alive. The layers are plain PyTorch. A replacement for attention's
kernel has the inputs, outputs and saved tensors of flash attention. Every expert gets as many tokens. Gradients are
not reduced.

The functions that count bytes also count those of a model that really trains; tests use them so.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megatron_solopo.architecture.huggingface_config import Architecture
from megatron_solopo.architecture.layout import data_parallel_overlap
from megatron_solopo.architecture.pipeline_schedule import packs_at_peak
from megatron_solopo.checkpoint.adapter_mapping import adapter_shapes
from megatron_solopo.checkpoint.mapping import ReadTensor
from megatron_solopo.config import Config, LoRAConfig
from megatron_solopo.data.packing import SourceRows, TokenizedTriplet, build_mixed_pack
from megatron_solopo.model.attention import PackedAttention
from megatron_solopo.model.build import build_model
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.model.microbatch import Microbatch, shard_pack
from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.parallel import topology
from megatron_solopo.parallel.balanced_experts import balance_experts
from megatron_solopo.parallel.megatron_internals import (
    gradient_buffers,
    megatron_on_meta,
    optimizer_parts,
    set_rotary_frequencies,
    simulated_rank,
)
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.plan.layouts import DistinctRank, Layout, distinct_ranks, replace_settings, without_gpu
from megatron_solopo.plan.memory import RankCheck, peak_activations, rank_state
from megatron_solopo.plan.workload import PackShape
from megatron_solopo.train.policy import build_optimizer, set_trainable, wrap_data_parallel
from megatron_solopo.train.step import run_microbatches

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer

_META = torch.device("meta")
_SEED = 1


def dry_run(architecture: Architecture, layout: Layout, pack: PackShape, num_packs: int) -> list[RankCheck]:
    """Build one rank of each kind in a layout, and run a step's packs through it.

    Args:
        pack: the shape of all packs.
        num_packs: number of packs in the step of a data-parallel rank.

    Raises RuntimeError or AssertionError of Megatron-Core if it cannot run the layout.
    """
    parallel = layout.config.parallel
    ranks = layout.data_parallel_size * parallel.context_parallel_size
    overlap = data_parallel_overlap(parallel, layout.config.optimizer, ranks, on_gpu=True).grad_reduce
    config = replace_settings(
        without_gpu(layout.config),
        # No parameter is gathered without memory. On a GPU, the reduction's overlap decides the buffers' padding.
        parallel={"overlap_grad_reduce": overlap, "overlap_param_gather": False},
    )
    on_cpu = replace(layout, config=config)
    sizes = config.parallel.pipeline_model_parallel_size, config.parallel.virtual_pipeline_model_parallel_size or 1
    num_packs = min(num_packs, packs_at_peak(*sizes))
    return [_check_rank(architecture, on_cpu, rank, pack, num_packs) for rank in distinct_ranks(layout)]


def _check_rank(
    architecture: Architecture, layout: Layout, rank: DistinctRank, pack: PackShape, num_packs: int
) -> RankCheck:
    started = time.monotonic()
    config = layout.config
    with _fake_process_groups(config, rank.rank, layout.gpus) as groups:
        microbatch = _build_microbatch(config, pack, groups)
        with megatron_on_meta():
            chunks = _build_chunks(architecture, config)
            adapters = None if config.lora is None else _without_numbers(architecture, config.lora)
            set_trainable(chunks, architecture, config, adapters=adapters)
            wrapped = wrap_data_parallel(chunks, config.optimizer, config.parallel)
            optimizer = build_optimizer(wrapped, config.optimizer)
            _initialize_moments(optimizer)
            built = {
                "parameters": parameter_bytes(wrapped),
                "gradients": gradient_bytes(wrapped),
                "optimizer": optimizer_state_bytes(optimizer, wrapped),
            }
            saved = _run_schedule(wrapped, chunks, microbatch, num_packs) if rank.runs_schedule else None
        pipeline_rank, stage_rank = groups.pipeline_group.rank(), groups.stage_rank
    state = rank_state(architecture, config, pipeline_rank, layout.data_parallel_size, stage_rank)
    peak = peak_activations(architecture, config, pipeline_rank, [pack] * num_packs, local=True)
    return RankCheck(
        rank=rank.rank,
        place=rank.place,
        num_parameters=sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters()),
        built=built,
        estimated={name: getattr(state, name) for name in built},
        saved_bytes=saved,
        estimated_saved_bytes=None if saved is None else peak.total,
        seconds=time.monotonic() - started,
    )


class SavedTensorMeter:
    """Counts the bytes that tensors saved for backward keep alive: now, and at most so far.

    A storage that several tensors share counts once. Parameters do not count.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = {parameter.untyped_storage()._cdata for parameter in parameters}
        self._holders: dict[int, int] = {}
        self.now = self.most = 0

    @contextmanager
    def counting(self) -> Iterator["SavedTensorMeter"]:
        """Count what the body saves, until its last use."""
        with torch.autograd.graph.saved_tensors_hooks(lambda new: _SavedTensor(new, self), lambda kept: kept.tensor):
            yield self

    def add(self, tensor: Tensor) -> None:
        """Count one more holder of a tensor's storage."""
        key = tensor.untyped_storage()._cdata
        if key in self._parameters:
            return
        self._holders[key] = self._holders.get(key, 0) + 1
        if self._holders[key] == 1:
            self.now += tensor.untyped_storage().nbytes()
            self.most = max(self.most, self.now)

    def remove(self, tensor: Tensor) -> None:
        """Count one holder less."""
        key = tensor.untyped_storage()._cdata
        if key in self._parameters:
            return
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.now -= tensor.untyped_storage().nbytes()


class _SavedTensor:
    """A saved tensor. Autograd drops it when its graph is done."""

    def __init__(self, tensor: Tensor, meter: SavedTensorMeter) -> None:
        self.tensor, self.meter = tensor, meter
        meter.add(tensor)

    def __del__(self) -> None:
        self.meter.remove(self.tensor)


def parameter_bytes(chunks: Sequence["DistributedDataParallel"]) -> int:
    """Bytes of the parameters. Under the distributed optimizer, those that learn lie in Megatron's padded buffers."""
    frozen = (each for chunk in chunks for each in chunk.parameters() if not each.requires_grad)
    total = _total_bytes(frozen)
    for buffer in (buffer for chunk in chunks for buffer in gradient_buffers(chunk)):
        total += _total_bytes(buffer.params if buffer.param_data is None else [buffer.param_data])
    return total


def gradient_bytes(chunks: Sequence["DistributedDataParallel"]) -> int:
    """Bytes of the gradient buffers with padding."""
    return _total_bytes(buffer.grad_data for chunk in chunks for buffer in gradient_buffers(chunk))


def optimizer_state_bytes(optimizer: "MegatronOptimizer", chunks: Sequence["DistributedDataParallel"]) -> int:
    """Bytes of the moments, and of fp32 weights that are not the model's own. Counters of steps do not count."""
    models = {tensor.untyped_storage()._cdata for chunk in chunks for tensor in chunk.parameters()}
    total = 0
    for part in optimizer_parts(optimizer):
        for weight in (weight for group in part.optimizer.param_groups for weight in group["params"]):
            moments = [value for value in part.optimizer.state[weight].values() if torch.is_tensor(value)]
            tensors = [tensor for tensor in (weight, *moments) if tensor.dim() > 0]
            total += _total_bytes(tensor for tensor in tensors if tensor.untyped_storage()._cdata not in models)
    return total


def _total_bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _initialize_moments(optimizer: "MegatronOptimizer") -> None:
    """Make Adam's moments, as a first step would."""
    for part in optimizer_parts(optimizer):
        if part.init_state_fn is not None:
            part.init_state_fn(part.optimizer, part.config)


@contextmanager
def _fake_process_groups(config: Config, rank: int, size: int) -> Iterator[Topology]:
    """Process groups of one rank while the others do not exist. Collectives return at once and move nothing."""
    with simulated_rank(rank, size):
        groups = topology.initialize(config.parallel, _SEED)
        try:
            yield groups
        finally:
            topology.destroy(groups)


def _build_chunks(architecture: Architecture, config: Config) -> list[ResponseModel]:
    """This rank's model chunks. Their attention computes nothing, and their experts get as many tokens each."""
    model = resolve_model(config.model, config.parallel, architecture=architecture)
    chunks = build_model(model, chunk_tokens=config.logprob.chunk_tokens, device=_META)
    for chunk in chunks:
        chunk.config.batch_p2p_comm = False
        balance_experts(chunk)
        set_rotary_frequencies(chunk, chunk.rotary_pos_emb.inv_freq.to(_META))
        for module in chunk.modules():
            if isinstance(module, PackedAttention):
                module.__class__ = _AttentionWithoutKernel
    return chunks


def _without_numbers(architecture: Architecture, lora: LoRAConfig) -> ReadTensor:
    """Reads adapters that have shapes alone."""
    shapes = adapter_shapes(architecture, lora)
    return lambda name, index: torch.empty(shapes[name], device=_META)[index]


class _AttentionWithoutKernel(PackedAttention):
    """The attention module with a kernel that computes nothing."""

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: dict[str, Any]) -> Tensor:
        output: Tensor = _FlashAttentionShapes.apply(query, key, value)  # type: ignore[no-untyped-call]
        return output


class _FlashAttentionShapes(torch.autograd.Function):
    """Takes, returns and saves the tensors of flash attention, and computes nothing.

    It saves queries, keys, values, the output, and one number per row and head.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:2], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _build_microbatch(config: Config, pack: PackShape, groups: Topology) -> Microbatch:
    """This rank's shard of a pack of the given shape. Its tokens have no content."""
    rows = [
        TokenizedTriplet(
            id=str(number),
            index=number,
            prompts={context: np.ones(lengths[context], np.int64) for context in ("short", "long")},
            responses={answer: np.ones(lengths[answer], np.int64) for answer in ("chosen", "rejected")},
        )
        for number, lengths in enumerate(pack.triplets)
    ]
    multiples = groups.sequence_multiple, groups.pack_multiple(config.model)
    parts = [
        SourceRows(number, roles, [row for _, row in own])
        for number, (roles, own) in enumerate(groupby(zip(pack.roles, rows, strict=True), key=itemgetter(0)))
    ]
    built = build_mixed_pack(parts, *multiples, share_prompts=config.data.share_prompts)
    whole = shard_pack(built, groups, aligns_tokens=config.objective.aligns_tokens)
    assert whole.packing.segments is not None
    packing = replace(whole.packing, segments=whole.packing.segments.moved(lambda tensor: tensor.to(_META)))
    if packing.alignment is not None:
        packing = replace(packing, alignment=packing.alignment.to(_META))
    return replace(whole, tokens_1t=whole.tokens_1t.to(_META), packing=packing)


def _run_schedule(
    wrapped: Sequence[torch.nn.Module], chunks: Sequence[ResponseModel], microbatch: Microbatch, num_packs: int
) -> int:
    """Run Megatron's schedule over the packs. Returns the most bytes that autograd kept alive."""
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = None  # there is nothing to reduce without memory

    def loss(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = torch.ones((), dtype=torch.int, device="cpu")
        return output.sum(), count, output.detach().sum()

    meter = SavedTensorMeter(parameter for chunk in chunks for parameter in chunk.parameters())
    with meter.counting():
        run_microbatches(
            wrapped,
            [microbatch] * num_packs,
            [microbatch.tokens_1t.shape[1]] * num_packs,
            lambda _: loss,
            forward_only=False,
        )
    return meter.most
