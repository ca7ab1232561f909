"""Weights that are not finite are refused on every rank, whichever rank reads them."""

import re
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_solopo.checkpoint.conversion import SafetensorsDirectory, import_model
from megatron_solopo.checkpoint.load import load_weights
from megatron_solopo.config import ModelConfig, ParallelConfig
from megatron_solopo.errors import UserError
from megatron_solopo.model.build import build_model
from megatron_solopo.model.resolve import resolve_model
from megatron_solopo.parallel.agreement import on_rank_0
from tests.conversions import QUERY, WEIGHTS, change
from tests.ranks import layout, two_ranks
from tests.tiny_models import make_model

KINDS = ("hf", "megatron")
TP2 = {"tensor_model_parallel_size": 2}
# The last row of the query's weights belongs to the second rank.
LAST_ROW = 31


def make_poisoned(folder: Path) -> None:
    make_model(folder / "hf", "qwen2_tied")
    change(folder / "hf" / WEIGHTS, lambda tensors: tensors[QUERY][LAST_ROW].fill_(torch.nan))
    with mock.patch.object(SafetensorsDirectory, "read_finite", SafetensorsDirectory.read):
        import_model(folder / "hf", folder / "megatron", verification="none")


def refusal(path: Path, groups: Any, **sizes: int) -> str:
    model = resolve_model(ModelConfig(path=path), ParallelConfig(**sizes))
    chunks = build_model(model, chunk_tokens=8, device=groups.device)
    with pytest.raises(UserError) as error:
        load_weights(chunks, model.architecture, path)
    return str(error.value).replace(str(path.parent), "FOLDER")


def on_two_ranks() -> dict[str, str]:
    """What each rank says, although only the second one has read the numbers."""
    told: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told, src=0)
    folder = Path(told[0])
    with layout(**TP2) as groups:
        on_rank_0(lambda: make_poisoned(folder))
        return {kind: refusal(folder / kind, groups, **TP2) for kind in KINDS}


def test_every_rank_names_tensor_and_file() -> None:
    first, second = two_ranks(__name__)
    assert first == second
    assert first["hf"].startswith(f"FOLDER/hf/{WEIGHTS}: {QUERY} is not finite (NaN or infinity)")
    tensor = "decoder.layers.1.self_attention.linear_qkv.weight"
    assert re.match(rf"FOLDER/megatron/__\d_0\.distcp: {re.escape(tensor)} is not finite", first["megatron"])
