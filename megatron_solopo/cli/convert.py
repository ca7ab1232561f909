"""The commands `convert import`, `convert export` and `convert verify`."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Literal, NoReturn

import click
from click.core import ParameterSource

from megatron_solopo.cli.imports import no_garbage_collection
from megatron_solopo.errors import UserError

_DIRECTORY = click.Path(path_type=Path)
_VERIFY = click.option(
    "--verify", "verification", type=click.Choice(["full", "tensors", "none"]), default="full", show_default=True,
    help="full: every bit of every tensor; transformers loads the Hugging Face directory in a process of its own, "
    "offline and without its code; logits, if the model fits in memory. tensors: every bit alone.",
)  # fmt: skip


@click.group()
def convert() -> None:
    """Convert between Hugging Face directories and Megatron checkpoints, on one process and without a GPU.

    A conversion takes at most 2 GiB of memory plus three times the largest tensor. The comparison of logits takes the
    whole model in fp32, and is left out if that does not fit. An output is complete or absent. A kill -9 leaves a
    hidden .OUT.incomplete-* beside it, which the next run with the same --out removes.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("convert runs as one process; start it without torchrun")
    # A conversion always runs on the CPU. This must be set before megatron is imported.
    os.environ["MEGATRON_SOLOPO_DEVICE"] = "cpu"


@contextmanager
def _interruptible(output: Path | None = None) -> Iterator[None]:
    """End with one line, and clean up, on Ctrl-C and on SIGTERM, which queues and `timeout` send."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    existed = output is not None and output.exists()
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        if output is not None and output.exists() and not existed:
            # The verified output got its name just before.
            sys.exit(f"interrupted: {output} is complete, but the report is missing; run convert verify to see it")
        outcome = f"{output} was not written; " if output is not None else ""
        sys.exit(f"interrupted: {outcome}run the same command again")
    finally:
        signal.signal(signal.SIGTERM, before)


@convert.command("import")
@click.option("--hf", "source", type=_DIRECTORY, required=True, help="Hugging Face directory with safetensors.")
@click.option("--out", "output", type=_DIRECTORY, required=True, help="Megatron checkpoint to write.")
@_VERIFY
def import_(source: Path, output: Path, verification: Literal["full", "tensors", "none"]) -> None:
    """Write a Megatron checkpoint that `train` takes as `model.path`, under any parallel layout.

    \b
    Example:
      megatron-solopo convert import --hf Qwen2.5-7B-Instruct --out qwen2.5-7b
    """
    with _interruptible(output):
        with no_garbage_collection():
            from megatron_solopo.checkpoint.conversion import import_model

        report = import_model(source, output, verification=verification)
    click.echo(f"{output}\n{report}")


@convert.command("export")
@click.option(
    "--checkpoint", type=_DIRECTORY, required=True, help="Megatron checkpoint of `convert import` or `train`."
)
@click.option("--out", "output", type=_DIRECTORY, required=True, help="Hugging Face directory to write.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]),
              help="Precision to write. Default: the precision of the original Hugging Face model.")  # fmt: skip
@click.option("--adapter", is_flag=True, help="Write the adapters of a run with `lora` as PEFT does, without the base.")
@click.option("--merge", is_flag=True, help="Write the base of a run with `lora` with the adapters merged into it.")
@_VERIFY
def export(
    checkpoint: Path,
    output: Path,
    dtype: Literal["bfloat16", "float16", "float32"] | None,
    adapter: bool,
    merge: bool,
    verification: Literal["full", "tensors", "none"],
) -> None:
    """Write a Hugging Face directory that transformers and vLLM load.

    \b
    Example:
      megatron-solopo convert export --checkpoint runs/first/checkpoints/iter_0000100 --out aligned
    """
    with _interruptible(output):
        with no_garbage_collection():
            from megatron_solopo.checkpoint.conversion import export_adapter, export_model

        if adapter and merge:
            raise UserError("--adapter and --merge: choose one")
        source = click.get_current_context().get_parameter_source("verification")
        if adapter and source is ParameterSource.COMMANDLINE:
            raise UserError("--verify: --adapter compares the checksums of the checkpoint alone; leave --verify out")
        if adapter:
            report = export_adapter(checkpoint, output, dtype=dtype)
        else:
            report = export_model(checkpoint, output, dtype=dtype, verification=verification, merge=merge)
    click.echo(f"{output}\n{report}")


@convert.command("verify")
@click.option("--hf", "source", type=_DIRECTORY, required=True, help="Hugging Face directory.")
@click.option("--checkpoint", type=_DIRECTORY, required=True, help="Megatron checkpoint.")
@click.option(
    "--logits/--no-logits", default=True, show_default=True, help="Compare logits if the model fits in memory."
)
def verify(source: Path, checkpoint: Path, logits: bool) -> None:
    """Compare a Hugging Face directory with a Megatron checkpoint. Exit code 1 if they differ.

    If the precisions differ, the checkpoint is rounded first, as in an export. Such a pair passes, and the report
    says "after rounding to bfloat16".

    \b
    Example:
      megatron-solopo convert verify --hf aligned --checkpoint runs/first/checkpoints/iter_0000100
    """
    with _interruptible():
        with no_garbage_collection():
            from megatron_solopo.checkpoint.conversion import verify_models

        report = verify_models(source, checkpoint, logits=logits)
    click.echo(str(report))
    for failure in report.failures:
        click.echo(f"error: {failure}", err=True)
    if report.failures:
        sys.exit(1)
