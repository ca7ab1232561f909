#!/usr/bin/env python3
"""Measure on a CPU what a step of a mixture of experts costs beside a dense model that computes as much for each token.

    python -m tools.benchmarks.experts_benchmark --json experts.json

The models differ in their feed-forward alone: experts, of which a router chooses some for each token, against one dense
layer of as many columns as those have together. Time: whole optimizer steps of `solopo` and of `long_po` with either
model, in turn on the same triplets. Memory: what one step of the mixture holds by part, beside the estimates of `plan`.
Weights and data are random, so routers send about as many tokens to each expert. Routers are frozen. Reference
log-probs are zeros, for a cached reference costs a step nothing. One thread; layers are plain PyTorch, in which each
expert is a module of its own. On a GPU, one kernel computes all experts.
"""
# ruff: noqa: E402  (megatron's warnings of what is not installed must be off before it is imported)

import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore", module=r"megatron\.core")

import click
import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen3Config, Qwen3MoeConfig

from megatron_solopo.config import Config, ObjectiveConfig, parse_config
from megatron_solopo.data.packing import Pack, TokenizedTriplet, build_pack
from megatron_solopo.files import write_json
from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.plan.dry_run import SavedTensorMeter, gradient_bytes, optimizer_state_bytes, parameter_bytes
from megatron_solopo.plan.memory import peak_activations, rank_state
from megatron_solopo.plan.workload import pack_shape
from megatron_solopo.train.metrics import training_flops
from megatron_solopo.train.policy import Policy, build_policy
from megatron_solopo.train.step import objective_loss
from tools.benchmarks.cpu_benchmark import in_fresh_process
from tools.benchmarks.random_triplets import random_triplet
from tools.benchmarks.step_costs import LONG_PO, OBJECTIVES, SOLOPO, one_process, zero_references
from tools.reporting import environment, table

EXPERTS, DENSE = MODELS = ("experts", "dense")
_MIB = 2**20
_VOCAB_SIZE = 4096
_HEAD_DIM = 64


@dataclass(frozen=True)
class Sizes:
    """What is measured. Sequences have their answer of `response_tokens` among their tokens."""

    hidden_size: int
    layers: int
    experts: int
    topk: int
    expert_columns: int
    short_tokens: int
    long_tokens: int
    response_tokens: int

    def triplet(self, index: int) -> TokenizedTriplet:
        return random_triplet(self.short_tokens, self.long_tokens, self.response_tokens, _VOCAB_SIZE, index)


@dataclass(frozen=True)
class Times:
    """Steps of both models under both objectives: medians, by model and objective."""

    active_parameters: dict[str, int]
    parameters: dict[str, int]
    wall_seconds: dict[str, dict[str, float]]
    flops: dict[str, dict[str, float]]
    load_max_over_mean: float
    """Tokens of the fullest expert over the mean, in the last step of the mixture."""
    experts_over_dense: dict[str, tuple[float, float, float]]
    """By objective: median, least and greatest ratio of two steps that ran one after the other."""
    solopo_over_long_po: dict[str, tuple[float, float, float]]
    """The same by model."""
    flops_solopo_over_long_po: dict[str, float]


@dataclass(frozen=True)
class Memory:
    """Bytes of one step of the mixture by part, and what `plan` estimates for them."""

    measured: dict[str, int]
    planned: dict[str, float]


def model_config(name: str, sizes: Sizes) -> PretrainedConfig:
    """Of a family that differs from the other one in its feed-forward alone."""
    shape: dict[str, Any] = {
        "hidden_size": sizes.hidden_size,
        "num_hidden_layers": sizes.layers,
        "num_attention_heads": sizes.hidden_size // _HEAD_DIM,
        "num_key_value_heads": max(1, sizes.hidden_size // _HEAD_DIM // 2),
        "head_dim": _HEAD_DIM,
        "vocab_size": _VOCAB_SIZE,
        "intermediate_size": sizes.topk * sizes.expert_columns,
        "max_position_embeddings": sizes.long_tokens,
        "tie_word_embeddings": False,
    }
    if name == DENSE:
        return Qwen3Config(**shape)
    return Qwen3MoeConfig(
        **shape,
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.topk,
        moe_intermediate_size=sizes.expert_columns,
        norm_topk_prob=True,
    )


def make_run(folder: Path, name: str, sizes: Sizes) -> Config:
    """Save a random model, and return the configuration of a run that trains it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config(name, sizes), dtype=torch.float32)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder / name)
    return parse_config(
        {
            "run_dir": folder / "run",
            "model": {"path": folder / name, "dtype": "float32"},
            "data": {"path": folder / "prepared", "max_tokens_per_pack": 1 << 20},
            "training": {"global_batch_size": 1, "max_steps": 1},
        },
        source="benchmark",
    )


def load(config: Config, groups: Topology, steps: int) -> tuple[Any, Policy]:
    """The model's architecture, and the model ready for its first step, as `train` makes it."""
    resolved = resolve_model(config.model, config.parallel)
    return resolved.architecture, build_policy(config, resolved, groups, steps)


def packed(triplet: TokenizedTriplet, objective: ObjectiveConfig, groups: Topology) -> list[Pack]:
    return [
        build_pack(
            [triplet], objective.roles.all, groups.sequence_multiple, groups.pack_multiple(), share_prompts=False
        )
    ]


def measure_times(sizes: Sizes, repeats: int) -> Times:
    """Steps of all cases in turn, after one of each that is not counted."""
    cases = list(product(MODELS, OBJECTIVES))
    wall: dict[tuple[str, str], list[float]] = {(name, objective.name): [] for name, objective in cases}
    flops: dict[str, dict[str, float]] = {name: {} for name in MODELS}
    with tempfile.TemporaryDirectory() as folder, one_process() as groups:
        loaded = {name: load(make_run(Path(folder), name, sizes), groups, 2 * (repeats + 1)) for name in MODELS}
        for index in range(repeats + 1):
            for name, objective in cases:
                architecture, policy = loaded[name]
                packs = packed(sizes.triplet(index), objective, groups)
                loss_function = objective_loss(objective, zero_references(objective, repeats + 1), groups)
                start = time.perf_counter()
                policy.step(packs, loss_function, groups)
                wall[name, objective.name].append(time.perf_counter() - start)
                flops[name][objective.name] = training_flops(architecture, packs)
        architecture, policy = loaded[EXPERTS]
        assert policy.router_watch is not None
        routed = policy.router_watch.metrics(sizes.layers, sizes.experts, sizes.topk, groups.device)
    counted = {case: seconds[1:] for case, seconds in wall.items()}
    names = [objective.name for objective in OBJECTIVES]
    return Times(
        active_parameters={name: loaded[name][0].num_active_parameters for name in MODELS},
        parameters={name: loaded[name][0].num_parameters for name in MODELS},
        wall_seconds={name: {each: statistics.median(counted[name, each]) for each in names} for name in MODELS},
        flops=flops,
        load_max_over_mean=routed["moe/load_max_over_mean"],
        experts_over_dense={each: ratios(counted[EXPERTS, each], counted[DENSE, each]) for each in names},
        solopo_over_long_po={name: ratios(counted[name, SOLOPO.name], counted[name, LONG_PO.name]) for name in MODELS},
        flops_solopo_over_long_po={name: flops[name][SOLOPO.name] / flops[name][LONG_PO.name] for name in MODELS},
    )


def ratios(ones: Sequence[float], others: Sequence[float]) -> tuple[float, float, float]:
    """Median, least and greatest of the ratios of pairs."""
    found = sorted(one / other for one, other in zip(ones, others, strict=True))
    return statistics.median(found), found[0], found[-1]


def measure_memory(sizes: Sizes) -> Memory:
    """Bytes after one step of the mixture under solopo, and the most that autograd kept within it."""
    with tempfile.TemporaryDirectory() as folder, one_process() as groups:
        config = make_run(Path(folder), EXPERTS, sizes)
        architecture, policy = load(config, groups, 1)
        meter = SavedTensorMeter(parameter for chunk in policy.chunks for parameter in chunk.parameters())
        loss_function = objective_loss(SOLOPO, zero_references(SOLOPO, 1), groups)
        with meter.counting():
            policy.step(packed(sizes.triplet(0), SOLOPO, groups), loss_function, groups)
        shape = pack_shape(
            [text_tokens(sizes)],
            [SOLOPO.roles.all],
            groups.sequence_multiple,
            groups.pack_multiple(),
            1,
            share_prompts=False,
        )
        state = rank_state(architecture, config, 0, 1)
        return Memory(
            measured={
                "parameters": parameter_bytes(policy.chunks),
                "gradients": gradient_bytes(policy.chunks),
                "optimizer": optimizer_state_bytes(policy.optimizer, policy.chunks),
                "kept for backward": meter.most,
            },
            planned={
                "parameters": state.parameters,
                "gradients": state.gradients,
                "optimizer": state.optimizer,
                "kept for backward": peak_activations(architecture, config, 0, [shape], local=True).saved,
            },
        )


def text_tokens(sizes: Sizes) -> Mapping[str, int]:
    """Tokens of a triplet's texts, as `plan` reads them."""
    prompts = {"short": sizes.short_tokens, "long": sizes.long_tokens}
    return {name: tokens - sizes.response_tokens for name, tokens in prompts.items()} | dict.fromkeys(
        ("chosen", "rejected"), sizes.response_tokens
    )


def times_tables(times: Times) -> str:
    """Seconds by model and objective, then both kinds of ratio."""

    def spread(ratio: tuple[float, float, float]) -> str:
        return f"{ratio[0]:.3f} ({ratio[1]:.3f} to {ratio[2]:.3f})"

    rows = [
        [name, f"{times.parameters[name]:,}", f"{times.active_parameters[name]:,}"]
        + [f"{times.wall_seconds[name][objective.name]:.2f}" for objective in OBJECTIVES]
        + [spread(times.solopo_over_long_po[name]), f"{times.flops_solopo_over_long_po[name]:.3f}"]
        for name in MODELS
    ]
    columns = ("model", "parameters", "active", "solopo s", "long_po s", "solopo / long_po", "by FLOPs")
    beside = [
        [each, spread(ratio), f"{times.flops[EXPERTS][each] / times.flops[DENSE][each]:.3f}"]
        for each, ratio in times.experts_over_dense.items()
    ]
    return f"{table(columns, rows)}\n\n{table(('objective', 'experts / dense', 'by FLOPs'), beside)}"


def memory_table(memory: Memory) -> str:
    rows = [
        [part, f"{size / _MIB:,.1f}", f"{memory.planned[part] / _MIB:,.1f}", f"{memory.planned[part] / size:.3f}"]
        for part, size in memory.measured.items()
    ]
    return table(("part", "measured MiB", "plan MiB", "plan / measured"), rows)


@click.command(help=__doc__.replace("    python", "\b\n    python"))
@click.option("--hidden-size", default=512, show_default=True)
@click.option("--layers", default=2, show_default=True)
@click.option("--experts", default=32, show_default=True, help="Of each layer.")
@click.option("--topk", default=4, show_default=True, help="Experts of each token.")
@click.option("--expert-columns", default=384, show_default=True)
@click.option("--pair", type=(int, int), default=(1024, 4096), show_default=True, help="Short and long tokens.")
@click.option("--response-tokens", type=click.IntRange(1), default=256, show_default=True, help="Of each answer.")
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Steps timed per case.")
@click.option("--json", "json_path", type=click.Path(path_type=Path, dir_okay=False), help="Write the results here.")
def main(
    hidden_size: int,
    layers: int,
    experts: int,
    topk: int,
    expert_columns: int,
    pair: tuple[int, int],
    response_tokens: int,
    repeats: int,
    json_path: Path | None,
) -> None:
    """Measure, print tables, write JSON."""
    os.environ.setdefault("PYTHONWARNINGS", "ignore")  # what libraries tell each other, once per process
    sizes = Sizes(hidden_size, layers, experts, topk, expert_columns, *pair, response_tokens)
    result = environment()
    times: Times = in_fresh_process(measure_times, sizes, repeats)
    memory: Memory = in_fresh_process(measure_memory, sizes)
    result["load_average_after"] = os.getloadavg()[0]
    click.echo("\n".join(f"{key}: {value}" for key, value in result.items()))
    click.echo(f"fullest expert over the mean: {times.load_max_over_mean:.2f}")
    click.echo(f"\n{times_tables(times)}\n\n{memory_table(memory)}")
    if json_path:
        write_json(json_path, result | {"sizes": asdict(sizes), "times": asdict(times), "memory": asdict(memory)})


if __name__ == "__main__":
    main()
