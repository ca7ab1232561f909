"""The entry point: all commands together, and what a user sees of an error.

A `UserError`, and an error of the operating system that names a file, are one line and exit code 2. Any other exception
keeps its traceback. Each command imports its own libraries, so `--help` answers at once.
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

from megatron_solopo import __version__, exits
from megatron_solopo.cli.convert import convert
from megatron_solopo.cli.data import data
from megatron_solopo.cli.doctor import doctor
from megatron_solopo.cli.evaluate import evaluate
from megatron_solopo.cli.imports import no_garbage_collection
from megatron_solopo.cli.plan import plan
from megatron_solopo.cli.report import report
from megatron_solopo.errors import UserError, describe_os_error

_LATER_RANKS_WAIT_SECONDS = 5.0
# What gloo and NCCL say of a rank that is gone.
_LOST_CONNECTION = ("onnection reset by peer", "onnection closed by peer", "Broken pipe", "remote process exited")
_OTHER_RANK = (
    "This rank lost its connection to another rank, which ended before. Look for that rank's message above and on the "
    "other hosts. If it has none, it was killed: a launcher shows exitcode -9 (SIGKILL), and the likely cause is the "
    "kernel's out-of-memory killer (`dmesg -T | grep -i oom`)."
)
# Click 8.2 and later raise this where a group is named without a command; earlier versions show the help.
_NoCommand: Any = getattr(click.exceptions, "NoArgsIsHelpError", ())


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `megatron-solopo` and `python -m megatron_solopo`."""
    _quiet_libraries()
    try:
        code = cli.main(args=arguments, prog_name="megatron-solopo", standalone_mode=False)
        if code:
            sys.exit(code)
    except _NoCommand as error:
        error.show()
        sys.exit(error.exit_code)
    except click.ClickException as error:
        context = getattr(error, "ctx", None)
        hint = f"; see {context.command_path} --help" if context else ""
        if isinstance(error, click.NoSuchOption) and error.option_name == "--debug":
            hint = "; --debug goes before the command: megatron-solopo --debug COMMAND"
        _report(" ".join(error.format_message().split()).removesuffix(".") + hint)
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(
            "interrupted; if you start it again, train, reference, data prepare, data sample and evaluate long-context "
            "continue from what is saved, and other commands start from the beginning"
        )


def _report(message: str) -> None:
    """Print one line per mistake. If all ranks make the same mistake, rank 0 alone prints it."""
    rank = int(os.environ.get("RANK", "0"))
    prefix = ""
    if rank:
        # torchrun ends the other ranks soon after the first failure. If rank 0 failed too, it has reported already.
        time.sleep(_LATER_RANKS_WAIT_SECONDS)
        prefix = f"[rank {rank}] "
    for line in message.splitlines():
        click.echo(f"{prefix}error: {line}", err=True)


def _quiet_libraries() -> None:
    """Hide the libraries' notes to each other about deprecations; a user can do nothing about them."""
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    for name in ("megatron", "torch.distributed", "torch.utils.cpp_extension"):
        logging.getLogger(name).setLevel(logging.ERROR)


class _Commands(click.Group):
    """Prints what a user can mend as one line; `--debug` shows the traceback too."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (UserError, OSError) as error:
            if isinstance(error, OSError) and error.filename is None:
                raise
            if ctx.params["debug"]:
                traceback.print_exc()
            _report(describe_os_error(error) if isinstance(error, OSError) else str(error))
            ctx.exit(exits.MISTAKE)
        except RuntimeError as error:
            if any(words in str(error) for words in _LOST_CONNECTION):
                error.add_note(_OTHER_RANK)
            raise


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="megatron-solopo")
@click.option("--debug", is_flag=True, help="Show the traceback of an error that is otherwise one line.")
def cli(debug: bool) -> None:
    """Short-to-long preference optimization (SoLoPO, arXiv 2505.11166) on Megatron-Core.

    \b
    From question answering data to an aligned model:
      megatron-solopo data build ...      build contexts from a corpus (or bring your own triplets)
      megatron-solopo data sample ...     let a model answer the short contexts
      megatron-solopo data select ...     make triplets of right and wrong answers
      megatron-solopo data prepare ...    tokenize the triplets
      megatron-solopo train --config c.yaml
      megatron-solopo evaluate ...        measure the model on long contexts
      megatron-solopo convert export ...  convert the model back to Hugging Face
    """


for _command in (convert, data, doctor, evaluate, plan, report):
    cli.add_command(_command)


def _with_config(command: Callable[..., Any]) -> Callable[..., Any]:
    """The options of every command that reads a config."""
    command = click.argument("overrides", nargs=-1)(command)
    return click.option("--config", "path", type=click.Path(path_type=Path), required=True, help="YAML config.")(
        command
    )


@cli.command()
@_with_config
@click.option("--overwrite", is_flag=True, help="Compute again and replace the cache.")
def reference(path: Path, overrides: tuple[str, ...], overwrite: bool) -> None:
    """Compute the log-probabilities of the reference model and keep them on disk.

    `train` computes them itself if they are missing. Run this command alone to use fewer GPUs, or before you queue a
    job.

    \b
    Example:
      torchrun --nproc-per-node 2 -m megatron_solopo reference --config c.yaml
    """
    from megatron_solopo.config import load_config

    config = load_config(path, overrides)
    # The import is slow; a mistake in the config is reported before it.
    with no_garbage_collection():
        from megatron_solopo.train.trainer import precompute_reference

    cache = precompute_reference(config, overwrite=overwrite)
    if os.environ.get("RANK", "0") == "0":
        click.echo(f"reference log-probs: {cache}")


@cli.command()
@_with_config
@click.option("--preflight-only", is_flag=True, help="Check everything, try the largest pack, and do not train.")
def train(path: Path, overrides: tuple[str, ...], preflight_only: bool) -> None:
    """Train. OVERRIDES are dotted keys that replace values of the config file.

    If you start the command again, the run continues from its newest checkpoint.

    SIGTERM, SIGUSR1 or SIGINT on any rank stops the run. All ranks finish the micro-batch (with pipeline stages: the
    step), save, and exit with code 85. A second signal ends the process at once.

    torchrun turns code 85 into 1 and kills its ranks 30 seconds after a signal (--shutdown-timeout). Start the ranks
    with `python -m megatron_solopo.launch` instead: it takes torchrun's options, passes signals on, waits, and exits
    with the code of the ranks.

    If a rank makes no progress for watchdog.* minutes, the run names the ranks that are missing and exits with code 86.

    Before the first step, the ranks check that they started alike, see the same run directory with enough space, and
    reach each other. --preflight-only checks this, runs forward and backward of the largest pack, and ends.

    \b
    Examples:
      megatron-solopo train --config c.yaml
      torchrun --nproc-per-node 8 -m megatron_solopo train --config c.yaml \\
          parallel.context_parallel_size=8 objective.alpha=3
      torchrun --nproc-per-node 8 -m megatron_solopo train --config c.yaml --preflight-only
    """
    from megatron_solopo.config import load_config

    config = load_config(path, overrides)
    # The import is slow; a mistake in the config is reported before it.
    with no_garbage_collection():
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
