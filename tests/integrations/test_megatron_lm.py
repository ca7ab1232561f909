"""`pretrain()` of Megatron-LM with our plug-in, against our own trainer. One launch on two ranks runs them all."""

import json
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from megatron_solopo.architecture.model_directory import ADAPTER_CONFIG
from megatron_solopo.checkpoint.adapter_checkpoint import adapter_files
from megatron_solopo.checkpoint.conversion import export_adapter, export_model, import_model
from megatron_solopo.checkpoint.megatron_reader import MegatronDirectory
from megatron_solopo.config import LoRAConfig
from megatron_solopo.files import read_jsonl
from megatron_solopo.integrations.megatron_lm import PackStream, _check_description
from megatron_solopo.model.adapters import begin_dropout
from megatron_solopo.model.layers import layer_spec
from megatron_solopo.train.trainer import precompute_reference, train
from tests.distributed import run_distributed
from tests.integrations.megatron_runs import (
    BATCH,
    STEPS,
    arguments,
    config,
    flags_with_adapters,
    flags_with_experts,
    pretrain,
    recorded,
    with_adapters,
    with_experts,
)
from tests.tiny_models import make_model
from tests.train.runs import make_inputs

# isort: split
from megatron.core.models.gpt import GPTModel

from megatron_solopo.errors import UserError

pytestmark = pytest.mark.parity
pytest.importorskip("megatron.training", reason="this megatron-core has no megatron.training")

TP2 = {"tensor_model_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
SAVED = 2
# Layout -> what our trainer is told, and Megatron-LM.
LAYOUTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "tp2": (TP2, TP2 | {"micro_batch_size": 1}),
    "pp2": (PP2, PP2 | {"micro_batch_size": 2}),
    "vpp2": (
        PP2 | {"virtual_pipeline_model_parallel_size": 2},
        PP2 | {"num_layers_per_virtual_pipeline_stage": 1, "micro_batch_size": 1},
    ),
    "cp2": (CP2, CP2 | {"micro_batch_size": 4}),
    # Ours shares prompts, theirs does not.
    "dp2": ({}, {"micro_batch_size": 2, "no_solopo_share_prompts": True}),
}
EP2 = {"expert_model_parallel_size": 2}
# The same with experts, without and with both losses of routers, which learn only with them.
EXPERTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ep2": (EP2, EP2 | {"micro_batch_size": 2}),
    "ep2-tp2": (
        EP2 | TP2 | {"expert_tensor_parallel_size": 1},
        EP2 | TP2 | {"expert_tensor_parallel_size": 1, "micro_batch_size": 1},
    ),
}
# Layouts that also train adapters, and their dropout. Under the second each rank has several chunks.
ADAPTERS = {"tp2": 0.3, "vpp2": 0.0}
EVALUATED = {"eval_iters": 1, "eval_interval": 2}


def run_all(folder: Path) -> dict[str, Any]:
    """On every rank: our runs, Megatron-LM's, each from the other's checkpoint, and what is refused."""
    precompute_reference(config(folder, "unused", TP2), overwrite=False)
    found: dict[str, Any] = {}
    for name, (ours, theirs) in LAYOUTS.items():
        is_saving = name == "tp2"
        training = {"global_batch_size": BATCH, "max_steps": STEPS, "eval_steps": SAVED}
        train(
            config(
                folder, name, ours, **({"training": training, "checkpoint": {"save_steps": SAVED}} if is_saving else {})
            )
        )
        changes = {"save": folder / "saved", "save_interval": SAVED} | EVALUATED if is_saving else {}
        found[name], evaluated = run_with_evaluation(arguments(folder, f"{name}-lm", theirs | changes))
        if is_saving:
            found["evaluated"] = evaluated
            (folder / "megatron_lm.jsonl").write_bytes((folder / "tp2-lm" / "metrics.jsonl").read_bytes())
    found |= run_with_experts(folder) | run_with_adapters(folder)
    # Megatron-LM cannot load the state of torch's Adam, which is the only one here, into a fresh one.
    resumed = LAYOUTS["tp2"][1] | {"load": folder / "saved", "ckpt_step": SAVED, "no_load_optim": True}
    found["resumed"] = pretrain(arguments(folder, "tp2-lm", resumed))
    found["own"] = pretrain(arguments(folder, "own-lm", LAYOUTS["dp2"][1]), own_model, form=pretrain_of_016)
    for name, source in checkpoints(folder).items():
        train(config(folder, f"from-{name}", PP2, model={"path": source}))
        load = {"load": loadable(source, folder / f"load-{name}"), "finetune": True}
        load |= {"dist_ckpt_strictness": "log_unexpected"} if name == "ours" else {}
        found[f"from {name}"] = pretrain(arguments(folder, f"from-{name}-lm", LAYOUTS["vpp2"][1] | load))
    path = {"solopo_model_path": folder / "tp2" / "checkpoints" / f"iter_{SAVED:07d}"}
    found["model path"] = pretrain(arguments(folder, "model-path-lm", LAYOUTS["vpp2"][1] | path))
    found["refused"] = {name: refusal(arguments(folder, "refused", TP2, **flags)) for name, flags in REFUSED.items()}
    return found


def run_with_experts(folder: Path) -> dict[str, Any]:
    sections, flags = with_experts(folder), flags_with_experts(folder)
    precompute_reference(config(folder, "unused", EP2, **sections), overwrite=False)
    found: dict[str, Any] = {}
    for name, (ours, theirs) in EXPERTS.items():
        train(config(folder, name, ours, **sections))
        found[name] = pretrain(arguments(folder, f"{name}-lm", theirs | flags))
    train(config(folder, "frozen", EP2, **sections | {"moe": {}}))
    moe = {name: None for name in flags if name.startswith("solopo_") and name.endswith(("trainable", "coefficient"))}
    found["frozen"] = pretrain(arguments(folder, "frozen-lm", EXPERTS["ep2"][1] | flags | moe))
    return found


def run_with_adapters(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, dropout in ADAPTERS.items():
        ours, theirs = LAYOUTS[name]
        settings = config(folder, f"lora-{name}", ours, **with_adapters(folder, dropout))
        train(settings)
        save = {"save": folder / f"lora-{name}-saved", "save_interval": SAVED}
        flags = flags_with_adapters(dropout)
        with same_masks(settings.seed) if dropout else nullcontext():
            found[f"lora-{name}"] = pretrain(arguments(folder, f"lora-{name}-lm", theirs | flags | save))
    load = {"load": folder / "lora-tp2-saved", "ckpt_step": SAVED, "no_load_optim": True}
    resumed = LAYOUTS["tp2"][1] | flags_with_adapters(ADAPTERS["tp2"]) | load
    with same_masks(settings.seed):
        found["lora-resumed"] = pretrain(arguments(folder, "lora-resumed-lm", resumed))
    other = {"solopo_model_path": folder / "reference_model"}
    release = loadable(folder / "lora-tp2-saved" / f"iter_{SAVED:07d}", folder / "lora-release")
    for name, flags in {
        "alpha": {"solopo_lora_alpha": 4.0},
        "base": other,
        "whole": {"load": folder / "saved"},
        # A checkpoint that stands for a model, elsewhere than where it was saved.
        "release": {"load": release, "ckpt_step": None, "solopo_lora_alpha": 4.0},
        "save": {"load": None, "ckpt_step": None, "save": folder / "lora-tp2-saved", "solopo_lora_alpha": 4.0},
    }.items():
        found[f"refused {name}"] = refusal(arguments(folder, "refused", resumed | flags))
    return found


@contextmanager
def same_masks(seed: int) -> Iterator[None]:
    """Within, `pretrain()` seeds the masks of dropout of each step as our trainer does. It has one chunk per rank."""
    read = PackStream._read

    def seed_and_read(stream: PackStream) -> Iterator[Any]:
        begin_dropout(seed, stream._loader.consumed_triplets // BATCH + 1)
        return read(stream)

    with mock.patch.object(PackStream, "_read", seed_and_read):
        yield


def own_model(pre_process: bool = True, post_process: bool = True, **others: Any) -> GPTModel:
    """The model of a fork's own script: a GPTModel (here of plain layers that know packs), with the usual head."""
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    transformer = core_transformer_config_from_args(args)
    return GPTModel(
        transformer,
        layer_spec(transformer, transformer_engine=False, vp_stage=None),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
    )


def pretrain_of_016(
    train_valid_test_dataset_provider: Any,
    model_provider: Any,
    model_type: Any,
    forward_step_func: Any,
    extra_args_provider: Any = None,
    args_defaults: Any = None,
) -> None:
    """`pretrain` in the form of 0.16, in terms of the one at hand."""
    from megatron.training import training
    from megatron.training.argument_utils import pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args

    container = pretrain_cfg_container_from_args(
        parse_and_validate_args(extra_args_provider, False, args_defaults or {})
    )
    provider = train_valid_test_dataset_provider
    training.pretrain(container, provider, model_type, forward_step_func, model_provider=model_provider)


def checkpoints(folder: Path) -> dict[str, Path]:
    """What our trainer saved, what Megatron-LM saved, and what `convert import` writes."""
    if torch.distributed.get_rank() == 0:
        import_model(folder / "model", folder / "imported", verification="tensors")
    torch.distributed.barrier()
    step = f"iter_{SAVED:07d}"
    return {
        "ours": folder / "tp2" / "checkpoints" / step,
        "megatron-lm": folder / "saved" / step,
        "import": folder / "imported",
    }


def loadable(checkpoint: Path, directory: Path) -> Path:
    """What the README says to do so that `--load` takes a checkpoint as a model."""
    if torch.distributed.get_rank() == 0:
        directory.mkdir()
        (directory / "release").symlink_to(checkpoint)
        (directory / "latest_checkpointed_iteration.txt").write_text("release\n")
    torch.distributed.barrier()
    return directory


REFUSED: dict[str, dict[str, Any]] = {
    "no cached reference log-probs": {"solopo_reference_cache": "/nonexistent"},
    "the cached reference log-probs are stale, made for another weights": {"solopo_reference_model_path": None},
    "raise --solopo-max-tokens-per-pack": {"micro_batch_size": 4, "solopo_max_tokens_per_pack": 150},
    "ffn_hidden_size is 64, expected 48": {"ffn_hidden_size": 64},
    "--calculate-per-token-loss": {"calculate_per_token_loss": None},
    "--solopo-label-smoothing": {"solopo_label_smoothing": 0.7},
}


def refusal(argv: list[str]) -> str:
    with pytest.raises(UserError) as error:
        pretrain(argv)
    return str(error.value)


def run_with_evaluation(argv: list[str], **keywords: Any) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    from megatron.training import training

    evaluated = []
    evaluate = training.evaluate

    def spy(*arguments: Any, **keywords: Any) -> Any:
        result = evaluate(*arguments, **keywords)
        evaluated.append({name: float(value) for name, value in result[0].items()})
        return result

    with mock.patch.object(training, "evaluate", spy):
        return pretrain(argv, **keywords), evaluated


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_inputs(tmp_path_factory.mktemp("megatron_lm"), rows=14, eval_count=4)
    make_model(path / "moe", "qwen2_moe", seed=0)
    make_model(path / "reference_moe", "qwen2_moe", seed=1)
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    """The last rank's results: it is on the last stage, where losses are."""
    result: dict[str, Any] = run_distributed(run_all, 2, folder)[-1]
    return result


def assert_equal_steps(theirs: list[dict[str, float]], ours: list[dict[str, Any]], *, same_tokens: bool = True) -> None:
    """Losses, rewards and gradient norms to rounding in float32, and the real tokens of the batch.

    Args:
        same_tokens: whether both share prompts or neither does. Tokens of a shared prompt count once.
    """
    assert len(theirs) == len(ours) > 0
    for name in ("num_tokens", "loss", "grad_norm", "rewards/chosen", "solo_ra/gap_signed"):
        wanted, found = ([step[name] for step in steps] for steps in (ours, theirs))
        if name == "num_tokens" and not same_tokens:
            assert all(more > fewer for more, fewer in zip(found, wanted, strict=True))
            continue
        assert found == pytest.approx(wanted, rel=2e-5, abs=1e-6), name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_losses_and_gradient_norms_are_our_trainers(found: dict[str, Any], folder: Path, layout: str) -> None:
    ours = recorded(folder, layout)
    assert len(ours) == STEPS
    assert_equal_steps(found[layout], ours, same_tokens=layout != "dp2")


@pytest.mark.parametrize("name", [*EXPERTS, "frozen"])
def test_experts_are_trained_as_by_our_trainer(found: dict[str, Any], folder: Path, name: str) -> None:
    assert_equal_steps(found[name], recorded(folder, name))
    assert recorded(folder, "ep2")[-1]["loss"] != recorded(folder, "frozen")[-1]["loss"]


@pytest.mark.parametrize("layout", ADAPTERS)
def test_adapters_are_trained_as_by_our_trainer(found: dict[str, Any], folder: Path, layout: str) -> None:
    ours = recorded(folder, f"lora-{layout}")
    assert_equal_steps(found[f"lora-{layout}"], ours)
    assert ours[-1]["loss"] != ours[0]["loss"]


def test_megatron_lm_saves_adapters_alone_and_continues_with_them(found: dict[str, Any], folder: Path) -> None:
    saved = folder / "lora-tp2-saved" / f"iter_{SAVED:07d}"
    assert all("_adapter." in name for name in MegatronDirectory(saved).tensors)
    assert_equal_steps(found["lora-resumed"][:1], recorded(folder, "lora-tp2")[SAVED : SAVED + 1])
    assert "--load" in found["refused whole"] and "holds no adapters" in found["refused whole"]
    for name in ("alpha", "base", "release", "save"):
        assert "belong to other weights or to other --solopo-lora flags" in found[f"refused {name}"]


def test_a_description_of_adapters_that_lacks_a_setting_means_its_default(tmp_path: Path) -> None:
    lora, base = LoRAConfig(), Path("model")
    older = json.loads(adapter_files(lora, base, "hash")[ADAPTER_CONFIG])
    del older["lora_dropout"], older["use_rslora"]
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(older))
    _check_description(adapter_files(lora, base, "hash"), "--save", [tmp_path], is_needed=False)
    with pytest.raises(UserError, match="belong to other weights or to other --solopo-lora flags"):
        changed = adapter_files(LoRAConfig(dropout=0.1), base, "hash")
        _check_description(changed, "--save", [tmp_path], is_needed=False)


@pytest.mark.usefixtures("found")
@pytest.mark.parametrize("layout", ADAPTERS)
def test_its_adapters_are_exported(folder: Path, layout: str) -> None:
    exported = []
    for checkpoint in (folder / f"lora-{layout}" / "checkpoints", folder / f"lora-{layout}-saved"):
        output = folder / f"exported-{layout}-{len(exported)}"
        export_adapter(checkpoint / f"iter_{STEPS:07d}", output, dtype=None)
        exported.append(load_file(output / "adapter_model.safetensors"))
    torch.testing.assert_close(exported[1], exported[0], rtol=2e-3, atol=1e-5)
    merged = folder / f"merged-{layout}"
    report = export_model(
        folder / f"lora-{layout}-saved" / f"iter_{STEPS:07d}", merged, dtype=None, verification="tensors", merge=True
    )
    assert not report.failures


def test_a_model_and_a_call_of_their_own_give_the_same(found: dict[str, Any], folder: Path) -> None:
    assert_equal_steps(found["own"], recorded(folder, "dp2"), same_tokens=False)


def test_evaluation_is_our_trainers(found: dict[str, Any], folder: Path) -> None:
    """After steps 2 and 4, and Megatron-LM's own at the end once more; one pass over all four held-out triplets."""
    ours = [step for step in recorded(folder, "tp2") if "eval_loss" in step]
    theirs = found["evaluated"][: len(ours)]
    assert len(ours) == 2
    for name in theirs[0]:
        wanted = [step[f"eval_{name}"] for step in ours]
        assert [step[name] for step in theirs] == pytest.approx(wanted, rel=1e-4, abs=1e-5), name


def test_every_metric_is_on_disk_whatever_its_sign(found: dict[str, Any], folder: Path) -> None:
    ours, theirs = recorded(folder, "tp2"), read_jsonl(folder / "megatron_lm.jsonl")
    assert [step["step"] for step in theirs] == list(range(1, STEPS + 1))
    assert any(step["rewards/chosen"] < 0 for step in theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert other.pop("pack_fill") == pytest.approx(mine["pack_fill"] / BATCH)  # as many packs as triplets
        assert other == pytest.approx({name: mine[name] for name in other}, rel=2e-4, abs=1e-5)
    missing = set(ours[0]) - set(theirs[0]) - {"pack_fill"}
    timing = {"step_time", "tokens_per_second", "mfu", "peak_memory_bytes", "flops", "num_processes"}
    timing |= {"straggler_rank", "straggler_share"}
    of_our_trainer = {"grad_norm", "learning_rate", "skipped", "skipped_steps"} | timing
    assert missing == of_our_trainer | {name for name in missing if name.startswith("eval_")}


def test_megatron_lm_continues_its_own_run_on_the_next_triplets(found: dict[str, Any], folder: Path) -> None:
    assert len(found["resumed"]) == STEPS - SAVED
    assert_equal_steps(found["resumed"][:1], recorded(folder, "tp2")[SAVED : SAVED + 1])  # until its Adam starts anew
    steps = recorded(folder, "tp2-lm")
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("source", ["ours", "megatron-lm", "import"])
def test_either_trainer_starts_from_the_others_checkpoint(found: dict[str, Any], folder: Path, source: str) -> None:
    ours = recorded(folder, f"from-{source}")
    assert_equal_steps(found[f"from {source}"], ours)
    initial = [step["loss"] for step in recorded(folder, "pp2")]
    assert ([step["loss"] for step in ours] == pytest.approx(initial, rel=1e-5)) == (source == "import")


def test_our_checkpoint_is_a_model_path(found: dict[str, Any], folder: Path) -> None:
    assert_equal_steps(found["model path"], recorded(folder, "from-ours"))


@pytest.mark.parametrize("part", REFUSED)
def test_what_does_not_fit_is_refused_by_name(found: dict[str, Any], part: str) -> None:
    message = found["refused"][part]
    assert part in message and "\n" not in message
