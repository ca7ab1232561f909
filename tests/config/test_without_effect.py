"""Keys that change nothing in a run are named in one line, with the reason; a config of defaults has no such line."""

from pathlib import Path

import pytest

from megatron_solopo.config import Surroundings, load_config, warning_without_effect
from tests.config.test_config import load

ROOT = Path(__file__).resolve().parents[2]
EIGHT_GPUS = Surroundings(8, 8, uses_transformer_engine=True)
ONE_CPU = Surroundings(1, 1, uses_transformer_engine=False)
TWO_CPUS = Surroundings(2, 2, uses_transformer_engine=False)


ONLY_SFT = ["data.path=null", "data.sources=[{path: chats, objective: sft}]"]
WITH_SFT = ["data.path=null", "data.sources=[{path: triplets}, {path: chats, objective: sft}]"]


@pytest.mark.parametrize(
    ("overrides", "where", "words"),
    [
        (["optimizer.grad_reduce_in_fp32=false"], TWO_CPUS, "grad_reduce_in_fp32=false (model.dtype=float32)"),
        (["parallel.overlap_param_gather=true"], ONE_CPU, "overlap_param_gather=true (one rank has each gradient"),
        (["parallel.overlap_grad_reduce=true"], ONE_CPU, "overlap_grad_reduce=true (one rank has each gradient"),
        (["parallel.cp_comm_type=a2a"], EIGHT_GPUS, "cp_comm_type=a2a (parallel.context_parallel_size=1)"),
        (
            ["parallel.cp_comm_type=a2a", "parallel.context_parallel_size=2"],
            TWO_CPUS,
            "cp_comm_type=a2a (plain PyTorch's attention",
        ),
        (
            ["parallel.cp_comm_type=a2a", "parallel.context_parallel_size=2"],
            EIGHT_GPUS,
            "cp_comm_type=a2a (data.share_prompts=true: attention gathers",
        ),
        (["parallel.recompute_num_layers=2"], TWO_CPUS, "recompute_num_layers=2 (parallel.recompute_granularity=null)"),
        (["parallel.recompute_modules=[mlp]"], TWO_CPUS, "recompute_modules=[mlp] (parallel.recompute_granularity"),
        (["objective.name=long_po", "objective.alpha=2"], TWO_CPUS, "objective.alpha=2 (objective.name=long_po aligns"),
        (["objective.name=long_po", "moe.replay=short"], TWO_CPUS, "moe.replay=short (objective.name=long_po aligns"),
        (["objective.huber_delta=2"], TWO_CPUS, "objective.huber_delta=2 (objective.distance=l1)"),
        (["objective.token_alignment_weight=2"], TWO_CPUS, "weight=2 (objective.token_alignment=null)"),
        (
            ["objective.name=long_po", "objective.token_alignment=reverse_kl"],
            TWO_CPUS,
            "token_alignment=reverse_kl (objective.name=long_po aligns nothing)",
        ),
        (["objective.gamma=1"], TWO_CPUS, "objective.gamma=1 (objective.loss_type=dpo)"),
        (["objective.orpo_lambda=2"], TWO_CPUS, "objective.orpo_lambda=2 (objective.loss_type=dpo)"),
        (["objective.loss_type=simpo", "reference.cache=x"], TWO_CPUS, "reference.cache=x (objective.loss_type=simpo"),
        (["objective.loss_type=orpo", "reference.context=short"], TWO_CPUS, "context=short (objective.loss_type=orpo"),
        (["objective.name=short_po", "reference.context=short"], TWO_CPUS, "context=short (objective.name=short_po"),
        (["model.fp8_recipe=mxfp8"], EIGHT_GPUS, "model.fp8_recipe=mxfp8 (model.fp8=null)"),
        (["model.num_layers_at_end_in_bf16=2"], EIGHT_GPUS, "(model.first_last_layers_bf16=false)"),
        (["training.max_steps=9", "training.num_train_epochs=2"], TWO_CPUS, "(training.max_steps=9 decides)"),
        (["training.manual_gc_interval=9"], ONE_CPU, "manual_gc_interval=9 (one process and training.manual_gc=null)"),
        (["training.manual_gc=false", "training.manual_gc_interval=9"], TWO_CPUS, "(training.manual_gc=false)"),
        (
            ["optimizer.lr_decay_style=constant", "optimizer.min_lr=1e-7"],
            TWO_CPUS,
            "(optimizer.lr_decay_style=constant)",
        ),
        (["objective.name=sft", "objective.beta=2"], TWO_CPUS, "objective.beta=2 (objective.name=sft compares no"),
        ([*ONLY_SFT, "objective.alpha=2"], TWO_CPUS, "objective.alpha=2 (objective.name=sft aligns nothing)"),
        (["objective.name=long_po", *ONLY_SFT], TWO_CPUS, "objective.name=long_po (every one of data.sources has its"),
        (["profile.ranks=[1]"], TWO_CPUS, "profile.ranks=[1] (profile.steps=null)"),
    ],
)
def test_a_key_without_effect_is_named_with_the_reason(
    tmp_path: Path, overrides: list[str], where: Surroundings, words: str
) -> None:
    line = warning_without_effect(load(tmp_path, "", tuple(overrides)), where)
    assert line is not None and words in line and "\n" not in line
    assert line.startswith("warning: no effect in this run: ") and line.count(" (") == 1, "each key once, and no other"


@pytest.mark.parametrize(
    ("overrides", "where"),
    [
        ([], ONE_CPU),
        (["parallel.overlap_param_gather=true", "training.manual_gc_interval=9"], TWO_CPUS),
        (["parallel.context_parallel_size=2", "parallel.cp_comm_type=a2a", "data.share_prompts=false"], EIGHT_GPUS),
        (["parallel.cp_comm_type=a2a", "parallel.overlap_grad_reduce=true"], None),
        (["model.dtype=bfloat16", "optimizer.grad_reduce_in_fp32=false"], ONE_CPU),
        (["parallel.recompute_granularity=full", "parallel.recompute_num_layers=2"], ONE_CPU),
        (["objective.loss_type=simpo", "objective.gamma=1"], ONE_CPU),
        (["objective.name=long_po", "reference.context=short"], ONE_CPU),
        (["reference.context=short"], ONE_CPU),
        ([*WITH_SFT, "objective.alpha=2", "objective.beta=2", "reference.cache=x"], ONE_CPU),
    ],
)
def test_a_key_with_an_effect_is_not(tmp_path: Path, overrides: list[str], where: Surroundings | None) -> None:
    assert warning_without_effect(load(tmp_path, "", tuple(overrides)), where) is None


@pytest.mark.parametrize(
    "path",
    sorted(path for path in ROOT.glob("examples/**/*.yaml") if path.parent.name != "loops"),
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_example_states_a_key_without_effect(path: Path) -> None:
    assert warning_without_effect(load_config(path), None) is None
