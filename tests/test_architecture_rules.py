"""The rules of `test_architecture` find what they are for: every violation is planted once."""

from pathlib import Path

import pytest

from tests.test_architecture import MAX_FUNCTION_LINES, PACKAGE, PACKAGE_RULES, oversized, read_package


def plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")


# What is planted in a package of its own -> the one complaint it must raise.
VIOLATIONS = [
    ({"data/a.py": "import torch\nfrom megatron_solopo.model import x"}, "data must not import model"),
    ({"data/a.py": "def f():\n    from ..objective import x"}, "data must not import objective"),
    ({"parallel/a.py": "from megatron_solopo import model", "model/__init__.py": ""}, "parallel must not import model"),
    (
        {"plan/cost.py": "import megatron_solopo.plan.dry_run", "plan/dry_run.py": ""},
        "plan must not import plan.dry_run",
    ),
    ({"files.py": "from .config import Config"}, "files must not import config"),
    ({"extras/a.py": ""}, "package 'extras' is not in the table"),
    ({"plan/a.py": "from megatron.core import parallel_state"}, "plan must not import megatron"),
    ({"plan/a.py": "def f():\n    import megatron.core"}, "plan must not import megatron"),
    ({"train/a.py": "try:\n    import wandb\nexcept ImportError:\n    wandb = None"}, "wandb must be imported inside"),
    ({"train/__init__.py": "import os\nfrom megatron_solopo import parallel\nimport megatron.core"}, "it is os"),
    ({"train/a.py": "import megatron.core"}, "it is nothing"),
    ({"data/a.py": "from . import b", "data/b.py": "def f():\n    from .a import x"}, "data.a -> data.b -> data.a"),
    (
        {"data/__init__.py": "from .a import x", "data/a.py": "from megatron_solopo.data import y"},
        "data -> data.a -> data",
    ),
    ({"data/a.py": "print('hello')"}, "print() outside"),
]


@pytest.mark.parametrize(("files", "complaint"), VIOLATIONS, ids=[complaint for _, complaint in VIOLATIONS])
def test_a_planted_violation_is_found(tmp_path: Path, files: dict[str, str], complaint: str) -> None:
    plant(tmp_path, files)
    complaints = [each for rule in PACKAGE_RULES for each in rule(read_package(tmp_path))]
    assert any(complaint in each for each in complaints), complaints
    expected_rules = 2 if "must not import megatron" in complaint else 1  # the missing adaptation too
    assert len(complaints) == expected_rules, complaints


def test_what_is_allowed_raises_no_complaint(tmp_path: Path) -> None:
    allowed = {
        "parallel/__init__.py": "import torch\nfrom .cpu import adapt",
        "parallel/cpu.py": "import megatron.core",
        "model/__init__.py": "from __future__ import annotations\nfrom .. import parallel\nimport megatron.core",
        "model/build.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import transformer_engine\n"
        "from megatron_solopo.parallel import x\nfrom megatron_solopo.config import Config\n"
        "def f():\n    import transformer_engine.pytorch",
        "cli/main.py": "from megatron_solopo import __version__\nprint(__version__)",
    }
    plant(tmp_path, allowed)
    assert [each for rule in PACKAGE_RULES for each in rule(read_package(tmp_path))] == []


def test_planted_long_code_is_found(tmp_path: Path) -> None:
    long_function = "def f():\n" + "    x = 1\n" * MAX_FUNCTION_LINES
    plant(tmp_path, {"data/a.py": long_function, "data/c.py": "x = 1\n"})
    (function,) = oversized(tmp_path)
    assert "f has 61 lines" in function
