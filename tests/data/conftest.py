"""Tokenizers made once per run, a file of triplets, and the shipped questions."""

import pytest
from datasets import disable_progress_bars

from megatron_solopo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_solopo.triplets.corpus.formats import Question
from megatron_solopo.triplets.corpus.read import read_questions
from tests.data.sample_rows import triplet, write_rows
from tests.data.tiny_tokenizers import write_hugging_face, write_sentencepiece
from tests.triplets.musique_example import QUESTIONS, load_script

disable_progress_bars()


@pytest.fixture(scope="session")
def hugging_face(tmp_path_factory):
    return str(write_hugging_face(tmp_path_factory.mktemp("tokenizer") / "hf"))


@pytest.fixture(scope="session")
def sentencepiece(tmp_path_factory):
    return str(write_sentencepiece(tmp_path_factory.mktemp("tokenizer") / "piece.model"))


@pytest.fixture
def triplets(tmp_path):
    return write_rows(tmp_path / "data.jsonl", [triplet(i, long_words=5 + i) for i in range(20)])


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("tokenizer")
    load_script().make_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture(scope="session")
def tokenizer(tokenizer_path) -> Tokenizer:
    return load_tokenizer(tokenizer_path)


@pytest.fixture(scope="session")
def questions() -> dict[str, Question]:
    return {question.id: question for _, question in read_questions(QUESTIONS, "musique")}
