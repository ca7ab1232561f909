"""SQuAD 1.1 and 2.0: one paragraph per question, other paragraphs of the same article beside it.

Two writings: the released file (one JSON object of articles, paragraphs and questions) and the Hugging Face rows
(`{"id", "title", "context", "question", "answers": {"text": [...]}}`).
Format: Rajpurkar et al. 2016 (arXiv 1606.05250) and 2018 (arXiv 1806.03822); no answer means not answerable.
"""

from collections.abc import Iterator
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megatron_solopo.data.corpus.question import Document, Question
from megatron_solopo.data.corpus.record import Record, Text


class _Answer(Record):
    text: Text


class _QuestionAndAnswers(Record):
    id: Text
    question: Text
    answers: list[_Answer]
    is_impossible: bool = False


class _Paragraph(Record):
    context: Text
    qas: list[_QuestionAndAnswers]


class _Article(Record):
    title: str
    paragraphs: list[_Paragraph]


class _Answers(Record):
    text: list[Text]


class SquadRecord(Record):
    """A Hugging Face row."""

    id: Text
    title: str = ""
    context: Text
    question: Text
    answers: _Answers

    def to_question(self) -> Question:
        """The common form."""
        document = Document(self.title.strip(), self.context.strip())
        answers = tuple(dict.fromkeys(self.answers.text))
        return Question(self.id, self.question, answers, (document,), (0,), answerable=bool(answers))


_ARTICLE: TypeAdapter[_Article] = TypeAdapter(_Article)


def read_articles(data: list[Any]) -> Iterator[Question | tuple[str, ValidationError]]:
    """The questions of a released file's articles; for an article that is no such thing, its place and what is wrong.

    A question's other documents are those of its article: the hardest distractors there are.
    """
    for number, value in enumerate(data):
        try:
            article = _ARTICLE.validate_python(value)
        except ValidationError as error:
            yield f"data.{number}", error
            continue
        title = article.title.replace("_", " ").strip()
        documents = tuple(Document(title, paragraph.context.strip()) for paragraph in article.paragraphs)
        for index, paragraph in enumerate(article.paragraphs):
            for each in paragraph.qas:
                answers = tuple(dict.fromkeys(answer.text for answer in each.answers))
                answerable = bool(answers) and not each.is_impossible
                yield Question(each.id, each.question, answers, documents, (index,), answerable=answerable)
