"""Asked to stop, a run stops on all ranks together, loses nothing, and goes on as if nothing had been."""

import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_solopo import exits
from megatron_solopo.config import Config
from megatron_solopo.files import read_jsonl
from megatron_solopo.train import policy, signals, step, trainer
from megatron_solopo.train.signals import Stopped, StopSignals
from megatron_solopo.train.trainer import precompute_reference, train
from tests.distributed import exit_codes, run_distributed
from tests.train.runs import at_call, make_inputs, recorded, small_config

CACHE = {"reference.json", "train.parquet", "eval.parquet"}
TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
TP2_DP2 = {"tensor_model_parallel_size": 2}
LAYOUTS = {"pipeline": TP2_PP2, "data": TP2_DP2}
# The layout, where the signal comes (before which call of what, on which rank), and the step that is saved.
RUNS: dict[str, tuple[str, Any, str, int, int, int]] = {
    # With pipeline stages the step is finished; without, it is left before its first or its second micro-batch.
    "pipeline-step": ("pipeline", policy.Policy, "step", 3, 2, 3),
    "pipeline-evaluation": ("pipeline", trainer, "run_single_pass", 1, 3, 2),
    "data-step": ("data", policy.Policy, "step", 3, 0, 2),
    "data-micro-batch": ("data", step, "forward_microbatch", 5, 3, 2),
}


def ask_to_stop() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stopped(config: Config, target: Any, name: str, number: int, rank: int) -> Any:
    with at_call(target, name, number, rank, ask_to_stop), pytest.raises(SystemExit) as exit_:
        train(config)
    return exit_.value.code


def kept(cache: Path) -> int:
    """Triplets of the training split in the journals of an unfinished pass."""
    return sum(len(read_jsonl(path)) - 1 for path in (cache / "unfinished").glob("train-*.jsonl"))


def run_all(folder: Path) -> dict[str, Any]:
    """Under both layouts: an undisturbed run, and runs that were stopped and started again."""
    found: dict[str, Any] = {"codes": {}, "saved": {}}
    precompute_reference(small_config(folder, "unused", TP2_PP2), overwrite=False)
    for layout, parallel in LAYOUTS.items():
        train(small_config(folder, f"{layout}-whole", parallel))
    for run, (layout, target, name, number, rank, _) in RUNS.items():
        config = small_config(folder, run, LAYOUTS[layout])
        found["codes"][run] = stopped(config, target, name, number, rank)
        found["saved"][run] = sorted(path.name for path in (config.run_dir / "checkpoints").glob("*"))
        train(config)
    # With pipeline stages the pass stops behind a part; without, before one of its next packs.
    for layout, parallel in LAYOUTS.items():
        own_cache = small_config(folder, "unused", parallel, reference={"cache": folder / f"own-{layout}"})
        with at_call(step, "forward_microbatch", 2, 1, ask_to_stop), pytest.raises(SystemExit) as exit_:
            precompute_reference(own_cache, overwrite=False)
        found["codes"][f"reference-{layout}"] = exit_.value.code
        dist.barrier()
        found[layout] = sorted(path.relative_to(folder).as_posix() for path in (folder / f"own-{layout}").rglob("*"))
        found[f"{layout} kept"] = kept(folder / f"own-{layout}")
        dist.barrier()
        precompute_reference(own_cache, overwrite=False)
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("signals"))


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return run_distributed(run_all, 4, folder)


def test_every_rank_ends_with_the_same_code(found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert rank["codes"] == dict.fromkeys([*RUNS, *(f"reference-{layout}" for layout in LAYOUTS)], exits.STOPPED)


@pytest.mark.parametrize("run", RUNS)
def test_one_checkpoint_is_written_and_the_run_goes_on_bit_equal(
    found: list[dict[str, Any]], folder: Path, run: str
) -> None:
    layout, *_, saved = RUNS[run]
    assert found[0]["saved"][run] == [f"iter_{saved:07d}", "latest"]
    whole = recorded(folder, f"{layout}-whole")
    assert len(whole) == 4 and "eval_loss" in whole[1]
    assert recorded(folder, run) == whole


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_reference_pass_that_is_stopped_keeps_what_it_has(
    found: list[dict[str, Any]], folder: Path, layout: str
) -> None:
    assert all("reference.json" not in path and "parquet" not in path for path in found[0][layout])
    # Ten triplets: a pipeline completes its part, two ranks without one have run one or two packs each.
    few, many = (10, 10) if layout == "pipeline" else (2, 6)
    assert few <= found[0][f"{layout} kept"] <= many
    assert {path.name for path in (folder / f"own-{layout}").iterdir()} == CACHE


def wait_in_a_collective(numbers: tuple[int, ...], pause: float, same_request: float, late: float) -> None:
    """Rank 0 gets signals while it sits in a collective that rank 1 joins late, then both come to a boundary."""
    signals._SAME_REQUEST_SECONDS = same_request
    with StopSignals() as listening:
        listening.join()
        if dist.get_rank() == 0:
            context = multiprocessing.get_context("fork")
            sender = context.Process(target=send, args=(os.getpid(), numbers, pause))
            sender.start()
        else:
            time.sleep(late)
        dist.all_reduce(torch.zeros(1))
        try:
            listening.check()
        except Stopped:
            os._exit(exits.STOPPED)


def send(process: int, numbers: tuple[int, ...], pause: float) -> None:
    for number in numbers:
        time.sleep(pause)
        os.kill(process, number)


def test_a_second_signal_exits_at_once_even_from_a_collective() -> None:
    numbers = (signal.SIGTERM, signal.SIGINT)
    codes = exit_codes(wait_in_a_collective, 2, numbers, 0.5, 0.2, 100.0, patience=90, until=1)
    assert codes[0] == exits.of_signal(signal.SIGINT)


def test_one_request_delivered_twice_is_one() -> None:
    numbers = (signal.SIGUSR1, signal.SIGUSR1)
    assert exit_codes(wait_in_a_collective, 2, numbers, 0.1, 60.0, 2.0, patience=90) == [exits.STOPPED] * 2


def test_within_a_step_a_rank_runs_one_boundary_ahead_and_all_stop_at_the_next() -> None:
    assert exit_codes(agree_meanwhile, 2, patience=90) == [exits.STOPPED] * 2


def agree_meanwhile() -> None:
    """Rank 1 does not come to its first boundary before rank 0 has left it."""
    signals = StopSignals()
    with signals:
        signals.join()
        if dist.get_rank() == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
            signals.check_meanwhile()
            dist.send(torch.zeros(1), 1)
        else:
            dist.recv(torch.zeros(1), 0)
            signals.check_meanwhile()
        try:
            signals.check_meanwhile()
        except Stopped:
            os._exit(exits.STOPPED)


def test_before_the_ranks_have_met_a_signal_ends_the_process() -> None:
    assert exit_codes(signalled_before_joining, 1, patience=90) == [exits.STOPPED]


def signalled_before_joining() -> None:
    with StopSignals():
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(100)


def test_outside_a_run_signals_are_what_they_were() -> None:
    before = [signal.getsignal(number) for number in signals.SIGNALS]
    with StopSignals():
        assert [signal.getsignal(number) for number in signals.SIGNALS] != before
    assert [signal.getsignal(number) for number in signals.SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1
