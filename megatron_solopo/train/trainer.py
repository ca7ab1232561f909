"""A whole training run, from the configuration to the last checkpoint.

config -> process groups -> prepared data -> reference log-probs (cached) -> policy
-> for each step: global batch -> this rank's packs -> Megatron's schedule -> optimizer
                  -> evaluation -> metrics -> checkpoint
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_solopo.architecture.adapters import num_adapter_parameters
from megatron_solopo.architecture.layout import describe_bubble
from megatron_solopo.config import Config, Surroundings, save_config, warning_without_effect
from megatron_solopo.data.loader import GlobalBatch, GlobalBatchLoader
from megatron_solopo.errors import UserError
from megatron_solopo.model.adapters import begin_dropout
from megatron_solopo.model.microbatch import Microbatch
from megatron_solopo.objective import metric_names
from megatron_solopo.parallel.agreement import on_rank_0
from megatron_solopo.plan.pipeline import pipeline_bubble
from megatron_solopo.train.alarms import AlarmWarnings
from megatron_solopo.train.bad_numbers import SKIPPED_FILE, TripletLosses, describe_skip, record_skip
from megatron_solopo.train.callbacks import (
    Callback,
    CollectGarbage,
    OnRank0,
    SaveClock,
    TidyCheckpoints,
    say,
)
from megatron_solopo.train.identity import RunIdentity
from megatron_solopo.train.lock import run_lock
from megatron_solopo.train.metrics import (
    MetricsWriter,
    finite_or_none,
    peak_flops,
    peak_memory_bytes,
    reduce_over_ranks,
    reduce_sums,
    reset_peak_memory,
    training_flops,
)
from megatron_solopo.train.policy import Policy, StepResult, build_policy, check_schedule, describe_decay, load_frozen
from megatron_solopo.train.preflight import Finding, Trial, check_surroundings, tries_largest_pack, try_largest_pack
from megatron_solopo.train.profiling import StepProfiler
from megatron_solopo.train.reference import reference_logprobs
from megatron_solopo.train.run_data import training_batches
from megatron_solopo.train.saving import Saver
from megatron_solopo.train.session import Session, open_session
from megatron_solopo.train.signals import Stopped
from megatron_solopo.train.single_pass import run_single_pass
from megatron_solopo.train.state import Metrics, SkippedSteps, TrainState
from megatron_solopo.train.step import LossFunction, ReferenceLogprobs, objective_loss
from megatron_solopo.train.straggler import WorkClock, find_straggler
from megatron_solopo.train.watchdog import SAVE

# Launchers kill a job some minutes after they asked it to stop. With pipeline stages, a stop waits for a part of an
# evaluation. If all of it takes longer than this, the run is saved first, so that nothing is lost.
_LONG_EVALUATION_SECONDS = 120.0


def train(config: Config) -> None:
    """Run training as `config` says, on the ranks that torchrun started (or on this process alone).

    Raises UserError for anything in the config, the data, the model or a checkpoint that does not fit. Raises
    SystemExit with code 85 after a signal asked to stop and the run was saved (`train.signals`).
    """
    with open_session(config) as session, run_lock(config.run_dir):
        _check_surroundings(session)
        Trainer(session).run()


def preflight(config: Config) -> list[Finding]:
    """Do all checks that come before the first step, always with the largest pack; returns what they found.

    Raises UserError for the first thing that does not fit.
    """
    with open_session(config) as session:
        findings = _check_surroundings(session)
        loader = training_batches(config, session.datasets.by_split["train"], session.topology)
        _load_reference(session)
        policy = build_policy(config, session.model, session.topology, session.max_steps)
        checked = ("data and models", session.datasets.checked)
        return [checked, *findings, ("largest pack", str(_try_largest_pack(session, policy, loader)))]


def _load_reference(session: Session) -> None:
    """Load the reference model, if it is another one than the policy, and drop it: its weights are checked so."""
    config = session.config
    path = config.reference.model_path or config.model.path
    if config.objective.needs_reference and path != config.model.path:
        load_frozen(session.model.at(path), session.topology, chunk_tokens=config.logprob.chunk_tokens)


def precompute_reference(config: Config, *, overwrite: bool) -> Path:
    """Write the reference cache of a run and return its directory. `train` does the same if the cache is missing."""
    if not config.objective.needs_reference:
        raise UserError(f"objective.loss_type={config.objective.loss_type} uses no reference model; nothing to compute")
    with open_session(config) as session:
        _reference_logprobs(session, overwrite=overwrite)
    return config.reference_cache


def _check_surroundings(session: Session) -> list[Finding]:
    ranks = parallel_state.get_data_parallel_world_size(with_context_parallel=True)
    surroundings = Surroundings(dist.get_world_size(), ranks, session.model.uses_transformer_engine)
    if (warning := warning_without_effect(session.config, surroundings)) is not None:
        say(warning)
    return check_surroundings(
        session.config,
        session.model.architecture,
        session.topology,
        session.max_steps,
        lambda check: session.enter(check, 0),
    )


def _try_largest_pack(session: Session, policy: Policy, loader: GlobalBatchLoader) -> Trial:
    session.enter("preflight: largest pack", 0)
    num_rows = len(session.datasets.by_split["train"])
    return try_largest_pack(session.config, policy, loader, num_rows, session.topology, session.watchdog.progress)


def _reference_logprobs(session: Session, *, overwrite: bool = False, step: int = 0) -> dict[str, ReferenceLogprobs]:
    return reference_logprobs(
        session.config,
        session.model,
        session.datasets,
        session.topology,
        overwrite=overwrite,
        points=session.points("reference pass", step),
    )


class Trainer:
    """One run on this rank. The constructor only builds; `run` does the work."""

    policy: Policy
    losses: dict[str, Callable[[Microbatch], LossFunction]]
    """The loss function of each split."""

    def __init__(self, session: Session) -> None:
        config, datasets = session.config, session.datasets
        self.session, self.config, self.topology = session, config, session.topology
        self.datasets = datasets.by_split
        self.metric_names = metric_names(config.objective)
        check_schedule(config.optimizer, session.max_steps)
        self.loader = training_batches(config, self.datasets["train"], self.topology)
        self.save_clock = SaveClock(config.checkpoint)
        self.callbacks = self._build_callbacks()
        session.enter("checksums of the weights", 0)
        identity = RunIdentity(config, datasets, session.max_steps, session.watchdog.progress)
        self.saver = Saver(config, identity, self.callbacks)
        self.state = self.state_before_skips = TrainState(0, self.loader.state_dict(), SkippedSteps())
        self.triplet_losses = TripletLosses()
        self.work_clock = WorkClock(self.topology.device)

    def run(self) -> None:
        """Train to the last step; or save and raise Stopped, if a signal asked to stop."""
        self.prepare()
        trial = None
        if not self._is_finished() and tries_largest_pack(self.config, self.topology):
            trial = _try_largest_pack(self.session, self.policy, self.loader)
        try:
            self._start(trial)
            self._run_steps()
            self.saver.finish()
            for callback in self.callbacks:
                callback.on_success()
        except Stopped as stopped:
            self._save(self.state, str(stopped))
            raise
        finally:
            self._end_threads()

    def prepare(self) -> None:
        """Find the checkpoint to continue from, get the reference log-probs, and load the policy."""
        self.state = self.state_before_skips = self.saver.find_checkpoint(self.loader)
        self._prepare_reference()
        self.policy = build_policy(self.config, self.session.model, self.topology, self.session.max_steps)
        self.saver.restore(self.policy, self.state)

    def _build_callbacks(self) -> list[Callback]:
        config, run_dir = self.config, self.config.run_dir
        tidy = TidyCheckpoints(
            run_dir / "checkpoints",
            config.checkpoint,
            self.metric_names,
            evaluates=config.training.eval_steps is not None,
        )
        writers: list[Callback] = []
        if dist.get_rank() == 0:
            values = config.model_dump(mode="json")
            writer = MetricsWriter(run_dir, config.logging, values, total_steps=self.session.max_steps)
            writers = [writer, AlarmWarnings(writer.path)]
        profiler = StepProfiler(config.profile, run_dir, max_steps=self.session.max_steps)
        return [OnRank0(writers), tidy, self.save_clock, CollectGarbage(config.training), profiler]

    def _prepare_reference(self) -> None:
        references: dict[str, ReferenceLogprobs] = {}
        if self.config.objective.needs_reference:
            references = _reference_logprobs(self.session, step=self.state.step)
            self.saver.add_reference(references)
        self.losses = {
            split: objective_loss(self.config.objective, references.get(split), self.topology, observe)
            for split, observe in {"train": self.triplet_losses.observe, "eval": None}.items()
        }

    def _start(self, trial: Trial | None) -> None:
        """Prepare the run directory, and say what runs where."""
        on_rank_0(self._write_config)
        for callback in self.callbacks:
            callback.on_start(self.state)
        say(self._describe())
        if (note := describe_decay(self.config.optimizer, self.session.max_steps)) is not None:
            say(note)
        if not self._is_finished() and self.config.parallel.pipeline_model_parallel_size > 1:
            say(self._describe_pipeline())
        if trial is not None:
            say(f"the largest pack fits: {trial}")

    def _write_config(self) -> None:
        self.config.run_dir.mkdir(parents=True, exist_ok=True)
        if not self._is_finished():
            save_config(self.config, self.config.run_dir / "config.yaml")

    def _describe(self) -> str:
        """One line of what runs where, for the head of the log."""
        config, parallel, architecture = self.config, self.config.parallel, self.session.model.architecture
        active = f" ({architecture.num_active_parameters:,} active)" if architecture.experts else ""
        layout = (
            f"TP {parallel.tensor_model_parallel_size} x PP {parallel.pipeline_model_parallel_size} x "
            f"CP {parallel.context_parallel_size} x DP {self.topology.data_group.size()}"
        )
        if architecture.experts:
            layout += f", experts: EP {parallel.expert_model_parallel_size} x TP {parallel.expert_tensor_size}"
        adapters = ""
        if (lora := config.lora) is not None:
            adapters = f", trains LoRA of rank {lora.rank}: {num_adapter_parameters(architecture, lora):,} parameters"
        return (
            f"{architecture.model_type} of {architecture.num_parameters:,} parameters{active} in "
            f"{config.model.dtype}{adapters} | "
            f"{dist.get_world_size()} {self.topology.device.type} processes: {layout} | "
            f"{len(self.datasets['train'])} triplets, "
            f"{self.session.max_steps} steps of {config.training.global_batch_size}"
        )

    def _describe_pipeline(self) -> str:
        packs = self.loader.next_packs()
        bubble = pipeline_bubble(self.config.parallel, packs)
        return f"{packs} packs per rank in the first step: {describe_bubble(bubble)}"

    def _end_threads(self) -> None:
        """Wait for the threads that write: after a failure a save may still be on its way to the disk."""
        if self.saver.is_running:
            error = sys.exception()
            assert error is not None, "after success and after a stop the save is complete"
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            sys.stderr.write(f"[rank {dist.get_rank()}] {reason}; waiting for this rank's files of the running save\n")
            self.session.watchdog.wait_for_own_save()
        self.saver.abandon()
        for callback in self.callbacks:
            callback.close()

    def _is_finished(self) -> bool:
        return self.state.step >= self.session.max_steps

    def _is_last_step(self) -> bool:
        return self.state.step == self.session.max_steps

    def _run_steps(self) -> None:
        if self.state.unrecorded is not None:
            self._complete_step(self.state.unrecorded)
        while not self._is_finished():
            self.saver.reserve_host_memory(self.state)
            for callback in self.callbacks:
                callback.on_step_begin(self.state.step + 1)
            self._complete_step(self._train_step())

    def _complete_step(self, metrics: Metrics) -> None:
        """What follows an optimizer step: evaluation, metrics and checkpoint."""
        if self._must_evaluate():
            if self._evaluation_holds_up_stops(metrics):
                self.session.enter(SAVE, self.state.step)
                self.saver.save(self.state, "before a long evaluation", is_last=False)
            metrics = metrics | self._evaluate()
        for callback in self.callbacks:
            callback.on_step_end(metrics)
        self.state = replace(self.state, unrecorded=None, metrics=metrics)
        step, is_last = self.state.step, self._is_last_step()
        self.session.enter(SAVE, step)
        self.saver.complete_if_written()
        if reason := self.save_clock.reason_to_save(step, is_last=is_last):
            background = self.config.checkpoint.async_save and not is_last
            self.saver.save(self.state, reason, is_last=is_last, background=background)

    def _evaluation_holds_up_stops(self, metrics: Metrics) -> bool:
        """Whether a stop may have to wait so long for a part of the evaluation that the ranks are killed before.

        The time is estimated from that of the step.
        """
        if self.config.parallel.pipeline_model_parallel_size == 1:
            return False  # it stops between two packs
        step_flops, step_seconds = metrics["flops"], metrics["step_time"]
        if not step_flops or not step_seconds:
            return False
        share_prompts = self.config.data.share_prompts
        sizes = self.datasets["eval"].sizes(self.config.objective.roles.all, 1, share_prompts=share_prompts)
        return step_seconds * sizes.flops / step_flops > _LONG_EVALUATION_SECONDS

    def _save(self, state: TrainState, reason: str) -> Path | None:
        self.session.enter(SAVE, state.step)
        return self.saver.save(state, reason)

    def _train_step(self) -> Metrics:
        started = time.monotonic()
        reset_peak_memory()
        step = self.state.step + 1
        if not self.state.skipped.in_a_row:
            self.state_before_skips = self.state
        self.session.enter_or_stop("data", step)
        self.work_clock.start()  # here all ranks have met
        batch = self.loader.next_batch()
        self.session.enter("forward and backward", step)
        if step == 1 and self.config.model.has_delayed_scales:
            started += self._warm_scales(batch)
        self.triplet_losses.clear()
        if self.config.lora is not None and self.config.lora.dropout:
            begin_dropout(self.config.seed, step)
        result = self.policy.step(
            batch.packs,
            self.losses["train"],
            self.topology,
            before_pack=self._before_pack,
            before_reduction=self.work_clock.switch,
        )
        self.session.enter("metrics", step)
        sums = reduce_sums(result.reports, len(self.metric_names), self.topology)
        means = {name: total / batch.num_triplets for name, total in zip(self.metric_names, sums, strict=True)}
        skipped = self.state.skipped.after(skipped=result.skipped)
        if result.skipped:
            self._record_skip(step, skipped, batch, result)
        counts = {"skipped": int(result.skipped), "skipped_steps": skipped.total}
        measured = means | self._router_metrics() | self._costs(batch, result, time.monotonic() - started)
        metrics = {"step": step} | finite_or_none(measured) | counts
        self.state = TrainState(step, self.loader.state_dict(), skipped, unrecorded=metrics)
        return metrics

    def _warm_scales(self, batch: GlobalBatch) -> float:
        """Find the scales of FP8's delayed recipe. Returns the seconds, which are no part of the step's."""
        started = time.monotonic()
        self.work_clock.switch()
        self.policy.warm_scales(batch.packs, self.losses["train"], self.topology, self.session.before_pack)
        if self.topology.device.type == "cuda":
            torch.cuda.synchronize()
        self.work_clock.switch()
        return time.monotonic() - started

    def _router_metrics(self) -> dict[str, float]:
        """How the step's tokens were routed; nothing for a model without experts."""
        architecture = self.session.model.architecture
        if self.policy.router_watch is None or architecture.experts is None:
            return {}
        return self.policy.router_watch.metrics(
            architecture.num_layers, architecture.experts.num_experts, architecture.experts.topk, self.topology.device
        )

    def _before_pack(self) -> None:
        self.work_clock.switch()
        self.session.before_pack()  # waits for other ranks
        self.work_clock.switch()

    def _record_skip(self, step: int, skipped: SkippedSteps, batch: GlobalBatch, result: StepResult) -> None:
        """Say what was skipped. If it is one step too many, save the state before the skipped steps and give up."""
        skip = describe_skip(step, self.triplet_losses, batch.packs, gradient_is_finite=result.gradient_was_finite)
        on_rank_0(lambda: record_skip(self.config.run_dir, skip))
        most = self.config.training.max_skipped_steps_in_a_row
        if skipped.in_a_row >= most:
            saved = self._save(self.state_before_skips, "before the skipped steps")
            kept = f"{saved} holds the run before the first of them" if saved else "nothing was updated before them"
            raise UserError(
                f"{skip}; it is number {skipped.in_a_row} in a row, and training.max_skipped_steps_in_a_row={most}. "
                f"{kept}; {self.config.run_dir / SKIPPED_FILE} names them all"
            )

    def _costs(self, batch: GlobalBatch, result: StepResult, seconds: float) -> Metrics:
        """What the step took: its time, the memory of the fullest rank, the rank that the others waited for."""
        seconds, memory = reduce_over_ranks([seconds, peak_memory_bytes()], dist.ReduceOp.MAX, self.topology)
        # Every rank of a replica counts the replica's packs, so the sum counts each pack once per such rank.
        own_flops = (
            training_flops(self.session.model.architecture, batch.packs, base_learns=self.config.lora is None)
            / self.config.parallel.model_parallel_size
        )
        work = [0.0] * dist.get_world_size()
        work[dist.get_rank()] = self.work_clock.seconds()
        flops, *work = reduce_over_ranks([own_flops, *work], dist.ReduceOp.SUM, self.topology)
        parallel = self.config.parallel
        straggler = find_straggler(
            work,
            seconds,
            ranks_per_replica_stage=parallel.tensor_model_parallel_size * parallel.context_parallel_size,
            stages=parallel.pipeline_model_parallel_size,
        )
        peak = peak_flops()
        return {
            "grad_norm": result.grad_norm,
            "learning_rate": result.learning_rate,
            "num_triplets": batch.num_triplets,
            "num_tokens": batch.num_tokens,
            "num_sequence_tokens": batch.num_sequence_tokens,
            "pack_fill": batch.pack_fill,
            "step_time": seconds,
            "tokens_per_second": batch.num_tokens / seconds,
            "mfu": None if peak is None else flops / (seconds * peak * dist.get_world_size()),
            "peak_memory_bytes": int(memory),
            "flops": flops,
            "num_processes": dist.get_world_size(),
            "straggler_rank": None if straggler is None else straggler.rank,
            "straggler_share": None if straggler is None else straggler.share,
        }

    def _must_evaluate(self) -> bool:
        every = self.config.training.eval_steps
        return every is not None and (self.state.step % every == 0 or self._is_last_step())

    def _evaluate(self) -> Metrics:
        """Mean metrics over the whole held-out split, with the prefix `eval_`."""
        dataset = self.datasets["eval"]
        reports: list[Any] = []
        self.policy.gather_parameters()  # ranks of unequal passes could not gather them on the way
        run_single_pass(
            self.config,
            self.policy.chunks,
            dataset,
            self.topology,
            self.losses["eval"],
            lambda pack, report: reports.append(report),
            "evaluation",
            points=self.session.points("evaluation", self.state.step),
        )
        sums = reduce_sums(reports, len(self.metric_names), self.topology)
        means = {f"eval_{name}": total / len(dataset) for name, total in zip(self.metric_names, sums, strict=True)}
        return finite_or_none(means)
