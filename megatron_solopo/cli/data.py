"""The commands that make, check and tokenize preference data."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from megatron_solopo.cli.imports import no_garbage_collection
from megatron_solopo.cli.options import JSON, PATH, settings_options
from megatron_solopo.data.settings import PrepareSettings, ShowSettings
from megatron_solopo.errors import UserError
from megatron_solopo.triplets.settings import BuildSettings, SampleSettings, SelectSettings


@click.group()
def data() -> None:
    """Make, check and tokenize preference data.

    \b
    From a question answering corpus, with a model's own answers:
      megatron-solopo data build    ...   short and long contexts around the same evidence
      megatron-solopo data sample   ...   answers to the short ones, many per question
      megatron-solopo data select   ...   a right and a wrong one: triplets
      megatron-solopo data prepare  ...   tokenize them
    """


@data.command("build")
@settings_options(BuildSettings)
@JSON
def build(settings: BuildSettings, as_json: bool) -> None:
    """Build short and long contexts around the same evidence, from a question answering corpus.

    \b
    Examples:
      megatron-solopo data build --input musique_ans_v1.0_train.jsonl --output contexts.jsonl \\
          --tokenizer MODEL_DIR --template chat --long-tokens 8192,131072 --num-proc 16
      megatron-solopo data build --input examples/musique/musique.jsonl --output triplets.jsonl \\
          --tokenizer examples/musique/work/model --long-tokens 2048 --responses constructed
    """
    from megatron_solopo.triplets.build import build as run

    _show(run(settings), settings.output, as_json)


@data.command("sample")
@settings_options(SampleSettings)
@JSON
def sample(settings: SampleSettings, as_json: bool) -> None:
    """Sample responses to the short contexts. Killed and started again, it asks only for what is missing.

    \b
    Examples:
      vllm serve Qwen/Qwen2.5-7B-Instruct --generation-config vllm   # the model's own top_k would change the sampling
      megatron-solopo data sample --contexts contexts.jsonl --output responses.jsonl \\
          --server http://localhost:8000/v1 --model Qwen/Qwen2.5-7B-Instruct
      megatron-solopo data sample --contexts contexts.jsonl --output responses.jsonl --model MODEL_DIR
    """
    from megatron_solopo.triplets.sample import sample as run

    _show(run(settings), settings.output, as_json)


@data.command("select")
@settings_options(SelectSettings)
@JSON
def select(settings: SelectSettings, as_json: bool) -> None:
    """Score responses, choose a right and a wrong one for each question, and write triplets.

    \b
    Example:
      megatron-solopo data select --contexts contexts.jsonl --responses responses.jsonl \\
          --output triplets.jsonl --tokenizer MODEL_DIR --min-length-ratio 0.5 --max-length-ratio 2
    """
    from megatron_solopo.triplets.select import select as run

    _show(run(settings), settings.output, as_json)


@data.command("validate")
@click.argument("file", type=PATH)
@settings_options(ShowSettings)
@JSON
def validate(settings: ShowSettings, file: Path, as_json: bool) -> None:
    """List every bad row of a file of triplets, pairs or instructions. Exit code 1 if there is any.

    \b
    Examples:
      megatron-solopo data validate triplets.jsonl
      megatron-solopo data validate triplets.jsonl --show 2 --tokenizer MODEL_DIR   # which tokens count
    """
    from megatron_solopo.data.rows import validate_file
    from megatron_solopo.data.shown_rows import show_rows

    if (settings.show is None) != (settings.tokenizer is None):
        raise UserError("--show N and --tokenizer go together: pass both, or none of them")
    report = validate_file(file)
    shown = [] if settings.show is None else show_rows(file, settings)
    if as_json:
        rows = {} if settings.show is None else {"shown": [row.to_json() for row in shown]}
        click.echo(json.dumps(report.to_json() | rows, indent=2))
    else:
        click.echo("\n".join([*(row.page(_token_style()) for row in shown), str(report)]))
    if report.errors:
        sys.exit(1)


@data.command("prepare")
@settings_options(PrepareSettings)
@JSON
def prepare(settings: PrepareSettings, as_json: bool) -> None:
    """Tokenize a file once, into memory-mapped splits with a fingerprint.

    \b
    Example:
      megatron-solopo data prepare --input triplets.jsonl --output prepared \\
          --tokenizer examples/musique/work/model --eval-count 16
    """
    with no_garbage_collection():
        from megatron_solopo.data.tokenize import prepare as run

    manifest = run(settings)
    click.echo(manifest.model_dump_json(indent=2) if as_json else f"{settings.output}\n{manifest}")


def _token_style() -> Callable[[str, str], str]:
    """How `data validate --show` prints a token of some kind. `click.echo` takes colours out where no terminal is."""
    if os.environ.get("NO_COLOR"):
        return lambda _, token: token
    colours = {"prompt": "bright_black", "context": "yellow", "counts": "green"}
    return lambda kind, token: click.style(token, fg=colours[kind])


def _show(report: Any, output: Path, as_json: bool) -> None:
    """Print a stage's report."""
    from megatron_solopo.triplets.report import report_directory

    page = report_directory(output) / "index.html"
    click.echo(json.dumps(report.to_json(), indent=2) if as_json else f"{output}\n{report}\nreport: {page}")
