"""What a user asks of `evaluate long-context`, what is illegal about it, and which model it names."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_solopo.architecture.model_directory import huggingface_directory, is_megatron_checkpoint
from megatron_solopo.data.settings import Template
from megatron_solopo.errors import UserError
from megatron_solopo.evaluate.tasks.generated_tasks import QA, TASKS
from megatron_solopo.results.long_context import Backend
from megatron_solopo.results.results_file import EVALUATION_FOLDER
from megatron_solopo.run_directory import Subject, find_subject
from megatron_solopo.triplets.corpus.formats import Format

Sides = Literal["short", "long", "both"]


@dataclass(frozen=True)
class LongContextSettings:
    """What a user asks of `evaluate long-context`; the command's help says what each means."""

    model: str
    output: Path | None = None
    name: str | None = None
    tasks: tuple[str, ...] = ()
    lengths: tuple[int, ...] = ()
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int | None = None
    contexts: tuple[Path, ...] = ()
    side: Sides = "both"
    corpus: Path | None = None
    format: Format = "musique"
    prompt_template: Path | None = None
    haystack: Path | None = None
    template: Literal["auto"] | Template = "auto"
    scored_text: Literal["final", "whole"] = "final"
    answer_marker: str = "answer is:"
    max_new_tokens: int | None = None
    batch_size: int = 1
    backend: Literal["auto", "megatron", "transformers"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    tensor_model_parallel_size: int = 1
    pipeline_model_parallel_size: int = 1
    server: str | None = None
    tokenizer: str | None = None
    concurrency: int = 32
    timeout: float = 600.0
    retries: int = 8
    api_key_env: str | None = None
    seed: int = 0
    overwrite: bool = False

    @property
    def model_ranks(self) -> int:
        """Processes that one copy of our model takes."""
        return self.tensor_model_parallel_size * self.pipeline_model_parallel_size

    def check(self) -> None:
        """Raise UserError with one line per mistake."""
        if mistakes := [*self._wrong_numbers(), *self._wrong_tasks(), *self._wrong_places()]:
            raise UserError("\n".join(mistakes))

    def _wrong_numbers(self) -> list[str]:
        least: dict[str, int | None] = {"--batch-size": self.batch_size, "--concurrency": self.concurrency}
        least |= {"--samples": self.samples, "--max-new-tokens": self.max_new_tokens}
        least |= {"--tensor-model-parallel-size": self.tensor_model_parallel_size}
        least |= {"--pipeline-model-parallel-size": self.pipeline_model_parallel_size}
        mistakes = [f"{flag} {n}: must be at least 1" for flag, n in least.items() if n is not None and n < 1]
        mistakes += [f"--lengths {length}: must be at least 1" for length in self.lengths if length < 1]
        mistakes += [f"--depths {depth}: must be from 0 to 1" for depth in self.depths if not 0 <= depth <= 1]
        for flag, values in (("--lengths", self.lengths), ("--depths", self.depths)):
            if len(set(values)) != len(values):
                mistakes.append(f"{flag}: names one of them twice")
        if self.seed < 0 or self.retries < 0 or self.timeout <= 0:
            mistakes.append("--seed and --retries must not be negative, --timeout must be above 0")
        return mistakes

    def _wrong_tasks(self) -> list[str]:
        mistakes = [f"--tasks {name}: legal: {', '.join(TASKS)}" for name in self.tasks if name not in TASKS]
        if not self.tasks and not self.contexts:
            mistakes.append("nothing to evaluate: name --tasks and --lengths, or --contexts, or both")
        if self.tasks and not self.lengths:
            mistakes.append("--tasks: needs --lengths, such as --lengths 4096,8192")
        if self.tasks and not self.depths:
            mistakes.append("--depths: names none; the default is 0,0.25,0.5,0.75,1")
        if QA in self.tasks and self.corpus is None:
            mistakes.append(f"--tasks {QA}: needs --corpus")
        if self.scored_text == "final" and not self.answer_marker.strip():
            mistakes.append("--answer-marker: must not be blank; to score whole answers, pass --scored-text whole")
        return mistakes

    def _wrong_places(self) -> list[str]:
        mistakes = []
        if self.server is not None and not self.server.startswith(("http://", "https://")):
            mistakes.append(f"--server {self.server}: must begin with http:// or https://")
        if self.server is not None and self.tokenizer is None:
            mistakes.append("--server: needs --tokenizer, the model's own, to make prompts of exact lengths")
        if self.server is not None and self.backend != "auto":
            mistakes.append(f"--backend {self.backend}: has no part where --server generates")
        if self.output is not None and self.output.suffix != ".json":
            mistakes.append(f"--output {self.output}: must end in .json")
        if self.output is not None and self.name is not None:
            mistakes.append("--name: has no part where --output says the file")
        return mistakes


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
    config = json.loads((huggingface_directory(path) / "config.json").read_bytes())
    named = config.get("dtype", config.get("torch_dtype"))
    return "bfloat16" if named == "bfloat16" else "float32"
