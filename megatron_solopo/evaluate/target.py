"""What is to be evaluated: a run, a checkpoint, a Hugging Face directory, or a server's model."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_solopo.evaluation_results import EVALUATION_FOLDER, Backend
from megatron_solopo.model_directory import check_megatron_checkpoint, huggingface_directory, is_megatron_checkpoint

_CHECKPOINTS, _LATEST = "checkpoints", "latest"
_CONFIG, _TRAINER_STATE = "config.yaml", "trainer.json"


@dataclass(frozen=True)
class Target:
    """A model and where its results belong.

    Attributes:
        path: Megatron checkpoint or Hugging Face directory; None for a server's model.
        backend: What generates.
        run_dir: Of the run that the checkpoint belongs to.
        step: Of the checkpoint.
    """

    path: Path | None
    backend: Backend
    run_dir: Path | None = None
    step: int | None = None

    def output(self, kind: str, name: str | None) -> Path | None:
        """Where results go by default: the run's folder `evaluation`; None for a model of no run.

        Args:
            kind: Begins the default name, which ends with the checkpoint's.
            name: Instead of the default name.
        """
        if self.run_dir is None or self.path is None:
            return None
        return self.run_dir / EVALUATION_FOLDER / f"{name or f'{kind}-{self.path.name}'}.json"


def resolve(model: str, backend: Literal["auto", "megatron", "transformers"]) -> Target:
    """Find the model in a directory: a run's latest checkpoint, a checkpoint, or a Hugging Face model.

    A Hugging Face directory is for transformers, or for our model where it is asked for or torchrun started several
    processes; a checkpoint is for our model alone. Raises ValueError where there is no model.
    """
    path = Path(model)
    if (pointer := path / _CHECKPOINTS / _LATEST).is_file():
        path = path / _CHECKPOINTS / pointer.read_text(encoding="utf-8").strip()
        check_megatron_checkpoint(path, "--model")
    elif path.is_dir() and not is_megatron_checkpoint(path) and not (path / "config.json").is_file():
        check_megatron_checkpoint(path, "--model")
    if not path.is_dir():
        raise ValueError(
            f"--model {model}: no such directory; legal: a run's, a Megatron checkpoint, a Hugging Face directory, "
            "or with --server the name that the server knows the model by"
        )
    if not is_megatron_checkpoint(path):
        several = os.environ.get("WORLD_SIZE", "1") != "1"
        chosen: Backend = ("megatron" if several else "transformers") if backend == "auto" else backend
        return Target(path, chosen)
    check_megatron_checkpoint(path, "--model")
    if backend == "transformers":
        raise ValueError(
            f"--backend transformers: {path} is a Megatron checkpoint; leave the option out, or export it first "
            "with `megatron-solopo convert export`"
        )
    run_dir = path.parent.parent
    if path.parent.name != _CHECKPOINTS or not (run_dir / _CONFIG).is_file():
        return Target(path, "megatron")
    return Target(path, "megatron", run_dir, _step(path))


def stored_dtype(path: Path) -> str:
    """float32 or bfloat16: what `config.json` of the model says, float32 where it says anything else."""
    config = json.loads((huggingface_directory(path) / "config.json").read_bytes())
    named = config.get("dtype", config.get("torch_dtype"))
    return "bfloat16" if named == "bfloat16" else "float32"


def _step(checkpoint: Path) -> int | None:
    try:
        return int(json.loads((checkpoint / _TRAINER_STATE).read_bytes())["step"])
    except (OSError, ValueError, KeyError):
        return None
