"""Makes a process with a CPU one with an emulated GPU. `site/sitecustomize.py` calls it before anything else."""

import contextlib
import importlib.util
import os
import sys
import types
from collections.abc import Iterator
from typing import Any


def install() -> None:
    """Import Transformer Engine over the emulated extension, and let the project take its layers."""
    os.environ["TORCHDYNAMO_DISABLE"] = "1"  # Megatron-Core's fused functions run line by line
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # Transformer Engine looks for no CUDA library
    # The package imports its half for torch at once, so the half that loads the extension goes first.
    spec: Any = importlib.util.find_spec("transformer_engine")
    package = sys.modules["transformer_engine"] = importlib.util.module_from_spec(spec)
    import transformer_engine.common as common

    from tests.emulated_gpu import device, extension

    def load(framework: str) -> None:
        sys.modules["transformer_engine_torch"] = extension.make_module()

    common.load_framework_extension = load
    wanted = os.environ.pop("MEGATRON_SOLOPO_DEVICE", None)
    from megatron_solopo.cpu_features import DEVICE_VARIABLE
    from megatron_solopo.parallel import cpu

    cpu.adapt_if_needed()
    if wanted is not None:
        os.environ[DEVICE_VARIABLE] = wanted  # for this process' children
    device.emulate_gpu()
    device.gather_one_by_one()
    device.let_gloo_be_nccl()
    with _stub_of_triton():
        spec.loader.exec_module(package)
    device.wait_once_for_each_message()
    device.keep_fused_functions_in_float32()


class _Anything(types.ModuleType):
    """A module of Triton: its decorators decorate nothing, its types are anything."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Anything(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not kwargs else self

    def __mro_entries__(self, bases: Any) -> tuple[type, ...]:
        return ()


@contextlib.contextmanager
def _stub_of_triton() -> Iterator[None]:
    """Transformer Engine defines kernels in Triton when it is imported. None is called here, and torch's build for CPUs
    comes without Triton.
    """
    if importlib.util.find_spec("triton") is not None:
        yield
        return
    import torch._inductor.standalone_compile  # noqa: F401  (looks for Triton when it is imported)

    names = ["triton", "triton.language", "triton.language.core", "triton.language.standard"]
    for name in names:
        module: Any = _Anything(name)
        module.__path__, module.__version__ = [], "3.4.0"
        sys.modules[name] = module
        parent, _, own = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], own, module)
    yield
    for name in names:
        del sys.modules[name]
