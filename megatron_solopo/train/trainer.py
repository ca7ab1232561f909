"""A whole run: set up, reference pass, steps, evaluation, checkpoints, picture.

config -> process groups -> prepared data -> reference log-probs (cached) -> policy
-> for each step: global batch -> this rank's packs -> Megatron's schedule -> optimizer
                  -> evaluation, metrics, checkpoint where due
"""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_solopo.config import Config, save_config
from megatron_solopo.data.loader import GlobalBatch, GlobalBatchLoader
from megatron_solopo.errors import UserError
from megatron_solopo.files import read_jsonl
from megatron_solopo.objective import metric_names
from megatron_solopo.train.bad_numbers import SKIPPED_FILE, TripletLosses, describe, record_skip
from megatron_solopo.train.lock import run_lock
from megatron_solopo.train.metrics import (
    Metrics,
    MetricsWriter,
    finite_or_none,
    peak_flops,
    peak_memory_bytes,
    reduce_over_ranks,
    reduce_sums,
    reset_peak_memory,
    training_flops,
)
from megatron_solopo.train.plot import plot_metrics
from megatron_solopo.train.policy import Policy, StepResult, build_policy, check_schedule
from megatron_solopo.train.preflight import Finding, Trial, check_surroundings, is_wanted, try_largest_pack
from megatron_solopo.train.reference import fingerprint, reference_logprobs
from megatron_solopo.train.run_data import single_pass, training_batches
from megatron_solopo.train.saving import Saver, run_identity
from megatron_solopo.train.session import Session, open_session
from megatron_solopo.train.signals import Stopped
from megatron_solopo.train.step import objective_loss
from megatron_solopo.train.watchdog import SAVE


def train(config: Config) -> None:
    """Run training as `config` says, on the ranks that torchrun started (or on this process alone).

    Raises UserError for anything in the config, the data, the model or a checkpoint that does not fit, and
    SystemExit with code 85 where a signal asked to stop, once all is saved (`train.signals`).
    """
    with open_session(config) as session, run_lock(config.run_dir):
        _check_surroundings(session)
        Trainer(session).run()


def preflight(config: Config) -> list[Finding]:
    """What is checked before the first step, the largest pack always among it; returns what was found, and trains not.

    Raises UserError for the first thing that does not fit.
    """
    with open_session(config) as session:
        rows = _check_surroundings(session)
        loader = training_batches(config, session.splits.datasets["train"], session.topology)
        policy = build_policy(
            config, session.model, session.topology, _max_steps(config, len(session.splits.datasets["train"]))
        )
        return [*rows, ("largest pack", str(_try_largest_pack(session, policy, loader)))]


def _check_surroundings(session: Session) -> list[Finding]:
    return check_surroundings(
        session.config, session.model.architecture, session.topology, lambda check: session.begin(check, 0)
    )


def _try_largest_pack(session: Session, policy: Policy, loader: GlobalBatchLoader) -> Trial:
    session.begin("preflight: largest pack", 0)
    num_rows = len(session.splits.datasets["train"])
    return try_largest_pack(session.config, policy, loader, num_rows, session.topology, session.watchdog.progress)


def precompute_reference(config: Config, *, overwrite: bool) -> Path:
    """Write the reference cache of a run and return its directory; what `train` does first if it is missing."""
    if not config.objective.needs_reference:
        raise UserError(f"objective.loss_type={config.objective.loss_type} uses no reference model; nothing to compute")
    with open_session(config) as session:
        reference_logprobs(
            config,
            session.model,
            session.splits,
            session.topology,
            overwrite=overwrite,
            boundary=lambda: session.boundary("reference pass", 0),
        )
    return config.reference_cache


class Trainer:
    """One run on this rank."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.config, self.architecture = session.config, session.model.architecture
        self.topology, self.splits = session.topology, session.splits
        config, splits, topology = self.config, self.splits, self.topology
        self.names = metric_names(config.objective)
        self.loader = training_batches(config, splits.datasets["train"], topology)
        self.max_steps = _max_steps(config, len(splits.datasets["train"]))
        check_schedule(config.optimizer, self.max_steps)
        self.saver = Saver(config, self.loader, run_identity(config, splits), self.max_steps)
        self.step, self.skipped = self.saver.boundary.step, self.saver.boundary.skipped
        self.before_skips = self.saver.boundary
        self.triplet_losses = TripletLosses()
        references: dict[str, Any] = {}
        if config.objective.needs_reference:
            references = reference_logprobs(
                config, session.model, splits, topology, boundary=self._boundary("reference pass")
            )
            self.saver.keep("reference.cache (its numbers)", fingerprint(references))
        self.losses = {
            name: objective_loss(config.objective, references.get(name), topology, observe)
            for name, observe in {"train": self.triplet_losses.observe, "eval": None}.items()
        }
        self.policy = build_policy(config, session.model, topology, self.max_steps)
        self.saver.restore(self.policy)
        self.trial = None
        if is_wanted(config, topology) and self.step < self.max_steps:
            self.trial = _try_largest_pack(session, self.policy, self.loader)

    def run(self) -> None:
        """Train to the last step, or save and raise Stopped where a signal asked to stop."""
        writer = self._start_writing()
        if writer is not None:
            writer.say(self._describe())
            if self.trial is not None:
                writer.say(f"the largest pack fits: {self.trial}")
        try:
            self._run_steps(writer)
            self.saver.finish()
        except Stopped as stopped:
            self._save(str(stopped))
            self.saver.finish()
            raise
        finally:
            self._end_threads(writer)
        if writer is not None:
            plot_metrics(read_jsonl(writer.path), self.config.run_dir / "metrics.png")

    def _end_threads(self, writer: MetricsWriter | None) -> None:
        """Wait for the threads that write: after a failure a save may still be on its way to the disk."""
        if self.saver.is_pending:
            error = sys.exception()
            assert error is not None, "success and a stop complete it"
            told = f"{type(error).__name__}: {' '.join(str(error).split())}"
            told += "; waiting for this rank's files of the save that was begun"
            sys.stderr.write(f"[rank {dist.get_rank()}] {told}\n")
            self.session.watchdog.wait_for_own_save()
            self.saver.abandon()
        if writer is not None:
            writer.close()

    def _run_steps(self, writer: MetricsWriter | None) -> None:
        if self.saver.boundary.unrecorded is not None:
            self._complete_step(self.saver.boundary.unrecorded, writer)
        while self.step < self.max_steps:
            self._complete_step(self._train_step(), writer)

    def _complete_step(self, metrics: Metrics, writer: MetricsWriter | None) -> None:
        """All that follows an optimizer step: evaluation, metrics and checkpoint, where due."""
        if self._evaluation_due():
            metrics = metrics | self._evaluate()
        if writer is not None:
            writer.write(metrics)
        self.saver.recorded(metrics)
        self.session.begin(SAVE, self.step)  # `due` completes what was begun in the background
        if reason := self.saver.due():
            self.saver.save_due(reason)

    def _save(self, reason: str) -> Path | None:
        self.session.begin(SAVE, self.step)
        return self.saver.save(reason)

    def _boundary(self, phase: str) -> Callable[[], None]:
        return lambda: self.session.boundary(phase, self.step)

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
        if not self.skipped.in_a_row:
            self.before_skips = self.saver.boundary
        self.session.boundary("data", self.step + 1)
        batch = self.loader.next_batch()
        self.session.begin("forward and backward", self.step + 1)
        self.triplet_losses.clear()
        result = self.policy.step(
            batch.packs,
            self.losses["train"],
            self.topology,
            before_pack=self.session.before_pack,
        )
        self.step += 1
        self.session.begin("metrics", self.step)
        sums = reduce_sums(result.reports, len(self.names), self.topology)
        means = {name: total / batch.num_triplets for name, total in zip(self.names, sums, strict=True)}
        self.skipped = self.skipped.after(skipped=result.skipped)
        if result.skipped:
            self._skip(batch, result)
        counts = {"skipped": int(result.skipped), "skipped_steps": self.skipped.total}
        measured = means | self._costs(batch, result, time.monotonic() - started)
        metrics = {"step": self.step} | finite_or_none(measured) | counts
        self.saver.step_done(metrics, self.skipped)
        return metrics

    def _skip(self, batch: GlobalBatch, result: StepResult) -> None:
        """Say what was skipped; where it was one too many, save what was there before and give up."""
        skip = describe(self.step, self.triplet_losses, batch.packs, gradient_is_finite=result.gradient_was_finite)
        if dist.get_rank() == 0:
            record_skip(self.config.run_dir, skip)
        if self.skipped.in_a_row >= self.config.training.max_skipped_steps_in_a_row:
            self.saver.boundary = self.before_skips
            saved = self._save("before the skipped steps")
            self.saver.finish()
            kept = f"{saved} holds the run before the first of them" if saved else "nothing was updated before them"
            raise UserError(
                f"{skip}; it is number {self.skipped.in_a_row} in a row, and "
                f"training.max_skipped_steps_in_a_row={self.config.training.max_skipped_steps_in_a_row}. {kept}; "
                f"{self.config.run_dir / SKIPPED_FILE} names them all"
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
        boundary = self._boundary("evaluation")
        for batch in single_pass(self.config, dataset, self.topology, "evaluation", boundary=boundary):
            found = self.policy.evaluate(batch.packs, self.losses["eval"], self.topology)
            reports += [report for report, counted in zip(found, batch.counted, strict=bool(found)) if counted]
        sums = reduce_sums(reports, len(self.names), self.topology)
        means = {f"eval_{name}": total / len(dataset) for name, total in zip(self.names, sums, strict=True)}
        return finite_or_none(means)

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
