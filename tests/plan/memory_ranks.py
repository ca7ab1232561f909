"""Trains one step on N ranks, case by case, and reports what every rank holds in memory."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_solopo.architecture.layout import pack_multiple, sequence_multiple
from megatron_solopo.config import Config
from megatron_solopo.data.packing import Pack, TokenizedTriplet, build_pack
from megatron_solopo.model.build import build_model
from megatron_solopo.model.layers import layers_and_routers
from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.parallel import topology
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.plan.dry_run import SavedTensorMeter, gradient_bytes, optimizer_state_bytes, parameter_bytes
from megatron_solopo.plan.workload import PackShape, pack_shape
from megatron_solopo.train.policy import Policy, build_optimizer, build_scheduler, set_trainable, wrap_data_parallel
from megatron_solopo.train.step import ReferenceLogprobs, objective_loss
from tests.parity.layouts import Layout, make_config

VOCAB_SIZE = 131
# Two packs per data-parallel rank of a pipeline of two: the longer one first.
TRIPLETS = (
    {"short": 40, "long": 300, "chosen": 20, "rejected": 15},
    {"short": 30, "long": 200, "chosen": 12, "rejected": 9},
)


@dataclass(frozen=True)
class Case:
    """One way to run the same step."""

    name: str
    family: str = "llama3"
    parallel: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] = field(default_factory=dict)
    optimizer: Mapping[str, Any] = field(default_factory=dict)
    distributed_optimizer: bool = True
    moe: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] | None = None
    objective: Mapping[str, Any] = field(default_factory=dict)
    chunk_tokens: int = 1024
    share_prompts: bool = True
    idle_experts: int = 0
    """The last experts of each layer, to which the routers send hardly any token."""

    def config(self, models: Path) -> Config:
        layout = Layout(
            self.name,
            parallel=self.parallel,
            model=self.model,
            optimizer=self.optimizer,
            moe=self.moe,
            lora=self.lora,
            distributed_optimizer=self.distributed_optimizer,
            chunk_tokens=self.chunk_tokens,
            share_prompts=self.share_prompts,
        )
        objective = {"name": "solopo", "loss_type": "dpo"} | dict(self.objective)
        return make_config(models / self.family, objective, layout)


@dataclass(frozen=True)
class MemoryInUse:
    """Bytes on one rank after a step, and its place."""

    pipeline_rank: int
    data_parallel_size: int
    stage_rank: int
    """Among the TP x CP x DP ranks."""
    num_parameters: int
    parameters: int
    gradients: int
    optimizer: int
    expert_groups: dict[str, list[int]]
    """The ranks of its groups, by name."""
    saved: int
    """Most that autograd kept at any moment of the step."""


def shapes(config: Config) -> list[PackShape]:
    """The packs of every rank, as the planner sees them."""
    parallel = config.parallel
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    multiples = sequence_multiple(cp), pack_multiple(tp, cp)
    roles = config.objective.roles.all
    share_prompts = config.data.share_prompts
    return [pack_shape([triplet], [roles], *multiples, cp, share_prompts=share_prompts) for triplet in TRIPLETS]


def run_cases(models: Path, cases: Sequence[Case]) -> list[MemoryInUse]:
    """On every rank: one optimizer step for each case in turn."""
    return [run_case(case.config(models), case.idle_experts) for case in cases]


def run_case(config: Config, idle_experts: int) -> MemoryInUse:
    groups = topology.initialize(config.parallel, seed=1)
    try:
        return _train(config, groups, idle_experts)
    finally:
        topology.destroy(groups)


def _train(config: Config, groups: Topology, idle_experts: int) -> MemoryInUse:
    model = resolve_model(config.model, config.parallel)
    chunks = build_model(model, chunk_tokens=config.logprob.chunk_tokens, device=groups.device)
    for parameter in (parameter for chunk in chunks for parameter in chunk.parameters()):
        torch.nn.init.normal_(parameter, std=0.05)
    for _, router in (pair for chunk in chunks for pair in layers_and_routers(chunk)):
        router.weight.data[len(router.weight) - idle_experts :] = 0.0  # below the greatest of the others
    set_trainable(chunks, model.architecture, config)
    wrapped = wrap_data_parallel(chunks, config.optimizer, config.parallel)
    optimizer = build_optimizer(wrapped, config.optimizer)
    policy = Policy(wrapped, optimizer, build_scheduler(optimizer, config.optimizer, 2))
    roles = config.objective.roles.all
    loss = objective_loss(config.objective, ReferenceLogprobs(roles, torch.zeros(2, len(roles))), groups)
    meter = SavedTensorMeter(parameter for chunk in chunks for parameter in chunk.parameters())
    with meter.counting():
        policy.step([_pack(number, config, groups) for number in range(2)], loss, groups)
    return MemoryInUse(
        pipeline_rank=groups.pipeline_group.rank(),
        data_parallel_size=groups.data_group.size(),
        stage_rank=groups.stage_rank,
        num_parameters=sum(parameter.numel() for chunk in chunks for parameter in chunk.parameters()),
        parameters=parameter_bytes(wrapped),
        gradients=gradient_bytes(wrapped),
        optimizer=optimizer_state_bytes(optimizer, wrapped),
        expert_groups=expert_groups(),
        saved=meter.most,
    )


def expert_groups() -> dict[str, list[int]]:
    """The ranks that share the experts with this one, each expert, and its gradients."""
    groups = {
        "experts": parallel_state.get_expert_model_parallel_group(),
        "each expert": parallel_state.get_expert_tensor_parallel_group(),
        "gradients": parallel_state.get_expert_data_parallel_group(),
    }
    return {name: dist.get_process_group_ranks(group) for name, group in groups.items()}


def _pack(number: int, config: Config, groups: Topology) -> Pack:
    generator = np.random.default_rng(number)
    tokens = {name: generator.integers(VOCAB_SIZE, size=length) for name, length in TRIPLETS[number].items()}
    triplet = TokenizedTriplet(
        id=str(number),
        index=number,
        prompts={name: tokens[name] for name in ("short", "long")},
        responses={name: tokens[name] for name in ("chosen", "rejected")},
    )
    multiples = groups.sequence_multiple, groups.pack_multiple()
    return build_pack([triplet], config.objective.roles.all, *multiples, share_prompts=config.data.share_prompts)
