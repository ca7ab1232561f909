"""What autograd keeps alive, counted as it happens.

Bytes that the trained model holds from its first step on: the figures that a plan must meet.

Builds ranks of a layout as they would be on the cluster, in no memory: the proof of a plan.

A fake process group of the full world size gives each rank its place; model, gradient buffers and optimizer are
Megatron-Core's own on the meta device, so their sizes are exact. Megatron's schedule then runs the heaviest packs,
forward and backward, while what autograd keeps alive is counted. Layers are the plain PyTorch ones; attention's kernel
is replaced by one that has the inputs, outputs and saved tensors of flash attention. Gradients are not reduced.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from megatron_solopo.architecture.huggingface_config import Architecture
from megatron_solopo.config import Config
from megatron_solopo.data.packing import TokenizedTriplet, build_pack
from megatron_solopo.model.build import build_model
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.model.layers import PackedAttention
from megatron_solopo.model.microbatch import Microbatch, shard_pack
from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.parallel import topology
from megatron_solopo.parallel.megatron_internals import (
    gradient_buffers,
    megatron_on_meta,
    optimizer_parts,
    set_rotary_frequencies,
    simulated_rank,
)
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.plan.layouts import DistinctRank, Layout, Proof, distinct_ranks, with_keys
from megatron_solopo.plan.memory import alive_bytes, rank_state
from megatron_solopo.plan.workload import PackShape
from megatron_solopo.train.policy import build_optimizer, wrap_data_parallel
from megatron_solopo.train.step import run_microbatches

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallel
    from megatron.core.optimizer import MegatronOptimizer


class SavedMeter:
    """Bytes of the storages that tensors saved for backward keep alive: now, and at most so far.

    A storage that several tensors share counts once, parameters' do not count.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self._parameters = {parameter.untyped_storage()._cdata for parameter in parameters}
        self._holders: dict[int, int] = {}
        self.now = self.most = 0

    @contextmanager
    def counting(self) -> Iterator["SavedMeter"]:
        """Count what is saved in the body, until its last use."""
        with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda kept: kept.tensor):
            yield self

    def _keep(self, tensor: Tensor) -> "_Kept":
        return _Kept(tensor, self)

    def add(self, tensor: Tensor) -> None:
        """One more holder of a tensor's storage."""
        key = tensor.untyped_storage()._cdata
        if key in self._parameters:
            return
        self._holders[key] = self._holders.get(key, 0) + 1
        if self._holders[key] == 1:
            self.now += tensor.untyped_storage().nbytes()
            self.most = max(self.most, self.now)

    def remove(self, tensor: Tensor) -> None:
        """One holder less."""
        key = tensor.untyped_storage()._cdata
        if key in self._parameters:
            return
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.now -= tensor.untyped_storage().nbytes()


class _Kept:
    """A saved tensor; autograd drops it when its graph is done."""

    def __init__(self, tensor: Tensor, meter: SavedMeter) -> None:
        self.tensor, self.meter = tensor, meter
        meter.add(tensor)

    def __del__(self) -> None:
        self.meter.remove(self.tensor)


def parameter_bytes(chunks: Sequence["DistributedDataParallel"]) -> int:
    """Parameters; under the distributed optimizer in Megatron's padded buffers."""
    total = 0
    for buffer in (buffer for chunk in chunks for buffer in gradient_buffers(chunk)):
        tensors = buffer.params if buffer.param_data is None else [buffer.param_data]
        total += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return total


def gradient_bytes(chunks: Sequence["DistributedDataParallel"]) -> int:
    """Gradient buffers, padding included."""
    buffers = [buffer.grad_data for chunk in chunks for buffer in gradient_buffers(chunk)]
    return sum(tensor.numel() * tensor.element_size() for tensor in buffers)


def initialize_moments(optimizer: "MegatronOptimizer") -> None:
    """Make Adam's moments, which a first step would make."""
    for part in optimizer_parts(optimizer):
        if part.init_state_fn is not None:
            part.init_state_fn(part.optimizer, part.config)


def optimizer_state_bytes(optimizer: "MegatronOptimizer", chunks: Sequence["DistributedDataParallel"]) -> int:
    """Moments and, where they are not the model's own, fp32 weights; counters of steps do not count."""
    models = {tensor.untyped_storage()._cdata for chunk in chunks for tensor in chunk.parameters()}
    total = 0
    for part in optimizer_parts(optimizer):
        for weight in (weight for group in part.optimizer.param_groups for weight in group["params"]):
            moments = [value for value in part.optimizer.state[weight].values() if torch.is_tensor(value)]
            tensors = [tensor for tensor in (weight, *moments) if tensor.dim() > 0]
            total += sum(t.numel() * t.element_size() for t in tensors if t.untyped_storage()._cdata not in models)
    return total


_META = torch.device("meta")
_SEED = 1
_CONTEXTS = ("short", "long")


def dry_run(architecture: Architecture, layout: Layout, pack: PackShape, num_packs: int) -> list[Proof]:
    """Build every rank of a layout that differs from the others, and run a step's packs through it.

    Args:
        pack: the shape that all packs are given; `num_packs` of them make the step.

    Raises RuntimeError or AssertionError of Megatron-Core's where it cannot run the layout.
    """
    # FP8, Transformer Engine and state in host memory need a GPU; they change no parameter.
    config = with_keys(
        layout.config,
        model={"fp8": None, "fp8_param": False, "first_last_layers_bf16": False, "implementation": "local"},
        optimizer={"optimizer_offload_fraction": 0.0},
        parallel={"cpu_offloading_num_layers": 0},
    )
    legal = replace(layout, config=config)
    # The schedule fills the pipeline in its first round (the interleaved one in its second), then repeats itself.
    rounds = 1 if config.parallel.virtual_pipeline_model_parallel_size is None else 2
    rounds = min(num_packs, rounds * config.parallel.pipeline_model_parallel_size)
    return [_prove(architecture, legal, rank, pack, rounds) for rank in distinct_ranks(layout)]


def _prove(architecture: Architecture, layout: Layout, rank: DistinctRank, pack: PackShape, num_packs: int) -> Proof:
    started = time.monotonic()
    config = layout.config
    size = layout.data_parallel_size * config.parallel.model_parallel_size
    with _place(config, rank.rank, size) as groups:
        microbatch = _microbatch(config, pack, groups)
        with megatron_on_meta():
            chunks = _chunks(architecture, config)
            wrapped = wrap_data_parallel(chunks, config.optimizer)
            optimizer = build_optimizer(wrapped, config.optimizer)
            initialize_moments(optimizer)
            built = (parameter_bytes(wrapped), gradient_bytes(wrapped), optimizer_state_bytes(optimizer, wrapped))
            saved = _run(wrapped, chunks, microbatch, num_packs) if rank.runs_schedule else None
        pipeline_rank = groups.pipeline_group.rank()
        data_rank = groups.data_group.rank() * groups.context_group.size() + groups.context_group.rank()
    state = rank_state(architecture, config, pipeline_rank, layout.data_parallel_size, data_rank)
    alive = alive_bytes(architecture, config, pipeline_rank, [pack] * num_packs, local=True)
    return Proof(
        rank=rank.rank,
        place=rank.place,
        num_parameters=sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters()),
        built=built,
        estimated=(state.parameters, state.gradients, state.optimizer),
        saved_bytes=saved,
        estimated_saved_bytes=None if saved is None else alive.most,
        seconds=time.monotonic() - started,
    )


@contextmanager
def _place(config: Config, rank: int, size: int) -> Iterator[Topology]:
    """Process groups of one rank among many that are not there: collectives return at once and move nothing."""
    with simulated_rank(rank, size):
        groups = topology.initialize(config.parallel, _SEED)
        yield groups
        topology.destroy(groups)


def _chunks(architecture: Architecture, config: Config) -> list[ResponseModel]:
    """This rank's model; attention computes nothing, and messages of the pipeline have one shape, known beforehand."""
    model = resolve_model(config.model, config.parallel, architecture=architecture)
    chunks = build_model(model, chunk_tokens=config.logprob.chunk_tokens, device=_META)
    for chunk in chunks:
        chunk.config.variable_seq_lengths = False
        chunk.config.batch_p2p_comm = False
        set_rotary_frequencies(chunk, chunk.rotary_pos_emb.inv_freq.to(_META))
        for module in chunk.modules():
            if isinstance(module, PackedAttention):
                module.__class__ = _AttentionShapes
    return chunks


class _AttentionShapes(PackedAttention):
    """The real module around a kernel that computes nothing."""

    def _gather_over_context(self, key: Tensor, value: Tensor, boundaries_S1: Tensor) -> tuple[Tensor, Tensor]:
        with torch.device("cpu"):  # the order of the chunks is read
            return super()._gather_over_context(key, value, boundaries_S1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, size: int, rank: int) -> Tensor:
        output: Tensor = _FlashShapes.apply(query, key, value)
        return output


class _FlashShapes(torch.autograd.Function):
    """What flash attention takes, returns and saves: queries, keys, values, output, one number per row and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query, memory_format=torch.contiguous_format)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:2], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _microbatch(config: Config, pack: PackShape, groups: Topology) -> Microbatch:
    """A pack of the shape, cut for this rank; its tokens have no content."""
    rows = [
        TokenizedTriplet(
            id=str(number),
            index=number,
            prompts={context: np.ones(length, np.int64) for context, length in lengths.items() if context in _CONTEXTS},
            responses={name: np.ones(length, np.int64) for name, length in lengths.items() if name not in _CONTEXTS},
        )
        for number, lengths in enumerate(pack.triplets)
    ]
    built = build_pack(rows, config.objective.roles.all, groups.sequence_multiple)
    whole = shard_pack(built, groups)
    return replace(whole, tokens_1t=whole.tokens_1t.to(_META))


def _run(
    wrapped: Sequence[torch.nn.Module],
    chunks: Sequence[ResponseModel],
    microbatch: Microbatch,
    num_packs: int,
) -> int:
    """Megatron's schedule over the packs; the most bytes that autograd kept alive."""
    for chunk in chunks:
        chunk.config.finalize_model_grads_func = None  # reductions do not run without memory

    def loss(output: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        count = torch.ones((), dtype=torch.int, device="cpu")
        return output.sum(), count, output.detach().sum()

    meter = SavedMeter(parameter for chunk in chunks for parameter in chunk.parameters())
    with meter.counting():
        run_microbatches(
            wrapped,
            [microbatch] * num_packs,
            lambda _: loss,
            forward_only=False,
            seq_length=microbatch.pack.padded_tokens,
        )
    return meter.most
