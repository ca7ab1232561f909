"""The page of `report`: it shows runs side by side, needs no network, and keeps its pictures as PNG files too.

index.html     the page with its pictures as SVG, in the light and the dark theme
report.json    the same numbers for programs
*.png          the pictures in the light theme
"""

import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from megatron_solopo import __version__
from megatron_solopo.errors import UserError
from megatron_solopo.files import atomic_path, check_writable, write_json
from megatron_solopo.report.curves import curve_pictures
from megatron_solopo.report.evaluation_pictures import accuracy_pictures
from megatron_solopo.report.figure import DARK, LIGHT, RenderedPicture, render
from megatron_solopo.report.runs import RunRecord, config_differences, read_runs, status_of
from megatron_solopo.report.table import cost_table, verdict_sentences, verdict_table

_TEMPLATE = "page.html.j2"
_PAGE, _NUMBERS = "index.html", "report.json"


def write_comparison(paths: Sequence[Path], output: Path) -> Path:
    """Compare runs on one page, and return the page's path. An earlier report in `output` is replaced.

    Raises UserError for a path that is no run, and for an output that holds other files.
    """
    runs = read_runs(paths)
    _check_output(output)
    accuracy, curves = ([render(each) for each in pictures(runs)] for pictures in (accuracy_pictures, curve_pictures))
    with atomic_path(output) as folder:
        folder.mkdir()
        for each in (*accuracy, *curves):
            (folder / f"{each.picture.name}.png").write_bytes(each.png)
        (folder / _PAGE).write_text(_page(runs, accuracy, curves), encoding="utf-8")
        write_json(folder / _NUMBERS, _numbers(runs))
    return output / _PAGE


def _check_output(output: Path) -> None:
    check_writable(output, "--output")
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not (output / _NUMBERS).is_file())):
        raise UserError(f"--output {output}: exists and is no report; name another directory")
    foreign = [each.name for each in output.iterdir() if not _is_ours(each)] if output.is_dir() else []
    if foreign:
        raise UserError(f"--output {output}: holds {foreign[0]}, which would be lost; name another directory")


def _is_ours(path: Path) -> bool:
    return path.name in (_PAGE, _NUMBERS) or path.suffix == ".png"


def _page(runs: Sequence[RunRecord], accuracy: Sequence[RenderedPicture], curves: Sequence[RenderedPicture]) -> str:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    template = environment.from_string(files(__package__).joinpath(_TEMPLATE).read_text(encoding="utf-8"))
    return template.render(
        title=", ".join(run.name for run in runs),
        runs=[(run, status_of(run)) for run in runs],
        light=LIGHT,
        dark=DARK,
        accuracy=accuracy,
        unmeasured=[run.name for run in runs if run.evaluations.answers is None],
        unpreferred=[run.name for run in runs if run.evaluations.preferences is None],
        curves=curves,
        verdict=verdict_table(runs),
        sentences=verdict_sentences(runs),
        cost=cost_table(runs),
        differences=config_differences(runs),
        made=_made(),
    )


def _made() -> dict[str, str]:
    created = datetime.now(UTC).isoformat(timespec="seconds")
    return {"version": __version__, "created": created, "command": shlex.join(sys.argv)}


def _numbers(runs: Sequence[RunRecord]) -> dict[str, Any]:
    """What `report.json` holds."""
    verdict, cost = verdict_table(runs), cost_table(runs)
    rows = [
        {
            "name": run.name,
            "path": str(run.path),
            "status": asdict(status_of(run)),
            "notes": run.notes,
            "verdict": _row(verdict.columns, verdict.rows[place][1]),
            "cost": _row(cost.columns, cost.rows[place][1]),
        }
        for place, run in enumerate(runs)
    ]
    return {**_made(), "runs": rows, "differences": dict(config_differences(runs)), "verdict": verdict_sentences(runs)}


def _row(columns: Sequence[str], values: Sequence[Any]) -> dict[str, Any]:
    return {column: asdict(value) for column, value in zip(columns, values, strict=True)}
