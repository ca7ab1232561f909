"""What the tests of conversions share: how they damage a model, and what is left after a refusal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_solopo.errors import UserError

WEIGHTS = "model.safetensors"
QUERY = "model.layers.1.self_attn.q_proj.weight"


def refusal(folder: Path, action: Callable[[], Any]) -> str:
    """The one line of error; nothing but what was there before is there afterwards."""
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(UserError) as error:
        action()
    assert sorted(path.name for path in folder.iterdir()) == before
    assert "\n" not in str(error.value)
    return str(error.value)


def change(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)


def change_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
