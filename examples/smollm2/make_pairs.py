"""Make the triplets: contexts of the training questions, the model's own responses, right and wrong ones in pairs."""

import shutil
from collections.abc import Iterable
from pathlib import Path

import click

from megatron_solopo.errors import UserError
from megatron_solopo.files import atomic_path
from smollm2.plan import BASE, FULL, QUICK, Run, Sizes, comparison
from smollm2.steps import HERE, build_contexts, command, first_lines

TEMPERATURE = 0.85
SHIPPED = HERE / "responses.jsonl"
"""What `data sample` gave for FULL; in git, because sampling takes long and rounds differently on other machines."""


def make_pairs(work: Path, sizes: Sizes, runs: Iterable[Run]) -> None:
    """Write `<work>/prepared/<run.triplets>` for every run. What is there is not made again; sampling goes on."""
    responses = work / "responses.jsonl"
    first_lines(work / "questions" / "train.jsonl", work / "train-questions.jsonl", sizes.train_questions)
    contexts = _contexts(work, sizes, sizes.long_tokens)
    trained = {run.triplets: run for run in runs if run.method != BASE}
    missing = [run for name, run in trained.items() if not (work / "prepared" / name).is_dir()]
    if not missing:
        return
    if sizes is not FULL:
        command(
            *("data", "sample", "--contexts", contexts, "--output", responses, "--model", work / "model"),
            *("--num-samples", sizes.samples, "--samples-per-request", sizes.samples, "--temperature", TEMPERATURE),
        )
    elif not responses.exists():
        with atomic_path(responses) as temporary:
            shutil.copy(SHIPPED, temporary)
    for run in missing:
        _pair(work, sizes, run)


def _contexts(work: Path, sizes: Sizes, long_tokens: int) -> Path:
    """The training questions' contexts; the short ones are the same beside every length of the long ones."""
    contexts = work / ("train.jsonl" if long_tokens == sizes.long_tokens else f"train-{long_tokens}.jsonl")
    build_contexts(work / "train-questions.jsonl", contexts, work / "model", sizes.short_tokens, long_tokens)
    return contexts


def _pair(work: Path, sizes: Sizes, run: Run) -> None:
    """One right and one wrong response per question, drawn by the seed, and all such triplets prepared."""
    prepared, triplets = work / "prepared" / run.triplets, work / f"triplets-{run.triplets}.jsonl"
    command(
        *("data", "select", "--contexts", _contexts(work, sizes, run.long_tokens or sizes.long_tokens)),
        *("--responses", work / "responses.jsonl", "--output", triplets, "--tokenizer", work / "model"),
        # A wrong response of other length would teach the length.
        *("--score", "sub_em", "--chosen", "random", "--rejected", "nearest_length"),
        *("--seed", run.seed, "--overwrite"),
    )
    found = len(triplets.read_text(encoding="utf-8").splitlines())
    if found < sizes.triplets:
        raise UserError(
            f"{triplets}: only {found} questions have a right and a wrong answer, and a run reads {sizes.triplets}; "
            "raise `samples` or `train_questions` in smollm2/plan.py"
        )
    command("data", "prepare", "--input", triplets, "--output", prepared, "--tokenizer", work / "model")


@click.command(context_settings={"max_content_width": 110})
@click.option("--work", default=HERE / "work" / "full", type=click.Path(path_type=Path), help="Directory to work in.")
@click.option("--quick", is_flag=True, help="A few questions, to see the way in minutes.")
def main(work: Path, quick: bool) -> None:
    """Make contexts, take 16 responses of the model to each short one, and pair right with wrong ones, for three seeds.

    The responses are those in git, unless WORK/responses.jsonl holds others. With --quick they are sampled.

    \b
    Example, after make_model.py and make_questions.py:
      python examples/smollm2/make_pairs.py
    """
    sizes = QUICK if quick else FULL
    try:
        make_pairs(work, sizes, [run for seed in sizes.seeds for run in comparison(seed)])
    except UserError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
