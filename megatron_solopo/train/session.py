"""What a run works in: checked inputs, process groups, stop signals and a watchdog.

A run tells its session which phase it enters. The watchdog takes that as progress, and in some phases the run can stop.
All ranks enter the same phases in the same order.
"""

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch.distributed as dist
from tqdm import tqdm

from megatron_solopo import exits
from megatron_solopo.checkpoint.load import check_weights
from megatron_solopo.config import Config, check_not_by_hand
from megatron_solopo.errors import UserError
from megatron_solopo.files import check_writable
from megatron_solopo.model.resolve import ResolvedModel, check_precision, resolve_model
from megatron_solopo.parallel import topology as process_groups
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train.policy import check_offload
from megatron_solopo.train.preflight import check_same_start, start_facts
from megatron_solopo.train.run_data import RunDatasets, load_run_datasets
from megatron_solopo.train.signals import Stopped, StopSignals
from megatron_solopo.train.single_pass import PassPoints
from megatron_solopo.train.watchdog import Watchdog, watching


@dataclass(frozen=True)
class Session:
    """The surroundings of one run on this rank."""

    config: Config
    model: ResolvedModel
    topology: Topology
    datasets: RunDatasets
    signals: StopSignals
    watchdog: Watchdog

    @property
    def max_steps(self) -> int:
        """The run's last step, from `training.max_steps` or `training.num_train_epochs`."""
        training = self.config.training
        if training.max_steps is not None:
            return training.max_steps
        return math.ceil(training.num_train_epochs * len(self.datasets.by_split["train"]) / training.global_batch_size)

    def enter(self, phase: str, step: int) -> None:
        """Enter a phase that must be completed; it cannot stop here."""
        self.watchdog.arrive(phase, step)

    def enter_or_stop(self, phase: str, step: int) -> None:
        """Enter a phase; raises Stopped instead, on every rank, if a signal asked any rank to stop."""
        self.watchdog.arrive(phase, step)
        self.signals.check()

    def before_pack(self) -> None:
        """Called before this stage's forward of a pack; raises Stopped if the run is to stop here.

        It never stops where a step cannot be undone: pipeline stages have several packs in flight, and the scales of
        FP8's delayed recipe remember every forward.
        """
        self.watchdog.progress()
        if self.topology.pipeline_group.size() == 1 and not self.config.model.has_delayed_scales:
            self.signals.check_meanwhile()

    def points(self, phase: str, step: int) -> PassPoints:
        """Where a pass over a data set may stop, and how the watchdog sees it advance."""
        return PassPoints(lambda: self.enter_or_stop(phase, step), self.before_pack)


@contextmanager
def open_session(config: Config) -> Iterator[Session]:
    """Open a session; at its end the process groups are destroyed, and `Stopped` becomes SystemExit with code 85.

    However the session ends, threads that may hold a group or a collective end before the groups do. The thread that
    listens for signals ends right after. If one of them were left, the interpreter would abort when it ends.
    """
    with StopSignals() as signals:
        model, topology, datasets = check_and_join(config)
        try:
            signals.join()
            with watching(config.watchdog, config.run_dir) as watchdog:
                yield Session(config, model, topology, datasets, signals, watchdog)
                signals.conclude()
        except Stopped as stopped:
            signals.finish(stopped)
            raise SystemExit(exits.STOPPED) from None
        finally:
            signals.leave()
            process_groups.destroy(topology)


def _check_reference(config: Config, model: ResolvedModel, path: Path) -> None:
    """Check another reference model as the policy is checked: config.json, layout, precision, list of tensors."""
    try:
        reference = model.at(path)
        check_precision(reference, config.optimizer)
        check_weights(path, reference.architecture)
    except UserError as error:
        raise UserError(f"reference.model_path={path}: {error}") from None


def check_and_join(config: Config) -> tuple[ResolvedModel, Topology, RunDatasets]:
    """Check model, layout, data and directories, the cheapest first, then join the process groups.

    Raises UserError if something does not fit, or is not the same on all ranks.
    """
    model = resolve_model(config.model, config.parallel)
    check_offload(config.optimizer, model)
    check_precision(model, config.optimizer)
    check_weights(model.path, model.architecture)
    if config.objective.needs_reference and config.reference.model_path not in (None, model.path):
        _check_reference(config, model, config.reference.model_path)
    datasets = load_run_datasets(config, model.architecture)
    check_writable(config.run_dir, "run_dir")
    check_not_by_hand(config.run_dir / "config.yaml")
    facts = start_facts(config, datasets)
    topology = process_groups.initialize(config.parallel, config.seed, lambda: check_same_start(facts))
    for note in datasets.notes if dist.get_rank() == 0 else ():
        tqdm.write(note, file=sys.stderr)  # stdout may be a file of results
    return model, topology, datasets
