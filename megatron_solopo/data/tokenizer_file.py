"""Load a tokenizer with transformers so that it does what its own file says.

`AutoTokenizer` chooses a class by the names in tokenizer_config.json and config.json. Some classes rebuild the
splitting, the normalizer and the decoder and take only the vocabulary from tokenizer.json. If the names do not fit the
file, spaces or whole texts are lost, or numbers and words are split in another way than the model has learned. What
transformers rebuilds differs between its versions. So the file itself is the measure.
"""

import json
import multiprocessing
import os
import sys
import unicodedata
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer
from tqdm import tqdm

from megatron_solopo.data.tokenizer_contradictions import TokenizerFile, open_sentencepiece
from megatron_solopo.errors import UserError

TOKENIZER_FILE = "tokenizer.json"
_PLAIN = "The hall in Velmora has two doors. It is old."
# The first sample that differs is shown, so each one shows a kind of text.
SAMPLES = (
    _PLAIN,
    "it's they'll don't WE'VE I'm",
    "Built in 1900, 12345678 bricks, 3.14 miles, 1,000,000 steps.",
    "two  spaces,   three, and a line\n\nbehind an empty one\r\n",
    "def double(x):\n\tif x:\n\t    return x**2  # twice\n",
    "Élève naïf, señor, Größe, ångström, e\N{COMBINING ACUTE ACCENT}te\N{COMBINING ACUTE ACCENT}",
    "北京的天气很好。日本語のテキスト、한국어 텍스트",
    "العَرَبِيَّة نصٌّ עברית हिन्दी में पाठ ภาษาไทย",
    "👩‍👩‍👧 👍🏽 ☕️ ∑∞≠",
)
"""Texts of many kinds, without special tokens."""
_ASCII_SAMPLES = 3
"""So many samples are ASCII and have single spaces."""
_SHOWN_TOKENS = 5
CLASSES_OF_THE_FILE = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Names under which transformers loads the file as it is, unless config.json has another opinion."""
_NAME_THE_CLASS = (
    "name the class of the model's own tokenizer as tokenizer_class in tokenizer_config.json, or add its "
    f"{TOKENIZER_FILE}"
)
_warned: set[Path] = set()


@dataclass(frozen=True)
class _Difference:
    """A text that the loaded tokenizer treats in another way than the file."""

    shown: str
    loses_text: bool
    """Whether the text comes back changed, although the file alone keeps it."""


def load_by_file(path: Path, file: TokenizerFile, **options: Any) -> Any:
    """Load a transformers tokenizer whose tokens are those of the directory's tokenizer.json, where it has that file.

    If `AutoTokenizer` only splits text in another way, the file is loaded as it is. A warning says so. What the file
    itself loses, such as capital letters, is no difference. A directory without the file must split a plain sentence as
    its SentencePiece model does, and must keep the spaces.

    Args:
        file: tokenizer.json of the directory.
        options: For `from_pretrained`.

    Raises UserError if `AutoTokenizer` loses text, or if no class loads the file as it is.
    """
    # transformers takes seconds to import, and SentencePiece models do without it.
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer = AutoTokenizer.from_pretrained(path, **options)
    if not file.exists or not tokenizer.is_fast:
        _check_without_file(tokenizer, path)
        return tokenizer
    difference = _difference(tokenizer, _read(file, tokenizer))
    if difference is None:
        return tokenizer
    if difference.loses_text:
        raise UserError(f"{_described(tokenizer, path, difference)}; {_way_out(path)}")
    as_it_is = PreTrainedTokenizerFast.from_pretrained(path, **options)
    if (left := _difference(as_it_is, _read(TokenizerFile(path), as_it_is))) is not None:
        raise UserError(f"{_described(as_it_is, path, left)}; {_way_out(path)}")
    _warn(
        path,
        f"{_described(tokenizer, path, difference)}. Here the file decides. A server that takes "
        f"{type(tokenizer).__name__} reads other tokens than those prepared here; {_way_out(path)}",
    )
    return as_it_is


def _read(file: TokenizerFile, tokenizer: Any) -> Tokenizer:
    """The tokenizer of the file alone, with the tokens that other files of the directory add."""
    alone = file.tokenizer  # nobody reads it after this
    # The file may ask for both.
    alone.no_truncation()
    alone.no_padding()
    added = tokenizer.added_tokens_decoder
    alone.add_tokens([added[index] for index in sorted(added) if alone.token_to_id(added[index].content) is None])
    return alone


def _difference(tokenizer: Any, alone: Tokenizer) -> _Difference | None:
    """The most serious difference over all samples, the first one of its kind."""
    first: _Difference | None = None
    for sample in SAMPLES:
        loaded, expected = (
            tokenizer.encode(sample, add_special_tokens=False),
            alone.encode(sample, add_special_tokens=False),
        )
        text, expected_text = _decode(tokenizer, loaded), alone.decode(expected.ids, skip_special_tokens=False)
        # A normalizer that composes accents changes no text that a reader sees.
        if unicodedata.normalize("NFC", text) != unicodedata.normalize("NFC", expected_text):
            return _Difference(f"{sample!r} comes back as {text!r}, not {expected_text!r}", loses_text=True)
        if first is None and loaded != expected.ids:
            shown = _first_change(tokenizer.convert_ids_to_tokens(loaded), expected.tokens)
            first = _Difference(f"{sample!r} becomes {shown}", loses_text=False)
    return first


def _first_change(loaded: list[str], expected: list[str]) -> str:
    """The tokens around the first one that differs."""
    pairs = enumerate(zip_longest(loaded, expected))
    start = max(0, next(place for place, (one, other) in pairs if one != other) - 1)
    shown = [", ".join(map(repr, pieces[start : start + _SHOWN_TOKENS])) for pieces in (loaded, expected)]
    return f"... {shown[0]} ..., not ... {shown[1]} ..."


def _described(tokenizer: Any, path: Path, difference: _Difference, measure: str = TOKENIZER_FILE) -> str:
    import transformers

    return (
        f"{path}: transformers {transformers.__version__} loads this tokenizer as {type(tokenizer).__name__}, which "
        f"does not do what {measure} says: {difference.shown}"
    )


def _way_out(path: Path) -> str:
    file = path / "tokenizer_config.json"
    settings = json.loads(file.read_bytes()) if file.is_file() else {}
    if settings.get("tokenizer_class") not in CLASSES_OF_THE_FILE:
        return f'set "tokenizer_class": "{CLASSES_OF_THE_FILE[0]}" in tokenizer_config.json'
    return "keep the tokenizer's files in a directory without config.json, whose model_type decides here"


def _warn(path: Path, message: str) -> None:
    """Print once for each directory: not in processes that this one starts, and on one rank."""
    is_child = multiprocessing.parent_process() is not None or os.environ.get("RANK", "0") != "0"
    if path not in _warned and not is_child:
        tqdm.write(f"warning: {message}", file=sys.stderr)
    _warned.add(path)


def _check_without_file(tokenizer: Any, path: Path) -> None:
    processor = _sentencepiece(path)
    if processor is not None:
        _check_pieces(tokenizer, processor, path)
    _check_spaces(tokenizer, path)


def _check_pieces(tokenizer: Any, processor: SentencePieceProcessor, path: Path) -> None:
    """Compare with the SentencePiece model of a directory that has no tokenizer.json. Ids may be shifted by a few.

    White space and characters outside of ASCII are not compared: right classes differ there too.
    """
    for sample in SAMPLES[:_ASCII_SAMPLES]:
        loaded = tokenizer.convert_ids_to_tokens(tokenizer.encode(sample, add_special_tokens=False))
        expected = processor.encode(sample, out_type=str)
        if loaded != expected:
            difference = _Difference(f"{sample!r} becomes {_first_change(loaded, expected)}", loses_text=False)
            what = "the SentencePiece model of the directory"
            raise UserError(f"{_described(tokenizer, path, difference, what)}; {_NAME_THE_CLASS}")


def _sentencepiece(path: Path) -> SentencePieceProcessor | None:
    return next(filter(None, map(open_sentencepiece, sorted(path.glob("*.model")))), None)


def _check_spaces(tokenizer: Any, path: Path) -> None:
    text = _decode(tokenizer, tokenizer.encode(_PLAIN, add_special_tokens=False))
    if text.count(" ") < _PLAIN.count(" "):
        raise UserError(
            f"{path}: the tokenizer loses spaces: {_PLAIN!r} comes back as {text!r} from {type(tokenizer).__name__}; "
            f"{_NAME_THE_CLASS}"
        )


def _decode(tokenizer: Any, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return text
