"""`megatron-solopo report`: runs side by side on one page."""

from pathlib import Path

import click

from megatron_solopo.cli.options import PATH


@click.command()
@click.argument("runs", type=PATH, nargs=-1, required=True, metavar="RUN...")
@click.option(
    "--output",
    type=PATH,
    default=Path("report"),
    show_default=True,
    help="Directory to write. An earlier report there is replaced.",
)
def report(runs: tuple[Path, ...], output: Path) -> None:
    """Compare runs on one page: accuracy against context length, verdict, curves, cost, different settings.

    Reads config.yaml, metrics.jsonl and evaluation/*.json of each run. Neither the command nor the page needs a GPU or
    the network. Runs may be unfinished, damaged or of different lengths: the page says so.

    \b
    Example:
      megatron-solopo report runs/solopo runs/long_po --output report
    """
    from megatron_solopo.report.page import write_comparison

    click.echo(write_comparison(runs, output))
