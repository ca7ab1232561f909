"""Options that are derived from typed settings."""

from pathlib import Path
from typing import Any, Literal

import click
import pytest
from click.testing import CliRunner, Result
from pydantic import Field, ValidationError

from megatron_solopo.cli.options import JSON, settings_options
from megatron_solopo.command_settings import CommandSettings
from megatron_solopo.errors import UserError


class ExampleSettings(CommandSettings):
    """Settings with one field of every kind."""

    source: Path
    """What is read."""
    max_rows: int | None = Field(default=None, ge=1)
    """Rows that are read at
    most."""
    share: float = Field(default=0.5, gt=0, le=1)
    """Share of the rows."""
    mode: Literal["auto"] | Literal["fast", "exact"] = "auto"
    """How rows are read."""
    titles: bool = True
    """Show titles."""
    overwrite: bool = False
    """Replace the output."""
    more: tuple[Path, ...] = ()
    """More files."""
    lengths: tuple[int, ...] = (8, 16)
    """Lengths in tokens."""
    arguments: dict[str, Any] = Field(default={})
    """Arguments for something else."""

    def contradictions(self):
        if self.overwrite and self.more:
            yield "--overwrite: not with --more"
        if self.overwrite and not self.titles:
            yield "--overwrite: not with --no-titles"


def invoke(*arguments: str) -> tuple[ExampleSettings | None, Result]:
    made = []

    @click.command()
    @settings_options(ExampleSettings)
    @JSON
    def command(settings: ExampleSettings, as_json: bool) -> None:
        """Do something."""
        made.append(settings)

    result = CliRunner().invoke(command, arguments)
    return (made[0] if made else None), result


def test_an_option_for_each_field() -> None:
    settings, _ = invoke("--source", "a")
    assert settings == ExampleSettings(source=Path("a"))
    arguments = "--source a --max-rows 3 --share 0.1 --mode exact --no-titles --more b --more c --lengths 1_000,2"
    settings, _ = invoke(*arguments.split())
    more = (Path("b"), Path("c"))
    assert settings == ExampleSettings(
        source=Path("a"), max_rows=3, share=0.1, mode="exact", titles=False, more=more, lengths=(1000, 2)
    )


def test_the_help_tells_types_bounds_and_defaults() -> None:
    text = " ".join(invoke("--help")[1].output.split())
    for part in (
        "Do something.",
        "--source PATH What is read. [required]",
        "--max-rows INTEGER Rows that are read at most. At least 1. --share",
        "--share FLOAT Share of the rows. Above 0 and at most 1. [default: 0.5]",
        "--mode [auto|fast|exact] How rows are read. [default: auto]",
        "--titles / --no-titles Show titles. [default: titles]",
        "--overwrite Replace the output. --more PATH More files.",
        "Lengths in tokens. [default: 8,16]",
    ):
        assert part in text


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        ("--max-rows 0 --share 2", ["--max-rows 0: must be at least 1", "--share 2.0: must be above 0 and at most 1"]),
        ("--overwrite --more b --no-titles", ["--overwrite: not with --more", "--overwrite: not with --no-titles"]),
    ],
)
def test_all_mistakes_are_told_by_their_flags(arguments, lines) -> None:
    _, result = invoke("--source", "a", *arguments.split())
    assert isinstance(result.exception, UserError) and str(result.exception).splitlines() == lines


@pytest.mark.parametrize("arguments", ["--mode slow", "--lengths 1,x", "--max-rows many", '--arguments {"a":1,"a":2}'])
def test_a_value_of_another_type_is_a_mistake_on_the_command_line(arguments) -> None:
    _, result = invoke("--source", "a", *arguments.split())
    assert result.exit_code == 2 and f"Invalid value for '{arguments.split()[0]}'" in result.output


def test_a_program_that_sets_an_illegal_choice_is_told_the_legal_ones() -> None:
    with pytest.raises(UserError, match="--mode slow: legal: auto, fast, exact"):
        ExampleSettings(source=Path("a"), mode="slow")


@pytest.mark.parametrize("values", [{}, {"source": Path("a"), "unknown": 1}, {"source": 5}])
def test_a_fault_of_the_calling_code_keeps_its_type(values) -> None:
    with pytest.raises(ValidationError):
        ExampleSettings(**values)
