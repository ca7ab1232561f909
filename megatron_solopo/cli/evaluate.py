"""The commands that evaluate models."""

import json
import os

import click

from megatron_solopo.cli.imports import no_garbage_collection
from megatron_solopo.cli.options import JSON, settings_options
from megatron_solopo.errors import UserError
from megatron_solopo.evaluation_settings import LongContextSettings, PreferenceSettings


@click.group()
def evaluate() -> None:
    """Measure what a model does with long contexts, on any checkpoint."""


@evaluate.command("long-context")
@settings_options(LongContextSettings)
@JSON
def long_context(settings: LongContextSettings, as_json: bool) -> None:
    """Score answers to long prompts: RULER-style tasks of exact lengths, and questions of `data build`.

    Generation is greedy. A run that was killed goes on when it starts again. A prompt that does not fit the model is
    refused or counted, never cut. Results, predictions and pictures have one name; results/long_context.py has the
    schema.

    \b
    Examples:
      megatron-solopo evaluate long-context --model runs/first --contexts contexts.jsonl
      torchrun --nproc-per-node 8 -m megatron_solopo evaluate long-context \\
          --model runs/first/checkpoints/iter_0000100 --tensor-model-parallel-size 8 \\
          --tasks needle_single,variable_tracking --lengths 32768,131072
      megatron-solopo evaluate long-context --server http://localhost:8000/v1 --model MODEL_NAME \\
          --tokenizer MODEL_DIR --tasks needle_single --lengths 4096,32768 --output results/base.json
    """
    with no_garbage_collection():
        from megatron_solopo.evaluate.long_context import evaluate_long_context
    from megatron_solopo.evaluate.scores import render

    results = evaluate_long_context(settings)
    if results is not None:
        click.echo(json.dumps(results.model_dump(mode="json"), indent=2) if as_json else render(results))


@evaluate.command()
@settings_options(PreferenceSettings)
@click.argument("overrides", nargs=-1)
@JSON
def preference(settings: PreferenceSettings, overrides: tuple[str, ...], as_json: bool) -> None:
    """Measure whether a model prefers the right answer in the short and in the long context, on held-out triplets.

    The config names the data, the loss type with its reference model, and the parallel layout. The layout needs as
    many processes as in training. OVERRIDES are dotted keys over the config. The cost is four forward passes over the
    split, and four of the reference model where rewards need it.

    \b
    Examples:
      megatron-solopo evaluate preference --model runs/first
      megatron-solopo evaluate preference --model MODEL_DIR --config runs/first/config.yaml
      torchrun --nproc-per-node 8 -m megatron_solopo evaluate preference --model runs/first/checkpoints/iter_0000100 \\
          parallel.context_parallel_size=8 data.path=other_prepared --output other.json
    """
    from megatron_solopo.config import load_config
    from megatron_solopo.run_directory import RUN_CONFIG, find_subject

    subject = find_subject(settings.model, "--model")
    path = settings.config
    if path is None:
        if subject.run_dir is None:
            raise UserError(
                f"--model={settings.model}: belongs to no run; name data, loss and layout with --config, such as the "
                "config.yaml of a run that it is compared with"
            )
        path = subject.run_dir / RUN_CONFIG
    config = load_config(path, overrides)
    # Only now, so that a mistake in the config is told before megatron has been imported.
    with no_garbage_collection():
        from megatron_solopo.evaluate.preference import default_output, evaluate_preference

    output = settings.output or default_output(subject, config)
    results = evaluate_preference(subject, config, split=settings.split, output=output)
    if os.environ.get("RANK", "0") == "0":
        click.echo(results.model_dump_json(indent=2) if as_json else f"{results}\n{output}")
