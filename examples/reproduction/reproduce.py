"""The reproduction: base models, pairs from their answers, runs of the trainer, accuracy against length."""

import json
import logging
import os
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import click

# Heavy libraries are imported by functions, because every worker starts this file.

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Job:
    """A piece of work for one process."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    needs: tuple[str, ...] = ()
    """Names of jobs that come first."""


@click.command(context_settings={"max_content_width": 110})
@click.option("--work", default=HERE / "work", type=click.Path(path_type=Path), help="Directory to work in.")
@click.option("--processes", default=2, show_default=True, help="Jobs side by side, a core each.")
@click.option("--only", default="", help="Only the runs whose name contains this, such as seed0 or simpo.")
@click.option("--list", "list_only", is_flag=True, help="Name what is missing, and stop.")
def main(work: Path, processes: int, only: str, list_only: bool) -> None:
    """Train and measure what is missing, into WORK/runs.jsonl. Stopped and started again, it goes on.

    \b
    Examples:
      python examples/reproduction/reproduce.py
      python examples/reproduction/reproduce.py --only base95-seed0-simpo
    """
    from miniature.plan import all_runs

    runs = [run for run in all_runs() if only in run.name]
    if not runs:
        raise click.BadParameter(f"{only!r} is in no run's name; --list shows all", param_hint="--only")
    results = work / "runs.jsonl"
    jobs = missing_jobs(work, runs, results)
    if list_only:
        click.echo("\n".join(job.name for job in jobs))
        return
    with ProcessPoolExecutor(processes, get_context("spawn"), start_worker) as pool:
        finish(jobs, pool, processes, results)
    click.echo(f"{len(runs)} runs: {results}")


def missing_jobs(work: Path, runs: list[Any], results: Path) -> list[Job]:
    """What is still to do, in the order to start it: bases, then each pair of contexts just before its first run."""
    from miniature import jobs
    from miniature.runs import base_directory, data_directory

    lines = results.read_text(encoding="utf-8").splitlines() if results.exists() else []
    done = {json.loads(line)["name"] for line in lines}
    runs = [run for run in runs if run.name not in done]
    strengths: dict[int, set[int]] = {}
    for run in runs:
        strengths.setdefault(run.seed, set()).add(run.strength)
    found = {
        f"base models of seed {seed}": Job(
            f"base models of seed {seed}", jobs.make_bases, (work, seed, tuple(sorted(levels)))
        )
        for seed, levels in strengths.items()
        if not all(base_directory(work, level, seed).is_dir() for level in levels)
    }
    for run in runs:
        base, data = f"base models of seed {run.seed}", f"pairs of base {run.strength}, seed {run.seed}"
        if run.method != "base" and not (data_directory(work, run.strength, run.seed) / "reference").is_dir():
            found.setdefault(data, Job(data, jobs.make_data, (work, run.seed, run.strength), (base,)))
        found[run.name] = Job(run.name, jobs.make_run, (work, run), (base, data))
    return list(found.values())


def finish(jobs: list[Job], pool: ProcessPoolExecutor, processes: int, results: Path) -> None:
    """Run the jobs, each when what it needs is there; the first error ends it."""
    from tqdm import tqdm

    waiting = {job.name: job for job in jobs}
    running: dict[Future[Any], str] = {}
    results.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(jobs), unit="job") as bar, results.open("a", encoding="utf-8") as stream:
        while waiting or running:
            busy = waiting.keys() | set(running.values())
            ready = [job for job in waiting.values() if not busy.intersection(job.needs)]
            for job in ready[: processes - len(running)]:
                running[pool.submit(job.function, *job.arguments)] = job.name
                del waiting[job.name]
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                if line := future.result():
                    stream.write(json.dumps(line) + "\n")
                    stream.flush()
                bar.set_postfix_str(running.pop(future))
                bar.update()


def start_worker() -> None:
    """Keep the libraries' notes out of the progress bar; one thread each; end where the program was killed."""
    import torch

    threading.Thread(target=end_with_parent, daemon=True).start()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)


def end_with_parent() -> None:
    """A killed program cannot end its workers, which would write beside those of the next one."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


if __name__ == "__main__":
    main()
