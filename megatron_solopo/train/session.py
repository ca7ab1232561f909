"""What a run works in: checked inputs, process groups, stop signals and a watchdog.

A run tells its session which phase it enters. The watchdog takes that as progress, and in some phases the run can stop.
All ranks enter the same phases in the same order.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch.distributed as dist
from tqdm import tqdm

from megatron_solopo import exits
from megatron_solopo.architecture.adapters import check_adapters
from megatron_solopo.architecture.layout import check_training
from megatron_solopo.checkpoint.load import check_weights
from megatron_solopo.config import Config, check_not_by_hand
from megatron_solopo.cpu_features import is_cpu, warn_about_slow_bfloat16
from megatron_solopo.data.prepared import load_prepared
from megatron_solopo.errors import UserError
from megatron_solopo.files import check_writable
from megatron_solopo.model.resolve import ResolvedModel, check_attention, check_precision, resolve_model
from megatron_solopo.parallel import topology as process_groups
from megatron_solopo.parallel.agreement import on_every_rank, on_rank_0
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train.policy import check_offload
from megatron_solopo.train.preflight import check_same_start, start_facts
from megatron_solopo.train.run_data import RunSource, load_run_sources
from megatron_solopo.train.signals import Stopped, StopSignals
from megatron_solopo.train.single_pass import PassPoints
from megatron_solopo.train.watchdog import Watchdog, watching


@dataclass(frozen=True)
class Session:
    """The surroundings of one run on this rank."""

    config: Config
    model: ResolvedModel
    topology: Topology
    sources: tuple[RunSource, ...]
    signals: StopSignals
    watchdog: Watchdog

    @property
    def max_steps(self) -> int:
        """The run's last step, from `training.max_steps` or `training.num_train_epochs`."""
        training = self.config.training
        if training.max_steps is not None:
            return training.max_steps
        rows = sum(len(source.train) for source in self.sources)
        return math.ceil(training.num_train_epochs * rows / training.global_batch_size)

    def enter(self, phase: str, step: int) -> None:
        """Enter a phase that must be completed; it cannot stop here."""
        self.watchdog.arrive(phase, step)

    def enter_or_stop(self, phase: str, step: int) -> None:
        """Enter a phase; raises Stopped instead, on every rank, if a signal asked any rank to stop."""
        self.watchdog.arrive(phase, step)
        self.signals.check()

    def before_pack(self) -> None:
        """Called in a step before this stage's forward of a pack; raises Stopped if the run is to stop here.

        It never stops where a step cannot be undone: pipeline stages have several packs in flight, and the scales of
        FP8's delayed recipe remember every forward with gradients.
        """
        self._before_pack(may_stop=not self.config.model.has_delayed_scales)

    def points(self, phase: str, step: int) -> PassPoints:
        """Where a pass without gradients over a data set may stop, and how the watchdog sees it advance."""
        return PassPoints(lambda: self.enter_or_stop(phase, step), partial(self._before_pack, may_stop=True))

    def _before_pack(self, *, may_stop: bool) -> None:
        self.watchdog.progress()
        if may_stop and self.topology.pipeline_group.size() == 1:
            self.signals.check_meanwhile()


@contextmanager
def open_session(config: Config) -> Iterator[Session]:
    """Open a session; at its end the process groups are destroyed, and `Stopped` becomes SystemExit with code 85.

    However the session ends, threads that may hold a group or a collective end before the groups do. The thread that
    listens for signals ends right after. If one of them were left, the interpreter would abort when it ends.
    """
    with StopSignals() as signals:
        model, topology, sources = check_and_join(config)
        try:
            signals.join()
            with watching(config.watchdog, config.run_dir) as watchdog:
                yield Session(config, model, topology, sources, signals, watchdog)
                signals.conclude()
        except Stopped as stopped:
            signals.finish(stopped)
            raise SystemExit(exits.STOPPED) from None
        finally:
            signals.leave()
            process_groups.destroy(topology)


def warn_about_dtype(config: Config) -> None:
    """Print, on one rank, that another `model.dtype` is faster on this CPU, if it is."""
    if config.model.dtype == "bfloat16" and is_cpu():
        warn_about_slow_bfloat16("model.dtype=float32")


def check_and_join(config: Config) -> tuple[ResolvedModel, Topology, tuple[RunSource, ...]]:
    """Check model, layout and directories, join the ranks, check together what is large, then make the other groups.

    Before the join a rank reads small files alone. What takes long or opens many files is checked by rank 0 for all.

    Raises UserError on every rank if something does not fit, or is not the same on all ranks.
    """
    process_groups.prepare_device(config.parallel)  # Transformer Engine's answers about FP8 start CUDA
    model = resolve_model(config.model, config.parallel)
    check_training(model.architecture, config.parallel, config.optimizer, config.moe)
    check_adapters(model.architecture, config)
    check_offload(config.optimizer, model)
    check_precision(model, config.optimizer)
    check_attention(model, config)
    reference = _resolve_reference(config, model)
    prepared = [load_prepared(source.config.data.directory) for source in config.sources]
    check_writable(config.run_dir, "run_dir")
    check_not_by_hand(config.run_dir / "config.yaml")
    found: list[tuple[RunSource, ...]] = []

    def check() -> None:
        on_rank_0(lambda: _check_weights(model, reference))
        check_same_start(on_every_rank(lambda: start_facts(config, [each.manifest for each in prepared])))
        found.append(load_run_sources(config, model.architecture, prepared))

    topology = process_groups.initialize(config.parallel, config.seed, check)
    (sources,) = found
    notes = dict.fromkeys(note for source in sources for note in source.datasets.notes)
    for note in notes if dist.get_rank() == 0 else ():
        tqdm.write(note, file=sys.stderr)  # stdout may be a file of results
    return model, topology, sources


def _resolve_reference(config: Config, model: ResolvedModel) -> ResolvedModel | None:
    """Check another reference model as the policy is checked, by its config.json. None if there is no other one."""
    path = config.reference.model_path
    if not config.needs_reference or path in (None, model.path):
        return None
    try:
        reference = model.at(path)
        check_precision(reference, config.optimizer)
        check_attention(reference, config)
    except UserError as error:
        raise UserError(f"reference.model_path={path}: {error}") from None
    return reference


def _check_weights(model: ResolvedModel, reference: ResolvedModel | None) -> None:
    """Check the lists of stored tensors."""
    check_weights(model.path, model.architecture)
    if reference is None:
        return
    try:
        check_weights(reference.path, reference.architecture)
    except UserError as error:
        raise UserError(f"reference.model_path={reference.path}: {error}") from None
