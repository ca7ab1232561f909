"""Write the tables of RESULTS.md and its picture anew, from the files of results."""

import re
from collections.abc import Sequence
from pathlib import Path

import click

from megatron_solopo.files import atomic_path
from smollm2.steps import HERE
from smollm2.tables import TABLES, Result, draw, read_results

_BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def regenerate(document: str, results: Sequence[Result]) -> str:
    """The document with every `<!-- table: NAME -->` block written anew."""

    def written(block: re.Match[str]) -> str:
        return block[1] + "\n".join(TABLES[block[2]](results)) + "\n" + block[3]

    return _BLOCK.sub(written, document)


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
    text = regenerate(document.read_text(encoding="utf-8"), found)
    with atomic_path(document) as temporary:
        temporary.write_text(text, encoding="utf-8")
    draw(found, document.with_name("accuracy.png"))
    click.echo(f"{document} and its picture, from {len(found)} runs")


if __name__ == "__main__":
    main()
