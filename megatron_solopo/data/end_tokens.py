"""The tokens that end an answer, as this program and servers read them from a model's files."""

from pathlib import Path
from typing import Any

from megatron_solopo.architecture.model_directory import CONFIG, huggingface_directory
from megatron_solopo.data.tokenizer import Tokenizer
from megatron_solopo.errors import UserError

GENERATION_CONFIG = "generation_config.json"


def end_tokens(path: Path | str, tokenizer: Tokenizer) -> set[int]:
    """The tokens that end an answer: the tokenizer's, and those of the model's generation settings.

    Llama 3 has several. Without generation_config.json, config.json counts.

    Args:
        path: Hugging Face directory, Megatron checkpoint, or a tokenizer's own directory or file.

    Raises UserError for settings that transformers cannot read.
    """
    # transformers' own are not typed.
    from transformers import AutoConfig, GenerationConfig

    generation: Any = GenerationConfig
    directory = huggingface_directory(Path(path))
    named: Any = None
    try:
        if (directory / GENERATION_CONFIG).is_file():
            named = generation.from_pretrained(directory, local_files_only=True).eos_token_id
        elif (directory / CONFIG).is_file():
            config = AutoConfig.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
            named = generation.from_model_config(config).eos_token_id
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{directory}: its settings of generation cannot be read: {reason}") from None
    ends = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    return {int(end) for end in ends if end is not None}
