"""The reproduction: base models, pairs, runs; continued where it stopped."""

import json
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import click

HERE = Path(__file__).parent


@click.command()
@click.option("--work", default=HERE / "work", type=click.Path(path_type=Path), help="Directory to work in.")
@click.option("--processes", default=2, show_default=True, help="Runs side by side, a core each.")
@click.option("--only", default="", help="Only runs whose name contains this.")
def main(work: Path, processes: int, only: str) -> None:
    """Train and measure everything, into WORK/runs.jsonl. Started again, it does what is missing."""
    from miniature.plan import all_runs

    runs = [run for run in all_runs() if only in run.name]
    results = work / "runs.jsonl"
    with ProcessPoolExecutor(processes, get_context("spawn"), _initialize) as pool:
        reproduce(pool, work, runs, results)


def _initialize() -> None:
    import logging
    import warnings

    from miniature.jobs import start_worker

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    start_worker()


def reproduce(pool: ProcessPoolExecutor, work: Path, runs: list[Any], results: Path) -> None:
    """Base models, then pairs, then runs."""
    from miniature import jobs
    from miniature.runs import base_directory, data_directory

    seeds = {run.seed: None for run in runs}
    strengths = {seed: tuple(sorted({run.strength for run in runs if run.seed == seed})) for seed in seeds}
    bases = [
        pool.submit(jobs.make_bases, work, seed, found)
        for seed, found in strengths.items()
        if not all(base_directory(work, strength, seed).is_dir() for strength in found)
    ]
    _wait("base models", bases)
    places = dict.fromkeys((run.seed, run.strength) for run in runs if run.method != "base")
    data = [
        pool.submit(jobs.make_data, work, *place)
        for place in places
        if not (data_directory(work, place[1], place[0]) / "reference").is_dir()
    ]
    _wait("pairs", data)
    done = {json.loads(line)["name"] for line in results.read_text().splitlines()} if results.exists() else set()
    with results.open("a", encoding="utf-8") as stream:

        def keep(found: dict[str, Any]) -> None:
            stream.write(json.dumps(found) + "\n")
            stream.flush()

        _wait("runs", [pool.submit(jobs.make_run, work, run) for run in runs if run.name not in done], keep)


def _wait(what: str, jobs: Iterable[Future[Any]], then: Callable[[Any], None] = lambda found: None) -> None:
    """Progress with the time to go; the first error ends it."""
    from tqdm import tqdm

    futures = list(jobs)
    for future in tqdm(as_completed(futures), what, len(futures), disable=not futures):
        then(future.result())


if __name__ == "__main__":
    main()
