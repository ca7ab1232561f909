"""Which lines of the package need a GPU, and whether the tests with emulated kernels executed them.

    python -m tools.checks.gpu_lines COVERAGE_FOLDER

A line needs a GPU if a condition lets it be reached on a GPU alone: conditions are evaluated as they are on a CPU, as
far as `_ON_CPU` knows. So does a function that only such lines name. `gpu_lines.yaml` lists what may stay unexecuted,
with the reason. Another line that was not executed is an error, and so is an entry that is not needed.

COVERAGE_FOLDER holds the files of `coverage`, of all processes: `make test-emulated-gpu`.
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import click
import yaml
from coverage import CoverageData

_ROOT = Path(__file__).resolve().parents[2]
_PACKAGE = _ROOT / "megatron_solopo"
_KEPT = Path(__file__).with_suffix(".yaml")
# These compute with settings, on any machine.
_ANYWHERE = ("config", "plan", "architecture")
# By source: what each is on a CPU.
_ON_CPU = {
    "is_cpu()": True,
    **dict.fromkeys(("self._is_cuda", "is_fp8", "fuses", "HAVE_TE", "has_transformer_engine()"), False),
    **dict.fromkeys(("torch.version.cuda", "torch.cuda.is_available()"), False),
}
# By the last part of the source: of any object.
_ATTRIBUTES = {
    **dict.fromkeys(("uses_transformer_engine", "transformer_engine", "fp8", "fp8_param", "is_cuda"), False),
    "optimizer_offload_fraction": False,
}
# Comparisons with one of these constants.
_EQUAL = {"cuda": False, "cpu": True, "nccl": False, "gloo": True, "dist.Backend.NCCL": False}


def _value(test: ast.expr) -> bool | None:
    """Whether a condition holds on a CPU; None if that depends on other things."""
    source = ast.unparse(test)
    if source in _ON_CPU:
        return _ON_CPU[source]
    match test:
        case ast.Name(id=name) | ast.Attribute(attr=name) | ast.Call(func=ast.Name(id=name)):
            return _ATTRIBUTES.get(name)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            value = _value(operand)
            return None if value is None else not value
        case ast.BoolOp(op=operator, values=operands):
            values = [_value(each) for each in operands]
            deciding = isinstance(operator, ast.Or)
            return deciding if deciding in values else (None if None in values else not deciding)
        case ast.Compare(ops=[operator], comparators=[ast.Constant(value=None)]):
            value = _value(test.left)
            return None if value is None else isinstance(operator, ast.Is) != value
        case ast.Compare(ops=[operator], comparators=[right]):
            constant = right.value if isinstance(right, ast.Constant) else ast.unparse(right)
            if constant in _EQUAL and isinstance(constant, str):
                return _EQUAL[constant] == isinstance(operator, ast.Eq | ast.Is)
    return None


def _leaves(body: list[ast.stmt]) -> bool:
    return bool(body) and isinstance(body[-1], ast.Return | ast.Raise | ast.Continue | ast.Break)


def _gpu_statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements of a block, or of blocks within it, that a CPU never reaches."""
    for place, statement in enumerate(body):
        value = _value(statement.test) if isinstance(statement, ast.If) else None
        if isinstance(statement, ast.If) and value is not None:
            reached, missed = (statement.body, statement.orelse) if value else (statement.orelse, statement.body)
            yield from missed
            yield from _gpu_statements(reached)
            if _leaves(reached):
                yield from body[place + 1 :]
                return
        else:
            if isinstance(statement, ast.Return | ast.Expr | ast.Assign) and _chooses(statement):
                yield statement
            for name in ("body", "orelse", "finalbody"):
                yield from _gpu_statements(getattr(statement, name, []))
            for handler in getattr(statement, "handlers", []):
                yield from _gpu_statements(handler.body)


def _chooses(statement: ast.stmt) -> bool:
    """Whether an expression of one line goes another way on a GPU: a choice, or the right side of `and` and `or`."""
    return any(
        _value(node.test if isinstance(node, ast.IfExp) else node.values[0]) is not None
        for node in ast.walk(statement)
        if isinstance(node, ast.IfExp | ast.BoolOp)
    )


@dataclass(frozen=True)
class Line:
    """A line that needs a GPU."""

    path: str
    """Below the package."""
    number: int
    text: str


def _first_lines(statements: Iterable[ast.stmt]) -> Iterator[int]:
    """Where each statement begins, those within it too; documentation is not executed."""
    for statement in statements:
        for node in ast.walk(statement):
            is_text = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            if isinstance(node, ast.stmt) and not is_text and not isinstance(node, ast.Nonlocal | ast.Global):
                yield node.lineno


def find_gpu_lines() -> list[Line]:
    """All of them, in order."""
    files = [path for path in sorted(_PACKAGE.rglob("*.py")) if path.relative_to(_PACKAGE).parts[0] not in _ANYWHERE]
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    numbers = {path: set(_first_lines(_gpu_statements(tree.body))) for path, tree in trees.items()}
    while found := _functions_for_gpus(trees, numbers):
        for path, function in found:
            numbers[path] |= set(_first_lines(function.body))
    return [
        Line(str(path.relative_to(_PACKAGE)), number, texts[path].splitlines()[number - 1].strip())
        for path in files
        for number in sorted(numbers[path])
    ]


def _functions_for_gpus(
    trees: dict[Path, ast.Module], numbers: dict[Path, set[int]]
) -> list[tuple[Path, ast.FunctionDef]]:
    """Functions, not yet among the lines, that only such lines name."""
    named: Counter[str] = Counter()
    on_gpu: Counter[str] = Counter()
    for path, tree in trees.items():
        for statement in (node for node in ast.walk(tree) if isinstance(node, ast.stmt)):
            for node in _own_expressions(statement):
                name = node.id if isinstance(node, ast.Name) else node.attr
                named[name] += 1
                on_gpu[name] += statement.lineno in numbers[path]
    return [
        (path, node)
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and 0 < named[node.name] == on_gpu[node.name]
        if not set(_first_lines(node.body)) <= numbers[path]
    ]


def _own_expressions(statement: ast.stmt) -> Iterator[ast.Name | ast.Attribute]:
    """Names that a statement uses, without those of statements within it."""
    waiting: list[ast.AST] = [statement]
    while waiting:
        for node in ast.iter_child_nodes(waiting.pop()):
            if isinstance(node, ast.Name | ast.Attribute):
                yield node
            if not isinstance(node, ast.stmt):
                waiting.append(node)


def executed_lines(folder: Path) -> dict[str, set[int]]:
    """By file below the package: lines that any process executed."""
    found: dict[str, set[int]] = {}
    for file in folder.iterdir():
        data = CoverageData(str(file))
        data.read()
        for name in data.measured_files():
            path = Path(name)
            if path.is_relative_to(_PACKAGE):
                found.setdefault(str(path.relative_to(_PACKAGE)), set()).update(data.lines(name) or ())
    return found


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
def main(folder: Path) -> None:
    kept: dict[str, dict[str, str]] = yaml.safe_load(_KEPT.read_text(encoding="utf-8")) or {}
    reasons = {(path, text): reason for path, texts in kept.items() for text, reason in texts.items()}
    lines, executed = find_gpu_lines(), executed_lines(folder)
    missed = [line for line in lines if line.number not in executed.get(line.path, ())]
    click.echo(f"lines that need a GPU: {len(lines) - len(missed)} of {len(lines)} executed")
    unlisted = [line for line in missed if (line.path, line.text) not in reasons]
    for line in missed:
        if line not in unlisted:
            click.echo(f"  {line.path}:{line.number}: {reasons[line.path, line.text]}")
    for line in unlisted:
        click.echo(f"not executed: megatron_solopo/{line.path}:{line.number}: {line.text}", err=True)
    unneeded = reasons.keys() - {(line.path, line.text) for line in missed}
    for path, text in sorted(unneeded):
        click.echo(f"{_KEPT.name}: {path}: {text!r} was executed or is not there; take it out", err=True)
    sys.exit(1 if unlisted or unneeded else 0)


if __name__ == "__main__":
    main()
