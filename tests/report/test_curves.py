"""Curves of training: smoothing, and means of neighbours."""

import json
from pathlib import Path

import pytest

from megatron_solopo.report.curves import curve_pictures, running_mean, thinned
from megatron_solopo.report.figure import render
from megatron_solopo.report.runs import read_runs
from tests.report.written_runs import step_line, write_run


def test_long_curves_keep_their_course() -> None:
    steps, values = thinned(range(1, 10_001), [float(step) for step in range(1, 10_001)])
    assert len(steps) == 400 and steps == values and steps[0] == 13.0
    assert running_mean([1.0] * 50) == pytest.approx([1.0] * 50)
    assert running_mean([0.0, 3.0, 6.0]) == pytest.approx([1.5, 3.0, 4.5])


def test_routers_have_a_picture_where_a_run_has_experts(tmp_path: Path) -> None:
    routed = {"moe/load_max_over_mean": 1.8, "moe/entropy": 2.1, "moe/route_agreement": 0.7, "moe/z_loss": 3.0}
    names = ["dense", "experts", "long_po"]
    for name in names:
        write_run(tmp_path / name, steps=0)
    for name, left_out in (("experts", ()), ("long_po", ("moe/route_agreement", "moe/z_loss"))):
        metrics = {key: value for key, value in routed.items() if key not in left_out}
        lines = [json.dumps(step_line(step, 0, **metrics)) + "\n" for step in range(1, 4)]
        (tmp_path / name / "metrics.jsonl").write_text("".join(lines))
    dense, experts, long_po = (read_runs([tmp_path / name]) for name in names)
    assert "experts" not in {picture.name for picture in curve_pictures(dense)}
    panels = {}
    for runs in (experts, long_po):
        (picture,) = [picture for picture in curve_pictures(runs) if picture.name == "experts"]
        assert "a part of the SoLo gap is a matter of routes" in picture.caption and render(picture).png
        panels[runs[0].name] = picture.alt.partition(": ")[2]
    assert panels == {
        "experts": "fullest expert over the mean, entropy of routers (nats), routes that agree, "
        "z-loss, before its coefficient.",
        "long_po": "fullest expert over the mean, entropy of routers (nats).",
    }
