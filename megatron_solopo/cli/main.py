"""The command line: subcommands and nothing else.

A user's mistake (ValueError, an unwritable path) is one line on standard error and exit code 2. Libraries are
imported by the command that needs them, so `--help` answers at once.
"""

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from megatron_solopo import __version__
from megatron_solopo.cli.convert import convert
from megatron_solopo.cli.data import data
from megatron_solopo.cli.evaluate import evaluate
from megatron_solopo.cli.plan import plan
from megatron_solopo.cli.report import report

_PATH = click.Path(path_type=Path)
_LATER_RANKS_WAIT_SECONDS = 5.0
# What click raises, from 8.2 on, where a group is named without a command; before, it just shows the help.
_HELP_INSTEAD: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `megatron-solopo` and `python -m megatron_solopo`."""
    _quiet_libraries()
    try:
        code = cli.main(args=arguments, prog_name="megatron-solopo", standalone_mode=False)
        if code:
            sys.exit(code)
    except _HELP_INSTEAD as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"; see {context.command_path} --help" if context else ""
        _report(" ".join(error.format_message().split()).removesuffix(".") + hint)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(
            "interrupted; started again, training, data sample and evaluate long-context go on from what is saved, "
            "other work starts anew"
        )
    except (ValueError, FloatingPointError) as error:
        if not _is_ours(error):
            raise
        _report(str(error))
        sys.exit(2)
    except OSError as error:
        if error.filename is None:
            raise
        _report(f"{error.filename}: {error.strerror}")
        sys.exit(2)


def _is_ours(error: Exception) -> bool:
    """Whether this package raised it: a message for the user. Another library's is a bug and keeps its traceback."""
    raised_in = traceback.extract_tb(error.__traceback__)[-1].filename
    return Path(raised_in).is_relative_to(Path(__file__).parents[1])


def _report(message: str) -> None:
    """One line per mistake. The same mistake on many ranks is told once, by rank 0."""
    rank = int(os.environ.get("RANK", "0"))
    prefix = ""
    if rank:
        # torchrun ends the other ranks as soon as one has failed: if rank 0 has failed too, it has told already.
        time.sleep(_LATER_RANKS_WAIT_SECONDS)
        prefix = f"[rank {rank}] "
    for line in message.splitlines():
        click.echo(f"{prefix}error: {line}", err=True)


def _quiet_libraries() -> None:
    """Keep a user's terminal for this program: deprecation notes between libraries are not for them."""
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.filterwarnings("ignore", module=r"megatron\.core")
    for name in ("megatron", "torch.distributed", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="megatron-solopo")
def cli() -> None:
    """Short-to-long preference optimization (SoLoPO, arXiv 2505.11166) on Megatron-Core.

    \b
    A run, from question answering data to an aligned model:
      megatron-solopo data build    ...   contexts from a QA corpus (or bring your own triplets)
      megatron-solopo data sample   ...   a model's answers to the short ones
      megatron-solopo data select   ...   right and wrong ones: triplets
      megatron-solopo data prepare  ...   tokenize them
      megatron-solopo train --config c.yaml
      megatron-solopo evaluate ...        what it does with long contexts
      megatron-solopo convert export ...  back to Hugging Face
    """


cli.add_command(convert)
cli.add_command(data)
cli.add_command(evaluate)
cli.add_command(plan)
cli.add_command(report)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def doctor(as_json: bool) -> None:
    """Say what is installed here, what works, and what each missing piece costs.

    \b
    Example:
      megatron-solopo doctor
    """
    from megatron_solopo.cli.doctor import diagnose

    report = diagnose()
    click.echo(report.to_json() if as_json else report.render())
    if not report.healthy:
        sys.exit(1)


def _with_config(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that reads a config."""
    command = click.argument("overrides", nargs=-1)(command)
    return click.option("--config", "path", type=_PATH, required=True, help="YAML config.")(command)


@cli.command()
@_with_config
@click.option("--overwrite", is_flag=True, help="Compute again, over an existing cache.")
def reference(path: Path, overrides: tuple[str, ...], overwrite: bool) -> None:
    """Compute the reference log-probs of the data once and keep them on disk.

    `train` does this by itself where they are missing; run it alone to do it on fewer GPUs or before a queue.

    \b
    Example:
      torchrun --nproc-per-node 2 -m megatron_solopo reference --config c.yaml
    """
    from megatron_solopo.config import load_config

    config = load_config(path, overrides)
    # Only now, so that a mistake in the config is told before megatron has been imported.
    from megatron_solopo.train.trainer import precompute_reference

    cache = precompute_reference(config, overwrite=overwrite)
    if os.environ.get("RANK", "0") == "0":
        click.echo(f"reference log-probs: {cache}")


@cli.command()
@_with_config
@click.option("--preflight-only", is_flag=True, help="Check everything, try the largest pack, and do not train.")
def train(path: Path, overrides: tuple[str, ...], preflight_only: bool) -> None:
    """Train. OVERRIDES are dotted keys over the config file.

    Started again, it continues from what is saved. SIGTERM, SIGUSR1 or SIGINT on any rank saves at the next boundary (a
    micro-batch; a step with pipeline stages) and exits with code 85; a second signal exits at once. torchrun turns 85
    into 1 and kills its ranks after --shutdown-timeout (30) seconds: `python -m megatron_solopo.launch` takes the same
    options, passes the signals on, waits, and exits as the ranks did. A rank without progress for watchdog.* minutes
    names who did not arrive and exits with 86.

    Before the first step all ranks check that they start alike, see one run directory with room, and reach each other;
    --preflight-only does that, tries forward and backward of the largest pack, and ends.

    \b
    Examples:
      megatron-solopo train --config c.yaml
      torchrun --nproc-per-node 8 -m megatron_solopo train --config c.yaml \\
          parallel.context_parallel_size=8 objective.alpha=3
      torchrun --nproc-per-node 8 -m megatron_solopo train --config c.yaml --preflight-only
    """
    from megatron_solopo.config import load_config

    config = load_config(path, overrides)
    # Only now, so that a mistake in the config is told before megatron has been imported.
    from megatron_solopo.train.trainer import preflight
    from megatron_solopo.train.trainer import train as run

    if preflight_only:
        for check, found in preflight(config):
            if os.environ.get("RANK", "0") == "0":
                click.echo(f"{check:14} {found}")
        return
    run(config)
    if os.environ.get("RANK", "0") == "0":
        click.echo(f"run directory: {config.run_dir}")
