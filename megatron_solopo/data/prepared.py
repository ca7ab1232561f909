"""The directory that `data prepare` writes and training reads: a manifest and tokenized Arrow splits.

    manifest.json   what the data is, where it came from, how long its rows are
    train/  eval/   columns id, evidence_depths, prompt_short, prompt_long (only of triplets), chosen, rejected (not of
                    instructions), and perhaps chosen_mask, rejected_mask

Token columns are list<int32>. A prompt includes BOS or the start of the chat template. A response includes EOS or the
template's end of turn. A sequence is a prompt followed by a response. A mask says of each token of a response whether
it counts, list<bool>. If the directory has no masks, all tokens of all responses count.

`evidence_depths` is empty if the row had none; directories of older versions lack the column.

The fingerprint is a hash of the tokens, not of what they were made from: a chat template may write today's date, for
example. Directories of format version 1 state a hash of what they were made from instead. Their tokens are read and
hashed where the fingerprint is needed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from datasets import Dataset
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_solopo.data.rows import DEPTHS_FIELD, Kind, list_counts
from megatron_solopo.data.template_effects import MEANINGS, EffectKind
from megatron_solopo.errors import UserError, first_problem
from megatron_solopo.files import counted, sha256_json

FORMAT_VERSION: Literal[2] = 2
MANIFEST_NAME = "manifest.json"

_LENGTHS_BATCH_ROWS = 1024
# Rows of 128K tokens are 0.5 MB a column.
_TOKENS_BATCH_ROWS = 64

PROMPT_COLUMNS: dict[Kind, tuple[str, ...]] = {
    "triplet": ("prompt_short", "prompt_long"),
    "pair": ("prompt_short",),
    "instruction": ("prompt_short",),
}
RESPONSE_COLUMNS: dict[Kind, tuple[str, ...]] = {
    "triplet": ("chosen", "rejected"),
    "pair": ("chosen", "rejected"),
    "instruction": ("chosen",),
}
"""The completion of an instruction is its chosen response."""


def token_columns(kind: Kind) -> tuple[str, ...]:
    """The columns that hold tokens, for a kind of rows."""
    return (*PROMPT_COLUMNS[kind], *RESPONSE_COLUMNS[kind])


def mask_column(response: str) -> str:
    """The column that says which tokens of `chosen` or `rejected` count."""
    return f"{response}_mask"


def mask_columns(kind: Kind) -> tuple[str, ...]:
    """The columns of masks, for a kind of rows."""
    return tuple(map(mask_column, RESPONSE_COLUMNS[kind]))


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class LengthStatistics(_Record):
    """Lengths in tokens of one column over the kept rows. Each is the length of a row."""

    min: int
    median: int
    p95: int
    max: int


class EffectCount(_Record):
    """How many rows a template has an effect on."""

    rows: int
    first: str
    """Id of the first of these rows, and what happened to it."""


class PreparedManifest(_Record):
    """The content of `manifest.json`."""

    format_version: Literal[1, 2] = FORMAT_VERSION
    version: str
    """Version of megatron-solopo that wrote the directory."""
    kind: Kind
    template: Literal["chat", "plain"]
    """How rows became text: what "auto" stood for."""
    tokenizer: str
    vocab_size: int
    fingerprint: str
    """`token_fingerprint` of the splits: equal if and only if the tokens are. In the file of a directory of format
    version 1: hex SHA-256 of `fingerprint_parts`."""
    fingerprint_parts: dict[str, Any]
    """What the tokens were made from and with, as far as it is known. It explains differences."""
    read: int
    kept: int
    """train + eval"""
    dropped: dict[str, int]
    """Rows left out, by reason."""
    train: int
    eval: int
    lengths: dict[str, LengthStatistics]
    """By column, in tokens."""
    counted: dict[str, LengthStatistics] = {}
    """Tokens that count, by response; empty if all tokens of all responses do."""
    largest_token_id: int | None = None
    """Over all token columns and both splits. None in directories of older versions."""
    chat_template_kwargs: dict[str, Any] = {}
    """Arguments of the chat template for all rows."""
    effects: dict[EffectKind, EffectCount] = {}
    """What the template did to rows, among all that were read."""
    clock: str = ""
    """What to do about a template that writes the date or the time; "" if it writes none."""
    unread_fields: dict[str, int] = {}
    """Rows that have a field which nothing reads, by its name."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The token columns."""
        return token_columns(self.kind)

    def __str__(self) -> str:
        """A few lines for a reader: kept rows, dropped rows, lengths."""
        dropped = ", ".join(f"{count} {reason}" for reason, count in self.dropped.items())
        lines = [
            f"{self.kind} rows: {self.read} read, {self.kept} kept ({self.train} train, {self.eval} eval)",
            f"dropped: {dropped}",
            f"template {self.template}, vocabulary of {self.vocab_size} tokens, fingerprint {self.fingerprint[:12]}",
        ]
        for name, length in self.lengths.items():
            numbers = f"min {length.min}, median {length.median}, p95 {length.p95}, max {length.max}"
            lines.append(f"tokens of {name}: {numbers}")
        for name, length in self.counted.items():
            numbers = f"min {length.min}, median {length.median}, p95 {length.p95}, max {length.max}"
            lines.append(f"tokens of {name} that count: {numbers}")
        for kind, count in self.effects.items():
            level = "warning" if MEANINGS[kind].is_loss else "note"
            lines.append(f"{level}: {counted(count.rows, 'row')}: {MEANINGS[kind].words} (first {count.first})")
        if self.clock:
            lines.append(f"warning: {self.clock}")
        if self.unread_fields:
            lines.append(f"note: fields that are not read: {list_counts(self.unread_fields)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class PreparedData:
    """A prepared directory, memory-mapped."""

    manifest: PreparedManifest
    train: Dataset
    eval: Dataset | None

    @property
    def splits(self) -> list[Dataset]:
        """The training split and, if there is one, the held-out split."""
        return [self.train] if self.eval is None else [self.train, self.eval]

    def prompt_column(self, context: Literal["short", "long"]) -> str:
        """The column of a context's prompt. Only triplets have two prompts."""
        return f"prompt_{context}" if self.manifest.kind == "triplet" else "prompt_short"

    def hashed_manifest(self) -> PreparedManifest:
        """The manifest with the fingerprint of the tokens. Reads every token of a directory of format version 1."""
        if self.manifest.format_version != 1:
            return self.manifest
        fingerprint = token_fingerprint(self.manifest.kind, self.train, self.eval)
        return self.manifest.model_copy(update={"fingerprint": fingerprint})

    def largest_token_id(self) -> int:
        """The largest token id in both splits. Reads every token if an older version wrote the directory."""
        if self.manifest.largest_token_id is not None:
            return self.manifest.largest_token_id
        return max(largest_token_id(split, self.manifest.columns) for split in self.splits)


def load_prepared(path: Path) -> PreparedData:
    """Open a directory that `megatron-solopo data prepare` wrote.

    It reads no tokens. Under format version 1, the manifest's fingerprint is not that of the tokens: see
    `PreparedData.hashed_manifest`.

    Raises UserError if the directory is missing, incomplete or of another format.
    """
    manifest = _read_manifest(path)
    train = _load_split(path, "train", manifest.train, manifest)
    held_out = _load_split(path, "eval", manifest.eval, manifest) if manifest.eval else None
    return PreparedData(manifest, train, held_out)


def token_fingerprint(kind: Kind, train: Dataset, held_out: Dataset | None) -> str:
    """Hex SHA-256 that tells ids, tokens, masks and order of the rows, and their split. Few rows are in memory."""
    masks = [column for column in mask_columns(kind) if column in train.column_names]
    columns = ("id", *token_columns(kind), *masks)
    splits = {"train": train} | ({} if held_out is None else {"eval": held_out})
    return sha256_json(
        {name: {column: _hash_column(split, column) for column in columns} for name, split in splits.items()}
    )


def _hash_column(split: Dataset, column: str) -> str:
    """XXH3 of a column's values and of their lengths, whatever the pieces in which Arrow stores them."""
    values, lengths = xxhash.xxh3_128(), xxhash.xxh3_128()
    for table in split.select_columns([column]).with_format("arrow").iter(batch_size=_TOKENS_BATCH_ROWS):
        found = table.column(column)
        is_tokens = pa.types.is_list(found.type)
        counts = pc.list_value_length(found) if is_tokens else pc.binary_length(found)
        lengths.update(counts.to_numpy().astype(np.int64))
        if is_tokens:
            values.update(pc.list_flatten(found).to_numpy(zero_copy_only=False).astype(np.int32, copy=False))
        else:
            values.update("".join(found.to_pylist()).encode())
    return f"{lengths.hexdigest()} {values.hexdigest()}"


def is_prepared(path: Path) -> bool:
    """Whether `data prepare` wrote a directory, in any format version."""
    try:
        manifest = json.loads((path / MANIFEST_NAME).read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(manifest, dict) and {"format_version", "fingerprint"} <= manifest.keys()


def largest_token_id(data: Dataset, columns: Sequence[str]) -> int:
    """The largest token id in some columns. Reads every token, a few rows at a time."""
    tables = data.select_columns(list(columns)).with_format("arrow").iter(batch_size=_TOKENS_BATCH_ROWS)
    return max(int(pc.max(pc.list_flatten(table.column(name))).as_py()) for table in tables for name in columns)


def token_lengths(data: Dataset, column: str) -> NDArray[np.int64]:
    """Number of tokens in each row of a token column, [rows]. Reads Arrow's offsets, never the tokens."""
    tables = data.select_columns([column]).with_format("arrow").iter(batch_size=_LENGTHS_BATCH_ROWS)
    lengths = [pc.list_value_length(table.column(column)).to_numpy() for table in tables]
    return np.concatenate([np.empty(0, np.int64), *lengths]).astype(np.int64)


def counted_tokens(data: Dataset, column: str) -> NDArray[np.int64]:
    """Number of tokens that count in each row of a mask's column, [rows]. Reads the masks, a few rows at a time."""
    counts = [np.empty(0, np.int64)]
    for table in data.select_columns([column]).with_format("arrow").iter(batch_size=_TOKENS_BATCH_ROWS):
        masks = table.column(column)
        ends = np.cumsum(pc.list_value_length(masks).to_numpy().astype(np.int64))
        before = np.concatenate([[0], np.cumsum(pc.list_flatten(masks).to_numpy().astype(np.int64))])
        counts.append(np.diff(before[ends], prepend=0))
    return np.concatenate(counts)


def _read_manifest(path: Path) -> PreparedManifest:
    if not (path / MANIFEST_NAME).is_file():
        raise _unusable(path, f"no {MANIFEST_NAME} there")
    text = (path / MANIFEST_NAME).read_bytes()
    try:
        return PreparedManifest.model_validate_json(text)
    except ValidationError as error:
        wrong = {detail["loc"]: detail for detail in error.errors(include_url=False)}
        version = wrong.get(("format_version",))
        if version is not None and version["type"] != "missing":
            found = f"format version {version['input']}, this program reads 1 to {FORMAT_VERSION}"
            raise _unusable(path, found) from None
        raise _unusable(path, f"{MANIFEST_NAME} is damaged ({first_problem(error, 'the whole file')})") from None


def _load_split(path: Path, name: str, rows: int, manifest: PreparedManifest) -> Dataset:
    try:
        split = Dataset.load_from_disk(str(path / name), keep_in_memory=False)
    except (OSError, ValueError, KeyError) as error:
        raise _unusable(path, f"{name}/ is missing or damaged ({' '.join(str(error).split())})") from None
    if len(split) != rows:
        raise _unusable(path, f"{name}/ has {len(split)} rows, the manifest says {rows}")
    masks = set(mask_columns(manifest.kind)) if manifest.counted else set()
    if set(split.column_names) - {DEPTHS_FIELD} != {"id", *manifest.columns, *masks}:
        raise _unusable(path, f"{name}/ has columns {split.column_names}")
    return split


def _unusable(path: Path, reason: str) -> UserError:
    return UserError(
        f"{path}: not a complete prepared directory: {reason}; write one with megatron-solopo data prepare"
    )
