"""Where a model's Hugging Face files lie: in its directory, or in the folder `huggingface/` of a Megatron checkpoint.

checkpoint/.metadata, metadata.json, common.pt, *.distcp     Megatron's
checkpoint/huggingface/   config.json, generation config, tokenizer, chat template: all that an export needs
"""

from pathlib import Path

HUGGINGFACE_FOLDER = "huggingface"
METADATA, FORMAT = ".metadata", "metadata.json"
# Megatron-LM takes a checkpoint that does not say so for one of its oldest form, whose attention weights it reorders.
MEGATRON_LM_VERSION = {"checkpoint_version": 3.0}


def is_megatron_checkpoint(path: Path) -> bool:
    """Whether `path` is a Megatron distributed checkpoint; Megatron writes the second of these files last."""
    return (path / METADATA).is_file() and (path / FORMAT).is_file()


def huggingface_directory(path: Path) -> Path:
    """The directory that holds config.json and the tokenizer of the model in `path`, of either kind."""
    return path / HUGGINGFACE_FOLDER if is_megatron_checkpoint(path) else path
