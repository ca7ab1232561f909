"""Whole runs on two ranks: reference cache, resume, run directory. One launch runs them all."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch.utils.tensorboard import SummaryWriter  # noqa: F401  (imported once, before ranks are forked)

from megatron_solopo.config import Config, parse_config
from megatron_solopo.errors import UserError
from megatron_solopo.files import read_jsonl
from megatron_solopo.objective import compute_objective
from megatron_solopo.parallel import topology
from megatron_solopo.report.curves import curve_pictures
from megatron_solopo.report.figure import LIGHT
from megatron_solopo.report.runs import read_runs
from megatron_solopo.train.reference import reference_logprobs
from megatron_solopo.train.session import check_and_join
from megatron_solopo.train.trainer import precompute_reference, train
from tests.distributed import run_distributed
from tests.layouts import stages
from tests.prepared import make_prepared
from tests.train.runs import leave_interrupted, make_inputs

pytestmark = pytest.mark.parity

STEPS, SAVED = 6, 3
TP2 = {"tensor_model_parallel_size": 2}
CP2 = {"context_parallel_size": 2}
PP2 = {"pipeline_model_parallel_size": 2}
VPP2 = PP2 | {"virtual_pipeline_model_parallel_size": 2}
DP2: dict[str, Any] = {}
# Written under the first and continued under the second; those of RESUMED were written under TP2.
UNEVEN = PP2 | stages("Et|tttL")
ACROSS = {"cp2-dp2": (CP2, DP2), "uneven-cp2": (VPP2 | stages("E|tt|t|tL"), CP2), "dp2-uneven": (DP2, UNEVEN)}
RESUMED = {"tp2": TP2, "cp2": CP2, "pp2": PP2, "vpp2": VPP2, "dp2": DP2}


def config(folder: Path, name: str, parallel: dict[str, Any], **sections: Any) -> Config:
    """Run `name` of six steps on the shared data, model and reference cache."""
    return parse_config(
        {
            "run_dir": folder / name,
            "model": {"path": folder / "model"},
            "data": data(folder),
            "objective": {"token_alignment": "reverse_kl"},
            "reference": {"model_path": folder / "reference_model", "cache": folder / "reference"},
            "training": {"global_batch_size": 4, "max_steps": STEPS, "eval_steps": 4},
            "optimizer": {"lr": 1e-3, "lr_warmup_iters": 1},
            "checkpoint": {"save_steps": SAVED},
            "parallel": parallel,
            **sections,
        },
        source="test",
    )


def data(folder: Path, **others: Any) -> dict[str, Any]:
    return {"path": folder / "prepared", "max_tokens_per_pack": 400} | others


def run_all(folder: Path) -> dict[str, Any]:
    """On every rank: the reference pass live and cached, a whole run, and its continuation under every layout."""
    found: dict[str, Any] = {"live": live_and_cached(folder, "live", CP2, share_prompts=False)}
    precompute_reference(config(folder, "unused", TP2), overwrite=False)
    found["cached"] = live_and_cached(folder, "reference", CP2, share_prompts=True)
    found["stale"] = stale_errors(folder)
    train(config(folder, "whole", TP2))
    found["changed"] = changed_errors(folder)
    found["not finite"] = not_finite_error(folder)
    for name, parallel in RESUMED.items():
        leave_interrupted(folder, "whole", name, SAVED)
        train(config(folder, name, parallel))
    for name, (wrote, continues) in ACROSS.items():
        train(config(folder, f"{name}-whole", wrote))
        leave_interrupted(folder, f"{name}-whole", name, SAVED)
        # One of them with separate prompts, from the cache and the checkpoint of shared ones.
        train(config(folder, name, continues, data=data(folder, share_prompts=name != "cp2-dp2")))
    plain = {"optimizer": {"lr": 1e-3, "lr_warmup_iters": 1, "use_distributed_optimizer": False}}
    train(config(folder, "plain-whole", TP2, **plain))
    for name, parallel in (("plain-tp2", TP2), ("plain-pp2", PP2)):
        leave_interrupted(folder, "plain-whole", name, SAVED)
        train(config(folder, name, parallel, **plain))
    bfloat16 = {"model": {"path": folder / "model", "dtype": "bfloat16"}, "reference": {"cache": folder / "bf16"}}
    train(config(folder, "bfloat16", TP2, **bfloat16))
    for name, parallel in (("bfloat16-tp2", TP2), ("bfloat16-cp2", CP2)):
        leave_interrupted(folder, "bfloat16", name, SAVED)
        train(config(folder, name, parallel, **bfloat16))
    return found


def live_and_cached(
    folder: Path, cache: str, parallel: dict[str, Any], *, share_prompts: bool
) -> dict[str, torch.Tensor]:
    """The reference log-probs as `train` would see them with this cache directory."""
    settings = config(folder, "unused", parallel, data=data(folder, share_prompts=share_prompts))
    settings = settings.model_copy(
        update={"reference": settings.reference.model_copy(update={"cache": folder / cache})}
    )
    model, groups, (source,) = check_and_join(settings)
    datasets = source.datasets
    try:
        return {name: each.logps for name, each in reference_logprobs(settings, model, datasets, groups).items()}
    finally:
        topology.destroy(groups)


def stale_errors(folder: Path) -> dict[str, str]:
    """What a run says whose reference, objective or precision is not the cache's."""
    changes: dict[str, dict[str, Any]] = {
        "weights": {"reference": {"model_path": folder / "model", "cache": folder / "reference"}},
        "objective": {"objective": {"name": "long_po"}},
        "dtype": {"model": {"path": folder / "model", "dtype": "bfloat16"}},
        "data.source": {"data": {"path": folder / "other_prepared", "max_tokens_per_pack": 400}},
    }
    found = {}
    for name, sections in changes.items():
        with pytest.raises(UserError) as error:
            train(config(folder, "unused", TP2, **sections))
        found[name] = str(error.value)
    return found


CHANGES: dict[str, dict[str, Any]] = {
    "objective.loss_type=hinge (it was dpo)": {"objective": {"loss_type": "hinge"}},
    "optimizer.lr=0.01 (it was 0.001)": {"optimizer": {"lr": 0.01, "lr_warmup_iters": 1}},
    "optimizer.use_distributed_optimizer=false (it was true)": {
        "optimizer": {"lr": 1e-3, "lr_warmup_iters": 1, "use_distributed_optimizer": False}
    },
    "seed 1234, this run 7": {"seed": 7},
    "global_batch_size 4, this run 2": {"training": {"global_batch_size": 2, "max_steps": STEPS}},
    "checkpoint.resume=false": {"checkpoint": {"resume": False}},
}


def changed_errors(folder: Path) -> dict[str, str]:
    """What a finished run says when it is started again with another value of what it keeps."""
    found = {}
    for name, sections in CHANGES.items():
        with pytest.raises(UserError) as error:
            train(config(folder, "whole", TP2, **sections))
        found[name] = str(error.value)
    other = config(folder, "whole", TP2, data={"path": folder / "other_prepared", "max_tokens_per_pack": 400})
    with pytest.raises(UserError) as error:
        train(other)
    found["holds other tokens"] = str(error.value)
    return found


def not_finite_error(folder: Path) -> str:
    """A run whose loss is NaN from its first step on."""
    from megatron_solopo.train import step

    def broken(*arguments: Any) -> Any:
        result = compute_objective(*arguments)
        return replace(result, loss_T=result.loss_T * math.nan)

    training = {"global_batch_size": 4, "max_steps": STEPS, "max_skipped_steps_in_a_row": 2}
    with mock.patch.object(step, "compute_objective", broken), pytest.raises(UserError) as error:
        train(config(folder, "nan", TP2, training=training))
    return str(error.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = make_inputs(tmp_path_factory.mktemp("runs"))
    make_prepared(path / "other_prepared", rows=15, eval_count=5, seed=1)
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    result: dict[str, Any] = run_distributed(run_all, 2, folder)[0]
    return result


def losses(folder: Path, name: str) -> list[float]:
    return [step["loss"] for step in read_jsonl(folder / name / "metrics.jsonl")]


def test_cached_reference_is_the_live_one_of_another_layout_and_of_separate_prompts(
    found: dict[str, Any],
) -> None:
    assert found["live"].keys() == found["cached"].keys() == {"train", "eval"}
    for split, live in found["live"].items():
        assert live.shape == ({"train": 10, "eval": 5}[split], 3)
        assert bool((live < -1).all())
        torch.testing.assert_close(found["cached"][split], live, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reason", ["weights", "objective", "dtype", "data.source"])
def test_a_stale_reference_is_refused_by_name(found: dict[str, Any], reason: str) -> None:
    message = found["stale"][reason]
    assert "stale" in message and reason in message and "\n" not in message
    others = {"weights", "objective", "dtype", "data.source"} - {reason}
    assert not any(f"another {other}" in message or f", {other}" in message for other in others)


@pytest.mark.parametrize("change", [*CHANGES, "holds other tokens"])
def test_a_run_that_was_changed_is_not_continued(found: dict[str, Any], folder: Path, change: str) -> None:
    message = found["changed"][change]
    assert change in message and "\n" not in message
    assert len(losses(folder, "whole")) == STEPS


def test_a_loss_that_stays_not_finite_ends_the_run_as_it_was_before(found: dict[str, Any], folder: Path) -> None:
    message = found["not finite"]
    assert message.startswith("step 2 skipped: the loss of row-") and message.count("row-") == 4
    assert "2 in a row" in message and "max_skipped_steps_in_a_row=2" in message and "\n" not in message
    run = folder / "nan"
    assert "nothing was updated before them" in message and not (run / "checkpoints").exists()
    skips = read_jsonl(run / "skipped_steps.jsonl")
    assert [(skip["step"], len(skip["triplets"])) for skip in skips] == [(1, 4), (2, 4)]
    assert not set(skips[0]["triplets"]) & set(skips[1]["triplets"])


def test_the_same_layout_resumes_exactly(found: dict[str, Any], folder: Path) -> None:
    whole = losses(folder, "whole")
    assert len(whole) == STEPS
    assert losses(folder, "tp2") == whole
    assert losses(folder, "plain-tp2") == losses(folder, "plain-whole")
    assert losses(folder, "bfloat16-tp2") == losses(folder, "bfloat16")


@pytest.mark.parametrize("name", [*RESUMED, *ACROSS, "plain-pp2"])
def test_another_layout_resumes_to_rounding(found: dict[str, Any], folder: Path, name: str) -> None:
    assert losses(folder, name) == pytest.approx(losses(folder, "whole"), rel=1e-5)


def test_metrics_hold_what_is_promised_once_per_step(found: dict[str, Any], folder: Path) -> None:
    steps = read_jsonl(folder / "cp2" / "metrics.jsonl")
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    promised = [
        "loss",
        "po_loss",
        "solo_ra/loss",
        "solo_ra/gap_abs",
        "solo_ra/gap_signed",
        "token_alignment/kl",
        "grad_norm",
        "learning_rate",
        "num_triplets",
        "num_tokens",
        "pack_fill",
        "step_time",
        "tokens_per_second",
        "mfu",
        "peak_memory_bytes",
        "flops",
        "num_processes",
        "straggler_rank",
        "straggler_share",
        *(f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies", "chosen_long")),
        *(f"logps/{name}" for name in ("chosen", "rejected", "chosen_long")),
    ]
    for step in steps:
        assert set(promised) <= set(step)
        assert step["num_triplets"] == 4 and 0 < step["pack_fill"] <= 1 and step["peak_memory_bytes"] > 1e6
        assert step["num_processes"] == 2 and step["flops"] > 1e6
    evaluated = [step["step"] for step in steps if "eval_loss" in step]
    assert evaluated == [4, STEPS]
    assert [step["learning_rate"] for step in steps[:2]] == [0.0, 1e-3]


def test_the_report_has_a_panel_for_the_divergence_of_tokens(found: dict[str, Any], folder: Path) -> None:
    (picture,) = [each for each in curve_pictures(read_runs([folder / "cp2"])) if each.name == "gap"]
    axis = picture.draw(LIGHT).axes[2]
    drawn = [len(line.get_xdata()) for line in axis.lines]
    assert axis.get_title("left") == "Divergence at a token (nats)" and drawn == [STEPS, 2]


def test_evaluation_does_not_depend_on_the_layout(found: dict[str, Any], folder: Path) -> None:
    whole = read_jsonl(folder / "whole" / "metrics.jsonl")[-1]
    names = [name for name in whole if name.startswith("eval_")]
    assert len(names) > 10
    for name in RESUMED:
        last = read_jsonl(folder / name / "metrics.jsonl")[-1]
        assert [last[each] for each in names] == pytest.approx([whole[each] for each in names], rel=1e-4, abs=1e-5)


def test_the_work_of_a_step_does_not_depend_on_the_layout(found: dict[str, Any], folder: Path) -> None:
    whole = [step["flops"] for step in read_jsonl(folder / "whole" / "metrics.jsonl")]
    assert len(set(whole)) > 1
    for name in RESUMED:
        assert [step["flops"] for step in read_jsonl(folder / name / "metrics.jsonl")] == pytest.approx(whole)


def test_the_run_directory_is_complete(found: dict[str, Any], folder: Path) -> None:
    run = folder / "whole"
    assert list((run / "tensorboard").glob("events.*"))
    assert (run / "checkpoints" / "latest").read_text().strip() == f"iter_{STEPS:07d}"
    assert not list(run.rglob("*incomplete*"))
    state = json.loads((run / "checkpoints" / f"iter_{SAVED:07d}" / "trainer.json").read_text())
    assert state["step"] == SAVED and state["loader"]["consumed_triplets"] == 4 * SAVED


def test_bfloat16_stays_near_float32(found: dict[str, Any], folder: Path) -> None:
    """With its own weights as reference it starts at ln 2; eight bits of mantissa, then, give or take."""
    steps = read_jsonl(folder / "bfloat16" / "metrics.jsonl")
    assert steps[0]["po_loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert all(math.isfinite(step["loss"]) and step["grad_norm"] > 0 for step in steps)
    assert losses(folder, "bfloat16-cp2") == pytest.approx(losses(folder, "bfloat16"), rel=0.05)
