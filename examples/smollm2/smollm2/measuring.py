"""Accuracy of one model on one part of the questions: `evaluate long-context`, greedy answers."""

from pathlib import Path
from typing import Any

from megatron_solopo.files import read_jsonl
from megatron_solopo.results.long_context import read_long_context
from smollm2.plan import DEV, NEEDLES, Run, Sizes, test_part
from smollm2.steps import build_contexts, command, dtype, first_lines
from smollm2.training import answers_directory, model_directory


def contexts_of(work: Path, sizes: Sizes, part: str) -> Path:
    """The contexts of a part; they are made if they are not there. `data build` says which questions it leaves out."""
    split = "dev" if part == DEV else "test"
    length, count = sizes.dev_tokens, sizes.dev_questions
    if part != DEV:
        length = sizes.long_tokens if asks_short(sizes, part) else int(part.removeprefix("test-"))
        count = sizes.test_questions
    questions, contexts = work / f"{split}-questions.jsonl", work / f"{part}.jsonl"
    if not contexts.exists():
        first_lines(work / "questions" / f"{split}.jsonl", questions, count)
        build_contexts(questions, contexts, work / "model", sizes.short_tokens, length)
    return contexts


def measure(work: Path, sizes: Sizes, run: Run, part: str) -> dict[str, Any]:
    """Score of every question by its id, for each task of the part; and the time."""
    output = answers_directory(work, run) / f"{part}.json"
    asked: list[object]
    if part == NEEDLES:
        asked = ["--tasks", "needle_single", "--samples", sizes.needle_samples]
        asked += ["--lengths", ",".join(map(str, sizes.needle_lengths))]
    else:
        side = "both" if part == DEV else "short" if asks_short(sizes, part) else "long"
        asked = ["--contexts", contexts_of(work, sizes, part), "--side", side]
    command(
        *("evaluate", "long-context", "--model", model_directory(work, run), "--output", output, *asked),
        *("--dtype", dtype(), "--backend", "transformers"),
        log=work / "logs" / f"{run.name}.{part}.log",
    )
    return read_scores(output)


def read_scores(output: Path) -> dict[str, Any]:
    """What `evaluate long-context` wrote into and beside `output`: answers and their main scores."""
    results = read_long_context(output)
    answers = [
        {
            "length": row["length"],
            "id": row["id"],
            "tokens": row["prompt_tokens"],
            "score": row["scores"][results.main_metrics[row["task"]]],
            "answer": row["prediction"],
        }
        for row in read_jsonl(output.with_suffix(".predictions.jsonl"))
    ]
    return {"answers": answers, "dtype": results.settings["dtype"], "seconds": round(results.seconds, 1)}


def asks_short(sizes: Sizes, part: str) -> bool:
    """Whether a part is the test split's short contexts, the first of its lengths."""
    return part == test_part(sizes.lengths[0])
