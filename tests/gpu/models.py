"""Models wide enough for GPU kernels: heads of 64, every width a multiple of 128, as FP8 blocks need."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny_models import FAMILIES

VOCAB_SIZE = 1009  # prime
_WIDTHS = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
}
_EXPERT_WIDTHS = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128, "num_experts": 4}


def skip_without(recipe: str) -> None:
    if recipe == "mxfp8" and torch.cuda.get_device_capability()[0] != 10:
        pytest.skip("needs a Blackwell GPU")


def make_model(path: Path, family: str, seed: int, *, enlarged: float = 1.0) -> Path:
    """A random bfloat16 model of a family of `tests.tiny_models`. Returns `path`.

    Args:
        enlarged: factor of the values that enter the MLPs. Their last product takes its square back.
    """
    config = copy.deepcopy(FAMILIES[family])
    config.update(_WIDTHS | {name: width for name, width in _EXPERT_WIDTHS.items() if hasattr(config, name)})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(mean=1.0 if "norm" in name else 0.0, std=0.04)
            parameter.mul_(enlarged if "post_attention" in name else 1.0)
            parameter.div_(enlarged**2 if "down_proj" in name else 1.0)
    model.to(torch.bfloat16).save_pretrained(path)
    return path
