"""FP8: what is refused, and why."""

import sys
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import megatron.core
import pytest
from megatron.core.transformer.moe import fused_a2a
from packaging.version import Version

from megatron_solopo.architecture.experts import ExpertShape
from megatron_solopo.architecture.huggingface_config import Architecture, read_architecture
from megatron_solopo.config import Config, ModelConfig, OptimizerConfig, ParallelConfig, parse_config
from megatron_solopo.errors import UserError
from megatron_solopo.model import resolve
from megatron_solopo.model.build import precision_settings, transformer_config
from megatron_solopo.model.resolve import ResolvedModel, check_precision
from tests.tiny_models import FAMILIES

FP8 = {"fp8": "hybrid", "dtype": "bfloat16"}
AVAILABILITY = ("is_fp8_available", "is_fp8_block_scaling_available", "is_mxfp8_available")


@pytest.fixture(scope="module")
def architecture(tmp_path_factory: pytest.TempPathFactory) -> Architecture:
    """Widths that every recipe takes at TP 1."""
    path = tmp_path_factory.mktemp("model")
    FAMILIES["llama3"].save_pretrained(path)
    wide = {"hidden_size": 512, "ffn_hidden_size": 1536, "num_attention_heads": 8, "num_query_groups": 4}
    return replace(read_architecture(path), **wide, head_dim=64)


def settings(**values: Any) -> ModelConfig:
    return ModelConfig.model_validate({"path": "model", **values})


def check(
    architecture: Architecture, model: ModelConfig, optimizer: Any = None, *, has_gpu: bool = False, **parallel: Any
) -> None:
    """`has_gpu`: as on a machine with Transformer Engine and CUDA."""
    resolved = ResolvedModel(model, ParallelConfig(**parallel), architecture, uses_transformer_engine=has_gpu)
    check_precision(resolved, optimizer or OptimizerConfig())


def pretend(monkeypatch: pytest.MonkeyPatch, **answers: str | None) -> None:
    """A machine with a GPU whose Transformer Engine gives these answers: a reason, or "" for yes; None: too old."""

    def answer(reason: str) -> Any:
        return lambda return_reason: (not reason, reason)

    functions = {name: answer(answers.get(name, "")) for name in AVAILABILITY if answers.get(name, "") is not None}
    monkeypatch.setitem(sys.modules, "transformer_engine", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", SimpleNamespace(**functions))


def on_transformer_engine(architecture, parallel, monkeypatch, version: str = "2.17.1") -> resolve.ResolvedModel:
    monkeypatch.setattr(resolve, "uses_transformer_engine", lambda settings: True)
    monkeypatch.setattr(resolve, "get_te_version", lambda: Version(version))
    return resolve.resolve_model(settings(), parallel, architecture=architecture)


def run(share_prompts: bool, **sections: Any) -> Config:
    data = {"path": "prepared", "max_tokens_per_pack": 100, "share_prompts": share_prompts}
    training = {"global_batch_size": 1, "max_steps": 1}
    return parse_config(
        {"run_dir": "run", "model": {"path": "model"}, "data": data, "training": training, **sections}, ""
    )


@pytest.mark.parametrize(("version", "accepted"), [("2.17.1", False), ("2.18.0", True)])
def test_packs_are_exchanged_by_heads_and_in_a_ring_since_2_18(architecture, monkeypatch, version, accepted) -> None:
    exchange = {"cp_comm_type": "a2a+p2p", "hierarchical_context_parallel_sizes": [2, 2]}
    parallel = ParallelConfig(context_parallel_size=4, **exchange)
    model = on_transformer_engine(architecture, parallel, monkeypatch, version)
    if accepted:
        resolve.check_attention(model, run(False))
        return
    with pytest.raises(UserError, match=r"a2a\+p2p needs transformer-engine 2\.18 or newer.*2\.17\.1 is installed"):
        resolve.check_attention(model, run(False))


def test_heads_count_only_where_attention_exchanges_them(architecture, monkeypatch) -> None:
    """Attention gathers the keys of shared prompts itself, and plain layers gather all keys."""
    parallel = ParallelConfig(context_parallel_size=16, cp_comm_type="a2a")
    model = on_transformer_engine(architecture, parallel, monkeypatch)
    monkeypatch.setattr(resolve, "computes_lower_right_masks", lambda *heads: True)
    resolve.check_attention(model, run(True))
    resolve.check_attention(replace(model, uses_transformer_engine=False), run(False))
    for config in (run(False), run(True, objective={"name": "sft"})):  # a row of sft shares nothing
        with pytest.raises(UserError, match=r"cp_comm_type=a2a: .*set parallel\.cp_comm_type=p2p"):
            resolve.check_attention(model, config)


def test_an_attention_without_masks_for_shared_prompts_is_refused(architecture, monkeypatch) -> None:
    model = on_transformer_engine(architecture, ParallelConfig(), monkeypatch)
    monkeypatch.setattr(resolve, "computes_lower_right_masks", lambda *heads: False)
    refused = r"padding_causal_bottom_right .*transformer-engine 2\.17\.1 .*set data\.share_prompts=false"
    with pytest.raises(UserError, match=refused) as error:
        resolve.check_attention(model, run(True))
    assert "\n" not in str(error.value)
    resolve.check_attention(model, run(False))
    resolve.check_attention(model, run(True, objective={"name": "sft"}))


@pytest.mark.parametrize(
    ("on_cpu", "installed", "refused"),
    [(True, True, "needs a CUDA device"), (False, False, "package deep_ep is not installed"), (False, True, "")],
)
def test_deep_ep_runs_where_it_is_installed(architecture, monkeypatch, on_cpu, installed, refused) -> None:
    experts = ExpertShape(num_experts=4, topk=2, ffn_hidden_size=128, renormalizes=True, layers=(True,) * 4)
    model = replace(architecture, experts=experts)
    parallel = ParallelConfig(expert_model_parallel_size=2, moe_token_dispatcher_type="flex")
    monkeypatch.setattr(resolve, "is_cpu", lambda: on_cpu)
    monkeypatch.setattr(fused_a2a, "HAVE_DEEP_EP", installed)
    if not refused:
        resolve.resolve_model(settings(), parallel, architecture=model)
        return
    with pytest.raises(UserError, match=f"moe_token_dispatcher_type=flex .*{refused}.*alltoall") as error:
        resolve.resolve_model(settings(), parallel, architecture=model)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "optimizer", "parallel", "words"),
    [
        ({"fp8_param": True}, {}, {}, ["model.fp8_param=true", "model.fp8=hybrid"]),
        ({"first_last_layers_bf16": True}, {}, {}, ["model.first_last_layers_bf16=true", "model.fp8=hybrid"]),
        (FP8, {}, {}, ["model.fp8=hybrid", "CUDA", "model.fp8=null"]),
        (
            FP8 | {"fp8_recipe": "delayed", "first_last_layers_bf16": True},
            {},
            {},
            ["first_last_layers_bf16", "delayed", "tensorwise or blockwise"],
        ),
        (FP8 | {"fp8_recipe": "mxfp8", "fp8_param": True}, {}, {}, ["fp8_param=true", "mxfp8"]),
        (
            FP8 | {"fp8_param": True},
            {"use_distributed_optimizer": False},
            {},
            ["fp8_param=true", "use_distributed_optimizer=true"],
        ),
        (
            FP8 | {"fp8_param": True},
            {"optimizer_offload_fraction": 0.5},
            {},
            ["fp8_param=true", "optimizer_offload_fraction=0.5"],
        ),
        (
            FP8 | {"first_last_layers_bf16": True, "num_layers_at_end_in_bf16": 3},
            {},
            {"pipeline_model_parallel_size": 2},
            ["num_layers_at_end_in_bf16=3", "2 layers"],
        ),
        (FP8, {}, {"tensor_model_parallel_size": 64}, ["blockwise", "multiples of 16", "TP", "is 8 "]),
    ],
)
def test_what_cannot_be_is_refused_by_name(monkeypatch, architecture, model, optimizer, parallel, words) -> None:
    monkeypatch.setattr(megatron.core, "__version__", "0.19.2")
    with pytest.raises(UserError) as error:
        check(architecture, settings(**model), OptimizerConfig.model_validate(optimizer), **parallel)
    message = str(error.value)
    assert all(word in message for word in words) and "\n" not in message


def test_fp8_parameters_are_refused_where_checkpoints_cannot_hold_them(monkeypatch, architecture) -> None:
    monkeypatch.setattr(megatron.core, "__version__", "0.16.1")
    with pytest.raises(UserError, match=r"model\.fp8_param=true needs megatron-core 0\.19 .*0\.16\.1 is installed"):
        check(architecture, settings(**FP8, fp8_param=True))


def test_fewer_key_value_heads_than_ranks_are_counted_as_megatron_cuts_them(monkeypatch, architecture) -> None:
    """Queries, keys and values of a rank: (8 + 2 x 2) x 64 / 16 = 48, no multiple of 32, but one of 16."""
    pretend(monkeypatch)
    few = replace(architecture, num_query_groups=2)
    for recipe in ("tensorwise", "blockwise"):
        check(few, settings(**FP8, fp8_recipe=recipe), has_gpu=True, tensor_model_parallel_size=16)
    with pytest.raises(UserError, match="queries, keys and values / TP is 48"):
        check(few, settings(**FP8, fp8_recipe="mxfp8"), has_gpu=True, tensor_model_parallel_size=16)


@pytest.mark.parametrize(
    ("recipe", "answers", "words"),
    [
        ("mxfp8", {"is_mxfp8_available": "needs Blackwell."}, ["needs Blackwell;", "fp8_recipe=blockwise"]),
        (
            "mxfp8",
            {"is_mxfp8_available": "needs Blackwell", "is_fp8_block_scaling_available": "CUDA 12.8"},
            ["fp8_recipe=tensorwise"],
        ),
        ("blockwise", {"is_fp8_block_scaling_available": "needs\nCUDA 12.9"}, ["needs CUDA 12.9", "fp8_recipe=mxfp8"]),
        ("blockwise", {"is_fp8_block_scaling_available": None, "is_mxfp8_available": "x"}, ["too old", "tensorwise"]),
        ("tensorwise", {"is_fp8_available": "compute capability 8.0"}, ["capability 8.0", "model.fp8=null"]),
    ],
)
def test_a_recipe_that_cannot_run_here_names_the_nearest(monkeypatch, architecture, recipe, answers, words) -> None:
    pretend(monkeypatch, **answers)
    with pytest.raises(UserError) as error:
        check(architecture, settings(**FP8, fp8_recipe=recipe), has_gpu=True)
    message = str(error.value)
    assert all(word in message for word in [f"model.fp8_recipe={recipe}", *words]) and "\n" not in message


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_a_recipe_that_can_run_is_accepted(monkeypatch, architecture, recipe) -> None:
    pretend(monkeypatch)
    check(architecture, settings(**FP8, fp8_recipe=recipe), has_gpu=True)
    check(
        architecture,
        settings(**FP8, fp8_recipe=recipe),
        has_gpu=True,
        context_parallel_size=8,
        tensor_model_parallel_size=2,
    )


@pytest.mark.parametrize("recipe", ["delayed", "tensorwise", "blockwise", "mxfp8"])
def test_megatron_takes_the_settings(architecture, recipe) -> None:
    model = settings(**FP8, fp8_recipe=recipe, first_last_layers_bf16=recipe != "delayed")
    config = transformer_config(ResolvedModel(model, ParallelConfig(), architecture, uses_transformer_engine=False))
    assert (config.fp8, config.fp8_recipe, config.first_last_layers_bf16) == ("hybrid", recipe, recipe != "delayed")
    assert not config.fp8_dot_product_attention and not config.fp8_multi_head_attention
    assert precision_settings(settings(dtype="bfloat16")) == {}
