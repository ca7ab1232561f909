"""LoRA (arXiv 2106.09685) in PEFT's words: which linear layers of a model have an adapter, and of what size."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.architecture.pipeline_layout import stage_layers
from megatron_solopo.config import Config, LoRAConfig, TargetModule
from megatron_solopo.errors import UserError


@dataclass(frozen=True)
class AdaptedLinear:
    """A linear layer of Megatron-Core that has an adapter. It computes one or more of PEFT's modules at once."""

    megatron: str
    """Its name in a layer, as in `self_attention.linear_qkv`."""
    modules: tuple[str, ...]
    """PEFT's modules that it computes, in Megatron's order."""
    targets: tuple[str, ...]
    """Those of them that have an adapter."""
    outputs: tuple[str, ...]
    """The rows of each module, by their names in `ModelShape.sizes`."""
    inputs: str
    """The columns of all of them."""
    is_column_parallel: bool
    """Whether tensor parallelism divides its rows, or else its columns."""


# For each linear layer: its name, the block of the Hugging Face model, its modules and their rows, its columns, and
# whether it is column-parallel.
_LINEARS = (
    ("self_attention.linear_qkv", ("q_proj", "k_proj", "v_proj"), ("queries", "keys", "keys"), "hidden", True),
    ("self_attention.linear_proj", ("o_proj",), ("hidden",), "queries", False),
    ("mlp.linear_fc1", ("gate_proj", "up_proj"), ("ffn", "ffn"), "hidden", True),
    ("mlp.linear_fc2", ("down_proj",), ("hidden",), "ffn", False),
)
ADAPTER = "_adapter"
"""What Megatron's name of a linear layer has behind it in that of its adapter."""
ALL_LINEAR = "all-linear"
ATTENTION: tuple[TargetModule, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
"""The modules that a model with experts can adapt."""
_EVERY: tuple[str, ...] = get_args(TargetModule)
# Fields of PEFT's file that change nothing of what a loaded adapter computes.
_WITHOUT_EFFECT = {
    *("auto_mapping", "base_model_name_or_path", "corda_config", "eva_config", "exclude_modules", "inference_mode"),
    *("init_lora_weights", "loftq_config", "lora_ga_config", "megatron_config", "megatron_core"),
    *("peft_version", "qalora_group_size", "revision", "runtime_config", "task_type"),
}
_EMPTY: tuple[Any, ...] = (None, False, "none", {}, [])


def target_modules(lora: LoRAConfig) -> tuple[str, ...]:
    """PEFT's names of the modules that have an adapter, in PEFT's usual order."""
    if lora.target_modules == ALL_LINEAR:
        return _EVERY
    return tuple(each for each in _EVERY if each in lora.target_modules)


def adapted_linears(lora: LoRAConfig) -> list[AdaptedLinear]:
    """The linear layers of each transformer layer that have an adapter."""
    chosen = target_modules(lora)
    return [
        AdaptedLinear(name, modules, targets, outputs, inputs, is_column_parallel)
        for name, modules, outputs, inputs, is_column_parallel in _LINEARS
        if (targets := tuple(each for each in modules if each in chosen))
    ]


def adapter_sizes(architecture: ModelShape, lora: LoRAConfig, tensor_parallel_size: int = 1) -> list[tuple[str, int]]:
    """The parameters of one layer's adapters, in their order: Megatron's name, and the numbers that each rank has."""
    known, found = architecture.sizes, []
    for linear in adapted_linears(lora):
        of_module = dict(zip(linear.modules, linear.outputs, strict=True))
        rows = lora.rank * sum(known[of_module[each]] for each in linear.targets)
        columns = lora.rank * len(linear.targets) * known[linear.inputs]
        if linear.is_column_parallel:
            rows //= tensor_parallel_size
        else:
            columns //= tensor_parallel_size
        found += [(f"{linear.megatron}{ADAPTER}.lora_A", columns), (f"{linear.megatron}{ADAPTER}.lora_B", rows)]
    return found


def num_adapter_parameters(architecture: ModelShape, lora: LoRAConfig) -> int:
    """Parameters of all adapters of a model."""
    return architecture.num_layers * sum(size for _, size in adapter_sizes(architecture, lora))


def check_adapters(architecture: ModelShape, config: Config) -> None:
    """Raise UserError if the model or the layout has no place for the adapters, or if they have no settings."""
    check_targets(architecture, config)
    if config.lora is not None and 0 in stage_layers(architecture.num_layers, config.parallel):
        raise UserError(
            f"parallel.pipeline_model_parallel_layout={config.parallel.pipeline_model_parallel_layout}: a stage "
            "without layers has no adapters to train; give every stage a layer (t)"
        )


def check_targets(architecture: ModelShape, config: Config) -> None:
    """`check_adapters` without the layers of pipeline stages."""
    lora = config.lora
    if lora is None:
        if config.model.adapter is not None:
            raise UserError(
                f"model.adapter={config.model.adapter}: needs the section lora; for example lora.rank=16 lora.alpha=32"
            )
        return
    chosen = target_modules(lora)
    in_experts = [each for each in chosen if each not in ATTENTION]
    if architecture.experts is not None and in_experts:
        raise UserError(
            f"lora.target_modules: {', '.join(in_experts)} are parts of experts, which have no adapters; choose from "
            f"{', '.join(ATTENTION)}"
        )
    if config.moe.router_trainable:
        raise UserError("moe.router_trainable=true: a run with lora trains adapters alone; set it to false")
    attention = [each for each in ("q_proj", "k_proj", "v_proj") if each in chosen]
    tp = config.parallel.tensor_model_parallel_size
    if tp > architecture.num_query_groups and 0 < len(attention) < 3:
        raise UserError(
            f"lora.target_modules: parallel.tensor_model_parallel_size={tp} cuts the model's "
            f"{architecture.num_query_groups} key-value heads, so q_proj, k_proj and v_proj need adapters together; "
            f"name all three or none, or set parallel.tensor_model_parallel_size={architecture.num_query_groups}"
        )


def adapter_config(lora: LoRAConfig, base: Path) -> bytes:
    """The content of `adapter_config.json`, as `peft` reads it.

    Args:
        base: the model that the adapters were trained on.
    """
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "use_rslora": lora.use_rslora,
        "lora_dropout": lora.dropout,
        "target_modules": list(target_modules(lora)),
        "bias": "none",
        "inference_mode": True,
    }
    return (json.dumps(fields, indent=2) + "\n").encode()


def read_lora(stored: dict[str, Any], file: Path) -> LoRAConfig:
    """The settings that an `adapter_config.json` states.

    Args:
        stored: its content.

    Raises UserError naming a field that is not supported.
    """
    if stored.get("peft_type") != "LORA":
        raise UserError(f"{file}: peft_type is {stored.get('peft_type')!r}; only LORA is supported")
    known = {*_WITHOUT_EFFECT, "peft_type", "r", "lora_alpha", "use_rslora", "lora_dropout", "target_modules"}
    for name in sorted(stored.keys() - known):
        if stored[name] not in _EMPTY:
            raise UserError(f"{file}: {name}={stored[name]!r} is not supported; only plain LoRA is")
    targets = stored["target_modules"]
    try:
        return LoRAConfig.model_validate(
            {
                "rank": stored["r"],
                "alpha": float(stored["lora_alpha"]),
                "use_rslora": stored.get("use_rslora", False),
                "dropout": stored.get("lora_dropout", 0.0),
                "target_modules": targets if isinstance(targets, str) else sorted(targets, key=_EVERY.index),
            }
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: r, lora_alpha, lora_dropout or target_modules is not supported ({' '.join(str(error).split())}); "
            f"target_modules may name {', '.join(_EVERY)}, or be {ALL_LINEAR}"
        ) from None
