"""Directories whose weights two loaders read differently are refused; what all loaders read alike is read."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.architecture.one_reading import INDEX, SINGLE, read_index
from megatron_solopo.checkpoint.conversion import import_model, verify_models
from megatron_solopo.checkpoint.huggingface_weights import SafetensorsDirectory
from megatron_solopo.errors import UserError
from megatron_solopo.generate.transformers import load_transformers_model
from tests.conversions import QUERY
from tests.tiny_models import make_model

SHARDS = [f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)]


def copy_weights(folder: Path, name: str, factor: float = 2.0) -> None:
    tensors = {key: tensor * factor for key, tensor in load_file(folder / SINGLE).items()}
    save_file(tensors, folder / name, {"format": "pt"})


def write_index(folder: Path, *, shards: bool = True, whole: bool = True) -> None:
    tensors = load_file(folder / SINGLE)
    halves = dict(zip(SHARDS, (sorted(tensors)[::2], sorted(tensors)[1::2]), strict=True))
    for shard, names in halves.items() if shards else ():
        save_file({name: tensors[name] for name in names}, folder / shard, {"format": "pt"})
    places = {name: shard for shard, names in halves.items() for name in names}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    if not whole:
        (folder / SINGLE).unlink()


def left_over_shard(folder: Path) -> None:
    copy_weights(folder, "model-00001-of-00003.safetensors")
    write_index(folder, whole=False)


REFUSED: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "a whole file beside shards": (write_index, [INDEX, SINGLE, SHARDS[0], "transformers reads model.safetensors"]),
    "a whole file beside absent shards": (lambda folder: write_index(folder, shards=False), [INDEX, SINGLE]),
    "shards of two saves": (left_over_shard, ["model-00001-of-00003.safetensors", "llama.cpp"]),
    "another file without an index": (lambda folder: copy_weights(folder, "more.safetensors"), ["more.", "vLLM"]),
    "Mistral's own form": (lambda folder: copy_weights(folder, "consolidated.safetensors"), ["consolidated", "vLLM"]),
    "an adapter": (lambda folder: copy_weights(folder, "adapter_model.safetensors"), ["adapter_model", "peft"]),
    "an adapter in pickle": (lambda folder: (folder / "adapter_model.bin").write_bytes(b"x"), ["adapter_model.bin"]),
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and its import."""
    folder = tmp_path_factory.mktemp("world")
    import_model(make_model(folder / "hf", "qwen2_tied"), folder / "megatron", verification="none")
    return folder


@pytest.fixture
def folder(imported: Path, tmp_path: Path) -> Path:
    """Copies to be damaged."""
    return Path(shutil.copytree(imported, tmp_path / "copy"))


@pytest.mark.parametrize("situation", REFUSED)
def test_two_readings_are_refused_with_both_readers(situation: str, folder: Path) -> None:
    damage, words = REFUSED[situation]
    damage(folder / "hf")
    for read in (SafetensorsDirectory, load_transformers_model):
        with pytest.raises(UserError) as error:
            read(folder / "hf")
        message = str(error.value)
        assert message.startswith(f"{folder / 'hf'}: holds ") and "\n" not in message
        assert all(word in message for word in words), message


def test_a_tensor_that_is_twice_in_the_index_is_refused(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text('{"weight_map": {"norm": "a.safetensors", "norm": "b.safetensors"}}')
    with pytest.raises(UserError, match=r"index\.json: not valid JSON: the key 'norm' is there twice"):
        read_index(tmp_path)


def test_quantization_that_only_vllm_reads_is_refused(folder: Path) -> None:
    (folder / "hf" / "hf_quant_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"hf_quant_config\.json: vLLM takes the weights for quantized"):
        read_architecture(folder / "hf")


def test_transformers_reads_the_whole_file_and_not_the_index(folder: Path) -> None:
    """The reason for the first refusal: vLLM reads the shards."""
    copy_weights(folder / "hf", "other")
    write_index(folder / "hf")
    (folder / "hf" / "other").rename(folder / "hf" / SINGLE)
    theirs = AutoModelForCausalLM.from_pretrained(folder / "hf").state_dict()[QUERY]
    sharded = load_file(folder / "hf" / SHARDS[0]) | load_file(folder / "hf" / SHARDS[1])
    assert torch.equal(theirs, 2 * sharded[QUERY])


def index_of_one_file(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": dict.fromkeys(load_file(folder / SINGLE), SINGLE)}))


READ: dict[str, Callable[[Path], object]] = {
    "pickled weights, which no loader prefers": lambda folder: torch.save({}, folder / "pytorch_model.bin"),
    "an index of the whole file": index_of_one_file,
    "shards": lambda folder: write_index(folder, whole=False),
    "a configuration of an adapter that is not there": lambda folder: (folder / "adapter_config.json").write_text("{}"),
}


@pytest.mark.parametrize("situation", READ)
def test_what_all_loaders_read_alike_is_read(situation: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = SafetensorsDirectory(folder / "hf").read(QUERY)
    READ[situation](folder / "hf")
    assert torch.equal(SafetensorsDirectory(folder / "hf").read(QUERY), expected)
    # Where peft is installed, transformers asks for the adapter and fails. Elsewhere it reads the weights.
    for module in ("integrations.peft", "models.auto.auto_factory"):
        monkeypatch.setattr(f"transformers.{module}.is_peft_available", lambda: False)
    assert torch.equal(AutoModelForCausalLM.from_pretrained(folder / "hf").state_dict()[QUERY], expected)


def test_a_megatron_checkpoint_among_hugging_face_files_is_refused(folder: Path) -> None:
    shutil.copytree(folder / "megatron", folder / "hf", dirs_exist_ok=True)
    for action in (
        lambda: read_architecture(folder / "hf"),
        lambda: import_model(folder / "hf", folder / "out", verification="none"),
        lambda: verify_models(folder / "hf", folder / "megatron", logits=False),
    ):
        with pytest.raises(UserError, match=r"holds a Megatron checkpoint .* and a Hugging Face model"):
            action()
