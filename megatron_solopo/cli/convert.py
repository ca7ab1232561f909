"""The commands that convert checkpoints."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Literal, NoReturn

import click

from megatron_solopo.errors import UserError

_DIRECTORY = click.Path(path_type=Path)
_VERIFY = click.option(
    "--verify", "verification", type=click.Choice(["full", "tensors", "none"]), default="full", show_default=True,
    help="full: every bit of every tensor, and logits where the model fits in memory; tensors: without logits.",
)  # fmt: skip


@click.group()
def convert() -> None:
    """Convert between Hugging Face directories and Megatron checkpoints, on one process and without a GPU.

    Memory stays below 2 GiB and three times the largest tensor; comparing logits takes the whole model in fp32
    and is done only where that fits. An output is complete or absent. After a kill -9, a hidden .OUT.incomplete-* is
    left beside it; the next run with the same --out removes it.
    """
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("convert runs as one process; start it without torchrun")
    # Before megatron is imported: a conversion runs on the CPU wherever it is.
    os.environ["MEGATRON_SOLOPO_DEVICE"] = "cpu"


@contextmanager
def _interruptible(output: Path | None = None) -> Iterator[None]:
    """End with one line, cleaned up, on Ctrl-C and likewise on SIGTERM, which queues and `timeout` send."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise KeyboardInterrupt

    existed = output is not None and output.exists()
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        if output is not None and output.exists() and not existed:
            # It got its name, verified, just before.
            sys.exit(f"interrupted: {output} is complete, only the report is missing; see it with convert verify")
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
        from megatron_solopo.checkpoint.conversion import import_model

        report = import_model(source, output, verification=verification)
    click.echo(f"{output}\n{report}")


@convert.command("export")
@click.option("--checkpoint", type=_DIRECTORY, required=True, help="Megatron checkpoint, imported or saved by `train`.")
@click.option("--out", "output", type=_DIRECTORY, required=True, help="Hugging Face directory to write.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]),
              help="Precision to write; by default that of the Hugging Face model it came from.")  # fmt: skip
@_VERIFY
def export(
    checkpoint: Path,
    output: Path,
    dtype: Literal["bfloat16", "float16", "float32"] | None,
    verification: Literal["full", "tensors", "none"],
) -> None:
    """Write a Hugging Face directory that transformers and vLLM load.

    \b
    Example:
      megatron-solopo convert export --checkpoint runs/first/checkpoints/iter_0000100 --out aligned
    """
    with _interruptible(output):
        from megatron_solopo.checkpoint.conversion import export_model

        report = export_model(checkpoint, output, dtype=dtype, verification=verification)
    click.echo(f"{output}\n{report}")


@convert.command("verify")
@click.option("--hf", "source", type=_DIRECTORY, required=True, help="Hugging Face directory.")
@click.option("--checkpoint", type=_DIRECTORY, required=True, help="Megatron checkpoint.")
@click.option("--logits/--no-logits", default=True, show_default=True, help="Compare logits where the model fits.")
def verify(source: Path, checkpoint: Path, logits: bool) -> None:
    """Compare a Hugging Face directory with a Megatron checkpoint. Exit code 1 if they differ.

    Where precisions differ, the checkpoint is rounded first, as an export would: such a pair passes, and the report
    says "after rounding to ...".

    \b
    Example:
      megatron-solopo convert verify --hf aligned --checkpoint runs/first/checkpoints/iter_0000100
    """
    with _interruptible():
        from megatron_solopo.checkpoint.conversion import verify_models

        report = verify_models(source, checkpoint, logits=logits)
    click.echo(str(report))
    for failure in report.failures:
        click.echo(f"error: {failure}", err=True)
    if report.failures:
        sys.exit(1)
