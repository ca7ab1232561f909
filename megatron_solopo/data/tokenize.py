"""From preference rows to tokens on disk.

    validate -> rows as an Arrow file -> tokenize (num_proc processes) -> refuse or drop over-long rows -> split -> save

Everything is memory-mapped; no step holds the file in memory.
"""

import json
import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset, Features, List, Value
from numpy.typing import NDArray

from megatron_solopo import __version__
from megatron_solopo.data.prepared import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    PROMPT_COLUMNS,
    LengthStatistics,
    PreparedManifest,
    is_prepared,
    token_lengths,
)
from megatron_solopo.data.row import PROMPT_FIELDS, RESPONSE_FIELDS, Content, Kind
from megatron_solopo.data.template import Template, tokenize_row
from megatron_solopo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_solopo.data.triplet import ValidationReport, read_rows, validate_file
from megatron_solopo.files import atomic_path, remove, sha256_file, sha256_json, write_json

__all__ = ["Tokenizer", "load_tokenizer", "prepare"]

_SHOWN = 5
# Rows of 128K tokens are 1.5 MB: few of them are held while writing.
_WRITER_BATCH_ROWS = 64


def prepare(
    input: Path,
    output: Path,
    tokenizer: str,
    *,
    template: Literal["auto", "chat", "plain"] = "auto",
    max_length: int | None = None,
    overlong: Literal["refuse", "drop"] = "refuse",
    eval_count: int = 0,
    seed: int = 1234,
    num_proc: int = 1,
    overwrite: bool = False,
) -> PreparedManifest:
    """Validate, tokenize and split a file of triplets or pairs; `output` is complete or absent.

    Args:
        input: JSONL or parquet file.
        output: directory to write, see `megatron_solopo.data.prepared`.
        tokenizer: Hugging Face directory or SentencePiece `.model` file.
        template: chat renders messages by the tokenizer's chat template (a string prompt is one user message);
            plain puts BOS before a string prompt, where usual, and EOS after the response;
            auto is chat for messages and plain for strings.
        max_length: most tokens of a prompt and a response together.
        overlong: whether longer rows are an error or left out and counted. Nothing is ever cut.
        eval_count: rows of the held-out split, drawn by `seed`.
        num_proc: processes that tokenize; the result does not depend on it.
        overwrite: replace `output` if it is a prepared directory.

    Raises ValueError for bad rows, over-long rows, a missing chat template, no rows left, an existing `output`.
    """
    _check_arguments(output, max_length, eval_count, num_proc, overwrite)
    loaded = load_tokenizer(tokenizer)
    report = _validate(input)
    mode = _resolve_template(template, report, loaded, tokenizer)
    parts = {
        "format_version": FORMAT_VERSION,
        "source": sha256_file(input),
        "tokenizer": loaded.fingerprint,
        "template": mode,
        "chat_template": loaded.chat_template if mode == "chat" else None,
        "max_length": max_length,
        "overlong": overlong,
        "eval_count": eval_count,
        "seed": seed,
    }
    assert report.kind is not None
    with atomic_path(output) as temporary:
        work = temporary / "work"
        tokens = _tokenize_file(input, report.kind, tokenizer, loaded, mode, num_proc, work)
        _refuse_problems(input, tokenizer, tokens)
        tokens = tokens.remove_columns(["line", "problem"])
        kept = _select_by_length(input, tokens, report.kind, max_length, overlong)
        train_rows, eval_rows = _split(kept, eval_count, seed)
        _save(tokens, train_rows, temporary / "train")
        if eval_count:
            _save(tokens, eval_rows, temporary / "eval")
        manifest = PreparedManifest(
            version=__version__,
            kind=report.kind,
            template=mode,
            tokenizer=str(Path(tokenizer).resolve()),
            vocab_size=loaded.vocab_size,
            fingerprint=sha256_json(parts),
            fingerprint_parts=parts,
            read=report.rows,
            kept=len(kept),
            dropped={"overlong": report.rows - len(kept)},
            train=len(train_rows),
            eval=len(eval_rows),
            lengths={name: _statistics(token_lengths(tokens, name)[kept]) for name in _columns(report.kind)},
        )
        del tokens
        remove(work)
        write_json(temporary / MANIFEST_NAME, manifest.model_dump(mode="json"))
    return manifest


def _check_arguments(output: Path, max_length: int | None, eval_count: int, num_proc: int, overwrite: bool) -> None:
    if max_length is not None and max_length < 2:
        raise ValueError(f"--max-length {max_length}: must be at least 2, a prompt token and a response token")
    if eval_count < 0:
        raise ValueError(f"--eval-count {eval_count}: must not be negative")
    if num_proc < 1:
        raise ValueError(f"--num-proc {num_proc}: must be at least 1")
    if output.exists() and not overwrite:
        raise ValueError(f"{output}: already exists; choose another output, or pass --overwrite to replace it")
    if output.exists() and not is_prepared(output):
        raise ValueError(f"{output}: exists and is not a prepared directory, so --overwrite does not replace it")


def _validate(path: Path) -> ValidationReport:
    report = validate_file(path)
    if report.errors:
        first = "; ".join(str(report).splitlines()[: min(len(report.errors), _SHOWN)])
        raise ValueError(
            f"{path}: {len(report.errors)} errors, list them with: megatron-solopo data validate {path} ({first})"
        )
    return report


def _resolve_template(
    template: Literal["auto", "chat", "plain"], report: ValidationReport, tokenizer: Tokenizer, tokenizer_path: str
) -> Template:
    """The one way all rows of the file become text."""
    if template == "auto" and len(report.forms) > 1:
        raise ValueError(f"{report.path}: some rows are strings, others messages; pass --template chat")
    if template == "plain" and "messages" in report.forms:
        raise ValueError(f"{report.path}: has chat messages, which --template plain cannot write; pass --template chat")
    mode: Template = "chat" if template == "chat" or "messages" in report.forms else "plain"
    if mode == "chat" and tokenizer.chat_template is None:
        raise ValueError(
            f"{tokenizer_path}: has no chat template; use another tokenizer, or strings and --template plain"
        )
    if mode == "plain" and tokenizer.eos_token_id is None:
        raise ValueError(
            f"{tokenizer_path}: has no end-of-sequence token, which --template plain puts after a response"
        )
    return mode


def _columns(kind: Kind) -> tuple[str, ...]:
    return (*PROMPT_COLUMNS[kind], *RESPONSE_FIELDS)


def _tokenize_file(
    path: Path, kind: Kind, tokenizer_path: str, tokenizer: Tokenizer, template: Template, num_proc: int, work: Path
) -> Dataset:
    """Columns id, line, problem ("" where there is none) and the token columns, one row per row of the file."""
    text_features = Features({"id": Value("string"), "line": Value("int64"), "contents": Value("large_string")})
    rows = Dataset.from_generator(
        _generate_rows,
        features=text_features,
        gen_kwargs={"path": path},
        cache_dir=str(work),
        writer_batch_size=_WRITER_BATCH_ROWS,
    )
    tokens = {name: List(Value("int32")) for name in _columns(kind)}
    return rows.map(
        _tokenize_record,
        fn_kwargs={
            "kind": kind,
            "tokenizer_path": tokenizer_path,
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "template": template,
        },
        features=Features({"id": Value("string"), "line": Value("int64"), "problem": Value("string"), **tokens}),
        remove_columns=["contents"],
        num_proc=num_proc if num_proc > 1 else None,
        cache_file_name=str(work / "tokens.arrow"),
        load_from_cache_file=False,
        writer_batch_size=_WRITER_BATCH_ROWS,
        desc="Tokenizing",
    )


def _generate_rows(path: Path) -> Iterator[dict[str, Any]]:
    """Rows in one Arrow schema, whether they are strings or messages: the contents as JSON."""
    for row in read_rows(path):
        assert not row.errors and row.id is not None
        yield {"id": row.id, "line": row.line, "contents": json.dumps(row.contents)}


def _tokenize_record(
    record: dict[str, Any], kind: Kind, tokenizer_path: str, tokenizer_fingerprint: str, template: Template
) -> dict[str, Any]:
    contents: dict[str, Content] = json.loads(record["contents"])
    prompts = {column: contents[name] for column, name in zip(PROMPT_COLUMNS[kind], PROMPT_FIELDS[kind], strict=True)}
    responses = {name: contents[name] for name in RESPONSE_FIELDS}
    tokenizer = _process_tokenizer(tokenizer_path, tokenizer_fingerprint)
    problem = ""
    try:
        ids = tokenize_row(prompts, responses, tokenizer, template)
    except ValueError as error:
        ids = {name: [] for name in _columns(kind)}
        problem = str(error)
    return {"problem": problem} | {name: np.asarray(tokens, np.int32) for name, tokens in ids.items()}


@lru_cache(maxsize=1)
def _process_tokenizer(path: str, fingerprint: str) -> Tokenizer:
    """One tokenizer per worker process; the fingerprint keeps a replaced directory from being mistaken for the old."""
    return load_tokenizer(path)


def _refuse_problems(path: Path, tokenizer_path: str, tokens: Dataset) -> None:
    problems = tokens.data.column("problem").to_numpy()
    bad = np.flatnonzero(problems != "")
    if len(bad):
        first = "; ".join(f"line {tokens[int(i)]['line']}: {problems[i]}" for i in bad[:_SHOWN])
        raise ValueError(f"{path}: {len(bad)} of {len(tokens)} rows cannot be tokenized by {tokenizer_path}: {first}")


def _select_by_length(
    path: Path, tokens: Dataset, kind: Kind, max_length: int | None, overlong: Literal["refuse", "drop"]
) -> NDArray[np.int64]:
    """Indices of the rows whose longest sequence fits."""
    prompts = np.max([token_lengths(tokens, name) for name in PROMPT_COLUMNS[kind]], axis=0)
    responses = np.max([token_lengths(tokens, name) for name in RESPONSE_FIELDS], axis=0)
    longest = prompts + responses
    too_long = longest > (max_length or longest.max())
    if too_long.any() and overlong == "refuse":
        first = ", ".join(f"{tokens[int(i)]['id']} ({longest[i]})" for i in np.flatnonzero(too_long)[:_SHOWN])
        raise ValueError(
            f"{path}: {too_long.sum()} of {len(tokens)} rows are longer than --max-length {max_length} tokens, prompt "
            f"and response together: {first}; raise it to {longest.max()}, or leave them out with --overlong drop"
        )
    if too_long.all():
        raise ValueError(f"{path}: all {len(tokens)} rows are longer than --max-length {max_length}; raise it")
    return np.flatnonzero(~too_long)


def _split(kept: NDArray[np.int64], eval_count: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Disjoint (train, eval) row indices, each in file order."""
    if eval_count >= len(kept):
        raise ValueError(f"--eval-count {eval_count}: leaves no rows for training, there are {len(kept)}; lower it")
    drawn = np.zeros(len(kept), dtype=bool)
    drawn[random.Random(seed).sample(range(len(kept)), eval_count)] = True
    return kept[~drawn], kept[drawn]


def _save(tokens: Dataset, rows: NDArray[np.int64], path: Path) -> None:
    tokens.select(rows).save_to_disk(str(path))


def _statistics(lengths: NDArray[np.int64]) -> LengthStatistics:
    """Percentiles that are lengths of rows, not averages of two."""
    median, p95 = np.percentile(lengths, [50, 95], method="inverted_cdf")
    return LengthStatistics(min=int(lengths.min()), median=int(median), p95=int(p95), max=int(lengths.max()))
