"""The report of a stage: `report.json` for programs, and one page, `index.html`, with its pictures inside.

It is beside the output: `rows.jsonl` has `rows.report/`. It says what made the output: command, version, seed,
settings, tokenizer, and the hashes of all files that were read and written.
"""

import base64
import io
import shlex
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from matplotlib.figure import Figure

from megatron_solopo import __version__
from megatron_solopo.command_settings import CommandSettings
from megatron_solopo.data.tokenizer import Tokenizer
from megatron_solopo.errors import UserError
from megatron_solopo.files import atomic_path, check_replaceable, sha256_file, write_json

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
    """How often each size occurs."""

    title: str
    label: str
    values: Sequence[float]
    """May be empty."""
    span: tuple[float, float] | None = None
    """Limits of the axis. None: those of the values."""


@dataclass(frozen=True)
class Bars:
    """Counts by name, the largest first."""

    title: str
    counts: Mapping[str, int]


Chart = Histogram | Bars


def report_directory(output: Path) -> Path:
    """The directory of an output's report."""
    return output.with_suffix(".report")


def check_output(output: Path, overwrite: bool, inputs: Sequence[Path]) -> None:
    """Raise UserError if the output is not .jsonl, is an input, or would replace files that it must not replace."""
    if output.suffix != ".jsonl":
        raise UserError(f"--output {output}: must end in .jsonl")
    if output.resolve() in {path.resolve() for path in inputs}:
        raise UserError(f"--output {output}: is the input file, name another")
    if output.exists() and not overwrite:
        raise UserError(f"--output {output}: already exists; name another, or pass --overwrite to replace it")
    check_replaceable(report_directory(output), _NAMES, "--output")


def provenance(
    inputs: Sequence[Path], seed: int, settings: CommandSettings, tokenizer: tuple[str, Tokenizer] | None = None
) -> dict[str, Any]:
    """What made an output, as a JSON object."""
    made: dict[str, Any] = {
        "command": shlex.join(sys.argv),
        "version": __version__,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "inputs": {str(path): sha256_file(path) for path in inputs},
        "seed": seed,
        "settings": settings.model_dump(mode="json"),
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
        output: The file that the report is about. Its hash is added to `report["provenance"]`.
        title: Title of the page.
        summary: Plain text, as on the terminal.
        report: Content of `report.json`. Must have "provenance".
        charts: Pictures of the page, in order.
        left_out: One object for everything that was read and not written. All have the same keys.
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
    """Draw a chart as SVG, in base64."""
    # Unlike pyplot, this needs no display and shares no state with other pictures.
    figure = Figure(figsize=(6, 3.2))
    # Fixed margins, because an automatic layout takes longer than everything else. Names need a wide one.
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
