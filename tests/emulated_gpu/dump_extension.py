"""Writes what the compiled module of Transformer Engine holds: its enums, classes, and functions with their arguments.

    python -m tests.emulated_gpu.dump_extension tests/emulated_gpu/extension.json

It needs the compiled `transformer_engine_torch`, which imports without a GPU. The file is an input of the tests.
"""

import json
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any


def arguments(docstring: str) -> list[str]:
    """Names of a function's arguments from pybind11's first line, each with `=` and its default where it has one."""
    inside = docstring.split("\n")[0].partition("(")[2].rpartition(") -> ")[0]
    found, depth = [""], 0
    for character in inside:
        depth += (character in "[(<") - (character in "])>")
        if character == "," and depth == 0:
            found.append("")
        else:
            found[-1] += character
    parts = [part.strip() for part in found if part.strip()]
    return [
        part.partition(":")[0] + (part[part.rindex(" = ") :].replace(" ", "") if " = " in part else "")
        for part in parts
    ]


def dump() -> dict[str, Any]:
    import torch  # noqa: F401  (the module links against it)
    import transformer_engine.pytorch  # noqa: F401
    import transformer_engine_torch as module

    members = {name: getattr(module, name) for name in sorted(dir(module)) if not name.startswith("_")}
    enums = {name: member.__members__ for name, member in members.items() if hasattr(member, "__members__")}
    classes = [name for name, member in members.items() if isinstance(member, type) and name not in enums]
    return {
        "version": version("transformer_engine"),
        "enums": {name: {key: int(value) for key, value in found.items()} for name, found in enums.items()},
        "classes": classes,
        "functions": {
            name: arguments(member.__doc__ or "")
            for name, member in members.items()
            if name not in enums and name not in classes and callable(member)
        },
    }


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(json.dumps(dump(), indent=1) + "\n")
