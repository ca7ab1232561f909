"""The layouts to consider for a model on a number of GPUs, and the memory savers to try on each.

Which ranks of a layout differ, and what a dry run of one of them says beside the estimate.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from megatron_solopo.architecture.gpus import Gpu, has_fp8
from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.architecture.layout import check_fp8, check_layout, check_world_size
from megatron_solopo.config import Config

SHORT_NAMES = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
}
_MOST_CHUNKS = 4
_RECOMPUTE: tuple[dict[str, Any], ...] = (
    {"recompute_granularity": None},
    {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
)


@dataclass(frozen=True)
class Layout:
    """A whole configuration and the data-parallel size that the number of GPUs leaves."""

    config: Config
    data_parallel_size: int

    @property
    def sizes(self) -> dict[str, int | None]:
        """By short name: tp, pp, vpp, cp, dp."""
        sizes = {short: getattr(self.config.parallel, name) for short, name in SHORT_NAMES.items()}
        return sizes | {"dp": self.data_parallel_size}

    @property
    def name(self) -> str:
        """`tp8,pp4,vpp2,cp4,dp8`, and what was chosen besides."""
        parts = [f"{short}{size}" for short, size in self.sizes.items() if size is not None]
        return ",".join(parts)

    @property
    def savers(self) -> str:
        """What saves memory or time besides the sizes, for a reader."""
        parallel, model, optimizer = self.config.parallel, self.config.model, self.config.optimizer
        found = []
        if parallel.recompute_granularity == "full":
            found.append(f"recompute full ({parallel.recompute_method} {parallel.recompute_num_layers})")
        elif parallel.recompute_granularity == "selective":
            found.append(f"recompute {'+'.join(parallel.recompute_modules)}")
        if model.fp8:
            found.append(f"fp8 {model.fp8_recipe}")
        if optimizer.optimizer_offload_fraction:
            found.append(f"offload optimizer {optimizer.optimizer_offload_fraction:g}")
        if parallel.cpu_offloading_num_layers:
            found.append(f"offload {parallel.cpu_offloading_num_layers} layers")
        if parallel.context_parallel_size > 1:
            found.append(f"cp {parallel.cp_comm_type}")
        return ", ".join(found) or "none"


def with_keys(config: Config, **sections: dict[str, Any]) -> Config:
    """A copy with some keys of some sections changed and checked again."""
    update = {
        name: type(getattr(config, name)).model_validate(getattr(config, name).model_dump() | values)
        for name, values in sections.items()
    }
    return config.model_copy(update=update)


def sizes_of(architecture: ModelShape, gpus: int, gpu: Gpu) -> Iterator[dict[str, int | None]]:
    """All tp, pp, vpp, cp that divide the GPUs; what they do to the model is judged later, with a reason."""
    for tp in _divisors(gpus):
        if tp > gpu.gpus_per_node:
            break
        for pp in _divisors(gpus // tp):
            if pp > architecture.num_layers:
                break
            for vpp in (None, *(range(2, _MOST_CHUNKS + 1) if pp > 1 else ())):
                for cp in _divisors(gpus // tp // pp):
                    yield {"tp": tp, "pp": pp, "vpp": vpp, "cp": cp}


def make_layout(config: Config, sizes: dict[str, int | None], gpus: int) -> Layout:
    """The configuration with these sizes; raises UserError if they do not divide the GPUs."""
    named = {SHORT_NAMES[short]: size for short, size in sizes.items()}
    # Sequence parallelism comes with TP: without it nothing is faster or smaller.
    parallel = named | {"sequence_parallel": None, "cp_comm_type": "p2p", "cpu_offloading_num_layers": 0}
    changed = with_keys(config, parallel=parallel)
    check_world_size(changed.parallel, gpus)
    return Layout(changed, gpus // changed.parallel.model_parallel_size)


def check(architecture: ModelShape, layout: Layout) -> None:
    """Raise ValueError with the first reason why the model refuses a layout."""
    config = layout.config
    check_layout(architecture, config.parallel)
    check_fp8(architecture, config.model, config.parallel, config.optimizer)


def exchanges_by_heads(architecture: ModelShape, config: Config) -> bool:
    """Whether keys and values can be exchanged by heads (`cp_comm_type: a2a`)."""
    if config.parallel.context_parallel_size == 1:
        return False
    try:
        check_layout(architecture, with_keys(config, parallel={"cp_comm_type": "a2a"}).parallel)
    except ValueError:
        return False
    return True


def variants(architecture: ModelShape, layout: Layout, gpu: Gpu, vary: Sequence[str]) -> list[list[Layout]]:
    """What may be tried beside the sizes: rows that differ in precision, traffic and where the optimizer's state lies.

    In a row every entry recomputes more, takes less memory and more time than the one before: the first that fits is
    the row's best. Rows are not ordered: with many packs in a step, moving state costs less than recomputing layers.
    """
    config = layout.config
    can_fp8 = has_fp8(gpu, config.model.fp8_recipe) and config.model.dtype == "bfloat16"
    precisions: list[dict[str, Any]] = [{}]
    if "fp8" in vary and can_fp8:
        precisions = [{"fp8": None, "fp8_param": False, "first_last_layers_bf16": False}, {"fp8": "hybrid"}]
    recompute = list(_RECOMPUTE) if "recompute" in vary else [{}]
    exchanges = ["p2p"]
    if "cp_comm" in vary and exchanges_by_heads(architecture, config):
        exchanges.append("a2a")
    rows = []
    for precision, exchange, offload in product(precisions, exchanges, _offloads(config, vary)):
        row = [
            with_keys(config, model=precision, parallel={"cp_comm_type": exchange} | saver, optimizer=offload)
            for saver in recompute
        ]
        rows.append([Layout(each, layout.data_parallel_size) for each in row])
    return rows


def _offloads(config: Config, vary: Sequence[str]) -> list[dict[str, float]]:
    possible = config.optimizer.use_distributed_optimizer and config.model.dtype == "bfloat16"
    return [{"optimizer_offload_fraction": share} for share in (0.0, 1.0)] if "offload" in vary and possible else [{}]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


@dataclass(frozen=True)
class Proof:
    """One rank, built without memory."""

    rank: int
    place: str
    """Which stage, and which part of the optimizer's state."""
    num_parameters: int
    built: tuple[int, int, int]
    """Bytes of parameter buffers, gradient buffers and optimizer state as Megatron-Core allocates them."""
    estimated: tuple[int, int, int]
    saved_bytes: int | None
    """Most that autograd kept alive at any moment of the real schedule, with plain PyTorch layers; None: not run."""
    estimated_saved_bytes: float | None
    seconds: float

    @property
    def difference(self) -> str:
        """Which of the exact figures disagree, and by how much; empty where none does."""
        names = ("parameters", "gradients", "optimizer")
        pairs = zip(names, self.built, self.estimated, strict=True)
        return ", ".join(f"{name} {mine - real:+,}" for name, real, mine in pairs if mine != real)

    def as_json(self) -> dict[str, Any]:
        """For machines."""
        return vars(self) | {"equal": not self.difference}


@dataclass(frozen=True)
class DistinctRank:
    """A rank that stands for all that are like it."""

    rank: int
    place: str
    runs_schedule: bool
    """Whether its activations stand for its stage's: it is the first on each axis, which has most response rows."""


def distinct_ranks(layout: Layout) -> list[DistinctRank]:
    """Ranks of all shapes that differ, by Megatron's order (TP, CP, DP, PP).

    Stages differ by what they hold (embedding, layers, head); along data-parallel and context-parallel ranks, the last
    owns the padding at the buffers' ends. Tensor-parallel ranks are alike.
    """
    parallel = layout.config.parallel
    size = parallel.pipeline_model_parallel_size
    per_stage = layout.data_parallel_size * parallel.context_parallel_size * parallel.tensor_model_parallel_size
    stages = {0: "first stage", size // 2: "middle stage", size - 1: "last stage"} if size > 1 else {0: "only stage"}
    found = []
    for stage, name in sorted(stages.items()):
        found.append(DistinctRank(stage * per_stage, f"{name}, first shard", True))
        if per_stage > 1:
            found.append(DistinctRank((stage + 1) * per_stage - 1, f"{name}, last shard", False))
    return found
