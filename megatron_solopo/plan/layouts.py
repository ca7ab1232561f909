"""The layouts to consider for a model on a number of GPUs, the memory savers to try on each, and which ranks differ."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from typing import Any

import yaml

from megatron_solopo.architecture.adapters import check_adapters
from megatron_solopo.architecture.gpus import Gpu, has_fp8
from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.architecture.layout import (
    check_exchange_by_heads,
    check_fp8,
    check_layout,
    check_training,
    check_world_size,
)
from megatron_solopo.architecture.pipeline_layout import parse_layout
from megatron_solopo.config import Config
from megatron_solopo.errors import UserError
from megatron_solopo.plan.activations import uses_local_layers

_SIZE_KEYS = {
    "tp": "tensor_model_parallel_size",
    "pp": "pipeline_model_parallel_size",
    "vpp": "virtual_pipeline_model_parallel_size",
    "cp": "context_parallel_size",
    "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size",
}
_MAX_MODEL_CHUNKS = 4
_RING = {"cp_comm_type": "p2p", "hierarchical_context_parallel_sizes": None}
_BY_HEADS = {"cp_comm_type": "a2a", "hierarchical_context_parallel_sizes": None}
_RECOMPUTE: tuple[dict[str, Any], ...] = (
    {"recompute_granularity": None},
    {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
)


@dataclass(frozen=True)
class Layout:
    """A whole configuration, and the data-parallel size that the number of GPUs leaves."""

    config: Config
    data_parallel_size: int

    @property
    def gpus(self) -> int:
        """Number of GPUs of the run."""
        return self.data_parallel_size * self.config.parallel.model_parallel_size

    @property
    def sizes(self) -> dict[str, int | None]:
        """The parallel sizes by short name: tp, pp, vpp, cp, ep, etp, dp."""
        sizes = {short: getattr(self.config.parallel, key) for short, key in _SIZE_KEYS.items()}
        return sizes | {"dp": self.data_parallel_size}

    @property
    def name(self) -> str:
        """The sizes in a word, such as `tp8,pp4,vpp2,cp4,dp8`."""
        return sizes_name(self.sizes)

    @property
    def extreme_ranks(self) -> list[int]:
        """Pipeline ranks of which one needs most memory, and one most time.

        The first stage keeps most packs, and the last has the head. Equal stages between them need less.
        """
        size = self.config.parallel.pipeline_model_parallel_size
        if self.config.parallel.pipeline_model_parallel_layout is not None:
            return list(range(size))
        return sorted({0, size - 1})

    @property
    def savers(self) -> str:
        """The settings besides the sizes that save memory or time, in words; "none" if there are none."""
        parallel, model, optimizer = self.config.parallel, self.config.model, self.config.optimizer
        found = [] if self.config.lora is None else [f"lora rank {self.config.lora.rank}"]
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
            found += ["cp gather"] * self.config.has_shared_packs
            found += [f"cp {parallel.cp_comm_type}"] * self.config.has_unshared_packs
        if not self.config.data.share_prompts:
            found.append("prompts not shared")
        if parallel.pipeline_model_parallel_layout is not None:
            found.append(f"stages {parallel.pipeline_model_parallel_layout}")
        return ", ".join(found) or "none"


def sizes_name(sizes: Mapping[str, int | None]) -> str:
    """Parallel sizes in a word, such as `tp8,pp4,vpp2,cp4`. It names EP only above 1."""
    named = {short: size for short, size in sizes.items() if size is not None and (short, size) != ("ep", 1)}
    return ",".join(f"{short}{size}" for short, size in named.items())


def replace_settings(config: Config, **sections: dict[str, Any]) -> Config:
    """Return a copy of the configuration with some keys of some sections changed. The sections are checked again."""
    update = {
        name: type(getattr(config, name)).model_validate(getattr(config, name).model_dump() | values)
        for name, values in sections.items()
    }
    return config.model_copy(update=update)


def parse_sizes(text: str) -> dict[str, int | None]:
    """Read sizes such as `tp=8,pp=4,cp=4,vpp=2`; raises UserError that names the part it cannot read."""
    sizes: dict[str, int | None] = {"tp": 1, "pp": 1, "vpp": None, "cp": 1, "ep": 1, "etp": None}
    stated: set[str] = set()
    for part in text.split(","):
        match = re.fullmatch(r"(tp|pp|vpp|cp|ep|etp)=([1-9][0-9]{0,5})", part)
        if match is None:
            raise UserError(
                f"--explain {text!r}: {part!r} is none of tp=N, pp=N, vpp=N, cp=N, ep=N, etp=N (dp follows from the "
                "number of GPUs)"
            )
        if match[1] in stated:
            raise UserError(f"--explain {text!r}: {match[1]} is stated twice")
        stated.add(match[1])
        sizes[match[1]] = int(match[2])
    return sizes


def candidate_sizes(architecture: ModelShape, gpus: int, gpu: Gpu) -> Iterator[dict[str, int | None]]:
    """All tp, pp, vpp and cp that divide the GPUs, each with the ep and etp that divide the experts and their ranks.

    `check_supported` says later whether the model allows them.
    """
    for tp in _divisors(gpus):
        if tp > gpu.gpus_per_node:
            break
        for pp in _divisors(gpus // tp):
            if pp > architecture.num_layers:
                break
            for vpp in (None, *(range(2, _MAX_MODEL_CHUNKS + 1) if pp > 1 else ())):
                for cp in _divisors(gpus // tp // pp):
                    for experts in _expert_sizes(architecture, tp, gpus // pp):
                        yield {"tp": tp, "pp": pp, "vpp": vpp, "cp": cp} | experts


def _expert_sizes(architecture: ModelShape, tp: int, ranks: int) -> Iterator[dict[str, int | None]]:
    """Experts whole on a rank, or divided like the other layers.

    Args:
        ranks: of a pipeline stage.
    """
    experts = architecture.experts
    for ep in _divisors(1 if experts is None else experts.num_experts):
        if ranks % ep == 0 and ep > 1 and tp > 1:
            yield {"ep": ep, "etp": 1}
        if ranks % (ep * tp) == 0:
            yield {"ep": ep, "etp": None}


def make_layout(config: Config, sizes: dict[str, int | None], gpus: int) -> Layout:
    """The configuration with these sizes; raises UserError if they do not divide the GPUs.

    Its layout of stages stays if it has as many as these sizes, and its hierarchy of context parallelism if it has as
    many ranks.
    """
    parallel: dict[str, Any] = {_SIZE_KEYS[short]: size for short, size in sizes.items()}
    stages = config.parallel.pipeline_model_parallel_layout
    if stages is not None and len(parse_layout(stages)) != (sizes["pp"] or 1) * (sizes["vpp"] or 1):
        parallel["pipeline_model_parallel_layout"] = None
    # Tensor parallelism is never faster or smaller without sequence parallelism, so it always has it.
    parallel |= {"sequence_parallel": None, "cpu_offloading_num_layers": 0}
    hierarchy = config.parallel.hierarchical_context_parallel_sizes
    if hierarchy is None or math.prod(hierarchy) != sizes["cp"]:
        parallel |= _RING
    changed = replace_settings(config, parallel=parallel)
    check_world_size(changed.parallel, gpus)
    return Layout(changed, gpus // changed.parallel.model_parallel_size)


_NOT_KEPT = (
    "pipeline_model_parallel_layout",
    "sequence_parallel",
    "cpu_offloading_num_layers",
    "hierarchical_context_parallel_sizes",
    "cp_comm_type",
)
"""What `make_layout` and the search may replace besides the sizes."""


def left_out(given: Config, layout: Layout) -> list[str]:
    """The keys with values that a configuration states and its layout does not have."""
    fields = type(given.parallel).model_fields
    found = []
    for name in _NOT_KEPT:
        value = getattr(given.parallel, name)
        if value != fields[name].default and value != getattr(layout.config.parallel, name):
            found.append(f"parallel.{name}={as_yaml(value)}")
    return found


def as_yaml(value: Any) -> str:
    """A value as an override states it behind `key=`."""
    return yaml.safe_dump(value, default_flow_style=True, width=math.inf).removesuffix("\n").removesuffix("\n...")


def check_supported(architecture: ModelShape, layout: Layout) -> None:
    """Raise UserError with the first reason why the model does not allow a layout."""
    config = layout.config
    check_layout(architecture, config.parallel)
    if config.has_unshared_packs and not uses_local_layers(config):
        check_exchange_by_heads(architecture, config.parallel)
    check_adapters(architecture, config)
    check_training(architecture, config.parallel, config.optimizer, config.moe)
    check_fp8(architecture, config.model, config.parallel, config.optimizer)


def _exchanges(architecture: ModelShape, config: Config) -> Iterator[dict[str, Any]]:
    """How context-parallel ranks can exchange keys and values: a ring, the config's hierarchy if any, and by heads."""
    found: list[dict[str, Any]] = [_RING]
    if config.parallel.hierarchical_context_parallel_sizes is not None:
        found.append({})
    if config.parallel.context_parallel_size > 1:
        found.append(_BY_HEADS)
    for exchange in found:
        with suppress(UserError):
            check_exchange_by_heads(architecture, replace_settings(config, parallel=exchange).parallel)
            yield exchange


def _recomputation(architecture: ModelShape) -> Iterator[dict[str, Any]]:
    """What layers can compute again. Megatron computes the feed-forward of dense layers again, but not experts."""
    has_dense_layers = architecture.experts is None or not architecture.experts.in_all_layers
    for each in _RECOMPUTE:
        if has_dense_layers or each["recompute_granularity"] != "selective":
            yield each


def layout_variants(architecture: ModelShape, layout: Layout, gpu: Gpu, vary: Sequence[str]) -> list[list[Layout]]:
    """The variants of a layout to try, in rows that differ in precision, traffic and place of the optimizer's state.

    Each entry of a row recomputes more than the one before. It takes less memory and more time. So the first entry
    that fits is the best of its row. The rows have no order: with many packs in a step, moving the optimizer's state
    costs less than recomputing layers.

    Args:
        vary: what may change, of `plan.VARIED`.
    """
    config = layout.config
    can_fp8 = has_fp8(gpu, config.model.fp8_recipe) and config.model.dtype == "bfloat16"
    precisions: list[dict[str, Any]] = [{}]
    if "fp8" in vary and can_fp8:
        # Scales of blocks make up for the small range of e4m3. Their gradients were closer with it: tools/RESULTS.md.
        of_recipe = "e4m3" if config.model.fp8_recipe in ("blockwise", "mxfp8") else "hybrid"
        without = {"fp8": None, "fp8_param": False, "first_last_layers_bf16": False}
        precisions = [without, {"fp8": config.model.fp8 or of_recipe}]
    recompute = list(_recomputation(architecture)) if "recompute" in vary else [{}]
    can_share = replace_settings(config, data={"share_prompts": True}).has_shared_packs
    sharings = [True, False] if "share_prompts" in vary and can_share else [config.data.share_prompts]
    offloads: list[dict[str, Any]] = [{}]
    if "offload" in vary and config.optimizer.use_distributed_optimizer and config.model.dtype == "bfloat16":
        offloads = [{"optimizer_offload_fraction": share} for share in (0.0, 1.0)]
    rows = []
    for precision, sharing, offload in product(precisions, sharings, offloads):
        # Attention gathers the keys of shared prompts itself. If the model allows no exchange, the check says why.
        exchanges = replace_settings(config, data={"share_prompts": sharing}).has_unshared_packs
        choices = list(_exchanges(architecture, config)) if "cp_comm" in vary and exchanges else []
        for exchange in choices or [{}]:
            row = [
                replace_settings(
                    config,
                    model=precision,
                    data={"share_prompts": sharing},
                    parallel=exchange | saver,
                    optimizer=offload,
                )
                for saver in recompute
            ]
            rows.append([Layout(each, layout.data_parallel_size) for each in row])
    return rows


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


@dataclass(frozen=True)
class DistinctRank:
    """A rank that stands for all ranks like it."""

    rank: int
    place: str
    runs_schedule: bool
    """Whether its activations stand for its stage's. The first rank on each axis has most response rows."""


def distinct_ranks(layout: Layout) -> list[DistinctRank]:
    """One rank of each kind, in Megatron's order of ranks (TP, CP, DP, PP).

    Stages differ by what they hold (embedding, number of layers, head). Of the data-parallel and context-parallel
    ranks, the last owns the padding at the buffers' ends. Tensor-parallel ranks are alike.
    """
    parallel = layout.config.parallel
    size = parallel.pipeline_model_parallel_size
    per_stage = layout.gpus // size
    ends = {0: "first stage", size - 1: "last stage"} if size > 1 else {0: "only stage"}
    if parallel.pipeline_model_parallel_layout is None:
        stages = {size // 2: "middle stage"} | ends
    else:
        held = parse_layout(parallel.pipeline_model_parallel_layout)
        kinds = {held[stage::size]: stage for stage in reversed(range(size))}
        stages = {stage: f"stage {stage}" for stage in kinds.values()} | ends
    found = []
    for stage, name in sorted(stages.items()):
        found.append(DistinctRank(stage * per_stage, f"{name}, first shard", True))
        if per_stage > 1:
            found.append(DistinctRank((stage + 1) * per_stage - 1, f"{name}, last shard", False))
    return found


def without_gpu(config: Config) -> Config:
    """The config without FP8, Transformer Engine, DeepEP and state in host memory.

    These need a GPU and change no parameter. With or without DeepEP, a rank receives the same tokens.
    """
    return replace_settings(
        config,
        model={"fp8": None, "fp8_param": False, "first_last_layers_bf16": False, "implementation": "local"},
        optimizer={"optimizer_offload_fraction": 0.0},
        parallel={"cpu_offloading_num_layers": 0, "moe_token_dispatcher_type": "alltoall"},
    )
