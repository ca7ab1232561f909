"""Does a second round add anything? The miniature: two rounds against one round of as many steps.

python examples/on_policy/measure.py                # all seeds, into rounds.jsonl, rounds.png and RESULTS.md
"""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np

HERE = Path(__file__).resolve().parent
for folder in (HERE.parent / "reproduction", HERE.parents[1]):
    sys.path.insert(0, str(folder))

from megatron_solopo.evaluate.statistics import mean_measure  # noqa: E402
from megatron_solopo.files import atomic_path  # noqa: E402
from megatron_solopo.results.long_context import read_long_context  # noqa: E402
from megatron_solopo.triplets.context_rows import to_line  # noqa: E402
from tools.reporting import LEFT, fill_tables, table  # noqa: E402

LOOPS = {
    "two_rounds": (),
    "one_long_round": ("rounds=1", "train.training.max_steps=200"),
}
"""Overrides of loops/miniature.yaml."""
NAMES = {
    ("two_rounds", 0): "base",
    ("two_rounds", 1): "round 1, 100 steps",
    ("two_rounds", 2): "round 2, 100 steps more",
    ("one_long_round", 1): "one round, 200 steps",
}
"""What is compared: loop and round."""


def make_inputs(work: Path, seed: int) -> None:
    """The seed's base model and contexts, and the questions that all models answer."""
    from miniature.base import train_base
    from miniature.evaluate import question_rows
    from miniature.pairs import write_contexts
    from miniature.runs import EVAL_QUESTIONS, EVAL_SEED, LONG_LENGTH, LONGS_PER_QUESTION, NUM_QUESTIONS

    questions, folder = work / "questions.jsonl", work / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    if not questions.exists():
        write(questions, "".join(map(to_line, question_rows(EVAL_QUESTIONS, EVAL_SEED))))
    if not (folder / "contexts.jsonl").exists():
        write_contexts(folder / "contexts.jsonl", NUM_QUESTIONS, LONGS_PER_QUESTION, LONG_LENGTH, seed)
    if not (folder / "base").exists():
        train_base({0.95: folder / "base"}, seed)


def run_loop(work: Path, seed: int, name: str) -> None:
    """Carry out what is missing of a loop."""
    work = Path(os.path.relpath(work))  # as in the file of the loop, which can then be started by itself
    folder = work / f"seed{seed}"
    paths = [f"work={folder / name}", f"model={folder / 'base'}", f"contexts={folder / 'contexts.jsonl'}"]
    questions = f"evaluate.contexts={work / 'questions.jsonl'}"
    command = [sys.executable, str(HERE / "on_policy.py"), "--config", str(HERE / "loops" / "miniature.yaml")]
    subprocess.run([*command, *paths, questions, f"seed={seed}", *LOOPS[name]], check=True)


def read_rounds(work: Path, seed: int) -> Iterator[dict[str, Any]]:
    """A line for each model that is compared."""
    from miniature.evaluate import LENGTHS, QUESTION_WORDS

    for (loop, number), name in NAMES.items():
        folder = work / f"seed{seed}" / loop / f"round_{number}"
        results = read_long_context(folder / "evaluation.json")
        cells = {
            length: results.cell("questions.long", "exact_match", length=length + QUESTION_WORDS) for length in LENGTHS
        }
        triplets = folder / "triplets.jsonl"
        yield {
            "seed": seed,
            "model": name,
            "triplets": len(triplets.read_text(encoding="utf-8").splitlines()) if triplets.exists() else 0,
            "accuracy": {length: cell.score for length, cell in cells.items() if cell is not None},
        }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Lines of JSON."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def rounds_table(lines: list[dict[str, Any]]) -> str:
    """Mean accuracy over the seeds, by length, and the triplets of a round."""
    lengths = list(lines[0]["accuracy"])

    def rows() -> Iterator[list[str]]:
        for name in NAMES.values():
            found = [each for each in lines if each["model"] == name]
            long = [_long_mean(each) for each in found]
            yield [
                name,
                f"{statistics.fmean(each['triplets'] for each in found):,.0f}",
                *(f"{statistics.fmean(each['accuracy'][length] for each in found):.1%}" for length in lengths),
                f"{statistics.fmean(long):.1%} ({min(long):.1%} to {max(long):.1%})",
            ]

    return table(["model", "triplets", *lengths, "64 words and more"], rows(), LEFT)


def gains_table(lines: list[dict[str, Any]]) -> str:
    """Round 2 less one round of as many steps, in points of the mean over long contexts, with Student's interval."""
    two, one = (
        {each["seed"]: _long_mean(each) for each in lines if each["model"] == NAMES[key]}
        for key in (("two_rounds", 2), ("one_long_round", 1))
    )
    gains = [100 * (two[seed] - one[seed]) for seed in two]
    mean = mean_measure(np.array(gains))
    interval = "" if mean.low is None or mean.high is None else f" [{mean.low:+.1f}, {mean.high:+.1f}]"
    row = [*(f"{gain:+.1f}" for gain in gains), f"{mean.mean:+.1f}{interval}"]
    return table([*(f"base model {seed}" for seed in two), "mean [95 % interval]"], [row], LEFT)


def _long_mean(line: dict[str, Any]) -> float:
    return statistics.fmean(score for length, score in line["accuracy"].items() if int(length) >= 64)


def draw(lines: list[dict[str, Any]], path: Path) -> None:
    """A line per model, mean over the seeds and their range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from miniature.figures import draw_lines

    figure, axis = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    accuracies = {
        name: [
            {int(length): score for length, score in each["accuracy"].items()}
            for each in lines
            if each["model"] == name
        ]
        for name in NAMES.values()
    }
    draw_lines(axis, accuracies)
    axis.set_ylabel("accuracy")
    axis.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=80)


@click.command()
@click.option("--work", default=HERE / "work", type=click.Path(path_type=Path), help="Directory to work in.")
@click.option("--seeds", default=3, show_default=True, type=click.IntRange(min=1), help="Base models.")
def main(work: Path, seeds: int) -> None:
    """Carry out the loops of all seeds, and write what they found. Started again, it goes on."""
    for seed in range(seeds):
        make_inputs(work, seed)
        for name in LOOPS:
            run_loop(work, seed, name)
    lines = [line for seed in range(seeds) for line in read_rounds(work, seed)]
    write(HERE / "rounds.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    lines = read_lines(HERE / "rounds.jsonl")  # JSON makes the lengths strings
    draw(lines, HERE / "rounds.png")
    document, tables = HERE / "RESULTS.md", {"rounds": rounds_table(lines), "gains": gains_table(lines)}
    write(document, fill_tables(document.read_text(encoding="utf-8"), tables))
    click.echo("\n\n".join(tables.values()))


def write(path: Path, text: str) -> None:
    """Write a file, complete or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
