"""Refuses a directory whose weights two loaders read differently. We never choose between them.

What loaders read (transformers 4.57 and 5.24, vLLM 0.11 and later):

transformers   model.safetensors; without it, the shards that model.safetensors.index.json names
vLLM           consolidated*.safetensors, if there are any; otherwise the files that the index names; without an index
               every .safetensors file
llama.cpp, MLX every model*.safetensors file
peft           where it is installed, transformers adds the adapter of adapter_model.* to the weights

All of them read pytorch_model.bin only where there are no safetensors, so that file may lie beside them.
"""

from collections.abc import Collection
from pathlib import Path

from pydantic import BaseModel, ValidationError

from megatron_solopo.architecture.model_directory import parse_model_json
from megatron_solopo.errors import UserError, first_problem
from megatron_solopo.files import first_few

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_SHOWN = 3


class _Index(BaseModel):
    """model.safetensors.index.json."""

    weight_map: dict[str, str]


def read_index(path: Path) -> dict[str, str] | None:
    """The file of every tensor by the index of a Hugging Face directory, or None if there is no index.

    Raises UserError if the index is damaged, or names files outside of the directory.
    """
    file = path / INDEX
    if not file.is_file():
        return None
    try:
        index = _Index.model_validate(parse_model_json(file.read_bytes(), file)).weight_map
    except ValidationError as error:
        raise UserError(f"{file}: {first_problem(error, 'not an index of safetensors shards')}") from None
    for name, shard in index.items():
        if Path(shard).is_absolute() or ".." in Path(shard).parts:
            raise UserError(f"{file}: names {shard} as the file of {name}, which is outside the directory")
    return index


def check_one_reading(path: Path) -> None:
    """Raise UserError if two loaders read different weights in a Hugging Face directory with safetensors."""
    index = read_index(path)
    files = None if index is None else set(index.values())
    found = sorted(file.name for file in path.glob("*.safetensors"))
    if files is None and SINGLE not in found:
        return  # no weights that we read
    if files is not None and SINGLE in found and SINGLE not in files:
        raise _refused(
            path,
            f"{INDEX} and {SINGLE}",
            f"transformers reads {SINGLE}, vLLM the files that the index names ({_first(files)})",
            "remove the index or the file, whichever is left over",
        )
    if mistral := [name for name in found if name.startswith("consolidated")]:
        raise _refused(
            path,
            f"{_first(mistral)} and weights in the form of transformers",
            "vLLM reads the former, transformers and this program the latter",
            "remove consolidated*.safetensors and params.json, or take a directory of links without them",
        )
    adapter = sorted(file.name for file in path.glob("adapter_model*"))
    if adapter:
        raise _refused(
            path,
            f"{_first(adapter)} and whole weights",
            "transformers adds the adapter to the weights where peft is installed, and ignores it elsewhere",
            "merge it with peft's merge_and_unload, or move it with adapter_config.json to another directory",
        )
    _check_left_over(path, found, files)


def _check_left_over(path: Path, found: Collection[str], files: Collection[str] | None) -> None:
    """Refuse files of an earlier save, which some loaders read too."""
    if files is None:
        left_over = [name for name in found if name != SINGLE]
        what, readers = SINGLE, "vLLM reads every .safetensors file where there is no index"
    else:
        left_over = [name for name in found if name not in files and name.startswith("model")]
        what, readers = f"the files of {INDEX}", "llama.cpp and MLX read every model*.safetensors file"
    if left_over:
        raise _refused(
            path,
            f"{_first(left_over)} beside {what}",
            f"{readers}, transformers does not",
            "remove what is left over of another save, or move it to another directory",
        )


def _refused(path: Path, found: str, readers: str, remedy: str) -> UserError:
    return UserError(f"{path}: holds {found}; {readers}; {remedy}")


def _first(names: Collection[str]) -> str:
    return first_few(sorted(names), _SHOWN)
