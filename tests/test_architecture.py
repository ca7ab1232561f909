"""Imports go downward only, heavy libraries load late, functions stay small: the tables below say which."""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_solopo"


@dataclass(frozen=True)
class Package:
    """A package imports from lower levels, from itself, and from the packages of its level in `beside`."""

    level: int
    beside: frozenset[str] = frozenset()
    megatron: bool = False


# "" is the package's own __init__; a dotted name is one module that lives apart from its package.
PACKAGES = {
    **dict.fromkeys(("", "errors", "exits", "progress"), Package(0)),
    **dict.fromkeys(("command_settings", "cpu_features", "files", "journal", "process_pool"), Package(1)),
    **dict.fromkeys(("checksums", "config", "results"), Package(2)),
    "architecture": Package(3),
    "run_directory": Package(4),
    **dict.fromkeys(("objective", "data", "report"), Package(5)),
    "plan": Package(5, beside=frozenset({"data"})),  # the real packer
    "generate": Package(5, beside=frozenset({"data"})),
    "triplets": Package(5, beside=frozenset({"data", "generate"})),
    "evaluation_settings": Package(6),
    "parallel": Package(5, megatron=True),
    "model": Package(6, megatron=True),
    "checkpoint": Package(7, megatron=True),
    "train": Package(8, megatron=True),
    **dict.fromkeys(("evaluate", "integrations", "plan.dry_run", "plan.startup_dry_run"), Package(9, megatron=True)),
    **dict.fromkeys(("cli", "launch"), Package(10)),
    "__main__": Package(11),
}
LAZY = ("transformer_engine", "apex", "wandb", "vllm")
PRINTING = ("__main__", "cli")
ADAPTS_CPU = f"{PACKAGE}.parallel"
MAX_FUNCTION_LINES = 60


@dataclass(frozen=True)
class Import:
    target: str
    line: int
    lazy: bool
    for_types: bool = False


@dataclass(frozen=True)
class Module:
    """A source file; `name` is relative to the package ("" for its __init__, "data.packing")."""

    name: str
    tree: ast.Module
    is_package: bool
    imports: tuple[Import, ...]

    @property
    def package(self) -> str:
        return self.name if self.name in PACKAGES else self.name.split(".")[0]

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
    def walk(node: ast.AST, lazy: bool, for_types: bool = False) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ImportFrom) and child.module == "__future__":
                continue
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, lazy, for_types) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = _base(child, folder)
                for alias in child.names:
                    submodule = f"{base}.{alias.name}"
                    target = submodule if submodule.removeprefix(f"{PACKAGE}.") in known else base
                    yield Import(target, child.lineno, lazy, for_types)
            else:
                types = for_types or _only_for_types(child)
                runs_late = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or types
                yield from walk(child, lazy or runs_late, types)

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


def unknown_packages(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        if module.package not in PACKAGES:
            yield f"{_at(module, 1)}: package {module.package!r} is not in the table PACKAGES"


def upward_imports(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        package = PACKAGES.get(module.package)
        for each in module.imports if package else ():
            name = _inside(each.target)
            if name is None:
                continue
            other = name if name in PACKAGES else name.split(".")[0]
            allowed = other in PACKAGES and PACKAGES[other].level < package.level
            if not (allowed or other == module.package or other in package.beside):
                yield f"{_at(module, each.line)}: {module.package or '__init__'} must not import {other or '__init__'}"


def forbidden_megatron(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        if module.package in PACKAGES and not PACKAGES[module.package].megatron:
            for each in module.imports:
                if each.target.split(".")[0] == "megatron":
                    yield f"{_at(module, each.line)}: {module.package or '__init__'} must not import megatron"


def eager_imports(modules: dict[str, Module]) -> Iterator[str]:
    for module in modules.values():
        for each in module.imports:
            if each.target.split(".")[0] in LAZY and not each.lazy:
                yield f"{_at(module, each.line)}: {each.target} must be imported inside a function"


def unadapted_packages(modules: dict[str, Module]) -> Iterator[str]:
    """Packages that import megatron without `megatron_solopo.parallel` (torch.cuda on a CPU) before it."""
    users = {
        module.folder
        for module in modules.values()
        for each in module.imports
        if each.target.split(".")[0] == "megatron" and not each.for_types
    }
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
        for node in ast.walk(module.tree) if module.package not in PRINTING else ():
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                yield f"{_at(module, node.lineno)}: print() outside {', '.join(PRINTING)}, tools and examples"


PACKAGE_RULES = (unknown_packages, upward_imports, forbidden_megatron, eager_imports, unadapted_packages)
PACKAGE_RULES += (import_cycles, prints)


def oversized(root: Path) -> Iterator[str]:
    """Functions beyond the limit, docstrings included."""
    for path in sorted(path for top in (PACKAGE, "tools", "examples", "tests") for path in (root / top).rglob("*.py")):
        where = path.relative_to(root)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    yield f"{where}:{node.lineno}: {node.name} has {length} lines, at most {MAX_FUNCTION_LINES}"


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    found = read_package(ROOT)
    assert {"", "config", "files", "cli.doctor"} <= set(found)
    return found


@pytest.mark.parametrize("rule", PACKAGE_RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps(rule, modules) -> None:
    assert list(rule(modules)) == []


def test_no_collective_is_called_that_torch_deprecates() -> None:
    """Its successors need torch 2.13, and older ones are allowed."""
    files = [path for folder in (PACKAGE, "tests", "tools", "examples") for path in (ROOT / folder).rglob("*.py")]
    called = {name for path in files for name in re.findall(r"\bdist\.(\w+)\(", path.read_text(encoding="utf-8"))}
    assert "all_reduce" in called
    assert [name for name in sorted(called) if hasattr(getattr(dist, name, None), "__deprecated__")] == []


def test_functions_are_small() -> None:
    assert list(oversized(ROOT)) == []
