"""What a plan says: the length, cost and utilization of a run, as tables for a terminal and as JSON for programs."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from megatron_solopo.architecture.adapters import check_adapters, num_adapter_parameters
from megatron_solopo.architecture.flops import forward_flops
from megatron_solopo.architecture.gpus import Efficiency, check_fp8_of, find_gpu, read_gpus
from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.architecture.layout import check_training, describe_bubble
from megatron_solopo.architecture.pipeline_layout import wrong_letters
from megatron_solopo.config import Config, ParallelConfig, Surroundings, dotted, warning_without_effect
from megatron_solopo.errors import UserError
from megatron_solopo.files import described_bytes
from megatron_solopo.plan import PlanSettings
from megatron_solopo.plan.activations import uses_local_layers
from megatron_solopo.plan.calibration import calibrate_efficiency
from megatron_solopo.plan.disk import checkpoint_bytes, most_checkpoints
from megatron_solopo.plan.layouts import Layout, as_yaml, left_out, make_layout, parse_sizes
from megatron_solopo.plan.memory import GIB, RankCheck
from megatron_solopo.plan.search import LayoutEstimate, Planner, RefusedLayout, SearchResult
from megatron_solopo.plan.startup import WORLDS, StartupCounts
from megatron_solopo.plan.timing import PassTime
from megatron_solopo.plan.workload import read_workload

_HOUR = 3600.0
_ASSUMED_IMBALANCE = 1.5
"""Of the experts, until a run has measured it."""
_OTHER_OBJECTIVE = {"solopo": "long_po", "long_po": "solopo"}
# Overrides always state these keys. They state others only if the plan has changed them.
_ALWAYS_STATED = (
    "parallel.tensor_model_parallel_size",
    "parallel.pipeline_model_parallel_size",
    "parallel.virtual_pipeline_model_parallel_size",
    "parallel.context_parallel_size",
    "parallel.cp_comm_type",
    "parallel.recompute_granularity",
    "model.fp8",
    "optimizer.optimizer_offload_fraction",
)
_STATED_WITH_EXPERTS = ("parallel.expert_model_parallel_size", "parallel.expert_tensor_parallel_size")


@dataclass(frozen=True, eq=False)
class PlannedRun:
    """Training on the whole workload under one layout. Checkpoints and evaluation are not counted."""

    planner: Planner
    estimate: LayoutEstimate
    price: float | None
    """Of one GPU-hour, in any currency."""

    @property
    def layout(self) -> Layout:
        """The layout of the run."""
        return self.estimate.layout

    @property
    def steps(self) -> int:
        """Number of optimizer steps."""
        training = self.layout.config.training
        triplets = training.num_train_epochs * self.planner.workload.num_triplets
        return training.max_steps or -int(-triplets // training.global_batch_size)

    @cached_property
    def reference(self) -> PassTime:
        """The time for scoring every sequence once with the reference model; nothing if the loss needs none."""
        if not self.layout.config.needs_reference:
            return PassTime(0.0, 0.0)
        return self.planner.time_reference(self.layout)

    @property
    def hours(self) -> float:
        """Wall clock, with the reference pass."""
        return (self.steps * self.estimate.time.seconds + self.reference.seconds) / _HOUR

    @property
    def gpu_hours(self) -> float:
        """Hours of all GPUs."""
        return self.hours * self.layout.gpus

    @property
    def cost(self) -> float | None:
        """Cost in the currency of the price; None without a price."""
        return None if self.price is None else self.gpu_hours * self.price

    @cached_property
    def model_flops_utilization(self) -> float:
        """Model FLOPs by true lengths, divided by what the GPUs' bfloat16 peak could do in a step.

        A shared prompt counts once, as the log counts it.
        """
        planner, gpu = self.planner, self.estimate.gpu
        sizes = planner.packer.unpadded_sizes(self.layout.config.data.share_prompts)
        counts = (float(each.sum()) for each in (sizes.tokens, sizes.squares, sizes.response_tokens))
        forward = forward_flops(planner.architecture, *counts)
        flops = forward.of_training(base_learns=planner.config.lora is None)
        return flops / (self.estimate.time.seconds * self.layout.gpus * gpu.bf16_tflops * 1e12)

    @property
    def trained(self) -> str:
        """What the run trains, in words."""
        return _trained(self.layout.config)

    @property
    def overrides(self) -> list[str]:
        """Dotted keys that turn the file of the configuration into this layout's configuration.

        Those of the command line are among them.
        """
        given = dict(dotted(self.planner.config.model_dump(mode="json")))
        of_experts = _STATED_WITH_EXPERTS if self.planner.architecture.experts else ()
        stated = (*_ALWAYS_STATED, *of_experts, *self.planner.stated)
        return [
            f"{key}={as_yaml(value)}"
            for key, value in dotted(self.layout.config.model_dump(mode="json"))
            if value != given[key] or any(f"{key}.".startswith(f"{each}.") for each in stated)
        ]

    @property
    def without_effect(self) -> str | None:
        """What training with the configuration's keys will say of those that change nothing under this layout."""
        config, layout = self.layout.config, self.layout
        given = self.planner.config.parallel
        stated = {name: getattr(given, name) for name in ("cp_comm_type", "hierarchical_context_parallel_sizes")}
        sharing_ranks = layout.data_parallel_size * config.parallel.context_parallel_size
        return warning_without_effect(
            config.model_copy(update={"parallel": config.parallel.model_copy(update=stated)}),
            Surroundings(layout.gpus, sharing_ranks, uses_transformer_engine=not uses_local_layers(config)),
        )

    def host_bytes_per_node(self) -> dict[str, float]:
        """Host memory on the fullest node, beyond the processes themselves, by what takes it.

        Megatron numbers the ranks of one pipeline stage after the other, and a node has consecutive ranks.
        """
        stages, gpus, per_node = self.estimate.stages, self.layout.gpus, self.estimate.gpu.gpus_per_node
        per_stage = gpus // len(stages)
        nodes = [
            [stages[rank // per_stage] for rank in range(first, min(first + per_node, gpus))]
            for first in range(0, gpus, per_node)
        ]
        return {
            "optimizer": max(sum(stage.host for stage in node) for node in nodes),
            "save": max(sum(stage.save_host for stage in node) for node in nodes),
            "resume": max(sum(stage.resume_host for stage in node) for node in nodes),
        }

    def as_json(self) -> dict[str, Any]:
        """All figures, in bytes and seconds."""
        estimate, time = self.estimate, self.estimate.time
        return {
            "objective": _objectives(self.planner.config),
            "trained": self.trained,
            "layout": self.layout.sizes,
            "savers": self.layout.savers,
            "gpus": self.layout.gpus,
            "fits": estimate.excess_gib <= 0,
            "memory_bytes": [
                {"pipeline_rank": stage.pipeline_rank, "total": stage.total, "host": stage.host}
                | {"packs_in_flight": stage.packs_in_flight}
                | stage.parts
                for stage in estimate.stages
            ],
            "host_bytes_per_node": self.host_bytes_per_node(),
            "checkpoint_bytes": self.checkpoint_bytes,
            "most_checkpoints": most_checkpoints(self.layout.config, self.steps),
            "step_seconds": time.seconds,
            "busiest_stage_seconds": time.compute.parts,
            "pipeline_seconds": time.timeline.seconds,
            "pipeline_bubble": time.timeline.bubble,
            "data_traffic_seconds": time.data_traffic.exposed,
            "hidden_data_traffic_seconds": time.data_traffic.hidden,
            "optimizer_seconds": time.optimizer,
            "triplets_per_second": estimate.triplets_per_second,
            "mfu": self.model_flops_utilization,
            "pad_waste": estimate.batch.pad_waste,
            "balance": estimate.batch.balance,
            "packs": estimate.batch.num_packs,
            "steps": self.steps,
            "reference_seconds": self.reference.seconds,
            "reference_bubble": self.reference.bubble,
            "hours": self.hours,
            "gpu_hours": self.gpu_hours,
            "cost": self.cost,
            "overrides": self.overrides,
            "left_out": left_out(self.planner.config, self.layout),
            "without_effect": self.without_effect,
        }

    def explanation(self) -> str:
        """The layout in full: memory by stage and part, time by what takes it, packing, the run."""
        estimate, layout, gpu, batch = self.estimate, self.layout, self.estimate.gpu, self.estimate.batch
        over = estimate.excess_gib
        excess = f"does NOT fit: {_figure(over, 1)} GiB over {gpu.memory_gib}"
        fits = f"fits into {gpu.memory_gib} GiB" if over <= 0 else excess
        memory = [
            {"rank": str(stage.pipeline_rank)}
            | {name: _figure(size / GIB, 2) for name, size in stage.parts.items()}
            | {"total": _figure(stage.total / GIB, 2), "host": _figure(stage.host / GIB, 2)}
            for stage in estimate.stages
        ]
        cost = "" if self.cost is None else f", cost {_figure(self.cost, 0)}"
        waiting = f" (pipeline stages wait {self.reference.bubble:.1%})" if self.reference.bubble else ""
        lines = [
            f"{layout.name} on {layout.gpus} x {gpu.device_name}; settings: {layout.savers}",
            f"{fits}; pipeline rank {estimate.fullest.pipeline_rank} is the fullest; "
            f"packs in flight there: {estimate.fullest.packs_in_flight}",
            "",
            "Memory, GiB per GPU of each pipeline rank",
            _table(memory),
            self._host_line(),
            self._disk_line(),
            "",
            "Step, seconds",
            *self._time_lines(),
            "",
            f"Packing: {batch.num_packs} packs of {batch.num_triplets} triplets, {batch.pad_waste:.2%} padding, "
            f"balance {batch.balance:.3f} (1: all ranks have equal work)",
            f"Run: {self.steps:,} steps, {_figure(self.hours, 2)} h with a reference pass of "
            f"{_figure(self.reference.seconds / _HOUR, 2)} h{waiting}, {_figure(self.gpu_hours, 0)} GPU-hours{cost} "
            "(without checkpoints and evaluation)",
            f"Overrides: {shlex.join(self.overrides)}",
        ]
        if self.without_effect is not None:
            lines.insert(1, self.without_effect)
        if left := left_out(self.planner.config, self.layout):
            lines.insert(1, f"note: {layout.name} leaves out {', '.join(left)}, which the configuration states")
        return "\n".join(lines)

    def _host_line(self) -> str:
        found = {name: _figure(size / GIB, 1) for name, size in self.host_bytes_per_node().items()}
        return (
            f"Host memory, GiB on the fullest node: optimizer state {found['optimizer']}; "
            f"a save {found['save']}, which async_save keeps; a resume {found['resume']}"
        )

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one checkpoint on disk."""
        return checkpoint_bytes(self.layout.config, self.planner.architecture)

    def _disk_line(self) -> str:
        keep_last, one = self.layout.config.checkpoint.keep_last, self.checkpoint_bytes
        most = most_checkpoints(self.layout.config, self.steps)
        if most is None:
            return f"Disk: {described_bytes(one)} per checkpoint; checkpoint.keep_last=null keeps all"
        return (
            f"Disk: {described_bytes(one)} per checkpoint, {described_bytes(most * one)} for {most} at once "
            f"(checkpoint.keep_last={json.dumps(keep_last)}, and the one that is being written)"
        )

    def _time_lines(self) -> list[str]:
        time = self.estimate.time
        absent = () if self.planner.architecture.experts else ("expert_traffic",)
        parts = {name: seconds for name, seconds in time.compute.parts.items() if name not in absent}
        busiest = ", ".join(f"{name} {_figure(seconds, 3)}" for name, seconds in parts.items())
        return [
            f"  busiest pipeline rank, all packs: {busiest}",
            f"  pipeline {_figure(time.timeline.seconds, 3)}: {describe_bubble(time.timeline.bubble)}",
            f"  gradient reduction and parameter gather {_figure(time.data_traffic.exposed, 3)}, and "
            f"{_figure(time.data_traffic.hidden, 3)} beside computation; optimizer {_figure(time.optimizer, 3)}",
            f"  whole step {_figure(time.seconds, 3)}: {_figure(self.estimate.triplets_per_second, 3)} triplets/s",
        ]

    def figures(self) -> dict[str, str]:
        """The most important figures for a table, by the column's title."""
        estimate = self.estimate
        found = {
            "step s": _figure(estimate.time.seconds, 2),
            "triplets/s": _figure(estimate.triplets_per_second, 3),
            "MFU": f"{self.model_flops_utilization:.0%}",
            "bubble": f"{estimate.time.timeline.bubble:.0%}",
            "GiB": _figure(estimate.fullest.total / GIB, 1),
            "reference h": _figure(self.reference.seconds / _HOUR, 2),
            "hours": _figure(self.hours, 2),
            "GPU-hours": _figure(self.gpu_hours, 0),
        }
        return found if self.cost is None else found | {"cost": _figure(self.cost, 0)}


@dataclass(frozen=True, eq=False)
class Unplanned:
    """A choice for which no layout fits."""

    trained: str
    """What it would train."""
    nearest: RefusedLayout

    @property
    def reason(self) -> str:
        """Why not, in a line."""
        return f"no layout fits; {self.nearest.name}: {self.nearest.reason}"

    def as_json(self) -> dict[str, Any]:
        """The layout that comes closest."""
        return {"trained": self.trained, "fits": False, "nearest": vars(self.nearest)}


@dataclass(frozen=True, eq=False)
class PlanAnswer:
    """Everything that a plan says."""

    search: SearchResult
    best: Sequence[PlannedRun]
    """The layouts to list, the fastest first."""
    chosen: PlannedRun
    """The layout to show in full."""
    other: PlannedRun | None
    """The other objective's best layout, if that is to be compared."""
    other_weights: PlannedRun | Unplanned | None = None
    """The best layout that trains adapters where `chosen` trains the whole model, or the other way round, if asked."""
    rank_checks: Sequence[RankCheck] = ()
    """The result of the dry run."""
    startup: Sequence[StartupCounts] | str = ()
    """What a start costs one rank in worlds of several sizes, or why it was not counted."""

    def as_text(self) -> str:
        """Tables for a terminal."""
        planner, model = self.chosen.planner, self.chosen.planner.architecture
        active, routes = "", ""
        if model.experts is not None:
            active = f", {model.num_active_parameters:,} active"
            routes = f"routes: the fullest expert gets {model.experts.load_max_over_mean:g} x the mean\n"
        if (lora := planner.config.lora) is not None:
            routes += f"trains {self.chosen.trained}: {num_adapter_parameters(model, lora):,} parameters\n"
        parts = [
            f"{model.model_type}, {model.num_parameters:,} parameters{active}, {planner.config.model.dtype}\n{routes}"
            f"lengths: {planner.workload.source}; objective {_objectives(planner.config)}\n"
            f"efficiencies: {planner.efficiency.source}"
        ]
        if self.best:
            ranking = _table(
                {"layout": f"{place}. {run.layout.name}"} | run.figures() | {"settings": run.layout.savers}
                for place, run in enumerate(self.best, 1)
            )
            fitting, refused = self.search.num_fitting, len(self.search.refused)
            parts.append(f"{fitting} layouts fit, {refused} do not (--why-not); the best:\n{ranking}")
        parts.append(self.chosen.explanation())
        if self.other is not None:
            objectives = (
                {"objective": run.planner.config.objective.name}
                | run.figures()
                | {"layout": f"{run.layout.name}; {run.layout.savers}"}
                for run in (self.chosen, self.other)
            )
            parts.append(_table(objectives))
        if self.other_weights is not None:
            parts.append(self._both_weights(self.other_weights))
        if self.rank_checks:
            parts += [_dry_run_text(self.rank_checks), startup_text(self.startup)]
        return "\n\n".join(parts)

    def _both_weights(self, other: PlannedRun | Unplanned) -> str:
        """Adapters and the whole model side by side, or in a line why one of them does not fit."""
        runs = [run for run in (self.chosen, other) if isinstance(run, PlannedRun)]
        table = _table(
            {"trained": run.trained}
            | run.figures()
            | {
                "host GiB": _figure(run.host_bytes_per_node()["optimizer"] / GIB, 1),
                "checkpoint": described_bytes(run.checkpoint_bytes),
                "layout": f"{run.layout.name}; {run.layout.savers}",
            }
            for run in runs
        )
        return table if isinstance(other, PlannedRun) else f"{table}\n{other.trained}: {other.reason}"

    def as_json(self) -> str:
        """The same for programs, with every refused layout: one JSON object."""
        planner, experts = self.chosen.planner, self.chosen.planner.architecture.experts
        found = {
            "model_parameters": planner.architecture.num_parameters,
            "active_parameters": planner.architecture.num_active_parameters,
            "expert_imbalance": None if experts is None else experts.load_max_over_mean,
            "gpu": planner.gpu.model_dump(),
            "efficiency": planner.efficiency.model_dump(),
            "reserve": planner.reserve.model_dump(),
            "chosen": self.chosen.as_json(),
            "other_objective": None if self.other is None else self.other.as_json(),
            "other_weights": None if self.other_weights is None else self.other_weights.as_json(),
            "ranking": [run.as_json() for run in self.best],
            "num_fitting": self.search.num_fitting,
            "refused": [vars(each) for each in self.search.refused],
            "dry_run": [check.as_json() for check in self.rank_checks],
            "startup": self.startup if isinstance(self.startup, str) else [each.as_json() for each in self.startup],
        }
        return json.dumps(found, indent=2, allow_nan=False)


def _trained(config: Config) -> str:
    return "the whole model" if config.lora is None else f"adapters of rank {config.lora.rank}"


def _figure(value: float, decimals: int) -> str:
    """A number with some decimals, or with two significant digits where they would show fewer. Zero is 0."""
    if 0 < abs(value) < 10.0 ** (1 - decimals):
        return f"{value:.2g}"
    return f"{value:,.{decimals}f}" if value else "0"


def _dry_run_text(checks: Sequence[RankCheck]) -> str:
    title = (
        "Dry run: bytes that Megatron-Core allocates on each kind of rank, compared with the estimate.\n"
        "Saved: what autograd keeps during the schedule, with plain PyTorch layers, and the estimate for those."
    )
    rows = [
        {
            "rank": str(check.rank),
            "place": check.place,
            "elements": f"{check.num_parameters:,}",
            **{name: f"{size:,}" for name, size in check.built.items()},
            "estimate": check.difference or "equal",
            "saved GiB": "" if check.saved_bytes is None else _figure(check.saved_bytes / GIB, 2),
            "estimated": "" if check.estimated_saved_bytes is None else _figure(check.estimated_saved_bytes / GIB, 2),
            "s": _figure(check.seconds, 1),
        }
        for check in checks
    ]
    return f"{title}\n{_table(rows)}"


def startup_text(counts: Sequence[StartupCounts] | str) -> str:
    """A table of the counts, or why there are none."""
    if isinstance(counts, str):
        return f"Start-up: not counted: {counts}"
    if not counts:
        return f"Start-up: not counted: no world of {', '.join(map(str, WORLDS))} ranks is a multiple of this layout"
    title = (
        "Start-up: what one rank other than rank 0 opens, reads and exchanges until its weights are loaded, in this "
        "layout"
    )
    return f"{title}\n{_table(each.figures() for each in counts)}"


def _table(rows: Iterable[Mapping[str, str]]) -> str:
    """Align the columns. The first and the last hold text and are aligned left, the others are aligned right."""
    rows = list(rows)
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = []
    for line in lines:
        first, *middle, last = line
        numbers = (cell.rjust(width) for cell, width in zip(middle, widths[1:-1], strict=True))
        aligned.append("  ".join((first.ljust(widths[0]), *numbers, last)).rstrip())
    return "\n".join(aligned)


def make_planner(config: Config, settings: PlanSettings, stated: Sequence[str] = ()) -> Planner:
    """Read the GPU's figures, the lengths, the model's config.json and, if given, the calibration.

    Args:
        stated: see `Planner`.
    """
    gpu = find_gpu(settings.gpu, read_gpus(settings.gpu_file))
    workload = read_workload(config, settings.tokens, settings.triplets)
    gpus = settings.gpus
    if gpus > gpu.gpus_per_node and gpus % gpu.gpus_per_node:
        raise UserError(f"--gpus {gpus}: must be a multiple of {gpu.gpus_per_node}, the GPUs of one node")
    check_fp8_of(gpu, config.model)
    efficiency = Efficiency() if settings.calibration is None else calibrate_efficiency(settings.calibration, gpu)
    architecture = read_architecture(config.model.path)
    if architecture.experts is not None:
        load = settings.expert_imbalance or _ASSUMED_IMBALANCE
        architecture = replace(architecture, experts=replace(architecture.experts, load_max_over_mean=load))
    elif settings.expert_imbalance is not None:
        raise UserError(
            f"--expert-imbalance {settings.expert_imbalance:g}: needs a model with experts; {architecture.model_type} "
            "has none; leave it out"
        )
    # What no layout changes is told once, and not as the fault of each.
    check_training(architecture, ParallelConfig(), config.optimizer, config.moe)
    check_adapters(architecture, config.model_copy(update={"parallel": ParallelConfig()}))
    stages = config.parallel.pipeline_model_parallel_layout
    if stages is not None and (wrong := wrong_letters(architecture.num_layers, stages)):
        raise UserError(f"parallel.pipeline_model_parallel_layout={stages} {wrong}; set it to null, or correct it")
    planner = Planner(architecture, config, workload, gpu, gpus, efficiency, vary=settings.vary, stated=stated)
    read = [
        source.config.objective.roles.all
        + (source.config.reference_roles if source.config.objective.needs_reference else ())
        for source in config.sources
    ]
    if (longest := workload.longest(read)) > architecture.max_sequence_length:
        raise UserError(
            f"{workload.source}: sequences of up to {longest:,} tokens, but the model {config.model.path} has "
            f"{architecture.max_sequence_length:,} positions; shorten them, or extend the model in its config.json "
            "(rope_parameters, max_position_embeddings)"
        )
    if (largest := workload.largest_token_id or 0) >= architecture.vocab_size:
        raise UserError(
            f"{workload.source}: holds the token id {largest}, but the model {config.model.path} has embeddings for "
            f"ids up to {architecture.vocab_size - 1}; prepare the data with the model's own tokenizer"
        )
    return planner


def make_answer(planner: Planner, search: SearchResult, settings: PlanSettings) -> PlanAnswer:
    """Choose a layout and compare it with the other objective; raises UserError if no layout fits.

    With `lora` among what varies, adapters and the whole model are compared. The configuration says which of the two is
    shown in full, unless only the other one fits.
    """
    if "lora" not in settings.vary:
        return _answer_of(planner, search, settings)
    other = planner.for_other_weights()
    other_weights: PlannedRun | Unplanned
    if settings.explain is not None:
        try:
            layout = make_layout(other.config, parse_sizes(settings.explain), other.gpus)
            other_weights = PlannedRun(other, other.best_variant(layout), settings.price)
        except UserError as error:  # the layout that is shown may still be legal
            nearest = RefusedLayout(settings.explain, str(error), None)
            other_weights = Unplanned(_trained(other.config), nearest)
        return replace(_answer_of(planner, search, settings), other_weights=other_weights)
    both = [(planner, search), (other, other.search())]
    if not search.ranked:
        both.sort(key=lambda pair: not pair[1].ranked)
    (shown, found), (compared, ranked) = both
    if ranked.ranked:
        other_weights = PlannedRun(compared, ranked.ranked[0], settings.price)
    else:
        other_weights = Unplanned(_trained(compared.config), ranked.nearest)
    return replace(_answer_of(shown, found, settings), other_weights=other_weights)


def _objectives(config: Config) -> str:
    """The names of the objectives of all sources."""
    return ", ".join(dict.fromkeys(source.config.objective.name for source in config.sources))


def _answer_of(planner: Planner, search: SearchResult, settings: PlanSettings) -> PlanAnswer:
    def planned(planner: Planner, estimate: LayoutEstimate) -> PlannedRun:
        return PlannedRun(planner, estimate, settings.price)

    best = [planned(planner, estimate) for estimate in search.ranked[: settings.top]]
    if settings.explain is not None:
        layout = make_layout(planner.config, parse_sizes(settings.explain), planner.gpus)
        return PlanAnswer(search, best, planned(planner, planner.best_variant(layout)), None)
    if not best:
        nearest = search.nearest
        advice = "" if nearest.excess_gib is None else "; take more GPUs, shorter contexts or GPUs with more memory"
        raise UserError(
            f"no layout fits on {planner.gpus} x {planner.gpu.device_name}; {nearest.name}: {nearest.reason}{advice} "
            "(--why-not lists all reasons)"
        )
    other = None
    name = _OTHER_OBJECTIVE.get(planner.config.objective.name)
    if name is not None and planner.config.data.sources is None:
        other_planner = planner.for_objective(name)
        ranked = other_planner.search().ranked
        other = planned(other_planner, ranked[0]) if ranked else None
    return PlanAnswer(search, best, best[0], other)
