"""Weights that are not finite are refused on every rank, whichever rank reads them."""

import re
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

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


def on_two_ranks() -> dict[str, Any]:
    """What each rank says, although only the second one has read the numbers; and what two replicas load."""
    told: list[Any] = [tempfile.mkdtemp() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(told, src=0)
    folder = Path(told[0])
    with layout(**TP2) as groups:
        on_rank_0(lambda: make_poisoned(folder))
        found: dict[str, Any] = {kind: refusal(folder / kind, groups, **TP2) for kind in KINDS}
    with layout() as groups:
        on_rank_0(lambda: make_healthy(folder / "healthy"))
        found["replicas"] = {kind: loaded(folder / "healthy" / kind, groups) for kind in KINDS}
    return found


def make_healthy(folder: Path) -> None:
    make_model(folder / "hf", "qwen2_tied")
    import_model(folder / "hf", folder / "megatron", verification="none")


def loaded(path: Path, groups: Any) -> dict[str, Any]:
    """This replica's parameters, and how many numbers it has read from safetensors and from Megatron's files."""
    model = resolve_model(ModelConfig(path=path, dtype="float32"), ParallelConfig())
    chunks = build_model(model, chunk_tokens=8, device=groups.device)
    read, load = SafetensorsDirectory.read, dist_checkpointing.load
    numbers = [0]

    def counted(*arguments: Any) -> torch.Tensor:
        part = read(*arguments)
        numbers[0] += part.numel()
        return part

    def counted_load(state: Any, *arguments: Any, **keywords: Any) -> Any:
        numbers[0] += sum(each.data.numel() for one in state.values() for each in one.values())
        return load(state, *arguments, **keywords)

    with (
        mock.patch.object(SafetensorsDirectory, "read", counted),
        mock.patch.object(dist_checkpointing, "load", counted_load),
    ):
        load_weights(chunks, model.architecture, path)
    parameters = {name: value.detach().clone() for name, value in chunks[0].named_parameters()}
    return {"numbers": numbers[0], "parameters": parameters}


@pytest.mark.parametrize("kind", KINDS)
def test_replicas_read_each_number_once_and_hold_all(kind: str, tmp_path: Path) -> None:
    first, second = (rank["replicas"][kind] for rank in two_ranks(__name__))
    make_healthy(tmp_path)
    with layout() as groups:
        alone = loaded(tmp_path / kind, groups)
    assert first["numbers"] + second["numbers"] == alone["numbers"]
    assert 0.3 < first["numbers"] / alone["numbers"] < 0.7
    for name, value in alone["parameters"].items():
        assert torch.equal(value, first["parameters"][name]) and torch.equal(value, second["parameters"][name]), name


def test_every_rank_names_tensor_and_file() -> None:
    first, second = two_ranks(__name__)
    assert all(first[kind] == second[kind] for kind in KINDS)
    assert first["hf"].startswith(f"FOLDER/hf/{WEIGHTS}: {QUERY} is not finite (NaN or infinity)")
    tensor = "decoder.layers.1.self_attention.linear_qkv.weight"
    assert re.match(rf"FOLDER/megatron/__\d_0\.distcp: {re.escape(tensor)} is not finite", first["megatron"])
