"""Train and measure all runs, each as soon as a core is free. What stands in `results/` is not done again."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
from tqdm import tqdm

from make_model import make_model
from make_pairs import make_pairs
from megatron_solopo.errors import UserError
from megatron_solopo.files import write_json
from smollm2.measuring import contexts_of, measure
from smollm2.plan import BASE, FULL, NEEDLES, QUICK, Run, Sizes, groups
from smollm2.questions import write_questions
from smollm2.steps import HERE, dtype
from smollm2.training import TRAINING, model_directory, train_run


@dataclass(frozen=True)
class Job:
    """A piece of work for one core."""

    run: Run
    part: str
    """`training`, or a part of the questions."""
    function: Callable[[], dict[str, Any]]


class Results:
    """The files of results: `<folder>/<name of a run>.json`, each with a run's training and its parts."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def of(self, run: Run) -> dict[str, Any]:
        """What is known of a run; empty if nothing is."""
        path = self._folder / f"{run.name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def add(self, run: Run, part: str, found: dict[str, Any]) -> None:
        """Write a part. A training removes the other parts: other weights gave them, maybe in another dtype."""
        kept = {} if part == TRAINING else self.of(run)
        write_json(self._folder / f"{run.name}.json", kept | {"run": asdict(run), part: found})


def missing_jobs(work: Path, sizes: Sizes, results: Results, runs: list[Run]) -> list[Job]:
    """Seed by seed: training, the longest first, then what every seed is measured on. What is left comes at the end."""
    jobs = []
    for place, run in enumerate(runs):
        missing = [part for part in run.parts(sizes) if part not in results.of(run)]
        is_trained = TRAINING in results.of(run) and (not missing or model_directory(work, run).is_dir())
        if run.method != BASE and not is_trained:
            # The plan names the method with the longest training last.
            jobs.append(((False, run.seed, -1, -place), Job(run, TRAINING, partial(train_run, work, run, sizes))))
            missing = run.parts(sizes)
        for part in missing:
            is_extra = part not in run.main_parts(sizes)
            order = (is_extra, run.seed, run.parts(sizes).index(part), place)
            jobs.append((order, Job(run, part, partial(measure, work, sizes, run, part))))
    return [job for _, job in sorted(jobs, key=lambda each: each[0])]


def finish(jobs: list[Job], results: Results, processes: int) -> None:
    """Do the jobs; a run is measured after its training.

    After an error no further job begins. It is raised when the running jobs have ended and their results are kept.
    """
    running: dict[Future[dict[str, Any]], Job] = {}
    errors: list[BaseException] = []
    with ThreadPoolExecutor(processes) as pool, tqdm(total=len(jobs), unit="job") as bar:
        while jobs or running:
            untrained = {job.run for job in [*jobs, *running.values()] if job.part == TRAINING}
            ready = [job for job in jobs if job.part == TRAINING or job.run not in untrained]
            for job in ready[: processes - len(running)]:
                running[pool.submit(job.function)] = job
                jobs.remove(job)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(future)
                if error := future.exception():
                    errors.append(error)
                    jobs.clear()
                    continue
                results.add(job.run, job.part, future.result())
                bar.set_postfix_str(f"{job.run.name} {job.part}")
                bar.update()
    if errors:
        raise errors[0]


@click.command(context_settings={"max_content_width": 110})
@click.option("--work", type=click.Path(path_type=Path), help="Directory to work in. If not given, beside this script.")
@click.option("--quick", is_flag=True, help="Three triplets and two questions, to see the whole way in minutes.")
@click.option(
    "--everything",
    is_flag=True,
    help="Also both answers aligned, four times as many steps, ORPO, DPO, adapters, longer contexts.",
)
@click.option("--processes", default=2, show_default=True, help="Jobs side by side, a core each.")
@click.option("--list", "list_only", is_flag=True, help="Name what is missing, and stop.")
def main(work: Path | None, quick: bool, everything: bool, processes: int, list_only: bool) -> None:
    """Model, questions, pairs, training, evaluation. Stopped and started again, it goes on.

    Results of finished parts lie in examples/smollm2/results/full, with --quick in WORK/results.

    \b
    Examples:
      python examples/smollm2/run_all.py --quick
      python examples/smollm2/run_all.py
      python examples/smollm2/run_all.py --everything --list
    """
    sizes = QUICK if quick else FULL
    work = (work or HERE / "work" / sizes.name).resolve()
    results = Results(work / "results" if quick else HERE / "results" / "full")
    by_group = list(groups(sizes, everything=everything))
    if list_only:
        for job in (job for runs in by_group for job in missing_jobs(work, sizes, results, runs)):
            click.echo(f"{job.run.name} {job.part}")
        return
    click.echo(f"training and answers compute in {dtype()}")
    try:
        make_inputs(work, sizes, [run for runs in by_group for run in runs])
        for runs in by_group:
            finish(missing_jobs(work, sizes, results, runs), results, processes)
    except UserError as error:
        raise click.ClickException(str(error)) from None


def make_inputs(work: Path, sizes: Sizes, runs: Sequence[Run]) -> None:
    """What the runs share, where it is not there yet."""
    if not (work / "model").is_dir():
        make_model(work / "model")
    if not (work / "questions").is_dir():
        write_questions(work / "questions")
    make_pairs(work, sizes, runs)
    for part in dict.fromkeys(part for run in runs for part in run.parts(sizes)):
        if part != NEEDLES:
            contexts_of(work, sizes, part)


if __name__ == "__main__":
    main()
