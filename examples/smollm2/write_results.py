"""Write the tables of RESULTS.md and its picture anew, from the files of results."""

from pathlib import Path

import click

from megatron_solopo.files import atomic_path
from smollm2.steps import HERE
from smollm2.tables import TABLES, draw, read_results
from tools.reporting import fill_tables


@click.command(context_settings={"max_content_width": 110})
@click.option(
    "--results",
    default=HERE / "results" / "full",
    type=click.Path(path_type=Path, exists=True),
    help="Files that run_all.py wrote.",
)
@click.option(
    "--document", default=HERE / "RESULTS.md", type=click.Path(path_type=Path, exists=True), help="Its tables."
)
def main(results: Path, document: Path) -> None:
    """Write the tables of RESULTS.md, and the picture beside it, anew.

    \b
    Example:
      python examples/smollm2/write_results.py
    """
    found = read_results(results)
    text = fill_tables(document.read_text(encoding="utf-8"), {name: make(found) for name, make in TABLES.items()})
    with atomic_path(document) as temporary:
        temporary.write_text(text, encoding="utf-8")
    draw(found, document.with_name("accuracy.png"))
    click.echo(f"{document} and its picture, from {len(found)} runs")


if __name__ == "__main__":
    main()
