"""The rows of a file as tokens, in parts that a killed program does not make again.

Arrow files under a folder of work hold everything. So memory holds a few rows per process, whatever the file's size.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from tqdm import tqdm

from megatron_solopo.data.messages import Content
from megatron_solopo.data.prepared import (
    PROMPT_COLUMNS,
    RESPONSE_COLUMNS,
    mask_column,
    mask_columns,
    token_columns,
)
from megatron_solopo.data.rows import DEPTHS_FIELD, PROMPT_FIELDS, RESPONSE_FIELDS, Kind, read_rows
from megatron_solopo.data.settings import Template
from megatron_solopo.data.template_arguments import TemplateArguments
from megatron_solopo.data.tokenize_row import TokenizedRow, tokenize_row
from megatron_solopo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.process_pool import ProcessPool
from megatron_solopo.progress import bar_style

# Rows of 128K tokens are 1.5 MB, so the writer holds few of them.
_WRITER_BATCH_ROWS = 64
_PARTS, _FEWEST_ROWS, _MOST_ROWS = 64, 16, 1024
"""A file is cut into so many parts, if each then has from so few to so many rows."""
_CARRIED = {"id": Value("string"), "line": Value("int64"), DEPTHS_FIELD: List(Value("float32"))}


@dataclass(frozen=True)
class Tokenization:
    """How rows become tokens."""

    kind: Kind
    tokenizer: str
    """Its directory or file."""
    tokenizer_fingerprint: str
    template: Template
    end_tokens: tuple[int, ...]
    chat_template_kwargs: dict[str, Any]

    @property
    def features(self) -> Features:
        """The columns of the result."""
        tokens = {name: List(Value("int32")) for name in token_columns(self.kind)}
        masks = {name: List(Value("bool")) for name in mask_columns(self.kind)}
        return Features({**_CARRIED, "problem": Value("string"), "effects": Value("string"), **tokens, **masks})


def tokenize_rows(path: Path, how: Tokenization, *, num_proc: int, work: Path) -> Dataset:
    """Tokenize a valid file into Arrow files under `work`, row by row in the file's order.

    Columns: id, line, problem, effects, evidence_depths, the token columns and the masks. If a row cannot be tokenized,
    `problem` says why and its tokens are empty. For all other rows `problem` is "". `effects` is JSON: what the
    template did to the row, by `EffectKind`; "" for nothing.

    Args:
        work: Parts that an earlier call left here are taken as they are. It must have had the same arguments; only
            `num_proc` may differ.
    """
    was_quiet = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        rows = Dataset.from_generator(
            _generate_rows,
            features=Features({**_CARRIED, "contents": Value("large_string"), "arguments": Value("large_string")}),
            gen_kwargs={"path": path},
            cache_dir=str(work / "rows"),
            writer_batch_size=_WRITER_BATCH_ROWS,
        )
        parts = _cut(len(rows))
        missing = [part for part in parts if not _file_of(part, work).exists()]
        there = len(rows) - sum(map(len, missing))
        with (
            ProcessPool(max(1, min(num_proc, len(missing))), disable_progress_bars, ()) as pool,
            tqdm(total=len(rows), initial=there, desc="Tokenizing", **bar_style("rows")) as bar,
        ):
            for part in pool.map(partial(_tokenize_part, rows, how, work), missing):
                bar.update(len(part))
        return concatenate_datasets([Dataset.from_file(str(_file_of(part, work))) for part in parts])
    finally:
        if not was_quiet:
            enable_progress_bars()


def _cut(rows: int) -> list[range]:
    """The rows of each part. Their number alone decides, so that other processes find the same parts."""
    size = min(_MOST_ROWS, max(_FEWEST_ROWS, -(-rows // _PARTS)))
    return [range(start, min(start + size, rows)) for start in range(0, rows, size)]


def _file_of(part: range, work: Path) -> Path:
    return work / f"tokens-{part.start:09}-{part.stop:09}.arrow"


def _tokenize_part(rows: Dataset, how: Tokenization, work: Path, part: range) -> range:
    """Write the part's file, complete or not at all."""
    rows.select(part).map(
        _tokenize_record,
        fn_kwargs={"how": how},
        features=how.features,
        remove_columns=["contents", "arguments"],
        cache_file_name=str(_file_of(part, work)),
        load_from_cache_file=False,
        writer_batch_size=_WRITER_BATCH_ROWS,
    )
    return part


def _generate_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows in one Arrow schema for strings and messages: the contents are JSON."""
    for row in read_rows(path):
        assert not row.errors and row.id is not None
        carried = {"id": row.id, "line": row.line, DEPTHS_FIELD: row.evidence_depths}
        yield {**carried, "contents": json.dumps(row.contents), "arguments": json.dumps(asdict(row.arguments))}


def _tokenize_record(record: dict[str, Any], how: Tokenization) -> dict[str, Any]:
    contents: dict[str, Content] = json.loads(record["contents"])
    kind = how.kind
    prompts = {column: contents[name] for column, name in zip(PROMPT_COLUMNS[kind], PROMPT_FIELDS[kind], strict=True)}
    responses = {
        column: contents[name] for column, name in zip(RESPONSE_COLUMNS[kind], RESPONSE_FIELDS[kind], strict=True)
    }
    arguments = TemplateArguments(**json.loads(record["arguments"])).over(how.chat_template_kwargs)
    tokenizer = _process_tokenizer(how.tokenizer, how.tokenizer_fingerprint)
    row, problem = TokenizedRow({name: [] for name in (*prompts, *responses)}), ""
    try:
        row = tokenize_row(prompts, responses, tokenizer, how.template, how.end_tokens, arguments)
    except UserError as error:
        problem = str(error)
    effects: dict[str, str] = {}
    for effect in row.effects:
        effects.setdefault(effect.kind, effect.shown)
    tokens = {name: np.asarray(ids, np.int32) for name, ids in row.ids.items()}
    tokens |= {mask_column(name): np.asarray(row.masks.get(name, []), bool) for name in responses}
    return {"problem": problem, "effects": json.dumps(effects) if effects else "", **tokens}


@lru_cache(maxsize=1)
def _process_tokenizer(path: str, fingerprint: str) -> Tokenizer:
    """One tokenizer per worker process. The fingerprint tells a replaced directory from the old one."""
    return load_tokenizer(path)
