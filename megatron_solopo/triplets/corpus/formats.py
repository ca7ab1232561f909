"""The one form that every corpus is read into, and when a text gives an answer away.

What the records of all formats share.

The project's own corpus format, for data that has no format of its own.

    questions    {"id", "question", "answers": [...], "documents": [{"title", "text", "supporting"}, ...]}
    distractors  {"title", "text"}

One JSON object per line; titles may be left out.

HotpotQA and 2WikiMultihopQA: documents as lists of sentences, evidence named by title.

Two writings of the same rows: the released files (a JSON array; `context` is a list of [title, sentences] and
`supporting_facts` of [title, sentence number]) and the Hugging Face ones (objects of parallel lists).
Formats: Yang et al. 2018 (arXiv 1809.09600), Ho et al. 2020 (arXiv 2011.01060).

MuSiQue: 20 titled paragraphs per question, of which 2 to 4 support it, and the question taken apart into hops.

Format: one JSON object per line as in Trivedi et al. 2022, "MuSiQue: Multihop Questions via
Single-hop Question Composition" (arXiv 2108.00573).

SQuAD 1.1 and 2.0: one paragraph per question, other paragraphs of the same article beside it.

Two writings: the released file (one JSON object of articles, paragraphs and questions) and the Hugging Face rows
(`{"id", "title", "context", "question", "answers": {"text": [...]}}`).
Format: Rajpurkar et al. 2016 (arXiv 1606.05250) and 2018 (arXiv 1806.03822); no answer means not answerable.
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

# Nearly every document holds these words: as answers they are verdicts, not entities that a document could reveal.
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
    """Of the document it rests on; empty where the corpus names none."""


@dataclass(frozen=True)
class Question:
    """One question with its documents."""

    id: str
    question: str
    answers: tuple[str, ...]
    """The gold answer, then other accepted forms of it; empty only where it is not answerable."""
    documents: tuple[Document, ...]
    supporting: tuple[int, ...]
    """Indices of the evidence in `documents`."""
    hops: tuple[Hop, ...] = ()
    answerable: bool = True


def normalise(text: str) -> str:
    """Comparison form: Unicode-compatible characters, case and runs of white space made equal."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def golds(answers: Sequence[str]) -> list[str]:
    """Answers in comparison form, without those that are only white space in it."""
    return [gold for gold in map(normalise, answers) if gold]


def entity_golds(answers: Sequence[str]) -> list[str]:
    """`golds` that a document can give away: yes and no are not among them."""
    return [gold for gold in golds(answers) if gold not in _VERDICTS]


def mentions(text: str, golds: Sequence[str]) -> bool:
    """Whether any gold answer is a substring of `text`, all in comparison form.

    A substring, as in RULER's `string_match_part`, so that what would be scored as the answer is
    never found outside the evidence; a short answer ("us") therefore also excludes longer words.
    """
    return any(gold in text for gold in golds)


def leaks(text: str, golds: Sequence[str], rule: LeakRule) -> bool:
    """Whether a distractor with this text (comparison form) is excluded for the golds (comparison form)."""
    if rule == "allow" or not mentions(text, golds):
        return False
    return rule == "substring" or any(re.search(rf"(?<!\w){re.escape(gold)}(?!\w)", text) for gold in golds)


Text = Annotated[str, StringConstraints(min_length=1, pattern=r"\S")]


class Record(BaseModel):
    """A row as its file has it: no value is converted to another type, unknown keys are ignored."""

    model_config = ConfigDict(frozen=True, strict=True)


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


def _pairs(second: str) -> BeforeValidator:
    """Parallel lists {"title": [...], second: [...]} become the released files' list of pairs."""

    def convert(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        titles, others = value.get("title"), value.get(second)
        if not isinstance(titles, list) or not isinstance(others, list) or len(titles) != len(others):
            raise UserError(f"expected lists of one length under title and {second}")
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
                raise UserError(f"supporting_facts names {title!r}, which is the title of no document of the row")
        for title, sentences in self.context:
            if not "".join(sentences).strip():
                raise UserError(f"the document {title!r} of context has no text")
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
    """One row of the file; keys that are not listed here are ignored."""

    id: Text
    question: Text
    paragraphs: list[_MusiqueParagraph] = Field(min_length=1)
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
