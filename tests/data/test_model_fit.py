"""A model that cannot read the data is refused: another tokenizer, a smaller vocabulary, fewer positions."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import models, pre_tokenizers

from megatron_solopo.data.model_fit import Reader, check_readers
from megatron_solopo.data.prepared import MANIFEST_NAME, load_prepared
from megatron_solopo.data.settings import PrepareSettings
from megatron_solopo.data.tokenize import prepare
from megatron_solopo.errors import UserError
from megatron_solopo.files import sha256_json
from tests.prepared import make_tokenizer
from tests.tiny_models import TINY, VOCAB_SIZE

INPUTS = Path(__file__).parents[1] / "inputs"
SHAPE = replace(TINY, num_query_groups=2, max_sequence_length=64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data whose prompts have tokens from 60 to 86 and whose answers have smaller ones; some tokenizers."""
    folder = tmp_path_factory.mktemp("fit")
    make_tokenizer(folder / "own")
    source = INPUTS / "triplets_high_word_numbers.jsonl"
    prepare(
        PrepareSettings(
            input=source, output=folder / "data", tokenizer=str(folder / "own"), eval_count=1, on_lost_content="warn"
        )
    )
    changed(folder, "swapped", lambda vocabulary: vocabulary.update(w5=6, w6=5))
    changed(folder, "longer", lambda vocabulary: vocabulary.update({"[PAD]": VOCAB_SIZE}))
    other_end = changed(folder, "other_end", lambda vocabulary: None)
    settings = json.loads((other_end / "tokenizer_config.json").read_text())
    (other_end / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "w2"}))
    (folder / "none").mkdir()
    return folder


def changed(folder: Path, name: str, edit: Any) -> Path:
    """A copy of the tokenizer with another vocabulary."""
    shutil.copytree(folder / "own", folder / name)
    file = folder / name / "tokenizer.json"
    content = json.loads(file.read_text())
    edit(content["model"]["vocab"])
    file.write_text(json.dumps(content))
    return folder / name


def check(folder: Path, name: str, *, is_reference: bool, contexts: Any = ("short", "long"), **shape: Any) -> list[str]:
    readers = [Reader(folder / name, replace(SHAPE, **shape), is_reference)]
    if is_reference:
        readers.insert(0, Reader(folder / "own", SHAPE))
    return check_readers(readers, load_prepared(folder / "data"), folder / "data", contexts)


def refused(*arguments: Any, **keywords: Any) -> str:
    with pytest.raises(UserError) as error:
        check(*arguments, **keywords)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("is_reference", [False, True])
def test_a_model_that_fits_may_have_another_size(folder: Path, is_reference: bool) -> None:
    assert check(folder, "own", is_reference=is_reference, num_layers=2, hidden_size=48) == []


@pytest.mark.parametrize("is_reference", [False, True])
def test_another_tokenizer_is_refused(folder: Path, is_reference: bool) -> None:
    message = refused(folder, "swapped", is_reference=is_reference)
    named = f"the {'reference model' if is_reference else 'model'} {folder / 'swapped'}"
    assert f"tokenized by {folder / 'own'}, which is not the tokenizer of {named}" in message
    assert ("set reference.model_path" in message) is is_reference


@pytest.mark.parametrize("is_reference", [False, True])
def test_a_tokenizer_of_two_files_is_compared_too(folder: Path, is_reference: bool, tmp_path: Path) -> None:
    """vocab.json and merges.txt, as GPT-2 and Qwen have them. They were not known as a tokenizer."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    models.BPE({letter: number for number, letter in enumerate(letters)}, []).save(str(tmp_path))
    settings = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "!", "unk_token": "!", "bos_token": "!"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    shutil.copytree(tmp_path, folder / f"two-files-{is_reference}")
    message = refused(folder, f"two-files-{is_reference}", is_reference=is_reference)
    assert "which is not the tokenizer of the" in message


def test_a_reference_model_may_have_another_end_token_and_more_tokens(folder: Path) -> None:
    """It only scores the tokens of the data, and these are the same."""
    assert check(folder, "other_end", is_reference=True) == []
    assert check(folder, "longer", is_reference=True, vocab_size=VOCAB_SIZE + 1) == []
    assert "not the tokenizer of the model" in refused(folder, "other_end", is_reference=False)


@pytest.mark.parametrize("is_reference", [False, True])
@pytest.mark.parametrize("known", [True, False])
def test_a_token_beyond_the_vocabulary_is_named_with_its_row(folder: Path, is_reference: bool, known: bool) -> None:
    """The rows of the embedding up to its padded size exist, but hold zeros. Older manifests do not know the token."""
    file = folder / "data" / MANIFEST_NAME
    whole = json.loads(file.read_text())
    assert whole["largest_token_id"] == 83
    try:
        if not known:
            file.write_text(json.dumps({name: value for name, value in whole.items() if name != "largest_token_id"}))
        message = refused(folder, "own", is_reference=is_reference, vocab_size=80)
        assert check(folder, "own", is_reference=is_reference, vocab_size=84) == []
    finally:
        file.write_text(json.dumps(whole))
    named = f"the {'reference model' if is_reference else 'model'} {folder / 'own'}"
    assert f"holds the token id 80 (prompt_short of row c0), but {named} has embeddings for ids up to 79" in message


def test_a_tokenizer_may_have_unused_tokens_beyond_the_vocabulary(folder: Path) -> None:
    """The tokenizer has 131 tokens; only those that occur count."""
    assert check(folder, "own", is_reference=False, vocab_size=90) == []


@pytest.mark.parametrize("is_reference", [False, True])
def test_a_sequence_beyond_the_positions_is_refused(folder: Path, is_reference: bool) -> None:
    message = refused(folder, "own", is_reference=is_reference, max_sequence_length=7)
    assert "sequences of up to 8 tokens" in message and "has 7 positions" in message
    assert check(folder, "own", is_reference=is_reference, max_sequence_length=7, contexts=("short",)) == []


@pytest.mark.parametrize("is_reference", [False, True])
def test_a_tokenizer_that_is_not_there_is_said_in_one_line(folder: Path, is_reference: bool) -> None:
    (note,) = check(folder, "none", is_reference=is_reference)
    assert f"{folder / 'none'} has no tokenizer files" in note and "could not be checked" in note


def test_a_damaged_tokenizer_of_the_data_is_named(folder: Path, tmp_path: Path) -> None:
    """It was passed over. The reference model was then said to have another tokenizer."""
    readers = [Reader(folder / "none", SHAPE), Reader(folder / "other_end", SHAPE, is_reference=True)]
    file = folder / "own" / "tokenizer.json"
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-20])
        with pytest.raises(UserError, match=f"{folder / 'own'}: no loadable tokenizer"):
            check_readers(readers, load_prepared(folder / "data"), folder / "data", ("short", "long"))
        file.rename(tmp_path / file.name)
        with pytest.raises(UserError, match="which is not the tokenizer of the reference model"):
            check_readers(readers, load_prepared(folder / "data"), folder / "data", ("short", "long"))
    finally:
        file.write_bytes(whole)


def test_data_of_an_older_version_knows_its_tokenizer(folder: Path) -> None:
    """Older versions had the name of transformers' class among what makes a tokenizer."""
    file = folder / "data" / MANIFEST_NAME
    whole = json.loads(file.read_text())
    rules = json.loads((folder / "own" / "tokenizer.json").read_text())
    rules = {name: value for name, value in rules.items() if name not in ("truncation", "padding")}
    older = sha256_json({"rules": rules, "eos_token_id": 0, "class": "PreTrainedTokenizerFast"})
    assert older != whole["fingerprint_parts"]["tokenizer"]
    try:
        file.write_text(json.dumps(whole | {"fingerprint_parts": whole["fingerprint_parts"] | {"tokenizer": older}}))
        assert check(folder, "own", is_reference=False) == []
        assert "not the tokenizer of the model" in refused(folder, "swapped", is_reference=False)
    finally:
        file.write_text(json.dumps(whole))
