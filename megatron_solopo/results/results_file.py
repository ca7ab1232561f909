"""What the files of results have in common; they lie in `<run_dir>/evaluation/` where a run is evaluated.

Programs that compare runs read these schemas without torch.
"""

import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_solopo import __version__
from megatron_solopo.errors import UserError, first_problem
from megatron_solopo.files import write_json

EVALUATION_FOLDER = "evaluation"


class ResultsPart(BaseModel):
    """A part of a file of results."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


class MeanWithInterval(ResultsPart):
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float | None
    """Null, as `high`, where a single value says nothing of the spread."""
    high: float | None

    def __str__(self) -> str:
        if self.low is None or self.high is None:
            return f"{self.mean:+.4f} [one triplet]"
        return f"{self.mean:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"


class Results(ResultsPart):
    """A whole file of results."""

    schema_version: Literal[1] = 1
    name: str
    model: str
    """The directory that was evaluated, or the name that the server knows the model by."""
    run_dir: str | None
    """Directory of the training run that the checkpoint belongs to; null where it belongs to none."""
    step: int | None
    """Optimizer step of the checkpoint; null where it belongs to no run."""
    layout: dict[str, int]
    """Parallel sizes by Megatron-Core's names, and `data_parallel_size`; empty where Megatron-Core did not run."""
    created: str
    """Time in UTC, ISO 8601."""
    version: str
    """Version of this package."""
    command: str

    def write(self, path: Path) -> None:
        """Write the file, complete or not at all."""
        write_json(path, self.model_dump(mode="json"))


def origin() -> dict[str, Any]:
    """The fields of `Results` that say how this process makes a file."""
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "version": __version__,
        "command": shlex.join(sys.argv),
    }


AnyResults = TypeVar("AnyResults", bound=Results)


def read_results(path: Path, kind: type[AnyResults], command: str) -> AnyResults:
    """Read a file that `command` writes. Raises UserError, naming file and field, where the schema is not met."""
    try:
        return kind.model_validate_json(path.read_bytes())
    except ValidationError as error:
        problem = first_problem(error, "the whole file")
        raise UserError(f"{path}: {problem} (expected results of {command})") from None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
