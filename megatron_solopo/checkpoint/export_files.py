"""Makes the small files of an export consistent: they name only what is there, and state what its weights are.

config.json        names no code (a checkpoint carries none; weights were trained by transformers' own class) and no
                   path of another machine. It states class, precision and ties of the weights, and its rotation twice:
                   `rope_parameters` for transformers 5, `rope_theta` and `rope_scaling` for transformers 4 and older
                   servers. Without those they take theta 10,000, and say nothing.
tokenizer_config.json, processor_config.json and so on name no code and no file that is not there.
                   transformers 4 knows the names of the tokenizer's class and of its special tokens.
"""

import json
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from megatron_solopo.architecture.contradictions import CLASSES
from megatron_solopo.architecture.huggingface_config import Architecture
from megatron_solopo.architecture.model_directory import ADAPTER_CONFIG, CONFIG, parse_model_json
from megatron_solopo.checkpoint.mapping import all_huggingface_shapes

# Each of these makes transformers run a file of the directory or of the hub.
_CODE = ("auto_map", "custom_pipelines")
_ORIGINS = ("_name_or_path", "name_or_path")
_FILE_KEYS = ("tokenizer_file", "vocab_file", "merges_file", "special_tokens_map_file", "added_tokens_file")


def export_files(
    folder: Path, files: Mapping[str, bytes], architecture: Architecture, dtypes: Mapping[str, torch.dtype]
) -> tuple[dict[str, bytes], list[str]]:
    """Return the small files for an export, and one note for each statement that was left out or corrected.

    Args:
        folder: where the files were read.
        files: those of the checkpoint, by relative name.
        dtypes: the precision of every tensor of the export.

    Raises UserError if a settings file is damaged.
    """
    exported, notes = dict(files), []
    for name, fields in _json_objects(folder, files):
        settled = {key: value for key, value in fields.items() if not _is_left_out(key, value, files)}
        notes += [f"{name}: {key} is left out" for key in fields.keys() - settled.keys() if key not in _ORIGINS]
        if name == CONFIG:
            stated = fields.get("dtype") or fields.get("torch_dtype")
            settled |= _facts(architecture, dtypes)
            if stated and str(stated).removeprefix("torch.") != settled["dtype"]:
                notes.append(f"{name}: dtype is {settled['dtype']}, as the tensors are (it said {stated})")
        if name == "tokenizer_config.json":
            settled = _for_transformers_4(settled)
        if settled != fields:
            exported[name] = (json.dumps(settled, indent=2, ensure_ascii=False) + "\n").encode()
    return exported, sorted(notes)


def absent_counterparts(folder: Path) -> list[str]:
    """One line for each file that a small file of a Hugging Face directory names, and that is not there.

    Raises UserError if a settings file is damaged.
    """
    names = {str(file.relative_to(folder)) for file in folder.rglob("*") if file.is_file()}
    files = {name: (folder / name).read_bytes() for name in names if name.endswith(".json") and "/" not in name}
    absent = []
    for name, fields in sorted(_json_objects(folder, files)):
        for key, value in fields.items():
            absent += [f"{name}: {key} names {file}" for file in _files_named(key, value) if file not in names]
    if ADAPTER_CONFIG in names:
        absent.append(f"{ADAPTER_CONFIG} describes an adapter")
    return [f"{folder}: {each}, which is not there; remove that statement, or add the file" for each in absent]


def _json_objects(folder: Path, files: Mapping[str, bytes]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The settings files: config.json, tokenizer_config.json, processor_config.json and so on."""
    for name, content in files.items():
        if name == CONFIG or name.endswith("_config.json"):
            fields = parse_model_json(content, folder / name)
            if isinstance(fields, dict):
                yield name, fields


def _is_left_out(key: str, value: Any, files: Collection[str]) -> bool:
    if key in _CODE or key in _ORIGINS:
        return True
    return any(file not in files for file in _files_named(key, value))


def _files_named(key: str, value: Any) -> Iterator[str]:
    """The files of the directory that a key of a settings file names. Code of another repository is not one of them."""
    if key in _FILE_KEYS and isinstance(value, str):
        yield value
    elif key == "fast_tokenizer_files" and isinstance(value, list):
        yield from map(str, value)
    elif key == "auto_map" and isinstance(value, dict):
        classes = [each for one in value.values() for each in (one if isinstance(one, list) else [one]) if each]
        yield from sorted({f"{each.split('.')[0]}.py" for each in classes if "--" not in each})


def _for_transformers_4(fields: dict[str, Any]) -> dict[str, Any]:
    """Replace names that only transformers 5 knows by those that both versions know. Their meaning is the same."""
    if fields.get("tokenizer_class") == "TokenizersBackend":
        fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(fields.get("extra_special_tokens"), list):
        fields.setdefault("additional_special_tokens", fields.pop("extra_special_tokens"))
    return fields


def _facts(architecture: Architecture, dtypes: Mapping[str, torch.dtype]) -> dict[str, Any]:
    """The fields of config.json that follow from the weights, in the writings of transformers 5 and 4."""
    numbers = Counter[torch.dtype]()
    for name, shape in all_huggingface_shapes(architecture).items():
        numbers[dtypes[name]] += torch.Size(shape).numel()
    dtype = str(numbers.most_common(1)[0][0]).removeprefix("torch.")
    rope = dict(architecture.rope_parameters)
    kind = {"rope_type": rope["rope_type"], "type": rope["rope_type"]}  # servers of 2024 read the second
    scaling = kind | {key: value for key, value in rope.items() if key not in ("rope_theta", *kind)}
    return {
        "architectures": [CLASSES[architecture.model_type]],
        "tie_word_embeddings": architecture.tied_embeddings,
        "dtype": dtype,
        "torch_dtype": dtype,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if rope["rope_type"] == "default" else scaling,
    }
