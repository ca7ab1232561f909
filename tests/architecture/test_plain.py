"""A plain config.json is read without transformers, to the same shape; any other as transformers reads it."""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from megatron_solopo.architecture import huggingface_config
from megatron_solopo.architecture.huggingface_config import ModelShape, read_architecture
from megatron_solopo.architecture.plain import read_shape
from megatron_solopo.errors import UserError
from tests.architecture.test_huggingface_config import REFUSED, write
from tests.tiny_models import FAMILIES

MODELS = Path(__file__).resolve().parents[2] / "examples" / "plans" / "models"
SCALED = {"llama_linear", "qwen2_yarn"}
# Fields as the models' authors published them, with what transformers does not need.
PUBLISHED: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 2, "torch_dtype": "bfloat16"},
    "qwen3": {"attention_bias": False, "rope_scaling": None, "rope_theta": 1000000, "max_window_layers": 4},
    "mistral": {"sliding_window": None, "rope_theta": 1e6, "head_dim": None},
    "llama3": {"rope_theta": 5e5, "pretraining_tp": 1, "mlp_bias": False},
}


def shape_of(found: ModelShape) -> dict[str, Any]:
    return {field.name: getattr(found, field.name) for field in fields(ModelShape)}


def assert_same(folder: Path, *, plain: bool) -> None:
    expected = shape_of(read_architecture(folder))
    with mock.patch.object(huggingface_config, "read_architecture", wraps=read_architecture) as slow:
        assert shape_of(read_shape(folder)) == expected
    assert slow.called is not plain


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shape_is_transformers(family: str, tmp_path: Path) -> None:
    assert_same(write(tmp_path, family, {}), plain=family not in SCALED)


@pytest.mark.parametrize("family", PUBLISHED)
def test_published_fields_are_plain(family: str, tmp_path: Path) -> None:
    assert_same(write(tmp_path, family, PUBLISHED[family]), plain=True)


@pytest.mark.parametrize("folder", sorted(MODELS.iterdir()), ids=lambda folder: folder.name)
def test_kept_models_are_plain(folder: Path) -> None:
    assert_same(folder, plain=True)


@pytest.mark.parametrize(
    ("family", "missing"),
    [
        ("llama2", "num_key_value_heads"),
        ("llama2", "tie_word_embeddings"),
        ("llama2", "hidden_act"),
        ("qwen3", "head_dim"),
    ],
)
def test_what_is_left_to_a_default_is_transformers_default(family: str, missing: str, tmp_path: Path) -> None:
    file = write(tmp_path, family, {}) / "config.json"
    stated = json.loads(file.read_text())
    del stated[missing]
    file.write_text(json.dumps(stated))
    assert_same(tmp_path, plain=False)


@pytest.mark.parametrize(("family", "changes", "words"), REFUSED)
def test_what_training_refuses_is_refused(family: str, changes: dict, words: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read_shape(write(tmp_path, family, changes))
    assert all(word in str(error.value) for word in words)


def test_a_window_that_is_on_unless_stated_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path, "mistral", {}) / "config.json"
    stated = json.loads(file.read_text())
    del stated["sliding_window"]
    file.write_text(json.dumps(stated))
    with pytest.raises(UserError, match="sliding_window=4096 is not supported"):
        read_shape(tmp_path)


def test_a_missing_file_has_its_reason(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file; a model is a Hugging Face directory"):
        read_shape(tmp_path)
