"""Hugging Face weights: read whole or in shards, refused by name if damaged, written so that other libraries read."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_solopo import checksums
from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.checkpoint.fingerprint import weights_fingerprint
from megatron_solopo.checkpoint.huggingface_weights import INDEX, SafetensorsDirectory, SafetensorsWriter, bitwise_equal
from megatron_solopo.checkpoint.load import load_weights
from megatron_solopo.checkpoint.model_files import read_model_files
from megatron_solopo.config import ModelConfig, ParallelConfig
from megatron_solopo.errors import UserError
from megatron_solopo.model.build import build_model
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.model.resolve import resolve_model
from tests.conversions import QUERY, WEIGHTS, change
from tests.ranks import layout
from tests.tiny_models import make_model

GATE, UP = (f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up"))
KEY = "model.layers.1.self_attn.k_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("source"), "llama3")


@pytest.fixture(scope="module")
def model(source: Path) -> Iterator[ResponseModel]:
    """Built once; each test loads into it again."""
    with layout() as groups:
        (chunk,) = build_model(
            resolve_model(ModelConfig(path=source), ParallelConfig()),
            chunk_tokens=8,
            device=groups.device,
        )
        yield chunk


@pytest.fixture
def folder(source: Path, tmp_path: Path) -> Path:
    """A copy of the source to be damaged."""
    return Path(shutil.copytree(source, tmp_path / "model"))


def load(model: ResponseModel, path: Path) -> dict[str, Tensor]:
    """The parameters after loading `path` over NaNs."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    load_weights([model], read_architecture(path), path)
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def shard(path: Path) -> dict[str, str]:
    """Save the model of `path` again in many files; returns the index's weight map."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    (path / WEIGHTS).unlink()
    model.save_pretrained(path, max_shard_size="20KB")
    weight_map: dict[str, str] = json.loads((path / INDEX).read_text())["weight_map"]
    assert len(set(weight_map.values())) > 3
    return weight_map


def refusal(model: ResponseModel, path: Path) -> str:
    with pytest.raises(UserError) as error:
        load(model, path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


def test_shards_load_the_same(model: ResponseModel, source: Path, folder: Path) -> None:
    shard(folder)
    whole, sharded = load(model, source), load(model, folder)
    assert whole.keys() == sharded.keys()
    for name, value in whole.items():
        assert bool(value.isfinite().all()) and torch.equal(sharded[name], value), name


def test_a_stored_rotary_buffer_is_ignored(model: ResponseModel, source: Path, folder: Path) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    change(folder / WEIGHTS, lambda tensors: tensors.update(extra))
    found = load(model, folder)
    assert all(torch.equal(found[name], value) for name, value in load(model, source).items())


def test_weights_are_cast_to_the_models_precision(model: ResponseModel, source: Path, folder: Path) -> None:
    change(folder / WEIGHTS, lambda tensors: tensors.update({n: t.bfloat16() for n, t in tensors.items()}))
    found = load(model, folder)
    for name, value in load(model, source).items():
        assert torch.equal(found[name], value.bfloat16().float()), name


def resize(rows: dict[str, int]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: torch.ones(count, 32) for name, count in rows.items()})


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda tensors: tensors.pop(UP), ["1 missing tensor for", "llama model with 4 layers", UP]),
        (lambda tensors: tensors.pop("lm_head.weight"), ["1 missing tensor for", "lm_head.weight"]),
        (lambda tensors: tensors.update({"extra.bias": torch.ones(1)}), ["1 unexpected tensor for", "extra.bias"]),
        (
            lambda tensors: [tensors.pop(name) for name in list(tensors) if ".layers.3." in name],
            ["9 missing tensors", "model.layers.3.", ", ..."],
        ),
        (resize({"model.layers.0.self_attn.o_proj.weight": 31}), ["o_proj", "(31, 32)", "(32, 32)"]),
        (resize({KEY: 15}), [KEY, "(15, 32)", "(16, 32)"]),
        # Fused, these would have the right shape.
        (resize({GATE: 40, UP: 56}), [GATE, "(40, 32)", "(48, 32)"]),
        (resize({QUERY: 40, KEY: 8}), [QUERY, "(40, 32)", "(32, 32)"]),
        # Padded or cut to the padded vocabulary, so would these.
        (resize({EMBEDDING: 140}), [EMBEDDING, "(140, 32)", "(131, 32)"]),
        (resize({EMBEDDING: 300}), [EMBEDDING, "(300, 32)", "(131, 32)"]),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.tensor(1.0)}),
            ["model.norm.weight", "()", "(32,)"],
        ),
    ],
)
def test_other_tensors_than_the_configs_are_refused(model, folder, edit, words) -> None:
    change(folder / WEIGHTS, edit)
    message = refusal(model, folder)
    assert all(word in message for word in words), message
    if " for a llama model" in message:
        assert all(bool(parameter.isnan().all()) for parameter in model.parameters()), "nothing is touched"


def test_a_directory_without_weights_is_refused(model: ResponseModel, folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")
    message = refusal(model, folder)
    assert all(word in message for word in (WEIGHTS, INDEX, "must be safetensors", "safe_serialization=True"))


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
def test_a_truncated_file_is_refused(model: ResponseModel, folder: Path, kept: float) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    assert f"{folder / WEIGHTS}: cannot be read" in refusal(model, folder)


def test_a_truncated_shard_is_refused_before_anything_is_touched(model: ResponseModel, folder: Path) -> None:
    last = sorted(set(shard(folder).values()))[-1]
    (folder / last).write_bytes((folder / last).read_bytes()[:-1])
    assert f"{folder / last}: cannot be read" in refusal(model, folder)
    assert all(bool(parameter.isnan().all()) for parameter in model.parameters())


def test_a_missing_shard_is_refused_before_anything_is_touched(model: ResponseModel, folder: Path) -> None:
    last = sorted(set(shard(folder).values()))[-1]
    (folder / last).unlink()
    assert f"{folder / last}: cannot be read" in refusal(model, folder)
    assert all(bool(parameter.isnan().all()) for parameter in model.parameters())


def test_a_shard_without_a_tensor_that_the_index_promises_is_refused(model: ResponseModel, folder: Path) -> None:
    holder = shard(folder)[UP]
    change(folder / holder, lambda tensors: tensors.pop(UP))
    assert (
        refusal(model, folder)
        == f"{folder / INDEX}: names {holder} as the file of {UP}, but that file does not hold it"
    )


@pytest.mark.parametrize("text", ["{ nope", "", "[]", "null", "{}", '{"weight_map": []}'])
def test_a_broken_index_is_refused(model: ResponseModel, folder: Path, text: str) -> None:
    (folder / INDEX).write_text(text)
    assert refusal(model, folder).startswith(f"{folder / INDEX}: ")


def test_an_index_that_names_no_file_is_refused(model: ResponseModel, folder: Path) -> None:
    (folder / INDEX).write_text('{"weight_map": {"a": 1}}')
    assert f"{folder / INDEX}: weight_map.a=1: " in refusal(model, folder)


def test_the_fingerprint_is_the_models_wherever_it_lies(source: Path, folder: Path) -> None:
    assert weights_fingerprint(folder) == weights_fingerprint(source)


def change_last(path: Path, name: str) -> None:
    """Another last number of a tensor."""
    change(path, lambda tensors: tensors[name].view(-1)[-1].add_(1e-3))


def test_the_fingerprint_changes_with_any_tensor(source: Path, folder: Path) -> None:
    names = sorted(load_file(folder / WEIGHTS))
    prints = {weights_fingerprint(source)}
    for name in names:
        change_last(folder / WEIGHTS, name)
        prints.add(weights_fingerprint(folder))
    assert len(prints) == len(names) + 1


def test_the_fingerprint_changes_with_shape_and_precision(source: Path, folder: Path) -> None:
    prints = {weights_fingerprint(source)}
    for edit in (lambda tensor: tensor.flatten(), lambda tensor: tensor.bfloat16()):
        change(folder / WEIGHTS, lambda tensors, edit=edit: tensors.update({UP: edit(tensors[UP]).contiguous()}))
        prints.add(weights_fingerprint(folder))
    assert len(prints) == 3


def test_the_fingerprint_changes_with_the_config(source: Path, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    assert weights_fingerprint(folder) != weights_fingerprint(source)


def test_the_fingerprint_covers_every_shard(folder: Path) -> None:
    prints = {weights_fingerprint(folder)}
    files = sorted(set(shard(folder).values()))
    prints.add(weights_fingerprint(folder))
    for file in files:
        change_last(folder / file, next(iter(load_file(folder / file))))
        prints.add(weights_fingerprint(folder))
    assert len(prints) == len(files) + 2


def test_the_file_of_checksums_is_no_file_of_the_model(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksums, "_SETTLED_NS", 0)
    before, files = weights_fingerprint(folder), read_model_files(folder)
    assert (folder / checksums.CHECKSUMS_FILE).is_file()
    assert weights_fingerprint(folder) == before and read_model_files(folder) == files


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("offset", range(5))
@pytest.mark.parametrize("length", [1, 2, 3, 4, 8, 33])
def test_every_bit_counts_wherever_a_tensor_lies(length: int, offset: int, dtype: torch.dtype) -> None:
    one, other = torch.randn(40).to(dtype), torch.zeros(40, dtype=dtype)
    one, other = one[offset : offset + length], other[7 : 7 + length].copy_(one[offset : offset + length])
    assert bitwise_equal(one, other)
    for position in range(length):
        changed = other.clone()
        changed.view({2: torch.int16, 4: torch.int32}[dtype.itemsize])[position] ^= 1
        assert not bitwise_equal(one, changed)


def test_bits_are_compared_not_numbers() -> None:
    nan = torch.tensor([float("nan")])
    assert bitwise_equal(nan, nan.clone()) and not bitwise_equal(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not bitwise_equal(torch.zeros(2), torch.zeros(1, 2)) and not bitwise_equal(nan, nan.bfloat16())


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


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral"])
def test_experts_in_one_tensor_are_read_as_single_ones(family: str, tmp_path: Path) -> None:
    """transformers 5 holds them so in memory, and publishes single ones."""
    single, fused = make_model(tmp_path / "single", family), tmp_path / "fused"
    shutil.copytree(single, fused)
    model = AutoModelForCausalLM.from_pretrained(single, dtype=torch.float32)
    save_file({name: each.contiguous() for name, each in model.named_parameters()}, fused / "model.safetensors")
    one, other = SafetensorsDirectory(single), SafetensorsDirectory(fused)
    other.check(read_architecture(fused))
    assert len(load_file(fused / "model.safetensors")) < len(other.entries) == len(one.entries)
    for name in one.entries:
        assert torch.equal(other.read(name), one.read(name)), name
        assert torch.equal(other.read(name, (slice(1, 3),)), one.read(name, (slice(1, 3),))), name
    gate = next(name for name in one.entries if name.endswith(("experts.3.up_proj.weight", "experts.3.w3.weight")))
    columns = (slice(5, 9), slice(2, 7))
    assert torch.equal(other.read(gate, columns), one.read(gate, columns))
