"""What the command `plan` does, step by step: read, choose, compare, tell."""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_solopo.architecture.plain import read_shape
from megatron_solopo.config import Config
from megatron_solopo.plan import report
from megatron_solopo.plan.calibration import calibrated
from megatron_solopo.plan.efficiency import Efficiency
from megatron_solopo.plan.gpus import Gpu, check_fp8_of
from megatron_solopo.plan.layouts import make_layout
from megatron_solopo.plan.plan import as_json
from megatron_solopo.plan.proof import Proof
from megatron_solopo.plan.search import Estimate, Planner, Search
from megatron_solopo.plan.workload import Workload, prepared_workload, stated_workload


def parse_sizes(text: str) -> dict[str, int | None]:
    """`tp=8,pp=4,cp=4,vpp=2` -> sizes; raises ValueError naming the part that is none."""
    sizes: dict[str, int | None] = {"tp": 1, "pp": 1, "vpp": None, "cp": 1}
    stated = [re.fullmatch(r"(tp|pp|vpp|cp)=([1-9][0-9]{0,5})", part) for part in text.split(",")]
    for match, part in zip(stated, text.split(","), strict=True):
        if match is None:
            raise ValueError(f"--explain {text!r}: {part!r} is none of tp=N, pp=N, vpp=N, cp=N (dp is what they leave)")
        sizes[match[1]] = int(match[2])
    if len({match[1] for match in stated if match}) < len(stated):
        raise ValueError(f"--explain {text!r}: a size is stated twice")
    return sizes


def read_workload(config: Config, tokens: str | None, triplets: int) -> Workload:
    """Lengths as stated, or those of the prepared data."""
    if tokens is not None:
        return stated_workload(tokens, triplets, sample=4 * config.training.global_batch_size)
    try:
        return prepared_workload(config.data.path)
    except ValueError as error:
        raise ValueError(f"{error}; or state the lengths with --tokens") from None


def make_planner(
    config: Config, workload: Workload, gpu: Gpu, gpus: int, vary: Sequence[str], calibration: Path | None
) -> Planner:
    """Read the model's config.json and, if given, the calibration."""
    if gpus > gpu.gpus_per_node and gpus % gpu.gpus_per_node:
        raise ValueError(f"--gpus {gpus}: more than a node of {gpu.gpus_per_node}, so it must be a multiple of that")
    check_fp8_of(gpu, config.model)
    efficiency = Efficiency() if calibration is None else calibrated(calibration, gpu)
    architecture = read_shape(config.model.path)
    planner = Planner(architecture, config, workload, gpu, gpus, efficiency, vary=vary)
    if (longest := workload.longest(planner.packer.roles)) > architecture.max_sequence_length:
        raise ValueError(
            f"{workload.source}: sequences of up to {longest:,} tokens, but the model {config.model.path} has "
            f"{architecture.max_sequence_length:,} positions; shorten them, or extend the model in its config.json "
            "(rope_parameters, max_position_embeddings)"
        )
    return planner


def choose(planner: Planner, search: Search, explain: str | None) -> Estimate:
    """The layout asked for, or the best; raises ValueError if there is none."""
    if explain is not None:
        return planner.best_of(make_layout(planner.config, parse_sizes(explain), planner.gpus))
    if not search.ranked:
        nearest = search.nearest
        advice = "" if nearest.excess_gib is None else "; take more GPUs, shorter contexts or GPUs with more memory"
        raise ValueError(
            f"no layout fits on {planner.gpus} x {planner.gpu.device_name}; {nearest.name}: {nearest.reason}{advice} "
            "(--why-not lists all reasons)"
        )
    return search.ranked[0]


def beside(planner: Planner) -> tuple[Planner, Estimate] | None:
    """The best layout of the usual method where the config says solopo (and the other way round), or None."""
    name = {"solopo": "long_po", "long_po": "solopo"}.get(planner.config.objective.name)
    if name is None:
        return None
    other = planner.for_objective(name)
    ranked = other.search().ranked
    return (other, ranked[0]) if ranked else None


@dataclass(frozen=True, eq=False)
class Answer:
    """Everything that a plan tells."""

    planner: Planner
    search: Search
    chosen: Estimate
    other: tuple[Planner, Estimate] | None
    """The other objective's best layout."""
    proofs: Sequence[Proof]
    """Of the dry run, if any."""
    price: float | None
    """Of one GPU-hour."""
    top: int
    """Layouts to list."""

    @property
    def text(self) -> str:
        """Tables for a terminal."""
        planner, search, price = self.planner, self.search, self.price
        model = planner.architecture
        parts = [
            f"{model.model_type}, {model.num_parameters:,} parameters, {planner.config.model.dtype}\n"
            f"lengths: {planner.workload.source}; objective {planner.config.objective.name}\n"
            f"efficiencies: {planner.efficiency.source}"
        ]
        if search.ranked:
            counts = f"{search.num_fitting} layouts fit, {len(search.refused)} do not (--why-not); the best:"
            parts.append(f"{counts}\n{report.ranking(search.ranked[: self.top], planner, price)}")
        parts.append(report.explanation(self.chosen, planner, price))
        if self.other is not None:
            parts.append(report.comparison((planner, self.chosen), self.other, price))
        if self.proofs:
            parts.append(report.proofs(self.proofs))
        return "\n\n".join(parts)

    @property
    def json(self) -> str:
        """The same for machines: one object."""
        planner, price = self.planner, self.price
        found = {
            "model_parameters": planner.architecture.num_parameters,
            "gpu": planner.gpu.model_dump(),
            "efficiency": planner.efficiency.model_dump(),
            "reserve": planner.reserve.model_dump(),
            "chosen": as_json(self.chosen, planner, price),
            "other_objective": None if self.other is None else as_json(self.other[1], self.other[0], price),
            "ranking": [as_json(each, planner, price) for each in self.search.ranked[: self.top]],
            "num_fitting": self.search.num_fitting,
            "refused": [vars(each) for each in self.search.refused],
            "dry_run": [proof.as_json() for proof in self.proofs],
        }
        return json.dumps(found, indent=2)
