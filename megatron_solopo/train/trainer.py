"""A whole run: set up, reference pass, steps, evaluation, checkpoints, picture.

config -> process groups -> prepared data -> reference log-probs (cached) -> policy
-> for each step: global batch -> this rank's packs -> Megatron's schedule -> optimizer
                  -> evaluation, metrics, checkpoint where due
"""

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_solopo import exits
from megatron_solopo.architecture.huggingface import Architecture, read_architecture
from megatron_solopo.architecture.layout import check_layout
from megatron_solopo.config import Config
from megatron_solopo.config_file import check_not_by_hand, save_config
from megatron_solopo.data.loader import GlobalBatch
from megatron_solopo.files import check_writable, read_jsonl
from megatron_solopo.model.precision import check_precision
from megatron_solopo.model.spec import uses_transformer_engine
from megatron_solopo.objective import metric_names
from megatron_solopo.parallel import topology as process_groups
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train.batches import single_pass, training_batches
from megatron_solopo.train.cost import peak_flops, peak_memory_bytes, reset_peak_memory, training_flops
from megatron_solopo.train.identity import run_identity
from megatron_solopo.train.lock import run_lock
from megatron_solopo.train.metrics import Metrics, MetricsWriter, reduce_over_ranks, reduce_sums
from megatron_solopo.train.optimizer import check_offload, check_schedule
from megatron_solopo.train.plot import plot_metrics
from megatron_solopo.train.policy import StepResult, build_policy
from megatron_solopo.train.reference import fingerprint, reference_logprobs
from megatron_solopo.train.saving import Saver
from megatron_solopo.train.signals import Stopped, StopSignals
from megatron_solopo.train.splits import Splits, load_splits
from megatron_solopo.train.step import objective_loss


def train(config: Config) -> None:
    """Run training as `config` says, on the ranks that torchrun started (or on this process alone).

    Raises ValueError for anything in the config, the data, the model or a checkpoint that does not fit, and
    SystemExit with code 85 where a signal asked to stop, once all is saved (`train.signals`).
    """
    with (
        StopSignals() as signals,
        _prepared(config, signals) as (architecture, topology, splits),
        run_lock(config.run_dir),
    ):
        Trainer(config, architecture, topology, splits, signals).run()


def precompute_reference(config: Config, *, overwrite: bool) -> Path:
    """Write the reference cache of a run and return its directory; what `train` does first if it is missing."""
    if not config.objective.needs_reference:
        raise ValueError(
            f"objective.loss_type={config.objective.loss_type} uses no reference model; nothing to compute"
        )
    with StopSignals() as signals, _prepared(config, signals) as (_, topology, splits):
        reference_logprobs(config, splits, topology, overwrite=overwrite, boundary=signals.check)
    return config.reference_cache


@contextmanager
def _prepared(config: Config, signals: StopSignals) -> Iterator[tuple[Architecture, Topology, Splits]]:
    """What `prepare` returns, until the process groups are left; `Stopped` becomes the exit code."""
    architecture, topology, splits = prepare(config)
    try:
        signals.join()
        yield architecture, topology, splits
    except Stopped as stopped:
        signals.finish(stopped)
        raise SystemExit(exits.STOPPED) from None
    finally:
        process_groups.destroy(topology)


def prepare(config: Config) -> tuple[Architecture, Topology, Splits]:
    """Check model, layout, data and directories, cheapest first, then join the process groups."""
    architecture = read_architecture(config.model.path)
    check_layout(architecture, config.parallel)
    uses_transformer_engine(config.model)  # refuses what cannot run here
    check_precision(architecture, config.model, config.parallel, config.optimizer)
    check_offload(config.optimizer, config.model)
    splits = load_splits(config, architecture)
    check_writable(config.run_dir, "run_dir")
    check_not_by_hand(config.run_dir / "config.yaml")
    return architecture, process_groups.initialize(config.parallel, config.seed), splits


class Trainer:
    """One run on this rank."""

    def __init__(
        self,
        config: Config,
        architecture: Architecture,
        topology: Topology,
        splits: Splits,
        signals: StopSignals,
    ) -> None:
        self.config, self.architecture, self.topology, self.splits = config, architecture, topology, splits
        self.signals = signals
        self.names = metric_names(config.objective)
        self.loader = training_batches(config, splits.datasets["train"], topology)
        self.max_steps = _max_steps(config, len(splits.datasets["train"]))
        check_schedule(config.optimizer, self.max_steps)
        self.saver = Saver(config, self.loader, run_identity(config, splits), self.max_steps)
        self.step = self.saver.boundary.step
        references: dict[str, Any] = {}
        if config.objective.needs_reference:
            references = reference_logprobs(config, splits, topology, boundary=signals.check)
            self.saver.keep("reference.cache (its numbers)", fingerprint(references))
        self.losses = {
            name: objective_loss(config.objective, references.get(name), topology) for name in splits.datasets
        }
        self.policy = build_policy(config, topology, self.max_steps)
        self.saver.restore(self.policy)

    def run(self) -> None:
        """Train to the last step, or save and raise Stopped where a signal asked to stop."""
        writer = self._start_writing()
        if writer is not None:
            writer.say(self._describe())
        try:
            self._run_steps(writer)
        except Stopped as stopped:
            self.saver.save(str(stopped))
            self.saver.finish()
            raise
        self.saver.finish()
        if writer is not None:
            plot_metrics(read_jsonl(writer.path), self.config.run_dir / "metrics.png")

    def _run_steps(self, writer: MetricsWriter | None) -> None:
        if self.saver.boundary.unrecorded is not None:
            self._complete_step(self.saver.boundary.unrecorded, writer)
        while self.step < self.max_steps:
            self.signals.check()
            self._complete_step(self._train_step(), writer)

    def _complete_step(self, metrics: Metrics, writer: MetricsWriter | None) -> None:
        """All that follows an optimizer step: evaluation, metrics and checkpoint, where due."""
        if self._evaluation_due():
            metrics = metrics | self._evaluate()
        if writer is not None:
            writer.write(metrics)
        self.saver.recorded(metrics)

    def _describe(self) -> str:
        """One line of what runs where, for the head of the log."""
        parallel, config = self.config.parallel, self.config
        layout = (
            f"TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size} x "
            f"CP {parallel.context_parallel_size} x DP {self.topology.data_group.size()}"
        )
        model = f"{self.architecture.model_type} of {self.architecture.num_parameters:,} parameters"
        triplets = len(self.splits.datasets["train"])
        return (
            f"{model} in {config.model.dtype} | "
            f"{dist.get_world_size()} {self.topology.device.type} processes: {layout} | "
            f"{triplets} triplets, {self.max_steps} steps of {config.training.global_batch_size}"
        )

    def _train_step(self) -> Metrics:
        started = time.monotonic()
        reset_peak_memory()
        batch = self.loader.next_batch()
        result = self.policy.step(
            batch.packs,
            self.losses["train"],
            self.topology,
            before_pack=self.signals.check if self._can_stop_within_a_step() else None,
        )
        self.step += 1
        sums = reduce_sums(result.reports, len(self.names), self.topology)
        means = {name: total / batch.num_triplets for name, total in zip(self.names, sums, strict=True)}
        self._check_finite(means | {"grad_norm": result.grad_norm}, batch)
        metrics = {"step": self.step} | means | self._costs(batch, result, time.monotonic() - started)
        self.saver.step_done(metrics)
        return metrics

    def _can_stop_within_a_step(self) -> bool:
        """Whether a step can be left between two packs without a trace.

        Pipeline stages have several packs in flight, and the scales of FP8's delayed recipe remember every forward.
        """
        model = self.config.model
        return self.topology.pipeline_group.size() == 1 and (model.fp8 is None or model.fp8_recipe != "delayed")

    def _check_finite(self, values: Mapping[str, float], batch: GlobalBatch) -> None:
        """Stop, on all ranks together, before numbers that are not finite reach a file."""
        broken = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if broken:
            raise FloatingPointError(
                f"step {self.step}: {', '.join(broken)}; this rank's triplets were "
                f"{', '.join(triplet for pack in batch.packs for triplet in pack.ids)}. Nothing of this step was saved"
            )

    def _costs(self, batch: GlobalBatch, result: StepResult, seconds: float) -> Metrics:
        """What the step took; time is the slowest rank's, memory the fullest one's."""
        seconds, memory = reduce_over_ranks([seconds, peak_memory_bytes()], dist.ReduceOp.MAX, self.topology)
        # Every rank of a replica counts its packs; the sum over the world counts each pack once per such rank.
        (flops,) = reduce_over_ranks(
            [training_flops(self.architecture, batch.packs) / self.config.parallel.model_parallel_size],
            dist.ReduceOp.SUM,
            self.topology,
        )
        peak = peak_flops()
        return {
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "num_triplets": batch.num_triplets,
            "num_tokens": batch.num_tokens,
            "pack_fill": batch.pack_fill,
            "step_time": seconds,
            "tokens_per_second": batch.num_tokens / seconds,
            "mfu": None if peak is None else flops / (seconds * peak * dist.get_world_size()),
            "peak_memory_bytes": int(memory),
            "flops": flops,
            "num_processes": dist.get_world_size(),
        }

    def _evaluate(self) -> Metrics:
        """Mean metrics over the whole held-out split, under the prefix `eval_`."""
        dataset = self.splits.datasets["eval"]
        reports = []
        for batch in single_pass(self.config, dataset, self.topology, "evaluation", boundary=self.signals.check):
            found = self.policy.evaluate(batch.packs, self.losses["eval"], self.topology)
            reports += [report for report, counted in zip(found, batch.counted, strict=bool(found)) if counted]
        sums = reduce_sums(reports, len(self.names), self.topology)
        means = {f"eval_{name}": total / len(dataset) for name, total in zip(self.names, sums, strict=True)}
        self._check_finite(means, batch)
        return means

    def _evaluation_due(self) -> bool:
        every = self.config.training.eval_steps
        return every is not None and (self.step % every == 0 or self.step == self.max_steps)

    def _start_writing(self) -> MetricsWriter | None:
        """Prepare the run directory on rank 0, which alone writes metrics."""
        if dist.get_rank() != 0:
            return None
        self.config.run_dir.mkdir(parents=True, exist_ok=True)
        if self.step < self.max_steps:
            save_config(self.config, self.config.run_dir / "config.yaml")
        return MetricsWriter(
            self.config.run_dir,
            self.config.logging,
            self.config.model_dump(mode="json"),
            first_step=self.saver.boundary.first_unrecorded_step,
            total_steps=self.max_steps,
        )


def _max_steps(config: Config, num_triplets: int) -> int:
    if config.training.max_steps is not None:
        return config.training.max_steps
    return math.ceil(config.training.num_train_epochs * num_triplets / config.training.global_batch_size)
