"""Before step 0: ranks that differ are named, what does not fit is one line, and trying it leaves no trace."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from megatron_solopo import cpu_features
from megatron_solopo.architecture.huggingface_config import read_architecture
from megatron_solopo.config import Config, ObjectiveConfig
from megatron_solopo.cpu_features import is_cpu
from megatron_solopo.data.loader import TripletDataset
from megatron_solopo.data.prepared import load_prepared
from megatron_solopo.errors import UserError
from megatron_solopo.files import described_bytes
from megatron_solopo.plan.disk import checkpoint_bytes
from megatron_solopo.train import preflight as preflight_module
from megatron_solopo.train import trainer as trainer_module
from megatron_solopo.train.trainer import precompute_reference, preflight, train
from tests.distributed import run_distributed
from tests.layouts import pp
from tests.tiny_models import TINY
from tests.train.runs import make_inputs, recorded, small_config

TP2_PP2 = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}


def config(folder: Path, name: str, **sections: Any) -> Config:
    training = {"global_batch_size": 4, "max_steps": 2, **sections.pop("training", {})}
    parallel = sections.pop("parallel", TP2_PP2)
    return small_config(folder, name, parallel, training=training, objective={"loss_type": "simpo"}, **sections)


def refused(settings: Config) -> str:
    with pytest.raises(UserError) as error:
        preflight(settings)
    return str(error.value)


def out_of_memory(*arguments: Any, **keywords: Any) -> Any:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def run_all(folder: Path) -> dict[str, Any]:
    rank = dist.get_rank()
    found: dict[str, Any] = {"rows": preflight(config(folder, "rows"))}
    left = sorted(path.name for path in (folder / "rows").iterdir())
    data = load_prepared(folder / "prepared").train
    dataset = TripletDataset(data, {"short": "prompt_short", "long": "prompt_long"}, TINY)
    longest = int(dataset.sizes(ObjectiveConfig().roles.all, 1, share_prompts=True).padded_tokens.max())
    found["longest"] = longest + longest % 2
    mine = {"optimizer": {"lr": 1e-2 if rank == 3 else 1e-3}}
    found["config"] = refused(config(folder, "differs", **mine))
    sizes = {"parallel": {"tensor_model_parallel_size": 4 if rank == 2 else 2}}
    found["layout"] = refused(config(folder, "differs", **sizes))
    with mock.patch.object(preflight_module, "_appears", lambda path: rank != 1):
        found["shared"] = refused(config(folder, "differs"))
    full = mock.Mock(free=1000 + rank)
    with mock.patch.object(preflight_module.psutil, "disk_usage", lambda path: full):
        found["full"] = refused(config(folder, "differs"))
    short = config(folder, "short")
    one = found["one"] = checkpoint_bytes(short, read_architecture(short.model.path))
    found["short of room"] = []
    # The second one has its checkpoint already: the two steps of the run make two.
    with (
        mock.patch.object(preflight_module.psutil, "disk_usage", lambda path: mock.Mock(free=2 * one - 1)),
        mock.patch.object(preflight_module, "say", found["short of room"].append),
        mock.patch.object(trainer_module, "say", found.setdefault("without effect", []).append),
    ):
        found["room"] = [preflight(config(folder, "short", profile={"ranks": [1]}))]
        (folder / "short" / "checkpoints" / "iter_0000001").mkdir(parents=True, exist_ok=True)
        found["room"].append(preflight(short))
    with mock.patch.object(preflight_module, "run_schedule", out_of_memory):
        found["memory"] = refused(config(folder, "differs"))
    found["packs"] = {}
    for chunks, batch in ((None, 8), (2, 8), (2, 4)):
        with mock.patch.object(preflight_module, "run_schedule") as run:
            preflight(config(folder, "packs", parallel=pp(2, chunks), training={"global_batch_size": batch}))
        found["packs"][chunks, batch] = len(run.call_args.args[1])
    for name, tried in (("tried", True), ("untried", False)):
        train(config(folder, name, training={"try_largest_pack": tried}))
    return found | {"left": left}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("preflight"))


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return run_distributed(run_all, 4, folder)


@pytest.mark.skipif(not is_cpu(), reason="GPUs compute fast in bfloat16")
@pytest.mark.parametrize("start", [train, preflight, partial(precompute_reference, overwrite=False)])
def test_slow_bfloat16_is_told_at_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], start: Callable[[Config], Any]
) -> None:
    monkeypatch.setattr(cpu_features, "has_bfloat16_kernels", lambda: False)
    for dtype in ("float32", "bfloat16"):
        values = {"model": {"path": tmp_path / "missing", "dtype": dtype}, "objective": {"loss_type": "dpo"}}
        with pytest.raises(UserError, match="missing"):
            start(small_config(tmp_path, "run", {}, **values))
        told = "model.dtype=float32 is several times as fast" in capsys.readouterr().err
        assert told is (dtype == "bfloat16")


def test_what_was_checked_is_told(found: list[dict[str, Any]]) -> None:
    rows = dict(found[0]["rows"])
    assert list(rows) == ["data and models", "same start", "run directory", "groups", "largest pack"]
    assert "1 model: " in rows["data and models"] and "1 tokenizer not known" in rows["data and models"]
    assert "tensor-parallel 2" in rows["groups"] and "all 4" in rows["groups"] and "embedding 2" in rows["groups"]
    assert "tokens" in rows["largest pack"] and "peak memory" in rows["largest pack"]
    assert found[0]["left"] == [], "nothing stays in the run directory"


def test_room_for_one_checkpoint_and_not_for_all_is_a_warning_with_the_bytes(found: list[dict[str, Any]]) -> None:
    first, second = (dict(rows)["run directory"] for rows in found[0]["room"])
    for row in (first, second):
        assert "per checkpoint" in row and "for the 2 that the run has at most at once" in row
    (line,) = found[0]["short of room"]  # not of the second: the checkpoint that is there needs no room
    assert line.startswith("warning: run_dir=") and "lower checkpoint.keep_last" in line and "\n" not in line
    one = found[0]["one"]
    assert f"{described_bytes(2 * one - 1)} free, {described_bytes(one)} per checkpoint" in line
    assert f"take {described_bytes(2 * one)} (2 checkpoints at most at once)" in line


def test_a_key_without_effect_is_named_before_the_first_step(found: list[dict[str, Any]]) -> None:
    first, second = found[0]["without effect"]
    assert first.startswith("warning: no effect in this run: reference.cache=") and "\n" not in first
    assert first == f"{second}, profile.ranks=[1] (profile.steps=null)"


@pytest.mark.parametrize(
    ("what", "parts"),
    [
        ("config", ["optimizer.lr is 0.001 on rank 0 (", "0.01 on rank 3 ("]),
        ("layout", ["parallel.tensor_model_parallel_size is 2 on rank 0 (", "4 on rank 2 ("]),
        ("shared", ["run_dir=", "rank 1 (", "cannot see"]),
        ("full", ["run_dir=", "1,000 bytes free", "one checkpoint takes"]),
        ("memory", ["out of memory", "tokens of row-", "data.max_tokens_per_pack=200", "recompute_granularity=full"]),
    ],
)
def test_a_mistake_is_one_line_that_names_it(found: list[dict[str, Any]], what: str, parts: list[str]) -> None:
    for rank in found:
        assert all(part in rank[what] for part in parts) and "\n" not in rank[what], rank[what]


def test_the_trial_runs_as_many_packs_as_make_the_peak_and_as_a_step_can_have(found: list[dict[str, Any]]) -> None:
    """Two replicas. The interleaved schedule keeps two rounds of packs, but 2 triplets make 2 packs."""
    for rank in found:
        assert rank["packs"] == {(None, 8): 2, (2, 8): 4, (2, 4): 2}


def test_the_trial_leaves_no_trace(found: list[dict[str, Any]], folder: Path) -> None:
    tried = recorded(folder, "tried")
    assert len(tried) == 2 and tried == recorded(folder, "untried")


def test_the_largest_pack_is_the_largest(found: list[dict[str, Any]], folder: Path) -> None:
    """With one triplet per pack: the longest triplet of the training split, padded to a multiple of TP."""
    assert dict(found[0]["rows"])["largest pack"].startswith(f"{found[0]['longest']} tokens")
