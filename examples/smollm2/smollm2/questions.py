"""Make single-hop questions from the decompositions of MuSiQue's questions, in three splits without shared evidence."""

import json
import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

from megatron_solopo.files import atomic_path
from smollm2.steps import HERE

CORPUS = HERE.parent / "musique" / "musique.jsonl"
SPLITS = {"train": 0.55, "dev": 0.10, "test": 0.35}
"""Shares of the evidence paragraphs."""
_RELATION = re.compile(r"(.+?) >> (.+)")
Row = dict[str, Any]


def single_hops(row: Row) -> Iterator[tuple[str, str, int]]:
    """Question, answer and number of the evidence paragraph of every hop of a question of MuSiQue.

    `#1` stands for the answer of the first hop. "X >> relation" becomes "What is the relation of X?".
    """
    answers: list[str] = []
    for hop in row["question_decomposition"]:
        text = re.sub(r"#(\d+)", lambda found: answers[int(found[1]) - 1], hop["question"]).strip()
        if relation := _RELATION.fullmatch(text):
            text = f"What is the {relation[2]} of {relation[1]}?"
        answers.append(hop["answer"])
        yield text, hop["answer"], hop["paragraph_support_idx"]


def read_rows() -> list[Row]:
    """The shipped rows of MuSiQue."""
    return [json.loads(line) for line in CORPUS.read_text(encoding="utf-8").splitlines()]


def questions(rows: list[Row]) -> list[Row]:
    """Every question once, in the `generic` format of `data build`, with its evidence paragraph as `evidence`."""
    found: dict[str, Row] = {}
    for row in rows:
        texts = [each["paragraph_text"] for each in row["paragraphs"]]
        for text, answer, support in single_hops(row):
            aliases = row["answer_aliases"] if answer == row["answer"] else []
            documents = [
                {"title": each["title"], "text": each["paragraph_text"], "supporting": number == support}
                for number, each in enumerate(row["paragraphs"])
            ]
            question = {"question": text, "answers": [answer, *aliases], "documents": documents}
            found.setdefault(text.lower(), {"id": f"{row['id']}-{support}"} | question | {"evidence": texts[support]})
    return list(found.values())


def split_of(paragraph: str) -> str:
    """The split of all questions that this paragraph answers: it depends on the paragraph's text alone."""
    place = int(sha256(paragraph.encode()).hexdigest()[:8], 16) / 2**32
    for name, share in SPLITS.items():
        if place < share:
            return name
        place -= share
    return name


def splits(found: list[Row]) -> dict[str, list[Row]]:
    """Questions by split. No split holds a paragraph that is evidence in another one, not even as a distractor."""
    split_by_evidence = {each["evidence"]: split_of(each["evidence"]) for each in found}
    result: dict[str, list[Row]] = {name: [] for name in SPLITS}
    for question in found:
        name = split_by_evidence[question["evidence"]]
        own = [each for each in question["documents"] if split_by_evidence.get(each["text"], name) == name]
        result[name].append({key: question[key] for key in ("id", "question", "answers")} | {"documents": own})
    return result


def write_questions(output: Path) -> dict[str, int]:
    """Write `<split>.jsonl` for every split; returns the number of questions of each."""
    found = splits(questions(read_rows()))
    with atomic_path(output.resolve()) as directory:
        directory.mkdir()
        for name, members in found.items():
            lines = [json.dumps(each, ensure_ascii=False) for each in members]
            (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return {name: len(members) for name, members in found.items()}
