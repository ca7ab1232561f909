"""A corpus on disk. Each document is stored once, and several processes read it from one memory map.

    documents.arrow   title, text, key   key: index of the first document with the same text in comparison form
    questions.arrow   line, id, question, answers, documents, supporting, hops
    tokens.npy        int32 per document: the tokens that it adds to a prompt, written by `triplets.build`

Texts stay on disk. A process holds only the columns of numbers and the rows that it reads.
"""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from megatron_solopo.triplets.corpus.formats import Document, Hop, Question, normalise

_BATCH_ROWS = 512
_DOCUMENTS = pa.schema({"title": pa.string(), "text": pa.string(), "key": pa.int32()})
_QUESTIONS = pa.schema(
    {
        "line": pa.int64(),
        "id": pa.string(),
        "question": pa.string(),
        "answers": pa.list_(pa.string()),
        "documents": pa.list_(pa.int32()),
        "supporting": pa.list_(pa.int32()),
        "hops": pa.list_(pa.list_(pa.string())),
    }
)


class _Table:
    """An Arrow file that rows are appended to."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._schema = schema
        self._writer = pa.ipc.new_file(str(path), schema)
        self._rows: list[dict[str, Any]] = []

    def append(self, row: dict[str, Any]) -> None:
        self._rows.append(row)
        if len(self._rows) == _BATCH_ROWS:
            self._flush()

    def _flush(self) -> None:
        self._writer.write_batch(pa.RecordBatch.from_pylist(self._rows, schema=self._schema))
        self._rows = []

    def close(self) -> None:
        if self._rows:
            self._flush()
        self._writer.close()


class CorpusWriter:
    """Writes a store into a directory. Use as a context manager."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._documents = _Table(directory / "documents.arrow", _DOCUMENTS)
        self._questions = _Table(directory / "questions.arrow", _QUESTIONS)
        self._indices: dict[bytes, int] = {}
        self._keys: dict[bytes, int] = {}
        self.questions = 0

    def __enter__(self) -> "CorpusWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._documents.close()
        self._questions.close()

    def add_document(self, document: Document) -> int:
        """Write a document if it is new. Returns its index."""
        digest = _digest(f"{document.title}\n{document.text}")
        if digest not in self._indices:
            index = self._indices[digest] = len(self._indices)
            key = self._keys.setdefault(_digest(normalise(document.text)), index)
            self._documents.append({"title": document.title, "text": document.text, "key": key})
        return self._indices[digest]

    def add_question(self, line: int, question: Question) -> None:
        """Write a question and its documents."""
        indices = [self.add_document(document) for document in question.documents]
        self.questions += 1
        self._questions.append(
            {
                "line": line,
                "id": question.id,
                "question": question.question,
                "answers": list(question.answers),
                "documents": indices,
                "supporting": list(question.supporting) if question.answerable else None,
                "hops": [list(hop) for hop in question.hops],
            }
        )


class Corpus:
    """A written store.

    Attributes:
        keys: int32 per document. Documents with one key never share a context.
        pool: Indices of the documents that distractors are drawn from. It holds each text once.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._documents = _open(directory / "documents.arrow")
        self._questions = _open(directory / "questions.arrow")
        self.keys: NDArray[np.int32] = self._documents["key"].to_numpy()
        self.pool: NDArray[np.int64] = np.flatnonzero(self.keys == np.arange(len(self.keys)))

    @property
    def num_documents(self) -> int:
        """Number of documents that differ in title or text."""
        return len(self.keys)

    @property
    def num_questions(self) -> int:
        """Number of questions, the unanswerable ones included."""
        return int(self._questions.num_rows)

    def document(self, index: int) -> Document:
        """One document."""
        return Document(self._documents["title"][index].as_py(), self._documents["text"][index].as_py())

    def question(self, number: int) -> tuple[int, Question, list[int]]:
        """The line of a question, the question, and the indices of its documents in this store."""
        row = {name: self._questions[name][number].as_py() for name in _QUESTIONS.names}
        question = Question(
            id=row["id"],
            question=row["question"],
            answers=tuple(row["answers"]),
            documents=tuple(map(self.document, row["documents"])),
            supporting=tuple(row["supporting"] or ()),
            hops=tuple(Hop(*hop) for hop in row["hops"]),
            answerable=row["supporting"] is not None,
        )
        return row["line"], question, row["documents"]

    def save_tokens(self, counts: Iterable[int]) -> None:
        """Store the length of every document, in the order of their indices."""
        np.save(self._directory / "tokens.npy", np.fromiter(counts, np.int32, count=self.num_documents))

    def load_tokens(self) -> NDArray[np.int32]:
        """The lengths that `save_tokens` stored."""
        tokens: NDArray[np.int32] = np.load(self._directory / "tokens.npy")
        return tokens


def _open(path: Path) -> pa.Table:
    return pa.ipc.open_file(pa.memory_map(str(path))).read_all()


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8"), digest_size=16).digest()
