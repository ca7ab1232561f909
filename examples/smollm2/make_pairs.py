"""Make the triplets: contexts of the training questions, the model's own responses, right and wrong ones in pairs."""

import shutil
from pathlib import Path

import click

from smollm2.plan import FULL, QUICK, Sizes
from smollm2.steps import HERE, build_contexts, command, first_lines

TEMPERATURE = 0.85
SHIPPED = HERE / "responses.jsonl"
"""What `data sample` gave for FULL; in git, because sampling takes long and rounds differently on other machines."""


def make_pairs(work: Path, sizes: Sizes) -> None:
    """Write `<work>/prepared/seed<N>` for every seed. What is there is not made again; sampling goes on."""
    model, contexts, responses = work / "model", work / "train.jsonl", work / "responses.jsonl"
    questions = work / "train-questions.jsonl"
    first_lines(work / "questions" / "train.jsonl", questions, sizes.train_questions)
    build_contexts(questions, contexts, model, sizes.short_tokens, sizes.long_tokens)
    missing = [seed for seed in sizes.seeds if not (work / "prepared" / f"seed{seed}").is_dir()]
    if not missing:
        return
    if sizes is not FULL:
        command(
            *("data", "sample", "--contexts", contexts, "--output", responses, "--model", model),
            *("--num-samples", sizes.samples, "--samples-per-request", sizes.samples, "--temperature", TEMPERATURE),
        )
    elif not responses.exists():
        shutil.copy(SHIPPED, responses)
    for seed in missing:
        _pair(work, sizes, seed)


def _pair(work: Path, sizes: Sizes, seed: int) -> None:
    """One right and one wrong response per question, drawn by the seed; then as many triplets as the runs read."""
    prepared, triplets = work / "prepared" / f"seed{seed}", work / f"triplets-seed{seed}.jsonl"
    command(
        *("data", "select", "--contexts", work / "train.jsonl", "--responses", work / "responses.jsonl"),
        *("--output", triplets, "--tokenizer", work / "model", "--score", "sub_em", "--chosen", "random"),
        # A wrong response of other length would teach the length.
        *("--rejected", "nearest_length"),
        *("--seed", seed, "--overwrite"),
    )
    found = len(triplets.read_text(encoding="utf-8").splitlines())
    if found < sizes.triplets:
        raise click.ClickException(f"{triplets}: only {found} questions have a right and a wrong answer")
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
    make_pairs(work, QUICK if quick else FULL)


if __name__ == "__main__":
    main()
