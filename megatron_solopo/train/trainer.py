"""A whole training run, from the configuration to the last checkpoint.

config -> process groups -> prepared data -> reference log-probs (cached) -> policy
-> for each step: global batch -> this rank's packs -> Megatron's schedule -> optimizer
                  -> evaluation -> metrics -> checkpoint
"""

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_solopo.architecture.adapters import num_adapter_parameters
from megatron_solopo.architecture.layout import describe_bubble
from megatron_solopo.config import Config, Surroundings, save_config, warning_without_effect
from megatron_solopo.data.loader import GlobalBatch, GlobalBatchLoader, TripletDataset
from megatron_solopo.data.packing import Pack
from megatron_solopo.errors import UserError
from megatron_solopo.model.adapters import begin_dropout
from megatron_solopo.model.microbatch import Microbatch
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
from megatron_solopo.train.metric_table import MetricTable
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
from megatron_solopo.train.reference import load_reference, reference_logprobs
from megatron_solopo.train.run_data import RunSource, loader_source, training_batches
from megatron_solopo.train.saving import Saver
from megatron_solopo.train.session import Session, open_session, warn_about_dtype
from megatron_solopo.train.signals import Stopped
from megatron_solopo.train.single_pass import run_single_pass
from megatron_solopo.train.state import Metrics, SkippedSteps, TrainState
from megatron_solopo.train.step import LossFunction, ReferenceLogprobs, SourceLoss, mixture_loss, objective_loss
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
    warn_about_dtype(config)
    with open_session(config) as session, run_lock(config.run_dir):
        _check_surroundings(session)
        Trainer(session).run()


def preflight(config: Config) -> list[Finding]:
    """Do all checks that come before the first step, always with the largest pack; returns what they found.

    Raises UserError for the first thing that does not fit.
    """
    warn_about_dtype(config)
    with open_session(config) as session:
        findings = _check_surroundings(session)
        loader = _training_batches(session)
        _load_reference(session)
        policy = build_policy(config, session.model, session.topology, session.max_steps)
        checked = [("data and models", found) for found in dict.fromkeys(s.datasets.checked for s in session.sources)]
        return [*checked, *findings, ("largest pack", str(_try_largest_pack(session, policy, loader)))]


def _training_batches(session: Session) -> GlobalBatchLoader:
    return training_batches(session.config, [loader_source(source) for source in session.sources], session.topology)


def _load_reference(session: Session) -> None:
    """Load the reference model, if it is another one than the policy, and drop it: its weights are checked so."""
    config = session.config
    path = config.reference.model_path or config.model.path
    if config.needs_reference and path != config.model.path:
        load_frozen(session.model.at(path), session.topology, chunk_tokens=config.logprob.chunk_tokens)


def precompute_reference(config: Config, *, overwrite: bool) -> Path:
    """Write the reference cache of a run and return its directory. `train` does the same if the cache is missing."""
    if not config.needs_reference:
        raise UserError(f"objective.loss_type={config.objective.loss_type} uses no reference model; nothing to compute")
    warn_about_dtype(config)
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
    return try_largest_pack(
        session.config, policy, loader, session.sources, session.topology, session.watchdog.progress
    )


def _reference_logprobs(
    session: Session, *, overwrite: bool = False, step: int = 0
) -> list[dict[str, ReferenceLogprobs]]:
    """Of every source, by split; nothing for a source whose objective needs none."""
    load = cache(partial(load_reference, session.config, session.model, session.topology))
    return [
        reference_logprobs(
            source.config,
            session.model,
            source.datasets,
            session.topology,
            overwrite=overwrite,
            points=session.points("reference pass", step),
            load=load,
        )
        if source.config.objective.needs_reference
        else {}
        for source in session.sources
    ]


def _keep_report(reports: list[Tensor], _: Pack, report: Tensor) -> None:
    reports.append(report)


class Trainer:
    """One run on this rank. The constructor only builds; `run` does the work."""

    policy: Policy
    training_loss: Callable[[Microbatch], LossFunction]
    """Of packs of all sources."""
    evaluation_losses: list[Callable[[Microbatch], LossFunction]]
    """Of each source."""

    def __init__(self, session: Session) -> None:
        config = session.config
        self.session, self.config, self.topology = session, config, session.topology
        self.sources = session.sources
        self.metrics = MetricTable.of(self.sources)
        check_schedule(config.optimizer, session.max_steps)
        self.loader = _training_batches(session)
        self.save_clock = SaveClock(config.checkpoint)
        self.callbacks = self._build_callbacks()
        session.enter("checksums of the weights", 0)
        identity = RunIdentity(config, self.sources, session.max_steps, session.watchdog.progress)
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
        evaluates = config.training.eval_steps is not None
        evaluated = [source for source in self.sources if evaluates and source.held_out is not None]
        tidy = TidyCheckpoints(
            run_dir / "checkpoints", config.checkpoint, self.metrics.names, MetricTable.of(evaluated).names
        )
        writers: list[Callback] = []
        if dist.get_rank() == 0:
            values = config.model_dump(mode="json")
            writer = MetricsWriter(run_dir, config.logging, values, total_steps=self.session.max_steps)
            writers = [writer, AlarmWarnings(writer.path, [source.name for source in self.sources])]
        profiler = StepProfiler(config.profile, run_dir, max_steps=self.session.max_steps)
        return [OnRank0(writers), tidy, self.save_clock, CollectGarbage(config.training), profiler]

    def _prepare_reference(self) -> None:
        references: list[dict[str, ReferenceLogprobs]] = [{} for _ in self.sources]
        if self.config.needs_reference:
            references = _reference_logprobs(self.session, step=self.state.step)
            self.saver.add_reference(
                {
                    f"{source.name} {split}".strip(): logprobs
                    for source, found in zip(self.sources, references, strict=True)
                    for split, logprobs in found.items()
                }
            )
        train, held_out = (
            [
                SourceLoss(source.config.objective, found.get(split))
                for source, found in zip(self.sources, references, strict=True)
            ]
            for split in ("train", "eval")
        )
        self.training_loss = mixture_loss(train, self.topology, self.triplet_losses.observe)
        self.evaluation_losses = [objective_loss(each.objective, each.references, self.topology) for each in held_out]

    def _start(self, trial: Trial | None) -> None:
        """Prepare the run directory, and say what runs where."""
        on_rank_0(self._write_config)
        for callback in self.callbacks:
            callback.on_start(self.state)
        say(self._describe())
        for line in self._describe_sources():
            say(line)
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
            f"{sum(len(source.train) for source in self.sources)} triplets, "
            f"{self.session.max_steps} steps of {config.training.global_batch_size}"
        )

    def _describe_sources(self) -> list[str]:
        """For each of `data.sources`, what the whole run draws from it."""
        if self.config.data.sources is None:
            return []
        places = self.session.max_steps * self.config.training.global_batch_size
        return [
            f"source {source.name}: {len(source.train)} rows, objective {source.config.objective.name}, "
            f"{drawn} of {places} draws ({drawn / places:.1%}): {drawn / len(source.train):.2f} passes over its rows"
            for source, drawn in zip(self.sources, self.loader.stream.drawn(places), strict=True)
        ]

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
        flops = sum(
            held_out.sizes(source.config.objective.roles.all, 1, share_prompts=share_prompts).flops
            for source, held_out, _ in self._held_out()
        )
        return step_seconds * flops / step_flops > _LONG_EVALUATION_SECONDS

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
            self.training_loss,
            self.topology,
            before_pack=self._before_pack,
            before_reduction=self.work_clock.switch,
        )
        self.session.enter("metrics", step)
        sums = reduce_sums(result.reports, self.metrics.size, self.topology)
        means = self.metrics.means(sums, batch.triplets_of) | self._draws(batch)
        skipped = self.state.skipped.after(skipped=result.skipped)
        if result.skipped:
            self._record_skip(step, skipped, batch, result)
        counts = {"skipped": int(result.skipped), "skipped_steps": skipped.total}
        measured = means | self._router_metrics() | self._costs(batch, result, time.monotonic() - started)
        metrics = {"step": step} | finite_or_none(measured) | counts
        self.state = TrainState(step, self.loader.state_dict(), skipped, unrecorded=metrics)
        return metrics

    def _draws(self, batch: GlobalBatch) -> Metrics:
        """For each of `data.sources`: its rows in the batch, and how often the run has passed over them."""
        if self.config.data.sources is None:
            return {}
        found: Metrics = {}
        all_drawn = self.loader.stream.drawn(self.loader.consumed_triplets)
        for source, count, drawn in zip(self.sources, batch.triplets_of, all_drawn, strict=True):
            found[f"source/{source.name}/num_triplets"] = count
            found[f"source/{source.name}/passes"] = drawn / len(source.train)
        return found

    def _warm_scales(self, batch: GlobalBatch) -> float:
        """Find the scales of FP8's delayed recipe. Returns the seconds, which are no part of the step's."""
        started = time.monotonic()
        self.work_clock.switch()
        self.policy.warm_scales(batch.packs, self.training_loss, self.topology, self.session.before_pack)
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

    def _held_out(self) -> list[tuple[RunSource, TripletDataset, Callable[[Microbatch], LossFunction]]]:
        """The sources that have held-out rows, these rows, and their loss."""
        return [
            (source, held_out, loss)
            for source, loss in zip(self.sources, self.evaluation_losses, strict=True)
            if (held_out := source.held_out) is not None
        ]

    def _evaluate(self) -> Metrics:
        """Mean metrics over all held-out rows, with the prefix `eval_`."""
        self.policy.gather_parameters()  # ranks of unequal passes could not gather them on the way
        held_out = self._held_out()
        sums: list[float] = []
        for source, dataset, loss in held_out:
            reports: list[Tensor] = []
            run_single_pass(
                source.config,
                self.policy.chunks,
                dataset,
                self.topology,
                loss,
                partial(_keep_report, reports),
                f"evaluation {source.name}".strip(),
                points=self.session.points("evaluation", self.state.step),
            )
            sums += reduce_sums(reports, MetricTable.of([source]).size, self.topology)
        table = MetricTable.of([source for source, *_ in held_out])
        means = table.means(sums, [len(dataset) for _, dataset, _ in held_out])
        return {f"eval_{name}": value for name, value in finite_or_none(means).items()}
