"""The commands that evaluate models."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import click

from megatron_solopo.errors import UserError

_PATH = click.Path(path_type=Path)


def _option(*names: str, help: str, **attributes: Any) -> Callable[..., Any]:
    """An option that shows its default, where it has one."""
    return click.option(*names, help=help, show_default=attributes.get("default") is not None, **attributes)


def _choice(*names: str) -> click.Choice[str]:
    return click.Choice(list(names))


def _listed(kind: Callable[[str], Any]) -> Callable[[click.Context, click.Parameter, str], tuple[Any, ...]]:
    """Reads a list with commas."""

    def read(context: click.Context, parameter: click.Parameter, text: str) -> tuple[Any, ...]:
        try:
            return tuple(kind(each) for each in text.replace("_", "" if kind is int else "_").split(",") if each)
        except ValueError:
            raise UserError(f"{parameter.opts[0]} {text}: expected numbers with commas between them") from None

    return read


@click.group()
def evaluate() -> None:
    """Measure what a model does with long contexts, on any checkpoint."""


@evaluate.command("long-context")
@_option("--model", required=True, help="Run directory (its latest checkpoint), checkpoint, Hugging Face directory; "
         "with --server, the model's name there.")  # fmt: skip
@_option("--tasks", default="", callback=_listed(str.strip),
         help="needle_single, needle_multi_key, needle_multi_value, needle_multi_query, variable_tracking, "
         "common_words, qa; with commas.")  # fmt: skip
@_option("--lengths", default="", callback=_listed(int),
         help="Exact tokens of the tasks' prompts, chat template included, room for the answer not; of --contexts the "
         "upper bounds of buckets.")  # fmt: skip
@_option("--depths", default="0,0.25,0.5,0.75,1", callback=_listed(float), help="Where a single needle lies.")
@_option("--samples", type=int, help="Per task and length, and of each file per side.  [default: 20; of files all]")
@click.option(
    "--contexts", type=_PATH, multiple=True, help="What `data build` or `data select` wrote; may be repeated."
)
@_option("--side", default="both", type=_choice("short", "long", "both"), help="Which prompts of --contexts.")
@_option("--corpus", type=_PATH, help="Of the task qa: questions with their documents.")
@_option("--format", default="musique", type=_choice("musique", "hotpotqa", "2wikimultihopqa", "squad", "generic"),
         help="Of the corpus.")  # fmt: skip
@_option("--prompt-template", type=_PATH, help="Of the task qa: Jinja file over `documents` and `question`.")
@_option("--haystack", type=_PATH, help="Text file to hide needles in, instead of made-up sentences.")
@_option("--template", default="auto", type=_choice("auto", "plain", "chat"),
         help="Of tasks: the chat template where the tokenizer has one (auto).")  # fmt: skip
@_option("--scored-text", default="final", type=_choice("final", "whole"),
         help="Of questions: score what stands behind the answer's marker, where it is, or all.")  # fmt: skip
@_option("--answer-marker", default="answer is:", help="Text before a final answer.")
@_option("--max-new-tokens", type=int, help="Room for an answer.  [default: the task's own, or the row's]")
@_option("--batch-size", default=1, help="Equally long prompts generated together.")
@_option("--backend", default="auto", type=_choice("auto", "megatron", "transformers"),
         help="auto: our model for checkpoints and under torchrun, else transformers.")  # fmt: skip
@_option("--dtype", default="auto", type=_choice("auto", "float32", "bfloat16"), help="auto: what config.json says.")
@_option("--tensor-model-parallel-size", default=1, help="Of our model.")
@_option("--pipeline-model-parallel-size", default=1, help="Of our model; further ranks share the samples.")
@_option("--server", help="Base URL of a server with OpenAI's API: http://localhost:8000/v1.")
@_option("--tokenizer", help="Hugging Face directory or SentencePiece .model file.  [default: the model's]")
@_option("--concurrency", default=32, help="Requests to the server under way at once.")
@_option("--timeout", default=600.0, help="Seconds that a request may take.")
@_option("--retries", default=8, help="How often a request that fails is sent again.")
@_option("--api-key-env", help="Environment variable that holds the server's key.")
@_option("--seed", default=0, help="Of every random choice in the tasks.")
@_option("--name", help="Of the results, in the run's folder `evaluation`.  [default: long_context-CHECKPOINT]")
@_option("--output", type=_PATH, help="Results file, .json.  [default for a model of a run: in the run]")
@click.option("--overwrite", is_flag=True, help="Generate anew; without it, only what is missing is generated.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def long_context(as_json: bool, **options: Any) -> None:
    """Score answers to long prompts: RULER-style tasks of exact lengths, and questions of `data build`.

    Greedy; killed and started again, it goes on. A prompt that does not fit the model is refused or counted, never
    cut. Results, predictions and pictures have one name: see evaluation_results.py for the results' schema.

    \b
    Examples:
      megatron-solopo evaluate long-context --model runs/first --contexts contexts.jsonl
      torchrun --nproc-per-node 8 -m megatron_solopo evaluate long-context \\
          --model runs/first/checkpoints/iter_0000100 --tensor-model-parallel-size 8 \\
          --tasks needle_single,variable_tracking --lengths 32768,131072
      megatron-solopo evaluate long-context --server http://localhost:8000/v1 --model MODEL_NAME \\
          --tokenizer MODEL_DIR --tasks needle_single --lengths 4096,32768 --output results/base.json
    """
    from megatron_solopo.evaluate.long_context import evaluate_long_context
    from megatron_solopo.evaluate.scores import render
    from megatron_solopo.evaluate.settings import LongContextSettings

    results = evaluate_long_context(LongContextSettings(**options))
    if results is not None:
        click.echo(json.dumps(results.model_dump(mode="json"), indent=2) if as_json else render(results))


@evaluate.command()
@click.argument("overrides", nargs=-1)
@click.option(
    "--model",
    type=_PATH,
    required=True,
    help="A run (its newest checkpoint), a checkpoint, or a Hugging Face directory.",
)
@click.option("--config", "path", type=_PATH, help="YAML config; of a run's checkpoint, the run's own if not given.")
@click.option("--split", type=click.Choice(["eval", "train"]), default="eval", show_default=True, help="Of data.path.")
@click.option(
    "--output",
    type=_PATH,
    help="JSON file; a .jsonl and a .png go beside it.  [default: RUN_DIR/evaluation/preference-CHECKPOINT.json]",
)
@click.option("--json", "as_json", is_flag=True, help="Print what the file holds.")
def preference(
    overrides: tuple[str, ...],
    model: Path,
    path: Path | None,
    split: Literal["eval", "train"],
    output: Path | None,
    as_json: bool,
) -> None:
    """Does a model prefer the right answer, in the short and in the long context? On held-out triplets.

    The config names the data, the loss type and its reference model, and the parallel layout; OVERRIDES are dotted keys
    over it. Costs four forward passes over the split, and once as many of the reference model where rewards need it.

    \b
    Examples:
      megatron-solopo evaluate preference --model runs/first
      megatron-solopo evaluate preference --model MODEL_DIR --config runs/first/config.yaml
      torchrun --nproc-per-node 8 -m megatron_solopo evaluate preference --model runs/first/checkpoints/iter_0000100 \\
          parallel.context_parallel_size=8 data.path=other_prepared --output other.json
    """
    from megatron_solopo.config import load_config
    from megatron_solopo.run_directory import RUN_CONFIG, find_subject

    subject = find_subject(model, "--model")
    if path is None:
        if subject.run_dir is None:
            raise UserError(
                f"--model={model}: belongs to no run; name data, loss and layout with --config, such as the "
                "config.yaml of a run that it is compared with"
            )
        path = subject.run_dir / RUN_CONFIG
    config = load_config(path, overrides)
    # Only now, so that a mistake in the config is told before megatron has been imported.
    from megatron_solopo.evaluate.preference import default_output, evaluate_preference

    output = output or default_output(subject, config)
    results = evaluate_preference(subject, config, split=split, output=output)
    if os.environ.get("RANK", "0") == "0":
        click.echo(results.model_dump_json(indent=2) if as_json else f"{results}\n{output}")
