"""The report of a stage: `report.json` for programs and one readable page, `index.html`, with its pictures inside.

It lies beside the output, `rows.jsonl` with `rows.report/`, and says what made the output: command, version, seed,
tokenizer and the hashes of everything read and written.
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
from megatron_solopo.data.tokenizer import Tokenizer
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

    Raises ValueError.
    """
    if output.suffix != ".jsonl":
        raise ValueError(f"--output {output}: must end in .jsonl")
    if output.resolve() in {path.resolve() for path in inputs}:
        raise ValueError(f"--output {output}: is the input file, name another")
    if output.exists() and not overwrite:
        raise ValueError(f"--output {output}: already exists; name another, or pass --overwrite to replace it")
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


def write_report(
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
