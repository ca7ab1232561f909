"""From preference rows to tokens on disk: what `data prepare` does.

1. Validate the file.
2. Tokenize its rows in `num_proc` processes. A call that was killed leaves what it has done to the next one.
3. Refuse rows whose content the template loses, unless the user accepts that.
4. Refuse or drop rows that are too long.
5. Split off the held-out rows and save both splits with a manifest.

All tables are memory-mapped: no step holds the file in memory.
"""

import fcntl
import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray

from megatron_solopo import __version__
from megatron_solopo.architecture.model_directory import CONFIG, huggingface_directory
from megatron_solopo.data.end_tokens import GENERATION_CONFIG, end_tokens
from megatron_solopo.data.prepared import (
    FORMAT_VERSION,
    MANIFEST_NAME,
    PROMPT_COLUMNS,
    RESPONSE_COLUMNS,
    EffectCount,
    LengthStatistics,
    PreparedManifest,
    counted_tokens,
    is_prepared,
    largest_token_id,
    mask_column,
    mask_columns,
    token_columns,
    token_fingerprint,
    token_lengths,
)
from megatron_solopo.data.rendering import check_arguments, check_template
from megatron_solopo.data.row_files import files_of
from megatron_solopo.data.rows import (
    Kind,
    ValidationReport,
    validate_file,
)
from megatron_solopo.data.settings import PrepareSettings, Template
from megatron_solopo.data.template_arguments import TemplateArguments
from megatron_solopo.data.template_effects import MEANINGS, EffectKind, clock_warning
from megatron_solopo.data.tokenize_parts import Tokenization, tokenize_rows
from megatron_solopo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.files import (
    atomic_path,
    check_replaceable,
    counted,
    first_few,
    remove,
    sha256_file,
    sha256_json,
    write_json,
)

_SHOWN = 5


def prepare(settings: PrepareSettings) -> PreparedManifest:
    """Validate, tokenize and split a file of triplets, pairs or instructions. The output is complete or absent.

    Raises UserError if a row is bad or too long, if no row remains, or if the output exists. Also raises it if the
    tokenizer lacks what the template needs, or if the template loses content of a row.
    """
    _check_output(settings)
    tokenizer = load_tokenizer(settings.tokenizer)
    report = _validate(settings.input)
    template = _resolve_template(settings, report, tokenizer)
    job = _Job(settings, report, tokenizer, template, end_tokens(settings.tokenizer, tokenizer))
    check_arguments(template, tokenizer, TemplateArguments(settings.chat_template_kwargs))
    how = Tokenization(
        job.kind,
        settings.tokenizer,
        tokenizer.fingerprint,
        job.template,
        tuple(sorted(job.end_tokens)),
        settings.chat_template_kwargs,
    )
    # Neither is a part of the fingerprint: they decide what counts as a lost or a double end, and not the tokens.
    made_by = {"end_tokens": sorted(job.end_tokens), "version": __version__}
    with (
        _work_folder(settings.output, job.fingerprint_parts | made_by) as work,
        atomic_path(settings.output) as temporary,
    ):
        tokens = tokenize_rows(settings.input, how, num_proc=settings.num_proc, work=work)
        _refuse_problems(settings, tokens)
        effects = _count_effects(tokens)
        _refuse_losses(job, effects)
        tokens = _without_full_masks(job.kind, tokens.remove_columns(["line", "problem", "effects"]))
        kept = _select_by_length(job, tokens)
        train, held_out = _split(kept, settings.eval_count, settings.seed)
        tokens.select(train).save_to_disk(str(temporary / "train"))
        if settings.eval_count:
            tokens.select(held_out).save_to_disk(str(temporary / "eval"))
        fingerprint = token_fingerprint(
            job.kind, tokens.select(train), tokens.select(held_out) if settings.eval_count else None
        )
        manifest = _manifest(job, tokens, kept, fingerprint, effects)
        write_json(temporary / MANIFEST_NAME, manifest.model_dump(mode="json"))
    return manifest


@dataclass(frozen=True)
class _Job:
    """A valid file, and how it becomes tokens."""

    settings: PrepareSettings
    report: ValidationReport
    tokenizer: Tokenizer
    template: Template
    end_tokens: set[int]

    @property
    def kind(self) -> Kind:
        assert self.report.kind is not None
        return self.report.kind

    @property
    def columns(self) -> tuple[str, ...]:
        return token_columns(self.kind)

    @cached_property
    def fingerprint_parts(self) -> dict[str, Any]:
        """What the tokens are made from and with."""
        return {
            "format_version": FORMAT_VERSION,
            "source": _hash_source(self.settings.input),
            "tokenizer": self.tokenizer.fingerprint,
            "template": self.template,
            "chat_template": self.tokenizer.chat_template if self.template == "chat" else None,
            "chat_template_kwargs": self.settings.chat_template_kwargs,
            "max_length": self.settings.max_length,
            "overlong": self.settings.overlong,
            "eval_count": self.settings.eval_count,
            "seed": self.settings.seed,
        }


@contextmanager
def _work_folder(output: Path, parts: dict[str, Any]) -> Iterator[Path]:
    """A folder whose content a killed program leaves for the next call with the same `parts`.

    It lies beside `output`, and is removed at the end and after any error. Raises UserError if another program uses it.
    """
    folder = output.with_name(f".{output.name}.work")
    own = folder / sha256_json(parts)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"{output}: another data prepare is writing it; wait for it, or end it") from None
        for other in folder.iterdir():
            if other.name not in (own.name, "lock"):
                remove(other)
        try:
            own.mkdir(exist_ok=True)
            yield own
        except KeyboardInterrupt:
            raise
        except BaseException:
            remove(folder)
            raise
        remove(folder)


def _hash_source(path: Path) -> str:
    """Hex SHA-256 of a file, or of the names and the bytes of a folder's files."""
    if path.is_dir():
        return sha256_json({file.name: sha256_file(file) for file in files_of(path)})
    return sha256_file(path)


def _check_output(settings: PrepareSettings) -> None:
    output = settings.output
    if output.exists() and not settings.overwrite:
        raise UserError(f"{output}: already exists; choose another output, or pass --overwrite to replace it")
    if output.exists() and not is_prepared(output):
        raise UserError(f"{output}: exists and is not a prepared directory, so --overwrite does not replace it")
    check_replaceable(output, (MANIFEST_NAME, "train", "eval"), "--output")


def _validate(path: Path) -> ValidationReport:
    report = validate_file(path)
    if report.errors:
        first = "; ".join(str(report).splitlines()[: min(len(report.errors), _SHOWN)])
        raise UserError(
            f"{path}: {counted(len(report.errors), 'error')}, list them with: megatron-solopo data validate {path} "
            f"({first})"
        )
    return report


def _resolve_template(settings: PrepareSettings, report: ValidationReport, tokenizer: Tokenizer) -> Template:
    """The one template for all rows of the file."""
    if settings.template == "auto" and len(report.forms) > 1:
        raise UserError(f"{report.path}: some rows are strings, others messages; pass --template chat")
    if settings.template == "plain" and "messages" in report.forms:
        raise UserError(f"{report.path}: has chat messages, which --template plain cannot write; pass --template chat")
    template: Template = "chat" if settings.template == "chat" or "messages" in report.forms else "plain"
    check_template(template, tokenizer, settings.tokenizer)
    return template


def _refuse_problems(settings: PrepareSettings, tokens: Dataset) -> None:
    problems = tokens.data.column("problem").to_numpy()
    bad = np.flatnonzero(problems != "")
    if len(bad):
        lines: dict[str, list[int]] = {}
        shown: dict[str, str] = {}
        for index in bad:
            cause = problems[index].partition(";")[0]  # what follows may show the row
            lines.setdefault(cause, []).append(tokens[int(index)]["line"])
            shown.setdefault(cause, problems[index])
        first = "; ".join(
            f"line{'' if len(numbers) == 1 else 's'} {first_few(numbers)}: {shown[cause]}"
            for cause, numbers in list(lines.items())[:_SHOWN]
        )
        raise UserError(
            f"{settings.input}: {len(bad)} of {len(tokens)} rows cannot be tokenized by {settings.tokenizer}: {first}"
        )


def _count_effects(tokens: Dataset) -> dict[EffectKind, EffectCount]:
    """What the template did to the rows, each kind with its first row."""
    counts: dict[EffectKind, EffectCount] = {}
    column = tokens.data.column("effects").to_numpy()
    for index in np.flatnonzero(column != ""):
        for kind, shown in json.loads(column[index]).items():
            before = counts.get(kind, EffectCount(rows=0, first=f"{tokens[int(index)]['id']}: {shown}"))
            counts[kind] = EffectCount(rows=before.rows + 1, first=before.first)
    return {kind: counts[kind] for kind in MEANINGS if kind in counts}


def _refuse_losses(job: _Job, effects: dict[EffectKind, EffectCount]) -> None:
    if job.settings.on_lost_content == "warn":
        return
    losses = [
        f"{MEANINGS[kind].words} ({count.rows} of {job.report.rows} rows, first {count.first}): "
        f"{MEANINGS[kind].way_out}{_describe_end_tokens(job) if kind == 'no_end_token' else ''}"
        for kind, count in effects.items()
        if MEANINGS[kind].is_loss
    ]
    if losses:
        raise UserError(f"{job.settings.input}: {'; '.join(losses)}; or accept it with --on-lost-content warn")


def _describe_end_tokens(job: _Job) -> str:
    path = Path(job.settings.tokenizer)
    found = ", ".join(map(repr, job.tokenizer.pieces(sorted(job.end_tokens)))) or "none"
    has_settings = any((huggingface_directory(path) / name).is_file() for name in (GENERATION_CONFIG, CONFIG))
    missing = f"; it has no {GENERATION_CONFIG}, so name the model's own directory if that has one"
    return f" (end tokens of {path}: {found}{'' if has_settings else missing})"


def _without_full_masks(kind: Kind, tokens: Dataset) -> Dataset:
    """The same without the columns of masks, if all tokens of all responses count."""
    counted = {name: counted_tokens(tokens, mask_column(name)) for name in RESPONSE_COLUMNS[kind]}
    if any((counts < token_lengths(tokens, name)).any() for name, counts in counted.items()):
        return tokens
    return tokens.remove_columns(list(mask_columns(kind)))


def _select_by_length(job: _Job, tokens: Dataset) -> NDArray[np.int64]:
    """Indices of the rows whose longest sequence fits."""
    path = job.settings.input
    prompts = np.max([token_lengths(tokens, name) for name in PROMPT_COLUMNS[job.kind]], axis=0)
    responses = np.max([token_lengths(tokens, name) for name in RESPONSE_COLUMNS[job.kind]], axis=0)
    longest = prompts + responses
    limit = job.settings.max_length or longest.max()
    too_long = longest > limit
    if too_long.any() and job.settings.overlong == "refuse":
        first = ", ".join(f"{tokens[int(i)]['id']} ({longest[i]})" for i in np.flatnonzero(too_long)[:_SHOWN])
        raise UserError(
            f"{path}: {too_long.sum()} of {len(tokens)} rows are longer than --max-length {limit} tokens, prompt "
            f"and response together: {first}; raise it to {longest.max()}, or leave them out with --overlong drop"
        )
    if too_long.all():
        raise UserError(f"{path}: all {len(tokens)} rows are longer than --max-length {limit}; raise it")
    return np.flatnonzero(~too_long)


def _split(kept: NDArray[np.int64], eval_count: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Disjoint (train, eval) row indices, each in file order."""
    if eval_count >= len(kept):
        raise UserError(f"--eval-count {eval_count}: leaves no rows for training, there are {len(kept)}; lower it")
    drawn = np.zeros(len(kept), dtype=bool)
    drawn[random.Random(seed).sample(range(len(kept)), eval_count)] = True
    return kept[~drawn], kept[drawn]


def _manifest(
    job: _Job,
    tokens: Dataset,
    kept: NDArray[np.int64],
    fingerprint: str,
    effects: dict[EffectKind, EffectCount],
) -> PreparedManifest:
    arguments = TemplateArguments(job.settings.chat_template_kwargs)
    return PreparedManifest(
        version=__version__,
        kind=job.kind,
        template=job.template,
        tokenizer=str(Path(job.settings.tokenizer).resolve()),
        vocab_size=job.tokenizer.vocab_size,
        fingerprint=fingerprint,
        fingerprint_parts=job.fingerprint_parts,
        read=job.report.rows,
        kept=len(kept),
        dropped={"overlong": job.report.rows - len(kept)},
        train=len(kept) - job.settings.eval_count,
        eval=job.settings.eval_count,
        lengths={name: _statistics(token_lengths(tokens, name)[kept]) for name in job.columns},
        counted={
            name: _statistics(counted_tokens(tokens, mask_column(name))[kept])
            for name in RESPONSE_COLUMNS[job.kind]
            if mask_column(name) in tokens.column_names
        },
        largest_token_id=largest_token_id(tokens.select(kept), job.columns),
        chat_template_kwargs=job.settings.chat_template_kwargs,
        effects=effects,
        clock=clock_warning(job.tokenizer, arguments) if "clock" in effects else "",
        unread_fields=job.report.unread_fields,
    )


def _statistics(lengths: NDArray[np.int64]) -> LengthStatistics:
    """Percentiles that are lengths of rows, not averages of two."""
    median, p95 = np.percentile(lengths, [50, 95], method="inverted_cdf")
    return LengthStatistics(min=int(lengths.min()), median=int(median), p95=int(p95), max=int(lengths.max()))
