"""What is to be evaluated: a run, a checkpoint, a Hugging Face directory, or a server's model."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_solopo.architecture.model_directory import huggingface_directory, is_megatron_checkpoint
from megatron_solopo.errors import UserError
from megatron_solopo.results.long_context import EVALUATION_FOLDER, Backend
from megatron_solopo.run_directory import Subject, find_subject


@dataclass(frozen=True)
class Target:
    """A model and what generates with it.

    Attributes:
        subject: The model and its run; None for a server's model.
        backend: What generates.
    """

    subject: Subject | None
    backend: Backend

    @property
    def path(self) -> Path | None:
        """Megatron checkpoint or Hugging Face directory; None for a server's model."""
        return None if self.subject is None else self.subject.path

    @property
    def run_dir(self) -> Path | None:
        """Of the run that the checkpoint belongs to."""
        return None if self.subject is None else self.subject.run_dir

    @property
    def step(self) -> int | None:
        """Of the checkpoint."""
        return None if self.subject is None else self.subject.step

    def output(self, kind: str, name: str | None) -> Path | None:
        """Where results go by default: the run's folder `evaluation`; None for a model of no run.

        Args:
            kind: Begins the default name, which ends with the checkpoint's.
            name: Instead of the default name.
        """
        if self.subject is None or self.subject.run_dir is None:
            return None
        return self.subject.run_dir / EVALUATION_FOLDER / f"{name or f'{kind}-{self.subject.name}'}.json"


def resolve(model: str, backend: Literal["auto", "megatron", "transformers"]) -> Target:
    """Find the model in a directory: a run's latest checkpoint, a checkpoint, or a Hugging Face model.

    A Hugging Face directory is for transformers, or for our model where it is asked for or torchrun started several
    processes; a checkpoint is for our model alone. Raises UserError where there is no model.
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
    """float32 or bfloat16: what `config.json` of the model says, float32 where it says anything else."""
    config = json.loads((huggingface_directory(path) / "config.json").read_bytes())
    named = config.get("dtype", config.get("torch_dtype"))
    return "bfloat16" if named == "bfloat16" else "float32"
