"""A run over triplets, pairs and instructions: its metrics, its evaluation, and how it continues."""

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from megatron_solopo.config import Config
from megatron_solopo.data.mixture import Stream
from megatron_solopo.errors import UserError
from megatron_solopo.files import read_jsonl
from megatron_solopo.report.curves import curve_pictures
from megatron_solopo.report.figure import LIGHT
from megatron_solopo.report.runs import read_runs
from megatron_solopo.train.trainer import train
from tests.distributed import run_distributed
from tests.prepared import make_prepared
from tests.tiny_models import make_model
from tests.train.runs import leave_interrupted, recorded, small_config

KINDS = {"triplets": "triplet", "pairs": "pair", "chats": "instruction"}
ROWS = {"triplets": 9, "pairs": 3, "chats": 5}
OBJECTIVES = {"triplets": None, "pairs": "short_po", "chats": "sft"}
WEIGHTS = {"triplets": 6.0, "pairs": 5.0, "chats": 1.0}
STEPS, BATCH = 4, 4


def mixture(folder: Path, name: str, **weights: float) -> Config:
    found = WEIGHTS | weights
    sources = [{"path": folder / each, "weight": found[each], "objective": OBJECTIVES[each]} for each in KINDS]
    data = {"sources": sources, "max_tokens_per_pack": 400}
    checkpoint = {"save_steps": 2}
    return small_config(folder, name, {}, data=data, checkpoint=checkpoint, reference={})


def run_all(folder: Path) -> dict[str, str]:
    """On every rank: a run, the same run interrupted and continued, and one that may not continue."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        train(mixture(folder, "whole"))
        leave_interrupted(folder, "whole", "continued", saved=2)
        train(mixture(folder, "continued"))
        leave_interrupted(folder, "whole", "changed", saved=2)
        try:
            train(mixture(folder, "changed", chats=2.0))
            error = ""
        except UserError as caught:
            error = str(caught)
        refused = mixture(folder, "refused")
        best = refused.checkpoint.model_copy(update={"best_metric": "eval_source/pairs/loss"})
        try:
            train(refused.model_copy(update={"checkpoint": best}))
            no_metric = ""
        except UserError as caught:
            no_metric = str(caught)
    dist.barrier()
    return {"said": said.getvalue(), "error": error, "no_metric": no_metric}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mixture")
    make_model(folder / "model", "qwen2_tied", seed=0)
    for seed, (name, kind) in enumerate(KINDS.items()):
        held_out = 0 if name == "pairs" else 2
        make_prepared(folder / name, rows=ROWS[name] + held_out, eval_count=held_out, seed=seed, kind=kind)
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, str]:
    return run_distributed(run_all, 2, folder)[0]


@pytest.fixture(scope="module")
def steps(folder: Path, found: dict[str, str]) -> list[dict[str, Any]]:
    return read_jsonl(folder / "whole" / "metrics.jsonl")


def test_each_source_has_its_metrics_and_the_whole_is_their_mean(steps: list[dict[str, Any]]) -> None:
    stream = Stream(list(ROWS.values()), list(WEIGHTS.values()), seed=1234)
    for step in steps:
        drawn = stream.drawn(step["step"] * BATCH)
        before = stream.drawn((step["step"] - 1) * BATCH)
        counts = {name: now - then for name, now, then in zip(KINDS, drawn, before, strict=True)}
        assert {name: step[f"source/{name}/num_triplets"] for name in KINDS} == counts
        for name, total in zip(KINDS, drawn, strict=True):
            assert step[f"source/{name}/passes"] == pytest.approx(total / ROWS[name])
            assert (step[f"source/{name}/loss"] is None) == (counts[name] == 0)
        own = {name: step[f"source/{name}/loss"] or 0.0 for name in KINDS}
        assert step["loss"] == pytest.approx(sum(own[name] * counts[name] for name in KINDS) / BATCH)
        preferences = counts["triplets"] + counts["pairs"]
        margins = [(step[f"source/{name}/rewards/margins"] or 0.0) * counts[name] for name in ("triplets", "pairs")]
        assert step["rewards/margins"] == pytest.approx(sum(margins) / preferences, abs=1e-7)
        assert step["solo_ra/gap_abs"] == step["source/triplets/solo_ra/gap_abs"]
        assert not {"source/pairs/solo_ra/gap_abs", "source/chats/po_loss"} & step.keys()
    assert None in {step["source/chats/loss"] for step in steps}, "some batch has no row of a source"


def test_the_report_has_a_panel_for_each_source(folder: Path, found: dict[str, str]) -> None:
    (run,) = read_runs([folder / "whole"])
    pictures = {picture.name: picture for picture in curve_pictures([run])}
    shown = {name: picture.alt.partition(": ")[2] for name, picture in pictures.items() if name.startswith("source-")}
    assert shown == {"source-losses": "triplets, pairs, chats.", "source-accuracies": "triplets, pairs."}
    losses = pictures["source-losses"].draw(LIGHT)
    points = [[len(line.get_xdata()) for line in axis.lines] for axis in losses.axes]
    drawn = [len(run.series(f"source/{name}/loss")[0]) for name in KINDS]
    assert points == [[drawn[0], 2], [drawn[1]], [drawn[2], 2]]


def test_the_policy_is_its_own_reference_at_the_first_step(steps: list[dict[str, Any]]) -> None:
    """Each source reads the cache of its own rows."""
    for name in ("triplets", "pairs"):
        assert steps[0][f"source/{name}/po_loss"] == pytest.approx(0.6931472, abs=1e-5)


def test_every_held_out_row_counts_once_whatever_the_weights(steps: list[dict[str, Any]]) -> None:
    evaluated = steps[1]
    losses = [evaluated[f"eval_source/{name}/loss"] for name in ("triplets", "chats")]
    assert evaluated["eval_loss"] == pytest.approx(sum(losses) / 2)
    assert not any(name.startswith("eval_source/pairs") for name in evaluated)


def test_only_sources_that_need_a_reference_have_a_cache(folder: Path, found: dict[str, str]) -> None:
    assert sorted(path.name for path in (folder / "whole" / "reference").iterdir()) == ["pairs", "triplets"]


def test_a_continued_run_draws_the_same_rows(folder: Path, found: dict[str, str]) -> None:
    assert recorded(folder, "continued") == recorded(folder, "whole")


def test_another_weight_is_another_run(found: dict[str, str]) -> None:
    assert "sources.chats.weight=2.0 (it was 1.0)" in found["error"]


def test_the_best_checkpoint_is_not_chosen_by_rows_that_do_not_exist(found: dict[str, str]) -> None:
    assert "checkpoint.best_metric=eval_source/pairs/loss is no metric of this run" in found["no_metric"]
    assert "eval_source/chats/loss" in found["no_metric"] and "eval_loss" in found["no_metric"]


def test_the_log_says_what_the_run_draws(found: dict[str, str]) -> None:
    assert "source chats: 5 rows, objective sft, 1 of 16 draws (6.2%): 0.20 passes over its rows" in found["said"]
    assert " | triplets 0." in found["said"]
