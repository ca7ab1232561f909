"""Write the tables of RESULTS.md, and its pictures, anew from files of runs."""

from pathlib import Path

import click

from megatron_solopo.files import atomic_path
from miniature.figures import draw_all
from miniature.lora_tables import LORA_TABLES
from miniature.results import Results
from miniature.tables import TABLES, regenerate
from miniature.token_tables import TOKEN_TABLES

HERE = Path(__file__).parent


@click.command(context_settings={"max_content_width": 110})
@click.option(
    "--runs", default=HERE / "runs.jsonl", type=click.Path(path_type=Path, exists=True), help="What reproduce.py wrote."
)
@click.option(
    "--lora-runs",
    default=HERE / "lora.jsonl",
    type=click.Path(path_type=Path, exists=True),
    help="The same, for the tables about adapters.",
)
@click.option(
    "--token-runs",
    default=HERE / "tokens.jsonl",
    type=click.Path(path_type=Path, exists=True),
    help="The same, for the table about the term per token.",
)
@click.option(
    "--document", default=HERE / "RESULTS.md", type=click.Path(path_type=Path, exists=True), help="Its tables."
)
def main(runs: Path, lora_runs: Path, token_runs: Path, document: Path) -> None:
    """Write the tables of RESULTS.md, and the pictures beside it, anew.

    \b
    Example, for runs of your own:
      runs=examples/reproduction/work/runs.jsonl
      python examples/reproduction/make_tables.py --runs $runs --lora-runs $runs --token-runs $runs
    """
    text = regenerate(document.read_text(encoding="utf-8"), runs, TABLES)
    text = regenerate(text, lora_runs, LORA_TABLES)
    text = regenerate(text, token_runs, TOKEN_TABLES)
    with atomic_path(document) as temporary:
        temporary.write_text(text, encoding="utf-8")
    draw_all(Results(runs), Results(lora_runs), document.parent)
    click.echo(f"{document} and its pictures, from {runs}, {lora_runs} and {token_runs}")


if __name__ == "__main__":
    main()
