"""Seconds of a step: matrix products, attention by true lengths, memory-bound work, traffic, pipeline, optimizer.

Every pack is timed by itself. Then the pipeline's schedule is simulated with the packs of the heaviest data-parallel
rank. Of the gradient reduction and the parameter gather, the part is added that computation cannot hide. Kernels are
taken not to slow each other down.

The fullest rank decides the time of a layer with experts, because all ranks wait for it. Where a model has dense layers
beside those, every layer counts as a mean layer.

Beside adapters, backward computes no gradients of the base's weights. An adapter's products are thin: most of its time
goes into reading and writing the tensors around it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import cycle, islice
from operator import attrgetter

import numpy as np

from megatron_solopo.architecture.adapters import adapted_linears, adapter_sizes
from megatron_solopo.architecture.flops import forward_flops, linear_weights, routed_weights
from megatron_solopo.architecture.gpus import Efficiency, Gpu
from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.architecture.layout import (
    data_parallel_overlap,
    packs_multiple,
    packs_per_part,
    padded_vocab_size,
)
from megatron_solopo.architecture.pipeline_schedule import ChunkPass
from megatron_solopo.config import Config
from megatron_solopo.data.batch_plan import packs_in_part, share_out_pass
from megatron_solopo.plan.activations import (
    element_bytes,
    gathered_keys,
    routed_tokens,
    sequence_shards,
    student_rows,
    uses_local_layers,
)
from megatron_solopo.plan.memory import RankState
from megatron_solopo.plan.parameters import ModelChunk, model_chunks, ranks_of_a_copy, sharing_ranks
from megatron_solopo.plan.pipeline import Timeline, simulate_schedule
from megatron_solopo.plan.workload import PackShape, PassShape

_NANO = 1e9
_FP32 = 4
_ATTENTION_BACKWARD = 2.5
"""Times forward: five products instead of two, because flash attention computes the scores again."""


@dataclass(frozen=True)
class PackSeconds:
    """Seconds of one pack in one layer, by what takes them; `head` is the time in the output layer."""

    gemm: float = 0.0
    attention: float = 0.0
    memory: float = 0.0
    tensor_traffic: float = 0.0
    context_traffic: float = 0.0
    expert_traffic: float = 0.0
    head: float = 0.0

    def __add__(self, other: "PackSeconds") -> "PackSeconds":
        return PackSeconds(*(one + two for one, two in zip(self.parts.values(), other.parts.values(), strict=True)))

    def times(self, factor: float) -> "PackSeconds":
        """Multiply each part."""
        return PackSeconds(*(factor * part for part in self.parts.values()))

    @property
    def parts(self) -> dict[str, float]:
        """The parts by name."""
        return vars(self)

    @property
    def total(self) -> float:
        """The sum of the parts."""
        return sum(self.parts.values())


@dataclass(frozen=True)
class DataTraffic:
    """Seconds of the gradient reduction and the parameter gather."""

    exposed: float
    """What a step waits for."""
    hidden: float
    """What runs beside computation."""


@dataclass(frozen=True)
class StepTime:
    """One optimizer step."""

    compute: PackSeconds
    """The busiest pipeline stage, summed over the packs."""
    timeline: Timeline
    data_traffic: "DataTraffic"
    optimizer: float

    @property
    def seconds(self) -> float:
        """Seconds of the step."""
        return self.timeline.seconds + self.data_traffic.exposed + self.optimizer


@dataclass(frozen=True)
class PassTime:
    """A pass over all triplets, forward only."""

    seconds: float
    bubble: float
    """Share of the time that the busiest pipeline stage waits, in [0, 1)."""


@dataclass(frozen=True)
class StepTimer:
    """Estimates the time of one configuration on one type of GPU."""

    architecture: ModelShape
    config: Config
    data_parallel_size: int
    gpu: Gpu
    efficiency: Efficiency

    def time_step(self, packs: Sequence[PackShape], states: Sequence[RankState]) -> StepTime:
        """One step of a data-parallel rank.

        Args:
            packs: what it runs.
            states: the state of each pipeline rank, in order.
        """
        size = self.config.parallel.pipeline_model_parallel_size
        chunks = [model_chunks(self.architecture, self.config.parallel, rank) for rank in range(size)]
        passes = [
            [tuple(part.total for part in self._pass(pack, is_forward=way)) for way in (True, False)] for pack in packs
        ]

        smallest = min(packs, key=lambda pack: pack.padded_tokens)

        def seconds(rank: int, work: ChunkPass) -> float:
            chunk, (layer, again, head) = chunks[rank][work.chunk], passes[work.microbatch][not work.is_forward]
            return chunk.num_layers * layer + self._computed_again(chunk) * again + chunk.has_head * head

        return StepTime(
            compute=self._busiest(packs),
            timeline=simulate_schedule(size, len(chunks[0]), len(packs), seconds, self._message(packs)),
            data_traffic=self._data_traffic(states, smallest),
            optimizer=max(self._update(state) for state in states),
        )

    def time_pass(self, work: PassShape) -> PassTime:
        """A pass of the reference model over all triplets: its parts, each with the time to fill the pipeline."""
        size = self.config.parallel.pipeline_model_parallel_size
        in_part = packs_in_part(
            work.num_packs,
            num_ranks=self.data_parallel_size,
            packs_multiple=packs_multiple(size, self._chunks),
            packs_per_part=packs_per_part(size),
        )
        length = min(work.num_packs, in_part)
        found = [self._busiest([pack], forward_only=True).total for pack in work.packs]
        seconds = np.array(list(islice(cycle(found), length)))
        (part,) = share_out_pass(
            (seconds * _NANO).astype(np.int64).tolist(),
            num_ranks=self.data_parallel_size,
            packs_multiple=packs_multiple(size, self._chunks),
            packs_per_part=length,
        )
        busy = float(seconds[part.packs].sum(axis=1).max())
        whole = self._with_bubble(busy, part.packs.shape[1])
        return PassTime(work.num_packs / length * whole, 1 - busy / whole)

    def quick_seconds(self, packs: Sequence[PackShape], states: Sequence[RankState]) -> float:
        """Seconds of a step without simulating the pipeline: the busiest stage's work plus a bubble by formula."""
        pipeline = self._with_bubble(self._busiest(packs).total, len(packs))
        smallest = min(packs, key=lambda pack: pack.padded_tokens)
        return pipeline + self._data_traffic(states, smallest).exposed + max(map(self._update, states))

    def _busiest(self, packs: Sequence[PackShape], *, forward_only: bool = False) -> PackSeconds:
        """All packs through the pipeline rank that they keep busy longest."""
        sums = [PackSeconds()] * 3
        figures = attrgetter("padded_tokens", "squares", "response_rows", "shares_prompts", "attended_keys")
        alike = Counter(map(figures, packs))
        one = {figures(pack): pack for pack in packs}
        for key, count in alike.items():
            for way in (True,) if forward_only else (True, False):
                found = self._pass(one[key], is_forward=way)
                sums = [total + part.times(count) for total, part in zip(sums, found, strict=True)]
        parallel = self.config.parallel
        size = parallel.pipeline_model_parallel_size
        # Of equal stages, the last one does most: it has the head.
        ranks = range(size) if parallel.pipeline_model_parallel_layout is not None else [size - 1]
        return max((self._of_rank(rank, *sums) for rank in ranks), key=lambda seconds: seconds.total)

    def _of_rank(self, rank: int, layer: PackSeconds, again: PackSeconds, head: PackSeconds) -> PackSeconds:
        """Seconds of a pipeline rank's chunks from those that `_pass` returns."""
        total = PackSeconds()
        for chunk in model_chunks(self.architecture, self.config.parallel, rank):
            total += layer.times(chunk.num_layers) + again.times(self._computed_again(chunk))
            total += head.times(chunk.has_head)
        return total

    @property
    def _chunks(self) -> int:
        return self.config.parallel.virtual_pipeline_model_parallel_size or 1

    def _with_bubble(self, busy: float, packs: int) -> float:
        return busy * (1 + (self.config.parallel.pipeline_model_parallel_size - 1) / (packs * self._chunks))

    def _pass(self, pack: PackShape, *, is_forward: bool) -> tuple[PackSeconds, PackSeconds, PackSeconds]:
        """A pass over one pack: of one layer, of what one layer computes again before it, and of the head."""
        forward, head = self._forward(pack), self.head(pack, is_forward=is_forward)
        if is_forward:
            return forward, PackSeconds(), head
        learns = self.config.lora is None
        backward = PackSeconds(
            # The gradients of the inputs, and of the weights that learn.
            gemm=forward.gemm + (forward.gemm if learns else self._adapter_gemm(pack)),
            attention=_ATTENTION_BACKWARD * self._attention(pack) + self._copying(pack, backward=True),
            memory=2 * forward.memory,
            # Backward gathers the two inputs again for the weights' gradients.
            tensor_traffic=(1.5 if learns else 1.0) * forward.tensor_traffic,
            context_traffic=self._context_traffic(pack, _ATTENTION_BACKWARD * self._attention(pack), backward=True),
            expert_traffic=forward.expert_traffic,
        )
        return backward, self._recomputed(forward), head

    def _computed_again(self, chunk: ModelChunk) -> int:
        """Number of a chunk's layers to which `recompute_granularity` applies."""
        parallel = self.config.parallel
        is_block = parallel.recompute_granularity == "full" and parallel.recompute_method == "block"
        return min(chunk.num_layers, parallel.recompute_num_layers) if is_block else chunk.num_layers

    def _recomputed(self, forward: PackSeconds) -> PackSeconds:
        parallel, a = self.config.parallel, self.architecture
        if parallel.recompute_granularity == "full":
            return forward
        found = PackSeconds()
        if parallel.recompute_granularity == "selective":
            if "core_attn" in parallel.recompute_modules:
                found += PackSeconds(attention=forward.attention, context_traffic=forward.context_traffic)
            if "mlp" in parallel.recompute_modules:
                dense = 1 - self._sparse_share  # Megatron does not compute experts again here
                share = dense * a.num_layers * 3 * a.hidden_size * a.ffn_hidden_size / self._busiest_weights
                found += PackSeconds(
                    gemm=share * forward.gemm,
                    memory=dense * forward.memory / 2,
                    tensor_traffic=dense * forward.tensor_traffic / 2,
                )
        return found

    def _forward(self, pack: PackShape) -> PackSeconds:
        a, parallel = self.architecture, self.config.parallel
        tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
        ranks = tp * cp * a.num_layers
        attention = self._attention(pack)
        return PackSeconds(
            gemm=2 * self._busiest_weights * pack.padded_tokens / ranks / self._gemm_rate + self._adapter_gemm(pack),
            attention=attention + self._copying(pack, backward=False),
            memory=self._memory_bytes(pack.padded_tokens / cp) / self._memory_rate,
            tensor_traffic=self._tensor_traffic(pack.padded_tokens / cp)
            + self._adapter_traffic(pack.padded_tokens / cp),
            context_traffic=self._context_traffic(pack, attention, backward=False),
            expert_traffic=self._sparse_share * self._expert_traffic(pack.padded_tokens / cp),
        )

    def _attention(self, pack: PackShape) -> float:
        """Seconds of a layer's attention kernels in forward."""
        a, parallel = self.architecture, self.config.parallel
        ranks = parallel.tensor_model_parallel_size * parallel.context_parallel_size * a.num_layers
        flops = forward_flops(a, pack.padded_tokens, pack.squares, 0)
        return flops.attention / ranks / (self.gpu.bf16_tflops * 1e12 * self.efficiency.attention)

    def _copying(self, pack: PackShape, *, backward: bool) -> float:
        """Seconds in which a layer copies the keys and values that attention gathers, or adds their gradients."""
        gathered = self._gathered_keys(pack)
        if not gathered:
            return 0.0
        e, tp = element_bytes(self.config), self.config.parallel.tensor_model_parallel_size
        # Rows are read and written. Gradients of rows are copied, widened to fp32 and added; the sums are rounded.
        of_key, of_token = (3 * e + 4 * _FP32, 2 * _FP32 + e) if backward else (2 * e, 0)
        columns = 2 * max(self.architecture.num_query_groups / tp, 1) * self.architecture.head_dim
        return columns * (of_key * gathered + of_token * pack.padded_tokens) / self._memory_rate

    def _gathered_keys(self, pack: PackShape) -> int:
        local = uses_local_layers(self.config)
        return gathered_keys(pack, self.config.parallel.context_parallel_size, local=local)

    @property
    def _memory_rate(self) -> float:
        return self.gpu.hbm_gb_per_s * 1e9 * self.efficiency.memory

    def _adapter_gemm(self, pack: PackShape) -> float:
        """Seconds of a layer's adapters in forward. They compute in bfloat16, whatever the base does."""
        if self.config.lora is None:
            return 0.0
        parallel = self.config.parallel
        numbers = sum(size for _, size in adapter_sizes(self.architecture, self.config.lora))
        ranks = parallel.tensor_model_parallel_size * parallel.context_parallel_size
        rate = self.gpu.bf16_tflops * 1e12 * self.efficiency.gemm
        return 2.0 * numbers * pack.padded_tokens / ranks / rate

    def _adapter_columns(self) -> float:
        """Numbers per token that a layer's adapters read and write besides their own few columns."""
        if self.config.lora is None:
            return 0.0
        tp, known, found = self.config.parallel.tensor_model_parallel_size, self.architecture.sizes, 0.0
        for linear in adapted_linears(self.config.lora):
            outputs = sum(known[each] for each in linear.outputs)
            # The input; with dropout for each module also a mask and a copy, written and read.
            inputs = known[linear.inputs] * (1 + (3 * len(linear.targets) if self.config.lora.dropout else 0))
            if linear.is_column_parallel:
                # The parts of the modules, written, and read and written as one; the sum with the layer's.
                found += inputs / sequence_shards(self.config) + 6 * outputs / tp
            else:
                found += inputs / tp + 4 * outputs / sequence_shards(self.config)
        return found

    def _adapter_traffic(self, tokens: float) -> float:
        """Seconds of exchanging what each adapter's first matrix returns among tensor-parallel ranks."""
        lora, tp = self.config.lora, self.config.parallel.tensor_model_parallel_size
        if lora is None or tp == 1:
            return 0.0
        columns = [len(each.targets) if each.is_column_parallel else 1 for each in adapted_linears(lora)]
        size = element_bytes(self.config) * tokens * lora.rank
        return sum(self._collective(size * count, tp, tp) for count in columns)

    @property
    def _sparse_share(self) -> float:
        """Share of the layers that have experts."""
        experts = self.architecture.experts
        return 0.0 if experts is None else experts.num_layers / self.architecture.num_layers

    @cached_property
    def _busiest_weights(self) -> float:
        """Weights of all layers that multiply each token, where a rank's experts get more tokens than the others'."""
        a, experts = self.architecture, self.architecture.experts
        load = 1.0 if experts is None else experts.rank_load(self.config.parallel.expert_model_parallel_size)
        return linear_weights(a) + (load - 1) * routed_weights(a)

    @cached_property
    def _gemm_rate(self) -> float:
        if self.config.model.fp8 is not None:
            assert self.gpu.fp8_tflops is not None, "FP8 on a GPU without it"
            return self.gpu.fp8_tflops * 1e12 * self.efficiency.fp8_gemm
        return self.gpu.bf16_tflops * 1e12 * self.efficiency.gemm

    def head(self, pack: PackShape, *, is_forward: bool) -> PackSeconds:
        """The output layer's pass over the response rows of the context-parallel rank that has most of them."""
        a, tp = self.architecture, self.config.parallel.tensor_model_parallel_size
        flops = 2.0 * a.hidden_size * padded_vocab_size(a.vocab_size, tp) / tp
        seconds = flops / (self.gpu.bf16_tflops * 1e12 * self.efficiency.head)
        # The teachers of a divergence are projected too.
        projected = pack.response_rows + (student_rows(pack) if self.config.objective.aligns_tokens else 0)
        if is_forward:
            return PackSeconds(head=seconds * projected)
        products = 1 if self.config.lora else 2
        again = projected if pack.response_rows > self.config.logprob.chunk_tokens else 0
        return PackSeconds(head=seconds * (products * pack.response_rows + again))

    def _memory_bytes(self, tokens: float) -> float:
        """Bytes that the memory-bound kernels of a layer read and write: norms, residuals, rotation, SwiGLU."""
        a, e, tp = self.architecture, element_bytes(self.config), self.config.parallel.tensor_model_parallel_size
        hidden = a.hidden_size / sequence_shards(self.config)
        rotated = (a.num_attention_heads + a.num_query_groups) * a.head_dim / tp
        columns = (1 - self._sparse_share) * 3 * a.ffn_hidden_size / tp
        if a.experts is not None:
            # Copies of a token are sorted before and after the exchange, there and back: read and written.
            routed = routed_tokens(a.experts, self.config)
            each = 3 * a.experts.ffn_hidden_size / self.config.parallel.expert_tensor_size + 4 * 2 * a.hidden_size
            columns += self._sparse_share * (routed * each + 3 * a.experts.shared_ffn_hidden_size / tp)
        return e * tokens * (2 * 2 * hidden + 2 * 3 * hidden + 2 * rotated + columns + self._adapter_columns())

    def _tensor_traffic(self, tokens: float) -> float:
        """Seconds of two gathers and two reduce-scatters of hidden states. Two all-reduces would take as long.

        A layer with experts has one of each, and a second one only for an expert that computes every token.
        """
        tp, experts = self.config.parallel.tensor_model_parallel_size, self.architecture.experts
        if tp == 1:
            return 0.0
        size = element_bytes(self.config) * tokens * self.architecture.hidden_size
        without = 0.0 if experts is None or experts.shared_ffn_hidden_size else self._sparse_share
        return (4 - 2 * without) * self._collective(size, tp, tp)

    def _expert_traffic(self, tokens: float) -> float:
        """Seconds in which one layer's tokens go to the experts and come back.

        Each rank sends every other one of its EP group the tokens for its experts. The links within a node and those to
        other nodes carry their shares at the same time. Then the ranks that share an expert gather its tokens.
        """
        experts, parallel = self.architecture.experts, self.config.parallel
        if experts is None:
            return 0.0
        ep, etp = parallel.expert_model_parallel_size, parallel.expert_tensor_size
        size = element_bytes(self.config) * tokens * self.architecture.hidden_size * routed_tokens(experts, self.config)
        there = self._collective(size, etp, etp) if etp > 1 else 0.0
        if ep > 1:
            inside = min(ep, max(1, self.gpu.gpus_per_node // etp))  # of the ranks of a group, those of the same node
            sent = size / etp / ep
            there += self.efficiency.message_seconds * (ep - 1) + max(
                sent * (inside - 1) / self._bandwidth(True), sent * (ep - inside) / self._bandwidth(False)
            )
        return 2 * there

    def _context_traffic(self, pack: PackShape, attention: float, *, backward: bool) -> float:
        """Seconds of exchanging keys and values that attention does not hide. By heads, it hides nothing."""
        a, parallel, e = self.architecture, self.config.parallel, element_bytes(self.config)
        tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
        if cp == 1:
            return 0.0
        queries = a.num_attention_heads * a.head_dim / tp
        keys = max(a.num_query_groups / tp, 1) * a.head_dim
        if self._gathered_keys(pack):
            # A gather before attention, and a reduce-scatter of the gradients behind it.
            return self._collective(2 * e * pack.padded_tokens * keys, cp, tp * cp)
        heads = cp if parallel.cp_comm_type == "a2a" else (parallel.hierarchical_context_parallel_sizes or [1])[0]
        by_heads = 0.0
        if heads > 1:
            sent = e * pack.padded_tokens / cp * (2 * queries + 2 * keys)
            by_heads = self._collective(sent, heads, tp * heads)
        if heads == cp:
            return by_heads
        rounds = cp // heads  # of a ring in which each rank holds its share of the heads
        sent = 2 * e * pack.padded_tokens * keys / heads
        ring = self._collective(sent, rounds, tp * cp, messages=rounds - 1)
        exchange = ring * (2 if backward else 1)  # gradients of keys and values go round too
        return by_heads + max(0.0, exchange - self.efficiency.overlap_of_context * attention)

    def _message(self, packs: Sequence[PackShape]) -> float:
        """Seconds that the hidden states of the largest pack take from one pipeline stage to the next."""
        parallel = self.config.parallel
        if parallel.pipeline_model_parallel_size == 1:
            return 0.0
        padded_tokens = max(pack.padded_tokens for pack in packs)
        hidden = self.architecture.hidden_size / sequence_shards(self.config)
        size = element_bytes(self.config) * padded_tokens / parallel.context_parallel_size * hidden
        gpus = self.data_parallel_size * parallel.model_parallel_size
        return self.efficiency.message_seconds + size / self._bandwidth(gpus <= self.gpu.gpus_per_node)

    def _data_traffic(self, states: Sequence[RankState], pack: PackShape) -> DataTraffic:
        """What the slowest pipeline rank waits for.

        With overlap, the first stage reduces beside the backward pass of the last pack, and gathers beside the forward
        pass of the first. One bucket is never hidden. A later stage has time until the first one ends or begins.

        Args:
            pack: the smallest, which hides least.
        """
        parallel = self.config.parallel
        ranks = self.data_parallel_size * parallel.context_parallel_size
        overlap = data_parallel_overlap(parallel, self.config.optimizer, ranks, on_gpu=True)
        found = []
        for rank, state in enumerate(states):
            reduce, gather = self._reduction(state)
            exposed = 0.0
            for seconds, overlaps, is_forward in (
                (reduce, overlap.grad_reduce, False),
                (gather, overlap.param_gather, True),
            ):
                beside = self._of_rank(rank, *self._pass(pack, is_forward=is_forward)).total if overlaps else 0.0
                least = 0.0 if rank and overlaps else seconds / (state.buckets if overlaps else 1)
                exposed += max(least, seconds - beside * max(rank, 1) / (self._chunks if rank else 1))
            found.append(DataTraffic(exposed, reduce + gather - exposed))
        return max(found, key=lambda traffic: traffic.exposed)

    def _reduction(self, state: RankState) -> tuple[float, float]:
        """Seconds of the reduction of gradients, and of the gather of parameters, over the ranks that share them."""
        whole = state.gradients - state.expert_gradients, state.parameters - state.frozen - state.expert_parameters
        experts = state.expert_gradients, state.expert_parameters
        parts = [self._reduction_of(*whole, is_expert=False), self._reduction_of(*experts, is_expert=True)]
        return sum(reduce for reduce, _ in parts), sum(gather for _, gather in parts)

    def _reduction_of(self, gradients: int, parameters: int, *, is_expert: bool) -> tuple[float, float]:
        parallel = self.config.parallel
        size = sharing_ranks(parallel, self.data_parallel_size, is_expert=is_expert)
        apart, instances = ranks_of_a_copy(parallel, is_expert=is_expert), parallel.num_distributed_optimizer_instances
        if size == 1 or not gradients:
            return 0.0, 0.0
        if not self.config.optimizer.use_distributed_optimizer:
            return 2 * self._collective(gradients, size, apart * size), 0.0
        inside = size // instances
        reduce, gather = (
            self._collective(bytes_, inside, apart * inside) if inside > 1 else 0.0
            for bytes_ in (gradients, parameters)
        )
        if instances > 1:  # an all-reduce of every rank's shard between the copies of the optimizer
            reduce += 2 * self._collective(gradients / inside, instances, apart * size)
        return reduce, gather

    def _update(self, state: RankState) -> float:
        """Seconds in which Adam reads and writes its state once. The offloaded share crosses PCIe to the host."""
        on_gpu = 2 * state.optimizer / (self.gpu.hbm_gb_per_s * 1e9 * self.efficiency.memory)
        # fp32 gradients down and bfloat16 weights up, 6 of the 16 bytes that the host keeps.
        crossing = state.host * 6 / 16
        seconds = crossing / self.gpu.pcie_gb_per_s + 2 * state.host / self.gpu.host_gb_per_s
        return on_gpu + seconds / (1e9 * self.efficiency.host)

    def _collective(self, size: float, ranks: int, span: int, messages: int | None = None) -> float:
        """Seconds of a gather to `size` bytes per rank, or of a reduce-scatter from them.

        Args:
            span: ranks from the first to the last of the group, in Megatron's order (TP, CP, DP, PP). A group
                wider than a node moves at the network's pace.
            messages: number of messages in a row; None: one to each other rank.
        """
        steps = ranks - 1 if messages is None else messages
        moved = size * (ranks - 1) / ranks
        return self.efficiency.message_seconds * steps + moved / self._bandwidth(span <= self.gpu.gpus_per_node)

    def _bandwidth(self, inside_node: bool) -> float:
        if inside_node:
            return self.gpu.nvlink_gb_per_s * 1e9 * self.efficiency.nvlink
        return self.gpu.network_gb_per_s * 1e9 * self.efficiency.network
