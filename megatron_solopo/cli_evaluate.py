"""The commands that evaluate models."""

import os
from pathlib import Path
from typing import Literal

import click

_PATH = click.Path(path_type=Path)


@click.group()
def evaluate() -> None:
    """Measure what a model does with long contexts, on any checkpoint."""


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
    from megatron_solopo.config_file import load_config
    from megatron_solopo.run_directory import RUN_CONFIG, find_subject

    subject = find_subject(model, "--model")
    if path is None:
        if subject.run_dir is None:
            raise ValueError(
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
