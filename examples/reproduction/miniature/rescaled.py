"""Models that compute what a base computes, with other weights: FP8 rounds each of them in its own way."""

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from megatron_solopo.files import atomic_path

_INTO = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
"""The norms of a layer, and the matrices that read what they write."""


def write_rescaled(base: Path, target: Path, seed: int) -> None:
    """Write a Hugging Face directory whose model is that of `base`, up to rounding in float32."""
    with atomic_path(target) as temporary:
        shutil.copytree(base, temporary)
        weights = rescale(load_file(base / "model.safetensors"), LlamaConfig.from_pretrained(base), seed)
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})


def rescale(weights: dict[str, Tensor], config: LlamaConfig, seed: int) -> dict[str, Tensor]:
    """Multiply what goes into each intermediate value, and divide what comes out of it. Factors are 0.7 to 1.4.

    A factor for each feature of a norm, of the values and of the MLP, and one for queries against keys.
    """
    generator = torch.Generator().manual_seed(seed)
    found = {name: weight.clone() for name, weight in weights.items()}
    groups = config.num_attention_heads // config.num_key_value_heads
    for layer in range(config.num_hidden_layers):
        of = {name.removeprefix(f"model.layers.{layer}."): weight for name, weight in found.items()}

        def factors(count: int) -> Tensor:
            return torch.exp2(torch.rand(count, generator=generator) - 0.5)

        for norm, matrices in _INTO.items():
            scale = factors(config.hidden_size)
            of[f"{norm}.weight"] *= scale
            for matrix in matrices:
                of[f"{matrix}.weight"] /= scale
        scale = factors(1)
        of["self_attn.q_proj.weight"] *= scale
        of["self_attn.k_proj.weight"] /= scale
        scale_KD = factors(len(of["self_attn.v_proj.weight"])).view(config.num_key_value_heads, -1)
        of["self_attn.v_proj.weight"] *= scale_KD.view(-1, 1)
        of["self_attn.o_proj.weight"] /= scale_KD.repeat_interleave(groups, 0).flatten()
        scale = factors(config.intermediate_size)
        of["mlp.up_proj.weight"] *= scale[:, None]
        of["mlp.down_proj.weight"] /= scale
    return found
