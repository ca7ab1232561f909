"""Passes over a data set: packs stream through the schedule, and an interrupted reference pass is continued."""

import json
import os
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_solopo import journal, progress
from megatron_solopo.config import Config
from megatron_solopo.data import loader
from megatron_solopo.data.batch_plan import share_out_pass
from megatron_solopo.errors import UserError
from megatron_solopo.files import read_jsonl
from megatron_solopo.parallel import topology
from megatron_solopo.train import reference, reference_journal, scoring, single_pass
from megatron_solopo.train.reference import reference_logprobs
from megatron_solopo.train.session import check_and_join
from megatron_solopo.train.single_pass import PassPoints
from megatron_solopo.train.trainer import precompute_reference
from tests.distributed import exit_codes, run_distributed
from tests.train.runs import at_call, make_inputs, small_config

PP2 = {"pipeline_model_parallel_size": 2}
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {},
    "tp2": {"tensor_model_parallel_size": 2},
    "cp2": {"context_parallel_size": 2},
    "pp2": PP2,
    "vpp2": PP2 | {"virtual_pipeline_model_parallel_size": 2},
}
PIPELINES = {"pp2": 1, "vpp2": 2}
"""The fewest packs of a part."""
CONTINUED = {"dp2": "pp2", "tp2": "dp2", "cp2": "tp2", "pp2": "cp2", "vpp2": "dp2"}
TRAIN, EVAL = 10, 5
KEPT = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_inputs(tmp_path_factory.mktemp("passes"), rows=TRAIN + EVAL, eval_count=EVAL)


def settings(folder: Path, cache: str, layout: str = "dp2", **sections: Any) -> Config:
    data = {"path": folder / "prepared", "max_tokens_per_pack": 400, "max_triplets_per_pack": 2}
    return small_config(folder, "run", LAYOUTS[layout], reference={"cache": folder / cache}, data=data, **sections)


@contextmanager
def counting_packs() -> Iterator[list[int]]:
    """The number of packs of every part that this rank runs."""
    packs: list[int] = []
    original = single_pass.run_schedule

    def counting(chunks: Any, given: Any, *arguments: Any, **keywords: Any) -> Any:
        packs.append(len(given))
        return original(chunks, given, *arguments, **keywords)

    with mock.patch.object(single_pass, "run_schedule", counting):
        yield packs


def logprobs(config: Config, **options: Any) -> dict[str, torch.Tensor]:
    model, groups, (source,) = check_and_join(config)
    datasets = source.datasets
    try:
        found = reference_logprobs(config, model, datasets, groups, **options)
        return {split: each.logps for split, each in found.items()}
    finally:
        topology.destroy(groups)


@contextmanager
def dying_at_the_end() -> Iterator[None]:
    """The pass ends before it can write its cache; every number is in the journals."""
    with (
        mock.patch.object(scoring, "_SECONDS_BETWEEN_READINGS", 0.0),
        mock.patch.object(reference, "_write", side_effect=UserError("killed")),
        pytest.raises(UserError, match="killed"),
    ):
        yield


def in_small_parts(costs: Any, **keywords: Any) -> Any:
    """As few packs as a part can have."""
    return share_out_pass(costs, **keywords | {"packs_per_part": 1})


def keep_lines(cache: Path, split: str, count: int) -> None:
    """Cut the journals of a split, so that they hold `count` triplets together."""
    for path in sorted((cache / "unfinished").glob(f"{split}-*.jsonl")):
        header, *lines = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(header + b"".join(lines[:count]))
        count -= min(count, len(lines))


def run_layouts(folder: Path) -> dict[str, Any]:
    """Under every layout: a whole pass, one in parts of one pack, and interrupted ones that are continued."""
    found: dict[str, Any] = {"whole": {}, "one by one": {}, "same": {}, "other": {}, "packs": {}}
    rank = torch.distributed.get_rank()
    for name in LAYOUTS:
        found["whole"][name] = logprobs(settings(folder, f"whole-{name}", name))
        if name in PIPELINES:
            with counting_packs() as packs, mock.patch.object(loader, "share_out_pass", in_small_parts):
                found["one by one"][name] = logprobs(settings(folder, f"alone-{name}", name))
            found["packs"][f"{name} alone"] = packs
        cache = folder / f"same-{name}"
        with dying_at_the_end():
            logprobs(settings(folder, cache.name, name))
        torch.distributed.barrier()
        if rank == 0:
            keep_lines(cache, "train", KEPT)
            shutil.copytree(cache, folder / f"other-{name}")
        torch.distributed.barrier()
        with counting_packs() as packs:
            found["same"][name] = logprobs(settings(folder, cache.name, name))
        found["packs"][name] = packs
        found["other"][name] = logprobs(settings(folder, f"other-{name}", CONTINUED[name]))
    return found


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = run_distributed(run_layouts, 2, folder)
    return found


@pytest.mark.parametrize("name", PIPELINES)
def test_packs_that_stream_give_the_bits_of_packs_that_run_alone(ranks: list[dict[str, Any]], name: str) -> None:
    for found in ranks:
        for split in ("train", "eval"):
            assert found["whole"][name][split].equal(found["one by one"][name][split])
        alone = found["packs"][f"{name} alone"]
        assert set(alone) == {PIPELINES[name]} and len(alone) > 3


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_pass_that_is_continued_gives_the_same_bits(ranks: list[dict[str, Any]], name: str) -> None:
    for found in ranks:
        for split in ("train", "eval"):
            assert found["same"][name][split].equal(ranks[0]["whole"][name][split])
    # Five triplets are left, in packs of at most two that run whole; the held-out split was done.
    (packs,) = ranks[0]["packs"][name]
    assert 3 <= packs * (2 if name == "dp2" else 1) <= 6


@pytest.mark.parametrize("name", LAYOUTS)
def test_another_layout_continues_and_keeps_what_was_there(
    ranks: list[dict[str, Any]], folder: Path, name: str
) -> None:
    whole, other = ranks[0]["whole"][name], ranks[0]["other"][name]
    for split in ("train", "eval"):
        assert other[split].allclose(whole[split], rtol=1e-5, atol=1e-4)
        assert (other[split] == whole[split]).all(dim=1).sum() >= KEPT
        assert other[split].equal(ranks[1]["other"][name][split])
    assert sorted(path.name for path in (folder / f"other-{name}").iterdir()) == [
        "eval.parquet", "reference.json", "train.parquet"
    ]  # fmt: skip


@pytest.fixture(scope="module")
def complete(folder: Path) -> Path:
    """The cache of a pass that has computed everything and was interrupted then."""
    with dying_at_the_end():
        logprobs(settings(folder, "complete"))
    return folder / "complete"


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict[str, torch.Tensor]:
    """The numbers of a pass that was never interrupted."""
    return logprobs(settings(folder, "whole"))


def cut_everywhere(folder: Path, whole: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    """Cut a journal at the end of its header and at every byte of its last record, and continue.

    Returns how many triplets were there, and how many complete records.
    """
    cache = folder / "cut"
    shutil.copytree(folder / "complete", cache)
    (path,) = (cache / "unfinished").glob("train-*.jsonl")
    everything, found = path.read_bytes(), []
    lines = everything.splitlines(keepends=True)
    ends = [len(lines[0]) - 1, len(lines[0]), *range(len(everything) - len(lines[-1]) - 2, len(everything) + 1)]
    model, groups, (source,) = check_and_join(settings(folder, "cut"))
    datasets = source.datasets
    dependencies = reference.reference_dependencies(settings(folder, "cut"), model, datasets)
    chunks = reference.load_frozen(model, groups, chunk_tokens=1024)
    try:
        for end in ends:
            path.write_bytes(everything[:end])
            journal = reference._open_journals(cache, dependencies, datasets, groups, overwrite=False)["train"]
            scores = scoring.score_sequences(
                settings(folder, "cut"), chunks, datasets.by_split["train"], groups, "cut", journal=journal
            )
            kept = int(journal.kept(scores.roles).isfinite().all(dim=1).sum())
            found.append((kept, max(0, everything[:end].count(b"\n") - 1)))
            assert scores.logps.equal(whole["train"]), end
            for each in set(path.parent.glob("train-*.jsonl")) - {path}:
                each.unlink()
    finally:
        topology.destroy(groups)
    return found


def test_a_journal_that_is_cut_at_any_byte_gives_the_same_bits(
    folder: Path, complete: Path, whole: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    found = cut_everywhere(folder, whole)
    assert len(found) > 60 and all(kept == records for kept, records in found)
    told = capsys.readouterr().err
    assert f"cut: {TRAIN - 1} of {TRAIN} triplets were there already" in told
    assert "damaged" not in told, "a line that was cut is no damage"


def killed(folder: Path) -> None:
    """After three packs of the reference pass, SIGKILL ends the process from within the schedule."""
    die = partial(os.kill, os.getpid(), signal.SIGKILL)
    with (
        mock.patch.object(scoring, "_SECONDS_BETWEEN_READINGS", 0.0),
        at_call(reference_journal.ReferenceJournal, "append", 4, 0, die),
    ):
        precompute_reference(settings(folder, "killed"), overwrite=False)


def test_numbers_are_on_the_disk_while_the_schedule_still_runs(folder: Path) -> None:
    assert exit_codes(killed, 1, folder, patience=90) == [-signal.SIGKILL]
    (path,) = (folder / "killed" / "unfinished").iterdir()
    header, *records = read_jsonl(path)
    assert 3 <= len(records) <= 6 and set(header) == {"journal"}
    assert not (folder / "killed" / "reference.json").exists()


def refuse(folder: Path) -> dict[str, Any]:
    """What is said of journals that do not belong to this pass, that are damaged, or that cannot be written."""
    found: dict[str, Any] = {}
    cache = folder / "refused"
    shutil.copytree(folder / "complete", cache)
    other = settings(folder, "refused", model={"path": folder / "reference_model"})
    with pytest.raises(UserError) as error:
        logprobs(other)
    found["weights"] = str(error.value)
    logprobs(other, overwrite=True)
    found["overwritten"] = sorted(path.name for path in cache.iterdir())

    shutil.copytree(folder / "complete", folder / "damaged")
    (path,) = (folder / "damaged" / "unfinished").glob("train-*.jsonl")
    lines = path.read_bytes().splitlines(keepends=True)
    odd = [b'{"row": 99, "long_chosen": 1.0}\n', b"\0" * 20 + b"\n", b"[]\n", b'{"row": 1, "long_chosen": NaN}\n']
    path.write_bytes(b"".join([*lines[:4], *odd, *lines[6:]]))
    found["damaged"] = logprobs(settings(folder, "damaged"))

    with (
        mock.patch.object(reference_journal, "append_lines", side_effect=OSError(28, "No space left on device")),
        pytest.raises(UserError) as error,
    ):
        logprobs(settings(folder, "full"))
    found["full"] = str(error.value)
    return found


def test_other_journals_are_refused_and_damaged_lines_counted(
    folder: Path, complete: Path, whole: dict[str, torch.Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    found = refuse(folder)
    assert "an unfinished reference pass was made for another weights; run " in found["weights"]
    assert "reference --overwrite" in found["weights"] and "\n" not in found["weights"]
    assert found["overwritten"] == ["eval.parquet", "reference.json", "train.parquet"]
    assert found["damaged"]["train"].equal(whole["train"])
    told = capsys.readouterr().err
    assert f"reference train: {TRAIN - 2} of {TRAIN} triplets were there already" in told
    assert "4 damaged lines of train; their triplets are computed again" in told
    assert "removed" in told and "made for another weights" in told
    assert "No space left on device" in found["full"]


def test_numbers_behind_a_damaged_header_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = b'{"row": 1, "short_chosen": -3.5}\n'
    (tmp_path / "train-good-0000.jsonl").write_bytes(journal.header_line({"weights": "mine"}).encode() + b"\n" + row)
    (tmp_path / "train-torn-0000.jsonl").write_bytes(b"\0" * 20 + b"\n" + row.replace(b"1", b"0"))
    (known,) = reference_journal.read_journals(tmp_path, "train", 2).values()
    assert np.isnan(known[0]) and known[1] == -3.5
    assert "2 damaged lines of train; their triplets are computed again" in capsys.readouterr().err


@pytest.mark.parametrize(("seconds", "told"), [(0.0, True), (3600.0, False)])
def test_a_log_gets_whole_lines_and_none_for_short_work(
    seconds: float, told: bool, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with mock.patch.object(progress, "_LOG_SECONDS", seconds):
        run_logged(folder, f"logged-{told}")
    lines = [line.strip() for line in capsys.readouterr().err.replace("\r", "").splitlines() if line.strip()]
    assert any(line.startswith(f"reference train: {TRAIN}/{TRAIN} triplets in ") for line in lines) is told
    assert all("%|" not in line for line in lines)


def run_logged(folder: Path, cache: str) -> None:
    calls: list[str] = []
    logprobs(settings(folder, cache), points=PassPoints(lambda: calls.append("part"), lambda: calls.append("pack")))
    assert calls[0] == "part" and calls.count("part") == 2 and calls.count("pack") >= (TRAIN + EVAL) // 2


def test_a_record_says_what_it_is(complete: Path) -> None:
    (path,) = (complete / "unfinished").glob("eval-*.jsonl")
    first, record = (json.loads(line) for line in path.read_text().splitlines()[:2])
    assert set(record) == {"row", "short_chosen", "short_rejected", "long_chosen"}
    assert {"weights", "tokens", "dtype", "data"} <= set(first["journal"])
