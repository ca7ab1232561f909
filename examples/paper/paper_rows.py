#!/usr/bin/env python3
"""The rows of the paper's tables, as rows.toml states them.

python examples/paper/paper_rows.py                            # names of all rows
python examples/paper/paper_rows.py solo-dpo llama-3.1-8b      # what run.sh needs of a row, as assignments of bash
"""

import shlex
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
MODELS = ("qwen2.5-7b", "llama-3.1-8b")
SHORT_TOKENS, LONG_TOKENS = 1100, 7500
"""Of a prompt, as published: about 1.1K and 7.5K."""
ANSWER_ROOM = 512
"""Tokens of the longest answer."""
TRIPLETS = 5000


@dataclass(frozen=True)
class Row:
    """One row: a training run, or a model that is evaluated only."""

    name: str
    method: str
    pairs: str | None = None
    """Which contexts the answers were sampled behind: short or long. None: nothing is trained."""
    overrides: tuple[str, ...] = ()
    """Of the model's configuration, such as `objective.alpha=3`."""
    by_model: Mapping[str, list[str]] = field(default_factory=dict)
    """Overrides of one model, which win."""
    models: Sequence[str] = MODELS
    """The base models that have this row."""
    weights: str | None = None
    """Hugging Face directory that is evaluated where nothing is trained. None: the base model."""
    short_tokens: int = SHORT_TOKENS
    published: Mapping[str, float] = field(default_factory=dict)
    """Figures for Qwen2.5-7B-Instruct, in percent, by column."""
    sweep: str | None = None
    """The sweep that the row is a part of."""

    def data(self, model: str) -> Path:
        """Folder of the row's responses and triplets. Rows with the same pairs share it."""
        return Path("data/paper") / model / f"{self.pairs}-{self.short_tokens}"

    def settings(self, model: str) -> list[str]:
        """All overrides of the model's configuration."""
        paths = [f"run_dir=runs/paper/{model}/{self.name}", f"data.path={self.data(model) / 'prepared'}"]
        return [*paths, *self.overrides, *self.by_model.get(model, ())]


def read_rows(path: Path = FOLDER / "rows.toml") -> dict[str, Row]:
    """All rows by name, those of sweeps last."""
    content = tomllib.loads(path.read_text(encoding="utf-8"))
    rows = {name: _row(name, values, content["losses"]) for name, values in content["rows"].items()}
    for sweep, values in content["sweeps"].items():
        for parent in values["of"]:
            for value in values["values"]:
                varied = _varied(rows[parent], sweep, values["key"], value)
                models = tuple(m for m in varied.models if _trains(varied, m) != _trains(rows[parent], m))
                if models:
                    rows[varied.name] = replace(varied, models=models)
    return rows


def _row(name: str, values: dict[str, Any], losses: Mapping[str, list[str]]) -> Row:
    loss = losses[values.pop("loss")] if "loss" in values else []
    return Row(name, overrides=(*values.pop("overrides", ()), *loss), **values)


def _trains(row: Row, model: str) -> set[str]:
    """What decides the run, as keys and values. The last of several values of a key counts."""
    settings = dict(each.split("=", 1) for each in row.settings(model) if not each.startswith("run_dir="))
    return {f"{key}={value}" for key, value in settings.items()}


def _varied(parent: Row, sweep: str, key: str, value: str) -> Row:
    """A row of a sweep. Its value is the same for all models, and no figure of it is published."""
    row = replace(
        parent,
        name=f"{parent.name}-{sweep}-{value}",
        method=f"{parent.method}, {sweep} {value}",
        published={},
        sweep=sweep,
    )
    if key == "short_tokens":
        return replace(row, short_tokens=int(value))
    kept = tuple(each for each in parent.overrides if not each.startswith(f"{key}="))
    by_model = {
        model: [each for each in more if not each.startswith(f"{key}=")] for model, more in parent.by_model.items()
    }
    return replace(row, overrides=(*kept, f"{key}={value}"), by_model=by_model)


def assignments(row: Row, model: str) -> str:
    """Variables of bash."""
    values = {
        "pairs": row.pairs or "",
        "short_tokens": str(row.short_tokens + ANSWER_ROOM),
        "long_tokens": str(LONG_TOKENS + ANSWER_ROOM),
        "answer_room": str(ANSWER_ROOM),
        "triplets": str(TRIPLETS),
        "data": str(row.data(model)),
        "weights": row.weights or f"models/{model}",
    }
    lines = [f"{name}={shlex.quote(value)}" for name, value in values.items()]
    return "\n".join([*lines, f"overrides=({' '.join(map(shlex.quote, row.settings(model)))})"])


def find_row(name: str, model: str) -> Row:
    """The row of a base model. Raises SystemExit, with what there is, if there is none."""
    rows = read_rows()
    if model not in MODELS:
        sys.exit(f"error: no model {model}; models: {', '.join(MODELS)}")
    if name not in rows:
        near = ", ".join(get_close_matches(name.lower(), rows, cutoff=0.5))
        hint = f"the nearest: {near}; " if near else ""
        sys.exit(f"error: no row {name}; {hint}python examples/paper/paper_rows.py lists the rows")
    if model not in rows[name].models:
        sys.exit(f"error: {name} is no row of {model}, only of {', '.join(rows[name].models)}")
    return rows[name]


if __name__ == "__main__":
    match sys.argv[1:]:
        case []:
            print("\n".join(read_rows()))
        case [name] if name not in ("-h", "--help"):
            print(assignments(find_row(name, MODELS[0]), MODELS[0]))
        case [name, model]:
            print(assignments(find_row(name, model), model))
        case _:
            sys.exit(__doc__)
