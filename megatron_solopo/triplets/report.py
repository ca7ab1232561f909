"""The report of a stage: `report.json` for programs and one readable page, `index.html`, with its pictures inside.

It lies beside the output, `rows.jsonl` with `rows.report/`, and says what made the output: command, version, seed,
tokenizer and the hashes of everything read and written.

What `data build` read, wrote and left out.
"""

import base64
import io
import shlex
import sys
import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

from megatron_solopo import __version__
from megatron_solopo.data.tokenizer import Tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.files import atomic_path, check_replaceable, sha256_file, write_json
from megatron_solopo.triplets.build_row import Drop, MeasuredContext
from megatron_solopo.triplets.contexts import uniform_distance
from megatron_solopo.triplets.corpus.read import BadRow

_NAMES = ("report.json", "index.html")
_MOST_BARS = 12
_LABEL_CHARACTERS = 28
_PAGE = """\
<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<style>
body{font:16px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em}
pre{white-space:pre-wrap;background:#f4f4f4;padding:1em}
img{max-width:48%;margin:.5%}
td,th{text-align:left;padding:.1em 1em .1em 0;vertical-align:top}
code{word-break:break-all}
</style></head>
<body><h1>{{ title }}</h1>
<pre>{{ summary }}</pre>
{% for chart in charts %}<img alt="{{ chart.title }}" src="data:image/svg+xml;base64,{{ chart.svg }}">
{% endfor %}
<h2>What made it</h2>
<table>{% for name, value in provenance.items() %}
<tr><th>{{ name }}</th><td>{% if value is mapping %}
{% for key, inner in value.items() %}<code>{{ key }}: {{ inner }}</code><br>
{% endfor %}{% else %}<code>{{ value }}</code>{% endif %}</td></tr>{% endfor %}</table>
{% if left_out %}<h2>What was left out</h2>
<table><tr>{% for name in left_out[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in left_out %}<tr>{% for value in row.values() %}<td>{{ value }}</td>{% endfor %}</tr>
{% endfor %}</table>{% endif %}
</body></html>
"""


@dataclass(frozen=True)
class Histogram:
    """How often each size occurs; `values` may be empty. `span` fixes the axis."""

    title: str
    label: str
    values: Sequence[float]
    span: tuple[float, float] | None = None


@dataclass(frozen=True)
class Bars:
    """Counts by name, the largest first."""

    title: str
    counts: Mapping[str, int]


Chart = Histogram | Bars


def report_directory(output: Path) -> Path:
    """Where the report of an output lies."""
    return output.with_suffix(".report")


def check_output(output: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Refuse an output of another kind, one that exists, one that is read, or one whose report would replace files.

    Raises UserError.
    """
    if output.suffix != ".jsonl":
        raise UserError(f"--output {output}: must end in .jsonl")
    if output.resolve() in {path.resolve() for path in inputs}:
        raise UserError(f"--output {output}: is the input file, name another")
    if output.exists() and not overwrite:
        raise UserError(f"--output {output}: already exists; name another, or pass --overwrite to replace it")
    check_replaceable(report_directory(output), _NAMES, "--output")


def provenance(
    inputs: Sequence[Path], seed: int, settings: Mapping[str, Any], tokenizer: tuple[str, Tokenizer] | None = None
) -> dict[str, Any]:
    """What made an output: a JSON object."""
    made: dict[str, Any] = {
        "command": shlex.join(sys.argv),
        "version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "inputs": {str(path): sha256_file(path) for path in inputs},
        "seed": seed,
        "settings": {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()},
    }
    if tokenizer:
        path, loaded = tokenizer
        made["tokenizer"] = {"path": path, "fingerprint": loaded.fingerprint}
    return made


def write_stage_report(
    output: Path,
    title: str,
    summary: str,
    report: Mapping[str, Any],
    charts: Sequence[Chart],
    left_out: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Write both files for a finished output.

    Args:
        output: The file that is reported on; its hash is added to `report["provenance"]`.
        title: Of the page.
        summary: Plain text, as on the terminal.
        report: What `report.json` holds; has "provenance".
        charts: Pictures of the page, in order.
        left_out: Everything that was read and not written, one object each, all with the same keys.
    """
    made = {**report["provenance"], "output": {str(output): sha256_file(output)}}
    with atomic_path(report_directory(output)) as directory:
        directory.mkdir()
        write_json(directory / "report.json", {**report, "provenance": made, "left_out": list(left_out)})
        template = jinja2.Environment(autoescape=True).from_string(_PAGE)
        shown = [{"title": chart.title, "svg": _draw(chart)} for chart in charts]
        page = template.render(title=title, summary=summary, charts=shown, provenance=made, left_out=left_out)
        (directory / "index.html").write_text(page, encoding="utf-8")


def _draw(chart: Chart) -> str:
    """An SVG as base64."""
    # No display, and no state shared with pictures that somebody else draws.
    figure = Figure(figsize=(6, 3.2))
    # Fixed margins, a wide one for names: an automatic layout takes longer than all the rest.
    left = 0.11 if isinstance(chart, Histogram) else 0.38
    axis = figure.add_axes((left, 0.16, 0.96 - left, 0.74))
    axis.set_title(chart.title)
    if isinstance(chart, Histogram):
        values = np.asarray(chart.values, dtype=np.float64)
        axis.hist(values, bins=20, range=chart.span if chart.span or len(values) else (0, 1))
        axis.set_xlabel(chart.label)
        axis.set_ylabel("count")
    else:
        ordered = sorted(chart.counts.items(), key=lambda item: -item[1])[:_MOST_BARS]
        bars = axis.barh(
            [textwrap.fill(name, _LABEL_CHARACTERS) for name, _ in reversed(ordered)],
            [count for _, count in reversed(ordered)],
        )
        axis.bar_label(bars, padding=2)
    stream = io.BytesIO()
    figure.savefig(stream, format="svg")
    return base64.b64encode(stream.getvalue()).decode()


_DEPTH_BINS = 10
_SHOWN_DROPS = 3


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
    """Where the evidence lies in the long contexts, see `data.placement`."""

    tenths: list[int]
    """Pieces of evidence by tenth of the context, from start to end."""
    distance: float
    """Kolmogorov-Smirnov distance to the uniform distribution."""
    critical: float
    """What that distance stays below in 95 of 100 uniform samples."""


@dataclass(frozen=True)
class BuildReport:
    """The numbers of a build; `report.json` holds the same."""

    provenance: dict[str, Any]
    rows_read: int
    """Questions, and rows that are none."""
    rows_written: int
    dropped: dict[str, int]
    """Rows that were not written, by reason."""
    left_out: list[dict[str, Any]]
    """Each of them, with its line in the corpus."""
    pool_documents: int
    """Distinct documents that distractors are drawn from."""
    rows_with_distractors_of_others: int
    """Written rows whose question has too few usable documents of its own for the short context."""
    rows_underfull: int
    """Written rows that are more than 1 % below a length, because the pool does not suffice."""
    rows_without_leak_check: int
    """Written rows whose answer is yes or no."""
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
            more = ", ..." if len(places) > _SHOWN_DROPS else ""
            lines.append(f"  dropped, {reason}: {count}: {', '.join(places[:_SHOWN_DROPS])}{more}")
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
    """Collects what the report says while rows are written."""

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
        """All numbers; raises UserError where no row was built."""
        rows = self._measured
        bad = {(row.path, row.line) for row in self.bad_rows}
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
            + [asdict(Drop(row.line, "", str(row))) for row in self.bad_rows],
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
        """Write `report.json` and the page, see `data.report`."""
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
