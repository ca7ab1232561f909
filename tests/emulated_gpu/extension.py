"""`transformer_engine_torch`, the compiled module of Transformer Engine, with its kernels in plain PyTorch.

`extension.json` says what the real module holds. A name that is not emulated is there and raises when it is used.
"""

import enum
import functools
import json
import types
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

_EMULATED: dict[str, Callable[..., Any]] = {}
calls: Counter[str] = Counter()
"""How often this process called each emulated function."""

REAL: dict[str, Any] = json.loads(Path(__file__).with_name("extension.json").read_text())
ENUMS = {
    name: enum.IntEnum(name, sorted(members.items(), key=lambda member: member[1]))
    for name, members in REAL["enums"].items()
}


def emulates(function: Callable[..., Any]) -> Callable[..., Any]:
    """Mark the function that stands in for the compiled one of the same name."""
    _EMULATED[function.__name__] = function
    return function


def emulated_functions() -> dict[str, Callable[..., Any]]:
    """By name, those that stand in for compiled ones."""
    # Importing them registers them.
    from tests.emulated_gpu import attention, context_parallel, layers, multi_tensor, products, quantization  # noqa: F401

    return _EMULATED


def make_module() -> types.ModuleType:
    """The module, for `sys.modules`."""
    module = types.ModuleType("transformer_engine_torch")
    for name in (*REAL["classes"], *REAL["functions"]):
        setattr(module, name, _refusing(name))
    for name, function in emulated_functions().items():
        setattr(module, name, _counted(function))
    for name, member in ENUMS.items():
        setattr(module, name, member)
    return module


def _refusing(name: str) -> type:
    """A class, because Transformer Engine derives classes from some names when it is imported."""

    def refuse(self: Any, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"transformer_engine_torch.{name} is not emulated")

    return type(name, (), {"__init__": refuse})


def _counted(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        calls[function.__name__] += 1
        return function(*args, **kwargs)

    return call


@emulates
def get_cudnn_version() -> int:
    return 91400


@emulates
def get_cublasLt_version() -> int:
    return 130000


@emulates
def get_num_cublas_streams() -> int:
    return 4
