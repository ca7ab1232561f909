"""MuSiQue questions: the file format, and when a text gives an answer away.

Format: one JSON object per line as in Trivedi et al. 2022, "MuSiQue: Multihop Questions via
Single-hop Question Composition" (arXiv 2108.00573): 20 titled paragraphs per question, of which
2 to 4 support it, and the question taken apart into single hops.
"""

import unicodedata
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

Text = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True)


class Paragraph(_Record):
    """One titled paragraph; `is_supporting` marks the evidence."""

    idx: int
    title: Text
    paragraph_text: Text
    is_supporting: bool

    @property
    def passage(self) -> str:
        """The paragraph as a context shows it."""
        return f"Title: {self.title}\n{self.paragraph_text}"


class Hop(_Record):
    """One single-hop question; `#1` in it stands for the answer of the first hop."""

    question: Text
    answer: Text
    paragraph_support_idx: int | None = None


class Question(_Record):
    """One row of the file; keys that are not listed here are ignored."""

    id: Text
    question: Text
    paragraphs: list[Paragraph]
    question_decomposition: Annotated[list[Hop], Field(min_length=1)]
    answer: Text
    answer_aliases: list[Text] = []
    answerable: bool = True

    @property
    def golds(self) -> list[str]:
        """The answer and its aliases in comparison form."""
        return [normalise(answer) for answer in (self.answer, *self.answer_aliases)]

    @property
    def evidence(self) -> list[Paragraph]:
        """The supporting paragraphs."""
        return [paragraph for paragraph in self.paragraphs if paragraph.is_supporting]

    def title(self, hop: Hop) -> str:
        """Title of the paragraph a hop rests on; empty where the file names none."""
        return next((p.title for p in self.paragraphs if p.idx == hop.paragraph_support_idx), "")


def read_questions(path: Path) -> list[Question]:
    """Read a MuSiQue-format JSONL file.

    Raises ValueError naming line and field for the first row that is not of this format, and for a
    file that is missing or holds no row.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise ValueError(f"--input {path}: {error.strerror}") from None
    questions = [_parse(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not questions:
        raise ValueError(f"--input {path}: holds no question, expected MuSiQue JSONL with one object per line")
    return questions


def _parse(line: bytes, where: str) -> Question:
    try:
        return Question.model_validate_json(line)
    except ValidationError as error:
        detail = error.errors()[0]
        field = ".".join(str(part) for part in detail["loc"]) or "the whole line"
        raise ValueError(f"{where}: {field}: {detail['msg']} (expected a MuSiQue question)") from None


def normalise(text: str) -> str:
    """Comparison form: Unicode-compatible characters, case and runs of white space made equal."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def mentions(text: str, golds: list[str]) -> bool:
    """Whether any gold answer is a substring of `text`, all in comparison form.

    A substring, as in RULER's `string_match_part`, so that what would be scored as the answer is
    never found outside the evidence; a short answer ("us") therefore also excludes longer words.
    """
    return any(gold in text for gold in golds)
