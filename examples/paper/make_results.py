#!/usr/bin/env python3
"""Write RESULTS.md: the paper's tables with the published figures, and ours beside them where a row was evaluated.

    python examples/paper/make_results.py [RESULTS_FOLDER]

The folder (default: results/paper) holds MODEL/ROW/GROUP/**/results_*.json, as run.sh has lm-evaluation-harness write
them. The newest file of a group counts. A cell without a number was not run, or its figure is not known to us.
"""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from paper_rows import FOLDER, MODELS, Row, read_rows

Scores = Mapping[str, Mapping[str, Any]]
"""Of lm-evaluation-harness: the task or group, then `metric,filter`."""

QA_TASKS = ("narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique")
RULER_QA_TASKS = ("ruler_qa_squad", "ruler_qa_hotpot")
LEADERBOARD = {
    "leaderboard_bbh": ("acc_norm,none",),
    "leaderboard_gpqa": ("acc_norm,none",),
    "leaderboard_ifeval": ("prompt_level_strict_acc,none", "inst_level_strict_acc,none"),
    "leaderboard_math_hard": ("exact_match,none",),
    "leaderboard_mmlu_pro": ("acc,none",),
    "leaderboard_musr": ("acc_norm,none",),
}


def longbench_qa(scores: Scores) -> float:
    """Mean token F1 of LongBench's six English question answering tasks."""
    return mean(scores[f"longbench_{task}"]["qa_f1_score,none"] for task in QA_TASKS)


def ruler_qa(scores: Scores) -> float:
    """Mean over RULER's two question answering tasks and over all lengths that were asked.

    Raises KeyError if no length has a score.
    """
    found = [
        value
        for task in RULER_QA_TASKS
        for name, value in scores[task].items()
        if name.removesuffix(",none").isdecimal() and value != -1  # -1: no sample has this length
    ]
    if not found:
        raise KeyError(f"score of any length in {' and '.join(RULER_QA_TASKS)}")
    return mean(found)


def longbench2(scores: Scores) -> float:
    """Accuracy over all questions."""
    return float(scores["longbench2"]["acc,none"])


def leaderboard(scores: Scores) -> float:
    """Mean of the six tasks' scores, not rescaled. Of IFEval's two strict accuracies, the mean counts."""
    return mean(mean(scores[task][metric] for metric in metrics) for task, metrics in LEADERBOARD.items())


@dataclass(frozen=True)
class Column:
    """One benchmark of the tables."""

    title: str
    group: str | None
    """Folder of its results; None: no command runs it."""
    score: Callable[[Scores], float] | None = None


COLUMNS = {
    "longbench_qa": Column("LongBench-v1 QA", "longbench", longbench_qa),
    "ruler_qa": Column("RULER QA", "ruler", ruler_qa),
    "longbench2": Column("LongBench-v2", "longbench2", longbench2),
    "leaderboard": Column("Open LLM Leaderboard", "leaderboard", leaderboard),
    "niah_plus": Column("NIAH-Plus", None),
}
HEADER = """# Results

Percent. **paper**: published for Qwen2.5-7B-Instruct. **ours**: what `run.sh` measured. An empty cell was not run, or
its figure is not known to us. The README says which scores these are, and why ours may differ.
"""


def read_scores(folder: Path) -> Scores | None:
    """The newest results below a folder; None if there are none."""
    files = sorted(folder.rglob("results_*.json"), key=lambda path: path.name)
    return None if not files else json.loads(files[-1].read_text(encoding="utf-8"))["results"]


def measured(folder: Path, column: Column) -> float | None:
    """A row's score in percent; None if it was not run.

    Args:
        folder: results of the row.

    Raises SystemExit if the results lack a task or a metric.
    """
    if column.group is None or column.score is None or (scores := read_scores(folder / column.group)) is None:
        return None
    try:
        return 100 * column.score(scores)
    except KeyError as error:
        sys.exit(f"error: {folder / column.group}: the results have no {error}; run the whole group")


def table_line(row: Row, model: str, results: Path) -> str:
    """A line of a model's table."""
    cells = [row.method]
    for name, column in COLUMNS.items():
        published = row.published.get(name) if model == MODELS[0] else None
        found = measured(results / model / row.name, column)
        cells += ["" if published is None else str(published), "" if found is None else f"{found:.2f}"]
    return f"| {' | '.join(cells)} |"


def make_results(results: Path) -> str:
    """The content of RESULTS.md."""
    titles = " | ".join(f"{column.title}, paper | ours" for column in COLUMNS.values())
    parts = [HEADER.rstrip()]
    for model in MODELS:
        rows = [
            row
            for row in read_rows().values()
            if model in row.models and (row.sweep is None or (results / model / row.name).is_dir())
        ]
        parts += [f"\n## {model}\n", f"| method | {titles} |", f"|---|{'---:|' * 2 * len(COLUMNS)}"]
        parts += [table_line(row, model, results) for row in rows]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    folder = Path(sys.argv[1] if sys.argv[1:] else "results/paper")
    if not folder.is_dir():
        sys.exit(f"error: {folder}: no such folder; name the RESULTS_FOLDER that holds MODEL/ROW/GROUP")
    (FOLDER / "RESULTS.md").write_text(make_results(folder), encoding="utf-8")
