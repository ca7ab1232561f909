"""Megatron-LM's command line: our flags on it, what its own must be, and the Config that both come to.

The flags are made of the configuration classes: names, types, defaults, legal values and help are
theirs, and so are the checks and the messages, in which a key is written as the flag that sets it.
"""

import argparse
import re
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import torch
from pydantic import BaseModel

from megatron_solopo.config import (
    Config,
    DataConfig,
    LogprobConfig,
    ModelConfig,
    ObjectiveConfig,
    ReferenceConfig,
    parse_config,
)
from megatron_solopo.errors import UserError

_PREFIX = "solopo"
# Section -> the class it is made of, and the flag of each key ("" where it is the key's own name).
_SECTIONS: dict[str, tuple[type[BaseModel], dict[str, str]]] = {
    "model": (ModelConfig, {"path": "model_path"}),
    "data": (DataConfig, {"path": "data_path", "max_tokens_per_pack": "", "max_triplets_per_pack": ""}),
    "objective": (ObjectiveConfig, {"name": "objective"} | dict.fromkeys(list(ObjectiveConfig.model_fields)[1:], "")),
    "logprob": (LogprobConfig, {"chunk_tokens": ""}),
    "reference": (ReferenceConfig, {"model_path": "reference_model_path", "cache": "reference_cache"}),
}
# Keys that Megatron-LM's own arguments set.
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
    "parallel.*": "the parallel sizes",
    "run_dir": "--solopo-run-dir",
}


def add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the `--solopo-*` flags, as an `extra_args_provider` does."""
    for section, (model, keys) in _SECTIONS.items():
        group = parser.add_argument_group(f"SoLoPO: {section}", model.__doc__)
        for key, name in keys.items():
            field = model.model_fields[key]
            options = _argparse_options(field.annotation)
            group.add_argument(
                _flag(name or key),
                default=None if field.is_required() else field.default,
                required=field.is_required(),
                help=_help(field.description, field.default, field.is_required()),
                **options,
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
    """The configuration that Megatron-LM's parsed arguments come to.

    Raises UserError naming the flags that are wrong, alone or together.
    """
    run_dir = args.solopo_run_dir or args.save
    if run_dir is None:
        raise UserError("--solopo-run-dir is required where --save is not given")
    check_arguments(args)
    sections = {
        section: {key: getattr(args, f"{_PREFIX}_{name or key}") for key, name in keys.items()}
        for section, (_, keys) in _SECTIONS.items()
    }
    sections["model"] |= _precision(args)
    values = sections | {
        "run_dir": run_dir,
        "seed": args.seed,
        "training": {"global_batch_size": args.global_batch_size},
        "parallel": {
            "tensor_model_parallel_size": args.tensor_model_parallel_size,
            "pipeline_model_parallel_size": args.pipeline_model_parallel_size,
            "virtual_pipeline_model_parallel_size": args.virtual_pipeline_model_parallel_size,
            "context_parallel_size": args.context_parallel_size,
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


def check_arguments(args: argparse.Namespace) -> None:
    """Raise ValueError, one line, naming every argument that packs of triplets do not go with, and what it must be."""
    required = {
        "dataloader_type": ("external", "--dataloader-type external: packs are our iterator's"),
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
    text = " ".join((description or "").split()).rstrip(".")
    ending = "Required." if required else "" if default is None else f"Default: {default}."
    # argparse formats with %.
    return f"{text}{'. ' if text else ''}{ending}".strip().replace("%", "%%")


def _argparse_options(annotation: Any) -> dict[str, Any]:
    """type, choices or action of a field's annotation; optional fields are read as what they hold when given."""
    if get_origin(annotation) is Annotated:
        return _argparse_options(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        (held,) = (each for each in get_args(annotation) if each is not type(None))
        return _argparse_options(held)
    if get_origin(annotation) is Literal:
        return {"choices": get_args(annotation)}
    if annotation is bool:
        return {"action": "store_true"}
    return {"type": annotation}
