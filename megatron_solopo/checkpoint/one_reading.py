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

from megatron_solopo.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_SHOWN = 3


def check_one_reading(path: Path, files: Collection[str] | None) -> None:
    """Raise UserError if another loader reads other weights than those of `files`.

    Args:
        path: a Hugging Face directory.
        files: the names of the safetensors files that the index names; None: there is no index.
    """
    found = sorted(file.name for file in path.glob("*.safetensors"))
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
    if (path / "hf_quant_config.json").is_file():
        raise _refused(
            path,
            "hf_quant_config.json and unquantized weights",
            "vLLM takes them for quantized, transformers does not",
            "take the unquantized model, or remove that file",
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
    ordered = sorted(names)
    return ", ".join(ordered[:_SHOWN]) + (", ..." if len(ordered) > _SHOWN else "")
