#!/usr/bin/env python3
"""How fast `data build` makes long contexts, and what memory it takes, on one process and on several.

    python -m tools.benchmarks.data_benchmark --json data_benchmark.json

Builds contexts from the shipped questions, asked again under other ids until there are enough, with the example's
tokenizer or one of yours. Times include reading the corpus, starting processes and writing. Memory is the greatest
sum over all processes of proportional set size, so that pages they share count once. Prints tables for RESULTS.md.
"""

import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import click
import psutil

from tools.reporting import environment, table

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ROOT / "examples" / "musique" / "musique.jsonl"
_MIB = 2**20
_SAMPLE_SECONDS = 0.1


@dataclass(frozen=True)
class Usage:
    """What a command took."""

    seconds: float
    cpu_seconds: float
    """Of all processes: what other work on the machine disturbs little."""
    peak_bytes: int
    peak_anonymous_bytes: int
    """Without pages of files, which the system drops where memory is short."""
    load_average: float
    """Over the last minute, before the start: what else ran on the machine."""


@dataclass(frozen=True)
class Run:
    """One build."""

    num_proc: int
    contexts: int
    tokens: int
    """Of the long contexts, room for responses included."""
    seconds: float
    """This and what follows: see `Usage`."""
    cpu_seconds: float
    peak_bytes: int
    peak_anonymous_bytes: int
    load_average: float


@click.command(help=__doc__)
@click.option("--contexts", default=560, show_default=True, help="Contexts to build.")
@click.option("--long-tokens", default=32768, show_default=True, help="Length of each.")
@click.option("--num-proc", "processes", multiple=True, type=int, default=(1, 2), show_default=True, help="Processes.")
@click.option("--tokenizer", help="A tokenizer directory; by default the example's, made anew.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures there, too.")
def main(
    contexts: int, long_tokens: int, processes: tuple[int, ...], tokenizer: str | None, json_file: Path | None
) -> None:
    """Measure each number of processes once."""
    if min(contexts, long_tokens, *processes) < 1:
        raise click.UsageError("--contexts, --long-tokens and --num-proc: must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        if tokenizer is None:
            tokenizer = str(path / "tokenizer")
            make_tokenizer(Path(tokenizer))
        write_corpus(path / "questions.jsonl", contexts)
        runs = [measure(path, tokenizer, long_tokens, count) for count in processes]
    where = shown_environment()
    click.echo(f"{where}\n\n{shown_runs(runs)}")
    if json_file:
        json_file.write_text(json.dumps({"machine": where, "runs": list(map(asdict, runs))}, indent=2) + "\n")


def make_tokenizer(path: Path) -> None:
    """The example's byte-level BPE of 4,096 entries."""
    script = ROOT / "examples" / "musique" / "make_tokenizer_and_model.py"
    spec = importlib.util.spec_from_file_location("make_example", script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.make_tokenizer().save_pretrained(path)


def write_corpus(path: Path, count: int) -> None:
    """`count` questions: the shipped ones in turn, each time under other ids."""
    rows = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    with path.open("w", encoding="utf-8") as stream:
        again = (row | {"id": f"{row['id']}/{turn}"} for turn in range(1 + count // len(rows)) for row in rows)
        for row in islice(again, count):
            stream.write(json.dumps(row) + "\n")


def measure(folder: Path, tokenizer: str, long_tokens: int, num_proc: int) -> Run:
    """Build once in processes of its own."""
    output = folder / f"contexts-{num_proc}.jsonl"
    command = [sys.executable, "-m", "megatron_solopo", "data", "build", "--input", str(folder / "questions.jsonl")]
    command += ["--output", str(output), "--tokenizer", tokenizer, "--long-tokens", str(long_tokens)]
    usage = watch([*command, "--num-proc", str(num_proc)])
    report = json.loads((output.with_suffix(".report") / "report.json").read_text())
    written = report["rows_written"]
    output.unlink()
    return Run(num_proc, written, round(written * report["long_tokens"]["mean"]), **asdict(usage))


def watch(command: list[str]) -> Usage:
    """Run a command of the project and see what it takes. Raises ClickException if it fails."""
    load, cpu = os.getloadavg()[0], children_cpu_seconds()
    started = time.perf_counter()
    child = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    peak = peak_anonymous = 0
    while child.poll() is None:
        whole, anonymous = tree_bytes(child.pid)
        peak, peak_anonymous = max(peak, whole), max(peak_anonymous, anonymous)
        time.sleep(_SAMPLE_SECONDS)
    seconds = time.perf_counter() - started
    if child.returncode:
        raise click.ClickException(f"{command[2:5]} failed with exit code {child.returncode}, its message is above")
    return Usage(round(seconds, 1), round(children_cpu_seconds() - cpu, 1), peak, peak_anonymous, load)


def children_cpu_seconds() -> float:
    """User and system time of all finished processes below this one."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def tree_bytes(pid: int) -> tuple[int, int]:
    """Proportional set size of a process and all below it, and the part that no file backs.

    A process that ends meanwhile counts as nothing.
    """
    whole = anonymous = 0
    try:
        root = psutil.Process(pid)
        family = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0, 0
    for process in family:
        try:
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
        except OSError:
            continue
        kib = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
        whole += 1024 * kib["Pss"]
        anonymous += 1024 * kib["Pss_Anon"]
    return whole, anonymous


def shown_environment() -> str:
    """Where, when and with what this was measured, in a line."""
    return ", ".join(f"{name} {value}" for name, value in environment(("tokenizers", "transformers")).items())


def shown_runs(runs: list[Run]) -> str:
    """Markdown."""
    rates_and_times = ("seconds", "contexts/s", "tokens/s", "CPU s", "tokens/CPU s")
    columns = ("processes", "contexts", "tokens", *rates_and_times, "peak MiB", "load before")
    rows = (
        [
            f"{run.num_proc}",
            f"{run.contexts:,}",
            f"{run.tokens:,}",
            f"{run.seconds}",
            f"{run.contexts / run.seconds:.1f}",
            f"{run.tokens / run.seconds:,.0f}",
            f"{run.cpu_seconds}",
            f"{run.tokens / run.cpu_seconds:,.0f}",
            f"{run.peak_bytes / _MIB:,.0f}",
            f"{run.load_average:.1f}",
        ]
        for run in runs
    )
    return table(columns, rows)


if __name__ == "__main__":
    main()
