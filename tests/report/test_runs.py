"""Runs are read as they are: whole, unfinished, damaged, diverged, empty."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from megatron_solopo.errors import UserError
from megatron_solopo.report.figure import LengthPoint
from megatron_solopo.report.runs import answer_cells, config_differences, mean_answer_points, read_runs, status_of
from megatron_solopo.results.long_context import read_long_context
from tests.report.written_runs import LENGTHS, step_line, write_answers, write_preferences, write_run


def write_steps(run: Path, lines: list[dict[str, Any]]) -> None:
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_how_runs_ended(tmp_path: Path) -> None:
    write_run(tmp_path / "finished")
    write_run(tmp_path / "unfinished", steps=30)
    write_run(tmp_path / "unknown", max_steps=None)
    write_run(tmp_path / "empty", steps=0)
    broken = write_run(tmp_path / "nan")
    write_steps(broken, [step_line(1, 0, skipped=0), *(step_line(step, 0, skipped=1) for step in range(2, 11))])
    megatron = write_run(tmp_path / "megatron")
    write_steps(megatron, [step_line(1, 0), step_line(2, 0, loss=None)])
    skipped = write_run(tmp_path / "skipped")
    write_steps(skipped, [step_line(1, 0, skipped=0), step_line(2, 0, skipped=1, loss=None)])
    # Where no row of a batch is a preference, the loss of preferences is null.
    mixed = write_run(tmp_path / "mixed", steps=0, max_steps=2)
    write_steps(mixed, [step_line(step, 0, skipped=0, po_loss=None) for step in (1, 2)])
    risen = write_run(tmp_path / "risen")
    write_steps(risen, [step_line(step, 0, loss=0.7 if step < 20 else 9.0) for step in range(1, 60)])
    spike = write_run(tmp_path / "spike", steps=0, max_steps=40)
    write_steps(spike, [step_line(step, 0, loss=50.0 if step == 40 else 0.7) for step in range(1, 41)])
    statuses = {run.name: status_of(run) for run in read_runs(sorted(tmp_path.iterdir()))}
    assert {name: status.word for name, status in statuses.items()} == {
        "finished": "finished",
        "unfinished": "unfinished",
        "unknown": "steps unknown",
        "empty": "not started",
        "nan": "diverged",
        "megatron": "diverged",
        "skipped": "unfinished",
        "mixed": "finished",
        "risen": "diverged",
        "spike": "finished",
    }
    assert statuses["nan"].sentence == "It ends at step 10. In 9 steps the loss or the gradient was not finite."
    assert statuses["skipped"].sentence.endswith(" stopped. In 1 step the loss or the gradient was not finite.")
    assert statuses["mixed"].sentence == "All 2 steps."
    assert statuses["unfinished"].sentence.startswith("30 of 120 steps")
    assert "rose from 0.7 to 9" in statuses["risen"].sentence


def test_steps_are_counted_from_the_data_where_epochs_decide(tmp_path: Path) -> None:
    (tmp_path / "prepared").mkdir()
    (tmp_path / "prepared" / "manifest.json").write_text('{"train": 100}')
    run = write_run(
        tmp_path / "run",
        data={"path": str(tmp_path / "prepared")},
        training={"global_batch_size": 8, "max_steps": None, "num_train_epochs": 1.5},
    )
    (found,) = read_runs([run])
    assert found.total_steps == 19  # 150 triplets in batches of 8


def test_damaged_lines_are_left_out_and_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=5)
    with (run / "metrics.jsonl").open("a") as stream:
        stream.write('not json\n{"step": 4, "loss": 0.25}\n{"step": 6, "lo')
    (found,) = read_runs([run])
    assert [step["step"] for step in found.steps] == [1, 2, 3, 4, 5]
    assert found.steps[3]["loss"] == 0.25, "written again after a restart"
    assert found.notes == ["metrics.jsonl: 2 damaged lines left out (6, 8)."]


def test_values_that_are_no_numbers_are_not_drawn(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_steps(run, [step_line(1, 0, loss=None), step_line(2, 0, loss=math.inf), step_line(3, 0, loss=0.5)])
    (found,) = read_runs([run])
    assert found.series("loss") == ([3], [0.5])
    assert found.series("no such metric") == ([], []) and found.total("no such metric") is None


def test_missing_files_are_told(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "config.yaml").unlink()
    (found,) = read_runs([run])
    assert found.notes == ["config.yaml is missing: its settings are not known."]
    assert found.total_steps is None and config_differences([found]) == []


def test_the_newest_evaluation_and_the_one_before_training_are_found(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    for step in (40, 120, None):
        write_answers(run, skill=0.5, step=step)
    write_preferences(run, skill=0.5, step=120)
    export = json.loads((run / "evaluation" / "long-context-None.json").read_text())
    export |= {"name": "export", "model": "aligned", "created": "2027-01-01T00:00:00+00:00"}
    (run / "evaluation" / "export.json").write_text(json.dumps(export))
    (run / "evaluation" / "damaged.json").write_text('{"kind": "preference"')
    (run / "evaluation" / "old.json").write_text('{"kind": "long_context", "schema_version": 7}')
    (run / "evaluation" / "other.json").write_text("[1]")
    (found,) = read_runs([run])
    assert found.evaluations.answers is not None and found.evaluations.answers.step == 120
    assert found.evaluations.answers_before is not None
    assert found.evaluations.answers_before.model == "models/base" and found.evaluations.preferences_before is None
    damaged, old, hidden = found.notes
    assert "Not shown: export, long-context in evaluation" in hidden
    assert "evaluation/damaged.json was left out: not valid JSON" in damaged
    assert "evaluation/old.json was left out" in old and "schema_version" in old


def test_names_are_as_short_as_they_can_be(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / folder / name) for folder, name in (("a", "run"), ("b", "run"), ("a", "other"))]
    assert [run.name for run in read_runs(paths[:1])] == ["run"]
    assert [run.name for run in read_runs(paths)] == ["a/run", "b/run", "a/other"]


def test_what_is_no_run_is_one_line(tmp_path: Path) -> None:
    run = write_run(tmp_path / "runs" / "first")
    file = tmp_path / "file"
    file.write_text("")
    for paths, expected in (
        ([tmp_path / "absent"], "no such directory"),
        ([file], "is a file"),
        (
            [tmp_path / "runs"],
            f"is no run directory, it holds neither config.yaml nor metrics.jsonl; did you mean {run}?",
        ),
        ([run, tmp_path / "runs" / "." / "first"], "is named twice"),
    ):
        with pytest.raises(UserError) as error:
            read_runs(paths)
        assert expected in str(error.value) and "\n" not in str(error.value)


def test_only_keys_that_differ_are_shown(tmp_path: Path) -> None:
    one = write_run(tmp_path / "one", objective={"name": "solopo", "alpha": 3.0, "detach_short": True})
    two = write_run(
        tmp_path / "two", objective={"name": "long_po", "alpha": None, "detach_short": True}, extra={"key": 1}
    )
    assert dict(config_differences(read_runs([one, two]))) == {
        "objective.name": ["solopo", "long_po"],
        "objective.alpha": ["3.0", "null"],
        "extra.key": ["no such key", "1"],
    }
    sources = [{"path": "data/a", "weight": 3.0, "objective": None}, {"path": "b", "weight": 1.0, "objective": "sft"}]
    mixed = write_run(tmp_path / "mixed", data={"sources": sources})
    differences = dict(config_differences(read_runs([one, mixed])))
    assert differences["data.sources"] == ["no such key", "path data/a, weight 3.0; objective sft, path b, weight 1.0"]


def test_a_mean_over_tasks_is_surer_than_each_task(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    write_answers(run, skill=0.5, step=120, tasks=("one", "two", "three", "four"))
    write_answers(run, skill=0.5, step=None)
    evaluations = read_runs([run])[0].evaluations
    assert evaluations.answers is not None and evaluations.answers_before is not None
    several, single = mean_answer_points(evaluations.answers), mean_answer_points(evaluations.answers_before)
    assert [point.length for point in several] == list(LENGTHS)
    for mean, alone in zip(several, single, strict=True):
        assert mean.mean == pytest.approx(alone.mean) and mean.count == 4 * alone.count
        assert mean.high - mean.low == pytest.approx((alone.high - alone.low) / 2)
    assert single[0] == LengthPoint(1024, *(getattr(single[0], name) for name in ("mean", "low", "high")), 100)


def test_a_map_weighs_tasks_equally(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    results = read_long_context(write_answers(run, skill=0.5, step=120, tasks=("one", "two")))
    cells = [
        each.model_copy(update={"score": 1.0, "n": 60} if each.task == "one" else {"score": 0.0})
        for each in results.cells
    ]
    found = answer_cells(results.model_copy(update={"cells": cells}))
    assert set(found.values()) == {(0.5, 80)}


def test_each_task_has_its_own_map(tmp_path: Path) -> None:
    results = read_long_context(write_answers(write_run(tmp_path / "run"), skill=0.5, step=120, tasks=("one", "two")))
    cells = answer_cells(results, ["one"])
    assert len(cells) == len(results.lengths) * len(results.depths)
    for (length, depth), found in cells.items():
        cell = results.cell("one", results.main_metrics["one"], length=length, depth=depth)
        assert cell is not None and found == (cell.score, cell.n)
