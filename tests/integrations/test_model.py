"""A GPTModel that someone else has built: what does not fit is refused by name, what fits gets the head."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel

from megatron_solopo.architecture.huggingface_config import Architecture, read_architecture
from megatron_solopo.config import ModelConfig, ParallelConfig
from megatron_solopo.errors import UserError
from megatron_solopo.integrations.task import check_transformer_config, prepare_model
from megatron_solopo.model.build import build_model, padded_vocab_size, transformer_config
from megatron_solopo.model.head import ResponseModel
from megatron_solopo.model.layers import layer_spec, layers_with_experts
from megatron_solopo.model.resolve import resolve_model
from tests.ranks import layout
from tests.tiny_models import make_model

YARN = {
    "rope_parameters": {"rope_type": "yarn", "factor": 1.0, "attention_factor": 1.2},
    "max_position_embeddings": 512,
}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model", "llama3")


@pytest.fixture(scope="module")
def architecture(path: Path) -> Architecture:
    return read_architecture(path)


def config(architecture: Architecture, **changes: Any) -> Any:
    settings = ModelConfig(path=Path("x"))
    built = transformer_config(resolve_model(settings, ParallelConfig(), architecture=architecture))
    for name, value in changes.items():
        setattr(built, name, value)
    return built


class ForkedGPTModel(GPTModel):
    """As a fork of Megatron-LM might have."""

    def their_own(self) -> int:
        return len(self.decoder.layers)


def plain_model(path: Path, architecture: Architecture, **changes: Any) -> ForkedGPTModel:
    settings = config(architecture, **changes)
    return ForkedGPTModel(
        settings,
        layer_spec(settings, transformer_engine=False, vp_stage=None),
        padded_vocab_size(architecture.vocab_size, 1),
        512,
        position_embedding_type="rope",
    )


def test_the_head_and_the_rotary_frequencies_are_those_of_our_own_model(path: Path, architecture: Architecture) -> None:
    with layout() as groups:
        theirs = plain_model(path, architecture, variable_seq_lengths=False)
        names = list(theirs.state_dict())
        prepare_model(theirs, architecture, chunk_tokens=7)
        resolved = resolve_model(ModelConfig(path=path), ParallelConfig())
        (ours,) = build_model(resolved, chunk_tokens=7, device=groups.device)
        assert list(theirs.state_dict()) == names == list(ours.state_dict())
        assert theirs._postprocess.__func__ is ours._postprocess.__func__  # type: ignore[attr-defined]
        assert (theirs.real_vocab_size, theirs.chunk_tokens) == (ours.real_vocab_size, ours.chunk_tokens)
        torch.testing.assert_close(theirs.rotary_pos_emb.inv_freq, architecture.inv_freq)
        assert theirs.config.variable_seq_lengths is True
        assert isinstance(theirs, ForkedGPTModel) and theirs.their_own() == 4
        prepare_model(ours, architecture, chunk_tokens=3)
        assert type(ours) is ResponseModel and ours.chunk_tokens == 3


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"num_layers": 5}, "num_layers is 4, expected 5"),
        ({"hidden_size": 64}, "hidden_size is 32, expected 64"),
        ({"num_query_groups": 4}, "num_query_groups is 2, expected 4"),
        ({"layernorm_epsilon": 1e-5}, "layernorm_epsilon is 1e-06, expected 1e-05"),
        ({"rotary_fields": YARN}, "softmax_scale is 0.35"),
        ({"tied_embeddings": True}, "share_embeddings_and_output_weights is False, expected True"),
        ({"add_qkv_bias": True, "qk_layernorm": True}, "add_qkv_bias is False, expected True; qk_layernorm is False"),
        ({"vocab_size": 1000}, "vocab_size is 256, expected 1000"),
    ],
)
def test_another_model_than_that_of_config_json_is_refused(
    path: Path, architecture: Architecture, changes: dict[str, Any], part: str
) -> None:
    with layout():
        model = plain_model(path, architecture)
        with pytest.raises(UserError) as error:
            prepare_model(model, replace(architecture, **changes), chunk_tokens=7)
    assert part in str(error.value) and "\n" not in str(error.value)
    assert type(model) is ForkedGPTModel


def test_no_gpt_model_and_a_wrapped_one_are_refused(architecture: Architecture) -> None:
    with pytest.raises(UserError, match="the model is a Linear; expected a GPTModel"):
        prepare_model(torch.nn.Linear(2, 2), architecture, chunk_tokens=7)


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("calculate_per_token_loss", False, "calculate_per_token_loss is False, expected True"),
        ("hidden_dropout", 0.1, "hidden_dropout is 0.1, expected 0.0"),
        ("attention_dropout", 0.1, "attention_dropout is 0.1, expected 0.0"),
        ("fp16", True, "fp16 is True, expected False"),
        ("mtp_num_layers", 1, "mtp_num_layers is 1, expected None"),
        ("defer_embedding_wgrad_compute", True, "defer_embedding_wgrad_compute is True, expected False"),
        ("tp_comm_overlap", True, "tp_comm_overlap is True, expected False"),
        ("cuda_graph_impl", "local", "cuda_graph_impl is 'local', expected 'none'"),
        ("virtual_pipeline_model_parallel_size", 2, "overlap_p2p_comm is False, expected True; batch_p2p_comm is True"),
    ],
)
def test_a_configuration_that_packs_do_not_go_with_is_refused(
    architecture: Architecture, name: str, value: Any, part: str
) -> None:
    check_transformer_config(config(architecture))
    with pytest.raises(UserError) as error:
        check_transformer_config(config(architecture, **{name: value}))
    assert part in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def of_experts(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    """Layers 0 and 3 of 4 are dense."""
    return read_architecture(make_model(tmp_path_factory.mktemp("experts") / "model", "qwen2_moe"))


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("moe_token_dispatcher_type", "allgather", "moe_token_dispatcher_type is 'allgather', expected 'alltoall'"),
        ("moe_router_dtype", None, "moe_router_dtype is None, expected 'fp32'"),
        ("moe_expert_capacity_factor", 1.0, "moe_expert_capacity_factor is 1.0, expected None"),
        ("moe_router_load_balancing_type", "sinkhorn", "moe_router_load_balancing_type is 'sinkhorn', expected 'none'"),
        ("moe_aux_loss_coeff", 0.01, "moe_aux_loss_coeff is 0.01, expected 0.0"),
        ("moe_aux_loss_coeff", [0.0, 0.01], "moe_aux_loss_coeff is [0.0, 0.01], expected 0.0"),
        ("moe_z_loss_coeff", 0.001, "moe_z_loss_coeff is 0.001, expected None"),
        ("tensor_model_parallel_size", 2, "sequence_parallel is False, expected True"),
    ],
)
def test_settings_that_change_routes_or_losses_are_refused(
    of_experts: Architecture, name: str, value: Any, part: str
) -> None:
    check_transformer_config(config(of_experts, moe_router_load_balancing_type="aux_loss"))
    with pytest.raises(UserError) as error:
        check_transformer_config(config(of_experts, **{name: value}))
    assert part in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"topk": 3}, "moe_router_topk is 2, expected 3"),
        ({"renormalizes": True}, "moe_router_pre_softmax is True, expected False"),
        (
            {"shared_ffn_hidden_size": 0},
            "moe_shared_expert_intermediate_size is 16, expected 0; moe_shared_expert_gate",
        ),
        ({"layers": (True, False, True, False)}, "moe_layer_freq is [False, True, True, False], expected [True, False"),
    ],
)
def test_other_experts_than_those_of_config_json_are_refused(
    of_experts: Architecture, changes: dict[str, Any], part: str
) -> None:
    assert of_experts.experts is not None
    with layout():
        theirs = plain_model(Path("x"), of_experts)
        with pytest.raises(UserError) as error:
            prepare_model(theirs, replace(of_experts, experts=replace(of_experts.experts, **changes)), chunk_tokens=7)
        assert part in str(error.value) and "\n" not in str(error.value)
        with pytest.raises(UserError, match="num_moe_experts is 16, expected None"):
            prepare_model(theirs, replace(of_experts, experts=None), chunk_tokens=7)
        prepare_model(theirs, of_experts, chunk_tokens=7)


def test_a_frequency_of_layers_is_megatrons(of_experts: Architecture) -> None:
    """Every second layer, from the first on, as `--moe-layer-freq 2` says."""
    assert layers_with_experts(config(of_experts, moe_layer_freq=2)) == [True, False, True, False]
