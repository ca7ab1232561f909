"""What has no place for adapters is refused in one line, with the legal values."""

from pathlib import Path
from typing import Any

import pytest

from megatron_solopo.architecture.adapters import check_adapters
from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.config import parse_config
from megatron_solopo.errors import UserError
from tests.tiny_models import make_model

LORA: dict[str, Any] = {"rank": 4}
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "experts": (
        "qwen2_moe",
        {"lora": LORA},
        "lora.target_modules: gate_proj, up_proj, down_proj are parts of experts, which have no adapters; choose from "
        "q_proj, k_proj, v_proj, o_proj",
    ),
    "routers": (
        "qwen2_moe",
        {"lora": LORA | {"target_modules": ATTENTION}, "moe": {"router_trainable": True}},
        "moe.router_trainable=true: a run with lora trains adapters alone; set it to false",
    ),
    "no section": (
        "qwen2_tied",
        {"model": {"adapter": "somewhere"}},
        "model.adapter=somewhere: needs the section lora",
    ),
    "cut heads": (
        "qwen2_tied",
        {"lora": LORA | {"target_modules": ["q_proj"]}, "parallel": {"tensor_model_parallel_size": 4}},
        "q_proj, k_proj and v_proj need adapters together; name all three or none",
    ),
    "stage without layers": (
        "qwen2_tied",
        {
            "lora": LORA,
            "parallel": {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et*4|L"},
        },
        "a stage without layers has no adapters to train; give every stage a layer (t)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_in_one_line(name: str, tmp_path: Path) -> None:
    family, sections, part = REFUSED[name]
    path = make_model(tmp_path / "model", family)
    required = {
        "run_dir": "run",
        "data": {"path": "prepared", "max_tokens_per_pack": 100},
        "training": {"global_batch_size": 1, "max_steps": 1},
    }
    model = {"model": {"path": path} | sections.get("model", {})}
    config = parse_config(required | sections | model, source="test")
    with pytest.raises(UserError) as error:
        check_adapters(read_architecture(path), config)
    assert part in str(error.value) and "\n" not in str(error.value)


def test_attention_of_experts_may_have_adapters(tmp_path: Path) -> None:
    path = make_model(tmp_path / "model", "qwen2_moe")
    values = {
        "run_dir": "run",
        "model": {"path": path},
        "data": {"path": "prepared", "max_tokens_per_pack": 100},
        "training": {"global_batch_size": 1, "max_steps": 1},
        "lora": LORA | {"target_modules": ATTENTION},
    }
    check_adapters(read_architecture(path), parse_config(values, source="test"))
