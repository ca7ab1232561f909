"""Tokenizers of every style, made once."""

import pytest

from megatron_solopo.data.tokenizer import Tokenizer, load_tokenizer
from tests.data.tiny_tokenizers import write_hugging_face, write_sentencepiece


@pytest.fixture(scope="session")
def tokenizers(tmp_path_factory) -> dict[str, Tokenizer]:
    folder = tmp_path_factory.mktemp("tokenizers")
    styles = ("byte_level", "metaspace", "prepend")
    paths = {style: write_hugging_face(folder / style, style=style) for style in styles}
    paths |= {name: write_sentencepiece(folder / f"{name}.model", name == "identity") for name in ("identity", "nmt")}
    return {name: load_tokenizer(path) for name, path in paths.items()}
