"""What one rank opens, reads and exchanges while a run starts, in worlds of 8, 64 and 1,024 ranks.

    MEGATRON_SOLOPO_DEVICE=cpu python -m tools.benchmarks.startup_counts --config config.yaml [KEY=VALUE ...]

No rank but this process exists. Unlike `megatron-solopo plan --dry-run`, it also loads the rank's share of the weights
into memory, so the model must be small.
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import click

from megatron_solopo.config import load_config
from megatron_solopo.plan.startup import WORLDS
from megatron_solopo.plan.startup_dry_run import count_startup
from tools.reporting import environment, table


@click.command(help=__doc__)
@click.argument("overrides", nargs=-1)
@click.option("--config", "path", type=click.Path(path_type=Path), required=True)
def main(path: Path, overrides: tuple[str, ...]) -> None:
    with TemporaryDirectory() as folder:
        config = load_config(path, overrides).model_copy(update={"run_dir": Path(folder)})
        # The first start also imports libraries, and is not counted.
        counts = [count_startup(config, ranks, builds_model=True) for ranks in (WORLDS[0], *WORLDS)][1:]
    rows = [each.figures() | {"bytes of weights": f"{each.weight_bytes:,}"} for each in counts]
    click.echo(environment())
    click.echo(table(list(rows[0]), [list(row.values()) for row in rows]))


if __name__ == "__main__":
    main()
