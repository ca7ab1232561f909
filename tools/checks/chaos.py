"""Kills a random rank with SIGKILL at a random moment, again and again, and asks whether the run ends like any other.

    python -m tools.checks.chaos --config c.yaml --folder work/chaos --kills 50 \\
        training.max_steps=150 checkpoint.save_steps=2

One run goes undisturbed into <folder>/undisturbed. Another one, <folder>/killed, is started as often as it dies, by
torchrun's own agent (`--max-restarts`). Each time one of its ranks dies: first in the reference pass, which every run
does for itself, then in one of the phases of a step: data, forward, backward, optimizer, save, and the writing of
`latest`. Every number of the two runs' metrics that is not a time or a
size of memory must be the same to the last bit. Exit code 1 otherwise. One machine; ranks on CPU or its GPUs.
"""

import json
import logging
import multiprocessing
import os
import random
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import click
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from tqdm import tqdm

from megatron_solopo.errors import UserError
from megatron_solopo.files import check_replaceable, read_jsonl, remove, write_json
from tools.checks.chaos_phases import BEFORE_THE_STEPS, PHASES, WRITTEN_BY_RANK_0, Moment, run_rank
from tools.reporting import environment

MEASURED = ("step_time", "tokens_per_second", "mfu", "peak_memory_bytes", "straggler_rank", "straggler_share")
"""Metrics of the machine, not of the computation."""
STEPS_PER_LIFE = 5
TIMES_PER_LIFE = {"save": 2, "latest": 2}
OWN_NAMES = ("undisturbed", "killed", "logs")


def draw_moments(kills: int, ranks: int, seed: int) -> list[Moment]:
    """One per kill; every phase comes as often as any other, give or take one, in random order.

    The reference pass comes first, because a run that has its numbers does not compute them again. Each life continues
    the pass, so its kills share the duration of one pass. Of several, the last one falls in the held-out split.
    """
    generator = random.Random(seed)
    phases = [phase for _ in range(-(-kills // len(PHASES))) for phase in generator.sample(list(PHASES), len(PHASES))]
    phases = sorted(phases[:kills], key=lambda phase: phase != BEFORE_THE_STEPS)
    in_pass = phases.count(BEFORE_THE_STEPS)
    moments = []
    for number, phase in enumerate(phases, 1):
        rank = 0 if phase == WRITTEN_BY_RANK_0 else generator.randrange(ranks)
        occurrence, fraction = generator.randint(1, TIMES_PER_LIFE.get(phase, STEPS_PER_LIFE)), generator.random()
        if phase == BEFORE_THE_STEPS:
            occurrence, fraction = (2 if 1 < in_pass == number else 1), fraction / in_pass
        moments.append(Moment(phase, rank, occurrence, fraction))
    return moments


def launch(name: str, folder: Path, ranks: int, arguments: list[str], moments: list[Moment], usual: Any) -> float:
    """A run into `folder/name` until it ends or has died more often than it was to; returns seconds."""
    work = folder / "logs" / name
    work.mkdir(parents=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id=name,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=len(moments),
        monitor_interval=0.1,
        # Each life is a fork of one process that has imported everything; nothing of the run was alive in it.
        start_method="forkserver",
        logs_specs=DefaultLogsSpecs(log_dir=str(work), redirects=Std.ALL),
    )
    own = [f"run_dir={folder / name}", "reference.cache=null"]
    os.environ["PYTHONWARNINGS"] = "ignore"  # of libraries, in every life
    for name in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # it reports every death
    # Else a restarted rank may find the addresses of the dead ones in the agent's store (pytorch issue 135712).
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    started, finished = time.monotonic(), threading.Event()
    if moments:
        threading.Thread(target=_show, args=(work / "kills.jsonl", len(moments), finished), daemon=True).start()
    try:
        elastic_launch(config, run_rank)([*arguments, *own], moments, usual, work)
    finally:
        finished.set()
    return time.monotonic() - started


def _show(kills: Path, total: int, finished: threading.Event) -> None:
    with tqdm(desc="killed", total=total, unit="rank") as bar:
        while not finished.wait(0.5):
            bar.update((len(read_jsonl(kills)) if kills.exists() else 0) - bar.n)


def usual_durations(work: Path) -> dict[str, float]:
    """Median seconds of each phase, the longest rank's."""
    found: dict[str, float] = {}
    for path in work.glob("phases-*.json"):
        for phase, seconds in json.loads(path.read_text(encoding="utf-8")).items():
            found[phase] = max(seconds, found.get(phase, 0.0))
    if missing := sorted(set(PHASES) - set(found)):
        raise UserError(f"the undisturbed run never came through {', '.join(missing)}: nothing could be killed there")
    return found


def differences(folder: Path) -> list[str]:
    """Every number of the computation that is not the same in both runs."""
    one, other = (read_jsonl(folder / name / "metrics.jsonl") for name in ("undisturbed", "killed"))
    found = [] if len(one) == len(other) else [f"{len(one)} steps undisturbed, {len(other)} killed"]
    for left, right in zip(one, other, strict=False):
        for key in sorted((left.keys() | right.keys()) - set(MEASURED)):
            if left.get(key) != right.get(key):
                found.append(f"step {left['step']}: {key} {left.get(key)!r} undisturbed, {right.get(key)!r} killed")
    return found


@click.command(help=__doc__.replace("\n\n", "\n\n\b\n", 1))
@click.option("--config", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--folder", required=True, type=click.Path(file_okay=False, path_type=Path), help="Of both runs.")
@click.option("--kills", default=50, show_default=True, type=click.IntRange(min=1))
@click.option("--ranks", default=2, show_default=True, type=click.IntRange(min=1))
@click.option("--seed", default=0, show_default=True, help="Draws phases, ranks and moments.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path), help="Writes the result.")
@click.argument("overrides", nargs=-1)
def main(
    config: Path, folder: Path, kills: int, ranks: int, seed: int, json_path: Path | None, overrides: tuple[str, ...]
) -> None:
    check_replaceable(folder, OWN_NAMES, "--folder")
    remove(folder)
    multiprocessing.set_forkserver_preload(["megatron_solopo.train.trainer", "torch.utils.tensorboard"])
    arguments = ["--config", str(config), *overrides]
    moments = draw_moments(kills, ranks, seed)
    seconds = {"undisturbed": launch("undisturbed", folder, ranks, arguments, [], {})}
    usual = usual_durations(folder / "logs" / "undisturbed")
    seconds["killed"] = launch("killed", folder, ranks, arguments, moments, usual)
    killed = read_jsonl(folder / "logs" / "killed" / "kills.jsonl")
    found = differences(folder)
    if [each["life"] for each in killed] != list(range(kills)):
        found.append(f"{len(killed)} of {kills} kills happened; give the run more steps (training.max_steps)")
    result: dict[str, Any] = {
        "environment": environment(),
        "ranks": ranks,
        "steps": len(read_jsonl(folder / "undisturbed" / "metrics.jsonl")),
        "kills": len(killed),
        "per_phase": dict(Counter(each["phase"] for each in killed)),
        "seconds": {name: round(each, 1) for name, each in seconds.items()},
        "differences": found,
        "killed": killed,
    }
    if json_path is not None:
        write_json(json_path, result)
    click.echo(
        f"{len(killed)} kills in {seconds['killed']:.0f} s (undisturbed {seconds['undisturbed']:.0f} s) over "
        f"{result['steps']} steps: " + ", ".join(f"{phase} {count}" for phase, count in result["per_phase"].items())
    )
    for each in found:
        click.echo(f"DIFFERENT {each}", err=True)
    if found:
        sys.exit(1)
    click.echo("every metric is the same to the last bit")


if __name__ == "__main__":
    main()
