"""What a tokenizer's directory states twice. Loaders differ in the statement that they take, so both must say the same.

chat template    transformers prefers chat_template.jinja, older servers know tokenizer_config.json only, processors
                 read chat_template.json
special tokens   transformers prefers special_tokens_map.json, llama.cpp tokenizer_config.json
token ids        transformers prefers tokenizer.json, llama.cpp tokenizer.model, slow tokenizers of transformers 4
                 vocab.json, tokenizer.model and added_tokens.json
"""

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer

from megatron_solopo.architecture.model_directory import parse_model_json
from megatron_solopo.errors import UserError

_SETTINGS, _SPECIAL, _VOCABULARY = "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"
_JINJA, _PROCESSOR, _FOLDER = "chat_template.jinja", "chat_template.json", "additional_chat_templates"
_DEFAULT = "default"
# These decide what is trained. Other special tokens may differ without harm.
_COMPARED = ("bos_token", "eos_token", "unk_token")
_SHOWN = 60


class TokenizerFile:
    """tokenizer.json of a directory, which may be large: it is parsed at most once."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / _VOCABULARY

    @property
    def exists(self) -> bool:
        """Whether the directory has the file."""
        return self.path.is_file()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the file alone. Raises what the Rust library raises for a damaged file."""
        return Tokenizer.from_file(str(self.path))


def check_tokenizer_files(path: Path, file: TokenizerFile | None = None) -> None:
    """Raise UserError with both statements if two files of a Hugging Face directory contradict each other.

    Args:
        file: tokenizer.json of the directory, where the caller reads it too.

    Also raises it for a damaged settings file.
    """
    _check_templates(path)
    _check_special_tokens(path)
    _check_ids(path, file or TokenizerFile(path))


def _check_templates(path: Path) -> None:
    found: dict[str, tuple[str, str]] = {}
    for file, name, text in _templates(path):
        # Jinja drops the line end of the last line.
        text = text.removesuffix("\n")
        first, other = found.setdefault(name, (file, text))
        if text != other:
            pairs = enumerate(zip(text, other, strict=False))
            start = next((place for place, (one, two) in pairs if one != two), min(len(text), len(other)))
            shown = {first: other[start : start + _SHOWN], file: text[start : start + _SHOWN]}
            raise UserError(
                f"{path}: two chat templates {name!r} differ from character {start} on: "
                f"{' and '.join(f'{each} has {part!r}' for each, part in shown.items())}; loaders differ in the one "
                "that they read: remove the wrong one"
            )


def _templates(path: Path) -> Iterator[tuple[str, str, str]]:
    """File, name and text of every template."""
    if (path / _JINJA).is_file():
        yield _JINJA, _DEFAULT, (path / _JINJA).read_text()
    for file in sorted((path / _FOLDER).glob("*.jinja")):
        yield f"{_FOLDER}/{file.name}", file.stem, file.read_text()
    for name in (_SETTINGS, _PROCESSOR):
        template = _read_json(path / name).get("chat_template")
        if isinstance(template, str):
            yield name, _DEFAULT, template
        elif isinstance(template, list):
            yield from ((name, each["name"], each["template"]) for each in template)


def _check_special_tokens(path: Path) -> None:
    settings, special = _read_json(path / _SETTINGS), _read_json(path / _SPECIAL)
    for key in _COMPARED:
        one, other = _content(settings.get(key)), _content(special.get(key))
        if one is not None and other is not None and one != other:
            raise UserError(
                f"{path}: {key}={one!r} in {_SETTINGS} and {key}={other!r} in {_SPECIAL} differ; loaders differ in the "
                "one that they read: correct the wrong one"
            )


def _check_ids(path: Path, tokenizer_file: TokenizerFile) -> None:
    others = list(_vocabularies(path)) if tokenizer_file.exists else []
    if not others:
        return
    ids = tokenizer_file.tokenizer.get_vocab(with_added_tokens=True)
    for file, vocabulary in others:
        for token, number in vocabulary.items():
            if ids.get(token, number) != number:
                raise UserError(
                    f"{path}: the token {token!r} has id {number} in {file} and id {ids[token]} in {_VOCABULARY}; "
                    f"loaders differ in the file that they read: remove {file}, or take the model's own files"
                )
            # A file of added tokens may add some, but the others are whole vocabularies.
            if token not in ids and file in ("vocab.json", "tokenizer.model"):
                raise UserError(
                    f"{path}: the token {token!r} is in {file} and not in {_VOCABULARY}; loaders differ in the file "
                    f"that they read: remove {file}, or take the model's own files"
                )


def _vocabularies(path: Path) -> Iterator[tuple[str, Mapping[str, int]]]:
    """Token ids by every file but tokenizer.json."""
    for name in ("vocab.json", "added_tokens.json"):
        if vocabulary := _read_json(path / name):
            yield name, vocabulary
    if added := _read_json(path / _SETTINGS).get("added_tokens_decoder"):
        yield _SETTINGS, {each["content"]: int(number) for number, each in added.items()}
    if (path / "tokenizer.model").is_file():
        if (processor := open_sentencepiece(path / "tokenizer.model")) is None:
            return
        yield "tokenizer.model", {processor.id_to_piece(i): i for i in range(len(processor)) if _is_text(processor, i)}


def open_sentencepiece(file: Path) -> SentencePieceProcessor | None:
    """A SentencePiece model, or None for another file: tiktoken's files have the ending `.model` too."""
    try:
        return SentencePieceProcessor(model_file=str(file))
    except (OSError, RuntimeError):
        return None


def _is_text(processor: SentencePieceProcessor, number: int) -> bool:
    """Whether a piece is text. Names of control tokens may differ."""
    return not any(
        kind(number) for kind in (processor.is_control, processor.is_unknown, processor.is_unused, processor.is_byte)
    )


def _read_json(file: Path) -> dict[str, Any]:
    content = parse_model_json(file.read_bytes(), file) if file.is_file() else {}
    return content if isinstance(content, dict) else {}


def _content(token: Any) -> str | None:
    """The text of a special token, which may be written with its properties."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
