"""What the tables and sentences say of runs."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_solopo.report.runs import RunRecord, read_runs
from megatron_solopo.report.table import cost_table, verdict_sentences, verdict_table
from tests.report.written_runs import accuracy, write_answers, write_preferences, write_run
from tests.tiny_models import make_model


@pytest.fixture
def runs(tmp_path: Path) -> list[RunRecord]:
    paths = []
    for name, skill in (("good", 0.9), ("near", 0.85), ("poor", 0.1)):
        paths.append(write_run(tmp_path / name))
        write_answers(paths[-1], skill=skill, step=120)
        write_preferences(paths[-1], skill=skill, step=120)
    return read_runs(paths)


def test_the_best_is_marked_and_what_cannot_be_told_from_it(runs: list[RunRecord]) -> None:
    table = verdict_table(runs)
    place = table.columns.index("accuracy at 16K")
    cells = [values[place] for _, values in table.rows]
    assert [cell.mark for cell in cells] == ["best", "even", ""]
    assert cells[0].mean == accuracy(0.9, 16384, 0.5) and cells[0].interval
    shortest = [values[table.columns.index("accuracy at 1K")] for _, values in table.rows]
    assert [cell.mark for cell in shortest] == ["", "", ""], "equal in all runs"


def test_sentences_say_what_the_intervals_allow(runs: list[RunRecord]) -> None:
    near, rewards = verdict_sentences(runs)
    assert near.startswith("At 16,384 tokens, good has the highest accuracy, ")
    assert near.endswith("The interval of its difference to near holds 0: chance may have decided.")
    assert "reward accuracy behind the long context" in rewards
    apart = verdict_sentences([runs[0], runs[2]])[0]
    assert "No interval of its difference to another run holds 0; poor follows with" in apart
    assert "highest" not in verdict_sentences(runs[:1])[0]


def test_rewards_on_other_triplets_are_not_compared(runs: list[RunRecord]) -> None:
    found = runs[2].evaluations.preferences
    assert found is not None
    for change in ({"data_fingerprint": "g"}, {"split": "train"}):
        evaluations = replace(runs[2].evaluations, preferences=found.model_copy(update=change))
        others = [*runs[:2], replace(runs[2], evaluations=evaluations)]
        _, rewards = verdict_sentences(others)
        assert rewards == "The runs were evaluated on different triplets, so their reward accuracies do not compare."
        table = verdict_table(others)
        place = table.columns.index("reward accuracy, long")
        assert [values[place].mark for _, values in table.rows] == ["", "", ""]


@pytest.mark.parametrize(
    ("change", "compares"),
    [
        ({"files": {"other.jsonl": "2e"}}, False),
        ({"files": {"elsewhere/contexts.jsonl": "1f"}}, True),
        ({"files": {}}, True),  # as an older version left it
        ({"settings": {"seed": 1}}, False),
        ({"settings": {"samples": 5}}, False),
        ({"settings": {"depths": [0.5]}}, False),
        ({"settings": {"lengths": [4096]}}, True),
        ({"settings": {"contexts": ["contexts.jsonl"], "lengths": [4096]}}, False),
        ({"main_metrics": {"qa": "sub_em"}}, False),
    ],
)
def test_answers_to_other_questions_are_not_compared(
    runs: list[RunRecord], change: dict[str, Any], compares: bool
) -> None:
    def changed(run: RunRecord, **change: Any) -> RunRecord:
        assert run.evaluations.answers is not None
        answers = run.evaluations.answers.model_copy(update=change)
        return replace(run, evaluations=replace(run.evaluations, answers=answers))

    good, near, poor = (changed(run, files={"contexts.jsonl": "1f"}) for run in runs)
    others = [good, near, changed(poor, **change)]
    said = "The runs did not all answer the same questions, so their accuracies do not compare."
    assert (said not in verdict_sentences(others)) == compares
    assert ("accuracy at 16K" in verdict_table(others).columns) == compares


@pytest.mark.parametrize(("right", "mark"), [(72, "even"), (65, "")])
def test_a_difference_is_told_by_its_own_interval(tmp_path: Path, right: int, mark: str) -> None:
    """80 of 100 against 72 and 65: the intervals of both overlap with the first's, but 0.15 [0.03, 0.27] is clear."""
    bounds = {80: (0.7112, 0.8666), 72: (0.6252, 0.7986), 65: (0.5525, 0.7364)}  # Wilson's
    for name, count in (("good", 80), ("other", right)):
        low, high = bounds[count]
        path = write_preferences(write_run(tmp_path / name), skill=0.5, step=120)
        written = json.loads(path.read_text())
        written["overall"]["metrics"]["rewards/accuracies_long"] = {"mean": count / 100, "low": low, "high": high}
        path.write_text(json.dumps(written))
    table = verdict_table(read_runs([tmp_path / "good", tmp_path / "other"]))
    place = table.columns.index("reward accuracy, long")
    assert [values[place].mark for _, values in table.rows] == ["best", mark]
    assert bounds[right][1] > bounds[80][0]


def test_a_run_with_adapters_says_so(tmp_path: Path) -> None:
    """A run without them beside it trains the whole model."""
    model = {"path": str(make_model(tmp_path / "model", "qwen2_tied"))}
    paths = [write_run(tmp_path / "lora", model=model, lora={"rank": 4, "target_modules": ["q_proj", "v_proj"]})]
    paths += [write_run(tmp_path / "gone", lora={"rank": 8}), write_run(tmp_path / "whole", lora=None)]
    table = verdict_table(read_runs(paths))
    place = table.columns.index("trained")
    numbers = 4 * 4 * (32 + 32 + 32 + 16)  # layers x rank x (columns and rows of both)
    assert [str(values[place]) for _, values in table.rows] == [
        f"LoRA, rank 4, q_proj v_proj: {numbers:,} parameters",
        "LoRA, rank 8, q_proj k_proj v_proj o_proj gate_proj up_proj down_proj",
        "whole model",
    ]
    assert "trained" not in verdict_table(read_runs(paths[-1:])).columns
    broken = verdict_table(read_runs([write_run(tmp_path / "broken", lora={"rank": 4, "unknown_to_us": 1})]))
    place = broken.columns.index("trained")
    assert [str(values[place]) for _, values in broken.rows] == ["adapters of unknown settings"]


def test_runs_without_evaluation_have_no_verdict_and_no_empty_columns(tmp_path: Path) -> None:
    found = read_runs([write_run(tmp_path / "one"), write_run(tmp_path / "two", steps=0)])
    assert verdict_sentences(found) == []
    assert verdict_table(found).columns == ["status", "steps", "last loss"]


def test_lengths_are_compared_only_where_all_were_asked_the_same(tmp_path: Path) -> None:
    paths = [write_run(tmp_path / "one"), write_run(tmp_path / "two")]
    write_answers(paths[0], skill=0.5, step=120)
    write_answers(paths[1], skill=0.5, step=120, tasks=("qa",))
    assert not any(column.startswith("accuracy at") for column in verdict_table(read_runs(paths)).columns)


def test_costs_are_sums_over_the_steps(runs: list[RunRecord]) -> None:
    table = cost_table(runs[:1])
    (_, values), *_ = table.rows
    cells = dict(zip(table.columns, map(str, values), strict=True))
    assert cells["tokens"] == "10,800,000" and cells["model FLOPs"] == "492 PFLOP"
    assert cells["time of steps"] == "0:05:00" and cells["process-hours"] == "0.667"
    assert cells["tokens per second"] == "36,000" and cells["peak memory"] == "42.00 GiB"
    assert cells["wait for the slowest rank"] == "4.0% (rank 3 in 80% of steps)"
    assert "MFU" not in cells, "not known on this device"


def test_what_a_single_triplet_does_not_say_is_not_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    path = write_preferences(run, skill=0.5, step=120)
    content = json.loads(path.read_text())
    for group in (content["overall"], *content["by_length"]):
        group["metrics"]["solo_ra/gap_abs"] |= {"low": None, "high": None}
    path.write_text(json.dumps(content))
    table = verdict_table(read_runs([run]))
    gap = table.rows[0][1][table.columns.index("SoLo gap")]
    assert gap.interval == "" and gap.mean == pytest.approx(0.2)
