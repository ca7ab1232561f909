"""Tokenizers made once per run, and a file of triplets."""

import pytest
from datasets import disable_progress_bars

from tests.data.sample_rows import triplet, write_rows
from tests.data.tiny_tokenizers import write_hugging_face, write_sentencepiece

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
