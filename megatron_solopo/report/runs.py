"""What is left of a run, read as it is: finished or not, whole or damaged."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from megatron_solopo.report.evaluations import Evaluations, read_evaluations
from megatron_solopo.run_directory import METRICS, RUN_CONFIG

_MANIFEST = "manifest.json"

Step = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One run directory."""

    path: Path
    name: str
    """The shortest end of its path that no other run of the page has."""
    config: dict[str, Any]
    """By dotted key; empty where there is no config.yaml."""
    steps: list[Step]
    """Readable lines of metrics.jsonl, by step; values that are not finite are kept."""
    total_steps: int | None
    """Steps asked for; None where neither config nor data tell."""
    evaluations: Evaluations
    notes: list[str] = field(default_factory=list)
    """What was wrong with its files, one sentence each."""

    def series(self, name: str) -> tuple[list[int], list[float]]:
        """Steps and finite values of a metric."""
        points = [(int(step["step"]), float(step[name])) for step in self.steps if is_finite(step.get(name))]
        return [place for place, _ in points], [value for _, value in points]

    def total(self, name: str) -> float | None:
        """Sum over the steps; None where it was not recorded."""
        values = self.series(name)[1]
        return sum(values) if values else None

    @property
    def last_step(self) -> int:
        """0 before the first."""
        return int(self.steps[-1]["step"]) if self.steps else 0


def is_finite(value: Any) -> bool:
    """Whether it is a number, and neither NaN nor infinite."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_runs(paths: Sequence[Path]) -> list[Run]:
    """Read run directories. Raises ValueError naming the first that is none, or that is given twice."""
    resolved = [path.resolve() for path in paths]
    for path, place in zip(paths, resolved, strict=True):
        if resolved.count(place) > 1:
            raise ValueError(f"{path}: is named twice; name each run once")
        _check(path)
    return [_read(path, name) for path, name in zip(paths, _names(resolved), strict=True)]


def _check(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(
            f"{path}: {'is a file' if path.exists() else 'no such directory'}; name the run_dir of a train"
        )
    if not (path / RUN_CONFIG).is_file() and not (path / METRICS).is_file():
        inside = [each.parent.name for each in sorted(path.glob(f"*/{METRICS}"))]
        meant = f"; did you mean {', '.join(str(path / name) for name in inside[:3])}?" if inside else ""
        raise ValueError(f"{path}: is no run directory, it holds neither {RUN_CONFIG} nor {METRICS}{meant}")


def _names(paths: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as tell all apart."""
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _read(path: Path, name: str) -> Run:
    notes: list[str] = []
    config = _read_config(path / RUN_CONFIG, notes)
    steps = _read_steps(path / METRICS, notes)
    evaluations = read_evaluations(path, config.get("model.path"), notes)
    return Run(path, name, config, steps, _total_steps(config), evaluations, notes)


def _read_config(path: Path, notes: list[str]) -> dict[str, Any]:
    try:
        loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        notes.append(f"{path.name} is missing: its settings are not known.")
        return {}
    except (yaml.YAMLError, UnicodeDecodeError):
        notes.append(f"{path.name} cannot be read: its settings are not known.")
        return {}
    return dict(_flat(loaded)) if isinstance(loaded, dict) else {}


def _flat(section: dict[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    items: list[tuple[str, Any]] = []
    for key, value in section.items():
        items += _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return items


def _read_steps(path: Path, notes: list[str]) -> list[Step]:
    """Every readable line; the last of two with one step counts, as after a restart."""
    if not path.is_file():
        notes.append(f"{path.name} is missing: no step was recorded.")
        return []
    steps: dict[int, Step] = {}
    damaged = []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            step = json.loads(line)
            steps[int(step["step"])] = step
        except (ValueError, TypeError, KeyError):
            damaged.append(number)
    if damaged:
        shown = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        lines = "line" if len(damaged) == 1 else "lines"
        notes.append(f"{path.name}: {len(damaged)} damaged {lines} left out ({shown}).")
    return [steps[step] for step in sorted(steps)]


def _total_steps(config: dict[str, Any]) -> int | None:
    if isinstance(steps := config.get("training.max_steps"), int):
        return steps
    try:
        manifest = json.loads((Path(str(config["data.path"])) / _MANIFEST).read_bytes())
        triplets = float(config["training.num_train_epochs"]) * int(manifest["train"])
        return math.ceil(triplets / int(config["training.global_batch_size"]))
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None
