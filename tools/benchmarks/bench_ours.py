"""`solopo` and `long_po` for `benchmark.py`: whole optimizer steps of one policy, in turn.

A process of its own; see `bench_case.worker_main`.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_solopo.architecture.huggingface_config import Architecture
from megatron_solopo.checkpoint.adapter_mapping import adapter_shapes
from megatron_solopo.checkpoint.adapters import add_adapters
from megatron_solopo.checkpoint.load import global_parameters
from megatron_solopo.checkpoint.mapping import Index, ReadTensor, huggingface_shapes, rules, to_megatron
from megatron_solopo.config import Config, LoRAConfig, ObjectiveConfig, parse_config
from megatron_solopo.cpu_features import is_cpu
from megatron_solopo.data.packing import Pack, build_pack
from megatron_solopo.model.build import build_model
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.model.resolve import ResolvedModel, check_precision, resolve_model
from megatron_solopo.objective import metric_names
from megatron_solopo.parallel import topology as process_groups
from megatron_solopo.parallel.megatron_internals import assign, gradient_buffers, optimizer_parts
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train.policy import Policy, build_optimizer, build_scheduler, wrap_data_parallel
from megatron_solopo.train.step import ReferenceLogprobs, logprob_report, objective_loss, run_schedule
from tools.benchmarks.bench_case import (
    NOT_TRIED,
    OURS,
    OUT_OF_MEMORY,
    Emit,
    Measurement,
    Plan,
    StepMeter,
    first_line,
    free_memory,
    is_out_of_memory,
    random_tensor,
    worker_main,
)
from tools.benchmarks.bench_profile import StepProfiler
from tools.benchmarks.cpu_counts import optimizer_tensors


def fill_with_random_weights(chunks: list[ResponseModel], architecture: Architecture) -> None:
    """Give every parameter its weights by the names of its Hugging Face tensors, on its own device."""
    table = rules(architecture)
    for chunk in chunks:
        group = chunk.pg_collection.tp
        shard = {"rank": group.rank(), "size": group.size(), "padded_vocab": chunk.vocab_size}
        for name, parameter in global_parameters(chunk):
            read = partial(_random_part, huggingface_shapes(table[name], architecture), parameter)
            assign(parameter, to_megatron(table[name], architecture, read, **shard))


def _random_part(
    shapes: dict[str, tuple[int, ...]], like: torch.Tensor, name: str, index: tuple[slice, ...]
) -> torch.Tensor:
    return random_tensor(name, torch.Size(shapes[name]), like.dtype, like.device)[index]


def build_random_policy(config: Config, model: ResolvedModel, topology: Topology, max_steps: int) -> Policy:
    """What `megatron_solopo.train.policy.build_policy` builds, but of random weights."""
    chunk_tokens = config.logprob.chunk_tokens
    chunks = build_model(model, chunk_tokens=chunk_tokens, device=topology.device)
    fill_with_random_weights(chunks, model.architecture)
    if config.lora is not None:
        add_adapters(chunks, model.architecture, config.lora, _random_adapters(model.architecture, config.lora))
    wrapped = wrap_data_parallel(chunks, config.optimizer, config.parallel)
    optimizer = build_optimizer(wrapped, config.optimizer)
    return Policy(wrapped, optimizer, build_scheduler(optimizer, config.optimizer, max_steps))


def _random_adapters(architecture: Architecture, lora: LoRAConfig) -> ReadTensor:
    shapes = adapter_shapes(architecture, lora)

    def read(name: str, index: Index) -> torch.Tensor:
        return random_tensor(name, torch.Size(shapes[name]), torch.float32, torch.device("cpu"))[index]

    return read


def held_tensors(policy: Policy) -> Iterator[torch.Tensor]:
    """What a policy keeps from step to step."""
    for chunk in policy.chunks:
        yield from chunk.parameters()
        yield from (buffer.grad_data for buffer in gradient_buffers(chunk))
    for part in optimizer_parts(policy.optimizer):
        yield from optimizer_tensors(part.optimizer)


def objective_named(name: str, config: Config) -> ObjectiveConfig:
    """The configured objective under the name of one of our systems."""
    return ObjectiveConfig.model_validate(config.objective.model_dump() | {"name": name})


class Series:
    """The steps of one objective at one length."""

    def __init__(self, name: str, config: Config, plan: Plan, long_tokens: int, topology: Topology) -> None:
        self.objective, self.topology = objective_named(name, config), topology
        roles = self.objective.roles.all
        multiples = topology.sequence_multiple, topology.pack_multiple(config.model)
        # A triplet is a pack: long sequences are what fills the memory.
        self.packs: list[Pack] = [
            build_pack([triplet], roles, *multiples, share_prompts=config.data.share_prompts)
            for triplet in plan.batch(long_tokens)
        ]
        self.result = Measurement(name, long_tokens)
        self.meter = StepMeter(self.result, plan.warmup)
        self.loss: Any = None

    def score_reference(self, policy: Policy) -> None:
        """The policy's own log-probs are the reference's, as at the start of every run: DPO's loss is then ln 2."""
        report = logprob_report(self.topology)
        with torch.no_grad(), FlopCounterMode(display=False) as flops:
            reports = run_schedule(policy.chunks, self.packs, report, self.topology, forward_only=True)
        self.result.forward_flops = flops.get_total_flops() if is_cpu() else None
        references = ReferenceLogprobs(self.objective.roles.all, torch.cat(reports).float().cpu())
        self.loss = objective_loss(self.objective, references, self.topology)

    def step(self, policy: Policy) -> None:
        with self.meter.step(partial(held_tensors, policy)):
            outcome = policy.step(self.packs, self.loss, self.topology)
        place = metric_names(self.objective).index("loss")
        self.result.losses.append(float(sum(report[place] for report in outcome.reports)) / len(self.packs))
        self.result.grad_norms.append(outcome.grad_norm)

    def profile(self, policy: Policy, path: Path) -> None:
        profiler = StepProfiler(path)
        profiler.start()
        policy.step(self.packs, self.loss, self.topology)
        self.result.profile = profiler.stop()


class Ours:
    """Measures one length after another; what ran out of memory is not tried at longer ones.

    All systems run under the same configuration, so that they can be compared: the first under which none of them
    runs out of memory, or the last.
    """

    def __init__(self, plan: Plan, topology: Topology, emit: Emit) -> None:
        self.plan, self.topology, self.emit = plan, topology, emit
        self.configs = {name: parse_config(values, name) for name, values in plan.configs.items()}
        self.names = list(self.configs)
        self.gave_up: set[str] = set()
        self.policy: Policy | None = None

    def measure(self, long_tokens: int) -> None:
        """Emit one measurement for each system."""
        results = self._measure(long_tokens)
        while len(self.names) > 1 and any(result.status == OUT_OF_MEMORY for result in results):
            for result in results:
                self.emit("variant", **asdict(result))
            del self.names[0]
            self.gave_up.clear()
            self._drop_policy()
            results = self._measure(long_tokens)
        for result in results:
            self.emit("measurement", **asdict(result))

    def _measure(self, long_tokens: int) -> list[Measurement]:
        """All systems under the first configuration that is left."""
        plan, config = self.plan, self.configs[self.names[0]]
        variant = self.names[0] if len(self.configs) > 1 else ""
        series = [Series(name, config, plan, long_tokens, self.topology) for name in plan.systems if name in OURS]
        for each in series:
            each.result.variant = variant
            if each.objective.name in self.gave_up:
                each.result.status, each.result.detail = NOT_TRIED, "out of memory at a shorter length"
        # The largest first: if memory runs out, the others warm up the policy that is built then.
        for each in sorted(series, key=lambda each: -sum(pack.num_tokens for pack in each.packs)):
            self._guarded(each, each.score_reference)
            for _ in range(plan.warmup):
                self._guarded(each, each.step)
        for _ in range(plan.steps):
            for each in series:
                self._guarded(each, each.step)
        for each in series:
            if path := plan.trace_path(each.objective.name, long_tokens):
                self._guarded(each, partial(each.profile, path=path))
        return [each.result for each in series]

    def _guarded(self, series: Series, work: Callable[[Policy], None]) -> None:
        """Do it, unless memory ran out before; if it does now, note that and start over with a fresh policy."""
        if series.result.status in (OUT_OF_MEMORY, NOT_TRIED):
            return
        try:
            if self.policy is None:
                max_steps = 2 * len(self.plan.long_tokens) * (self.plan.warmup + self.plan.steps + 1)
                config = self.configs[self.names[0]]
                model = resolve_model(config.model, config.parallel)
                self.policy = build_random_policy(config, model, self.topology, max_steps)
            work(self.policy)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            series.result.status, series.result.detail = OUT_OF_MEMORY, first_line(error)
        if series.result.status == OUT_OF_MEMORY:  # out here, the exception's frames hold no tensors any more
            self.gave_up.add(series.objective.name)
            self._drop_policy()

    def _drop_policy(self) -> None:
        self.policy = None
        free_memory()


def run(plan: Plan, emit: Emit) -> None:
    """Measure all lengths."""
    config = parse_config(plan.config, "benchmark")
    process_groups.prepare_device(config.parallel)  # Transformer Engine's answers about FP8 start CUDA
    model = resolve_model(config.model, config.parallel)
    check_precision(model, config.optimizer)
    topology = process_groups.initialize(config.parallel, config.seed)
    try:
        layers = "Transformer Engine" if model.uses_transformer_engine else "plain PyTorch"
        recompute = config.parallel.recompute_granularity or "off"
        emit("facts", name="megatron_solopo", text=f"{config.model.dtype}, {layers} layers, recompute {recompute}")
        ours = Ours(plan, topology, emit)
        for long_tokens in plan.long_tokens:
            ours.measure(long_tokens)
    finally:
        process_groups.destroy(topology)


if __name__ == "__main__":
    worker_main(run)
