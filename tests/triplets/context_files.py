"""Files of contexts and responses as `data build` and `data sample` write them, made by hand."""

import json
from pathlib import Path
from typing import Any


def context(number: int, *, chat: bool = False, suffix: str = "", **changes: Any) -> dict[str, Any]:
    """A row whose prompts tell its number."""
    short, long = f"short {number}", f"long {number} {suffix}and some more"
    row = {
        "id": f"q{number}{suffix}",
        "question_id": f"q{number}",
        "prompt_short": [{"role": "user", "content": short}] if chat else short,
        "prompt_long": [{"role": "user", "content": long}] if chat else long,
        "question": "Where?",
        "answers": ["Paris"],
        "evidence_depths": [0.25, 0.75],
        "response_tokens": 100,
    }
    return row | changes


def response(number: int, index: int, text: str, **changes: Any) -> dict[str, Any]:
    """One response to a question."""
    return {"question_id": f"q{number}", "index": index, "text": text, "finish_reason": "stop", "seed": 1} | changes


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write objects and return the path."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
