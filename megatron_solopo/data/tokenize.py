"""From preference rows to tokens on disk.

    validate -> rows as an Arrow file -> tokenize (num_proc processes) -> refuse or drop over-long rows -> split -> save

Everything is memory-mapped; no step holds the file in memory.
"""

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from megatron_solopo import __version__
from megatron_solopo.data.encode import Template, check_template, tokenize_rows
from megatron_solopo.data.prepared import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    PROMPT_COLUMNS,
    LengthStatistics,
    PreparedManifest,
    is_prepared,
    token_lengths,
)
from megatron_solopo.data.row import RESPONSE_FIELDS, Kind
from megatron_solopo.data.row_files import ValidationReport, validate_file
from megatron_solopo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.files import atomic_path, check_replaceable, remove, sha256_file, sha256_json, write_json

_SHOWN = 5


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

    Raises UserError for bad rows, over-long rows, a missing chat template, no rows left, an existing `output`.
    """
    _check_arguments(output, max_length, eval_count, num_proc, overwrite)
    loaded = load_tokenizer(tokenizer)
    report = _validate(input)
    mode = _resolve_template(template, report, loaded, tokenizer)
    job = _Job(report, tokenizer, loaded, mode, max_length, overlong, eval_count, seed)
    with atomic_path(output) as temporary:
        work = temporary / "work"
        tokens = tokenize_rows(input, job.kind, tokenizer, loaded.fingerprint, mode, num_proc=num_proc, work=work)
        _refuse_problems(job, tokens)
        tokens = tokens.remove_columns(["line", "problem"])
        kept = _select_by_length(job, tokens)
        train, held_out = _split(kept, eval_count, seed)
        tokens.select(train).save_to_disk(str(temporary / "train"))
        if eval_count:
            tokens.select(held_out).save_to_disk(str(temporary / "eval"))
        manifest = _manifest(job, tokens, kept)
        del tokens
        remove(work)
        write_json(temporary / MANIFEST_NAME, manifest.model_dump(mode="json"))
    return manifest


@dataclass(frozen=True)
class _Job:
    """A valid file and how it is to be tokenized."""

    report: ValidationReport
    tokenizer_path: str
    tokenizer: Tokenizer
    template: Template
    max_length: int | None
    overlong: Literal["refuse", "drop"]
    eval_count: int
    seed: int

    @property
    def path(self) -> Path:
        return self.report.path

    @property
    def kind(self) -> Kind:
        assert self.report.kind is not None
        return self.report.kind

    @property
    def columns(self) -> tuple[str, ...]:
        return (*PROMPT_COLUMNS[self.kind], *RESPONSE_FIELDS)

    def fingerprint_parts(self) -> dict[str, Any]:
        """All that decides the prepared rows."""
        return {
            "format_version": FORMAT_VERSION,
            "source": sha256_file(self.path),
            "tokenizer": self.tokenizer.fingerprint,
            "template": self.template,
            "chat_template": self.tokenizer.chat_template if self.template == "chat" else None,
            "max_length": self.max_length,
            "overlong": self.overlong,
            "eval_count": self.eval_count,
            "seed": self.seed,
        }


def _check_arguments(output: Path, max_length: int | None, eval_count: int, num_proc: int, overwrite: bool) -> None:
    if max_length is not None and max_length < 2:
        raise UserError(f"--max-length {max_length}: must be at least 2, a prompt token and a response token")
    if eval_count < 0:
        raise UserError(f"--eval-count {eval_count}: must not be negative")
    if num_proc < 1:
        raise UserError(f"--num-proc {num_proc}: must be at least 1")
    if output.exists() and not overwrite:
        raise UserError(f"{output}: already exists; choose another output, or pass --overwrite to replace it")
    if output.exists() and not is_prepared(output):
        raise UserError(f"{output}: exists and is not a prepared directory, so --overwrite does not replace it")
    check_replaceable(output, (MANIFEST_NAME, "train", "eval"), "--output")


def _validate(path: Path) -> ValidationReport:
    report = validate_file(path)
    if report.errors:
        first = "; ".join(str(report).splitlines()[: min(len(report.errors), _SHOWN)])
        raise UserError(
            f"{path}: {len(report.errors)} errors, list them with: megatron-solopo data validate {path} ({first})"
        )
    return report


def _resolve_template(
    template: Literal["auto", "chat", "plain"], report: ValidationReport, tokenizer: Tokenizer, tokenizer_path: str
) -> Template:
    """The one way all rows of the file become text."""
    if template == "auto" and len(report.forms) > 1:
        raise UserError(f"{report.path}: some rows are strings, others messages; pass --template chat")
    if template == "plain" and "messages" in report.forms:
        raise UserError(f"{report.path}: has chat messages, which --template plain cannot write; pass --template chat")
    mode: Template = "chat" if template == "chat" or "messages" in report.forms else "plain"
    check_template(mode, tokenizer, tokenizer_path)
    return mode


def _refuse_problems(job: _Job, tokens: Dataset) -> None:
    problems = tokens.data.column("problem").to_numpy()
    bad = np.flatnonzero(problems != "")
    if len(bad):
        first = "; ".join(f"line {tokens[int(i)]['line']}: {problems[i]}" for i in bad[:_SHOWN])
        raise UserError(
            f"{job.path}: {len(bad)} of {len(tokens)} rows cannot be tokenized by {job.tokenizer_path}: {first}"
        )


def _select_by_length(job: _Job, tokens: Dataset) -> NDArray[np.int64]:
    """Indices of the rows whose longest sequence fits."""
    prompts = np.max([token_lengths(tokens, name) for name in PROMPT_COLUMNS[job.kind]], axis=0)
    responses = np.max([token_lengths(tokens, name) for name in RESPONSE_FIELDS], axis=0)
    longest = prompts + responses
    limit = job.max_length or longest.max()
    too_long = longest > limit
    if too_long.any() and job.overlong == "refuse":
        first = ", ".join(f"{tokens[int(i)]['id']} ({longest[i]})" for i in np.flatnonzero(too_long)[:_SHOWN])
        raise UserError(
            f"{job.path}: {too_long.sum()} of {len(tokens)} rows are longer than --max-length {limit} tokens, prompt "
            f"and response together: {first}; raise it to {longest.max()}, or leave them out with --overlong drop"
        )
    if too_long.all():
        raise UserError(f"{job.path}: all {len(tokens)} rows are longer than --max-length {limit}; raise it")
    return np.flatnonzero(~too_long)


def _split(kept: NDArray[np.int64], eval_count: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Disjoint (train, eval) row indices, each in file order."""
    if eval_count >= len(kept):
        raise UserError(f"--eval-count {eval_count}: leaves no rows for training, there are {len(kept)}; lower it")
    drawn = np.zeros(len(kept), dtype=bool)
    drawn[random.Random(seed).sample(range(len(kept)), eval_count)] = True
    return kept[~drawn], kept[drawn]


def _manifest(job: _Job, tokens: Dataset, kept: NDArray[np.int64]) -> PreparedManifest:
    parts = job.fingerprint_parts()
    return PreparedManifest(
        version=__version__,
        kind=job.kind,
        template=job.template,
        tokenizer=str(Path(job.tokenizer_path).resolve()),
        vocab_size=job.tokenizer.vocab_size,
        fingerprint=sha256_json(parts),
        fingerprint_parts=parts,
        read=job.report.rows,
        kept=len(kept),
        dropped={"overlong": job.report.rows - len(kept)},
        train=len(kept) - job.eval_count,
        eval=job.eval_count,
        lengths={name: _statistics(token_lengths(tokens, name)[kept]) for name in job.columns},
    )


def _statistics(lengths: NDArray[np.int64]) -> LengthStatistics:
    """Percentiles that are lengths of rows, not averages of two."""
    median, p95 = np.percentile(lengths, [50, 95], method="inverted_cdf")
    return LengthStatistics(min=int(lengths.min()), median=int(median), p95=int(p95), max=int(lengths.max()))
