"""The emulated module against the real one's names, enums and arguments, and against what Transformer Engine asks."""

import inspect
import re
from pathlib import Path

import pytest
import torch
import transformer_engine
import transformer_engine.pytorch as te
import transformer_engine_torch as tex

from tests.emulated_gpu.dump_extension import arguments
from tests.emulated_gpu.extension import REAL, emulated_functions


def test_the_dump_is_of_the_installed_version() -> None:
    assert transformer_engine.__version__ == REAL["version"]


@pytest.mark.parametrize("name", sorted(emulated_functions()))
def test_an_emulated_function_takes_the_real_arguments(name: str) -> None:
    """pybind11 gives no names to some arguments; then their number counts."""
    ours = [
        parameter.name + ("" if parameter.default is parameter.empty else f"={parameter.default}")
        for parameter in inspect.signature(emulated_functions()[name]).parameters.values()
    ]
    real = [argument for argument in REAL["functions"][name] if argument != "*"]
    if all(re.fullmatch(r"arg\d+", argument) for argument in real):
        assert len(ours) == len(real)
    else:
        assert ours == real


def test_every_name_that_transformer_engine_asks_for_is_there() -> None:
    folder = Path(te.__file__).parent
    asked = {name for path in folder.rglob("*.py") for name in re.findall(r"\btex\.([A-Za-z]\w+)", path.read_text())}
    in_text_only = {name for name in asked if not hasattr(tex, name)}
    real = set(REAL["enums"]) | set(REAL["classes"]) | set(REAL["functions"])
    assert len(asked) > 100 and not in_text_only & real
    assert all(hasattr(tex, name) for name in real)


def test_a_function_that_is_not_emulated_raises_by_name() -> None:
    assert "layernorm_fwd" in REAL["functions"]
    with pytest.raises(NotImplementedError, match=r"transformer_engine_torch\.layernorm_fwd is not emulated"):
        tex.layernorm_fwd(torch.ones(2), 1)


def test_arguments_are_read_from_the_first_line_of_a_docstring() -> None:
    line = "f(a: object, b: tuple[int, int], *, c: torch.Tensor | None = None, d: bool = False) -> list[object]\n\nmore"
    assert arguments(line) == ["a", "b", "*", "c=None", "d=False"]
    assert arguments("g() -> int") == []
