"""What a user asks of `data prepare`."""

from pathlib import Path
from typing import Literal

from pydantic import Field

from megatron_solopo.command_settings import CommandSettings
from megatron_solopo.data.template_arguments import TemplateKwargs

Template = Literal["chat", "plain"]
"""How a row becomes text: by the tokenizer's chat template, or as it is."""


class TemplateSettings(CommandSettings):
    """How rows become text."""

    template: Literal["auto", "chat", "plain"] = "auto"
    """chat: messages by the tokenizer's chat template; a string is one user message. plain: BOS where it is usual, the
    text, and EOS behind a response. auto: chat for messages, plain for strings."""
    chat_template_kwargs: TemplateKwargs = Field(default={})
    """Arguments for the chat template, such as '{"enable_thinking": false}'. Those of a row win."""


class ShowSettings(TemplateSettings):
    """What a user asks of `data validate` beside the checks."""

    show: int | None = Field(default=None, ge=1)
    """Print the first N rows as tokens, and mark those that count in training. It needs --tokenizer. Colours follow the
    terminal and NO_COLOR."""
    tokenizer: str | None = None
    """Hugging Face directory or SentencePiece .model file, for --show."""


class PrepareSettings(TemplateSettings):
    """What a user asks of `data prepare`. The same settings always give the same output."""

    input: Path
    """Triplets, pairs or instructions: a file of JSON lines, a JSON array, parquet or Arrow, a folder of such files, or
    a Hugging Face dataset on disk. JSON may be compressed with gzip, bzip2, xz or zstd."""
    output: Path
    """Directory to write. It is `data.path` in a run's config."""
    tokenizer: str
    """Hugging Face directory or SentencePiece .model file."""
    on_lost_content: Literal["refuse", "warn"] = "refuse"
    """Rows that lose content in the template, do not end with an end token, or whose answers have words that the
    tokenizer does not know, are an error (refuse), or kept and counted (warn)."""
    max_length: int | None = Field(default=None, ge=2)
    """Most tokens of a prompt together with a response."""
    overlong: Literal["refuse", "drop"] = "refuse"
    """Longer rows are an error (refuse), or left out and counted (drop). Nothing is ever cut."""
    eval_count: int = Field(default=0, ge=0)
    """Rows to hold out for evaluation."""
    seed: int = 1234
    """Seed that draws the held-out rows."""
    num_proc: int = Field(default=1, ge=1)
    """Processes that tokenize. The output does not depend on their number. Killed and started again, they tokenize only
    what is missing."""
    overwrite: bool = False
    """Replace the output if it is a prepared directory."""
