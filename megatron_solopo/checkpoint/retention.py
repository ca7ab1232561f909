"""Which checkpoints stay, and which one is the best.

checkpoints/best    the name of the best saved so far, by `checkpoint.best_metric`
"""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from megatron_solopo.checkpoint.directory import LATEST, checkpoints, read_pointer, step_of, write_pointer
from megatron_solopo.checkpoint.pending import TRAINER_STATE
from megatron_solopo.config_checkpoint import CheckpointConfig
from megatron_solopo.files import remove

BEST = "best"


def check_best_metric(config: CheckpointConfig, names: Iterable[str], evaluates: bool) -> None:
    """Raise ValueError if `best_metric` is none of the run's metrics: `names`, and those of the evaluation."""
    legal = list(names)
    legal += [f"eval_{name}" for name in legal] if evaluates else []
    if config.best_metric is not None and config.best_metric not in legal:
        hint = "" if evaluates else "; those that begin with eval_ need training.eval_steps"
        raise ValueError(
            f"checkpoint.best_metric={config.best_metric} is no metric of this run; legal: {', '.join(legal)}{hint}"
        )


def tidy(root: Path, config: CheckpointConfig) -> None:
    """On rank 0, after a save: point to the best, and remove what need not be kept.

    What `latest` and `best` name stays. A checkpoint steps aside under a hidden name before it is removed, so that none
    that bears its name is ever half there.
    """
    newest = read_pointer(root, LATEST)
    if config.best_metric is not None and newest is not None:
        _rank(root, root / newest, config.best_metric, config.greater_is_better)
    if config.keep_last is None:
        return
    pinned = {read_pointer(root, BEST), newest}
    for path in checkpoints(root)[config.keep_last :]:
        if path.name in pinned or (config.keep_every is not None and step_of(path.name) % config.keep_every == 0):
            continue
        aside = path.with_name(f".{path.name}.deleted")
        remove(aside)
        path.rename(aside)
        remove(aside)


def _rank(root: Path, path: Path, metric: str, greater_is_better: bool) -> None:
    value, name = _value(path, metric), read_pointer(root, BEST)
    best = None if name is None else _value(root / name, metric)
    if value is not None and (best is None or (value > best if greater_is_better else value < best)):
        write_pointer(root, BEST, path.name)


def _value(path: Path, metric: str) -> float | None:
    """What a checkpoint's step measured; None where that step was not evaluated, or the checkpoint is gone."""
    try:
        state: dict[str, Any] = json.loads((path / TRAINER_STATE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    value = (state.get("metrics") or {}).get(metric)
    return value if value is not None and math.isfinite(value) else None
