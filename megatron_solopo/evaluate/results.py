"""The results file from scored samples."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_solopo import __version__
from megatron_solopo.data.scoring import Score
from megatron_solopo.evaluate.cells import Scored, cells
from megatron_solopo.evaluate.generation import Generator
from megatron_solopo.evaluate.settings import LongContextSettings
from megatron_solopo.evaluate.target import Target
from megatron_solopo.evaluation_results import LongContextResults, Skipped


def make_results(
    settings: LongContextSettings,
    target: Target,
    name: str,
    metrics: Mapping[str, Sequence[Score]],
    max_positions: int | None,
    scored: Sequence[Scored],
    skipped: Sequence[Skipped],
    model: Generator,
) -> LongContextResults:
    """All that is known of an evaluation."""
    found = cells(scored, metrics)
    return LongContextResults(
        name=name,
        model=str(target.path or settings.model),
        backend=target.backend,
        run_dir=None if target.run_dir is None else str(target.run_dir),
        step=target.step,
        main_metrics={task: names[0] for task, names in metrics.items()},
        lengths=sorted({cell.length for cell in found if cell.length is not None}),
        depths=sorted({cell.depth for cell in found if cell.depth is not None}),
        cells=found,
        skipped=list(skipped),
        max_positions=max_positions,
        samples=len(scored),
        prompt_tokens=sum(each.spec.prompt_tokens for each in scored),
        generated_tokens=sum(each.generated.tokens for each in scored),
        seconds=sum(each.generated.seconds for each in scored),
        layout=model.layout,
        device=model.device,
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        version=__version__,
        command=shlex.join(sys.argv),
        settings={option: _plain(value) for option, value in asdict(settings).items()},
    )


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value
