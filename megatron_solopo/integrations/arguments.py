"""Our flags on Megatron-LM's command line, the values that its own flags must have, and the Config made of both.

The configuration classes give the flags their names, types, defaults, legal values and help. They also check the
values. Their messages name configuration keys, which are replaced by the flags that set them.
"""

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import torch
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from megatron_solopo.architecture.adapters import ALL_LINEAR
from megatron_solopo.command_settings import alternatives, choices
from megatron_solopo.config import (
    LOSS_ALIASES,
    Config,
    DataConfig,
    LogprobConfig,
    LoRAConfig,
    LossType,
    ModelConfig,
    MoEConfig,
    ObjectiveConfig,
    ReferenceConfig,
    parse_config,
)
from megatron_solopo.errors import UserError

_PREFIX = "solopo"
# Section -> its class, and the name of each key's flag ("": the key's own name).
_SECTIONS: dict[str, tuple[type[BaseModel], dict[str, str]]] = {
    "model": (ModelConfig, {"path": "model_path", "adapter": "model_adapter"}),
    "lora": (LoRAConfig, {key: f"lora_{key}" for key in LoRAConfig.model_fields}),
    "data": (
        DataConfig,
        {"path": "data_path", "max_tokens_per_pack": "", "max_triplets_per_pack": "", "share_prompts": ""},
    ),
    "objective": (ObjectiveConfig, {"name": "objective"} | dict.fromkeys(list(ObjectiveConfig.model_fields)[1:], "")),
    "logprob": (LogprobConfig, {"chunk_tokens": ""}),
    "reference": (ReferenceConfig, {key: f"reference_{key}" for key in ReferenceConfig.model_fields}),
    "moe": (MoEConfig, dict.fromkeys(MoEConfig.model_fields, "")),
}
_OPTIONAL = "lora"
_SOURCE = ("data", "path")
"""Megatron-LM's loop reads one source."""
# Keys that flags of Megatron-LM set, and values that have a flag of their own.
_MEGATRON_FLAGS = {
    "training.global_batch_size": "--global-batch-size",
    "training.eval_steps": "--eval-interval",
    "model.dtype": "--bf16",
    "model.implementation": "--transformer-impl",
    "model.fp8_recipe": "--fp8-recipe",
    "model.fp8": "--fp8-format",
    "parallel.tensor_model_parallel_size": "--tensor-model-parallel-size",
    "parallel.pipeline_model_parallel_size": "--pipeline-model-parallel-size",
    "parallel.context_parallel_size": "--context-parallel-size",
    "parallel.expert_model_parallel_size": "--expert-model-parallel-size",
    "parallel.expert_tensor_parallel_size": "--expert-tensor-parallel-size",
    "parallel.sequence_parallel": "--sequence-parallel",
    "optimizer.use_distributed_optimizer": "--use-distributed-optimizer",
    "parallel.*": "the parallel sizes",
    "data.share_prompts=false": "--no-solopo-share-prompts",
    "data.share_prompts=true": "--solopo-share-prompts",
    "run_dir": "--solopo-run-dir",
}


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the `--solopo-*` flags, as an `extra_args_provider` does."""
    for section, (model, keys) in _SECTIONS.items():
        group = parser.add_argument_group(f"SoLoPO: {section}", model.__doc__)
        for key, name in keys.items():
            field = model.model_fields[key]
            required = field.is_required() or (section, key) == _SOURCE
            group.add_argument(
                _flag(name or key),
                # A section that may be null is so unless one of its flags is given.
                default=None if required or section == _OPTIONAL else field.default,
                required=required,
                help=_help(field.description, field.default, required),
                **_argparse_options(field),
            )
    group = parser.add_argument_group("SoLoPO: output")
    group.add_argument(
        "--solopo-run-dir",
        type=Path,
        help="Directory of metrics.jsonl, which shows every metric of every step, negative ones too, and of the cached "
        "reference log-probs where --solopo-reference-cache is not given. Default: --save.",
    )
    return parser


def config_from_args(args: argparse.Namespace) -> Config:
    """Make the configuration of Megatron-LM's parsed arguments.

    Raises UserError naming the flags that are wrong, alone or together.
    """
    run_dir = args.solopo_run_dir or args.save
    if run_dir is None:
        raise UserError("--solopo-run-dir is required where --save is not given")
    sections = {
        section: {key: getattr(args, f"{_PREFIX}_{name or key}") for key, name in keys.items()}
        for section, (_, keys) in _SECTIONS.items()
    }
    sections["model"] |= _precision(args)
    adapters = {key: value for key, value in sections.pop(_OPTIONAL).items() if value is not None}
    if adapters.get("target_modules") == [ALL_LINEAR]:  # a list of modules, or this word
        adapters["target_modules"] = ALL_LINEAR
    check_arguments(args, has_adapters=bool(adapters))
    values = sections | {
        _OPTIONAL: adapters or None,
        "run_dir": run_dir,
        "seed": args.seed,
        "training": {"global_batch_size": args.global_batch_size},
        "optimizer": {"use_distributed_optimizer": args.use_distributed_optimizer},
        "parallel": {
            "tensor_model_parallel_size": args.tensor_model_parallel_size,
            "pipeline_model_parallel_size": args.pipeline_model_parallel_size,
            "virtual_pipeline_model_parallel_size": args.virtual_pipeline_model_parallel_size,
            "context_parallel_size": args.context_parallel_size,
            "expert_model_parallel_size": args.expert_model_parallel_size,
            "expert_tensor_parallel_size": args.expert_tensor_parallel_size,
            "sequence_parallel": args.sequence_parallel,
        },
    }
    with flags_for_keys():
        return parse_config(values, source="arguments")


def _precision(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "dtype": "bfloat16" if args.params_dtype is torch.bfloat16 else "float32",
        "implementation": "local" if args.transformer_impl == "local" else "auto",
        "fp8": args.fp8,
        "fp8_recipe": args.fp8_recipe,
        "fp8_param": args.fp8_param_gather,
        "first_last_layers_bf16": args.first_last_layers_bf16,
        "num_layers_at_start_in_bf16": args.num_layers_at_start_in_bf16,
        "num_layers_at_end_in_bf16": args.num_layers_at_end_in_bf16,
    }


def check_arguments(args: argparse.Namespace, *, has_adapters: bool = False) -> None:
    """Raise UserError naming every argument that does not work with packs of triplets, and its required value.

    Args:
        has_adapters: whether adapters are trained, so that checkpoints must hold them alone.
    """
    required = {
        "dataloader_type": ("external", "--dataloader-type external: our iterator makes the packs"),
        "calculate_per_token_loss": (True, "--calculate-per-token-loss: it makes the loss the mean over triplets"),
        "hidden_dropout": (0.0, "--hidden-dropout 0: the reference has none"),
        "attention_dropout": (0.0, "--attention-dropout 0: the reference has none"),
        "fp16": (False, "no --fp16: use --bf16"),
        "full_validation": (False, "no --full-validation: set --eval-iters"),
        "rampup_batch_size": (None, "no --rampup-batch-size: every step has as many packs"),
        "step_batch_size_schedule": (None, "no --step-batch-size-schedule: every step has as many packs"),
        "decrease_batch_size_if_needed": (False, "no --decrease-batch-size-if-needed: every step has as many packs"),
        "iterations_to_skip": ([], "no --iterations-to-skip: it reads batches of another form"),
        "hybrid_context_parallel": (False, "no --hybrid-context-parallel: it would cut triplets apart"),
        "use_megatron_fsdp": (False, "no --use-megatron-fsdp: the output layer's weight must be whole"),
        "use_torch_fsdp2": (False, "no --use-torch-fsdp2: the output layer's weight must be whole"),
        "init_model_with_meta_device": (False, "no --init-model-with-meta-device: weights are read into the model"),
        "overlap_moe_expert_parallel_comm": (False, "no --overlap-moe-expert-parallel-comm"),
    }
    if has_adapters:
        whole = "with --solopo-lora-* flags, as torch would save the whole model"
        required["ckpt_format"] = ("torch_dist", f"--ckpt-format torch_dist {whole}")
        if getattr(args, "ckpt_convert_format", None) == "torch":
            required["ckpt_convert_format"] = ("torch_dist", f"--ckpt-convert-format torch_dist {whole}")
    # An argument that this Megatron-LM does not have cannot be wrong.
    wrong = [hint for name, (value, hint) in required.items() if getattr(args, name, value) != value]
    if wrong:
        raise UserError(f"arguments: SoLoPO needs {'; '.join(wrong)}")


@contextmanager
def flags_for_keys() -> Iterator[None]:
    """In the message of a UserError, write configuration keys as the flags that set them."""
    flags = dict(_MEGATRON_FLAGS)
    for section, (_, keys) in _SECTIONS.items():
        flags |= {f"{section}.{key}": _flag(name or key) for key, name in keys.items()}
    dotted = "|".join(re.escape(key) for key in sorted(flags, key=len, reverse=True))
    # The objective's own checks name its keys alone, with their values.
    bare = "|".join(ObjectiveConfig.model_fields)
    pattern = rf"(?<![\w./-])(?:(?:{dotted})(?!\w)|(?:{bare})(?==))"
    try:
        yield
    except UserError as error:
        message = re.sub(pattern, lambda key: flags.get(key[0]) or flags[f"objective.{key[0]}"], str(error))
        raise UserError(message) from None


def _flag(name: str) -> str:
    return f"--{_PREFIX}-{name.replace('_', '-')}"


def _help(description: str | None, default: Any, required: bool) -> str:
    text = " ".join((description or "").split())
    # What null means does not matter where a value is required.
    text = (text.partition(" null:")[0] if required else text).rstrip(".")
    ending = "Required." if required else "" if default is None else f"Default: {default}."
    # argparse formats with %.
    return f"{text}{'. ' if text else ''}{ending}".strip().replace("%", "%%")


def _argparse_options(field: FieldInfo) -> dict[str, Any]:
    """Return argparse's type, choices, number or action for a field. `X | None` is read as X."""
    if any(get_origin(each) is list for each in alternatives(field)):  # the configuration checks its values
        return {"nargs": "+"}
    if legal := choices(field):
        is_loss = legal == list(get_args(LossType))
        return {"choices": legal} | ({"type": lambda name: LOSS_ALIASES.get(name, name)} if is_loss else {})
    (kind,) = alternatives(field)
    if get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if kind is bool:  # argparse adds `--no-...` to what is on by default
        return {"action": argparse.BooleanOptionalAction if field.default else "store_true"}
    return {"type": kind}
