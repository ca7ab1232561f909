"""The command line: subcommands and nothing else.

A user's mistake (ValueError, an unwritable path) is one line on standard error and exit code 2. Libraries are
imported by the command that needs them, so `--help` answers at once.
"""

import json
import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import click

from megatron_solopo import __version__
from megatron_solopo.cli_convert import convert

_PATH = click.Path(path_type=Path)
_LATER_RANKS_WAIT_SECONDS = 5.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of `megatron-solopo` and `python -m megatron_solopo`."""
    _quiet_libraries()
    try:
        code = cli.main(args=arguments, prog_name="megatron-solopo", standalone_mode=False)
        if code:
            sys.exit(code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit("interrupted; started again, training continues from its latest checkpoint, other work starts anew")
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
    return Path(raised_in).is_relative_to(Path(__file__).parent)


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
      megatron-solopo data build    ...   triplets from a QA corpus (or bring your own JSONL)
      megatron-solopo data prepare  ...   tokenize them
      megatron-solopo train --config c.yaml
      megatron-solopo convert export ...  back to Hugging Face
    """


cli.add_command(convert)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def doctor(as_json: bool) -> None:
    """Say what is installed here, what works, and what each missing piece costs.

    \b
    Example:
      megatron-solopo doctor
    """
    from megatron_solopo.doctor import diagnose

    report = diagnose()
    click.echo(report.to_json() if as_json else report.render())
    if not report.healthy:
        sys.exit(1)


@cli.group()
def data() -> None:
    """Make, check and tokenize preference data."""


@data.command("build")
@click.option("--input", "source", type=_PATH, required=True, help="Questions with paragraphs, MuSiQue JSONL.")
@click.option("--output", type=_PATH, required=True, help="Triplet JSONL to write.")
@click.option("--tokenizer", required=True, help="Hugging Face directory or SentencePiece .model file.")
@click.option("--short-distractors", default=3, show_default=True, help="Distractors beside the evidence, short side.")
@click.option("--long-tokens", default=2048, show_default=True, help="Tokens of the long side, never exceeded.")
@click.option("--seed", default=0, show_default=True, help="Of every random choice.")
@click.option("--overwrite", is_flag=True, help="Replace an existing output file.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def data_build(
    source: Path,
    output: Path,
    tokenizer: str,
    short_distractors: int,
    long_tokens: int,
    seed: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Build short and long contexts around the same evidence, with a chosen and a rejected answer.

    \b
    Example:
      megatron-solopo data build --input examples/musique/musique.jsonl --output triplets.jsonl \\
          --tokenizer examples/musique/work/model --long-tokens 2048
    """
    from megatron_solopo.data.build import build

    report = build(
        source,
        output,
        tokenizer,
        short_distractors=short_distractors,
        long_tokens=long_tokens,
        seed=seed,
        overwrite=overwrite,
    )
    click.echo(json.dumps(report.to_json(), indent=2) if as_json else f"{output}\n{report}")


@data.command("validate")
@click.argument("file", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON for programs.")
def data_validate(file: Path, as_json: bool) -> None:
    """List every bad row of a triplet or pair file: line, field, reason. Exit code 1 if there is any.

    \b
    Example:
      megatron-solopo data validate triplets.jsonl
    """
    from megatron_solopo.data.triplet import validate_file

    report = validate_file(file)
    click.echo(json.dumps(report.to_json(), indent=2) if as_json else str(report))
    if report.errors:
        sys.exit(1)


@data.command("prepare")
@click.option("--input", "source", type=_PATH, required=True, help="Triplet or pair file, JSONL or parquet.")
@click.option("--output", type=_PATH, required=True, help="Directory to write (`data.path` in the config).")
@click.option("--tokenizer", required=True, help="Hugging Face directory or SentencePiece .model file.")
@click.option("--template", type=click.Choice(["auto", "chat", "plain"]), default="auto", show_default=True,
              help="auto: chat template for messages, plain text for strings.")  # fmt: skip
@click.option("--max-length", type=int, help="Most tokens of a prompt with a response.")
@click.option("--overlong", type=click.Choice(["refuse", "drop"]), default="refuse", show_default=True,
              help="Longer rows are an error, or left out and counted. Nothing is ever cut.")  # fmt: skip
@click.option("--eval-count", default=0, show_default=True, help="Rows to hold out for evaluation.")
@click.option("--seed", default=1234, show_default=True, help="Draws the held-out rows.")
@click.option("--num-proc", default=1, show_default=True, help="Processes that tokenize.")
@click.option("--overwrite", is_flag=True, help="Replace the output if it is a prepared directory.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def data_prepare(
    source: Path,
    output: Path,
    tokenizer: str,
    template: Literal["auto", "chat", "plain"],
    max_length: int | None,
    overlong: Literal["refuse", "drop"],
    eval_count: int,
    seed: int,
    num_proc: int,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Tokenize a file once, into memory-mapped splits with a fingerprint.

    \b
    Example:
      megatron-solopo data prepare --input triplets.jsonl --output prepared \\
          --tokenizer examples/musique/work/model --eval-count 16
    """
    from megatron_solopo.data.tokenize import prepare

    manifest = prepare(
        source,
        output,
        tokenizer,
        template=template,
        max_length=max_length,
        overlong=overlong,
        eval_count=eval_count,
        seed=seed,
        num_proc=num_proc,
        overwrite=overwrite,
    )
    click.echo(manifest.model_dump_json(indent=2) if as_json else f"{output}\n{manifest}")


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
    from megatron_solopo.config_file import load_config

    config = load_config(path, overrides)
    # Only now, so that a mistake in the config is told before megatron has been imported.
    from megatron_solopo.train.trainer import precompute_reference

    cache = precompute_reference(config, overwrite=overwrite)
    if os.environ.get("RANK", "0") == "0":
        click.echo(f"reference log-probs: {cache}")


@cli.command()
@_with_config
def train(path: Path, overrides: tuple[str, ...]) -> None:
    """Train. OVERRIDES are dotted keys over the config file.

    \b
    Examples:
      megatron-solopo train --config c.yaml
      torchrun --nproc-per-node 8 -m megatron_solopo train --config c.yaml \\
          parallel.context_parallel_size=8 objective.alpha=3
    """
    from megatron_solopo.config_file import load_config

    config = load_config(path, overrides)
    # Only now, so that a mistake in the config is told before megatron has been imported.
    from megatron_solopo.train.trainer import train as run

    run(config)
    if os.environ.get("RANK", "0") == "0":
        click.echo(f"run directory: {config.run_dir}")
