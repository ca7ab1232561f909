#!/usr/bin/env python3
"""Plan every row on 8 H100: plans/MODEL.txt holds the plans, COSTS.md their figures. Takes about a minute.

python examples/paper/make_costs.py
"""

import json
from contextlib import redirect_stdout
from io import StringIO
from typing import Any

from paper_rows import FOLDER, LONG_TOKENS, MODELS, TRIPLETS, Row, read_rows

ANSWER_TOKENS = 250
"""Of an answer: an assumption."""
LAYOUT = "tp=2,cp=2"
HEADER = f"""# What the rows cost

Estimates of `megatron-solopo plan` for 8 H100, {TRIPLETS:,} triplets and answers of {ANSWER_TOKENS} tokens. `plans/`
holds the plans in full. Nothing of this was measured. Rows that differ in alpha cost the same.

Sampling and evaluation come on top, and may cost more than a training. 10,000 questions with 32 answers each are 80
million tokens to generate, at 250 each. Rows with the same base model and the same contexts share them.

To write these files again:

    python examples/paper/make_costs.py
"""


def planned_rows() -> dict[str, Row]:
    """The rows that train, without those that only have another alpha."""
    return {name: row for name, row in read_rows().items() if row.pairs is not None and row.sweep != "alpha"}


def plan_arguments(row: Row, model: str) -> list[str]:
    """Arguments of `megatron-solopo` for the plan of a row; start it in the repository's root."""
    tokens = f"short={row.short_tokens},long={LONG_TOKENS},response={ANSWER_TOKENS}"
    return [
        *("plan", "--config", f"examples/paper/{model}.yaml", "--gpus", "8", "--gpu", "h100"),
        *("--tokens", tokens, "--triplets", str(TRIPLETS), "--vary", "recompute", "--explain", LAYOUT),
        *(f"model.path=examples/plans/models/{model}", *row.settings(model)),
    ]


def make_plan(row: Row, model: str) -> tuple[str, dict[str, Any]]:
    """The text of a row's plan, behind its command, and the figures of the layout."""
    arguments = plan_arguments(row, model)
    text, figures = (_run([*arguments, *more]) for more in ([], ["--json"]))
    return f"$ megatron-solopo {' '.join(arguments)}\n\n{text}", json.loads(figures)["chosen"]


def _run(arguments: list[str]) -> str:
    from megatron_solopo.cli.main import main

    printed = StringIO()
    with redirect_stdout(printed):
        main(arguments)
    return printed.getvalue()


def cost_line(row: Row, figures: dict[str, Any]) -> str:
    """A line of the table."""
    fullest = max(stage["total"] for stage in figures["memory_bytes"]) / 2**30
    cells = [
        row.name,
        f"{figures['steps']}",
        f"{figures['step_seconds']:.1f}",
        f"{figures['reference_seconds'] / 60:.1f}",
        f"{figures['hours'] * 60:.0f}",
        f"{figures['gpu_hours']:.1f}",
        f"{fullest:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def write_costs() -> None:
    """Write all files."""
    parts, rows = [HEADER.rstrip()], planned_rows()
    for model in MODELS:
        plans = {name: make_plan(row, model) for name, row in rows.items()}
        text = "\n".join(text for text, _ in plans.values())
        (FOLDER / "plans").mkdir(exist_ok=True)
        (FOLDER / "plans" / f"{model}.txt").write_text(text, encoding="utf-8")
        parts += [
            f"\n## {model}\n\n| row | steps | s per step | reference pass, min | run, min | GPU-hours | GiB per GPU |",
            "|---|---:|---:|---:|---:|---:|---:|",
            *(cost_line(rows[name], figures) for name, (_, figures) in plans.items()),
        ]
    (FOLDER / "COSTS.md").write_text("\n".join(parts) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_costs()
