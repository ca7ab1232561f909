"""Write single-hop questions of train, dev and test, from the decompositions of MuSiQue's questions."""

from pathlib import Path

import click

from smollm2.questions import write_questions
from smollm2.steps import HERE


@click.command(context_settings={"max_content_width": 110})
@click.option(
    "--output",
    default=HERE / "work" / "full" / "questions",
    type=click.Path(path_type=Path),
    help="Directory to write.",
)
def main(output: Path) -> None:
    """Write single-hop questions of train, dev and test from the shipped rows of MuSiQue.

    \b
    Example:
      python examples/smollm2/make_questions.py
    """
    counts = write_questions(output)
    click.echo(f"{output}: " + ", ".join(f"{count} {name}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
