"""The `--solopo-*` flags say what the configuration says, and what does not go together is refused by flag."""

import argparse
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_solopo.config import DataConfig, LogprobConfig, LoRAConfig, ObjectiveConfig, ReferenceConfig
from megatron_solopo.errors import UserError
from megatron_solopo.integrations.arguments import add_arguments, check_arguments, config_from_args, flags_for_keys

REQUIRED = {
    "--solopo-model-path": "model",
    "--solopo-data-path": "prepared",
    "--solopo-max-tokens-per-pack": "4096",
    "--solopo-run-dir": "run",
}
# What Megatron-LM's own arguments come to, as far as they are read.
MEGATRON: dict[str, Any] = {
    "save": None,
    "seed": 5,
    "global_batch_size": 16,
    "params_dtype": torch.bfloat16,
    "transformer_impl": "transformer_engine",
    "fp8": None,
    "fp8_recipe": "delayed",
    "fp8_param_gather": False,
    "first_last_layers_bf16": False,
    "num_layers_at_start_in_bf16": 1,
    "num_layers_at_end_in_bf16": 1,
    "tensor_model_parallel_size": 2,
    "pipeline_model_parallel_size": 4,
    "virtual_pipeline_model_parallel_size": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 2,
    "sequence_parallel": True,
    "use_distributed_optimizer": True,
    "dataloader_type": "external",
    "calculate_per_token_loss": True,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
}


def parse(*flags: str, megatron: dict[str, Any] | None = None, without: str = "") -> argparse.Namespace:
    parser = add_arguments(argparse.ArgumentParser(allow_abbrev=False))
    words = [word for pair in REQUIRED.items() if pair[0] != without for word in pair]
    return parser.parse_args([*words, *flags], argparse.Namespace(**(MEGATRON | (megatron or {}))))


def test_the_defaults_are_the_configurations() -> None:
    config = config_from_args(parse())
    assert config.objective == ObjectiveConfig()
    assert config.logprob == LogprobConfig() and config.reference == ReferenceConfig()
    assert config.data == DataConfig(path=Path("prepared"), max_tokens_per_pack=4096)


def test_every_key_of_the_objective_has_a_flag_that_sets_it() -> None:
    given = {
        "objective": "solopo", "loss-type": "robust", "beta": "0.3", "gamma": "0.7", "orpo-lambda": "2",
        "label-smoothing": "0.2", "nll-coefficient": "0.1", "alpha": "1.5", "align": "both", "distance": "huber",
        "huber-delta": "0.5", "ld-alpha": "0.4", "token-alignment": "reverse_kl", "token-alignment-weight": "0.5",
    }  # fmt: skip
    words = [word for name, value in given.items() for word in (f"--solopo-{name}", value)]
    objective = config_from_args(parse(*words, "--solopo-detach-short", "--solopo-use-weighting")).objective
    wanted = {name.replace("-", "_").replace("objective", "name"): value for name, value in given.items()}
    assert set(wanted) | {"detach_short", "use_weighting"} == set(ObjectiveConfig.model_fields)
    assert {name: type(getattr(objective, name))(value) for name, value in wanted.items()} == {
        name: getattr(objective, name) for name in wanted
    }
    assert objective.detach_short is True and objective.use_weighting is True
    assert config_from_args(parse("--solopo-loss-type", "sigmoid_norm")).objective.loss_type == "dpo_norm"


def test_layout_precision_and_batch_are_megatron_lms() -> None:
    config = config_from_args(parse(megatron={"fp8": "hybrid", "fp8_recipe": "blockwise", "fp8_param_gather": True}))
    assert (config.seed, config.training.global_batch_size) == (5, 16)
    assert config.parallel.model_parallel_size == 8 and config.parallel.uses_sequence_parallel
    assert config.model.dtype == "bfloat16" and config.model.implementation == "auto"
    assert (config.model.fp8, config.model.fp8_recipe, config.model.fp8_param) == ("hybrid", "blockwise", True)
    plain = config_from_args(parse(megatron={"params_dtype": torch.float32, "transformer_impl": "local"}))
    assert (plain.model.dtype, plain.model.implementation) == ("float32", "local")


def test_a_flag_of_adapters_makes_their_section() -> None:
    assert config_from_args(parse()).lora is None
    assert config_from_args(parse("--solopo-lora-rank", "8")).lora == LoRAConfig(rank=8)
    words = ("--solopo-lora-use-rslora", "--solopo-lora-dropout", "0.1", "--solopo-lora-target-modules")
    lora = config_from_args(parse(*words, "q_proj", "v_proj")).lora
    assert lora == LoRAConfig(use_rslora=True, dropout=0.1, target_modules=["q_proj", "v_proj"])
    assert config_from_args(parse(*words, "all-linear")).lora == LoRAConfig(use_rslora=True, dropout=0.1)
    with pytest.raises(UserError, match="some of q_proj, k_proj") as error:
        config_from_args(parse("--solopo-lora-target-modules", "lm_head"))
    assert "\n" not in str(error.value)


def test_the_run_directory_is_save_where_it_is_not_given() -> None:
    args = parse(without="--solopo-run-dir", megatron={"save": "checkpoints"})
    assert config_from_args(args).run_dir == Path("checkpoints")
    with pytest.raises(UserError, match="--solopo-run-dir is required where --save is not given"):
        config_from_args(parse(without="--solopo-run-dir"))


@pytest.mark.parametrize("flag", ["--solopo-model-path", "--solopo-data-path", "--solopo-max-tokens-per-pack"])
def test_what_has_no_default_is_required(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse(without=flag)
    assert f"required: {flag}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--solopo-beta", "-1"], "--solopo-beta=-1.0: Input should be greater than 0"),
        (["--solopo-label-smoothing", "0.7"], "--solopo-label-smoothing=0.7 is not in [0, 0.5]"),
        (
            ["--solopo-loss-type", "orpo", "--solopo-beta", "1"],
            "--solopo-beta=1.0 has no effect with --solopo-loss-type=orpo",
        ),
    ],
)
def test_an_illegal_value_is_refused_under_its_flag(flags: list[str], part: str) -> None:
    with pytest.raises(UserError) as error:
        config_from_args(parse(*flags))
    assert part in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "value", "part"),
    [
        ("dataloader_type", "single", "--dataloader-type external"),
        ("calculate_per_token_loss", False, "--calculate-per-token-loss"),
        ("hidden_dropout", 0.1, "--hidden-dropout 0"),
        ("attention_dropout", 0.1, "--attention-dropout 0"),
        ("fp16", True, "no --fp16"),
        ("full_validation", True, "no --full-validation"),
        ("rampup_batch_size", ["4", "4", "100"], "no --rampup-batch-size"),
        ("step_batch_size_schedule", "0:4", "no --step-batch-size-schedule"),
        ("decrease_batch_size_if_needed", True, "no --decrease-batch-size-if-needed"),
        ("iterations_to_skip", [3], "no --iterations-to-skip"),
        ("hybrid_context_parallel", True, "no --hybrid-context-parallel"),
        ("use_megatron_fsdp", True, "no --use-megatron-fsdp"),
        ("use_torch_fsdp2", True, "no --use-torch-fsdp2"),
        ("init_model_with_meta_device", True, "no --init-model-with-meta-device"),
        ("overlap_moe_expert_parallel_comm", True, "no --overlap-moe-expert-parallel-comm"),
    ],
)
def test_a_wrong_combination_is_refused_by_name(name: str, value: Any, part: str) -> None:
    with pytest.raises(UserError) as error:
        config_from_args(parse(megatron={name: value}))
    assert part in str(error.value) and "\n" not in str(error.value)
    assert str(error.value).count(";") == 0  # the only thing wrong


@pytest.mark.parametrize("flag", ["ckpt_format", "ckpt_convert_format"])
def test_a_format_that_would_save_the_whole_model_is_refused_with_adapters(flag: str) -> None:
    formats = {"ckpt_format": "torch_dist", "ckpt_convert_format": None}
    assert config_from_args(parse("--solopo-lora-rank", "8", megatron=formats)).lora is not None
    wrong = formats | {flag: "torch"}
    with pytest.raises(UserError) as error:
        config_from_args(parse("--solopo-lora-rank", "8", megatron=wrong))
    name = f"--{flag.replace('_', '-')}"
    wanted = (
        f"arguments: SoLoPO needs {name} torch_dist with --solopo-lora-* flags, as torch would save the whole model"
    )
    assert str(error.value) == wanted
    assert config_from_args(parse(megatron=wrong)).lora is None, "the whole model is what such a run saves"


def test_keys_become_flags_in_messages_and_paths_do_not() -> None:
    message = "/runs/model.path/x: data.path and model.fp8_recipe=mxfp8 need training.global_batch_size (parallel.*)"
    with pytest.raises(UserError) as error, flags_for_keys():
        raise UserError(message)
    assert str(error.value) == (
        "/runs/model.path/x: --solopo-data-path and --fp8-recipe=mxfp8 need --global-batch-size (the parallel sizes)"
    )


def test_a_fault_of_the_program_keeps_its_message() -> None:
    with pytest.raises(ValueError, match=r"^data\.path is longer$") as error, flags_for_keys():
        raise ValueError("data.path is longer")
    assert not isinstance(error.value, UserError)


def test_help_says_what_each_flag_is_and_its_default() -> None:
    text = " ".join(add_arguments(argparse.ArgumentParser()).format_help().split())
    assert "SoLoPO: objective" in text and "Scale of the reward. orpo has none. Default: 0.1." in text
    assert "Directory that `megatron-solopo data prepare` wrote. Required." in text and "None" not in text


LAUNCH_SCRIPT = Path(__file__).parents[2] / "examples" / "megatron_lm" / "pretrain_solopo.sh"


@pytest.mark.parity  # Megatron-LM's own are known there alone
def test_the_launch_scripts_arguments_exist(tmp_path: Path) -> None:
    """Run with a stand-in for torchrun that prints its arguments, which ours and Megatron-LM's parser then read."""
    (tmp_path / "torchrun").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "torchrun").chmod(0o755)
    found = subprocess.run(
        [LAUNCH_SCRIPT, "model", "prepared", "reference", "output", "--train-iters", "7"],
        env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    words = found.stdout.split("\n")[:-1]
    assert words[:2] == ["--nproc-per-node", "8"] and words[2].endswith("pretrain_solopo.py")
    ours = [word for word in words if word.startswith("--solopo")]
    parsed, others = add_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_known_args(words[3:])
    assert parsed.solopo_reference_cache == Path("reference") and len(ours) == 6
    assert not [word for word in others if word.startswith("--solopo")]
    megatron = pytest.importorskip("megatron.training.arguments", reason="no megatron.training: its own are not read")
    args = megatron.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)).parse_args(others)
    assert (args.train_iters, args.save, args.load) == (7, "output", "output")
    check_arguments(args)
