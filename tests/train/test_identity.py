"""Second runs in one run directory: what differs is refused or said, and a refused run changes no file."""

import contextlib
import io
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch.distributed as dist
from safetensors.torch import load_file, save_file

from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.checkpoint.manifest import sealed_files, write_manifest
from megatron_solopo.data.prepared import load_prepared
from megatron_solopo.errors import UserError
from megatron_solopo.files import read_jsonl
from megatron_solopo.train.identity import RunIdentity
from megatron_solopo.train.run_data import load_run_sources
from megatron_solopo.train.trainer import train
from tests.distributed import run_distributed
from tests.ranks import layout
from tests.tiny_models import make_model
from tests.train.runs import make_inputs, small_config

STEPS, SAVED, LR = 4, 2, 1e-3
TP2, DP2 = {"tensor_model_parallel_size": 2}, dict[str, Any]()


def launch(folder: Path, name: str, parallel: dict[str, Any] = TP2, **sections: dict[str, Any]) -> str:
    """On every rank: run `name`; returns what rank 0 said, or the error."""
    base: dict[str, dict[str, Any]] = {
        "training": {"global_batch_size": 4, "max_steps": STEPS},
        "optimizer": {"lr": LR},
        "checkpoint": {"save_steps": SAVED},
        "reference": {},
    }
    base |= {key: base.get(key, {}) | section for key, section in sections.items()}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        try:
            train(small_config(folder, name, parallel, **base))
        except UserError as error:
            return f"error: {error}"
    return said.getvalue()


def interrupted(folder: Path, name: str, source: str = "whole") -> Path:
    """On every rank: a copy of a run as it was when it had saved its first checkpoint."""
    if dist.get_rank() == 0:
        shutil.copytree(folder / source, folder / name)
        shutil.rmtree(folder / name / "checkpoints" / f"iter_{STEPS:07d}")
        (folder / name / "checkpoints" / "latest").write_text(f"iter_{SAVED:07d}\n")
    dist.barrier()
    return folder / name


def content(run: Path) -> dict[str, bytes]:
    """Every file of a run directory, except the lock."""
    files = [file for file in sorted(run.rglob("*")) if file.is_file() and file.name != ".lock"]
    return {str(file.relative_to(run)): file.read_bytes() for file in files}


def refused(folder: Path, name: str, **sections: dict[str, Any]) -> str:
    """On every rank: the error of a run that continues `name` with other settings, and changes nothing there."""
    before = content(folder / name)
    error = launch(folder, name, **sections)
    after = content(folder / name)
    assert after == before, [key for key in after.keys() | before.keys() if after.get(key) != before.get(key)]
    return error


def on_rank_0(action: Any, *arguments: Any) -> None:
    if dist.get_rank() == 0:
        action(*arguments)
    dist.barrier()


def add_to_cache(run: Path, number: float) -> None:
    file = run / "reference" / "train.parquet"
    table = pq.read_table(file).to_pandas()
    table[table.columns[1:]] += np.float32(number)
    table.to_parquet(file, index=False)


def forget(run: Path, *keys: str) -> None:
    """Make the checkpoint one of a version that did not keep these keys."""
    checkpoint = run / "checkpoints" / f"iter_{SAVED:07d}"
    state = json.loads((checkpoint / "trainer.json").read_text())
    state["identity"]["reference.cache (its numbers)"] = state.pop("reference")["sha256"]
    for key in keys:
        del state["identity"][key]
    (checkpoint / "trainer.json").write_text(json.dumps(state))
    names = [str(file.relative_to(checkpoint)) for file in checkpoint.rglob("*") if file.is_file()]
    write_manifest(checkpoint, sealed_files(checkpoint, [name for name in names if name != "manifest.json"]))


def edit_one_number(source: Path, target: Path) -> None:
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})


def run_all(folder: Path) -> dict[str, str]:
    """On every rank: what each second run says."""
    found = {"whole": launch(folder, "whole")}
    interrupted(folder, "second")
    found["other"] = refused(folder, "second", model={"path": folder / "other"})
    found["edited"] = refused(folder, "second", model={"path": folder / "edited"})
    found["objective"] = refused(folder, "second", objective={"alpha": 1.0})
    found["context"] = refused(folder, "second", reference={"context": "short"})
    found["longer"] = refused(folder, "whole", training={"global_batch_size": 4, "max_steps": 8})
    found["shorter"] = refused(folder, "whole", training={"global_batch_size": 4, "max_steps": 3})
    found["again"] = launch(folder, "whole")
    eight = {"global_batch_size": 4, "max_steps": 8}
    for name, steps in (("kept", 4), ("redrawn", 8)):
        on_rank_0(shutil.copytree, folder / "whole", folder / name)
        found[name] = launch(folder, name, training=eight, optimizer={"lr": LR, "lr_decay_iters": steps})
    on_rank_0(shutil.rmtree, interrupted(folder, "lost") / "reference")
    found["lost"] = launch(folder, "lost")
    on_rank_0(shutil.rmtree, interrupted(folder, "layout") / "reference")
    separate = {"path": folder / "prepared", "max_tokens_per_pack": 200, "max_triplets_per_pack": 1}
    found["layout"] = launch(folder, "layout", DP2, data=separate | {"share_prompts": False})
    on_rank_0(add_to_cache, interrupted(folder, "far"), 0.5)
    found["far"] = refused(folder, "far")
    keys = ("model.path (its weights)", "reference.model_path (its weights)", "optimizer.lr_decay_iters")
    on_rank_0(
        forget, interrupted(folder, "older"), *keys, "data.path (its tokens)", "optimizer.min_lr", "reference.context"
    )
    found["older"] = launch(folder, "older")
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_inputs(tmp_path_factory.mktemp("runs"))
    make_model(path / "other", "qwen2_tied", seed=7)
    edit_one_number(path / "model", path / "edited")
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> Mapping[str, str]:
    result: Mapping[str, str] = run_distributed(run_all, 2, folder)[0]
    assert all(said.count("\n") == 0 for said in result.values() if said.startswith("error: "))
    return result


def rates(folder: Path, name: str) -> list[float]:
    return [step["learning_rate"] for step in read_jsonl(folder / name / "metrics.jsonl")]


def losses(folder: Path, name: str) -> list[float]:
    return [step["loss"] for step in read_jsonl(folder / name / "metrics.jsonl")]


@pytest.mark.parametrize("name", ["other", "edited"])
def test_another_model_of_the_same_config_is_refused_and_no_file_changes(
    name: str, found: Mapping[str, str], folder: Path
) -> None:
    assert (folder / "model" / "config.json").read_bytes() == (folder / name / "config.json").read_bytes()
    assert f"but now model.path={folder / name} holds other weights; restore that, or set run_dir" in found[name]


def test_a_key_that_was_not_set_is_called_so(found: Mapping[str, str]) -> None:
    assert "objective.alpha=1.0 (it was null)" in found["objective"]
    assert "reference.context=short (it was null)" in found["context"]


def test_more_steps_do_not_draw_the_learning_rate_anew_unasked(found: Mapping[str, str]) -> None:
    message = found["longer"]
    assert "falls until step 4, and training.max_steps=8 would move that to step 8" in message
    assert "set optimizer.lr_decay_iters=4 " in message and "or optimizer.lr_decay_iters=8 " in message


def test_fewer_steps_than_done_are_refused(found: Mapping[str, str]) -> None:
    assert (
        found["shorter"].startswith("error: training.max_steps=3: ") and "has done 4 steps already" in found["shorter"]
    )


def test_the_same_number_of_steps_again_is_complete(found: Mapping[str, str]) -> None:
    assert "all 4 steps are done" in found["again"] and "error" not in found["again"]


def test_a_kept_decay_stays_at_its_end(found: Mapping[str, str], folder: Path) -> None:
    assert rates(folder, "kept") == [*rates(folder, "whole"), 0.0, 0.0, 0.0, 0.0]
    assert "stays at optimizer.min_lr=0 after step 4 of 8" in found["kept"]
    assert "those steps change nothing" in found["kept"]


def test_a_redrawn_decay_is_said_with_both_learning_rates(found: Mapping[str, str], folder: Path) -> None:
    after = rates(folder, "redrawn")
    assert after[:4] == rates(folder, "whole") and after[4] == pytest.approx(LR / 2)
    assert "optimizer.lr_decay_iters=8 (it was 4)" in found["redrawn"]
    assert "learning rate of step 5: 0.0005 (it would have been 0)" in found["redrawn"]


def test_a_lost_reference_cache_is_computed_again(found: Mapping[str, str], folder: Path) -> None:
    assert "at step 3" in found["lost"] and "reference log-probs" not in found["lost"]
    assert losses(folder, "lost") == losses(folder, "whole")


def test_another_layout_may_compute_the_reference_again(found: Mapping[str, str], folder: Path) -> None:
    assert "at step 3" in found["layout"] and "the reference log-probs were computed again" in found["layout"]
    assert "will not have the same bits" in found["layout"]
    assert "note: data.share_prompts=false (it was true): the run computes the same, but rounds" in found["layout"]
    assert losses(folder, "layout") == pytest.approx(losses(folder, "whole"), rel=1e-5)


def test_reference_numbers_beyond_rounding_are_refused(found: Mapping[str, str], folder: Path) -> None:
    assert "the reference log-probs of the train split are others than this run was trained with" in found["far"]
    assert f"bring back {folder / 'far' / 'reference'}" in found["far"] and "or set run_dir" in found["far"]


def test_a_checkpoint_of_an_older_version_continues_and_says_what_was_not_compared(
    found: Mapping[str, str], folder: Path
) -> None:
    (note,) = (line for line in found["older"].splitlines() if "older version" in line)
    assert "iter_0000002 is of an older version" in note
    assert "model.path (its weights), data.path (its tokens), reference.model_path (its weights)" in note
    assert "optimizer.lr_decay_iters" in note and "min_lr" not in note
    assert losses(folder, "older") == losses(folder, "whole")


def identity(folder: Path, **sections: Any) -> RunIdentity:
    config = small_config(folder, "sections", {}, **sections)
    prepared = [load_prepared(folder / "prepared") for _ in config.sources]
    return RunIdentity(config, load_run_sources(config, read_architecture(folder / "model"), prepared), STEPS)


def test_settings_that_mean_the_same_are_the_same_however_they_are_written(folder: Path) -> None:
    def settings(modules: list[str] | str, weights: tuple[float, float], **objective: Any) -> dict[str, Any]:
        sources = [
            {"path": folder / "prepared", "name": name, "weight": weight}
            for name, weight in zip("ab", weights, strict=True)
        ]
        data = {"sources": sources, "max_tokens_per_pack": 200}
        return {"lora": {"target_modules": modules}, "data": data, "objective": {"loss_type": "dpo"} | objective}

    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    with layout():
        kept = json.loads(json.dumps(identity(folder, **settings("all-linear", (6.0, 2.0))).values))
        saved = {"step": SAVED, "identity": kept}
        written = settings(modules[::-1], (3.0, 1.0), alpha=3.0, ld_alpha=1.0, loss_type="sigmoid")
        same = identity(folder, **written)
        assert same.check(saved, folder / "kept") == []
        del kept["objective.alpha"]
        assert same.check(saved, folder / "kept") == []
        changed = identity(folder, **settings(modules[1:], (3.0, 2.0), alpha=1.0, ld_alpha=0.5))
        with pytest.raises(UserError) as error:
            changed.check(saved, folder / "kept")
    assert f"lora.target_modules={modules[1:]} (it was all-linear)" in str(error.value)
    assert "sources.a.weight=3.0 (it was 6.0)" in str(error.value) and "sources.b" not in str(error.value)
    assert "objective.alpha=1.0 (it was not set, which means null)" in str(error.value)
    assert "objective.ld_alpha=0.5 (it was null)" in str(error.value)


def test_a_section_is_compared_by_its_keys_and_one_that_was_not_kept_had_its_default(folder: Path) -> None:
    model = {"path": folder / "model", "dtype": "bfloat16", "fp8": "hybrid", "fp8_recipe": "blockwise"}

    with layout():
        plain, dropped = (identity(folder, model=model, lora={"rank": 4} | lora) for lora in ({}, {"dropout": 0.1}))
        kept = json.loads(json.dumps(plain.values))
        del kept["lora"]["dropout"], kept["model.fp8"]["first_last_layers_bf16"]
        saved = {"step": SAVED, "identity": kept}
        assert plain.check(saved, folder / "older") == []
        kept["model.fp8"]["fp8_recipe"] = "tensorwise"
        with pytest.raises(
            UserError, match=r"but now model.fp8_recipe=blockwise \(it was tensorwise\), lora.dropout=0.1 \(it was 0"
        ):
            dropped.check(saved, folder / "older")
        kept["lora"] = None
        with pytest.raises(UserError, match=r"lora=\{'rank': 4, .* \(it was null\)"):
            plain.check(saved, folder / "older")
