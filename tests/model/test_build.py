"""A built model is the architecture that its config.json describes."""

from pathlib import Path

import pytest
import torch

from megatron_solopo.config import ModelConfig, ParallelConfig
from megatron_solopo.model.build import build_model
from megatron_solopo.model.resolve import resolve_model
from tests.ranks import layout
from tests.tiny_models import FAMILIES


@pytest.mark.parametrize("family", FAMILIES)
def test_a_built_model_has_the_architectures_parameters_and_rotation(family: str, tmp_path: Path) -> None:
    FAMILIES[family].save_pretrained(tmp_path)
    with layout() as groups:
        resolved = resolve_model(ModelConfig(path=tmp_path), ParallelConfig())
        (model,) = build_model(resolved, chunk_tokens=8, device=groups.device)
    architecture = resolved.architecture
    assert torch.equal(model.rotary_pos_emb.inv_freq, architecture.inv_freq)
    assert ("output_layer.weight" in dict(model.named_parameters())) is not architecture.tied_embeddings
    first = model.decoder.layers[0].self_attention
    assert first.core_attention.softmax_scale == architecture.softmax_scale
    assert (first.linear_qkv.bias is not None) is architecture.add_qkv_bias
    assert len(model.decoder.layers) == architecture.num_layers
