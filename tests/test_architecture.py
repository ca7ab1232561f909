"""Imports go downward only, heavy libraries load late, files and functions stay small: the tables below say which."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_solopo"


@dataclass(frozen=True)
class Room:
    """A room imports from lower levels, from itself, and from the rooms of its level in `beside`."""

    level: int
    beside: frozenset[str] = frozenset()
    megatron: bool = False


# "" is the package's own __init__; a dotted name is one module that lives apart from its folder's room.
ROOMS = {
    **dict.fromkeys(("", "config_section", "exits", "files", "model_directory", "progress", "validation"), Room(0)),
    "config_checkpoint": Room(0, beside=frozenset({"config_section"})),
    "config": Room(0, beside=frozenset({"config_checkpoint", "config_section"})),
    "roles": Room(0, beside=frozenset({"config"})),
    "config_file": Room(0, beside=frozenset({"config", "files"})),
    "evaluation_results": Room(0, beside=frozenset({"files", "validation"})),
    "architecture": Room(0, beside=frozenset({"config", "model_directory"})),
    "run_directory": Room(0, beside=frozenset({"model_directory"})),
    "objective": Room(1),
    "data": Room(1),
    "plan": Room(1, beside=frozenset({"data"})),  # the real packer
    "doctor": Room(1),
    "report": Room(1),
    "parallel": Room(1, megatron=True),
    "logprob": Room(2, megatron=True),
    "model": Room(2, beside=frozenset({"logprob"}), megatron=True),
    "checkpoint": Room(3, megatron=True),
    "train": Room(4, megatron=True),
    "plan.dry_run": Room(4, beside=frozenset({"train"}), megatron=True),
    "evaluate": Room(4, beside=frozenset({"train"}), megatron=True),  # the trainer's forward passes
    "integrations": Room(4, beside=frozenset({"train"}), megatron=True),
    **dict.fromkeys(("cli_convert", "cli_data", "cli_evaluate", "cli_plan", "cli_report", "launch"), Room(5)),
    "cli": Room(5, beside=frozenset({"cli_convert", "cli_data", "cli_evaluate", "cli_plan", "cli_report"})),
    "__main__": Room(5, beside=frozenset({"cli"})),
}
LAZY = ("transformer_engine", "apex", "wandb", "vllm")
PRINTING = ("__main__", "cli", "cli_convert", "cli_data", "doctor")
ADAPTS_CPU = f"{PACKAGE}.parallel"
MAX_FILE_LINES = 300
MAX_FUNCTION_LINES = 60


@dataclass(frozen=True)
class Import:
    target: str
    line: int
    lazy: bool


@dataclass(frozen=True)
class Module:
    """A source file; `name` is relative to the package ("" for its __init__, "data.packing")."""

    name: str
    tree: ast.Module
    is_package: bool
    imports: tuple[Import, ...]

    @property
    def room(self) -> str:
        return self.name if self.name in ROOMS else self.name.split(".")[0]

    @property
    def folder(self) -> str:
        return self.name if self.is_package else self.name.rpartition(".")[0]


def read_package(root: Path) -> dict[str, Module]:
    """Every module under root/megatron_solopo by its name."""
    sources = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        *folders, stem = path.relative_to(root / PACKAGE).with_suffix("").parts
        sources[".".join(folders if stem == "__init__" else (*folders, stem))] = path
    modules = {}
    for name, path in sources.items():
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        is_package = path.stem == "__init__"
        folder = name if is_package else name.rpartition(".")[0]
        modules[name] = Module(name, tree, is_package, tuple(_imports(tree, folder, set(sources))))
    return modules


def _imports(tree: ast.Module, folder: str, known: set[str]) -> Iterator[Import]:
    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom) and child.module == "__future__":
                continue
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, lazy) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = _base(child, folder)
                for alias in child.names:
                    submodule = f"{base}.{alias.name}"
                    target = submodule if submodule.removeprefix(f"{PACKAGE}.") in known else base
                    yield Import(target, child.lineno, lazy)
            else:
                runs_late = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or _only_for_types(child)
                yield from walk(child, lazy or runs_late)

    yield from walk(tree, lazy=False)


def _base(node: ast.ImportFrom, folder: str) -> str:
    if not node.level:
        return node.module or ""
    parts = [PACKAGE, *filter(None, folder.split("."))]
    parents = parts[: len(parts) - (node.level - 1)]
    return ".".join([*parents, *filter(None, [node.module])])


def _only_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def _inside(target: str) -> str | None:
    """The name within this package, or None for a library."""
    return target.removeprefix(PACKAGE).lstrip(".") if target.split(".")[0] == PACKAGE else None


def _at(module: Module, line: int) -> str:
    return f"{PACKAGE}/{module.name.replace('.', '/') or '__init__'}:{line}"


def unknown_rooms(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        if module.room not in ROOMS:
            yield f"{_at(module, 1)}: room {module.room!r} is not in the table ROOMS"


def upward_imports(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        room = ROOMS.get(module.room)
        for each in module.imports if room else ():
            name = _inside(each.target)
            if name is None:
                continue
            other = name if name in ROOMS else name.split(".")[0]
            allowed = other in ROOMS and ROOMS[other].level < room.level
            if not (allowed or other == module.room or other in room.beside):
                yield f"{_at(module, each.line)}: {module.room or '__init__'} must not import {other or '__init__'}"


def forbidden_megatron(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        if module.room in ROOMS and not ROOMS[module.room].megatron:
            for each in module.imports:
                if each.target.split(".")[0] == "megatron":
                    yield f"{_at(module, each.line)}: {module.room or '__init__'} must not import megatron"


def eager_imports(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        for each in module.imports:
            if each.target.split(".")[0] in LAZY and not each.lazy:
                yield f"{_at(module, each.line)}: {each.target} must be imported inside a function"


def unadapted_packages(modules: dict[str, Module]) -> Iterator[str]:
    """Packages that import megatron without `megatron_solopo.parallel` (torch.cuda on a CPU) before it."""
    users = {m.folder for m in modules.values() for each in m.imports if each.target.split(".")[0] == "megatron"}
    for folder in sorted(users - {"parallel"}):
        init = modules.get(folder)
        first = init.imports[0].target if init and init.imports else "nothing"
        if not (first == ADAPTS_CPU or first.startswith(f"{ADAPTS_CPU}.")):
            yield f"{PACKAGE}/{folder}/__init__: first import must be {ADAPTS_CPU}, it is {first}"


def import_cycles(modules: dict[str, Module]) -> Iterator[str]:
    """Cycles between modules, counting the late imports too."""
    edges = {
        name: sorted({target for each in module.imports if (target := _inside(each.target)) in modules} - {name})
        for name, module in modules.items()
    }
    finished: set[str] = set()

    def visit(name: str, trail: list[str]) -> Iterator[str]:
        if name in trail:
            yield "import cycle: " + " -> ".join(each or "__init__" for each in [*trail[trail.index(name) :], name])
        elif name not in finished:
            for target in edges[name]:
                yield from visit(target, [*trail, name])
            finished.add(name)

    for name in modules:
        yield from visit(name, [])


def prints(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        for node in ast.walk(module.tree) if module.room not in PRINTING else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                yield f"{_at(module, node.lineno)}: print() outside {', '.join(PRINTING)}, tools and examples"


PACKAGE_RULES = (unknown_rooms, upward_imports, forbidden_megatron, eager_imports, unadapted_packages)
PACKAGE_RULES += (import_cycles, prints)


def oversized(root: Path) -> Iterator[str]:
    """Files and functions beyond the limits, docstrings included."""
    for path in sorted(path for top in (PACKAGE, "tools", "examples", "tests") for path in (root / top).rglob("*.py")):
        text, where = path.read_text(encoding="utf-8"), path.relative_to(root)
        if (lines := len(text.splitlines())) > MAX_FILE_LINES:
            yield f"{where}: {lines} lines, at most {MAX_FILE_LINES}"
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    yield f"{where}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    found = read_package(ROOT)
    assert {"", "config", "files", "doctor"} <= set(found)
    return found


@pytest.mark.parametrize("rule", PACKAGE_RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule, modules) -> None:
    assert list(rule(modules)) == []


def test_files_and_functions_are_small() -> None:
    assert list(oversized(ROOT)) == []
