"""What the command `plan` does, step by step: read, choose, compare, tell."""

import json
from collections.abc import Sequence
from pathlib import Path

from megatron_solopo.architecture.huggingface import read_architecture
from megatron_solopo.config import Config
from megatron_solopo.plan import report
from megatron_solopo.plan.calibration import calibrated
from megatron_solopo.plan.efficiency import Efficiency
from megatron_solopo.plan.gpus import Gpu
from megatron_solopo.plan.layouts import make_layout
from megatron_solopo.plan.plan import as_json
from megatron_solopo.plan.proof import Proof
from megatron_solopo.plan.search import Estimate, Planner, Search
from megatron_solopo.plan.workload import Workload, prepared_workload, stated_workload


def parse_sizes(text: str) -> dict[str, int | None]:
    """`tp=8,pp=4,cp=4,vpp=2` -> sizes; raises ValueError naming the part that is none."""
    sizes: dict[str, int | None] = {"tp": 1, "pp": 1, "vpp": None, "cp": 1}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in sizes or not value.isdigit() or not int(value):
            raise ValueError(f"--explain {text!r}: {part!r} is none of tp=N, pp=N, vpp=N, cp=N")
        sizes[name] = int(value)
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
    efficiency = Efficiency() if calibration is None else calibrated(calibration, gpu)
    architecture = read_architecture(config.model.path)
    return Planner(architecture, config, workload, gpu, gpus, efficiency, vary=vary)


def choose(planner: Planner, search: Search, explain: str | None) -> Estimate:
    """The layout asked for, or the best; raises ValueError if there is none."""
    if explain is not None:
        return planner.best_of(make_layout(planner.config, parse_sizes(explain), planner.gpus))
    if not search.ranked:
        nearest = search.nearest
        raise ValueError(
            f"no layout fits on {planner.gpus} x {planner.gpu.device_name}; {nearest.name}: {nearest.reason}; "
            "take more GPUs, shorter contexts or a smaller training.global_batch_size (--why-not lists all reasons)"
        )
    return search.ranked[0]


def beside(planner: Planner, search: Search) -> tuple[Planner, Estimate] | None:
    """The best layout of the usual method where the config says solopo (and the other way round), or None.

    It is looked for among the best layouts of the config's own objective; among all, where none of them fits.
    """
    name = {"solopo": "long_po", "long_po": "solopo"}.get(planner.config.objective.name)
    if name is None:
        return None
    other = planner.for_objective(name)
    ranked = other.search([estimate.layout for estimate in search.ranked]).ranked or other.search().ranked
    return (other, ranked[0]) if ranked else None


def as_text(
    planner: Planner,
    search: Search,
    chosen: Estimate,
    vanilla: tuple[Planner, Estimate] | None,
    proofs: Sequence[Proof],
    *,
    price: float | None,
    top: int,
) -> str:
    """Tables for a terminal."""
    a = planner.architecture
    parts = [
        f"{a.model_type}, {a.num_parameters:,} parameters, {planner.config.model.dtype}\n"
        f"lengths: {planner.workload.source}; objective {planner.config.objective.name}\n"
        f"efficiencies: {planner.efficiency.source}"
    ]
    if search.ranked:
        counts = f"{search.num_fitting} layouts fit, {len(search.refused)} do not (--why-not); the best:"
        parts.append(f"{counts}\n{report.ranking(search.ranked[:top], planner, price)}")
    parts.append(report.explanation(chosen, planner, price))
    if vanilla is not None:
        parts.append(report.comparison(chosen, planner, vanilla[1], vanilla[0], price))
    if proofs:
        title = (
            "Dry run: bytes that Megatron-Core allocates on the ranks that differ; "
            "what autograd keeps in its schedule\n(saved) is with plain PyTorch layers, beside the estimate for those"
        )
        parts.append(f"{title}\n{report.proofs(proofs)}")
    return "\n\n".join(parts)


def as_json_text(
    planner: Planner,
    search: Search,
    chosen: Estimate,
    vanilla: tuple[Planner, Estimate] | None,
    proofs: Sequence[Proof],
    *,
    price: float | None,
    top: int,
) -> str:
    """The same for machines: one object."""
    found = {
        "model_parameters": planner.architecture.num_parameters,
        "gpu": planner.gpu.model_dump(),
        "efficiency": planner.efficiency.model_dump(),
        "reserve": planner.reserve.model_dump(),
        "chosen": as_json(chosen, planner, price),
        "vanilla": None if vanilla is None else as_json(vanilla[1], vanilla[0], price),
        "ranking": [as_json(each, planner, price) for each in search.ranked[:top]],
        "num_fitting": search.num_fitting,
        "refused": [vars(each) for each in search.refused],
        "dry_run": [proof.as_json() for proof in proofs],
    }
    return json.dumps(found, indent=2)
