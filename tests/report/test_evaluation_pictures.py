"""The pictures of evaluations."""

import json
from pathlib import Path

from megatron_solopo.report.evaluation_pictures import accuracy_pictures, draw_answers, draw_preference
from megatron_solopo.report.runs import common_tasks, read_runs
from megatron_solopo.results.long_context import read_long_context
from megatron_solopo.results.preference import read_preference
from tests.report.written_runs import write_answers, write_preferences, write_run


def test_curves_are_means_over_the_tasks_that_all_have(tmp_path: Path) -> None:
    run, other = write_run(tmp_path / "run"), write_run(tmp_path / "other")
    write_answers(run, skill=0.9, step=120, tasks=("one", "two"))
    write_answers(run, skill=0.1, step=None, tasks=("two", "three"))
    found = read_runs([run])
    picture, by_task = list(accuracy_pictures(found))[:2]
    assert ", two that all have, against" in picture.caption and by_task.name == "accuracy-by-task"
    results = [found[0].evaluations.answers, found[0].evaluations.answers_before]
    assert common_tasks(each for each in results if each is not None) == ["two"]
    write_answers(other, skill=0.9, step=120, tasks=("four",))
    assert "accuracy-by-length" not in [each.name for each in accuracy_pictures(read_runs([run, other]))]


def test_two_evaluations_of_one_name_are_two_curves(tmp_path: Path) -> None:
    """The model before training is known by its name alone, and the second run may have had another one there."""
    runs = [write_run(tmp_path / name) for name in ("first", "second")]
    for run in runs:
        write_answers(run, skill=0.9, step=120)
        write_answers(run, skill=0.1, step=None)
    (picture, *_) = accuracy_pictures(read_runs(runs))
    assert picture.alt.count("before training (base)") == 1
    write_answers(runs[1], skill=0.2, step=None)
    (picture, *_) = accuracy_pictures(read_runs(runs))
    assert "before training (base) of first:" in picture.alt
    assert "before training (base) of second:" in picture.alt


def test_a_map_without_depths_is_removed(tmp_path: Path) -> None:
    results = read_long_context(write_answers(write_run(tmp_path / "run"), skill=0.5, step=120, tasks=("one", "two")))
    by_length, by_depth = tmp_path / "length.png", tmp_path / "depth.png"
    draw_answers(results, by_length, by_depth)
    assert by_length.read_bytes()[:4] == by_depth.read_bytes()[:4] == b"\x89PNG"
    shallow = results.model_copy(update={"depths": [], "cells": [each for each in results.cells if each.depth is None]})
    draw_answers(shallow, by_length, by_depth)
    assert by_length.exists() and not by_depth.exists()


def test_preferences_are_drawn_with_and_without_intervals(tmp_path: Path) -> None:
    path = write_preferences(write_run(tmp_path / "run"), skill=0.5, step=120)
    for name in ("known", "unknown"):
        draw_preference(read_preference(path), tmp_path / f"{name}.png")
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        content = json.loads(path.read_text())
        for group in (content["overall"], *content["by_length"]):
            group["metrics"]["solo_ra/gap_abs"] |= {"low": None, "high": None}
        path.write_text(json.dumps(content))
