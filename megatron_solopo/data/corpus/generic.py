"""The project's own corpus format, for data that has no format of its own.

    questions    {"id", "question", "answers": [...], "documents": [{"title", "text", "supporting"}, ...]}
    distractors  {"title", "text"}

One JSON object per line; titles may be left out.
"""

from pydantic import Field

from megatron_solopo.data.corpus.question import Document, Question
from megatron_solopo.data.corpus.record import Record, Text


class DistractorRecord(Record):
    """A document of the pool that belongs to no question."""

    text: Text
    title: str = ""

    def to_document(self) -> Document:
        """The common form."""
        return Document(self.title.strip(), self.text.strip())


class _Document(DistractorRecord):
    supporting: bool


class GenericRecord(Record):
    """One question."""

    id: Text
    question: Text
    answers: list[Text] = Field(min_length=1)
    documents: list[_Document] = Field(min_length=1)

    def to_question(self) -> Question:
        """The common form."""
        return Question(
            id=self.id,
            question=self.question,
            answers=tuple(self.answers),
            documents=tuple(document.to_document() for document in self.documents),
            supporting=tuple(index for index, document in enumerate(self.documents) if document.supporting),
        )
