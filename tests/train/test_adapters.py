"""Whole runs with adapters: they continue under every layout, and PEFT and transformers load what is exported."""

import hashlib
import json
import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  (imported once, before ranks are forked)
from transformers import AutoModelForCausalLM

from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.checkpoint.conversion import export_adapter, export_model
from megatron_solopo.checkpoint.peft_directory import ADAPTER_WEIGHTS
from megatron_solopo.config import Config, LoRAConfig, ParallelConfig
from megatron_solopo.errors import UserError
from megatron_solopo.evaluate.megatron_model import MegatronModel
from megatron_solopo.evaluate.preference import evaluate_preference
from megatron_solopo.plan.disk import checkpoint_bytes
from megatron_solopo.results.preference import read_preference
from megatron_solopo.run_directory import find_subject
from megatron_solopo.train import trainer
from megatron_solopo.train.policy import Policy
from megatron_solopo.train.trainer import train
from tests.distributed import run_distributed
from tests.layouts import pp, tp
from tests.ranks import layout
from tests.tiny_models import make_adapter
from tests.train.runs import make_inputs, recorded, small_config

pytestmark = pytest.mark.parity

SAVED, LAST = "iter_0000002", "iter_0000004"
LORA = {"rank": 4, "alpha": 8.0}
NO_TOKENIZER: Any = SimpleNamespace(eos_token_id=None)
CONTINUED = {"same": tp(2), "pp2": pp(2), "dp2": {}}


def config(folder: Path, name: str, parallel: dict[str, Any], **sections: Any) -> Config:
    """Run `name` of four steps, with a checkpoint in the middle."""
    return small_config(
        folder,
        name,
        parallel,
        **{
            "lora": LORA,
            "checkpoint": {"save_steps": 2},
            "optimizer": {"lr": 1e-2, "lr_warmup_iters": 1, "adam_eps": 1e-4},
            **sections,
        },
    )


def run_on_two(folder: Path) -> dict[str, Any]:
    """On every rank: a whole run, its continuations, runs beside it, and what is refused."""
    found: dict[str, Any] = {"frozen": frozen_hashes(folder)}
    for name, parallel in CONTINUED.items():
        if torch.distributed.get_rank() == 0:
            shutil.copytree(folder / "whole" / "checkpoints" / SAVED, folder / name / "checkpoints" / SAVED)
        torch.distributed.barrier()
        train(config(folder, name, parallel))
    # The learning rate of the first step is 0: the adapters stay as they are.
    from_peft = {"model": {"path": folder / "model", "adapter": folder / "model" / "adapter-4"}}
    short = {"training": {"global_batch_size": 4, "max_steps": 2}, "checkpoint": {"save_steps": 1}}
    train(config(folder, "peft-run", tp(2), **from_peft, **short))
    run_with_dropout(folder)
    found["evaluated"] = evaluate_both(folder)
    found["caches"] = share_caches(folder)
    found["refused"] = {}
    for name, (run, more) in refused_changes(folder).items():
        with pytest.raises(UserError) as error:
            train(config(folder, run, tp(2), **more))
        found["refused"][name] = str(error.value)
    return found


def refused_changes(folder: Path) -> dict[str, tuple[str, dict[str, Any]]]:
    """What is refused: the run that is to continue, and what changed."""
    other = folder / "other-adapter"
    if torch.distributed.get_rank() == 0:
        shutil.copytree(folder / "model" / "adapter-4", other)
        tensors = load_file(other / ADAPTER_WEIGHTS)
        next(iter(tensors.values()))[0, 0] += 1e-3
        save_file(tensors, other / ADAPTER_WEIGHTS)
    torch.distributed.barrier()
    short = {"training": {"global_batch_size": 4, "max_steps": 2}, "checkpoint": {"save_steps": 1}}
    return {
        "rank": ("whole", {"lora": LORA | {"rank": 8}}),
        "none": ("whole", {"lora": None}),
        "base": ("whole", {"model": {"path": folder / "reference_model"}}),
        "start": ("peft-run", {"model": {"path": folder / "model", "adapter": other}, **short}),
        "no start": ("peft-run", short),
    }


def run_with_dropout(folder: Path) -> None:
    """A run, one that continues it, and those that compute activations again.

    In a pipeline that happens when other packs have drawn masks in between.
    """
    lora = {"lora": LORA | {"dropout": 0.3}}
    train(config(folder, "dropout", tp(2), **lora))
    if torch.distributed.get_rank() == 0:
        shutil.copytree(folder / "dropout" / "checkpoints" / SAVED, folder / "dropout-same" / "checkpoints" / SAVED)
    torch.distributed.barrier()
    train(config(folder, "dropout-same", tp(2), **lora))
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    train(config(folder, "dropout-recompute", tp(2, **recompute), **lora))

    train(config(folder, "dropout-pp2", pp(2), **lora))
    train(config(folder, "dropout-pp2-recompute", pp(2, **recompute), **lora))


def evaluate_both(folder: Path) -> dict[str, Any]:
    """Scores and generated tokens of the run's checkpoint, and of the model with the adapters merged."""
    checkpoint, merged = folder / "whole" / "checkpoints" / LAST, folder / "merged"
    if torch.distributed.get_rank() == 0:
        export_model(checkpoint, merged, dtype=None, verification="none", merge=True)
    torch.distributed.barrier()
    found: dict[str, Any] = {}
    for name, path in (("adapters", checkpoint), ("merged", merged)):
        output = folder / f"{name}.json"
        evaluate_preference(find_subject(path, "--model"), config(folder, "whole", pp(2)), split="eval", output=output)
        sizes = tp(2, sequence_parallel=False)
        with layout(**sizes) as groups:
            model = MegatronModel(path, NO_TOKENIZER, "float32", ParallelConfig(**sizes), groups)
            found[name] = model.generate(torch.arange(1, 41)[None], 16, end_tokens=()).tolist()
    return found


def share_caches(folder: Path) -> list[bool]:
    """Whether a run read the cache that the other kind of run had made, and left it as it was."""
    found = []
    for name, cache, lora in (("full", "reference", None), ("full-first", "reference-full", None)):
        before = written_at(folder / cache)
        train(config(folder, name, tp(2), lora=lora, **two_steps(folder / cache)))
        found.append(before == written_at(folder / cache))
    before = written_at(folder / "reference-full")
    train(config(folder, "lora-second", tp(2), **two_steps(folder / "reference-full")))
    return [*found, before == written_at(folder / "reference-full")]


def two_steps(cache: Path) -> dict[str, Any]:
    return {"training": {"global_batch_size": 4, "max_steps": 2}, "reference": {"cache": cache}}


def written_at(folder: Path) -> list[int]:
    torch.distributed.barrier()
    return [file.stat().st_mtime_ns for file in sorted(folder.rglob("*.parquet"))]


def frozen_hashes(folder: Path) -> dict[str, list[str]]:
    """Hashes of this rank's frozen parameters before and after a run, and after one that moves one number by a bit."""
    build, built = trainer.build_policy, []

    def spy(*arguments: Any) -> Policy:
        policy = build(*arguments)
        built.append((policy, frozen_hash(policy)))
        return policy

    def moves_a_bit(policy: Policy, *arguments: Any, **keywords: Any) -> Any:
        result = step(policy, *arguments, **keywords)
        frozen = next(each for each in policy.chunks[0].parameters() if not each.requires_grad)
        with torch.no_grad():
            frozen.view(-1)[0] = torch.nextafter(frozen.view(-1)[0], torch.tensor(math.inf))
        return result

    step = Policy.step
    with mock.patch.object(trainer, "build_policy", spy):
        train(config(folder, "whole", tp(2)))
        with mock.patch.object(Policy, "step", moves_a_bit):
            train(config(folder, "moved", tp(2), training={"global_batch_size": 4, "max_steps": 2}))
    return {name: [before, frozen_hash(policy)] for name, (policy, before) in zip(("run", "moved"), built, strict=True)}


def frozen_hash(policy: Policy) -> str:
    digest = hashlib.sha256()
    for chunk in policy.chunks:
        for name, parameter in chunk.named_parameters():
            if not parameter.requires_grad:
                digest.update(name.encode() + parameter.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_inputs(tmp_path_factory.mktemp("adapters"))
    make_adapter(path / "model", LoRAConfig(**LORA))
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = run_distributed(run_on_two, 2, folder)[0]
    return result


@pytest.fixture(scope="module")
def exported(folder: Path, found: dict[str, Any]) -> Path:
    export_adapter(folder / "whole" / "checkpoints" / LAST, folder / "adapter", dtype=None)
    return folder / "adapter"


@pytest.mark.usefixtures("found")
@pytest.mark.parametrize("name", CONTINUED)
def test_a_run_continues_under_another_layout(name: str, folder: Path) -> None:
    whole, continued = recorded(folder, "whole")[2:], recorded(folder, name)
    if name == "same":
        assert continued == whole, "bit by bit"
    for one, other in zip(continued, whole, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)


@pytest.mark.usefixtures("found")
def test_a_checkpoint_holds_no_base(folder: Path) -> None:
    metadata = FileSystemReader(folder / "whole" / "checkpoints" / LAST).read_metadata().state_dict_metadata
    tensors = [each for each in metadata.values() if isinstance(each, TensorStorageMetadata)]
    stored = sum(each.size.numel() * each.properties.dtype.itemsize for each in tensors)
    planned = checkpoint_bytes(config(folder, "whole", tp(2)), read_architecture(folder / "model"))
    assert stored == planned, "adapters, and Adam's three numbers for each of theirs"


def test_evaluation_sees_the_adapters(found: dict[str, Any], folder: Path) -> None:
    assert found["evaluated"]["adapters"] == found["evaluated"]["merged"]
    scores = {name: read_preference(folder / f"{name}.json").overall.metrics for name in ("adapters", "merged")}
    means = {name: {key: each.mean for key, each in metrics.items()} for name, metrics in scores.items()}
    assert means["adapters"] == pytest.approx(means["merged"], rel=1e-4, abs=1e-5)
    assert max(abs(means["adapters"][f"rewards/chosen_{each}"]) for each in ("short", "long")) > 1e-3, "unlike the base"


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(1, 60)[None]).logits[0]


def test_peft_loads_the_adapters(folder: Path, exported: Path) -> None:
    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    before = logits(base)
    adapted = PeftModel.from_pretrained(base, exported)
    assert (logits(adapted) - before).norm() > 1e-3 * before.norm()
    report = export_model(
        folder / "whole" / "checkpoints" / LAST, folder / "verified", dtype=None, verification="full", merge=True
    )
    assert not report.failures and "greatest relative error" in str(report)
    merged = AutoModelForCausalLM.from_pretrained(folder / "verified")
    torch.testing.assert_close(logits(merged), logits(adapted), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("found")
def test_an_adapter_of_peft_comes_back_bit_by_bit(folder: Path) -> None:
    export_adapter(folder / "peft-run" / "checkpoints" / "iter_0000001", folder / "back", dtype=None)
    before, after = (load_file(folder / name / "adapter_model.safetensors") for name in ("model/adapter-4", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    settings = json.loads((folder / "back" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)


@pytest.mark.parametrize(
    ("name", "part"),
    {
        "rank": "but now lora.rank=8 (it was 4);",
        "none": "lora=null",
        "base": "holds other weights",
        "start": "other-adapter: the run began with other adapters",
        "no start": "model.adapter=null: the run began with other adapters",
    }.items(),
)
def test_a_run_keeps_its_adapters_their_start_and_its_base(found: dict[str, Any], name: str, part: str) -> None:
    assert part in found["refused"][name] and "\n" not in found["refused"][name]


def test_no_bit_of_the_base_moves(found: dict[str, Any]) -> None:
    before, after = found["frozen"]["run"]
    assert before == after
    before, after = found["frozen"]["moved"]
    assert before != after, "the hash sees one bit"


@pytest.mark.usefixtures("found")
def test_dropout_is_the_same_in_a_continued_run_and_where_activations_are_computed_again(folder: Path) -> None:
    whole = recorded(folder, "dropout")
    assert recorded(folder, "dropout-same") == whole[2:], "bit by bit"
    for name in ("dropout", "dropout-pp2"):
        once, again = recorded(folder, name), recorded(folder, f"{name}-recompute")
        for key in ("loss", "grad_norm", "eval_loss"):
            assert [step.get(key) for step in again] == [step.get(key) for step in once], (name, key)
    plain = recorded(folder, "whole")
    assert plain[0]["loss"] == pytest.approx(whole[0]["loss"], abs=1e-6), "B is 0"
    assert plain[2]["loss"] != whole[2]["loss"]


def test_runs_with_and_without_adapters_share_a_reference_cache(found: dict[str, Any], folder: Path) -> None:
    full_after_lora, nothing_before, lora_after_full = found["caches"]
    assert full_after_lora and lora_after_full and not nothing_before
    assert recorded(folder, "full")[0]["loss"] == recorded(folder, "full-first")[0]["loss"]
    assert recorded(folder, "lora-second")[0]["loss"] == recorded(folder, "whole")[0]["loss"]


def test_an_export_says_what_it_writes(folder: Path, exported: Path) -> None:
    with pytest.raises(UserError, match="--adapter writes them for PEFT"):
        export_model(folder / "whole" / "checkpoints" / LAST, folder / "out", dtype=None, verification="none")
    whole = folder / "full" / "checkpoints" / SAVED
    for flag, export in (
        ("--adapter", lambda: export_adapter(whole, folder / "out", dtype=None)),
        ("--merge", lambda: export_model(whole, folder / "out", dtype=None, verification="none", merge=True)),
    ):
        with pytest.raises(UserError, match=f"holds a whole model and no adapters; leave out {flag}$"):
            export()
