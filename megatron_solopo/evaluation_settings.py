"""What a user asks of `evaluate long-context` and `evaluate preference`.

This module stands outside the package `evaluate`, which imports torch: the command line reads the options from here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from megatron_solopo.command_settings import CommandSettings
from megatron_solopo.data.settings import Template
from megatron_solopo.generate.settings import ServerSettings
from megatron_solopo.triplets.corpus.formats import Format

QA = "qa"
TASK_NAMES = (
    "needle_single",
    "needle_multi_key",
    "needle_multi_value",
    "needle_multi_query",
    "variable_tracking",
    "common_words",
    QA,
)


class LongContextSettings(ServerSettings):
    """What a user asks of `evaluate long-context`."""

    model: str
    """Run directory (its latest checkpoint), checkpoint, or Hugging Face directory. With --server, the name of the
    model on the server."""
    tasks: tuple[str, ...] = ()
    """needle_single, needle_multi_key, needle_multi_value, needle_multi_query, variable_tracking, common_words, qa."""
    lengths: tuple[int, ...] = ()
    """Exact tokens of the tasks' prompts, with the chat template, without the answer. For --contexts, the upper bounds
    of buckets."""
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    """Where a single needle lies, from 0 (start) to 1 (end)."""
    samples: int | None = Field(default=None, ge=1)
    """Samples per task and length, and per file and side. If not given, 20 for tasks and all for files."""
    contexts: tuple[Path, ...] = ()
    """Output of `data build` or `data select`. May be repeated."""
    side: Literal["short", "long", "both"] = "both"
    """Which prompts of --contexts are asked."""
    corpus: Path | None = None
    """Questions with their documents, for the task qa."""
    format: Format = "musique"
    """Format of --corpus."""
    prompt_template: Path | None = None
    """Jinja file over `documents` and `question`, for the task qa."""
    haystack: Path | None = None
    """Text file that hides needles. If not given, sentences are made up."""
    template: Literal["auto"] | Template = "auto"
    """Template of the tasks' prompts. auto: the chat template where the tokenizer has one."""
    scored_text: Literal["final", "whole"] = "final"
    """final: score the text behind the answer marker, if the answer to a question has the marker. whole: score all of
    it."""
    answer_marker: str = "answer is:"
    """Text before a final answer. Case does not matter; the last marker counts."""
    max_new_tokens: int | None = Field(default=None, ge=1)
    """Most tokens of an answer. If not given, the task's or the row's own number."""
    batch_size: int = Field(default=1, ge=1)
    """Equally long prompts that are generated together. Not for a server."""
    backend: Literal["auto", "megatron", "transformers"] = "auto"
    """What runs the model. auto: megatron for checkpoints and under torchrun, else transformers."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the model. auto: what its config.json says."""
    tensor_model_parallel_size: int = Field(default=1, ge=1)
    """Tensor parallel ranks of a Megatron model."""
    pipeline_model_parallel_size: int = Field(default=1, ge=1)
    """Pipeline stages of a Megatron model. Further ranks share the samples."""
    expert_model_parallel_size: int = Field(default=1, ge=1)
    """Ranks that share the experts of each layer of a Megatron model. They are ranks of TP, or share the samples."""
    expert_tensor_parallel_size: int | None = Field(default=None, ge=1)
    """Ranks that share each expert. If not given, as many as TP."""
    tokenizer: str | None = None
    """Hugging Face directory or SentencePiece .model file. If not given, the model's own."""
    seed: int = Field(default=0, ge=0)
    """Seed of every random choice in the tasks."""
    name: str | None = None
    """Name of the results in the run's folder `evaluation`. If not given, long_context-CHECKPOINT."""
    output: Path | None = None
    """File of results, .json. If not given, it is in the run of the model."""
    overwrite: bool = False
    """Generate all answers anew. Without it, only missing answers are generated."""

    @property
    def parallel_sizes(self) -> dict[str, Any]:
        """Those of a Megatron model's layout that are not the default, by the names of their fields."""
        fields = {name: each for name, each in type(self).model_fields.items() if name.endswith("_parallel_size")}
        return {name: getattr(self, name) for name, each in fields.items() if getattr(self, name) != each.default}

    def contradictions(self) -> Iterator[str]:
        yield from super().contradictions()
        yield from self._wrong_lists()
        yield from self._wrong_tasks()
        yield from self._wrong_places()

    def _wrong_lists(self) -> Iterator[str]:
        yield from (f"--lengths {length}: must be at least 1" for length in self.lengths if length < 1)
        yield from (f"--depths {depth}: must be from 0 to 1" for depth in self.depths if not 0 <= depth <= 1)
        for flag, values in (("--lengths", self.lengths), ("--depths", self.depths)):
            if len(set(values)) != len(values):
                yield f"{flag}: names a number twice"

    def _wrong_tasks(self) -> Iterator[str]:
        legal = ", ".join(TASK_NAMES)
        yield from (f"--tasks {name}: legal: {legal}" for name in self.tasks if name not in TASK_NAMES)
        if not self.tasks and not self.contexts:
            yield "nothing to evaluate: name --tasks and --lengths, or --contexts, or both"
        if self.tasks and not self.lengths:
            yield "--tasks: needs --lengths, such as --lengths 4096,8192"
        if self.tasks and not self.depths:
            yield "--depths: names none; the default is 0,0.25,0.5,0.75,1"
        if QA in self.tasks and self.corpus is None:
            yield f"--tasks {QA}: needs --corpus"
        if self.scored_text == "final" and not self.answer_marker.strip():
            yield "--answer-marker: must not be blank; to score whole answers, pass --scored-text whole"

    def _wrong_places(self) -> Iterator[str]:
        if self.server is not None and self.tokenizer is None:
            yield "--server: needs --tokenizer, the model's own, to make prompts of exact lengths"
        if self.server is not None and self.backend != "auto":
            yield f"--backend {self.backend}: has no effect with --server; leave it out"
        if self.output is not None and self.output.suffix != ".json":
            yield f"--output {self.output}: must end in .json"
        if self.output is not None and self.name is not None:
            yield "--name: has no effect with --output; leave one of them out"


class PreferenceSettings(CommandSettings):
    """What a user asks of `evaluate preference`."""

    model: Path
    """Run directory (its latest checkpoint), checkpoint, or Hugging Face directory."""
    config: Path | None = None
    """YAML config. If not given, the config of the run that the checkpoint belongs to."""
    split: Literal["eval", "train"] = "eval"
    """Split of data.path."""
    output: Path | None = None
    """File of results, .json; a .jsonl and a .png go beside it. If not given,
    RUN_DIR/evaluation/preference-CHECKPOINT.json."""
