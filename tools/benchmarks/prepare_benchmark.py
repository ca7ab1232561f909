#!/usr/bin/env python3
"""How fast `data prepare` tokenizes long triplets, and what memory it takes: memory must not grow with the file.

    python -m tools.benchmarks.prepare_benchmark --rows 1000,10000 --json prepare_benchmark.json

Writes triplets whose long prompts are random paragraphs of the shipped questions, and prepares them with the example's
tokenizer. Times include validation, starting processes and writing. Memory is the greatest sum over all processes of
proportional set size, and the part of it that no file backs. Prints a table for RESULTS.md.
"""

import json
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from tools.benchmarks.data_benchmark import QUESTIONS, Usage, make_tokenizer, shown_environment, watch
from tools.reporting import table

_MIB = 2**20
_SHORT_PARAGRAPHS = 3


@dataclass(frozen=True)
class Preparation:
    """One call of `data prepare`."""

    rows: int
    num_proc: int
    tokens: int
    """Of all prompts and responses, each prompt once."""
    file_bytes: int
    usage: Usage


@click.command(help=__doc__)
@click.option("--rows", default="1000,10000", show_default=True, help="Triplets of each file.")
@click.option("--long-tokens", default=32768, show_default=True, help="Least tokens of a long prompt.")
@click.option("--num-proc", default=2, show_default=True, help="Processes.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write the figures there, too.")
def main(rows: str, long_tokens: int, num_proc: int, json_file: Path | None) -> None:
    """Measure each size once."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        make_tokenizer(path / "tokenizer")
        runs = [measure(path, int(count), long_tokens, num_proc) for count in rows.split(",")]
    where = shown_environment()
    click.echo(f"{where}\n\n{shown_runs(runs)}")
    if json_file:
        json_file.write_text(json.dumps({"machine": where, "runs": list(map(asdict, runs))}, indent=2) + "\n")


def measure(folder: Path, count: int, long_tokens: int, num_proc: int) -> Preparation:
    """Write a file and prepare it."""
    source, output = folder / f"triplets-{count}.jsonl", folder / f"prepared-{count}"
    with source.open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in triplets(folder / "tokenizer", count, long_tokens))
    command = [sys.executable, "-m", "megatron_solopo", "data", "prepare", "--input", str(source)]
    command += ["--output", str(output), "--tokenizer", str(folder / "tokenizer"), "--num-proc", str(num_proc)]
    usage = watch(command)
    size = source.stat().st_size
    source.unlink()
    return Preparation(count, num_proc, count_tokens(output), size, usage)


def triplets(tokenizer: Path, count: int, long_tokens: int) -> Iterator[dict[str, Any]]:
    """Triplets of at least so many tokens, in no time."""
    from transformers import AutoTokenizer

    rows = [json.loads(line) for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
    paragraphs = sorted({each["paragraph_text"] for row in rows for each in row["paragraphs"]})
    lengths = [len(ids) for ids in AutoTokenizer.from_pretrained(tokenizer)(paragraphs)["input_ids"]]
    generator = random.Random(0)
    for number in range(count):
        chosen: list[int] = []
        while sum(lengths[each] for each in chosen) < long_tokens:
            chosen += generator.sample(range(len(paragraphs)), 64)
        texts = [paragraphs[each] for each in chosen]
        yield {
            "id": f"row-{number}",
            "prompt_short": "\n\n".join(texts[:_SHORT_PARAGRAPHS]),
            "prompt_long": "\n\n".join(texts),
            "chosen": f"The answer is {number}.",
            "rejected": f"The answer is {number + 1}.",
        }


def count_tokens(prepared: Path) -> int:
    """Of all columns."""
    from megatron_solopo.data.prepared import load_prepared, token_lengths

    data = load_prepared(prepared)
    return int(sum(token_lengths(data.train, column).sum() for column in data.manifest.columns))


def shown_runs(runs: list[Preparation]) -> str:
    """Markdown."""
    columns = (
        "rows",
        "processes",
        "file MiB",
        "tokens",
        "seconds",
        "tokens/s",
        "CPU s",
        "peak MiB",
        "without files",
        "load before",
    )
    rows = (
        [
            f"{run.rows:,}",
            f"{run.num_proc}",
            f"{run.file_bytes / _MIB:,.0f}",
            f"{run.tokens:,}",
            f"{run.usage.seconds}",
            f"{run.tokens / run.usage.seconds:,.0f}",
            f"{run.usage.cpu_seconds}",
            f"{run.usage.peak_bytes / _MIB:,.0f}",
            f"{run.usage.peak_anonymous_bytes / _MIB:,.0f}",
            f"{run.usage.load_average:.1f}",
        ]
        for run in runs
    )
    return table(columns, rows)


if __name__ == "__main__":
    main()
