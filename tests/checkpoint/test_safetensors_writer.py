"""Files written tensor by tensor are what the safetensors library and transformers read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from megatron_solopo.checkpoint.huggingface_weights import SafetensorsDirectory, SafetensorsWriter, bitwise_equal
from tests.tiny_models import make_model

INDEX = "model.safetensors.index.json"
TENSORS = {
    "odd": torch.randn(3).bfloat16(),
    "wide": torch.randn(7, 5),
    "half": torch.randn(2, 2, 3).half(),
    "large": torch.randn(40, 10),
    "last": torch.randn(1).bfloat16(),
}


def write(path: Path, max_shard_bytes: int, names: list[str]) -> None:
    writer = SafetensorsWriter(path, {name: each.to("meta") for name, each in TENSORS.items()}, max_shard_bytes)
    for name in names:
        writer.write(name, TENSORS[name])
    writer.finish()


@pytest.mark.parametrize("max_shard_bytes", [10**9, 300, 1])
@pytest.mark.parametrize("names", [list(TENSORS), list(reversed(TENSORS))], ids=["in order", "reversed"])
def test_the_library_reads_what_was_written(max_shard_bytes: int, names: list[str], tmp_path: Path) -> None:
    write(tmp_path, max_shard_bytes, names)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == {10**9: 1, 300: 2, 1: 5}[max_shard_bytes]
    found = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert found.keys() == TENSORS.keys() and all(bitwise_equal(found[name], each) for name, each in TENSORS.items())
    with safe_open(files[0], framework="pt") as shard:
        assert shard.metadata() == {"format": "pt"}
    assert (tmp_path / INDEX).is_file() is (len(files) > 1)
    assert SafetensorsDirectory(tmp_path).entries.keys() == TENSORS.keys()


def test_the_index_says_where_every_tensor_is(tmp_path: Path) -> None:
    write(tmp_path, 300, list(TENSORS))
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(each.nbytes for each in TENSORS.values())
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / file)
    assert index["weight_map"].keys() == TENSORS.keys()


def test_transformers_loads_the_shards(tmp_path: Path) -> None:
    source = make_model(tmp_path / "source", "llama3")
    tensors = load_file(source / "model.safetensors")
    (tmp_path / "shards").mkdir()
    writer = SafetensorsWriter(tmp_path / "shards", {name: each.to("meta") for name, each in tensors.items()}, 20_000)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()
    shutil.copy(source / "config.json", tmp_path / "shards")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    assert all(torch.equal(parameter, tensors[name]) for name, parameter in model.named_parameters())


def test_a_tensor_that_was_forgotten_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="wide"):
        write(tmp_path, 300, [name for name in TENSORS if name != "wide"])
