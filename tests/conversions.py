"""What the tests of conversions share: they damage a model, check a refusal, and join tensor-parallel shards."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.checkpoint.mapping import Rule, huggingface_blocks
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


def join_shards(rule: Rule, architecture: ModelShape, shards: Sequence[Tensor]) -> dict[str, Tensor]:
    """Join the shards of all tensor-parallel ranks, and split them into Hugging Face tensors as an export does."""
    if rule.fusion == "gate_up":
        halves = [shard.chunk(2, dim=0) for shard in shards]
        full = torch.cat([half[part] for part in range(2) for half in halves])
    else:
        full = shards[0] if rule.shard_dim is None else torch.cat(list(shards), dim=rule.shard_dim)
    blocks: dict[str, list[Tensor]] = {name: [] for name in rule.huggingface}
    for name, _, block in huggingface_blocks(rule, architecture, lambda start, end: full[start:end], full.itemsize):
        blocks[name].append(block)
    return {name: torch.cat(parts) for name, parts in blocks.items()}
