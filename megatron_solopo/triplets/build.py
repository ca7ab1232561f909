"""`data build`: short and long contexts around the same evidence, from a question answering corpus.

1. Read the corpus row by row into a store on disk. Refuse or report rows that are not of the format.
2. Tokenize every distinct document once.
3. Build each question's rows from random streams of its own: the short context, the answers if they are constructed,
   and the long contexts. Every length is measured exactly. What cannot be built is dropped, counted and listed.

Steps 2 and 3 run on several processes. None of them holds the corpus or the output in memory.

Method: SoLoPO (arXiv 2505.11166) with RULER's way to hide evidence among distractors (arXiv 2404.06654). Unlike RULER,
each question has its own random stream, so the evidence moves between samples.
"""

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_solopo.data.rendering import check_arguments, check_template
from megatron_solopo.data.template_arguments import TemplateArguments
from megatron_solopo.data.template_effects import warn_about_clock
from megatron_solopo.data.tokenizer import Tokenizer, load_tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.files import atomic_path, counted, first_few, remove
from megatron_solopo.process_pool import ProcessPool
from megatron_solopo.progress import bar_style
from megatron_solopo.triplets.build_row import Built, Drop, MeasuredContext, RowBuilder
from megatron_solopo.triplets.context_rows import to_line
from megatron_solopo.triplets.contexts import uniform_distance
from megatron_solopo.triplets.corpus.formats import Document, Question
from megatron_solopo.triplets.corpus.read import BadRow, read_distractors, read_questions
from megatron_solopo.triplets.corpus.store import Corpus, CorpusWriter
from megatron_solopo.triplets.prompt import Measure, PromptTemplate, read_template
from megatron_solopo.triplets.report import (
    Bars,
    Chart,
    Histogram,
    check_output,
    provenance,
    write_stage_report,
)
from megatron_solopo.triplets.settings import BuildSettings

_SHOWN_MISTAKES = 20
_SHOWN_PLACES = 3
_SHOWN_DROPS = 3
_DEPTH_BINS = 10
_DOCUMENTS_PER_TASK = 256


@dataclass(frozen=True)
class LengthStats:
    """Tokens of prompt and response over the written rows."""

    minimum: int
    mean: float
    median: float
    maximum: int

    @classmethod
    def of(cls, lengths: Sequence[int]) -> "LengthStats":
        """Summary of at least one length."""
        mean, median = round(float(np.mean(lengths)), 1), float(np.median(lengths))
        return cls(minimum=min(lengths), mean=mean, median=median, maximum=max(lengths))

    def __str__(self) -> str:
        return f"min {self.minimum}, mean {self.mean:.1f}, median {self.median:.1f}, max {self.maximum}"


@dataclass(frozen=True)
class DepthStats:
    """Where the evidence lies in the long contexts, see `triplets.contexts`."""

    tenths: list[int]
    """Pieces of evidence by tenth of the context, from start to end."""
    distance: float
    """Kolmogorov-Smirnov distance to the uniform distribution."""
    critical: float
    """95 of 100 uniform samples have a smaller distance."""


@dataclass(frozen=True)
class BuildReport:
    """The numbers of a build, as `report.json` holds them."""

    provenance: dict[str, Any]
    rows_read: int
    """Questions and rows that are not of the format."""
    rows_written: int
    dropped: dict[str, int]
    """Rows that were not written, by reason."""
    left_out: list[dict[str, Any]]
    """Each dropped row, with its number in the corpus: of its line in JSON lines."""
    pool_documents: int
    """Distinct documents that distractors are drawn from."""
    rows_with_distractors_of_others: int
    """Written rows whose short context holds documents of other questions."""
    rows_underfull: int
    """Written rows more than 1 % below their length, because the pool holds too few documents."""
    rows_without_leak_check: int
    """Written rows with the answer yes or no."""
    rejected: dict[str, int]
    """Written rows by kind of constructed rejected answer."""
    short_tokens: LengthStats
    long_tokens: LengthStats
    least_fill: float
    """Smallest length of a long context over its target."""
    depth: DepthStats

    def to_json(self) -> dict[str, Any]:
        """The same as plain dictionaries, lists and numbers."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"rows: {self.rows_read} questions read, {self.rows_written} rows written"]
        for reason, count in sorted(self.dropped.items()):
            places = [f"{each['id']} (line {each['line']})" for each in self.left_out if each["reason"] == reason]
            lines.append(f"  dropped, {reason}: {count}: {first_few(places, _SHOWN_DROPS)}")
        lines.append(f"pool: {self.pool_documents} distinct documents")
        counts = {
            "short distractors of other questions": self.rows_with_distractors_of_others,
            "lengths that the pool does not suffice for": self.rows_underfull,
            "yes or no for an answer, not searched for in distractors": self.rows_without_leak_check,
        }
        lines += [f"  rows with {what}: {count}" for what, count in counts.items() if count]
        if self.rejected:
            lines.append(f"rejected answers: {', '.join(f'{count} {kind}' for kind, count in self.rejected.items())}")
        verdict = "uniform" if self.depth.distance < self.depth.critical else "NOT UNIFORM"
        return "\n".join(
            [
                *lines,
                f"short tokens: {self.short_tokens}",
                f"long tokens: {self.long_tokens}, at least {self.least_fill:.2%} of what was asked for",
                f"evidence per tenth of the long context: {' '.join(map(str, self.depth.tenths))}",
                f"  distance to uniform {self.depth.distance:.3f}, {verdict} (5 % of uniform samples reach "
                f"{self.depth.critical:.3f})",
            ]
        )


class Tally:
    """Collects the numbers of the report while rows are written."""

    def __init__(self, provenance: dict[str, Any]) -> None:
        self.bad_rows: list[BadRow] = []
        self.documents = 0
        self.questions = 0
        self._provenance = provenance
        self._measured: list[MeasuredContext] = []
        self._drops: list[Drop] = []

    def add(self, result: MeasuredContext | Drop) -> None:
        """Take one row's outcome."""
        if isinstance(result, Drop):
            self._drops.append(result)
        else:
            self._measured.append(result)

    def report(self, input: Path) -> BuildReport:
        """All numbers. Raises UserError if no row was built."""
        rows = self._measured
        bad = {(row.path, row.number) for row in self.bad_rows}
        dropped = Counter(drop.reason for drop in self._drops) + Counter({"not of the format": len(bad)})
        if not rows:
            reasons = ", ".join(f"{reason} ({count})" for reason, count in dropped.items())
            raise UserError(f"--input {input}: no question could be built: {reasons}")
        depths = [depth for row in rows for depth in row.depths]
        distance, critical = uniform_distance(depths)
        tenths = np.histogram(depths, bins=_DEPTH_BINS, range=(0, 1))[0].tolist()
        return BuildReport(
            provenance=self._provenance,
            rows_read=self.questions + len(bad),
            rows_written=len(rows),
            dropped=dict(dropped),
            left_out=[asdict(drop) for drop in self._drops]
            + [asdict(Drop(row.number, row.id, str(row))) for row in self.bad_rows],
            pool_documents=self.documents,
            rows_with_distractors_of_others=sum(row.filled_from_pool for row in rows),
            rows_underfull=sum(row.underfull for row in rows),
            rows_without_leak_check=sum(not row.leak_checked for row in rows),
            rejected=dict(Counter(row.rejected for row in rows if row.rejected)),
            short_tokens=LengthStats.of([row.short_tokens for row in rows]),
            long_tokens=LengthStats.of([row.long_tokens for row in rows]),
            least_fill=round(min(row.long_tokens / row.target_tokens for row in rows), 5),
            depth=DepthStats(tenths, round(distance, 4), round(critical, 4)),
        )

    def write(self, report: BuildReport, output: Path) -> None:
        """Write `report.json` and the page."""
        rows = self._measured
        charts: list[Chart] = [
            Histogram("Long context with response", "tokens", [row.long_tokens for row in rows]),
            Histogram("Short context with response", "tokens", [row.short_tokens for row in rows]),
            Histogram(
                "Evidence in the long context", "depth, 0 is the start", [d for row in rows for d in row.depths], (0, 1)
            ),
            Histogram(
                "Length over target, long context", "ratio", [row.long_tokens / row.target_tokens for row in rows]
            ),
        ]
        if report.dropped:
            charts.append(Bars("Rows that were dropped", report.dropped))
        values = report.to_json()
        left_out = values.pop("left_out")
        write_stage_report(output, f"Contexts: {output.name}", str(report), values, charts, left_out)


def build(settings: BuildSettings) -> BuildReport:
    """Write contexts, or triplets if responses are constructed. Nothing is ever cut.

    A row has id, question_id, prompt_short, prompt_long, question, answers, evidence_depths (see `triplets.contexts`),
    short_tokens and long_tokens (prompt and room for the response), target_tokens and response_tokens (the room). With
    constructed responses it also has chosen and rejected. The short side depends on seed and question, not on the
    length.

    Raises UserError, one line per mistake, if a row is not of the format or if no row could be built.
    """
    check_output(settings.output, settings.overwrite, settings.inputs)
    tokenizer = load_tokenizer(settings.tokenizer)
    _check_prompts(settings, tokenizer)
    made = provenance(settings.inputs, settings.seed, settings, (settings.tokenizer, tokenizer))
    tally = Tally(made)
    with atomic_path(settings.output) as temporary:
        store = temporary.with_name(f"{temporary.name}.corpus")
        try:
            _store_corpus(settings, store, tally)
            with ProcessPool(settings.num_proc, _initialise, (store, settings)) as pool:
                _count_documents(pool, store)
                with temporary.open("w", encoding="utf-8") as stream:
                    for text in _rows(pool, store, tally):
                        stream.write(text)
        finally:
            remove(store)
        report = tally.report(settings.input)
    tally.write(report, settings.output)
    return report


def _check_prompts(settings: BuildSettings, tokenizer: Tokenizer) -> None:
    """Make one prompt and one response, so that a bad template is reported before the corpus is read."""
    check_template(settings.template, tokenizer, settings.tokenizer)
    arguments = TemplateArguments(settings.chat_template_kwargs)
    check_arguments(settings.template, tokenizer, arguments)
    warn_about_clock(settings.template, tokenizer, arguments)
    made = _prompt(settings).prompt([Document("Title", "Text.")], "Question?")
    measure = Measure(tokenizer, settings.template, arguments)
    try:
        measure.response(made, "Answer.")
    except UserError:
        if settings.responses == "constructed":
            raise
        # A sampled response may have the thought that some templates demand.
        measure.response(made, "<think>\n\n</think>\n\nAnswer.")


def _prompt(settings: BuildSettings) -> PromptTemplate:
    return PromptTemplate(read_template(settings.prompt_template), titles=settings.titles, template=settings.template)


def _store_corpus(settings: BuildSettings, store: Path, tally: Tally) -> None:
    """Read the corpus and the pool. Raises UserError with the bad rows, unless they are dropped."""
    found = chain(
        read_questions(settings.input, settings.format), read_distractors(settings.pool) if settings.pool else ()
    )
    with CorpusWriter(store) as writer:
        for line, row in tqdm(found, desc="Reading the corpus", **bar_style("rows")):
            if isinstance(row, Question):
                writer.add_question(line, row)
            elif isinstance(row, Document):
                writer.add_document(row)
            else:
                tally.bad_rows.append(row)
    if tally.bad_rows and settings.bad_rows == "refuse":
        raise UserError(_list_mistakes(tally.bad_rows))
    if not writer.questions:
        raise UserError(f"--input {settings.input}: holds no question, expected --format {settings.format}")


def _list_mistakes(bad_rows: list[BadRow]) -> str:
    """One line for each kind of mistake, with the places of the first rows that have it."""
    kinds: dict[tuple[str, str, str], list[BadRow]] = {}
    for bad in bad_rows:
        # Which of many documents lacks a field makes no other mistake.
        kinds.setdefault((bad.path, re.sub(r"\d+", "*", bad.field), bad.reason), []).append(bad)
    lines = [_described(rows) for rows in list(kinds.values())[:_SHOWN_MISTAKES]]
    if len(kinds) > len(lines):
        lines.append(f"and {counted(len(kinds) - len(lines), 'other mistake')}")
    lines[-1] += "; name another --format, or let --bad-rows drop leave such rows out and list every one in the report"
    return "\n".join(lines)


def _described(rows: list[BadRow]) -> str:
    if len(rows) == 1:
        return str(rows[0])
    first = rows[0]
    numbers = {row.number: f"{row.number} (id {row.id!r})" if row.id else str(row.number) for row in rows}
    places = first_few(list(numbers.values()), _SHOWN_PLACES)
    where = f"{first.path}: {len(rows)} times, in {first.unit}{'' if len(numbers) == 1 else 's'} {places}"
    return ": ".join(filter(None, (where, first.field, first.reason)))


class _Worker:
    """Everything that one process builds with."""

    def __init__(self, store: Path, settings: BuildSettings) -> None:
        self.corpus = Corpus(store)
        self._settings = settings
        self._prompt = _prompt(settings)
        self._measure = Measure(
            load_tokenizer(settings.tokenizer), settings.template, TemplateArguments(settings.chat_template_kwargs)
        )
        self.count = self._measure.document_counter(self._prompt)

    @cached_property
    def builder(self) -> RowBuilder:
        """Made when every document has its length."""
        return RowBuilder(self.corpus, self._settings, self._prompt, self._measure)


_worker: _Worker


def _initialise(store: Path, settings: BuildSettings) -> None:
    global _worker
    _worker = _Worker(store, settings)


def _count(documents: range) -> list[int]:
    return _worker.count([_worker.corpus.document(index) for index in documents])


def _build(number: int) -> list[tuple[str, MeasuredContext | Drop]]:
    """The lines of one question's rows, with what the report needs of them. A dropped row has an empty line."""
    results = _worker.builder.build(number)
    return [(to_line(each.row), each.measured) if isinstance(each, Built) else ("", each) for each in results]


def _count_documents(pool: ProcessPool, store: Path) -> None:
    corpus = Corpus(store)
    starts = range(0, corpus.num_documents, _DOCUMENTS_PER_TASK)
    tasks = [range(start, min(start + _DOCUMENTS_PER_TASK, corpus.num_documents)) for start in starts]
    counted = tqdm(pool.map(_count, tasks), total=len(tasks), desc="Tokenizing", **bar_style("batches of documents"))
    corpus.save_tokens(chain.from_iterable(counted))


def _rows(pool: ProcessPool, store: Path, tally: Tally) -> Iterator[str]:
    """Every row that can be built, in the order of the corpus. `tally` gets all results."""
    corpus = Corpus(store)
    tally.documents, tally.questions = len(corpus.pool), corpus.num_questions
    results = pool.map(_build, range(corpus.num_questions))
    for pairs in tqdm(results, total=corpus.num_questions, desc="Building contexts", **bar_style("questions")):
        for text, result in pairs:
            tally.add(result)
            yield text
