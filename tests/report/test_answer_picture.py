"""The pictures that `evaluate long-context` leaves beside its results."""

from pathlib import Path

import pytest

from megatron_solopo.report import evaluation_pictures as answer_picture
from megatron_solopo.report.evaluation_pictures import depth_maps, draw_answers, length_figure
from megatron_solopo.report.figure import LIGHT, heat_maps
from megatron_solopo.results.long_context import LongContextResults, read_long_context
from tests.report.written_runs import write_answers, write_run


@pytest.fixture
def results(tmp_path: Path) -> LongContextResults:
    return read_long_context(write_answers(write_run(tmp_path / "run"), skill=0.5, step=120, tasks=("one", "two")))


def test_every_task_is_a_line_with_its_metric(results: LongContextResults) -> None:
    (axis,) = length_figure(results, LIGHT).axes
    assert axis.get_legend_handles_labels()[1] == [f"{task} ({name})" for task, name in results.main_metrics.items()]
    assert axis.get_xlabel() and axis.get_ylabel() and axis.get_title(loc="left") == results.name


def test_every_task_is_a_map_of_its_own_scores(results: LongContextResults, tmp_path: Path, monkeypatch) -> None:
    drawn = []
    monkeypatch.setattr(answer_picture, "heat_maps", lambda *given, **more: drawn.append(heat_maps(*given, **more)))
    monkeypatch.setattr(answer_picture, "_save", lambda figure, path: None)
    draw_answers(results, tmp_path / "length.png", tmp_path / "depth.png")
    assert [axis.get_title(loc="left")[:3] for axis in drawn[0].axes] == ["one", "two"]
    assert all("tokens" in axis.get_xlabel() and "depth" in axis.get_ylabel() for axis in drawn[0].axes)
    (_, cells), _ = depth_maps(results)
    for length in results.lengths:
        for depth in results.depths:
            cell = results.cell("one", results.main_metrics["one"], length=length, depth=depth)
            assert cell is not None and (cell.score, cell.n) in cells.values()


def test_without_depths_an_old_map_goes(results: LongContextResults, tmp_path: Path) -> None:
    by_length, by_depth = tmp_path / "length.png", tmp_path / "depth.png"
    draw_answers(results, by_length, by_depth)
    assert by_length.read_bytes()[:4] == by_depth.read_bytes()[:4] == b"\x89PNG"
    shallow = results.model_copy(update={"depths": [], "cells": [each for each in results.cells if each.depth is None]})
    draw_answers(shallow, by_length, by_depth)
    assert by_length.exists() and not by_depth.exists()
