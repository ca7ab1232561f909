"""The model that an evaluation names: a run, a checkpoint, a Hugging Face directory, or a server's model."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_solopo.architecture.model_directory import (
    CONFIG,
    huggingface_directory,
    is_megatron_checkpoint,
    parse_model_json,
)
from megatron_solopo.errors import UserError
from megatron_solopo.results.long_context import Backend
from megatron_solopo.results.results_file import EVALUATION_FOLDER
from megatron_solopo.run_directory import Subject, find_subject


@dataclass(frozen=True)
class Target:
    """The model that is evaluated, and what runs it.

    Attributes:
        subject: The model and its run; None for a server's model.
    """

    subject: Subject | None
    backend: Backend

    @property
    def path(self) -> Path | None:
        """Megatron checkpoint or Hugging Face directory; None for a server's model."""
        return None if self.subject is None else self.subject.path

    @property
    def run_dir(self) -> Path | None:
        """Directory of the run that the checkpoint belongs to; None where it belongs to none."""
        return None if self.subject is None else self.subject.run_dir

    @property
    def step(self) -> int | None:
        """Optimizer step of the checkpoint; None where it belongs to no run."""
        return None if self.subject is None else self.subject.step

    def default_output(self, name: str | None) -> Path | None:
        """Where results go: the folder `evaluation` of the run; None for a model of no run.

        Args:
            name: Of the file, instead of long_context-CHECKPOINT.
        """
        if self.subject is None or self.subject.run_dir is None:
            return None
        return self.subject.run_dir / EVALUATION_FOLDER / f"{name or f'long_context-{self.subject.name}'}.json"


def find_target(model: str, backend: Literal["auto", "megatron", "transformers"]) -> Target:
    """Find the model in a directory: a run's latest checkpoint, a checkpoint, or a Hugging Face model.

    Our model runs checkpoints. transformers runs Hugging Face directories, unless our model is asked for or torchrun
    started several processes. Raises UserError where there is no model.
    """
    subject = find_subject(Path(model), "--model")
    if is_megatron_checkpoint(subject.path):
        if backend == "transformers":
            raise UserError(
                f"--backend transformers: {subject.path} is a Megatron checkpoint; leave the option out, or export it "
                "first with `megatron-solopo convert export`"
            )
        return Target(subject, "megatron")
    if backend == "auto":
        return Target(subject, "megatron" if os.environ.get("WORLD_SIZE", "1") != "1" else "transformers")
    return Target(subject, backend)


def stored_dtype(path: Path) -> str:
    """The dtype in the model's `config.json` if it is bfloat16, else float32."""
    file = huggingface_directory(path) / CONFIG
    config = parse_model_json(file.read_bytes(), file)
    named = config.get("dtype", config.get("torch_dtype"))
    return "bfloat16" if named == "bfloat16" else "float32"
