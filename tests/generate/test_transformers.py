"""A Hugging Face directory as a model: what counts as a broken directory, and what does not."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from megatron_solopo.errors import UserError
from megatron_solopo.generate.transformers import load_transformers_model
from tests.tiny_models import make_model

WEIGHTS, CONFIG = "model.safetensors", "config.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "tiny"
    make_model(path, "qwen3")
    return path


def cut_weights(path: Path) -> None:
    (path / WEIGHTS).write_bytes((path / WEIGHTS).read_bytes()[:-1000])


def remove_a_tensor(path: Path) -> None:
    tensors = load_file(path / WEIGHTS)
    del tensors["model.norm.weight"]
    save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


def set_field(name: str, value: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        config = json.loads((path / CONFIG).read_text())
        (path / CONFIG).write_text(json.dumps(config | {name: value}))

    return change


@pytest.mark.parametrize(
    "damage",
    [
        cut_weights,
        remove_a_tensor,
        lambda path: (path / WEIGHTS).unlink(),
        lambda path: (path / CONFIG).unlink(),
        lambda path: (path / CONFIG).write_text("{"),
        set_field("model_type", "made_up"),
        set_field("intermediate_size", 8),
        set_field("hidden_size", "wide"),
    ],
    ids=["cut", "tensor", "no weights", "no config", "no JSON", "type", "shape", "field"],
)
def test_a_broken_directory_is_one_line(model: Path, damage: Callable[[Path], None], tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    damage(broken)
    with pytest.raises(UserError, match=r"--model .*broken: no loadable model: ") as error:
        load_transformers_model(broken)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("fault", [KeyError("rope"), AttributeError("x"), RuntimeError("CUDA error: out of memory")])
def test_any_other_fault_keeps_its_type(model: Path, fault: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: object, **named: object) -> None:
        raise fault

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", fail)
    with pytest.raises(type(fault)) as error:
        load_transformers_model(model)
    assert error.value is fault and not isinstance(error.value, UserError)


def test_weights_have_the_dtype_that_is_asked_for(model: Path) -> None:
    for name in ("bfloat16", "float32"):
        loaded = load_transformers_model(model, name)
        assert {each.dtype for each in loaded.parameters()} == {getattr(torch, name)} and not loaded.training
