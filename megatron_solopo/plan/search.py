"""Judges every layout: refused with its first reason, or estimated; the ones that fit are ranked by throughput."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_solopo.architecture.gpus import Efficiency, Gpu, Reserve
from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.architecture.layout import FP8_MULTIPLES, check_layout
from megatron_solopo.config import Config
from megatron_solopo.plan.layouts import Layout, check, make_layout, sizes_of, variants
from megatron_solopo.plan.memory import GIB, StageMemory, State, fullest_stage, rank_state, stage_memory
from megatron_solopo.plan.timing import Clock, StepTime
from megatron_solopo.plan.workload import BatchShape, Packer, PackShape, Workload

_COMPUTED_THROUGH = 20
"""Layouts whose pipeline is simulated; a quick formula chooses them."""


@dataclass(frozen=True, eq=False)
class LayoutEstimate:
    """One layout that was computed through."""

    layout: Layout
    batch: BatchShape
    stages: list[StageMemory]
    time: StepTime
    gpu: Gpu

    @property
    def gpus(self) -> int:
        """Of the run."""
        return self.layout.data_parallel_size * self.layout.config.parallel.model_parallel_size

    @property
    def fullest(self) -> StageMemory:
        """The stage that decides whether it fits."""
        return fullest_stage(self.stages)

    @property
    def excess_gib(self) -> float:
        """By how much the fullest stage is over the GPU's memory; negative: room left."""
        return self.fullest.total / GIB - self.gpu.memory_gib

    @property
    def triplets_per_second(self) -> float:
        """Over the whole run, reference pass not counted."""
        return self.batch.num_triplets / self.time.seconds


@dataclass(frozen=True)
class Refusal:
    """A layout that cannot be run, and the first reason."""

    name: str
    reason: str
    excess_gib: float | None
    """Over the GPU's memory, where that is the reason."""


@dataclass(frozen=True, eq=False)
class Search:
    """Everything that was looked at."""

    ranked: list[LayoutEstimate]
    """The best of those that fit, best first."""
    num_fitting: int
    """Of all variants."""
    refused: list[Refusal]

    @property
    def nearest(self) -> Refusal:
        """The refused layout that comes closest to fitting, or any."""
        return _nearest(self.refused)


def _nearest(refused: Sequence[Refusal]) -> Refusal:
    return min(refused, key=lambda each: math.inf if each.excess_gib is None else each.excess_gib)


@dataclass(frozen=True, eq=False)
class Planner:
    """Judges layouts of one model, workload and type of GPU."""

    architecture: ModelShape
    config: Config
    workload: Workload
    gpu: Gpu
    gpus: int
    efficiency: Efficiency = field(default_factory=Efficiency)
    reserve: Reserve = field(default_factory=Reserve)
    vary: Sequence[str] = ()
    packer: Packer = field(init=False)
    _states: dict[tuple[Any, ...], State] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "packer", Packer(self.workload, self.config))

    def for_objective(self, name: str) -> "Planner":
        """The same with another objective, and a pack budget that its largest triplet fits in."""
        objective = type(self.config.objective).model_validate(self.config.objective.model_dump() | {"name": name})
        config = self.config.model_copy(update={"objective": objective})
        # What the widest layout pads to, so that no layout is refused for the budget alone.
        fp8 = "fp8" in self.vary or config.model.fp8 is not None
        whole = max(FP8_MULTIPLES.values()) * self.gpus if fp8 else 1
        largest = Packer(self.workload, config).largest(2 * self.gpus, whole)
        budget = max(config.data.max_tokens_per_pack, largest)
        data = config.data.model_copy(update={"max_tokens_per_pack": budget})
        return replace(self, config=config.model_copy(update={"data": data}))

    def search(self) -> Search:
        """All layouts; the most promising ones are computed through."""
        fitting: list[tuple[float, Layout]] = []
        refused: list[Refusal] = []
        for each in sizes_of(self.architecture, self.gpus, self.gpu):
            layout = make_layout(self.config, each, self.gpus)
            found, reasons = self._judge(layout)
            fitting += [(self._quick(variant), variant) for variant in found]
            if not found:
                refused.append(_nearest(reasons))
        fitting.sort(key=lambda pair: pair[0])
        ranked = [self.estimate(layout) for _, layout in fitting[:_COMPUTED_THROUGH]]
        ranked.sort(key=lambda estimate: estimate.time.seconds)
        return Search(ranked, len(fitting), refused)

    def _judge(self, layout: Layout) -> tuple[list[Layout], list[Refusal]]:
        """What fits of the variants of a layout, and what speaks against those that do not."""
        found: list[Layout] = []
        refused: list[Refusal] = []
        try:
            check_layout(self.architecture, layout.config.parallel)
            for row in variants(self.architecture, layout, self.gpu, self.vary):
                fits, excess = self._first_that_fits(row)
                if excess <= 0:
                    found.append(fits)
                else:
                    reason = f"does not fit: {excess:.1f} GiB over {self.gpu.memory_gib} GiB with {fits.savers}"
                    refused.append(Refusal(layout.name, reason, excess))
        except ValueError as error:
            return [], [Refusal(layout.name, str(error), None)]
        return found, refused

    def _first_that_fits(self, row: Sequence[Layout]) -> tuple[Layout, float]:
        """The first of a row that fits, or the last; with the GiB that it is over the GPU's memory."""
        excess = math.inf
        for layout in row:
            check(self.architecture, layout)
            packs = self.packer.pack(layout.config, layout.data_parallel_size).heaviest_rank
            # The first stage has most packs in flight, the last the head; those between lie between.
            ends = {0, layout.config.parallel.pipeline_model_parallel_size - 1}
            excess = max(self._memory(layout, rank, packs).total for rank in ends) / GIB - self.gpu.memory_gib
            if excess <= 0:
                break
        return layout, excess

    def best_of(self, layout: Layout) -> LayoutEstimate:
        """The fastest variant of one layout that fits, or its smallest; raises UserError if it is illegal."""
        rows = variants(self.architecture, layout, self.gpu, self.vary)
        judged = [self._first_that_fits(row) for row in rows]
        fitting = [each for each, excess in judged if excess <= 0]
        if fitting:
            return self.estimate(min(fitting, key=self._quick))
        return self.estimate(min(judged, key=lambda pair: pair[1])[0])

    def _quick(self, layout: Layout) -> float:
        packs = self.packer.pack(layout.config, layout.data_parallel_size).heaviest_rank
        ranks = {0, layout.config.parallel.pipeline_model_parallel_size - 1}
        return self._clock(layout).quick(packs, [self._state(layout, rank) for rank in ranks])

    def _clock(self, layout: Layout) -> Clock:
        return Clock(self.architecture, layout.config, layout.data_parallel_size, self.gpu, self.efficiency)

    def _memory(self, layout: Layout, rank: int, packs: Sequence[PackShape]) -> StageMemory:
        config, state = layout.config, self._state(layout, rank)
        return stage_memory(self.architecture, config, layout.data_parallel_size, rank, packs, self.reserve, state)

    def _state(self, layout: Layout, rank: int) -> State:
        """Recomputation and the exchange of keys and values do not touch it: most variants share it."""
        config = layout.config
        key = (*layout.sizes.values(), rank, config.model.fp8, config.optimizer.optimizer_offload_fraction)
        if key not in self._states:
            self._states[key] = rank_state(self.architecture, config, rank, layout.data_parallel_size)
        return self._states[key]

    def estimate(self, layout: Layout) -> LayoutEstimate:
        """Compute a layout through, whether it fits or not; raises UserError if it is illegal."""
        check(self.architecture, layout)
        batch = self.packer.pack(layout.config, layout.data_parallel_size)
        ranks = range(layout.config.parallel.pipeline_model_parallel_size)
        return LayoutEstimate(
            layout,
            batch,
            [self._memory(layout, rank, batch.heaviest_rank) for rank in ranks],
            self._clock(layout).step(batch.heaviest_rank, [self._state(layout, rank) for rank in ranks]),
            self.gpu,
        )
