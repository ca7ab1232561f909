"""Trains on N ranks, case by case, and hands back what a plain run can be compared with."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.checkpoint.adapter_mapping import adapter_rules
from megatron_solopo.checkpoint.load import global_parameters
from megatron_solopo.checkpoint.mapping import rules
from megatron_solopo.config import Config, LoRAConfig, ObjectiveConfig, Role, parse_config
from megatron_solopo.data.packing import Pack, SourceRows, TokenizedTriplet, build_mixed_pack
from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.objective import metric_names
from megatron_solopo.parallel import topology
from megatron_solopo.parallel.megatron_internals import replica_group
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train.metric_table import MetricTable
from megatron_solopo.train.policy import Policy, build_policy, load_frozen
from megatron_solopo.train.reference import for_policy
from megatron_solopo.train.state import Metrics
from megatron_solopo.train.step import ReferenceLogprobs, SourceLoss, logprob_report, mixture_loss, run_schedule
from tests.conversions import join_shards
from tests.parity.plain import Row
from tests.tiny_models import adapter_folder

LEARNING_RATE = 1e-3
# Large: with the usual 1e-8, Adam's first update is the gradient's sign, and where a gradient is
# zero but for rounding (a key bias), that sign is noise.
ADAM_EPS = 1e-2
# Data-parallel rank -> packs -> positions in a global batch of four triplets.
Plan = Sequence[Sequence[Sequence[int]]]
PACKED: Plan = [[[0, 2], [1, 3]]]
ONE_PACK: Plan = [[[0, 1, 2, 3]]]
UNPACKED: Plan = [[[0], [1], [2], [3]]]
UNEVEN: Plan = [[[3], [0, 1, 2]]]
ONE_EACH: Plan = [[[0]], [[1]], [[2]], [[3]]]
TWO_RANKS: Plan = [[[0, 2]], [[1, 3]]]
TWO_BY_TWO: Plan = [[[0], [2]], [[1], [3]]]
TWO_RANKS_UNEVEN: Plan = [[[1]], [[3, 0, 2]]]


@dataclass(frozen=True)
class Layout:
    """One way to run the same training."""

    name: str
    plan: Plan = field(default_factory=lambda: PACKED)
    parallel: Mapping[str, Any] = field(default_factory=dict)
    distributed_optimizer: bool = False
    """With it, a rank's gradient buffer holds its own shard only: whole gradients cannot be compared."""
    chunk_tokens: int = 1024
    pack_multiple: int = 1
    share_prompts: bool = True
    model: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    moe: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Case:
    """One training run: a model family, a reference model, an objective, a layout."""

    family: str
    objective: Mapping[str, Any]
    layout: Layout
    reference: str = "reference"
    """Folder of the reference weights; `policy` for the policy's own."""
    reference_context: str | None = None
    """As `reference.context`."""
    mixture: tuple[str, ...] = ()
    """`objective.name` of each row of a batch. Rows with the same name are a source. Empty: that of the objective."""
    steps: int = 2
    """Of the optimizer."""

    @property
    def trains_routers(self) -> bool:
        """Whether the routers of experts learn, too."""
        return bool(self.layout.moe.get("router_trainable"))

    @property
    def lora(self) -> LoRAConfig | None:
        """The adapters that are trained, if any."""
        return None if self.layout.lora is None else LoRAConfig(**self.layout.lora)

    def adapter(self, policy: Path) -> Path | None:
        """The PEFT directory to start from, beside the policy's weights."""
        return None if self.lora is None else adapter_folder(policy, self.lora)

    @property
    def name(self) -> str:
        settings = "-".join(str(value) for value in self.objective.values() if isinstance(value, str))
        adapted = "" if self.lora is None else f"-rank{self.lora.rank}"
        shared = "" if self.layout.share_prompts else "-unshared"
        context = "" if self.reference_context is None else f"-{self.reference_context}"
        mixed = "-mixture" if self.mixture else ""
        return f"{self.family}-{settings}-{self.layout.name}{shared}{adapted}-{self.reference}{context}{mixed}"

    @property
    def sources(self) -> dict[str, ObjectiveConfig]:
        """The objective of each source, by its name."""
        objective = ObjectiveConfig(**self.objective)
        return {name: objective.model_copy(update={"name": name}) for name in self.mixture or (objective.name,)}

    @property
    def metrics(self) -> MetricTable:
        """The metrics that a rank's report holds."""
        return MetricTable(
            [(name if self.mixture else "", metric_names(objective)) for name, objective in self.sources.items()]
        )


@dataclass
class RankResult:
    """What one rank saw of one case."""

    is_counted: bool
    """Whether this rank's metrics enter the sum over ranks (one rank per data-parallel replica)."""
    grad_norms: list[float] = field(default_factory=list)
    routing: list[dict[str, float]] = field(default_factory=list)
    """Per step, the metrics of routers."""
    metric_sums: list[Tensor] = field(default_factory=list)
    """Per step, fp64 [M]: this rank's sums over triplets; zeros on ranks without the loss."""
    gradients: "Shards" = field(default_factory=dict)
    """Of the first step."""
    parameters: "Shards" = field(default_factory=dict)
    """After the last step."""


Shards = dict[str, tuple[int, Tensor]]
"""By Megatron name in the mapping table: this rank's number in the tensor-parallel group, and its shard.

A shard is there only in the first of the replicas that hold it.
"""


def run_cases(models: Path, cases: Sequence[Case], batches: Sequence[Sequence[Row]]) -> dict[str, RankResult]:
    """Runs on every rank: each case in turn, one optimizer step per batch, always from the same weights."""
    return {case.name: run_case(models / case.family, case, batches[: case.steps]) for case in cases}


def run_case(models: Path, case: Case, batches: Sequence[Sequence[Row]]) -> RankResult:
    """One case on this rank."""
    config = make_config(models / "policy", case.objective, case.layout, case.adapter(models / "policy"))
    reference = config.reference.model_copy(update={"context": case.reference_context})
    config = config.model_copy(update={"reference": reference})
    groups = topology.initialize(config.parallel, seed=1)
    try:
        return _train(config, groups, case, models / case.reference, batches)
    finally:
        topology.destroy(groups)


def make_config(model: Path, objective: Mapping[str, Any], layout: Layout, adapter: Path | None = None) -> Config:
    """A whole config, of which the model, objective, parallel and optimizer sections matter here."""
    return parse_config(
        {
            "run_dir": "unused",
            "model": {"path": model, "adapter": adapter} | dict(layout.model),
            "data": {"path": "unused", "max_tokens_per_pack": 100_000, "share_prompts": layout.share_prompts},
            "training": {"global_batch_size": 4},
            "objective": dict(objective),
            "parallel": dict(layout.parallel),
            "optimizer": {
                "lr": LEARNING_RATE,
                "lr_decay_style": "constant",
                "adam_eps": ADAM_EPS,
                "clip_grad": 0.0,
                "use_distributed_optimizer": layout.distributed_optimizer,
            }
            | dict(layout.optimizer),
            "moe": dict(layout.moe),
            "lora": layout.lora,
            "logprob": {"chunk_tokens": layout.chunk_tokens},
        },
        source="test",
    )


def _train(
    config: Config, groups: Topology, case: Case, reference: Path, batches: Sequence[Sequence[Row]]
) -> RankResult:
    layout, sources = case.layout, list(case.sources.values())
    roles = {number: objective.roles.all for number, objective in enumerate(sources)}
    names = case.mixture or (config.objective.name,) * len(batches[0])
    numbers = [list(case.sources).index(name) for name in names]
    packs = [mixed_packs(batch, number, layout, roles, numbers, groups) for number, batch in enumerate(batches)]
    judged = []
    for objective in sources:
        references, own = None, config.model_copy(update={"objective": objective})
        if objective.needs_reference:
            # All rows, so that every rank has as many packs. A source reads those of its own.
            scored = [my_packs(batch, step, layout, own.reference_roles, groups) for step, batch in enumerate(batches)]
            found = live_reference(own, reference, groups, scored, num_rows=sum(map(len, batches)))
            references = for_policy(own, found)
        judged.append(SourceLoss(objective, references))
    policy = build_policy(config, resolve_model(config.model, config.parallel), groups, max_steps=len(batches))
    loss = mixture_loss(judged, groups)
    result = RankResult(_is_counted(groups))
    if config.model.has_delayed_scales:
        policy.warm_scales(packs[0], loss, groups)
    for step_packs in packs:
        step = policy.step(step_packs, loss, groups)
        result.grad_norms.append(step.grad_norm)
        if policy.router_watch is not None:
            result.routing.append(policy.router_watch.metrics(*_expert_sizes(config), groups.device))
        zeros = torch.zeros(case.metrics.size, dtype=torch.float64)
        result.metric_sums.append(sum((report.double().cpu() for report in step.reports), zeros))
        if not result.gradients and not layout.distributed_optimizer:
            result.gradients = _shards(
                policy, lambda parameter: parameter.main_grad if parameter.requires_grad else None
            )
    policy.gather_parameters()  # the next forward pass would
    result.parameters = _shards(policy, lambda parameter: parameter.detach())
    return result


def _expert_sizes(config: Config) -> tuple[int, int, int]:
    architecture = read_architecture(config.model.path)
    assert architecture.experts is not None
    return architecture.num_layers, architecture.experts.num_experts, architecture.experts.topk


def _shards(policy: Policy, value: Callable[[Any], Tensor | None]) -> Shards:
    found: Shards = {}
    for chunk in policy.chunks:
        groups = chunk.module.pg_collection
        for name, parameter in global_parameters(chunk.module):
            held = value(parameter)
            if held is not None and replica_group(parameter).rank() == 0:
                tensor_group = groups.expt_tp if ".local_experts." in name else groups.tp
                found[name] = tensor_group.rank(), held.clone()
    return found


def live_reference(
    config: Config, path: Path, groups: Topology, packs: Sequence[Sequence[Pack]], num_rows: int
) -> ReferenceLogprobs:
    """Score this rank's packs with the reference model under the same layout."""
    model = resolve_model(config.model, config.parallel).at(path)
    chunks = load_frozen(model, groups, chunk_tokens=config.logprob.chunk_tokens, moe=config.moe)
    roles = packs[0][0].groups[0].roles
    logps = torch.zeros(num_rows, len(roles))
    for step_packs in packs:
        with torch.no_grad():
            scores = logprob_report(groups, config.objective.ld_alpha)
            reports = run_schedule(chunks, step_packs, scores, groups, forward_only=True)
        for pack, report in zip(step_packs, reports, strict=bool(reports)):
            logps[pack.triplet_indices] = report.cpu()
    return ReferenceLogprobs(roles, logps)


def my_packs(batch: Sequence[Row], number: int, layout: Layout, roles: Sequence[Role], groups: Topology) -> list[Pack]:
    """This data-parallel rank's packs of global batch `number`, whose rows are of one source."""
    return mixed_packs(batch, number, layout, {0: roles}, [0] * len(batch), groups)


def mixed_packs(
    batch: Sequence[Row],
    number: int,
    layout: Layout,
    roles: Mapping[int, Sequence[Role]],
    sources: Sequence[int],
    groups: Topology,
) -> list[Pack]:
    """This data-parallel rank's packs of global batch `number`.

    Args:
        roles: the sequences of a row, by its source.
        sources: of each row.
    """
    triplets = [tokenized(row, number * len(batch) + position) for position, row in enumerate(batch)]
    multiples = groups.sequence_multiple, math.lcm(groups.pack_multiple(), layout.pack_multiple)
    packs = []
    for pack in layout.plan[groups.data_group.rank()]:
        of_source = {source: [triplets[place] for place in pack if sources[place] == source] for source in roles}
        parts = [SourceRows(source, roles[source], rows) for source, rows in of_source.items() if rows]
        packs.append(build_mixed_pack(parts, *multiples, share_prompts=layout.share_prompts))
    return packs


def tokenized(row: Row, index: int) -> TokenizedTriplet:
    """A test row as the package `data` gives it."""
    return TokenizedTriplet(
        id=row["id"],
        index=index,
        prompts={context: np.array(row[f"prompt_{context}"]) for context in ("short", "long")},
        responses={answer: np.array(row[answer]) for answer in ("chosen", "rejected")},
        masks={answer: np.array(row[f"{answer}_mask"]) for answer in ("chosen", "rejected") if f"{answer}_mask" in row},
    )


def _is_counted(groups: Topology) -> bool:
    return groups.is_last_stage and groups.tensor_group.rank() == 0 and groups.context_group.rank() == 0


def mean_metrics(results: Sequence[RankResult], step: int, case: Case, num_triplets: int) -> Metrics:
    """The metrics of one step, over all ranks' triplets."""
    total = sum(result.metric_sums[step] for result in results if result.is_counted)
    counts = [case.mixture.count(name) for name in case.sources] if case.mixture else [num_triplets]
    return case.metrics.means(torch.as_tensor(total).tolist(), counts)


def huggingface_tensors(shares: Sequence[Shards], model: Path, lora: LoRAConfig | None = None) -> dict[str, Tensor]:
    """Join the shards of all ranks into whole Hugging Face tensors. A parameter that no rank has is left out."""
    architecture = read_architecture(model)
    shards: dict[str, dict[int, Tensor]] = {}
    for tensors in shares:
        for name, (rank, tensor) in tensors.items():
            shards.setdefault(name, {})[rank] = tensor
    joined: dict[str, Tensor] = {}
    table = rules(architecture) | (adapter_rules(architecture, lora) if lora else {})
    for name, rule in table.items():
        if name not in shards:
            continue
        parts = [shards[name][rank] for rank in sorted(shards[name])]
        joined |= join_shards(rule, architecture, parts)
    return joined
