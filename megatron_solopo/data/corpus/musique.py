"""MuSiQue: 20 titled paragraphs per question, of which 2 to 4 support it, and the question taken apart into hops.

Format: one JSON object per line as in Trivedi et al. 2022, "MuSiQue: Multihop Questions via
Single-hop Question Composition" (arXiv 2108.00573).
"""

from pydantic import Field

from megatron_solopo.data.corpus.question import Document, Hop, Question
from megatron_solopo.data.corpus.record import Record, Text


class _Paragraph(Record):
    idx: int
    title: Text
    paragraph_text: Text
    is_supporting: bool


class _Hop(Record):
    question: Text
    answer: Text
    paragraph_support_idx: int | None = None


class MusiqueRecord(Record):
    """One row of the file; keys that are not listed here are ignored."""

    id: Text
    question: Text
    paragraphs: list[_Paragraph] = Field(min_length=1)
    question_decomposition: list[_Hop] = Field(default_factory=list)
    answer: Text
    answer_aliases: list[Text] = Field(default_factory=list)
    answerable: bool = True

    def to_question(self) -> Question:
        """The common form."""
        titles: dict[int | None, str] = {paragraph.idx: paragraph.title.strip() for paragraph in self.paragraphs}
        return Question(
            id=self.id,
            question=self.question,
            answers=(self.answer, *self.answer_aliases),
            documents=tuple(Document(p.title.strip(), p.paragraph_text.strip()) for p in self.paragraphs),
            supporting=tuple(index for index, p in enumerate(self.paragraphs) if p.is_supporting),
            hops=tuple(
                Hop(hop.question, hop.answer, titles.get(hop.paragraph_support_idx, ""))
                for hop in self.question_decomposition
            ),
            answerable=self.answerable,
        )
