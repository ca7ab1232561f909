"""Runs Megatron-LM's `pretrain()` on CPU ranks, and our trainer beside it.

What of `megatron.training` cannot run on a CPU, and what stands in for it here:

    initialize_megatron   asserts that there is a GPU, but for its own argument `allow_no_cuda`, which is given on a CPU
    compile_helpers       compiles the indices of Megatron-LM's pretraining data sets, which are not used (and its
                          wheel comes without their Makefile); left out
    jit_fuser             compiles elementwise kernels for a GPU while the program starts; `disable_jit_fuser`,
                          as `--disable-jit-fuser` does

The rest runs as it is, over gloo, with the adaptation of `megatron_solopo.parallel.cpu`.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import megatron_solopo.parallel  # noqa: F401  (adapts torch.cuda before megatron is imported)
from megatron_solopo.config import Config, parse_config
from megatron_solopo.cpu_features import is_cpu
from megatron_solopo.files import read_jsonl
from tests.tiny_models import FAMILIES

STEPS, BATCH = 4, 4
OPTIMIZER = {"lr": 1e-3, "lr_warmup_iters": 1}


def config(folder: Path, name: str, parallel: dict[str, Any], **sections: Any) -> Config:
    """Our trainer's run of the shared data."""
    return parse_config(
        {
            "run_dir": folder / name,
            "model": {"path": folder / "model"},
            "data": {"path": folder / "prepared", "max_tokens_per_pack": 600},
            "reference": {"model_path": folder / "reference_model", "cache": folder / "reference"},
            "training": {"global_batch_size": BATCH, "max_steps": STEPS},
            "optimizer": OPTIMIZER,
            "logging": {"tensorboard": False},
            "parallel": parallel,
        }
        | sections,
        source="test",
    )


def with_experts(folder: Path) -> dict[str, Any]:
    """Sections of the run of a model with experts, under which its routers learn, balanced by both losses."""
    return {
        "model": {"path": folder / "moe"},
        "reference": {"model_path": folder / "reference_moe", "cache": folder / "reference-moe"},
        "moe": {"router_trainable": True, "aux_loss_coefficient": 0.1, "z_loss_coefficient": 0.01},
        "optimizer": OPTIMIZER
        | {"adam_eps": 1e-2},  # with a small one Adam makes noise of what is zero but for rounding
    }


def flags_with_experts(folder: Path) -> dict[str, Any]:
    """The same for Megatron-LM: `qwen2_moe`, as its config.json has it."""
    hf: Any = FAMILIES["qwen2_moe"]
    return {
        "num_experts": hf.num_experts,
        "moe_layer_freq": "([0,1,1,0])",
        "moe_router_topk": hf.num_experts_per_tok,
        "moe_ffn_hidden_size": hf.moe_intermediate_size,
        "moe_shared_expert_intermediate_size": hf.shared_expert_intermediate_size,
        "moe_shared_expert_gate": True,
        "moe_router_pre_softmax": True,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "untie_embeddings_and_output_weights": True,
        "adam_eps": 1e-2,
        "solopo_model_path": folder / "moe",
        "solopo_reference_model_path": folder / "reference_moe",
        "solopo_reference_cache": folder / "reference-moe",
        "solopo_router_trainable": True,
        "solopo_aux_loss_coefficient": 0.1,
        "solopo_z_loss_coefficient": 0.01,
    }


def with_adapters(folder: Path, dropout: float) -> dict[str, Any]:
    """Sections of a run with adapters. With a small `adam_eps` Adam makes noise of what is zero but for rounding.

    Dropout draws the same masks for the same packs alone. So the packs are Megatron-LM's, of one triplet each.
    """
    return {
        "lora": {"rank": 4, "alpha": 8.0, "dropout": dropout},
        "optimizer": OPTIMIZER | {"lr": 1e-2, "adam_eps": 1e-4},
        "data": {"path": folder / "prepared", "max_tokens_per_pack": 600, "max_triplets_per_pack": 1},
    }


def flags_with_adapters(dropout: float) -> dict[str, Any]:
    """The same for Megatron-LM."""
    return {
        "solopo_lora_rank": 4,
        "solopo_lora_alpha": 8.0,
        "solopo_lora_dropout": dropout,
        "lr": 1e-2,
        "adam_eps": 1e-4,
    }


def arguments(folder: Path, name: str, parallel: dict[str, Any], **changes: Any) -> list[str]:
    """Megatron-LM's command line of the same run: model, data, layout, seed and optimizer. None takes a flag out."""
    flags: dict[str, Any] = _model_flags() | {
        "transformer_impl": "local",
        "distributed_backend": "gloo",
        "use_distributed_optimizer": True,
        "dist_ckpt_optim_fully_reshardable": True,
        "calculate_per_token_loss": True,
        "dataloader_type": "external",
        "no_gradient_accumulation_fusion": True,
        "no_masked_softmax_fusion": True,
        "no_rope_fusion": True,
        "no_bias_swiglu_fusion": True,
        "no_bias_dropout_fusion": True,
        "no_persist_layer_norm": True,
        "disable_jit_fuser": True,
        "micro_batch_size": 1,
        "global_batch_size": BATCH,
        "train_iters": STEPS,
        "lr_decay_style": "cosine",
        "min_lr": 0,
        "weight_decay": 0,
        "adam_beta2": 0.95,
        "eval_iters": 0,
        "eval_interval": 100,
        "log_interval": 1,
        "save_interval": 100,
        "solopo_model_path": folder / "model",
        "solopo_data_path": folder / "prepared",
        "solopo_max_tokens_per_pack": 600,
        "solopo_reference_model_path": folder / "reference_model",
        "solopo_reference_cache": folder / "reference",
        "solopo_run_dir": folder / name,
    }
    flags |= OPTIMIZER | parallel | changes
    if flags.get("tensor_model_parallel_size", 1) > 1:
        flags["sequence_parallel"] = True
    words = []
    for flag, value in flags.items():
        if value is not None:
            words += [f"--{flag.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


def _model_flags() -> dict[str, Any]:
    """`qwen2_tied`, as its config.json has it."""
    hf = FAMILIES["qwen2_tied"]
    return {
        "num_layers": hf.num_hidden_layers,
        "hidden_size": hf.hidden_size,
        "ffn_hidden_size": hf.intermediate_size,
        "num_attention_heads": hf.num_attention_heads,
        "group_query_attention": True,
        "num_query_groups": hf.num_key_value_heads,
        "norm_epsilon": hf.rms_norm_eps,
        "add_qkv_bias": True,
        "max_position_embeddings": hf.max_position_embeddings,
        "seq_length": hf.max_position_embeddings,
        "position_embedding_type": "rope",
        "normalization": "RMSNorm",
        "swiglu": True,
        "disable_bias_linear": True,
        "hidden_dropout": 0,
        "attention_dropout": 0,
        "tokenizer_type": "NullTokenizer",
        "vocab_size": hf.vocab_size,
    }


@contextmanager
def megatron_lm(argv: list[str]) -> Iterator[None]:
    """A process that `pretrain()` can run in with these arguments; none of its state stays behind."""
    import megatron.core.datasets.utils as dataset_utils
    from megatron.training import training

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(sys, "argv", ["pretrain_solopo.py", *argv]))
        stack.enter_context(mock.patch.dict(os.environ, CUDA_DEVICE_MAX_CONNECTIONS="1"))
        initialize = partial(training.initialize_megatron, allow_no_cuda=is_cpu())
        stack.enter_context(mock.patch.object(training, "initialize_megatron", initialize))
        stack.enter_context(mock.patch.object(dataset_utils, "compile_helpers", lambda: None))
        stack.callback(training.destroy_global_state)
        yield


def pretrain(argv: list[str], model_provider: Any = None, form: Any = None) -> list[dict[str, float]]:
    """Metrics (on the last stage), gradient norm and tokens of every step, as `pretrain()` has them for its log.

    Args:
        model_provider: a script's own.
        form: a `pretrain` of another signature.
    """
    from megatron.training import training

    from megatron_solopo.integrations.megatron_lm import Solopo

    steps: list[dict[str, float]] = []
    log = training.training_log

    def spy(loss_dict: Any, total_loss_dict: Any, learning_rate: Any, *others: Any, **keywords: Any) -> Any:
        values = {name: float(value) for name, value in loss_dict.items()}
        steps.append(values | {"grad_norm": float(others[4]), "num_tokens": keywords["total_real_tokens_in_batch"]})
        return log(loss_dict, total_loss_dict, learning_rate, *others, **keywords)

    with megatron_lm(argv), mock.patch.object(training, "training_log", spy):
        Solopo().pretrain(form or training.pretrain, model_provider)
    return steps


def recorded(folder: Path, name: str) -> list[dict[str, Any]]:
    """What a run's metrics.jsonl says."""
    return read_jsonl(folder / name / "metrics.jsonl")
