"""Tokenizers made once per run, and the shipped questions."""

import pytest
from datasets import disable_progress_bars

from megatron_solopo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_solopo.triplets.corpus.formats import Question
from megatron_solopo.triplets.corpus.read import read_questions
from tests.data.conftest import hugging_face, sentencepiece  # noqa: F401  (fixtures)
from tests.triplets.musique_example import QUESTIONS, load_script

disable_progress_bars()


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
