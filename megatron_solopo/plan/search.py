"""The search: it estimates every layout or refuses it with a reason, and ranks those that fit by throughput."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_solopo.architecture.adapters import ATTENTION
from megatron_solopo.architecture.gpus import Efficiency, Gpu, Reserve
from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.architecture.layout import FP8_BLOCK
from megatron_solopo.config import Config, LoRAConfig
from megatron_solopo.errors import UserError
from megatron_solopo.plan.layouts import (
    Layout,
    candidate_sizes,
    check_supported,
    layout_variants,
    make_layout,
    replace_settings,
    sizes_name,
)
from megatron_solopo.plan.memory import GIB, RankState, StageMemory, rank_state, stage_memory
from megatron_solopo.plan.timing import PassTime, StepTime, StepTimer
from megatron_solopo.plan.workload import BatchShape, Packer, PackShape, Workload

_NUM_SIMULATED = 20
"""Number of layouts whose pipeline is simulated. A quick formula chooses them."""


@dataclass(frozen=True, eq=False)
class LayoutEstimate:
    """Memory and time of one layout."""

    layout: Layout
    batch: BatchShape
    stages: list[StageMemory]
    time: StepTime
    gpu: Gpu

    @property
    def fullest(self) -> StageMemory:
        """The stage that needs most memory. It decides whether the layout fits."""
        return max(self.stages, key=lambda stage: stage.total)

    @property
    def excess_gib(self) -> float:
        """GiB of the fullest stage over the GPU's memory; negative: the layout fits."""
        return self.fullest.total / GIB - self.gpu.memory_gib

    @property
    def triplets_per_second(self) -> float:
        """Throughput of all GPUs without the reference pass."""
        return self.batch.num_triplets / self.time.seconds


@dataclass(frozen=True)
class RefusedLayout:
    """A layout that cannot run, and the first reason."""

    name: str
    reason: str
    excess_gib: float | None
    """GiB over the GPU's memory; None: the reason is another one."""


@dataclass(frozen=True, eq=False)
class SearchResult:
    """The best layouts and the refused ones."""

    ranked: list[LayoutEstimate]
    """The best of those that fit, the fastest first."""
    num_fitting: int
    """Number of variants that fit."""
    refused: list[RefusedLayout]

    @property
    def nearest(self) -> RefusedLayout:
        """The refused layout that comes closest to fitting."""
        return _nearest(self.refused)


def _nearest(refused: Sequence[RefusedLayout]) -> RefusedLayout:
    return min(refused, key=lambda each: math.inf if each.excess_gib is None else each.excess_gib)


@dataclass(frozen=True, eq=False)
class Planner:
    """Estimates layouts of one model, workload and type of GPU."""

    architecture: ModelShape
    config: Config
    workload: Workload
    gpu: Gpu
    gpus: int
    efficiency: Efficiency = field(default_factory=Efficiency)
    reserve: Reserve = field(default_factory=Reserve)
    vary: Sequence[str] = ()
    stated: Sequence[str] = ()
    """Dotted keys of the command line. A plan's overrides state them again."""
    packer: Packer = field(init=False)
    _states: dict[tuple[Any, ...], RankState] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "packer", Packer(self.workload, self.config, self.architecture))

    def for_objective(self, name: str) -> "Planner":
        """The same planner with another objective. Its pack budget is raised until the largest triplet fits in."""
        objective = type(self.config.objective).model_validate(self.config.objective.model_dump() | {"name": name})
        config = self.config.model_copy(update={"objective": objective})
        # The widest layout pads most. A budget for it means that no layout is refused for the budget alone.
        fp8 = "fp8" in self.vary or config.model.fp8 is not None
        pack_multiple = 2 * self.gpus * (FP8_BLOCK if fp8 else 1)
        shares = config.data.share_prompts and "share_prompts" not in self.vary
        largest = Packer(self.workload, config, self.architecture).largest_triplet(2 * self.gpus, pack_multiple, shares)
        budget = max(config.data.max_tokens_per_pack, largest)
        data = config.data.model_copy(update={"max_tokens_per_pack": budget})
        return replace(self, config=config.model_copy(update={"data": data}))

    def for_other_weights(self) -> "Planner":
        """The same planner for adapters where the configuration trains the whole model, and the other way round.

        Without the section `lora`, the adapters are those of its default, as far as the model can have them.
        """
        lora, adapter = None, self.config.model.adapter
        if self.config.lora is None:
            lora = LoRAConfig() if self.architecture.experts is None else LoRAConfig(target_modules=[*ATTENTION])
        config = replace_settings(self.config, model={"adapter": None}).model_copy(update={"lora": lora})
        changed = ("lora",) if adapter is None else ("lora", "model.adapter")
        return replace(self, config=config, stated=(*self.stated, *changed))

    def search(self) -> SearchResult:
        """Consider all layouts, and estimate the most promising ones."""
        fitting: list[tuple[float, Layout]] = []
        refused: list[RefusedLayout] = []
        for sizes in candidate_sizes(self.architecture, self.gpus, self.gpu):
            try:
                layout = make_layout(self.config, sizes, self.gpus)
            except UserError as error:
                refused.append(RefusedLayout(sizes_name(sizes), str(error), None))
                continue
            found, reasons = self._fitting_variants(layout)
            fitting += [(self._quick_seconds(variant), variant) for variant in found]
            if not found:
                refused.append(_nearest(reasons))
        fitting.sort(key=lambda pair: pair[0])
        ranked = [self.estimate(layout) for _, layout in fitting[:_NUM_SIMULATED]]
        ranked.sort(key=lambda estimate: estimate.time.seconds)
        return SearchResult(ranked, len(fitting), refused)

    def _fitting_variants(self, layout: Layout) -> tuple[list[Layout], list[RefusedLayout]]:
        """The variants of a layout that fit, and the reasons against the others."""
        found: list[Layout] = []
        refused: list[RefusedLayout] = []
        try:
            for row in layout_variants(self.architecture, layout, self.gpu, self.vary):
                variant, excess = self._first_that_fits(row)
                if excess <= 0:
                    found.append(variant)
                else:
                    reason = f"does not fit: {excess:.1f} GiB over {self.gpu.memory_gib} GiB with {variant.savers}"
                    refused.append(RefusedLayout(layout.name, reason, excess))
        except UserError as error:
            return [], [RefusedLayout(layout.name, str(error), None)]
        return found, refused

    def _first_that_fits(self, row: Sequence[Layout]) -> tuple[Layout, float]:
        """The first layout of a row that fits, or the last one; and its GiB over the GPU's memory."""
        excess = math.inf
        for layout in row:
            check_supported(self.architecture, layout)
            packs = self.packer.pack(layout.config, layout.data_parallel_size).heaviest_rank
            fullest = max(self._memory(layout, rank, packs).total for rank in self._extreme_ranks(layout))
            excess = fullest / GIB - self.gpu.memory_gib
            if excess <= 0:
                break
        return layout, excess

    def best_variant(self, layout: Layout) -> LayoutEstimate:
        """The fastest variant of a layout that fits, or else its smallest; raises UserError if the model refuses it."""
        rows = layout_variants(self.architecture, layout, self.gpu, self.vary)
        candidates = [self._first_that_fits(row) for row in rows]
        fitting = [variant for variant, excess in candidates if excess <= 0]
        if fitting:
            return self.estimate(min(fitting, key=self._quick_seconds))
        return self.estimate(min(candidates, key=lambda pair: pair[1])[0])

    def estimate(self, layout: Layout) -> LayoutEstimate:
        """Memory and time of a layout, whether it fits or not; raises UserError if the model refuses it."""
        check_supported(self.architecture, layout)
        batch = self.packer.pack(layout.config, layout.data_parallel_size)
        ranks = range(layout.config.parallel.pipeline_model_parallel_size)
        return LayoutEstimate(
            layout,
            batch,
            [self._memory(layout, rank, batch.heaviest_rank) for rank in ranks],
            self._timer(layout).time_step(batch.heaviest_rank, [self._state(layout, rank) for rank in ranks]),
            self.gpu,
        )

    def time_reference(self, layout: Layout) -> PassTime:
        """The time of the pass of the reference model over all triplets."""
        packer = self.packer
        roles = [
            source.config.reference_roles if source.config.objective.needs_reference else ()
            for source in layout.config.sources
        ]
        if roles != packer.roles:
            packer = Packer(self.workload, layout.config, self.architecture, roles)
        update = {"model": layout.config.model.without_gradients, "lora": None}
        scored = replace(layout, config=layout.config.model_copy(update=update))
        # The packs are padded for the precision of training.
        timer, size = self._timer(scored), layout.data_parallel_size
        passes = [
            timer.time_pass(packer.single_pass(layout.config, size, source)) for source, own in enumerate(roles) if own
        ]
        seconds = sum(each.seconds for each in passes)
        return PassTime(seconds, sum(each.seconds * each.bubble for each in passes) / seconds)

    def _quick_seconds(self, layout: Layout) -> float:
        packs = self.packer.pack(layout.config, layout.data_parallel_size).heaviest_rank
        return self._timer(layout).quick_seconds(
            packs, [self._state(layout, rank) for rank in self._extreme_ranks(layout)]
        )

    def _extreme_ranks(self, layout: Layout) -> Sequence[int]:
        experts = self.architecture.experts
        if experts is not None and not experts.in_all_layers:  # stages of as many layers are not equal
            return range(layout.config.parallel.pipeline_model_parallel_size)
        return layout.extreme_ranks

    def _timer(self, layout: Layout) -> StepTimer:
        return StepTimer(self.architecture, layout.config, layout.data_parallel_size, self.gpu, self.efficiency)

    def _memory(self, layout: Layout, rank: int, packs: Sequence[PackShape]) -> StageMemory:
        config, state = layout.config, self._state(layout, rank)
        return stage_memory(self.architecture, config, layout.data_parallel_size, rank, packs, self.reserve, state)

    def _state(self, layout: Layout, rank: int) -> RankState:
        """Most variants share the state: recomputation and the exchange of keys and values do not change it."""
        config = layout.config
        stages = config.parallel.pipeline_model_parallel_layout
        key = (
            *layout.sizes.values(),
            stages,
            rank,
            config.model.fp8,
            config.optimizer.optimizer_offload_fraction,
            config.parallel.num_distributed_optimizer_instances,
            config.parallel.overlap_grad_reduce,
        )
        if key not in self._states:
            self._states[key] = rank_state(self.architecture, config, rank, layout.data_parallel_size)
        return self._states[key]
