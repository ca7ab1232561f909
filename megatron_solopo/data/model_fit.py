"""Whether a model can read prepared data: its tokenizer, its vocabulary and its positions.

A model takes any token ids. With ids of another tokenizer it computes wrong numbers, and nothing else tells. So every
model that reads prepared data is checked here, the reference model as well as the model that is trained.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megatron_solopo.architecture.huggingface_config import ModelShape
from megatron_solopo.architecture.model_directory import has_tokenizer
from megatron_solopo.data.prepared import RESPONSE_COLUMNS, PreparedData
from megatron_solopo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_solopo.errors import UserError

Context = Literal["short", "long"]
_PREPARE_AGAIN = "prepare the data with the model's own tokenizer"


@dataclass(frozen=True)
class Reader:
    """A model that reads the data."""

    path: Path
    """Hugging Face directory or Megatron checkpoint."""
    architecture: ModelShape
    is_reference: bool = False
    """Whether it only scores the answers. It then needs the tokens of the data, but not the same end token."""

    def __str__(self) -> str:
        return f"the {'reference model' if self.is_reference else 'model'} {self.path}"

    def remedy(self, change: str) -> str:
        """What to do about a model that does not fit. `change` is what helps with the model that is trained."""
        if self.is_reference:
            return "set reference.model_path to a model with the tokenizer of the data, or leave it out"
        return change


def check_readers(
    readers: Sequence[Reader], prepared: PreparedData, path: Path, contexts: Collection[Context]
) -> list[str]:
    """Check that every model can read the data.

    Args:
        path: directory of the data, for messages.
        contexts: those whose prompts are read.

    Returns a line for each model whose tokenizer is not known, because it has no tokenizer files.

    Raises UserError naming data and model if

    - the model's tokenizer gives other tokens than the one that made the data;
    - a token of the data is not in the vocabulary of config.json (the padding of the vocabulary does not count);
    - a sequence is longer than the model's positions.
    """
    notes = []
    data_tokenizer = _DataTokenizer(readers, prepared)
    for reader in readers:
        if not has_tokenizer(reader.path):
            notes.append(
                f"note: {reader} has no tokenizer files; that its tokens are those of {path} could not be checked"
            )
        elif not data_tokenizer.is_that_of(reader):
            raise UserError(
                f"{path}: tokenized by {prepared.manifest.tokenizer}, which is not the tokenizer of {reader}; "
                f"{reader.remedy(_PREPARE_AGAIN)}"
            )
        check_sizes(reader, prepared, path, contexts)
    return notes


def check_sizes(reader: Reader, prepared: PreparedData, path: Path, contexts: Collection[Context]) -> None:
    """Check vocabulary and positions, without loading a tokenizer. Arguments and error are those of `check_readers`."""
    vocab_size = reader.architecture.vocab_size
    # Ids that occur count: a tokenizer may have tokens, such as an unused padding token, that no row uses.
    if prepared.largest_token_id() >= vocab_size:
        token_id, place = _first_beyond(prepared, vocab_size)
        extend = "extend the embedding with transformers' resize_token_embeddings, or remove that token from the rows"
        raise UserError(
            f"{path}: holds the token id {token_id} ({place}), but {reader} has embeddings for ids up to "
            f"{vocab_size - 1}; {reader.remedy(extend if has_tokenizer(reader.path) else _PREPARE_AGAIN)}"
        )
    prompts = {prepared.prompt_column(context) for context in contexts}
    lengths = prepared.manifest.lengths
    # An upper bound: the longest prompt and the longest answer may be of different rows.
    responses = RESPONSE_COLUMNS[prepared.manifest.kind]
    longest = max(lengths[name].max for name in prompts) + max(lengths[name].max for name in responses)
    if longest > reader.architecture.max_sequence_length:
        remedy = (
            "prepare the data with --max-length, or extend the model in its config.json "
            "(rope_parameters, max_position_embeddings)"
        )
        raise UserError(
            f"{path}: sequences of up to {longest} tokens, but {reader} has "
            f"{reader.architecture.max_sequence_length} positions; {remedy}"
        )


def _first_beyond(prepared: PreparedData, vocab_size: int) -> tuple[int, str]:
    """The first token id beyond the vocabulary, and its column and row in words. Reads every token up to there."""
    for split in prepared.splits:
        for row in split.with_format("numpy"):
            for column in prepared.manifest.columns:
                if (largest := int(row[column].max())) >= vocab_size:
                    return largest, f"{column} of row {row['id']}"
    raise AssertionError("some row has the largest token id")


class _DataTokenizer:
    """The tokenizer that made the data: known by its fingerprint, and itself where some directory still has it."""

    def __init__(self, readers: Sequence[Reader], prepared: PreparedData) -> None:
        self._fingerprint = prepared.manifest.fingerprint_parts["tokenizer"]
        self._places = [*(reader.path for reader in readers), Path(prepared.manifest.tokenizer)]
        self._largest = prepared.largest_token_id()
        self._loaded: dict[Path, Tokenizer] = {}

    def is_that_of(self, reader: Reader) -> bool:
        """Whether a model's tokenizer is the data's; for a reference model, whether all tokens are the same."""
        tokenizer = self._load(reader.path)
        if tokenizer.has_fingerprint(self._fingerprint):
            return True
        own = self._find() if reader.is_reference else None
        return own is not None and same_tokens(own, tokenizer, self._largest)

    def _find(self) -> Tokenizer | None:
        """The data's tokenizer; None if no place has it any more. Raises UserError for one that is damaged."""
        for place in self._places:
            try:
                tokenizer = self._load(place)
            except UserError:
                if place.is_file() or has_tokenizer(place):
                    raise
                continue
            if tokenizer.has_fingerprint(self._fingerprint):
                return tokenizer
        return None

    def _load(self, path: Path) -> Tokenizer:
        if path not in self._loaded:
            self._loaded[path] = load_tokenizer(path)
        return self._loaded[path]


def same_tokens(one: Tokenizer, other: Tokenizer, largest: int) -> bool:
    """Whether the token ids from 0 to `largest` stand for the same pieces of text."""
    if largest >= min(one.vocab_size, other.vocab_size):
        return False
    ids = range(largest + 1)
    return one.pieces(ids) == other.pieces(ids)
