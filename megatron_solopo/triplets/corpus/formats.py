"""Corpora of questions: one form for all of them, and the records of each format that become it.

    generic            the project's own format, for data that has none: one JSON object per line,
                       {"id", "question", "answers": [...], "documents": [{"title", "text", "supporting"}, ...]}
    musique            20 titled paragraphs per question, of which 2 to 4 support it, and the question's hops;
                       Trivedi et al. 2022 (arXiv 2108.00573)
    hotpotqa,          documents as lists of sentences, evidence named by title; the released files and the
    2wikimultihopqa    Hugging Face rows; Yang et al. 2018 (arXiv 1809.09600), Ho et al. 2020 (arXiv 2011.01060)
    squad              versions 1.1 and 2.0: one paragraph per question, the other paragraphs of its article beside it;
                       the released file and the Hugging Face rows; Rajpurkar et al. 2016 (arXiv 1606.05250) and 2018
                       (arXiv 1806.03822); a question without an answer is not answerable

A pool of distractors is JSONL of {"title", "text"}. Titles may be left out of it and of the generic format.

The module also says when a text gives an answer away.
"""

import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    AliasChoices,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from megatron_solopo.errors import UserError

Format = Literal["musique", "hotpotqa", "2wikimultihopqa", "squad", "generic"]
LeakRule = Literal["substring", "word", "allow"]
"""What excludes a distractor: the answer anywhere in it, the answer as whole words, or nothing."""

# Nearly every document holds these words. As answers they are verdicts, not entities that a document could reveal.
_VERDICTS = frozenset({"yes", "no", "noanswer"})


class Document(NamedTuple):
    """A passage of a corpus; the title may be empty."""

    title: str
    text: str


class Hop(NamedTuple):
    """One step of a decomposed question; `#1` in `question` stands for the first hop's answer."""

    question: str
    answer: str
    title: str
    """Title of the document that holds the answer. Empty if the corpus names none."""


@dataclass(frozen=True)
class Question:
    """One question with its documents."""

    id: str
    question: str
    answers: tuple[str, ...]
    """The gold answer, then other accepted forms of it. Empty only if the question is not answerable."""
    documents: tuple[Document, ...]
    supporting: tuple[int, ...]
    """Indices of the evidence in `documents`."""
    hops: tuple[Hop, ...] = ()
    answerable: bool = True


def normalise(text: str) -> str:
    """Comparison form: texts that differ in compatible Unicode characters, case or white space become equal."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def golds(answers: Sequence[str]) -> list[str]:
    """Answers in comparison form, without blank ones."""
    return [gold for gold in map(normalise, answers) if gold]


def entity_golds(answers: Sequence[str]) -> list[str]:
    """The `golds` that a document can give away: all but yes and no."""
    return [gold for gold in golds(answers) if gold not in _VERDICTS]


def mentions(text: str, golds: Sequence[str]) -> bool:
    """Whether any gold answer is a substring of `text`, all in comparison form.

    RULER's `string_match_part` also scores substrings. So nothing outside the evidence scores as an answer. A short
    answer ("us") therefore also excludes longer words.
    """
    return any(gold in text for gold in golds)


def leaks(text: str, golds: Sequence[str], rule: LeakRule) -> bool:
    """Whether the rule excludes a distractor. Its text and the golds are in comparison form."""
    if rule == "allow" or not mentions(text, golds):
        return False
    return rule == "substring" or any(re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", text) for gold in golds)


Text = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]


class Record(BaseModel):
    """A row as its file has it. No value is converted to another type. Unknown keys are ignored."""

    model_config = ConfigDict(frozen=True, strict=True)


class DistractorRecord(Record):
    """A document of the pool that belongs to no question."""

    text: Text
    title: str = ""

    def to_document(self) -> Document:
        """Convert to the common form."""
        return Document(self.title.strip(), self.text.strip())


class _Document(DistractorRecord):
    supporting: bool


class GenericRecord(Record):
    """A row of the generic format."""

    id: Text
    question: Text
    answers: list[Text] = Field(min_length=1)
    documents: list[_Document] = Field(min_length=1)

    def to_question(self) -> Question:
        """Convert to the common form."""
        return Question(
            id=self.id,
            question=self.question,
            answers=tuple(self.answers),
            documents=tuple(document.to_document() for document in self.documents),
            supporting=tuple(index for index, document in enumerate(self.documents) if document.supporting),
        )


def _pairs(second: str) -> BeforeValidator:
    """Convert the parallel lists of a Hugging Face row, {"title": [...], second: [...]}, to a list of pairs."""

    def convert(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        titles, others = value.get("title"), value.get(second)
        if not isinstance(titles, list) or not isinstance(others, list) or len(titles) != len(others):
            raise UserError(f"expected lists of one length under title and {second}")
        return [list(pair) for pair in zip(titles, others, strict=True)]

    return BeforeValidator(convert)


def _tuples(value: Any) -> Any:
    """Convert lists to tuples: a strict model asks for tuples, and JSON has none."""
    return [tuple(item) if isinstance(item, list) else item for item in value] if isinstance(value, list) else value


class HotpotRecord(Record):
    """A row of HotpotQA or 2WikiMultihopQA."""

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
                raise UserError(f"supporting_facts names {title!r}, which is the title of no document of the row")
        for title, sentences in self.context:
            if not "".join(sentences).strip():
                raise UserError(f"the document {title!r} of context has no text")
        return self

    def to_question(self) -> Question:
        """Convert to the common form. A document supports the answer if any of its sentences does."""
        evidence = {title for title, _ in self.supporting_facts}
        return Question(
            id=self.id,
            question=self.question,
            answers=(self.answer,),
            documents=tuple(Document(title.strip(), _join(sentences)) for title, sentences in self.context),
            supporting=tuple(index for index, (title, _) in enumerate(self.context) if title in evidence),
        )


def _join(sentences: list[str]) -> str:
    """Join sentences. Those of HotpotQA have spaces between them, those of 2WikiMultihopQA have none."""
    text = ""
    for sentence in sentences:
        text += sentence if not text or sentence[:1].isspace() or text[-1].isspace() else f" {sentence}"
    return text.strip()


class _MusiqueParagraph(Record):
    idx: int
    title: Text
    paragraph_text: Text
    is_supporting: bool


class _Hop(Record):
    question: Text
    answer: Text
    paragraph_support_idx: int | None = None


class MusiqueRecord(Record):
    """A row of MuSiQue."""

    id: Text
    question: Text
    paragraphs: list[_MusiqueParagraph] = Field(min_length=1)
    question_decomposition: list[_Hop] = Field(default_factory=list)
    answer: Text
    answer_aliases: list[Text] = Field(default_factory=list)
    answerable: bool = True

    def to_question(self) -> Question:
        """Convert to the common form."""
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


class _Answer(Record):
    text: Text


class _QuestionAndAnswers(Record):
    id: Text
    question: Text
    answers: list[_Answer]
    is_impossible: bool = False


class _SquadParagraph(Record):
    context: Text
    qas: list[_QuestionAndAnswers]


class _Article(Record):
    title: str
    paragraphs: list[_SquadParagraph]


class _Answers(Record):
    text: list[Text]


class SquadRecord(Record):
    """A Hugging Face row of SQuAD."""

    id: Text
    title: str = ""
    context: Text
    question: Text
    answers: _Answers

    def to_question(self) -> Question:
        """Convert to the common form."""
        document = Document(self.title.strip(), self.context.strip())
        answers = tuple(dict.fromkeys(self.answers.text))
        return Question(self.id, self.question, answers, (document,), (0,), answerable=bool(answers))


_ARTICLE: TypeAdapter[_Article] = TypeAdapter(_Article)


def read_articles(data: list[Any]) -> Iterator[Question | tuple[int, ValidationError]]:
    """The questions of the articles in a released file of SQuAD. A bad article gives its index and its errors.

    The other documents of a question are those of its article, which are the hardest distractors.
    """
    for number, value in enumerate(data):
        try:
            article = _ARTICLE.validate_python(value)
        except ValidationError as error:
            yield number, error
            continue
        title = article.title.replace("_", " ").strip()
        documents = tuple(Document(title, paragraph.context.strip()) for paragraph in article.paragraphs)
        for index, paragraph in enumerate(article.paragraphs):
            for each in paragraph.qas:
                answers = tuple(dict.fromkeys(answer.text for answer in each.answers))
                answerable = bool(answers) and not each.is_impossible
                yield Question(each.id, each.question, answers, documents, (index,), answerable=answerable)
