"""`megatron-solopo report`: runs side by side on one page."""

from pathlib import Path

import click

_FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("runs", type=_FOLDER, nargs=-1, required=True, metavar="RUN...")
@click.option("--output", type=_FOLDER, default=Path("report"), show_default=True, help="Directory to write; an earlier report there is replaced.")  # fmt: skip  # noqa: E501
def report(runs: tuple[Path, ...], output: Path) -> None:
    """Compare runs on one page: accuracy against context length, verdict, curves, cost, what was set differently.

    Reads config.yaml, metrics.jsonl and evaluation/*.json of each; needs neither a GPU nor the network, and the page
    neither. Runs may be unfinished, of different lengths, and damaged: the page says so.

    \b
    Example:
      megatron-solopo report runs/solopo runs/long_po --output report
    """
    from megatron_solopo.report.page import write_comparison

    click.echo(write_comparison(runs, output))
