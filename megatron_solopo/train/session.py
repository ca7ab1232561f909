"""What a run works in: checked inputs, process groups, and who watches over it.

A session's places are where a run can be asked to stop, and what a watchdog calls progress. All ranks come to the same
places in the same order.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from megatron_solopo import exits
from megatron_solopo.config import Config, check_not_by_hand
from megatron_solopo.files import check_writable
from megatron_solopo.model.resolve import ResolvedModel, check_precision, resolve_model
from megatron_solopo.parallel import topology as process_groups
from megatron_solopo.parallel.topology import Topology
from megatron_solopo.train.policy import check_offload
from megatron_solopo.train.preflight import check_same_start, start_facts
from megatron_solopo.train.run_data import Splits, load_splits
from megatron_solopo.train.signals import Stopped, StopSignals
from megatron_solopo.train.watchdog import Watchdog, watching


@dataclass(frozen=True)
class Session:
    """The surroundings of one run on this rank."""

    config: Config
    model: ResolvedModel
    topology: Topology
    splits: Splits
    signals: StopSignals
    watchdog: Watchdog

    def begin(self, phase: str, step: int) -> None:
        """A place where nothing can be left half done: the watchdog is told, and that is all."""
        self.watchdog.arrive(phase, step)

    def boundary(self, phase: str, step: int) -> None:
        """A place where a run can stop: raises Stopped, on every rank, if any was asked to."""
        self.watchdog.arrive(phase, step)
        self.signals.check()

    def before_pack(self) -> None:
        """Within a step, before this stage's forward of a pack; a boundary where the step can be left without a trace.

        Pipeline stages have several packs in flight, and the scales of FP8's delayed recipe remember every forward.
        """
        self.watchdog.progress()
        if self.topology.pipeline_group.size() == 1 and not self.config.model.has_delayed_scales:
            self.signals.check_meanwhile()


@contextmanager
def open_session(config: Config) -> Iterator[Session]:
    """A session, until the process groups are left; `Stopped` leaves it as SystemExit with code 85.

    However it ends, the threads that may hold a group or a collective end before the groups do, and the thread that
    listens for signals right after. The interpreter aborts where such a thread is left when it ends.
    """
    with StopSignals() as signals:
        model, topology, splits = check_and_join(config)
        try:
            signals.join()
            with watching(config.watchdog, config.run_dir) as watchdog:
                yield Session(config, model, topology, splits, signals, watchdog)
                signals.conclude()
        except Stopped as stopped:
            signals.finish(stopped)
            raise SystemExit(exits.STOPPED) from None
        finally:
            signals.leave()
            process_groups.destroy(topology)


def check_and_join(config: Config) -> tuple[ResolvedModel, Topology, Splits]:
    """Check model, layout, data and directories, cheapest first, then join the process groups.

    Raises UserError for what does not fit, or is not the same on all ranks.
    """
    model = resolve_model(config.model, config.parallel)
    check_precision(model, config.optimizer)
    check_offload(config.optimizer, model)
    splits = load_splits(config, model.architecture)
    check_writable(config.run_dir, "run_dir")
    check_not_by_hand(config.run_dir / "config.yaml")
    facts = start_facts(config, splits)
    topology = process_groups.initialize(config.parallel, config.seed, lambda: check_same_start(facts))
    return model, topology, splits
