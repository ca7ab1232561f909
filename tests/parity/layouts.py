"""Trains on N ranks under a list of layouts and hands back what a plain run can be compared with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron_solopo.checkpoint.huggingface import global_parameters
from megatron_solopo.checkpoint.mapping import rules, to_huggingface
from megatron_solopo.config import Config, parse_config
from megatron_solopo.data.packing import Pack, TokenizedTriplet, build_pack
from megatron_solopo.model.architecture import Architecture, read_architecture
from megatron_solopo.objective import metric_names, required_roles
from megatron_solopo.parallel import topology
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train.policy import build_policy, load_model
from megatron_solopo.train.step import ReferenceLogprobs, logprob_report, objective_loss, run_schedule
from torch import Tensor

from tests.parity.plain import Row

LEARNING_RATE = 1e-3
# Data-parallel rank -> packs -> positions in the global batch of four triplets.
Plan = Sequence[Sequence[Sequence[int]]]
PACKED: Plan = [[[0, 2], [1, 3]]]
ONE_PACK: Plan = [[[0, 1, 2, 3]]]
UNPACKED: Plan = [[[0], [1], [2], [3]]]
UNEVEN: Plan = [[[3], [0, 1, 2]]]
TWO_RANKS: Plan = [[[0, 2]], [[1, 3]]]
TWO_RANKS_UNEVEN: Plan = [[[1]], [[3, 0, 2]]]


@dataclass(frozen=True)
class Layout:
    """One way to run the same training."""

    name: str
    plan: Plan = field(default_factory=lambda: PACKED)
    parallel: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    chunk_tokens: int = 1024


@dataclass
class RankResult:
    """What one rank saw of one layout."""

    grad_norms: list[float]
    metric_sums: list[Tensor]
    """Per step, fp64 [M], this rank's sum over triplets; empty on ranks without the loss."""
    gradients: dict[str, Tensor]
    """By Megatron name in the mapping table: this rank's shard, first step; empty if not the first replica."""
    tensor_rank: int
    is_counted: bool
    """Whether this rank's metrics enter the sum over ranks (one per data-parallel rank)."""


def make_config(model: Path, objective: Mapping[str, Any], layout: Layout) -> Config:
    """A whole config of which only the model, objective, parallel and optimizer sections matter here."""
    return parse_config(
        {
            "run_dir": "unused",
            "model": {"path": model},
            "data": {"path": "unused", "max_tokens_per_pack": 100_000},
            "training": {"global_batch_size": 4},
            "objective": dict(objective),
            "parallel": dict(layout.parallel),
            "optimizer": {"lr": LEARNING_RATE, "lr_decay_style": "constant", "clip_grad": 0.0, **layout.optimizer},
            "logprob": {"chunk_tokens": layout.chunk_tokens},
        },
        source="test",
    )


def train_layouts(
    model: Path,
    reference: Path,
    objective: Mapping[str, Any],
    layouts: Sequence[Layout],
    batches: Sequence[Sequence[Row]],
) -> dict[str, RankResult]:
    """Runs on every rank: train one step per batch under each layout in turn, from the same weights."""
    return {layout.name: train_layout(model, reference, objective, layout, batches) for layout in layouts}


def train_layout(
    model: Path, reference: Path, objective: Mapping[str, Any], layout: Layout, batches: Sequence[Sequence[Row]]
) -> RankResult:
    config = make_config(model, objective, layout)
    groups = topology.initialize(config.parallel, seed=1)
    try:
        return _train(config, groups, layout, reference, batches)
    finally:
        topology.parallel_state.destroy_model_parallel()


def _train(
    config: Config, groups: Topology, layout: Layout, reference: Path, batches: Sequence[Sequence[Row]]
) -> RankResult:
    roles = required_roles(config.objective)
    packs = [my_packs(batch, number, layout.plan, roles, groups) for number, batch in enumerate(batches)]
    references = None
    if config.objective.needs_reference:
        references = live_reference(config, reference, groups, packs, roles, num_rows=sum(map(len, batches)))
    policy = build_policy(config, groups, max_steps=len(batches))
    loss = objective_loss(config.objective, references, groups)
    result = RankResult([], [], {}, groups.tensor_group.rank(), _is_counted(groups))
    for step_packs in packs:
        step = policy.step(step_packs, loss, groups)
        result.grad_norms.append(step.grad_norm)
        zero = torch.zeros(len(metric_names(config.objective)))
        result.metric_sums.append(sum(step.reports, zero).double())
        is_first_replica = groups.data_group.rank() == 0 and groups.context_group.rank() == 0
        if not result.gradients and is_first_replica and not config.optimizer.use_distributed_optimizer:
            for chunk in policy.chunks:
                for name, parameter in global_parameters(chunk.module):
                    result.gradients[name] = parameter.main_grad.clone()
    return result


def live_reference(
    config: Config, path: Path, groups: Topology, packs: Sequence[Sequence[Pack]], roles: Sequence[str], num_rows: int
) -> ReferenceLogprobs:
    """Score every pack of this rank with the reference model, under the same layout."""
    chunks = load_model(config, path, groups)
    logps = torch.zeros(num_rows, len(roles))
    for step_packs in packs:
        with torch.no_grad():
            reports = run_schedule(chunks, step_packs, logprob_report(groups), groups, forward_only=True)
        for pack, report in zip(step_packs, reports, strict=bool(reports)):
            logps[pack.triplet_indices] = report
    return ReferenceLogprobs(tuple(roles), logps)


def my_packs(batch: Sequence[Row], number: int, plan: Plan, roles: Sequence[str], groups: Topology) -> list[Pack]:
    """This data-parallel rank's packs of global batch `number`."""
    triplets = [tokenized(row, number * len(batch) + position) for position, row in enumerate(batch)]
    return [
        build_pack([triplets[position] for position in pack], roles, groups.sequence_multiple)
        for pack in plan[groups.data_group.rank()]
    ]


def tokenized(row: Row, index: int) -> TokenizedTriplet:
    return TokenizedTriplet(
        id=row["id"],
        index=index,
        prompts={context: np.array(row[f"prompt_{context}"]) for context in ("short", "long")},
        responses={answer: np.array(row[answer]) for answer in ("chosen", "rejected")},
    )


def _is_counted(groups: Topology) -> bool:
    return groups.is_last_stage and groups.tensor_group.rank() == 0 and groups.context_group.rank() == 0


def huggingface_gradients(results: Sequence[RankResult], architecture: Architecture) -> dict[str, Tensor]:
    """Join the ranks' gradient shards into whole Hugging Face tensors."""
    shards: dict[str, dict[int, Tensor]] = {}
    for result in results:
        for name, gradient in result.gradients.items():
            shards.setdefault(name, {})[result.tensor_rank] = gradient
    joined: dict[str, Tensor] = {}
    for name, rule in rules(architecture).items():
        parts = [shards[name][rank] for rank in sorted(shards[name])]
        joined |= dict(zip(rule.huggingface, to_huggingface(rule, architecture, parts), strict=True))
    return joined


def architecture_of(model: Path) -> Architecture:
    return read_architecture(model)
