"""A Hugging Face model directory, loaded without running code from it."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

from megatron_solopo.data.tokenizer import Tokenizer
from megatron_solopo.errors import UserError

# The library's own are not typed.
_GENERATION_CONFIG: Any = GenerationConfig
_LOGGING: Any = logging


def load_transformers_model(path: Path | str, dtype: str = "auto") -> Any:
    """The causal language model, ready to evaluate, on the CPU.

    Args:
        dtype: A torch dtype's name; auto: the one it is stored in.

    Raises UserError with one line where there is no loadable model.
    """
    shows_progress = _LOGGING.is_progress_bar_enabled()
    _LOGGING.disable_progress_bar()
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, local_files_only=True, trust_remote_code=False
        )
    # The library raises whatever the damaged file led to.
    except Exception as error:
        raise UserError(f"--model {path}: no loadable model: {' '.join(str(error).split())}") from None
    finally:
        if shows_progress:
            _LOGGING.enable_progress_bar()
    return model.eval()


def end_tokens(path: Path | str, tokenizer: Tokenizer) -> set[int]:
    """The tokens that end a response: the tokenizer's, and those that the model's generation settings name (Llama 3
    has several)."""
    try:
        settings = _GENERATION_CONFIG.from_pretrained(path, local_files_only=True)
    except OSError:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        settings = _GENERATION_CONFIG.from_model_config(config)
    named = settings.eos_token_id
    ends = set(named if isinstance(named, list) else [named]) | {tokenizer.eos_token_id}
    return {int(end) for end in ends if end is not None}
