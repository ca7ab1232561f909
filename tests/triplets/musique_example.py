"""The shipped MuSiQue example as tests use it."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_solopo.data.tokenize_row import tokenize_row
from megatron_solopo.data.tokenizer import Tokenizer
from megatron_solopo.triplets.build import BuildReport, build
from megatron_solopo.triplets.corpus.formats import Document, Question
from megatron_solopo.triplets.settings import BuildSettings

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "musique"
QUESTIONS = EXAMPLE / "musique.jsonl"

Row = dict[str, Any]


def load_script() -> ModuleType:
    """The example's make_tokenizer_and_model.py as a module."""
    spec = importlib.util.spec_from_file_location("make_example", EXAMPLE / "make_tokenizer_and_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(path: Path) -> list[Row]:
    """The rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def write(path: Path, lines: list[str]) -> Path:
    """Write lines and return the path."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def first_lines(count: int) -> list[str]:
    """Of the shipped questions."""
    return QUESTIONS.read_text(encoding="utf-8").splitlines()[:count]


def passages(prompt: str) -> list[str]:
    """The passages of a prompt in order; no paragraph of the example has an empty line in it."""
    _, *documents, question, answer = prompt.split("\n\n")
    assert question.startswith("Question: ") and answer == "Answer:\n"
    return documents


def lengths(row: Row, tokenizer: Tokenizer) -> dict[str, int]:
    """Tokens of both contexts with the longer answer, as `data prepare` makes them."""
    prompts = {name: row[name] for name in ("prompt_short", "prompt_long")}
    answers = {name: row[name] for name in ("chosen", "rejected")}
    row = tokenize_row(prompts, answers, tokenizer, "plain", {tokenizer.eos_token_id})
    ids = {name: len(tokens) for name, tokens in row.ids.items()}
    return {name: ids[name] + max(ids["chosen"], ids["rejected"]) for name in prompts}


def passage(document: Document) -> str:
    """A document as a prompt shows it."""
    return f"Title: {document.title}\n{document.text}"


def evidence(question: Question) -> set[str]:
    """The passages that support the answer."""
    return {passage(question.documents[index]) for index in question.supporting}


def construct(source: Path, output: Path, tokenizer: str, **options: Any) -> BuildReport:
    """Build triplets with answers by rule, at 2,048 tokens where nothing else is asked for."""
    options = {"responses": "constructed", "long_tokens": "2048"} | options
    return build(BuildSettings(input=source, output=output, tokenizer=tokenizer, **options))
