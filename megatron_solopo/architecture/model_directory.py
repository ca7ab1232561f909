"""Finds a model's Hugging Face files: in its directory, or in the folder `huggingface/` of a Megatron checkpoint.

checkpoint/.metadata, metadata.json, common.pt, *.distcp   Megatron's files
checkpoint/huggingface/                                    the model's small files, which an export needs
"""

import json
from pathlib import Path
from typing import Any

from megatron_solopo.errors import UserError
from megatron_solopo.files import json_object

HUGGINGFACE_FOLDER = "huggingface"
METADATA, FORMAT = ".metadata", "metadata.json"
# Without this, Megatron-LM takes a checkpoint for one of its oldest form, and reorders its attention weights.
MEGATRON_LM_VERSION = {"checkpoint_version": 3.0}
CONFIG, ADAPTER_CONFIG, ADAPTER_BASE = "config.json", "adapter_config.json", "adapter_base.json"
# Each row is one form of a tokenizer: all its files are needed.
_TOKENIZER_FORMS = (("tokenizer.json",), ("tokenizer.model",), ("vocab.json", "merges.txt"), ("vocab.txt",))
_CHECKPOINTS = ("iter_*", "checkpoints/iter_*")


def is_megatron_checkpoint(path: Path) -> bool:
    """Whether `path` is a complete Megatron distributed checkpoint. Megatron writes metadata.json last."""
    return (path / METADATA).is_file() and (path / FORMAT).is_file()


def huggingface_directory(path: Path) -> Path:
    """The directory with config.json and tokenizer of a model (Hugging Face directory or Megatron checkpoint)."""
    return path / HUGGINGFACE_FOLDER if is_megatron_checkpoint(path) else path


def check_one_kind(path: Path) -> None:
    """Raise UserError if `path` is a Megatron checkpoint and a Hugging Face directory, for then it holds two models."""
    if is_megatron_checkpoint(path) and (path / CONFIG).is_file():
        raise UserError(
            f"{path}: holds a Megatron checkpoint ({METADATA}, {FORMAT}) and a Hugging Face model ({CONFIG}); Megatron "
            "reads the former, transformers the latter; move one of them to another directory"
        )


def has_tokenizer(path: Path) -> bool:
    """Whether a model (Hugging Face directory or Megatron checkpoint) has a tokenizer."""
    folder = huggingface_directory(path)
    return any(all((folder / name).is_file() for name in form) for form in _TOKENIZER_FORMS)


def missing_vocabulary(path: Path) -> str:
    """Which file of the tokenizer in a Hugging Face directory is missing; "" if none is."""
    if has_tokenizer(path):
        return ""
    for form in _TOKENIZER_FORMS:
        there = [name for name in form if (path / name).is_file()]
        if there:
            absent = ", ".join(name for name in form if name not in there)
            return f"has {there[0]} and no {absent}, which belong together; copy {absent} from the original model"
    forms = ", ".join(" with ".join(form) for form in _TOKENIZER_FORMS)
    return f"has no tokenizer ({forms}); copy its files from the original model"


def check_huggingface_directory(path: Path, option: str) -> None:
    """Raise UserError, naming the command's `option`, if `path` cannot be a Hugging Face directory."""
    named = f"{option}={path}"
    _check_is_directory(path, named, " (names of a hub are not downloaded)")
    check_one_kind(path)
    _check_no_adapter(path, named)
    if is_megatron_checkpoint(path):
        raise UserError(f"{named}: is a Megatron checkpoint already; {option} must be a Hugging Face directory")
    if _is_inside_checkpoint(path):
        raise UserError(
            f"{named}: is a folder of the Megatron checkpoint {path.parent} and holds no weights; "
            f"{option} must be a Hugging Face directory"
        )
    if not (path / CONFIG).is_file():
        raise UserError(f"{named}: holds no {CONFIG}; {option} must be a Hugging Face directory")


def check_megatron_checkpoint(path: Path, option: str) -> None:
    """Raise UserError, naming the command's `option` and a likely path, if `path` is no complete checkpoint."""
    named = f"{option}={path}"
    check_one_kind(path)
    if is_megatron_checkpoint(path):
        if not (config := huggingface_directory(path) / CONFIG).is_file():
            raise UserError(f"{config}: no such file; {named} needs the model's config and tokenizer in that folder")
        return
    beside = ", ".join(each.name for each in _complete(path.parent, "iter_*"))
    _check_is_directory(path, named, f"; {path.parent} holds {beside}" if beside else "")
    if _is_inside_checkpoint(path):
        raise UserError(f"{named}: is a folder of a Megatron checkpoint; did you mean {path.parent}?")
    _check_no_adapter(path, named)
    kind = "is a Hugging Face directory" if (path / CONFIG).is_file() else "is no complete Megatron checkpoint"
    raise UserError(f"{named}: {kind}; {option} must hold {METADATA} and {FORMAT}{_meant(path)}")


def _check_no_adapter(path: Path, named: str) -> None:
    if (path / ADAPTER_CONFIG).is_file() and not (path / CONFIG).is_file():
        raise UserError(
            f"{named}: holds an adapter of PEFT without its model; name the directory that `convert export --merge` "
            "writes of the run's checkpoint"
        )


def _check_is_directory(path: Path, named: str, hint: str) -> None:
    if not path.is_dir():
        raise UserError(f"{named}: {'is a file, not a directory' if path.exists() else f'no such directory{hint}'}")


def _is_inside_checkpoint(path: Path) -> bool:
    return path.name == HUGGINGFACE_FOLDER and is_megatron_checkpoint(path.parent)


def _meant(path: Path) -> str:
    """Ask for the newest checkpoint in a run directory or in its `checkpoints/`."""
    inside = [each for pattern in _CHECKPOINTS for each in _complete(path, pattern)]
    return f"; did you mean {inside[-1]}?" if inside else ""


def _complete(path: Path, pattern: str) -> list[Path]:
    return [each for each in sorted(path.glob(pattern)) if is_megatron_checkpoint(each)]


def parse_model_json(content: bytes, file: Path) -> Any:
    """The JSON value of a file that came with a model. Raises UserError naming the file if it is damaged."""
    try:
        # transformers itself writes Infinity into some files.
        return json.loads(content, object_pairs_hook=json_object)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON: {error}; take the file of the original model") from None
