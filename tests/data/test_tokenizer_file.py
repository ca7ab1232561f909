"""Tokens are those of the directory's tokenizer.json, whatever class transformers chooses for it."""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megatron_solopo.data.prepared import load_prepared
from megatron_solopo.data.settings import PrepareSettings
from megatron_solopo.data.tokenize import prepare
from megatron_solopo.data.tokenizer import load_tokenizer
from megatron_solopo.data.tokenizer_file import SAMPLES
from megatron_solopo.errors import UserError
from tests.data.tiny_tokenizers import write_hugging_face, write_sentencepiece

INPUTS = Path(__file__).parents[1] / "inputs"
TEXT = "".join(SAMPLES)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer that splits digits as GPT-2 does, in groups. Qwen2's rules take one digit at a time."""
    root = tmp_path_factory.mktemp("byte_level")
    path = write_hugging_face(root / "source")
    stored = json.loads((path / "tokenizer.json").read_text())
    model = stored["model"]
    model["vocab"] |= {"19": len(model["vocab"])}
    model["merges"].append(["1", "9"])
    (path / "tokenizer.json").write_text(json.dumps(stored))
    return path


def named(source: Path, path: Path, *, model_type: str | None, tokenizer_class: str | None) -> Path:
    """A copy of a tokenizer whose configs name other classes."""
    path.mkdir(parents=True)
    shutil.copy(source / "tokenizer.json", path)
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True, "legacy": True}
    if tokenizer_class is not None:
        config["tokenizer_class"] = tokenizer_class
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    if model_type is not None:
        (path / "config.json").write_text(json.dumps({"model_type": model_type}))
    return path


def file_ids(path: Path, text: str) -> list[int]:
    return Tokenizer.from_file(str(path / "tokenizer.json")).encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizerFast", "Qwen2Tokenizer", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "mistral", None])
def test_every_name_gives_the_tokens_of_the_file(
    byte_level: Path, tmp_path: Path, model_type: str | None, tokenizer_class: str
) -> None:
    path = named(byte_level, tmp_path / "named", model_type=model_type, tokenizer_class=tokenizer_class)
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert ids == file_ids(path, TEXT)
    assert tokenizer.decode(ids) == TEXT


def test_prepared_text_keeps_its_spaces_under_the_name_of_llamas_tokenizer(byte_level: Path, tmp_path: Path) -> None:
    path = named(byte_level, tmp_path / "named", model_type="llama", tokenizer_class="LlamaTokenizerFast")
    rows = INPUTS / "triplets_indented_code.jsonl"
    prepare(PrepareSettings(input=rows, output=tmp_path / "out", tokenizer=str(path)))
    row, source = load_prepared(tmp_path / "out").train[0], json.loads(rows.read_text())
    alone = Tokenizer.from_file(str(path / "tokenizer.json"))
    for name in ("prompt_short", "prompt_long", "chosen", "rejected"):
        assert alone.decode(row[name]) == source[name]


def test_other_splitting_is_told_once_and_the_file_decides(
    byte_level: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = named(byte_level, tmp_path / "named", model_type="qwen2", tokenizer_class="Qwen2Tokenizer")
    for _ in range(2):
        assert load_tokenizer(path).encode("1900", add_special_tokens=False) == file_ids(path, "1900")
    (warning,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert f"{path}: transformers " in warning and " loads this tokenizer as Qwen2Tokenizer, " in warning
    assert warning.endswith('; set "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json')


def test_a_class_that_loses_text_is_refused_and_the_way_out_works(byte_level: Path, tmp_path: Path) -> None:
    path = named(byte_level, tmp_path / "named", model_type="gemma2", tokenizer_class=None)
    with pytest.raises(UserError) as caught:
        load_tokenizer(path)
    assert " as GemmaTokenizer, which does not do what tokenizer.json says: 'The hall in" in str(caught.value)
    assert str(caught.value).endswith('; set "tokenizer_class": "PreTrainedTokenizerFast" in tokenizer_config.json')
    mended = named(byte_level, tmp_path / "mended", model_type="gemma2", tokenizer_class="PreTrainedTokenizerFast")
    tokenizer = load_tokenizer(mended)
    assert tokenizer.decode(tokenizer.encode(TEXT, add_special_tokens=False)) == TEXT


def word_level(path: Path, normalizer: normalizers.Normalizer | None = None) -> Path:
    words = ["<unk>", "<s>", "</s>", "the", "hall", "The", "in", "two", "has"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(path)
    return path


def test_words_under_the_config_of_a_qwen2_model_are_refused_and_the_way_out_works(tmp_path: Path) -> None:
    path = word_level(tmp_path / "model")
    (path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(UserError) as caught:
        load_tokenizer(path)
    assert "as Qwen2Tokenizer, which does not do what tokenizer.json says" in str(caught.value)
    assert str(caught.value).endswith("in a directory without config.json, whose model_type decides here")
    (path / "config.json").unlink()
    assert load_tokenizer(path).encode("the hall", add_special_tokens=False) == [3, 4]


@pytest.mark.parametrize("normalizer", [None, normalizers.Lowercase(), normalizers.NFKC(), normalizers.StripAccents()])
def test_what_the_file_itself_loses_is_no_difference(
    tmp_path: Path, normalizer: normalizers.Normalizer | None, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = load_tokenizer(word_level(tmp_path / "words", normalizer))
    assert tokenizer.encode("the river", add_special_tokens=False) == [3, 0]
    assert "warning" not in capsys.readouterr().err


@pytest.mark.parametrize("style", ["metaspace", "prepend"])
def test_tokenizers_that_mark_the_start_of_words_load_in_silence(
    tmp_path: Path, style: str, capsys: pytest.CaptureFixture[str]
) -> None:
    load_tokenizer(write_hugging_face(tmp_path / style, style=style))
    assert "warning" not in capsys.readouterr().err


def test_tokens_that_only_the_config_adds_are_no_difference(byte_level: Path, tmp_path: Path) -> None:
    path = named(byte_level, tmp_path / "named", model_type=None, tokenizer_class="PreTrainedTokenizerFast")
    config = json.loads((path / "tokenizer_config.json").read_text())
    (path / "tokenizer_config.json").write_text(json.dumps(config | {"extra_special_tokens": ["hall", "двери"]}))
    tokenizer = load_tokenizer(path)
    assert tokenizer.decode(tokenizer.encode("the hall", add_special_tokens=False)) == "the hall"


def test_vocabulary_and_merges_of_a_byte_level_tokenizer_under_another_class_are_refused(
    byte_level: Path, tmp_path: Path
) -> None:
    for name, tokenizer_class in (("right", "GPT2Tokenizer"), ("wrong", "LlamaTokenizer")):
        path = named(byte_level, tmp_path / name, model_type=None, tokenizer_class=tokenizer_class)
        (path / "tokenizer.json").unlink()
        model = json.loads((byte_level / "tokenizer.json").read_text())["model"]
        (path / "vocab.json").write_text(json.dumps(model["vocab"]))
        (path / "merges.txt").write_text("\n".join(" ".join(pair) for pair in model["merges"]))
    tokenizer = load_tokenizer(tmp_path / "right")
    assert tokenizer.decode(tokenizer.encode(TEXT, add_special_tokens=False)) == TEXT
    with pytest.raises(UserError, match="loses spaces: 'The hall in Velmora has two doors"):
        load_tokenizer(tmp_path / "wrong")


def sentencepiece_directory(path: Path, model_type: str) -> Path:
    path.mkdir()
    write_sentencepiece(path / "tokenizer.model", model_type=model_type)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    return path


def test_a_sentencepiece_model_in_a_directory_gives_its_own_tokens(tmp_path: Path) -> None:
    text = "The answer is: the river Po,  and two spaces."
    right = sentencepiece_directory(tmp_path / "bpe", "bpe")
    alone = load_tokenizer(right / "tokenizer.model").encode(text, add_special_tokens=False)
    assert load_tokenizer(right).encode(text, add_special_tokens=False) == alone
    wrong = sentencepiece_directory(tmp_path / "unigram", "unigram")
    with pytest.raises(UserError, match="LlamaTokenizer, which does not do what the SentencePiece model of the"):
        load_tokenizer(wrong)
