"""HotpotQA and 2WikiMultihopQA: documents as lists of sentences, evidence named by title.

Two writings of the same rows: the released files (a JSON array; `context` is a list of [title, sentences] and
`supporting_facts` of [title, sentence number]) and the Hugging Face ones (objects of parallel lists).
Formats: Yang et al. 2018 (arXiv 1809.09600), Ho et al. 2020 (arXiv 2011.01060).
"""

from typing import Annotated, Any

from pydantic import AliasChoices, BeforeValidator, Field, model_validator

from megatron_solopo.data.corpus.question import Document, Question
from megatron_solopo.data.corpus.record import Record, Text


def _pairs(second: str) -> BeforeValidator:
    """Parallel lists {"title": [...], second: [...]} become the released files' list of pairs."""

    def convert(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        titles, others = value.get("title"), value.get(second)
        if not isinstance(titles, list) or not isinstance(others, list) or len(titles) != len(others):
            raise ValueError(f"expected lists of one length under title and {second}")
        return [list(pair) for pair in zip(titles, others, strict=True)]

    return BeforeValidator(convert)


def _tuples(value: Any) -> Any:
    """JSON has no tuples, which a strict model asks for."""
    return [tuple(item) if isinstance(item, list) else item for item in value] if isinstance(value, list) else value


class HotpotRecord(Record):
    """One row; keys that are not listed here are ignored."""

    id: Text = Field(validation_alias=AliasChoices("_id", "id"))
    question: Text
    answer: Text
    context: Annotated[list[tuple[Text, list[str]]], BeforeValidator(_tuples), _pairs("sentences")] = Field(
        min_length=1
    )
    supporting_facts: Annotated[list[tuple[Text, int]], BeforeValidator(_tuples), _pairs("sent_id")]

    @model_validator(mode="after")
    def _check_documents(self) -> "HotpotRecord":
        titles = {title for title, _ in self.context}
        for title, _ in self.supporting_facts:
            if title not in titles:
                raise ValueError(f"supporting_facts names {title!r}, which is the title of no document of the row")
        for title, sentences in self.context:
            if not "".join(sentences).strip():
                raise ValueError(f"the document {title!r} of context has no text")
        return self

    def to_question(self) -> Question:
        """The common form: a document supports the answer if any of its sentences does."""
        evidence = {title for title, _ in self.supporting_facts}
        return Question(
            id=self.id,
            question=self.question,
            answers=(self.answer,),
            documents=tuple(Document(title.strip(), _join(sentences)) for title, sentences in self.context),
            supporting=tuple(index for index, (title, _) in enumerate(self.context) if title in evidence),
        )


def _join(sentences: list[str]) -> str:
    """HotpotQA's sentences carry their own spaces, 2WikiMultihopQA's do not."""
    text = ""
    for sentence in sentences:
        text += sentence if not text or sentence[:1].isspace() or text[-1].isspace() else f" {sentence}"
    return text.strip()
